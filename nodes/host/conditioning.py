"""What a sample's conditioning has beside the prompt, and how long it lasts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import comfy.samplers
import torch
from torch import Tensor


def conds_of(guider: Any) -> dict[str, list[dict]]:
    """A guider's conditionings: as they are prepared for a sample, or as they were given to it."""
    return getattr(guider, "conds", None) or getattr(guider, "original_conds", {})


def used_conds(guider: Any, model_options: dict) -> dict[str, list[dict]]:
    """Those that ComfyUI lets the model see: at CFG 1 it leaves the negative one out."""
    conds, cfg = conds_of(guider), getattr(guider, "cfg", None)  # another's may be a list
    at_one = isinstance(cfg, (int, float)) and math.isclose(cfg, 1.0)
    at_one = at_one and not model_options.get("disable_cfg1_optimization")
    return {"positive": conds["positive"]} if at_one and set(conds) == {"positive", "negative"} else conds


def in_whole_rounds(guider: Any, count: int) -> bool:
    """Whether several batches of `count` latents, one after the other, have each what ComfyUI takes for one of them of
    conditioning that is a batch itself (prompts, masks, reference images): it repeats that, and cuts what is left over.
    """

    def sizes(cond: dict) -> Iterator[int]:
        for value in (cond.get("mask"), *(getattr(v, "cond", None) for v in cond.get("model_conds", {}).values())):
            for t in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(t, Tensor) and t.ndim:
                    yield len(t)

    return all(count % n == 0 for conds in conds_of(guider).values() for c in conds for n in sizes(c) if n)


def ends_early(guider: Any, model_options: dict, sigmas: Tensor) -> str | None:
    """Why the last step of these sigmas would have no conditioning, in words; None where it has some."""
    sampling = guider.model_patcher.get_model_object("model_sampling")

    def end(cond: dict) -> float:
        if "timestep_end" not in cond and "end_percent" in cond:
            return sampling.percent_to_sigma(cond["end_percent"])
        return cond.get("timestep_end", 0.0)

    used = used_conds(guider, model_options)
    conds = [c for cs in used.values() for c in cs]
    if used and not conds:
        return "there is no conditioning at all, and ComfyUI predicts an empty image: connect a CLIP Text Encode"
    if not conds or not all(sigmas[-2] < end(c) for c in conds):
        return None
    unused = "" if len(used) == len(conds_of(guider)) else " but the negative one, unused at CFG 1,"
    return (
        f"every conditioning{unused} ends before the last step, and ComfyUI predicts an empty image there: let one "
        "last to the end (ConditioningSetTimestepRange: end 1)"
    )


def noised_by_seed(guider: Any) -> bool:
    """Whether the conditioning has an image that is noised by the seed when a sample begins."""
    conds = [c for cs in conds_of(guider).values() for c in cs]
    augments = hasattr(guider.inner_model, "noise_augmentor")  # others noise what lies beside the latent by themselves
    return any(
        (augments and c.get("unclip_conditioning"))
        or (c.get("noise_augmentation") and (augments or c.get("concat_latent_image") is not None))
        for c in conds
    )


@torch.no_grad()
def prepared(guider: Any, latent_image: Tensor, mask: Tensor | None, seed: int, device: torch.device) -> Any:
    """The guider with the conditioning that ComfyUI makes for a sample of this latent image: an inpainting model is
    shown it, and an unCLIP model an embedding that is noised by the seed.
    """
    model = guider.inner_model
    if not (hasattr(guider, "conds") and (model.concat_keys or noised_by_seed(guider))):
        return guider
    given = {"latent_image": latent_image, "denoise_mask": mask, "seed": seed}
    guider = copy.copy(guider)
    guider.conds = {
        kind: comfy.samplers.encode_model_conds(model.extra_conds, list(conds), latent_image, device, kind, **given)
        for kind, conds in guider.conds.items()
    }
    return guider
