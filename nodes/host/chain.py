"""ComfyUI's sampling in pieces, on particles of the whole batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import comfy.model_management
from torch import Tensor

from ...sampler.optimize import Result
from ...sampler.rollout import USABLE, NoiseSource
from ...sampler.search import METHODS, SearchSettings
from ...sampler.seeds import fresh, stream
from .process import Process, remembers
from .samplers import StandIn, twin_of

CPU_BATCH = 16  # images
KEPT_FOR_BACKWARD = 8  # times the memory of a forward pass, about


class Chain:
    """ComfyUI's own sampler function in pieces, on particles of the whole batch: `particles.Chain`."""

    def __init__(self, process: Process, model_k: Any, extra_args: dict) -> None:
        self.process, self.model_k, self.extra_args = process, model_k, extra_args

    def of(self, z_T: Tensor) -> Chain:
        """What a mask leaves out is noised with a particle's own noise, unless the sampler draws one for it."""
        if self.process.mask is None or getattr(self.process.job.sampler, "inpaint_options", {}).get("random"):
            return self
        model_k = copy.copy(self.model_k)
        model_k.noise = z_T.to(model_k.noise)
        return Chain(self.process, model_k, self.extra_args)

    def _on(self, count: int) -> tuple[object, dict, Callable]:
        """(model, extra_args, denoiser) for `count` latents: what belongs to the batch, once for every particle."""
        process, model_k, extra_args = self.process, copy.copy(self.model_k), dict(self.extra_args)
        rounds = count // len(process.job.latent)

        def tiled(t: Tensor | None) -> Tensor | None:
            return t.repeat(rounds, *[1] * (t.ndim - 1)) if t is not None and 1 < len(t) < count else t

        model_k.latent_image, model_k.noise = tiled(model_k.latent_image), tiled(model_k.noise)
        extra_args["denoise_mask"] = tiled(extra_args.get("denoise_mask"))
        extra_args, call = process.network(model_k, extra_args)
        return model_k, extra_args, call

    def remembers(self, z_T: Tensor) -> bool:
        """Whether what a model predicts for one particle depends on the one before it. Guidance may keep its last step:
        asked in the middle, since where sigma rises that begins anew.
        """
        process = self.process
        step = min(len(process.sigmas) // 2, len(process.sigmas) - 2)
        sigma, first = process.sigmas[step], process.sigmas[0]
        scale = ((sigma**2 + 1) / (first**2 + 1)).sqrt()
        one, other = (self.start(z.to(z_T)) * scale for z in (z_T, fresh([z_T], stream(process.job.seed, 1))[0]))

        def predict(x: Tensor) -> Tensor:
            _, extra_args, call = self._on(len(x))
            with process.random(step):
                out = call(x, sigma.expand(len(x)), **extra_args)
            return out[0] if isinstance(out, tuple) else out

        process.begin()
        return remembers(predict, one, other, process.half)

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


def within_chain(process: Process, noise: Tensor, work: Callable[[Chain], Result]) -> Result:
    """`work` inside ComfyUI's sampler call, where a run can be stopped and continued at any noise level."""
    found: list[Result] = []

    def function(model_k: Any, x: Tensor, sigmas: Tensor, extra_args: dict, **options: Any) -> Tensor:
        found.append(work(Chain(process, model_k, extra_args)))
        return x

    process.through_sampler(noise, function, {})
    return found[0]


def most_particles(process: Process, settings: SearchSettings) -> int:
    """How many particles of the whole batch probably fit at once."""
    shape = list(process.job.latent.shape)
    each = process.inner.memory_required([2 * shape[0], *shape[1:]])
    each += process.vae.memory_used_decode(shape, process.vae.vae_dtype)
    if METHODS[settings.method].gradient:
        each *= KEPT_FOR_BACKWARD
    fit = int(USABLE * process.free_bytes() / each)  # running out of memory halves what runs at once
    if comfy.model_management.get_torch_device().type == "cpu":
        fit = min(fit, CPU_BATCH // shape[0])  # larger batches only cost memory there, and time to get it
    return max(1, min(settings.particles, fit))
