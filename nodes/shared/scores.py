"""Rewards of finished images."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.sd import VAE
from torch import Tensor

from ...rewards.base import Reward, of_whole_images
from ..host import patcher_of
from ..host.kernels import without_tf32
from ..host.loading import load
from .images import to_core

CHUNK = 8  # images that a scorer sees at once


def score_images(reward: Reward, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """images (B, 3, H, W) -> the scores (B,) and their parts, on the CPU; networks are loaded as ComfyUI loads models.

    Raises RuntimeError for a score that is not finite: none is made up.
    """
    patchers = [patcher_of(m) for m in reward.modules]
    load(patchers)
    device = patchers[0].load_device if patchers else images.device
    chunk = len(images) if reward.unfit(CHUNK) else CHUNK
    totals: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), chunk):
        comfy.model_management.throw_exception_if_processing_interrupted()
        with without_tf32():  # as the optimising nodes
            total, named = reward(images[start : start + chunk].to(device), prompts[start : start + chunk])
        totals.append(of_whole_images(total.float().cpu(), images[start : start + chunk]))
        for name, part in named.items():
            parts.setdefault(name, []).append(part.float().cpu())
    total = torch.cat(totals)
    if not torch.isfinite(total).all():
        bad = [i for i, s in enumerate(total.tolist()) if s != s or abs(s) == float("inf")]
        raise RuntimeError(
            f"reward {reward.facts.name!r} gave no finite score for image(s) {bad}: look at those images"
        )
    return total, {name: torch.cat(p) for name, p in parts.items()}


def score_latent(vae: VAE, reward: Reward, latent: Tensor, prompts: list[str]) -> Tensor:
    """latent (B, C, ...), of stills -> the rewards (B,) of the images that VAE Decode makes of it."""
    reward.evaluation(0)  # one that draws at random draws what it does for the others that this is compared with
    images = vae.decode(latent)
    images = images.reshape(-1, *images.shape[-3:])  # a still is one frame, where there are frames
    return score_images(reward, to_core(images, "what the VAE decodes"), prompts)[0]
