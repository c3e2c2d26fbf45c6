"""The adapter to ComfyUI: its guiders, samplers, memory and inference mode, seen from the core.

The optimisation runs inside one `guider.sample(...)`, as a Sampler of our own, so that conditioning, ControlNets,
hooks and LoRAs are prepared by ComfyUI exactly as for a plain sample.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..rewards.base import Reward
from ..sampler.hybrid import hybrid
from ..sampler.memory import out_of_memory
from ..sampler.optimize import Result, Score, Settings, optimize
from ..sampler.preference import PreferenceSettings
from ..sampler.rollout import Rollout, draw, per_image
from ..sampler.search import SearchSettings, search
from ..sampler.seeds import Start, best_of
from ..sampler.selftest import gradient_error
from ..sampler.statistics import expected, noise_statistics
from .grad import OutOfPlaceAdd, blocks_checkpointed, loaded, normal, sdpa, static, training
from .twin import StandIn, Twins

log = logging.getLogger("mira")
CPU_BATCH = 16  # images
INTERRUPTS = (comfy.model_management.InterruptProcessingException,)


def decode(vae, latent: Tensor) -> Tensor:
    """VAE latents (B, C, h, w) -> images (B, 3, H, W), nominally in [0, 1]: not clamped, so that gradients live."""
    # The VAE's own last step is affine but for its clamp: read it off inside the clamp's range.
    zero, half = (vae.process_output(torch.tensor([v])).item() for v in (0.0, 0.5))
    images = vae.first_stage_model.decode(latent.to(vae.device, vae.vae_dtype)).float()
    return images * (2 * (half - zero)) + zero


def patcher_of(module: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """One ModelPatcher per reward network, kept on it, so that ComfyUI's memory management knows it."""
    if not hasattr(module, "mira_patcher"):
        management = comfy.model_management
        module.mira_patcher = comfy.model_patcher.ModelPatcher(
            module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )
    return module.mira_patcher


@dataclass
class Job:
    """What to optimise, in ComfyUI's own types. prompts: one per image, for rewards that need them."""

    guider: object
    sampler: object
    sigmas: Tensor
    noise: Tensor
    latent: Tensor
    vae: object
    reward: Reward | None
    settings: Settings | PreferenceSettings | SearchSettings
    seed: int = 0
    mask: Tensor | None = None
    prompts: Sequence[str] = ()
    weighting: str = "marginal"
    measured: str = "guided"
    gradient_steps: int = 0
    memory: str = "auto"
    gradient: bool = True  # whether the work needs one through the model
    on_iteration: Callable = lambda k, rows, score: None


@dataclass
class Optimized:
    """Latents as a KSampler gives them: the kept iterates, the plain sample of the same noise, and every iterate."""

    latent: Tensor
    plain: Tensor
    result: Result
    iterates: list[Tensor]


def run(job: Job, work: Callable[[_Process, tuple[Tensor, ...]], Result] | None = None) -> Optimized:
    """Sample, optimise, hand back. Leaves inference mode, so it must not be awaited around.

    work(process, noises): what to do with the plain sample's noises; the reward's optimisation if not given.
    """
    with torch.inference_mode(False), torch.enable_grad():
        guider = copy.copy(job.guider)
        guider.model_patcher = static(guider.model_patcher)
        guider.original_conds = normal(guider.original_conds)
        guider.model_options = normal(guider.model_options)
        sampler = _WorkingSampler(job, work or optimizing)
        latent = guider.sample(
            normal(job.noise),
            normal(job.latent),
            sampler,
            normal(job.sigmas),
            denoise_mask=normal(job.mask),
            callback=None,
            disable_pbar=True,
            seed=job.seed,
        )
        device = comfy.model_management.intermediate_device()
        return Optimized(latent.to(device), sampler.plain.to(device), sampler.result, sampler.iterates)


def optimizing(process: _Process, noises: tuple[Tensor, ...]) -> Result:
    """Follow the gradient of the reward, from the best of the seeds."""
    settings, start = process.settings, None
    if settings.seeds > 1:
        process.redraw = False  # seeds are compared under the same draw
        start = best_of(
            process.rollout, lambda x0: process.score(x0).total, noises, settings.seeds, process.job.seed, INTERRUPTS
        )
        process.redraw, noises = True, start.noises
        if start.interrupted:
            settings = replace(settings, iterations=0)
    result = optimize(
        process.rollout,
        process.score,
        noises,
        settings,
        on_iteration=process.job.on_iteration,
        interrupts=INTERRUPTS,
        memory=used_bytes,
    )
    if start:
        result.trace.settings |= {"seed_rewards": start.rewards.T.tolist(), "seed_chosen": start.chosen.tolist()}
        result.trace.notices += [began(b, start) for b in range(len(start.chosen))]
        if start.interrupted:
            result.trace.reasons = ["interrupted while seeds were compared"] * len(start.chosen)
    return result


def began(image: int, start: Start) -> str:
    """Which seed an image began from."""
    rewards, chosen = start.rewards[:, image], int(start.chosen[image])
    if chosen == 0:
        return f"image {image} began from the given seed, the best of {len(rewards)} (reward {rewards[0]:.4g})"
    return (
        f"image {image} began from seed {chosen + 1} of {len(rewards)} (reward {rewards[chosen]:.4g}; the given "
        f"seed's {rewards[0]:.4g})"
    )


def searching(process: _Process, noises: tuple[Tensor, ...]) -> Result:
    """Let the better of several particles survive."""
    process.redraw = False  # particles are compared under the same draw
    settings: SearchSettings = process.settings
    options = dict(
        seed=process.job.seed,
        on_iteration=process.job.on_iteration,
        interrupts=INTERRUPTS,
        memory=used_bytes,
    )
    if settings.method == "mira_fk":
        return hybrid(process.rollout, process.score, noises, settings, **options)

    def found(chain: _Chain) -> Result:
        most = process.most_particles(settings)
        return search(chain, process.rollout, process.score, noises, settings, most=most, **options)

    return process.within_chain(noises[0], found)


class _WorkingSampler(comfy.samplers.Sampler):
    """Does the whole work where ComfyUI runs one sample. Afterwards: `plain`, `iterates` and `result`."""

    def __init__(self, job: Job, work: Callable):
        self.job, self.work = job, work
        self.plain: Tensor | None = None
        self.result: Result | None = None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, _=False):
        job = self.job
        process = _Process(job, model_wrap, sigmas, extra_args, latent_image, denoise_mask)
        with ExitStack() as stack:
            stack.enter_context(training())
            stack.enter_context(process.loaded())
            synchronize()
            started = time.perf_counter()
            plain, noises = draw(process.plain, noise)
            synchronize()
            sampling_seconds = time.perf_counter() - started
            self.plain = model_wrap.inner_model.process_latent_out(plain.float())
            if job.gradient:
                process.check_gradient(noise)
            process.rollout = rollout = Rollout(
                process.differentiable,
                sigmas,
                signal=process.signal,
                weighting=job.weighting,
                measured=job.measured,
                gradient_steps=job.gradient_steps,
                memory=job.memory,
                mask=denoise_mask,
                free_bytes=free_bytes,
                blocks=process.blocks(),
            )
            reset_peak()
            self.result = self.work(process, noises)
            self.iterates = [model_wrap.inner_model.process_latent_out(x.float()) for x in self.result.iterates]
            self.result.trace.settings |= {
                "checkpointing": rollout.memory,
                "sampling_seconds": sampling_seconds,
                "ended": self.result.reason,
                "noise_statistics": {
                    "plain": noise_statistics(noises),
                    "kept": noise_statistics(self.result.best_noises),
                    "expected": expected(noises),
                },
            }
            # The replay under PyTorch's attention differs from the plain sample in its last bits.
            pairs = zip(noises, self.result.best_noises, strict=True)
            kept_plain = torch.stack([(z == kept).flatten(1).all(1) for z, kept in pairs]).all(0)
            return torch.where(per_image(kept_plain, plain), plain, self.result.best)


class _Process:
    """The frozen model's sampling process, inside ComfyUI's `guider.sample`."""

    def __init__(self, job: Job, model_wrap, sigmas, extra_args, latent_image, mask):
        self.job, self.model_wrap, self.sigmas = job, model_wrap, sigmas
        self.vae = copy.copy(job.vae)
        self.vae.patcher = static(job.vae.patcher)
        self.vae.first_stage_model = self.vae.patcher.model
        self.latent_image, self.mask = latent_image, mask
        self.extra_args = extra_args
        self.inner = model_wrap.inner_model
        self.flow = isinstance(self.inner.model_sampling, comfy.model_sampling.CONST)
        self.place: Callable = nullcontext  # the self-test may change it
        self.rollout: Rollout | None = None
        self.evaluations = 0
        self.redraw = True  # a reward that draws random numbers draws new ones at every evaluation
        dtype = self.inner.manual_cast_dtype or self.inner.get_dtype()
        # Gradients of a mean over pixels are near float16's smallest numbers.
        scale = 2.0**10 if dtype == torch.float16 else 1.0
        self.settings = replace(job.settings, loss_scale=scale) if scale != 1 else job.settings

    def signal(self, sigma: Tensor) -> Tensor:
        return 1 - sigma if self.flow else torch.ones_like(sigma)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Everything that a run needs."""
        job = self.job
        patchers = [self.model_wrap.model_patcher, *self.model_wrap.loaded_models, self.vae.patcher]
        patchers += [patcher_of(m) for m in job.reward.modules] if job.reward else []
        patchers += getattr(self.model_wrap, "networks", [])  # of a guider of ours
        shape = list(job.latent.shape)
        need = self.inner.memory_required([2 * shape[0], *shape[1:]])
        need += self.vae.memory_used_decode(shape, self.vae.vae_dtype)
        with loaded(patchers, 2 * need):
            yield

    def _run(self, noise: Tensor, function: Callable, options: dict) -> Tensor:
        """ComfyUI's own sampler object, with `function` and `options` in place of its own."""
        sampler = copy.copy(self.job.sampler)
        sampler.sampler_function, sampler.extra_options = function, options
        return sampler.sample(
            self.model_wrap, self.sigmas, dict(self.extra_args), None, noise, self.latent_image, self.mask, True
        )

    def twin(self, source) -> tuple[Callable, dict]:
        """The sampler function's twin whose every noise is `source(draw)`, and its options."""
        twins, options = Twins(source), dict(self.job.sampler.extra_options)
        if "noise_sampler" in options:
            options["noise_sampler"] = twins.noise_sampler(options["noise_sampler"])
        return twins(self.job.sampler.sampler_function), options

    def _sample(self, noise: Tensor, source, denoiser: Callable[..., Callable]) -> Tensor:
        twin, options = self.twin(source)

        def function(model_k, x, sigmas, extra_args, callback, disable, **options):
            extra_args, call = denoiser(model_k, extra_args)
            return twin(
                StandIn(model_k, call), x, sigmas, extra_args=extra_args, callback=None, disable=True, **options
            )

        return self._run(noise, function, options)

    def plain(self, noise: Tensor, source, wrap) -> Tensor:
        """ComfyUI's own sample, bit for bit, with its noises seen on their way."""

        def denoiser(model_k, extra_args):
            def call(x, sigma, **kwargs):
                comfy.model_management.throw_exception_if_processing_interrupted()
                return model_k(x, sigma, **kwargs)

            return extra_args, call

        return self._sample(noise, source, denoiser)

    def differentiable(self, noise: Tensor, source, wrap) -> Tensor:
        def denoiser(model_k, extra_args):
            extra_args, call = self._network(model_k, extra_args)
            return extra_args, wrap(call)

        return self._sample(noise, source, denoiser)

    def _network(self, model_k, extra_args: dict) -> tuple[dict, Callable]:
        """The denoiser with everything in it that has a backward; (guided, conditional) where both are wanted."""
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        options.setdefault("transformer_options", {})["optimized_attention_override"] = sdpa
        conditional = []
        if self.job.measured == "conditional":

            def capture(args):
                conditional[:] = [args["cond_denoised"]]
                return args["denoised"]

            options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", ()), capture]

        own = len(options.get("sampler_post_cfg_function", ()))

        def escapes(kwargs) -> bool:
            # CFG++ samplers add a function of theirs, and take the unconditional prediction out of it.
            return len(kwargs.get("model_options", {}).get("sampler_post_cfg_function", ())) > own

        def call(x, sigma, **kwargs):
            comfy.model_management.throw_exception_if_processing_interrupted()
            with self.place():
                out = model_k(x, sigma, **kwargs)
            if self.job.measured != "conditional":
                return out
            if not conditional:
                raise ValueError("this guider gives no conditional prediction: set `measured` to guided")
            return out, conditional.pop()

        call.escapes = escapes
        return {**extra_args, "model_options": options}, call

    @property
    def _keep(self) -> bool:
        return self.rollout.memory == "none" or not torch.is_grad_enabled()

    def render(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) as sampled -> images (B, 3, H, W), nominally in [0, 1]."""
        latent = self.inner.process_latent_out(x0.float())
        if self._keep:
            images = decode(self.vae, latent)
        else:
            images = checkpoint(lambda z: decode(self.vae, z), latent, use_reentrant=False, preserve_rng_state=False)
        if images.ndim != 4:
            raise ValueError(f"the VAE decodes to shape {tuple(images.shape)}: MIRA optimises still images only")
        return images.to(x0.device)

    def score(self, x0: Tensor) -> Score:
        images = self.render(x0)
        total, parts = self.reward(images)
        total = total.to(x0.device, torch.float32)
        return Score(total, {k: p.detach().float() for k, p in parts.items()}, images.detach())

    def reward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        job, keep = self.job, self._keep
        job.reward.evaluation(self.evaluations)
        self.evaluations += self.redraw
        prompts = list(job.prompts) * (len(images) // max(1, len(job.prompts)))  # one round for every particle
        # Layer by layer where a network has known layers: less is kept, and recomputed once only.
        layers = [] if keep else [blocks_checkpointed(m, OutOfPlaceAdd) for m in job.reward.modules]
        if keep or any(layers):
            with ExitStack() as stack:
                for within in filter(None, layers):
                    stack.enter_context(within())
                return job.reward(images, prompts)
        return checkpoint(lambda i: job.reward(i, prompts), images, use_reentrant=False, preserve_rng_state=False)

    def within_chain(self, noise: Tensor, work: Callable[[_Chain], Result]) -> Result:
        """`work` inside ComfyUI's sampler call, where a run can be stopped and continued at any noise level."""
        found = []

        def function(model_k, x, sigmas, extra_args, callback, disable, **options):
            found.append(work(_Chain(self, model_k, extra_args)))
            return x

        self._run(noise, function, {})
        return found[0]

    def most_particles(self, settings: SearchSettings) -> int:
        """How many particles of the whole batch probably fit at once."""
        shape = list(self.job.latent.shape)
        each = self.inner.memory_required([2 * shape[0], *shape[1:]])
        each += self.vae.memory_used_decode(shape, self.vae.vae_dtype)
        if settings.method == "das":
            each *= 8  # activations are kept for one backward; running out of memory halves what runs at once
        fit = int(0.7 * free_bytes() / each)
        if comfy.model_management.get_torch_device().type == "cpu":
            fit = min(fit, CPU_BATCH // shape[0])  # larger batches only cost memory there, and time to get it
        return max(1, min(settings.particles, fit))

    def blocks(self) -> Callable | None:
        return blocks_checkpointed(self.inner.diffusion_model, lambda: self.place())

    def check_gradient(self, noise: Tensor) -> None:
        """One denoising step, its gradient against a finite difference, before anything is optimised."""
        half = (self.inner.manual_cast_dtype or self.inner.get_dtype()) in (torch.float16, torch.bfloat16)
        name = type(self.inner.diffusion_model).__name__
        remedy = (
            "This model cannot be optimised through as it is: use its fp16, bf16 or fp32 weights instead of a "
            "quantised file, and bypass nodes that patch it or its attention."
        )

        def attempt(within: Callable) -> float:
            try:
                with within():
                    return self._gradient_error(noise)
            except RuntimeError as problem:
                if out_of_memory(problem) and within is nullcontext and self.blocks():
                    return attempt(self.blocks())
                if "inplace operation" in str(problem) and self.place is nullcontext:
                    self.place = OutOfPlaceAdd
                    return attempt(within)
                if out_of_memory(problem):
                    raise
                raise RuntimeError(f"{name} has no gradient: {str(problem).splitlines()[0]}. {remedy}") from problem

        wrong = attempt(nullcontext)
        if not wrong < (0.5 if half else 0.1):
            raise RuntimeError(
                f"{name} gives no usable gradient: it is off by {wrong:.2g} (relative) against a finite difference "
                f"of one denoising step. {remedy}"
            )
        log.debug("gradient self-test of %s: relative error %.2g", name, wrong)

    def _gradient_error(self, noise: Tensor) -> float:
        found = []

        def function(model_k, x, sigmas, extra_args, callback, disable, **options):
            extra_args, call = self._network(model_k, extra_args)
            sigma = sigmas[(len(sigmas) - 1) // 2] * x.new_ones(len(x))

            def predict(x: Tensor) -> Tensor:
                out = call(x, sigma, **extra_args)
                return out[0] if isinstance(out, tuple) else out

            found.append(gradient_error(predict, x * (sigma[0] ** 2 + 1).sqrt() / (sigmas[0] ** 2 + 1).sqrt()))
            return x

        # Some guiders add what counts as a constant here, and not in a finite difference.
        with getattr(self.model_wrap, "without_constants", nullcontext)():
            self._run(noise, function, {})
        return found[0]


class _Chain:
    """ComfyUI's own sampler function in pieces, on particles of the whole batch: `search.Chain`."""

    def __init__(self, process: _Process, model_k, extra_args: dict):
        self.process, self.model_k, self.extra_args = process, model_k, extra_args

    def _on(self, count: int) -> tuple[object, dict, Callable]:
        """(model, extra_args, denoiser) for `count` latents: what belongs to the batch, once for every particle."""
        process, model_k, extra_args = self.process, copy.copy(self.model_k), dict(self.extra_args)
        rounds = count // len(process.job.latent)

        def tiled(t: Tensor) -> Tensor:
            return t.repeat(rounds, *[1] * (t.ndim - 1)) if t is not None and len(t) > 1 else t

        model_k.latent_image, model_k.noise = tiled(model_k.latent_image), tiled(model_k.noise)
        extra_args["denoise_mask"] = tiled(extra_args.get("denoise_mask"))
        extra_args, call = process._network(model_k, extra_args)
        return model_k, extra_args, call

    def start(self, z_T: Tensor) -> Tensor:
        process = self.process
        full = process.job.sampler.max_denoise(process.model_wrap, process.sigmas)
        sampling = process.inner.model_sampling
        return sampling.noise_scaling(process.sigmas[0], z_T, process.latent_image, full)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        _, extra_args, call = self._on(len(x))
        out = self.process.rollout.predict(call, x, sigma, extra_args)
        return out[0] if isinstance(out, tuple) else out

    def segment(self, x: Tensor, i: int, j: int, source, wrap) -> Tensor:
        process = self.process
        model_k, extra_args, call = self._on(len(x))
        twin, options = process.twin(source)
        sigmas = process.sigmas[i : j + 1]
        model = StandIn(model_k, wrap(call))
        return twin(model, x, sigmas, extra_args=extra_args, callback=None, disable=True, **options)


def free_bytes() -> float:
    device = comfy.model_management.get_torch_device()
    return comfy.model_management.get_free_memory(device)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def used_bytes() -> float:
    """Peak memory of the GPU, or this process's resident memory on a CPU."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
