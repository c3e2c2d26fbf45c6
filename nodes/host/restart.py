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
from ...sampler.rollout import per_image
from ...sampler.seeds import another, fresh, stream
from .conditioning import ends_early
from .job import INTERRUPTS, why_no_restart
from .process import RESTART

NUMBER = RESTART - 1  # of its seed: those from RESTART on are a run's own restarts


@dataclass(frozen=True)
class FinalRestart:
    """Noises an image to `share` of the schedule and samples it: KSampler with that denoise and the seed `number`.

    initial: seed -> z_T, as the graph makes it. restart_sigmas: share -> sigmas; None cuts the given ones' tail. score:
    of latents (B, C, ...), the rewards (B,) by which the image was found, where a reward was what found it.
    """

    share: float
    guider: Any
    sampler: Any
    sigmas: Tensor
    initial: Callable[[int], Tensor]
    seed: int
    mask: Tensor | None = None
    restart_sigmas: Callable[[float], Tensor] | None = None
    score: Callable[[Tensor], Tensor] | None = None

    @property
    def number(self) -> int:
        """The seed of its noises."""
        return another(self.seed, NUMBER)

    def __call__(self, latent: Tensor) -> tuple[Tensor, list[str], bool]:
        """(latent (B, C, ...) painted anew, notices, whether it was cut short); where it cannot be, as it was."""
        found, cut = attempt(INTERRUPTS, self._sample, latent)
        if cut:
            return latent, [f"{cut} in the final restart: this is the image before it"], True
        if isinstance(found, str):
            return latent, [f"final_restart is {self.share:g}, but was left out: {found}"], False
        finite = torch.isfinite(found).flatten(1).all(1)
        lost = [f"image {b} was not finite after the final restart: this is the one before it" for b in
                torch.nonzero(~finite).flatten().tolist()]  # fmt: skip
        return torch.where(per_image(finite, found), found, latent.to(found)), lost, False

    def compare(self, before: list[float], latent: Tensor) -> list[str]:
        """What the rewards `before` became, in words, if they can be known."""
        if self.score is None:
            return []
        after, cut = attempt(INTERRUPTS, self.score, latent)
        if cut:
            return [f"{cut} while what was painted anew was scored: its reward is not known"]
        return [
            "its reward: " + ", ".join(f"{a:.4g} became {b:.4g}" for a, b in zip(before, after.tolist(), strict=True))
        ]

    def _sample(self, latent: Tensor) -> Tensor | str:
        """The image, or why there can be none."""
        given = self.initial(self.seed)
        if why := why_no_restart(self.sigmas, given):
            return why
        noise = self.initial(self.number)
        if torch.equal(noise, given):  # it depends on no seed
            noise = fresh([given], stream(self.seed, NUMBER))[0]
        sigmas = self.restart_sigmas(self.share) if self.restart_sigmas else tail(self.sigmas, self.share)
        if why := ends_early(self.guider, self.guider.model_options, sigmas):
            return f"of it {why}"
        callback = latent_preview.prepare_callback(self.guider.model_patcher, len(sigmas) - 1)  # which hears a cancel
        sampled = self.guider.sample(
            noise, latent, self.sampler, sigmas.clone(), denoise_mask=self.mask, callback=callback, disable_pbar=True,
            seed=self.number,
        )  # fmt: skip
        return sampled.to(comfy.model_management.intermediate_device(), latent.dtype)
