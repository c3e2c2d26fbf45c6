"""One run inside ComfyUI's sampling: sample, optimise or search, hand back."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...sampler.ending import within_memory
from ...sampler.hybrid import hybrid
from ...sampler.memory import DIFFERS, differs, out_of_memory, unlock
from ...sampler.optimize import NOT_FINITE, NoGradient, Result, Score
from ...sampler.replay import Segment
from ...sampler.restart import Stretch, in_rounds, lengths, search_by_restarts
from ...sampler.resume import Left, frozen, thawed
from ...sampler.rollout import USABLE, NotTheSame, per_image
from ...sampler.search import METHODS, SearchSettings, search
from ...sampler.seeds import Start, best_of
from ...sampler.statistics import expected, noise_statistics
from ...sampler.trace import Trace
from .batches import decided_once
from .chain import Chain, most_particles, within_chain
from .conditioning import ends_early, in_whole_rounds
from .dynamic import on_one_device, static_guider
from .inference_mode import normal
from .job import INTERRUPTS, Job
from .kernels import pytorch_kernels, training
from .loading import free_bytes, reset_peak, synchronize, used_bytes
from .patches import follows_steps, named, names_of_keeping, why_no_gradient, why_not_two
from .places import written_over
from .process import RESTART, Process, in_brief
from .repeating import give_up_repeating, has_no_engine, has_no_repeatable_way, repeatable
from .replay import ReplayNoise, ReplaySampler, described, family_of
from .selftest import check_backward, check_gradient

log = logging.getLogger("mira")


SEEDS_CUT = "interrupted while seeds were compared"


@dataclass
class Optimized:
    """Latents as a KSampler gives them: the kept iterates, the plain sample of the same noise, and every iterate.

    noise, sampler: what samples the kept ones again, as ComfyUI's NOISE and SAMPLER.
    """

    latent: Tensor
    plain: Tensor
    result: Result
    iterates: list[Tensor]
    noise: ReplayNoise
    sampler: ReplaySampler


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers, on whatever devices."""
    return one.shape == other.shape and torch.allclose(one.float().cpu(), other.float().cpu(), equal_nan=True)


def run(job: Job, work: Callable[[Process, tuple[Tensor, ...]], Result] | None = None) -> Optimized:
    """Sample, optimise, hand back. What needs a gradient takes the whole thread out of inference mode until it is done:
    no `await` within. What needs none goes on as ComfyUI samples, with the graph's own models wherever they are.

    work(process, noises): what to do with the plain sample's noises; the reward's optimisation if not given.
    """
    several = job.guider.model_patcher.get_additional_models_with_key("multigpu")
    if isinstance(job.settings, SearchSettings) and METHODS[job.settings.method].steers:
        follows = "the conditioning has hooks whose keyframes follow the steps" if follows_steps(job.guider) else ""
        if names := names_of_keeping(job.guider.model_options):
            follows = f"{names} keeps what one step of the sampling makes for the later ones"
        if follows:
            raise ValueError(
                f"{job.node}: {follows}, and the method {job.settings.method} goes on from the middle: bypass that, or "
                "take best_of_n, zero_order or restarts"
            )
    if job.gradient:
        guider = static_guider(job.guider, job.node)
        if why := why_not_two(job.guider) or why_no_gradient(guider):
            raise ValueError(f"{job.node}: {why}")
    else:
        guider = copy.copy(job.guider)
        guider.model_patcher = on_one_device(guider.model_patcher, f"{job.node}: model")
    sampler = _WorkingSampler(job, work or optimizing)
    # ComfyUI's own part stays in inference mode, as the executor has it: what it makes and moves, its nodes use again.
    with torch.inference_mode():
        latent = guider.sample(
            job.noise.clone(),  # a patch may write into it
            job.latent,
            sampler,
            job.sigmas.clone(),  # uni_pc writes into them
            denoise_mask=job.mask,
            callback=None,
            disable_pbar=True,
            seed=job.seed,
        )
    management = comfy.model_management
    where: dict[str, Any] = {"device": management.intermediate_device()}
    if job.restart_sigmas and hasattr(management, "intermediate_dtype"):  # a node that samples as KSampler does
        where["dtype"] = management.intermediate_dtype()
    result = sampler.result
    if not alike(latent, sampler.handed_back):
        result.trace.notices.append(
            "something in the graph changes the image after the sampler: what comes back is not what was optimised"
        )
    if several:
        alone = guider.model_patcher.load_device
        result.trace.notices.append(f"the model is split over several GPUs, but gradients need one: it ran on {alone}")
    family = family_of(job.guider.model_patcher.model)
    return Optimized(
        latent.to(**where),
        sampler.plain.to(**where),
        result,
        [x.to(where.get("dtype", x.dtype)) for x in sampler.iterates],
        # The nodes add to the settings, which are the same dict.
        ReplayNoise(
            sampler.segments,
            {
                "seed": job.seed,
                "family": family,
                "sampler": described(job.sampler),
                "settings": result.trace.settings,
            },
        ),
        ReplaySampler(job.sampler, sampler.segments, sampler.optimized, result.trace.settings["repeatable"], family),
    )


def optimizing(process: Process, noises: tuple[Tensor, ...]) -> Result:
    """Follow the gradient of the reward, from the best of the seeds, in rounds; or go on where a run had ended."""
    settings, resume, notices = process.settings, process.job.resume, []
    if resume:
        resume = take_up(process, resume)
        notices.append(f"went on from iteration {resume.done} of the run before, which had ended there")
    count, start = settings.seeds, None
    if count > 1 and len(noises) == 1 and not process.depends_on_seed:
        notices.append(
            f"seeds is {count}, but neither the noise nor the sampler depends on a seed: the given one was used"
        )
    elif count > 1:
        start = process.start or compare_seeds(process, count)
        process.start = start  # should the run begin again
        noises, process.expected = start.noises, start.x0
        if start.cut and start.cut.interrupted:
            settings = replace(settings, iterations=0)
    if len(lengths(settings)) > 1 and (why := process.why_no_restart):
        notices.append(f"restart_every is {settings.restart_every}, but was taken as 0: {why}")
        settings = replace(settings, restart_every=0)
    if resume:
        process.expected = None  # its first trajectory is of other noises
    # A reward that draws random numbers goes on with the ones that it would have had: one at each evaluation, of which
    # an iterate may have had several.
    drawn = {-1: process.scoring.evaluations}

    def on_iteration(k: int, rows: list[dict], score: Score) -> None:
        drawn[k] = process.scoring.evaluations
        process.job.on_iteration(k, rows, score)

    result = in_rounds(
        Stretch(process.rollout, noises),
        process.scoring.score,
        settings,
        process.restart,
        on_iteration=on_iteration,
        interrupts=INTERRUPTS,
        memory=used_bytes,
        resume=resume,
    )
    left, result.left = result.left, None
    if left and not (start and start.cut):  # where seeds are still to be tried, it begins with them
        next_one = drawn[left.done] - 1 if left.done in drawn else drawn[max(drawn)]
        state = frozen((start, next_one, process.repeatable, left.value))
        result.left = Left(state, left.done) if state else None
    result.trace.notices[:0] = notices
    if (rounds := len(lengths(settings))) > 1:
        result.trace.settings["restart_seeds"] = [process.seed_of(RESTART + n) for n in range(1, rounds)]
    if start:
        tell_seeds(process, start, count, result.trace)
        if start.cut and start.cut.interrupted:
            result.cut_short, result.reason = True, SEEDS_CUT
    return result


def take_up(process: Process, resume: Left) -> Left:
    """What the run before had come to, put back into `process`; what is left of it is the optimiser's."""
    process.start, process.scoring.evaluations, process.repeatable, inner = thawed(resume.value)
    if process.job.repeatable and not process.repeatable:
        give_up_repeating()
    return replace(resume, value=inner)


def compare_seeds(process: Process, count: int) -> Start:
    """The best of so many seeds of every image, under the same random numbers of the reward."""
    scoring = process.scoring
    scoring.redraw = False
    try:
        return best_of(process.sample_of, lambda x0: scoring.score(x0).total, count, INTERRUPTS, process.job.on_seed)
    finally:
        scoring.redraw = True


def tell_seeds(process: Process, start: Start, count: int, trace: Trace) -> None:
    chosen = [process.seed_of(n) for n in start.chosen.tolist()]
    trace.settings |= {
        "seed_rewards": start.rewards.T.tolist(),
        "seed_chosen": start.chosen.tolist(),
        "seeds_begun_from": chosen,
    }
    trace.notices += [began(b, start, seed) for b, seed in enumerate(chosen)]
    if start.cut:
        if len(start.rewards) < count:
            trace.notices.append(f"{start.cut} after {len(start.rewards)} of {count} seeds: the others were not tried")
        if start.cut.interrupted:
            trace.reasons = [SEEDS_CUT] * len(start.chosen)


def began(image: int, start: Start, seed: int) -> str:
    """Which seed an image began from."""
    rewards, chosen = start.rewards[:, image], int(start.chosen[image])
    it = f"image {image}" if len(start.chosen) > 1 else "it"
    if chosen == 0:
        return f"{it} began from the given seed, the best of {len(rewards)} (reward {rewards[0]:.4g})"
    return (
        f"{it} began from seed {seed}, the best of {len(rewards)} (reward {rewards[chosen]:.4g}; the given "
        f"seed's {rewards[0]:.4g})"
    )


def searching(process: Process, noises: tuple[Tensor, ...]) -> Result:
    """Let the better of several particles survive."""
    process.scoring.redraw = False  # particles are compared under the same draw
    settings: SearchSettings = process.settings
    options = dict(
        seed=process.job.seed,
        on_iteration=process.job.on_iteration,
        interrupts=INTERRUPTS,
        memory=used_bytes,
    )
    if METHODS[settings.method].optimizes:
        return hybrid(process.rollout, process.scoring.score, noises, settings, others=process.noises_of, **options)

    if METHODS[settings.method].restarts:
        if why := process.why_no_restart:
            raise ValueError(f"{process.job.node}: method is {settings.method}, but nothing can restart here: {why}")

        def sample(number: int, p: int, x0: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
            if x0 is None:
                return process.sample_of(p)
            return process.from_image((number - 1) * settings.particles + p, x0)[1:]

        process.sample_again()
        del options["seed"]
        return search_by_restarts(sample, process.scoring.score, settings, steps=len(process.sigmas) - 1, **options)

    def found(chain: Chain) -> Result:
        most, patches = most_particles(process, settings), named(process.extra_args["model_options"])
        if patches and METHODS[settings.method].steers and chain.remembers(noises[0]):
            raise RuntimeError(
                f"{process.job.node}: something in the graph remembers earlier steps{patches}, and the method "
                f"{settings.method} goes on from the middle with others. Bypass it, or take best_of_n, zero_order or "
                "restarts."
            )
        if patches or not in_whole_rounds(process.model_wrap, len(noises[0])):
            most = 1  # a patch may average over its batch
        with process.sampling_again():
            return search(
                chain, process.rollout, process.scoring.score, noises, settings, most=most, initial=process.initial_of,
                on_plain=process.compare, **options,
            )  # fmt: skip

    return within_chain(process, noises[0], found)


class _WorkingSampler(comfy.samplers.Sampler):
    """Does the whole work where ComfyUI runs one sample. Afterwards: `plain`, `handed_back`, `iterates`, `result`, and
    `segments`, of which `optimized` tells whether any is other than the plain sample's.
    """

    def __init__(self, job: Job, work: Callable) -> None:
        self.job, self.work = job, work
        self.plain: Tensor
        self.handed_back: Tensor  # as ComfyUI makes a latent of it
        self.result: Result

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        _: Any = False,
    ) -> Tensor:
        job = self.job
        if not alike(noise, job.noise):
            raise ValueError(
                f"{job.node}: something in the graph changes the noise on its way to the sampler"
                f"{named(extra_args['model_options'])}, and would change the optimised one again. Bypass it; of "
                "Context Windows, turn freenoise off."
            )
        if why := ends_early(model_wrap, extra_args["model_options"], sigmas):
            raise ValueError(f"{job.node}: {why}")
        process = Process(job, model_wrap, sigmas, extra_args, latent_image, denoise_mask, noise.dtype)
        try:
            with decided_once(process.inner, process.free_bytes):
                found = self._through(process, noise)
            self.handed_back = model_wrap.inner_model.process_latent_out(found.float()).cpu()
            return found
        finally:
            process.end()
            unlock()

    def _through(self, process: Process, noise: Tensor) -> Tensor:
        job, model_wrap = self.job, process.model_wrap
        # First as ComfyUI itself samples, before anything is loaded or switched for the work.
        synchronize()
        started = time.perf_counter()
        plain, noises = process.drawn(noise)
        synchronize()
        sampling_seconds = time.perf_counter() - started
        self.plain = model_wrap.inner_model.process_latent_out(plain.float())
        with ExitStack() as stack:
            self._load(process, stack)
            stack.enter_context(training(job.gradient))
            stack.enter_context(pytorch_kernels())
            stack.enter_context(repeatable(job.repeatable and plain.is_cuda))
            if job.gradient:
                process = process.outside_inference_mode()
            # Updates of noises in half precision vanish, or become NaN.
            noises = tuple(normal(z).float() for z in noises)
            process.expected = normal(plain)
            process.given = process.expected, noises
            result = self._work(process, noises)
        # Where the sample itself goes through it: a GPU's arithmetic differs from a CPU's in the last bits.
        out = model_wrap.inner_model.process_latent_out
        self.iterates = [out(x.to(plain.device).float()).cpu() for x in result.iterates]
        self._write_down(process, noises, result, sampling_seconds)
        on_cpu(result)
        self.result = result
        self.segments = result.segments
        if not self.segments:
            part = torch.ones(len(plain), dtype=torch.bool)
            self.segments = [Segment(process.sigmas.detach().cpu(), result.best_noises, part)]
        self.optimized = True
        # The replay under PyTorch's attention differs from the plain sample in its last bits.
        if len(noises) != len(result.best_noises):  # of a restart in fewer steps
            return result.best.to(plain)
        pairs = zip(noises, result.best_noises, strict=True)
        kept_plain = torch.stack([(z == kept.to(z)).flatten(1).all(1) for z, kept in pairs]).all(0)
        self.optimized = not kept_plain.all()
        return torch.where(per_image(kept_plain, plain), plain, result.best.to(plain))

    def _write_down(
        self, process: Process, noises: tuple[Tensor, ...], result: Result, sampling_seconds: float
    ) -> None:
        """What the user should know of a run, and how it was made."""
        job = self.job
        if process.attention_replaced:
            process.tell(
                "the graph's own attention does not call the one that it is given, and may have no gradient: PyTorch's "
                "is in its place but for the plain sample"
            )
        patches = named(process.extra_args["model_options"])
        if patches and any(NOT_FINITE in notice for notice in result.trace.notices):
            process.tell(f"what is not finite may come from a patch of the model{patches}")
        if process.scoring.tiled:
            process.tell("images were decoded in tiles, for want of memory, and scored as that makes them")
        for notice in process.notices:
            log.warning("%s: %s", job.node, notice)
        result.trace.notices += process.notices
        if result.cut_short and not result.reason.startswith("interrupted"):  # which needs no telling
            result.trace.notices.append(f"ended by {result.reason}: this is the best so far")
        result.trace.settings |= {
            "checkpointing": process.rollout.memory,
            "repeatable": process.repeatable,
            "sampling_seconds": sampling_seconds,
            "ended": result.reason,
            "noise_statistics": {
                "plain": noise_statistics(noises),
                "kept": noise_statistics(result.best_noises),
                "expected": expected(noises),
            },
        }
        if len(set(job.prompts)) > 1:  # what the setting of one text does not tell
            result.trace.settings["prompts"] = list(job.prompts)
        if estimate := process.rollout.estimate:
            parts = {"step": estimate.step, "decoding_and_reward": estimate.score, "free": estimate.free}
            more = f"more than {USABLE * estimate.free / 1e6:.0f}"  # where measuring stopped
            result.trace.settings["memory_mb"] = {k: v / 1e6 if v < float("inf") else more for k, v in parts.items()}

    def _load(self, process: Process, stack: ExitStack) -> None:
        """Everything that the work needs; where it does not fit beside other models, once more without those."""
        try:
            _, cut = within_memory(lambda: stack.enter_context(process.loaded()))
        except RuntimeError as problem:
            raise RuntimeError(f"{self.job.node}: {problem}") from problem
        if cut is None:
            return
        process.unload_others()
        _, cut = within_memory(lambda: stack.enter_context(process.loaded()))
        if cut:
            patchers = [p for some in process.patchers for p in some]
            sizes = ", ".join(f"{type(p.model).__name__} {p.model_size() / 1e9:.1f} GB" for p in patchers)
            why = ", as a gradient needs them whole" if self.job.gradient else ""
            raise type(cut.problem)(
                f"{self.job.node}: out of memory while its models were loaded ({sizes}; free: "
                f"{free_bytes() / 1e9:.1f} GB): take a smaller model or reward{why}"
            )

    def _work(self, process: Process, noises: tuple[Tensor, ...]) -> Result:
        job, optimizes = process.job, process.job.gradient and process.job.settings.iterations > 0
        looked = False
        while True:
            process.begin_rollout(job.memory)
            reset_peak()
            try:
                if optimizes and not looked:  # before the self-test asks patches about single steps, and seeds
                    expected = process.expected
                    try:
                        process.sample_again()
                    finally:
                        process.expected = expected  # the first trajectory with a gradient is looked at, too
                    looked = True
                if optimizes:
                    check_gradient(process, noises[0])
                    if job.reward:
                        check_backward(process)
                return self.work(process, noises)
            except NoGradient as problem:
                raise RuntimeError(f"{job.node}: {problem}") from problem
            except NotTheSame as problem:
                raise RuntimeError(
                    f"{job.node}: {problem}: something in the graph remembers what it saw before"
                    f"{named(process.extra_args['model_options'])}. Set memory to none, or bypass it."
                ) from problem
            except RuntimeError as problem:
                if not (process.repeatable and (has_no_repeatable_way(problem) or has_no_engine(problem))):
                    if differs(problem):
                        raise RuntimeError(f"{job.node}: ended by {DIFFERS}") from None
                    if out_of_memory(problem):
                        raise type(problem)(f"{job.node}: {no_room(process)}") from None
                    if written_over(problem):
                        raise RuntimeError(
                            f"{job.node}: something in the graph writes over what a gradient needs"
                            f"{named(process.extra_args['model_options'])}. Bypass it. ({in_brief(problem)})"
                        ) from problem
                    raise
                said = str(problem).splitlines()[0]
            # Nothing was reported yet: it is met in the first backward pass.
            process.notices.append(f"this run does not repeat to the bit on this device: {said}")
            give_up_repeating()
            process.repeatable, process.scoring.evaluations = False, 0


def on_cpu(result: Result) -> None:
    """What a finished run is remembered by takes no room on the device, of which ComfyUI could know nothing."""
    for name, value in vars(result).items():
        if isinstance(value, Tensor):
            setattr(result, name, value.cpu())
    result.best_noises = tuple(z.detach().cpu() for z in result.best_noises)


def no_room(process: Process) -> str:
    """What a run that does not fit would have taken, and what to change."""
    rollout = process.rollout
    if not process.job.gradient:
        return "out of memory with one particle at a time: take a smaller image or batch, or a smaller reward model"
    said = f"out of memory with {rollout.way}"
    if e := rollout.estimate:
        more = f"more than {USABLE * e.free / 1e9:.1f}"  # where measuring stopped
        parts = [
            f"{what} {f'{b / 1e9:.1f}' if b < float('inf') else more} GB"
            for what, b in (("a step", e.step), ("decoding and reward", e.score))
        ]
        said += f" (for backward {' and '.join(parts)}, where {e.free / 1e9:.1f} GB were free)"
    remedies = ["a smaller image or batch", "a smaller reward model"]
    fewer = 3 if not rollout.gradient_steps or rollout.gradient_steps > 3 else 1
    if fewer != rollout.gradient_steps:
        remedies.insert(1, f"gradient_steps {fewer}")
    return f"{said}: take {', '.join(remedies[:-1])} or {remedies[-1]}"
