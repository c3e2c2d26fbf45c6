"""ComfyUI's sampling as a differentiable process: its guiders and samplers, seen from the core.

The optimisation runs inside one `guider.sample(...)`, as a Sampler of our own, so that conditioning, ControlNets,
hooks and LoRAs are prepared by ComfyUI exactly as for a plain sample.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sampler.ending import within_memory
from ...sampler.restart import Stretch, tail
from ...sampler.rollout import NoiseSource, Rollout, difference, draw
from ...sampler.seeds import Start, another, fresh, stream
from .blocks import blocks_checkpointed
from .conditioning import ends_early, noised_by_seed, prepared
from .dynamic import static
from .generators import RandomState, random_state, same_state, seed_generators
from .inference_mode import leave_inference_mode_with, normal
from .job import Job, why_no_restart
from .kernels import Around, attention_of
from .loading import free_bytes, loaded, patcher_of, unload_all_but
from .patches import keeping, named
from .places import Place, gaps_of
from .samplers import StandIn, twin_of
from .scoring import Scoring

log = logging.getLogger("mira")
APART = (0.002, 0.02)  # a prediction, from the same a moment before; in half precision
OF_OTHERS = "is noised by the given seed, for other seeds too: KSampler's pictures of those differ"
SEEN_IMAGE = f"the image that the conditioning shows {OF_OTHERS}"
OUTSIDE = f"what the mask leaves out {OF_OTHERS}"
DRAWN = (
    "what the model draws at random (token merging, tiling) is the given seed's for other seeds too: KSampler's "
    "pictures of those differ"
)
RESTART = 2**20  # the number of the first restart's seed, beyond all candidates'
SAGE_APART = 0.6  # how far, relative, an image by a coarser attention may be from the same by PyTorch's
# The same of an image sampled again from its own noises where nothing is wrong: in full precision, in half precision.
IMAGE_APART = (0.1, 0.25)
KEEPING_APART = (0.01, 0.25)  # where a patch keeps something from step to step, and might have begun with it
KEEPING_SAME = (1e-4, 1e-2)  # and of a step that is computed again, which is the same bits where nothing is kept
LOSS_SCALE = 2.0**10  # in float16: gradients of a mean over pixels are near its smallest numbers


class Process:
    """The frozen model's sampling process, inside ComfyUI's `guider.sample`."""

    def __init__(
        self,
        job: Job,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        latent_image: Tensor,
        mask: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the noise as it comes to the sampler, which newer hosts make of it whatever it was."""
        self.job, self.model_wrap, self.sigmas = job, model_wrap, sigmas
        self.vae = copy.copy(job.vae)
        if job.gradient:
            self.vae.patcher = static(job.vae.patcher, f"{job.node}: vae")
            self.vae.first_stage_model = self.vae.patcher.model
        self.latent_image, self.mask, self.dtype = latent_image, mask, dtype
        self.extra_args = extra_args
        self.inner = model_wrap.inner_model
        self.flow = isinstance(self.inner.model_sampling, comfy.model_sampling.CONST)
        self.place = Place()  # the self-test may change it
        self.rollout: Rollout  # once it begins
        self.rolling: list[Process] = []  # which have a rollout: this one, and the stretches of it
        self.scoring = Scoring(job.node, self.vae, job.reward, job.prompts, self.inner.process_latent_out)
        self.repeatable = job.repeatable
        self.notices = list(job.notices)
        if mask is not None:
            for b in torch.nonzero(~(mask > 0).flatten(1).any(1)).flatten().tolist():
                self.tell(f"image {b} has a mask that is black at the latent's size: it stays as it was")
        self.given: tuple[Tensor, tuple[Tensor, ...]]  # the plain sample and its noises, once it is made
        self.expected: Tensor | None = None  # what the first trajectory should give, until it was compared
        self.states: list[tuple] = []  # of the random number generators, before every call of the plain sample
        self.start: Start | None = None  # the best of several seeds, once it is known
        # Sage's attention is coarser than PyTorch's, and so may be that of another node.
        name = comfy.ldm.modules.attention.optimized_attention.__name__
        self.coarser_attention = "sage" in name
        self.attention = attention_of(extra_args["model_options"])
        self.draws = False  # whether a call of the model draws random numbers of its own, as the plain sample shows
        self.is_loaded = False  # with all that looks at the images
        self.has_blocks = True  # which may be computed again one by one
        self.keeps = False  # whether a patch keeps something from step to step, as the self-test finds
        dtype = self.inner.manual_cast_dtype or self.inner.get_dtype()
        scale = LOSS_SCALE if torch.float16 in (dtype, self.vae.vae_dtype) else 1.0
        self.half = dtype in (torch.float16, torch.bfloat16)
        self.settings = replace(job.settings, loss_scale=scale) if scale != 1 else job.settings

    def drawn(self, noise: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A plain sample and its noises; where memory runs out, once more with the run's own models alone."""
        known = len(self.states)
        found, cut = within_memory(draw, self.plain, noise)
        if cut is None:
            return found
        if not known:
            self.states.clear()  # of the attempt
        self.unload_others()
        return draw(self.plain, noise)

    def unload_others(self) -> None:
        """Make room, of which there was too little: every model goes that is not needed now."""
        sampling, looking = self.patchers
        unload_all_but(sampling + looking if self.is_loaded else sampling, self.model_wrap.model_patcher.load_device)
        log.warning("%s: out of memory: unloaded what it does not need, and tries again", self.job.node)

    def outside_inference_mode(self) -> Process:
        """This process on tensors that autograd can save."""
        process = copy.copy(self)
        process.sigmas, process.mask = normal(self.sigmas), normal(self.mask)
        process.latent_image, process.extra_args = normal(self.latent_image), normal(self.extra_args)
        leave_inference_mode_with(process.model_wrap, self.extra_args["model_options"])
        return process

    def signal(self, sigma: Tensor) -> Tensor:
        return 1 - sigma if self.flow else torch.ones_like(sigma)

    # -- noises of other seeds

    def seed_of(self, n: int) -> int:
        """The seed of candidate n; 0 is the given one's."""
        return another(self.job.seed, n) if n else self.job.seed

    def initial_of(self, n: int) -> Tensor:
        """z_T of candidate n, as the graph makes it: where it does not depend on a seed, the same."""
        job = self.job
        if n and job.initial:
            z = job.initial(self.seed_of(n))
        else:
            z = fresh([job.noise], stream(job.seed, n))[0] if n else job.noise
        return normal(z).to(self.sigmas.device, torch.float32)

    @property
    def noise(self) -> Tensor:
        """The given z_T as ComfyUI's own sampling takes it: where the model is, in its own precision."""
        return self.initial_of(0).to(self.dtype)

    @functools.cached_property
    def depends_on_seed(self) -> bool:
        return not torch.equal(self.initial_of(1), self.initial_of(0))

    @functools.cached_property
    def shows_noised(self) -> bool:
        return noised_by_seed(self.model_wrap)

    @functools.cached_property
    def fixed_outside(self) -> bool:
        """Whether what lies outside of a mask is noised by the sampler's own seed, as ddim does."""
        return self.mask is not None and bool(getattr(self.job.sampler, "inpaint_options", {}).get("random"))

    def sample_of(self, n: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(x0, noises): the plain sample of candidate n's seed, bit for bit."""
        if n == 0:
            return self.given
        if self.shows_noised:
            self.tell(SEEN_IMAGE)
        if self.fixed_outside:
            self.tell(OUTSIDE)
        if self.draws:
            self.tell(DRAWN)
        before = self.extra_args
        if not self.fixed_outside:
            self.extra_args = before | {"seed": self.seed_of(n)}
        try:
            x0, noises = self.drawn(self.initial_of(n).to(self.dtype))
        finally:
            self.extra_args = before
        return x0, tuple(z.float() for z in noises)

    def noises_of(self, n: int, like: Sequence[Tensor]) -> list[Tensor]:
        """z of candidate n, without a sample: the injected noises are drawn here."""
        return [self.initial_of(n), *fresh(like[1:], stream(self.job.seed, n))]

    # -- restarts

    @property
    def why_no_restart(self) -> str | None:
        if why := why_no_restart(self.job.sigmas, self.initial_of(0)):
            return why
        early = ends_early(self.model_wrap, self.extra_args["model_options"], self.restart_schedule)
        return early and f"of a restart {early}"

    @functools.cached_property
    def restart_schedule(self) -> Tensor:
        """The sigmas of every restart of this run."""
        job, level = self.job, self.settings.restart_denoise
        return job.restart_sigmas(level) if job.restart_sigmas else tail(job.sigmas, level)

    def from_image(self, number: int, x0: Tensor) -> tuple[Process, Tensor, tuple[Tensor, ...]]:
        """This process from x0 (B, C, ...) on, noised to `restart_denoise` of the schedule: (it, its sample, noises).

        The sample is KSampler's: x0 as the latent, the share as denoise, and the seed `seed_of(RESTART + number)`.
        """
        job, sigmas = self.job, self.restart_schedule
        process = copy.copy(self)
        process.sigmas = normal(sigmas).to(self.sigmas)
        process.latent_image = x0.to(self.latent_image)
        if self.mask is not None:  # what is not painted stays as it was given
            process.latent_image = torch.where(self.mask > 0, process.latent_image, self.latent_image)
        options = self.extra_args["model_options"]
        options = options | {"transformer_options": options.get("transformer_options", {}) | {"sample_sigmas": sigmas}}
        process.extra_args = self.extra_args | {"model_options": options, "seed": self.seed_of(RESTART + number)}
        process.states, process.draws, process.expected = [], False, None
        if self.depends_on_seed:
            z = self.initial_of(RESTART + number)
        else:
            z = fresh([self.initial_of(0)], stream(job.seed, RESTART + number))[0]
        with torch.no_grad():
            seed_generators(z.cpu().float(), process.extra_args["seed"])
            process.model_wrap = prepared(
                self.model_wrap, process.latent_image, self.mask, process.extra_args["seed"], self.sigmas.device
            )
            x0, noises = process.drawn(z.to(self.dtype))
        return process, x0, tuple(z.float() for z in noises)

    def restart(self, number: int, x0: Tensor) -> Stretch:
        """`from_image` as what can be optimised."""
        process, _, noises = self.from_image(number, x0)
        process.begin_rollout(self.rollout.memory)
        process.rollout.go_on_as(self.rollout)
        self.rollout = process.rollout  # the next one goes on as this one
        return Stretch(process.rollout, noises, process.extra_args["seed"])

    def begin_rollout(self, memory: str) -> None:
        job = self.job
        self.rolling.append(self)
        self.rollout = Rollout(
            self.differentiable,
            self.sigmas,
            signal=self.signal,
            noise_scale=float(getattr(self.inner.model_sampling, "noise_scale", 1.0)),
            weighting=job.weighting,
            measured=job.measured,
            gradient_steps=job.gradient_steps,
            memory=memory,
            mask=self.mask,
            free_bytes=self.free_bytes,
            score_bytes=self.scoring.score_bytes,
            blocks=self.blocks(),
            random=self.random,
        )
        self.scoring.policy = self.rollout  # a restart's takes the place of the one before
        self.watch()

    def watch(self) -> None:
        """A patch that keeps its last step is another one's when a step is computed again: by however little."""
        if self.keeps:
            self.rollout.same = KEEPING_SAME[self.half]

    def end(self) -> None:
        """Let go of what holds this process in turn, whose models are then freed with the last that names them.

        Python's collector would free them too. But where it takes a clone together with the model that it was cloned
        from, ComfyUI's list of loaded models keeps an entry without a model: it speaks of a memory leak and collects
        garbage before every later load.
        """
        while self.rolling:
            vars(self.rolling.pop()).pop("rollout", None)
        self.scoring.end()

    # --

    @property
    def patchers(self) -> tuple[list[ModelPatcher], list[ModelPatcher]]:
        """Of everything that a run needs: (what samples, what looks at the images)."""
        reward = self.job.reward
        scorers = [patcher_of(m) for m in reward.modules] if reward else []
        scorers += getattr(self.model_wrap, "networks", [])  # of a guider of ours
        return [self.model_wrap.model_patcher, *self.model_wrap.loaded_models], [self.vae.patcher, *scorers]

    @contextmanager
    def loaded(self) -> Iterator[None]:
        shape = list(self.job.latent.shape)
        need = self.inner.memory_required([2 * shape[0], *shape[1:]])
        need += self.vae.memory_used_decode(shape, self.vae.vae_dtype)
        if self.job.gradient:
            need, least = 2 * need, None
        else:  # what ComfyUI's own sampling asks for: for more the model would be sent away
            least = self.inner.memory_required(shape)
        sampling, looking = self.patchers
        with loaded(sampling, need, least, beside=looking):
            self.is_loaded = True
            yield

    def through_sampler(self, noise: Tensor, function: Callable, options: dict) -> Tensor:
        """ComfyUI's own sampler object, with `function` and `options` in place of its own. Without a callback, and
        without a progress bar: the options that `function` is called with say so.
        """
        sampler = copy.copy(self.job.sampler)
        sampler.sampler_function, sampler.extra_options = function, options
        return sampler.sample(
            self.model_wrap, self.sigmas, dict(self.extra_args), None, noise, self.latent_image, self.mask, True
        )

    def _sample(self, noise: Tensor, source: NoiseSource, denoiser: Callable[..., tuple[dict, Callable]]) -> Tensor:
        with twin_of(self.job.sampler, source) as (twin, options):

            def function(model_k: Any, x: Tensor, sigmas: Tensor, extra_args: dict, **options: Any) -> Tensor:
                extra_args, call = denoiser(model_k, extra_args)
                return twin(StandIn(model_k, call), x, sigmas, extra_args=extra_args, **options)

            return self.through_sampler(noise, function, options)

    def plain(self, noise: Tensor, source: NoiseSource, wrap: Callable) -> Tensor:
        """ComfyUI's own sample, bit for bit, with its noises and random states seen on their way."""
        first, calls = not self.states, itertools.count()

        def denoiser(model_k: Any, extra_args: dict) -> tuple[dict, Callable]:
            def call(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                if first:
                    self.states.append(random_state(x.device))
                    out = model_k(x, sigma, **kwargs)
                    self.draws = self.draws or not same_state(self.states[-1], random_state(x.device))
                    return out
                with self.random(next(calls)):
                    return model_k(x, sigma, **kwargs)

            return extra_args, call

        self.begin()
        return self._sample(noise, source, denoiser)

    def differentiable(self, noise: Tensor, source: NoiseSource, wrap: Callable) -> Tensor:
        def denoiser(model_k: Any, extra_args: dict) -> tuple[dict, Callable]:
            extra_args, call = self.network(model_k, extra_args)
            return extra_args, wrap(call)

        self.begin()
        with self.sampling_again():
            x0 = self._sample(noise, source, denoiser)
        self.compare(x0)
        return x0

    def begin(self) -> None:
        """What follows the steps of a trajectory begins anew: hooks with keyframes, and patches that keep something."""
        for patch in keeping(self.extra_args["model_options"]):
            patch.cleanup()
        hooks = self.extra_args["model_options"].get("registered_hooks")
        if hooks is None:
            return
        patcher = self.model_wrap.model_patcher
        with torch.inference_mode():  # it moves weights
            patcher.clean_hooks()
        for group in {c["hooks"] for cs in self.model_wrap.conds.values() for c in cs if c.get("hooks")} | {hooks}:
            group.reset()

    def random(self, n: int) -> AbstractContextManager:
        """Where call n of a trajectory draws what it drew in the plain sample (token merging, tiling)."""
        known = self.draws and n < len(self.states)
        return RandomState(self.states[n], self.sigmas.device) if known else nullcontext()

    @contextmanager
    def sampling_again(self) -> Iterator[None]:
        """Where what worked in the plain sample fails in the first trajectory after it, something remembers that."""
        try:
            yield
        except (TypeError, AttributeError, KeyError) as problem:
            if self.expected is None:
                raise
            raise RuntimeError(
                f"{self.job.node}: sampled again from the same noises, the model fails ({in_brief(problem)}): "
                f"{self.remembered}"
            ) from problem

    @property
    def remembered(self) -> str:
        patches = named(self.extra_args["model_options"])
        return f"something in the graph remembers earlier steps{patches}. Bypass it."

    def sample_again(self) -> None:
        """`compare` for what samples only as KSampler does, where a patch could remember anything: one of the model's
        options, or one that stands in the place of its own parts.
        """
        network = self.inner.diffusion_model
        parts = {name.split(".")[0] for name in self.job.guider.model_patcher.object_patches}
        replaced = "diffusion_model" in parts or "forward" in vars(network)
        if named(self.extra_args["model_options"]) or replaced:
            with self.sampling_again():
                x0, _ = self.drawn(self.noise)
            self.compare(x0)

    def tell(self, notice: str) -> None:
        """Once, though what it is about may be met again."""
        if notice not in self.notices:
            self.notices.append(notice)

    @property
    def attention_replaced(self) -> bool:
        """Whether the graph has an attention of its own, which does not call PyTorch's; known once a step was made."""
        return isinstance(self.attention, Around) and not self.attention.heeded

    def compare(self, x0: Tensor) -> None:
        """The first trajectory's result with what its noises gave. Raises RuntimeError for another image, and where
        none is finite.
        """
        expected, self.expected = self.expected, None
        if expected is None:
            return
        finite = torch.isfinite(expected.to(x0)).flatten(1).all(1)
        if not finite.any():
            why = (
                "in half precision some models overflow; load it in bf16 or fp32 (--bf16-unet, --fp32-unet), or bypass "
                "what patches it"
            )
            if (self.sigmas.diff() == 0).any():
                why = "the schedule has the same noise level twice; take fewer steps, or another scheduler or sampler"
            raise RuntimeError(f"{self.job.node}: what the model samples is not finite (NaN or infinity): {why}")
        off = difference(x0.detach(), expected.to(x0))[finite].nan_to_num(math.inf).max().item()
        if off <= (KEEPING_APART if self.keeps else IMAGE_APART)[self.half]:
            log.debug("the same noises sampled again: off by %.2g", off)
        elif off <= SAGE_APART and (self.coarser_attention or self.attention_replaced):
            self.tell(
                "PyTorch's attention, which a gradient needs, gives another image here than the plain sample's (off by "
                f"{off:.2g}, relative)"
            )
        elif self.remembers_nothing():
            self.tell(
                "with the arithmetic that a gradient needs the model gives another image than the plain sample's (off "
                f"by {off:.2g}, relative)"
            )
        else:
            raise RuntimeError(
                f"{self.job.node}: sampled again from the same noises, the model gives another image (off by "
                f"{off:.2g}, relative), so this would be about another process than the one that samples: "
                f"{self.remembered}"
            )

    def remembers_nothing(self) -> bool:
        """Whether the given noise's sample is the same before and after one of another noise, and once more. Where
        another image than the plain sample comes all the same, it is the arithmetic, whose last bits some processes
        magnify: a network in half precision over many steps, guidance by the direction of a gradient.
        """
        noise = self.noise
        with torch.no_grad():
            before, _, *after = (self.drawn(z)[0] for z in (noise, fresh([noise], stream(0, 0))[0], noise, noise))
        return all(difference(x, before).max() <= APART[True] for x in after)

    def network(self, model_k: Any, extra_args: dict) -> tuple[dict, Callable]:
        """The denoiser with everything in it that has a backward; (guided, conditional) where both are wanted."""
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        options.setdefault("transformer_options", {})["optimized_attention_override"] = self.attention
        conditional: list[Tensor] = []
        if self.job.measured == "conditional":

            def capture(args: dict) -> Tensor:
                conditional[:] = [args["cond_denoised"]]
                return args["denoised"]

            options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", ()), capture]

        own = len(options.get("sampler_post_cfg_function", ()))
        gaps = gaps_of(self.model_wrap)

        def escapes(kwargs: dict) -> bool:
            # CFG++ samplers add a function of theirs, and take the unconditional prediction out of it.
            return len(kwargs.get("model_options", {}).get("sampler_post_cfg_function", ())) > own

        def call(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
            comfy.model_management.throw_exception_if_processing_interrupted()
            with gaps(), self.place():
                out = model_k(x, sigma, **kwargs)
            if self.job.measured != "conditional":
                return out
            if not conditional:
                raise ValueError(
                    f"{self.job.node}: this guider gives no conditional prediction: set `measured` to guided"
                )
            return out, conditional.pop()

        call.escapes = escapes  # type: ignore[attr-defined]
        return {**extra_args, "model_options": options}, call

    def free_bytes(self) -> float:
        """What is free, and what models in dynamic VRAM would give back, where there are such."""
        patcher = self.model_wrap.model_patcher
        return patcher.get_free_memory(patcher.load_device) if hasattr(patcher, "get_free_memory") else free_bytes()

    def without_blocks(self) -> None:
        """From here on a step is computed again as a whole or not at all."""
        self.has_blocks = False
        self.rollout.without_blocks()

    def blocks(self) -> Callable | None:
        if not self.has_blocks:
            return None
        return blocks_checkpointed(self.inner.diffusion_model, self.place, random=self.draws)


def remembers(predict: Callable[[Tensor], Tensor], one: Tensor, other: Tensor, half: bool) -> bool:
    """Whether what is predicted for one latent is another after a prediction for the other."""
    with torch.no_grad():
        first, _, again = (predict(x) for x in (one, other, one))
    return bool(difference(again, first).max() > APART[half])


def in_brief(problem: BaseException) -> str:
    """What kind of error it is, and the first line of what it says."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
