"""What a new sample's conditioning has beside the prompt."""

from __future__ import annotations

import copy
from typing import Any

import comfy.samplers
import torch
from torch import Tensor


@torch.no_grad()
def prepared(guider: Any, latent_image: Tensor, mask: Tensor | None, seed: int, device: torch.device) -> Any:
    """The guider with the conditioning that ComfyUI makes for a sample of this latent image: an inpainting model is
    shown it, and an unCLIP model an embedding that is noised by the seed.
    """
    model = guider.inner_model
    if not (hasattr(guider, "conds") and (model.concat_keys or hasattr(model, "noise_augmentor"))):
        return guider
    given = {"latent_image": latent_image, "denoise_mask": mask, "seed": seed}
    guider = copy.copy(guider)
    guider.conds = {
        kind: comfy.samplers.encode_model_conds(model.extra_conds, list(conds), latent_image, device, kind, **given)
        for kind, conds in guider.conds.items()
    }
    return guider
