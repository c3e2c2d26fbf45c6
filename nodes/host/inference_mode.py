"""Out of ComfyUI's inference mode: autograd cannot save what was made in it.

ComfyUI runs nodes in inference mode, and so its own nodes find every weight as they left it: weights are moved in
inference mode only (`loading`), and what autograd cannot save is replaced by an equal copy once they are in place.
"""

from __future__ import annotations

import copy
import itertools
from types import CellType
from typing import Any

import comfy.conds
from torch import Tensor, nn

from .patches import controls, things_in


def normal(value: Any) -> Any:
    """A copy, outside inference mode, of every tensor in nested lists, tuples, dicts and ComfyUI's conditioning; the
    rest as it is.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: normal(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(normal(v) for v in value)
    if isinstance(value, comfy.conds.CONDRegular):
        value = copy.copy(value)
        vars(value).update({k: normal(v) for k, v in vars(value).items()})
    return value


def made_in_inference_mode(t: Tensor) -> bool:
    """Whether autograd could not save it."""
    # Both signs: `is_inference()` forgets after `.to(dtype)`, where the version counter is what autograd will ask for;
    # a weight of ours that a stock node moved since has a counter, and data that were made in inference mode.
    if t.is_inference() or t.detach().is_inference():
        return True
    try:
        t._version  # noqa: B018
    except RuntimeError:
        return True
    return False


def leave_inference_mode(module: nn.Module) -> None:
    """Re-register every weight, buffer and plain tensor that was made in inference mode: autograd cannot save those."""
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None and made_in_inference_mode(p):
                # Not `clone`: there are quantised tensors whose clone is the very same.
                child._parameters[name] = nn.Parameter(p.detach().to(p.device, copy=True), requires_grad=False)
        for name, b in child._buffers.items():
            if b is not None and made_in_inference_mode(b):
                child._buffers[name] = b.detach().clone()
        replace_tensors(child)
    for part in ("latent_format", "model_sampling"):  # of a diffusion model: these may be no modules
        if getattr(module, part, None) is not None:
            replace_tensors(getattr(module, part))


def replace_tensors(thing: Any, copies: dict | None = None) -> None:
    """Plain tensors that an object or the cell of a closure holds, alone or in lists, tuples and dicts: means of a
    format, cached positions. What others hold as well stays common: lists and dicts are the same ones afterwards, and
    copies, {id: (tensor, its copy)}, tells what was replaced before.
    """
    copies = {} if copies is None else copies
    if isinstance(thing, CellType):
        if (now := _outside(thing.cell_contents, copies)) is not thing.cell_contents:
            thing.cell_contents = now
        return
    for name, value in list(vars(thing).items()):
        if name not in ("_parameters", "_buffers", "_modules") and (now := _outside(value, copies)) is not value:
            vars(thing)[name] = now


def _outside(value: Any, copies: dict, depth: int = 2) -> Any:
    """The same, with copies in the place of its tensors that were made in inference mode."""
    if isinstance(value, Tensor):
        if not made_in_inference_mode(value):
            return value
        if id(value) not in copies:
            copies[id(value)] = value, value.detach().clone()  # both: an id may be another's once its own is gone
        return copies[id(value)][1]
    if not depth:
        return value
    if type(value) is tuple:
        found = tuple(_outside(v, copies, depth - 1) for v in value)
        return value if all(a is b for a, b in zip(found, value, strict=True)) else found
    if type(value) in (list, dict):
        for k, v in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if (now := _outside(v, copies, depth - 1)) is not v:
                value[k] = now
    return value


def leave_inference_mode_with(guider: Any, model_options: dict) -> None:
    """The same of conditioning, and of what patches bring along but the model itself. guider: the run's own copy."""
    if hasattr(guider, "conds"):
        guider.conds = normal(guider.conds)
        for control in controls(guider.conds):
            replace_tensors(control)  # the hint that it holds
            if isinstance(network := getattr(control, "control_model", None), nn.Module):
                leave_inference_mode(network)  # a ControlLora's is made for every sample
    patcher = guider.model_patcher
    known = {id(m) for m in patcher.model.modules()}
    copies: dict = {}
    injected = [i for group in patcher.injections.values() for i in group]  # adapters beside the weights
    for thing in itertools.chain.from_iterable(map(things_in, [model_options, *injected])):
        if not isinstance(thing, nn.Module):
            replace_tensors(thing, copies)
        elif id(thing) not in known:
            leave_inference_mode(thing)
            thing.requires_grad_(False)
