"""The adapter to ComfyUI: its guiders, samplers, memory and inference mode, seen from the core.

The optimisation runs inside one `guider.sample(...)`, as a Sampler of our own, so that conditioning, ControlNets,
hooks and LoRAs are prepared by ComfyUI exactly as for a plain sample.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import psutil
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...rewards.base import Reward, of_whole_images
from ...sampler.ending import within_memory
from ...sampler.memory import offloaded, out_of_memory, saved_bytes
from ...sampler.optimize import Result, Score, Settings
from ...sampler.preference import PreferenceSettings
from ...sampler.restart import Stretch, tail
from ...sampler.resume import Left
from ...sampler.rollout import USABLE, NoiseSource, Rollout, difference, draw
from ...sampler.search import METHODS, SearchSettings
from ...sampler.seeds import Start, another, fresh, stream
from ...sampler.selftest import Checked, check
from .dynamic import static
from .grad import (
    PLACES,
    OutOfPlace,
    blocks_checkpointed,
    both,
    has_no_repeatable_way,
    leave_inference_mode,
    loaded,
    normal,
    replace_tensors,
    sdpa,
    without_tf32,
)
from .patches import keeping, named, networks_in
from .samplers import StandIn, twin_of

log = logging.getLogger("mira")
T = TypeVar("T")
CPU_BATCH = 16  # images
KEPT_FOR_BACKWARD = 8  # times the memory of a forward pass, about
RESTART = 2**20  # the number of the first restart's seed, beyond all candidates'
SAGE_APART = 0.6  # how far, relative, an image by a coarser attention may be from the same by PyTorch's
# The same of others where nothing is wrong: in full precision, in half precision.
IMAGE_APART = (0.1, 0.25)  # an image sampled again from its own noises
CALL_APART = (0.02, 0.1)  # a prediction where a gradient is wanted
GRADIENT_APART = (0.1, 0.5)  # a gradient, from a finite difference
LOSS_SCALE = 2.0**10  # in float16: gradients of a mean over pixels are near its smallest numbers
EVERYTHING = 1e30  # bytes, more than any device has
INTERRUPTS = (comfy.model_management.InterruptProcessingException,)


def decode(vae: VAE, latent: Tensor) -> Tensor:
    """VAE latents (B, C, h, w) -> images (B, 3, H, W), nominally in [0, 1]: not clamped, so that gradients live."""
    # The VAE's own last step is affine but for its clamp: read it off inside the clamp's range.
    zero, half = (vae.process_output(torch.tensor([v])).item() for v in (0.0, 0.5))
    images = vae.first_stage_model.decode(latent.to(vae.device, vae.vae_dtype)).float()
    return images * (2 * (half - zero)) + zero


SCALES = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of an empty latent that was made for another model


def samples_of(model: ModelPatcher, latent: dict) -> Tensor:
    """The latents as the model works on them, as KSampler finds them: an empty one has no channels of its own."""
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    scales = {name: latent.get(name) for name in SCALES if name in known}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **scales)


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
    """What to optimise, in ComfyUI's own types. prompts: one per image, for rewards that need them.

    node: the node's title, for messages. notices: what the user should know of the inputs. initial: seed -> the initial
    noise that the graph gives for it; without one, any. repeatable: the same bits every time, on a GPU too.
    restart_sigmas: share of the schedule -> the sigmas of a restart; without one, the tail of `sigmas`. resume: what a
    run of the same job left, to go on from.
    """

    guider: Any
    sampler: Any
    sigmas: Tensor
    noise: Tensor
    latent: Tensor
    vae: Any
    reward: Reward | None
    settings: Settings | PreferenceSettings | SearchSettings
    node: str = "MIRA"
    seed: int = 0
    initial: Callable[[int], Tensor] | None = None
    restart_sigmas: Callable[[float], Tensor] | None = None
    mask: Tensor | None = None
    prompts: Sequence[str] = ()
    notices: Sequence[str] = ()
    weighting: str = "marginal"
    measured: str = "guided"
    gradient_steps: int = 0
    memory: str = "auto"
    repeatable: bool = True
    gradient: bool = True  # whether the work needs one through the model
    resume: Left | None = None
    on_iteration: Callable = lambda k, rows, score: None
    on_seed: Callable = lambda count: None


def why_no_restart(sigmas: Tensor, initial: Tensor) -> str | None:
    """Why a restart would mean nothing in such a run, in words; None where it does. initial: z_T."""
    if len(sigmas) < 3:
        return "a schedule of one step has no level in between"
    if sigmas[-1] > 0:
        return "the sigmas end above 0, and what comes out is no image yet"
    if not initial.any():
        return "the graph adds no noise of its own (leftover noise in the latent)"
    return None


class Process:
    """The frozen model's sampling process, inside ComfyUI's `guider.sample`."""

    def __init__(
        self, job: Job, model_wrap: Any, sigmas: Tensor, extra_args: dict, latent_image: Tensor, mask: Tensor | None
    ) -> None:
        self.job, self.model_wrap, self.sigmas = job, model_wrap, sigmas
        self.vae = copy.copy(job.vae)
        if job.gradient:
            self.vae.patcher = static(job.vae.patcher, f"{job.node}: vae")
            self.vae.first_stage_model = self.vae.patcher.model
        self.latent_image, self.mask = latent_image, mask
        self.extra_args = extra_args
        self.inner = model_wrap.inner_model
        self.flow = isinstance(self.inner.model_sampling, comfy.model_sampling.CONST)
        self.place: Callable = nullcontext  # the self-test may change it
        self.rollout: Rollout | None = None
        self.rolling: list[Process] = []  # which have a rollout: this one, and the stretches of it
        self.evaluations = 0
        self.layers: dict[nn.Module, Callable | None] = {}  # of the VAE and the reward: how they checkpoint their own
        self.redraw = True  # a reward that draws random numbers draws new ones at every evaluation
        self.repeatable = job.repeatable
        self.notices = list(job.notices)
        self.given: tuple[Tensor, tuple[Tensor, ...]] | None = None  # the plain sample and its noises
        self.expected: Tensor | None = None  # what the first trajectory should give, until it was compared
        self.states: list[tuple] = []  # of the random number generators, before every call of the plain sample
        self.start: Start | None = None  # the best of several seeds, once it is known
        # Sage's attention is coarser than PyTorch's, and so may be that of another node.
        name = comfy.ldm.modules.attention.optimized_attention.__name__
        own = extra_args["model_options"].get("transformer_options", {}).get("optimized_attention_override")
        self.exact_attention = own is None and "sage" not in name
        self._draws: bool | None = None
        dtype = self.inner.manual_cast_dtype or self.inner.get_dtype()
        scale = LOSS_SCALE if torch.float16 in (dtype, self.vae.vae_dtype) else 1.0
        self.half = dtype in (torch.float16, torch.bfloat16)
        self.settings = replace(job.settings, loss_scale=scale) if scale != 1 else job.settings

    def drawn(self, noise: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The plain sample and its noises; where memory runs out, once more with all but its own models unloaded."""
        found, cut = within_memory(draw, self.plain, noise)
        if cut is None:
            return found
        self.states.clear()
        self.unload_others()
        return draw(self.plain, noise)

    def unload_others(self) -> None:
        """Make room, of which there was too little: every model goes that sampling does not need."""
        management = comfy.model_management
        needed = [self.model_wrap.model_patcher, *self.model_wrap.loaded_models]
        keep = [m for m in management.current_loaded_models if any(m.model is p for p in needed)]
        management.free_memory(EVERYTHING, management.get_torch_device(), keep_loaded=keep)
        log.warning("%s: out of memory: unloaded what it does not need, and tries again", self.job.node)

    def outside_inference_mode(self) -> Process:
        """This process on tensors that autograd can save."""
        process = copy.copy(self)
        process.sigmas, process.mask = normal(self.sigmas), normal(self.mask)
        process.latent_image, process.extra_args = normal(self.latent_image), normal(self.extra_args)
        wrap = process.model_wrap  # the run's own copy of the guider
        if hasattr(wrap, "conds"):
            wrap.conds = normal(wrap.conds)
            for control in controls(wrap.conds):
                replace_tensors(control)  # the hint that it holds
        # Networks that patches bring along, but for the model itself, whose weights `loaded` has seen to.
        known = {id(m) for m in self.inner.modules()}
        for network in networks_in(self.extra_args["model_options"]):
            if id(network) not in known:
                leave_inference_mode(network)
                network.requires_grad_(False)
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

    @functools.cached_property
    def depends_on_seed(self) -> bool:
        return not torch.equal(self.initial_of(1), self.initial_of(0))

    def sample_of(self, n: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(x0, noises): the plain sample of candidate n's seed, bit for bit."""
        if n == 0:
            return self.given
        before = self.extra_args
        self.extra_args = before | {"seed": self.seed_of(n)}
        try:
            x0, noises = draw(self.plain, self.initial_of(n).to(self.job.noise.dtype))
        finally:
            self.extra_args = before
        return x0, tuple(z.float() for z in noises)

    def noises_of(self, n: int, like: Sequence[Tensor]) -> list[Tensor]:
        """z of candidate n, without a sample: the injected noises are drawn here."""
        return [self.initial_of(n), *fresh(like[1:], stream(self.job.seed, n))]

    # -- restarts

    @property
    def why_no_restart(self) -> str | None:
        return why_no_restart(self.sigmas, self.initial_of(0))

    @functools.cached_property
    def restart_schedule(self) -> Tensor:
        """The sigmas of every restart of this run."""
        job, level = self.job, self.settings.restart_denoise
        return job.restart_sigmas(level) if job.restart_sigmas else tail(self.sigmas, level)

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
        process.states, process._draws, process.expected = [], None, None
        if self.depends_on_seed:
            z = self.initial_of(RESTART + number)
        else:
            z = fresh([self.initial_of(0)], stream(job.seed, RESTART + number))[0]
        with torch.no_grad():
            x0, noises = draw(process.plain, z.to(job.noise.dtype))
        return process, x0, tuple(z.float() for z in noises)

    def restart(self, number: int, x0: Tensor) -> Stretch:
        """`from_image` as what can be optimised."""
        process, _, noises = self.from_image(number, x0)
        process.begin_rollout(self.rollout.memory)
        process.rollout.go_on_as(self.rollout)
        self.rollout = process.rollout  # whose policy decoding and reward follow
        return Stretch(process.rollout, noises)

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
            score_bytes=self.score_bytes,
            blocks=self.blocks(),
            random=self.random,
        )

    def end(self) -> None:
        """Let go of what holds this process in turn, whose models are then freed with the last that names them.

        Python's collector would free them too. But where it takes a clone together with the model that it was cloned
        from, ComfyUI's list of loaded models keeps an entry without a model: it speaks of a memory leak and collects
        garbage before every later load.
        """
        while self.rolling:
            self.rolling.pop().rollout = None
        self.layers.clear()

    # --

    @property
    def patchers(self) -> list[ModelPatcher]:
        """Of everything that a run needs."""
        reward = self.job.reward
        patchers = [self.model_wrap.model_patcher, *self.model_wrap.loaded_models, self.vae.patcher]
        patchers += [patcher_of(m) for m in reward.modules] if reward else []
        return patchers + getattr(self.model_wrap, "networks", [])  # of a guider of ours

    @contextmanager
    def loaded(self) -> Iterator[None]:
        shape = list(self.job.latent.shape)
        need = self.inner.memory_required([2 * shape[0], *shape[1:]])
        need += self.vae.memory_used_decode(shape, self.vae.vae_dtype)
        with loaded(self.patchers, 2 * need, self.job.gradient):
            yield

    def _run(self, noise: Tensor, function: Callable, options: dict) -> Tensor:
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

            return self._run(noise, function, options)

    def plain(self, noise: Tensor, source: NoiseSource, wrap: Callable) -> Tensor:
        """ComfyUI's own sample, bit for bit, with its noises and random states seen on their way."""
        first, calls = not self.states, itertools.count()

        def denoiser(model_k: Any, extra_args: dict) -> tuple[dict, Callable]:
            def call(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                if first:
                    self.states.append(random_state(x.device))
                    return model_k(x, sigma, **kwargs)
                with self.random(next(calls)):
                    return model_k(x, sigma, **kwargs)

            return extra_args, call

        self.begin()
        return self._sample(noise, source, denoiser)

    def differentiable(self, noise: Tensor, source: NoiseSource, wrap: Callable) -> Tensor:
        def denoiser(model_k: Any, extra_args: dict) -> tuple[dict, Callable]:
            extra_args, call = self._network(model_k, extra_args)
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

    @property
    def draws(self) -> bool:
        """Whether a call of the model draws random numbers of its own; known once the plain sample is there."""
        if self._draws is None:
            self._draws = any(not same_state(s, self.states[0]) for s in self.states)
        return self._draws

    def random(self, n: int) -> AbstractContextManager:
        """Where call n of a trajectory draws what it drew in the plain sample (token merging, tiling)."""
        known = self.draws and n < len(self.states)
        return _RandomState(self.states[n], self.sigmas.device) if known else nullcontext()

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
        """`compare` for what samples only as KSampler does, where a patch could remember anything."""
        if named(self.extra_args["model_options"]):
            with self.sampling_again():
                x0, _ = self.drawn(self.job.noise)
            self.compare(x0)

    def compare(self, x0: Tensor) -> None:
        """The first trajectory's result with what its noises gave. Raises RuntimeError when it is another image."""
        expected, self.expected = self.expected, None
        if expected is None:
            return
        off = difference(x0.detach(), expected.to(x0)).max().item()
        if off <= IMAGE_APART[self.half]:
            log.debug("the same noises sampled again: off by %.2g", off)
        elif off <= SAGE_APART and not self.exact_attention:
            self.notices.append(
                "PyTorch's attention, which a gradient needs, gives another image here than the plain sample's (off by "
                f"{off:.2g}, relative)"
            )
        else:
            raise RuntimeError(
                f"{self.job.node}: sampled again from the same noises, the model gives another image (off by "
                f"{off:.2g}, relative), so this would be about another process than the one that samples: "
                f"{self.remembered}"
            )

    def _network(self, model_k: Any, extra_args: dict) -> tuple[dict, Callable]:
        """The denoiser with everything in it that has a backward; (guided, conditional) where both are wanted."""
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        options.setdefault("transformer_options", {})["optimized_attention_override"] = sdpa
        conditional: list[Tensor] = []
        if self.job.measured == "conditional":

            def capture(args: dict) -> Tensor:
                conditional[:] = [args["cond_denoised"]]
                return args["denoised"]

            options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", ()), capture]

        own = len(options.get("sampler_post_cfg_function", ()))

        def escapes(kwargs: dict) -> bool:
            # CFG++ samplers add a function of theirs, and take the unconditional prediction out of it.
            return len(kwargs.get("model_options", {}).get("sampler_post_cfg_function", ())) > own

        def call(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
            comfy.model_management.throw_exception_if_processing_interrupted()
            with self.place():
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

    @property
    def _keep(self) -> bool:
        return self.rollout.memory in ("none", "auto") or not torch.is_grad_enabled()

    def _thrifty(self, module: nn.Module) -> AbstractContextManager | None:
        """Where `module` keeps less for its backward, layer by layer; None where it has no layers, or all is kept."""
        if self._keep:
            return None
        if module not in self.layers:

            def place() -> AbstractContextManager:
                # One layer of a decoder at full resolution is gigabytes when it is computed again.
                offload = self.rollout.score_offloaded
                return both(offloaded(), OutOfPlace()) if offload else OutOfPlace()

            self.layers[module] = blocks_checkpointed(module, place)
        if not (blocks := self.layers[module]):
            return None
        stack = ExitStack()
        if self.rollout.score_offloaded:
            stack.enter_context(offloaded())
        stack.enter_context(blocks())
        return stack

    def render(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) as sampled, or of one frame, -> images (B, 3, H, W), nominally in [0, 1]."""
        latent = self.inner.process_latent_out(x0.float())
        thrifty = self._thrifty(self.vae.first_stage_model)
        if not torch.is_grad_enabled():
            images = self._decode(latent)
        elif self._keep or thrifty:
            with thrifty or nullcontext():
                images = decode(self.vae, latent)
        else:
            images = checkpoint(lambda z: decode(self.vae, z), latent, use_reentrant=False, preserve_rng_state=False)
        if images.ndim == 5 and images.shape[2] == 1:
            images = images[:, :, 0]
        if images.ndim != 4:
            raise ValueError(
                f"{self.job.node}: the VAE decodes to shape {tuple(images.shape)}: MIRA optimises still images only"
            )
        return images.to(x0.device)

    def _decode(self, latent: Tensor) -> Tensor:
        """Without a gradient: all at once, or as many as fit, and at last one in tiles, as VAE Decode does."""

        def in_tiles(one: Tensor) -> Tensor:
            log.warning("%s: out of memory while decoding: in tiles", self.job.node)
            return self.vae.decode_tiled_(one)

        found = as_fit(functools.partial(decode, self.vae), latent, alone=in_tiles if latent.ndim == 4 else None)
        return found[0] if len(found) == 1 else torch.cat(found)

    def score_bytes(self, x: Tensor, most: float) -> float:
        """What decoding and reward of such a latent keep for their backward pass."""
        if self.job.reward is None:
            return 0.0  # a judge that nothing flows through
        before, self.redraw = self.redraw, False
        try:
            return saved_bytes(lambda x0: self.score(x0), x, most)
        finally:
            self.redraw = before

    def score(self, x0: Tensor) -> Score:
        images = self.render(x0)
        total, parts = self.reward(images)
        total = total.to(x0.device, torch.float32)
        return Score(total, {k: p.detach().float() for k, p in parts.items()}, images.detach())

    def reward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the rewards (B,), their parts)."""
        total, parts = self._reward(images)
        return of_whole_images(total, images), parts

    def _reward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        job = self.job
        job.reward.evaluation(self.evaluations)
        self.evaluations += self.redraw
        prompts = list(job.prompts) * (len(images) // max(1, len(job.prompts)))  # one round for every particle
        if torch.is_grad_enabled():
            return self._reward_whole(images, prompts)
        found = as_fit(self._reward_whole, images, prompts)
        if len(found) == 1:
            return found[0]
        totals, parts = zip(*found, strict=True)
        return torch.cat(totals), {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _reward_whole(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        job, keep = self.job, self._keep
        # Layer by layer where a network has layers: less is kept, and recomputed once only.
        layers = [] if keep else [self._thrifty(m) for m in job.reward.modules]
        with without_tf32():
            if keep or any(layers):
                with ExitStack() as stack:
                    for within in filter(None, layers):
                        stack.enter_context(within)
                    return job.reward(images, prompts)

            def evaluate(images: Tensor) -> tuple:
                with without_tf32():
                    return job.reward(images, prompts)

            return checkpoint(evaluate, images, use_reentrant=False, preserve_rng_state=False)

    def within_chain(self, noise: Tensor, work: Callable[[Chain], Result]) -> Result:
        """`work` inside ComfyUI's sampler call, where a run can be stopped and continued at any noise level."""
        found: list[Result] = []

        def function(model_k: Any, x: Tensor, sigmas: Tensor, extra_args: dict, **options: Any) -> Tensor:
            found.append(work(Chain(self, model_k, extra_args)))
            return x

        self._run(noise, function, {})
        return found[0]

    def most_particles(self, settings: SearchSettings) -> int:
        """How many particles of the whole batch probably fit at once."""
        shape = list(self.job.latent.shape)
        each = self.inner.memory_required([2 * shape[0], *shape[1:]])
        each += self.vae.memory_used_decode(shape, self.vae.vae_dtype)
        if METHODS[settings.method].gradient:
            each *= KEPT_FOR_BACKWARD
        fit = int(USABLE * self.free_bytes() / each)  # running out of memory halves what runs at once
        if comfy.model_management.get_torch_device().type == "cpu":
            fit = min(fit, CPU_BATCH // shape[0])  # larger batches only cost memory there, and time to get it
        return max(1, min(settings.particles, fit))

    def free_bytes(self) -> float:
        """What is free, and what models in dynamic VRAM would give back, where there are such."""
        patcher = self.model_wrap.model_patcher
        return patcher.get_free_memory(patcher.load_device) if hasattr(patcher, "get_free_memory") else free_bytes()

    def blocks(self) -> Callable | None:
        return blocks_checkpointed(self.inner.diffusion_model, lambda: self.place(), random=self.draws)

    def check_gradient(self, noise: Tensor) -> None:
        """One denoising step, its gradient against a finite difference, before anything is optimised."""
        job, name = self.job, type(self.inner.diffusion_model).__name__
        patches = named(self.extra_args["model_options"])
        remedy = (
            "This model cannot be optimised through as it is: bypass nodes that patch it or its attention"
            f"{patches}; if its weights are quantised, use fp16, bf16 or fp32 ones. MIRA Search KSampler needs no "
            "gradient."
        )
        blocks = self.blocks()
        ways = [nullcontext, *([blocks] if blocks else []), lambda: both(offloaded(), (blocks or nullcontext)())]
        twice = blocks and job.memory not in ("none", "per_step")  # what a checkpoint breaks shows with it only
        apart = CALL_APART[self.half]
        found: list[Checked] = []
        known: dict[int, Checked] = {}
        cut = None
        while ways and len(found) < (2 if twice else 1):
            written_over = False
            try:
                checked, cut = within_memory(self._self_test, noise, ways.pop(0), known)
            except RuntimeError as problem:
                said = str(problem).splitlines()[0]
                if has_no_repeatable_way(problem):
                    raise
                if "inference tensor" in said.lower():
                    raise RuntimeError(
                        f"{job.node}: something in the graph remembers what it saw in the plain sample{patches}. "
                        f"Bypass it. ({said})"
                    ) from problem
                written_over = "inplace operation" in str(problem) or "in-place operation" in str(problem)
                if not written_over or self.place is PLACES[-1]:
                    raise RuntimeError(f"{job.node}: {name} has no gradient: {said}. {remedy}") from problem
            except (TypeError, AttributeError, KeyError) as problem:
                raise RuntimeError(
                    f"{job.node}: {name} fails where a gradient is wanted ({in_brief(problem)}). {remedy}"
                ) from problem
            # One of the places loses what a model writes into a slice.
            lost = not written_over and cut is None and checked.moved > apart
            if written_over or (lost and self.place is not PLACES[-1]):
                self.place = PLACES[PLACES.index(self.place) + 1]
                return self.check_gradient(noise)  # from the start: what was found in a place says nothing of the next
            if cut is None:
                found.append(checked)
        if not found:
            raise cut.problem
        wrong, moved = max(c.wrong for c in found), max(c.moved for c in found)
        if not wrong < GRADIENT_APART[self.half]:
            raise RuntimeError(
                f"{job.node}: {name} gives no usable gradient: it is off by {wrong:.2g} (relative) against a finite "
                f"difference of one denoising step. {remedy}"
            )
        if moved > apart:
            raise RuntimeError(
                f"{job.node}: {name} predicts something else when a gradient is wanted: its noise is off by "
                f"{moved:.2g} (relative). {remedy}"
            )
        log.debug("gradient self-test of %s: relative error %.2g, prediction off by %.2g", name, wrong, moved)

    def check_backward(self) -> None:
        """The reward's backward on the plain image, before any seed is sampled: not every device has every one.

        And the decoder's, where every operation has to repeat: a search shows its first images before it meets that.
        """
        job, before = self.job, self.redraw
        self.redraw = False
        try:
            for part in (self._reward_gradient, self._decoder_gradient):
                _, cut = within_memory(part)
                if cut:
                    log.debug("%s: the reward's gradient could not be tried: %s", job.node, cut)
        finally:
            self.redraw = before

    def _decoder_gradient(self) -> None:
        if torch.are_deterministic_algorithms_enabled():
            with torch.enable_grad():
                x0 = self.given[0].detach().requires_grad_()
                torch.autograd.grad(self.render(x0).sum(), x0, allow_unused=True)

    def _reward_gradient(self) -> None:
        with torch.no_grad():
            images = self.render(self.given[0])
        with torch.enable_grad():
            total, _ = self.reward(images.requires_grad_())
        if not total.requires_grad:
            return  # said where it is optimised
        try:
            torch.autograd.grad(total.sum(), images, allow_unused=True)
        except RuntimeError as problem:
            if out_of_memory(problem) or has_no_repeatable_way(problem):
                raise
            job, said = self.job, str(problem).splitlines()[0]
            raise RuntimeError(
                f"{job.node}: reward {job.reward.facts.name!r} has no backward on this device "
                f"({comfy.model_management.get_torch_device().type}): {said} Use another reward or another precision, "
                "MIRA Search KSampler, which needs no gradient, or start ComfyUI with --cpu; on a Mac also with "
                "PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment."
            ) from problem

    def _self_test(self, noise: Tensor, within: Callable, known: dict[int, Checked]) -> Checked:
        """The gradient of a step, and what noise it predicts. known, by step: what was found in other ways so far."""
        found: list[Checked] = []

        def function(model_k: Any, x: Tensor, sigmas: Tensor, extra_args: dict, **options: Any) -> Tensor:
            extra_args, call = self._network(model_k.inner_model, extra_args)
            extra_args.pop("denoise_mask", None)  # a mask is no business of the network's
            last = len(sigmas) - 2
            for step in dict.fromkeys((last // 2, 0, last)):  # conditioning may begin or end in between
                sigma = sigmas[step] * x.new_ones(len(x))

                def predict(x: Tensor, sigma: Tensor = sigma) -> Tensor:
                    with self.random(step):  # noqa: B023  (it does not outlive the loop)
                        out = call(x, sigma, **extra_args)
                    return out[0] if isinstance(out, tuple) else out

                def noise_of(out: Tensor, sigma: Tensor = sigma) -> Tensor:
                    return at - self.signal(sigma[0]) * out  # noqa: B023

                at = x * (sigma[0] ** 2 + 1).sqrt() / (sigmas[0] ** 2 + 1).sqrt()
                found[:] = [check(predict, at, within=within, looked_at=noise_of, known=known.get(step))]
                if math.isfinite(found[0].wrong):
                    known.setdefault(step, found[0])
                    break
            return x

        # Some guiders add what counts as a constant here, and not in a finite difference.
        with getattr(self.model_wrap, "without_constants", nullcontext)():
            self._run(noise, function, {})
        return found[0]


def as_fit(work: Callable[..., T], *batch: Any, alone: Callable[..., T] | None = None) -> list[T]:
    """[work(*batch)], or what it gives of halves of the batch, as small as memory asks for; where one of it does not
    fit either, `alone` of that, or the error.
    """
    found, cut = within_memory(work, *batch)
    if cut is None:
        return [found]
    if len(batch[0]) == 1:
        if alone is None:
            raise cut.problem
        return [alone(*batch)]
    half = (len(batch[0]) + 1) // 2
    halves = [b[:half] for b in batch], [b[half:] for b in batch]
    return [value for some in halves for value in as_fit(work, *some, alone=alone)]


def in_brief(problem: BaseException) -> str:
    """What kind of error it is, and the first line of what it says."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def controls(conds: dict) -> list:
    """The ControlNets and adapters in prepared conditioning, with those before them."""
    found = []
    for control in (c.get("control") for cs in conds.values() for c in cs):
        while control is not None and control not in found:
            found.append(control)
            control = getattr(control, "previous_controlnet", None)
    return found


def random_state(device: torch.device) -> tuple:
    """Of the generators that a network may draw from without being asked to."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def same_state(a: tuple, b: tuple) -> bool:
    return all(x is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


class _RandomState:
    """A context in which torch's global generators go on from a given state, and forget it afterwards."""

    def __init__(self, state: tuple, device: torch.device) -> None:
        self.state, self.device = state, device

    def _set(self, state: tuple) -> None:
        cpu, cuda = state
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)

    def __enter__(self) -> None:
        self.before = random_state(self.device)
        self._set(self.state)

    def __exit__(self, *_: Any) -> None:
        self._set(self.before)


class Chain:
    """ComfyUI's own sampler function in pieces, on particles of the whole batch: `particles.Chain`."""

    def __init__(self, process: Process, model_k: Any, extra_args: dict) -> None:
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
        self.process.begin()
        _, extra_args, call = self._on(len(x))
        out = self.process.rollout.predict(call, x, sigma, extra_args)
        return out[0] if isinstance(out, tuple) else out

    def segment(self, x: Tensor, i: int, j: int, source: NoiseSource, wrap: Callable) -> Tensor:
        process = self.process
        process.begin()  # particles take turns, so what follows the steps finds its place anew
        model_k, extra_args, call = self._on(len(x))
        numbers = itertools.count(i)

        def drawing(x: Tensor, sigma: Tensor, **kwargs: Any) -> Any:
            with process.random(next(numbers)):  # exact where a step is one call
                return call(x, sigma, **kwargs)

        drawing.escapes = call.escapes  # type: ignore[attr-defined]
        sigmas = process.sigmas[i : j + 1]
        model = StandIn(model_k, wrap(drawing))
        with twin_of(process.job.sampler, source) as (twin, options):
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
