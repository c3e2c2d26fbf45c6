"""One more restart of an image that is done, after any method: KSampler's own image to image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import latent_preview
import torch
from torch import Tensor

from ...sampler.ending import attempt
from ...sampler.restart import tail
from ...sampler.seeds import another, fresh, stream
from .process import INTERRUPTS, RESTART, why_no_restart


@dataclass(frozen=True)
class FinalRestart:
    """Noises an image to `share` of the schedule and samples it: KSampler with that denoise and the seed `number`.

    initial: seed -> z_T, as the graph makes it. restart_sigmas: share -> sigmas; None cuts the given ones' tail.
    """

    share: float
    guider: Any
    sampler: Any
    sigmas: Tensor
    initial: Callable[[int], Tensor]
    seed: int
    mask: Tensor | None = None
    restart_sigmas: Callable[[float], Tensor] | None = None

    @property
    def number(self) -> int:
        """The seed of its noises."""
        return another(self.seed, RESTART)

    def __call__(self, latent: Tensor) -> tuple[Tensor, dict, list[str]]:
        """(latent (B, C, ...) painted anew, what the record says of it, notices); where it cannot be, as it was."""
        given = self.initial(self.seed)
        if why := why_no_restart(self.sigmas, given):
            return latent, {}, [f"final_restart is {self.share:g}, but was left out: {why}"]
        noise = self.initial(self.number)
        if torch.equal(noise, given):  # it depends on no seed
            noise = fresh([given], stream(self.seed, RESTART))[0]
        found, cut = attempt(INTERRUPTS, self._sample, noise, latent)
        if found is None:
            return latent, {}, [f"{cut} in the final restart: this is the image before it"]
        said = {"final_restart": self.share, "final_restart_seed": self.number}
        told = "painted anew at the end (final_restart): the record, noise and sampler are of an image before it"
        return found, said, [told]

    def _sample(self, noise: Tensor, latent: Tensor) -> Tensor:
        sigmas = self.restart_sigmas(self.share) if self.restart_sigmas else tail(self.sigmas, self.share)
        callback = latent_preview.prepare_callback(self.guider.model_patcher, len(sigmas) - 1)  # which hears a cancel
        sampled = self.guider.sample(
            noise, latent, self.sampler, sigmas, denoise_mask=self.mask, callback=callback, disable_pbar=True,
            seed=self.number,
        )  # fmt: skip
        return sampled.to(comfy.model_management.intermediate_device())
