"""What a graph has put into a model: by name for messages, and what of it no gradient survives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import comfy.hooks
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

OURS = __package__.rpartition(".")[0]
# Before 0.25 ComfyUI does not, and what a patch calls `cleanup` is its own affair.
CLEARS_PATCHES = hasattr(ModelPatcher, "model_patches_call_function")


def _names(value: object, key: str = "") -> Iterator[str]:
    """Of every function in nested dicts and lists: where it is from, as a person may know it."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _names(v, str(k))
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _names(v, key)
    elif callable(value):
        function = getattr(value, "__func__", value)
        if getattr(function, "only_watches", False):  # a benchmark's, which counts calls
            return
        module = getattr(function, "__module__", None) or type(value).__module__
        name = getattr(function, "__qualname__", None) or type(value).__qualname__
        if not module.startswith((OURS, "comfy.")) or key == "model_function_wrapper":
            yield f"{module.rpartition('.')[2]} ({name.partition('.')[0]})"


def only_in(model_options: dict, others: dict) -> str:
    """`X and Y`, of the patches in a model's options of a kind that the others have not; empty where there are none.

    By name: two models that went through the same node have patches of their own from it, and a clone may have copies.
    """
    known = set(_names(others))
    return " and ".join([n for n in dict.fromkeys(_names(model_options)) if n not in known][:4])


def named(model_options: dict) -> str:
    """`, probably X or Y`, of the patches in a model's options; nothing where there are none."""
    found = list(dict.fromkeys(_names(model_options)))
    if "context_handler" in model_options:  # ComfyUI's own, which follows the steps
        found.append("Context Windows")
    return f", probably {' or '.join(found[:4])}" if found else ""


def patches_of(model_options: dict) -> list:
    """What ComfyUI moves with the model, and clears when a sample is done: the patches within it, and its wrapper."""
    inner = model_options.get("transformer_options", {})
    found = [p for patches in inner.get("patches", {}).values() for p in patches]
    found += [p for patches in inner.get("patches_replace", {}).values() for p in patches.values()]
    return [*found, model_options.get("model_function_wrapper")]


def things_in(value: object, seen: set | None = None, depth: int = 6) -> Iterator[Any]:
    """What patches bring along and may hold tensors in (hypernetworks, adapters, embeddings): networks, objects with
    attributes, and cells of closures.
    """
    seen = set() if seen is None else seen
    if depth < 0 or id(value) in seen or isinstance(value, (str, int, float, type, type(None), torch.Tensor)):
        return
    seen.add(id(value))
    value = value.model if isinstance(value, ModelPatcher) else value
    if isinstance(value, nn.Module):
        yield value
        return
    inner = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        inner = list(value)
    elif callable(value) or type(value).__module__.split(".")[0] not in ("torch", "builtins"):
        if hasattr(value, "__dict__"):
            yield value
            inner = [getattr(value, "__self__", None), *vars(value).values()]
        cells = [c for c in getattr(value, "__closure__", None) or () if _filled(c)]
        yield from cells
        inner += [c.cell_contents for c in cells]
    for v in inner:
        yield from things_in(v, seen, depth - 1)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def controls(conds: dict) -> list:
    """The ControlNets and adapters in prepared conditioning, with those before them."""
    found = []
    for control in (c.get("control") for cs in conds.values() for c in cs):
        while control is not None and control not in found:
            found.append(control)
            control = getattr(control, "previous_controlnet", None)
    return found


def keeping(model_options: dict) -> list:
    """The patches that keep something from step to step: `cleanup` is what ComfyUI calls at the end of a sample."""
    if not CLEARS_PATCHES:
        return []
    return [p for p in patches_of(model_options) if hasattr(p, "cleanup")]


def names_of_keeping(model_options: dict) -> str:
    """Of those patches; empty where there are none."""
    return " and ".join(dict.fromkeys(next(_names(p), type(p).__qualname__) for p in keeping(model_options)))


def why_not_two(guider: Any) -> str | None:
    """None, or that the graph's own guider holds another model beside its own, which no gradient here knows of."""
    own = guider.model_patcher.model
    if any(isinstance(v, ModelPatcher) and v.model is not own for v in vars(guider).values()):
        return (
            f"{type(guider).__name__} holds a second model, through which no gradient goes here: use CFGGuider with "
            "one model"
        )
    return None


def follows_steps(guider: Any) -> bool:
    """Whether the conditioning has hooks that change by keyframes, which find their place by the steps before."""
    groups = [group for cs in guider.original_conds.values() for c in cs if (group := c.get("hooks"))]
    others = [hook for group in groups for hook in group.hooks if hook.hook_type != comfy.hooks.EnumHookType.Weight]
    strengths = [s for group in groups for s in _weight_hooks(group).values()]
    return any(len(s) > 1 for s in strengths) or any(len(hook.hook_keyframe.keyframes) > 1 for hook in others)


def why_no_gradient(guider: Any) -> str | None:
    """None, or what of the guider's patches and conditioning a gradient does not survive.

    What the first step of a trajectory leaves to the later ones (reference keys and values) is computed again without
    it, or is of a graph that is gone. Hooks that change weights write over them in place while a trajectory is sampled,
    which backward does not see.
    """
    if names := names_of_keeping(guider.model_options):
        return (
            f"{names} keeps what one step of the sampling makes for the later ones, which no gradient goes through: "
            "bypass it, or use MIRA Search KSampler with best_of_n, zero_order or restarts"
        )
    conds = [c for cs in guider.original_conds.values() for c in cs]
    groups = [c.get("hooks") for c in conds]
    weights = [_weight_hooks(group) for group in groups]
    if not any(weights):
        return None
    if any(len(strengths) > 1 for hooks in weights for strengths in hooks.values()):
        return (
            "the conditioning has a LoRA hook whose strength changes by keyframes, and its weights are overwritten "
            "while the gradient still needs them: give it one strength, load the LoRA on the model, or use MIRA Search "
            "KSampler"
        )
    if len({frozenset((id(ref), *s) for ref, s in hooks.items()) for hooks in weights}) > 1:
        return (
            "the conditionings have different LoRA hooks, and the weights of one overwrite those of the other while "
            "the gradient still needs them: give positive and negative the same hooks throughout, load the LoRA on the "
            "model, or use MIRA Search KSampler"
        )
    return None


def _weight_hooks(group: Any) -> dict[object, set[float]]:
    """Hooks on the model's weights, with the strengths that they take."""
    if group is None:
        return {}
    found = {}
    for hook in group.get_type(comfy.hooks.EnumHookType.Weight):
        # Its public strength is that of the keyframe where the last sample ended.
        keyframes, whole = hook.hook_keyframe.keyframes, hook._strength_model
        strengths = {round(k.strength * whole, 6) for k in keyframes} or {whole}
        if any(not math.isclose(s, 0) for s in strengths):
            found[hook.hook_ref] = strengths
    return found
