"""Kernels that have a backward: PyTorch's own, in the place of what ComfyUI or a graph has chosen."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from torch import Tensor

from ...sampler.memory import out_of_memory

# ComfyUI's own switches, where it has them: kernels without a backward off, and a backward in fp8 off too, which its
# training nodes may have left on.
SWITCHES = {"in_training": True, "training_fp8_bwd": False}


@contextmanager
def training(gradient: bool = True) -> Iterator[None]:
    """Outside inference mode, with a gradient, and with none of ComfyUI's kernels that have no exact backward.

    gradient: without one, these kernels alone, so that the same noises give the same image in every method; the mode is
    the graph's, which a guider with gradients of its own may have left.
    """
    management = comfy.model_management
    before = {name: getattr(management, name) for name in SWITCHES if hasattr(management, name)}
    try:
        for name in before:
            setattr(management, name, SWITCHES[name])
        with ExitStack() as stack:
            if gradient:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.enable_grad())
            yield
    finally:
        for name, value in before.items():
            setattr(management, name, value)


ATTENTION = ("optimized_attention", "optimized_attention_masked")
# comfy-kitchen's fused rotary positions and norms, which have no backward; those that write over their input end in _.
FUSED = re.compile(r"(apply_rope|rms_rope|rms_adaln|adaln)\w*(?<!_)")


@contextmanager
def pytorch_kernels() -> Iterator[None]:
    """PyTorch's own code where a model asks for "the optimised one" and listens to no option.

    Of attention: sage and flash have no backward, and some models call the function that they imported, without
    `transformer_options` (see `sdpa`). Of rotary positions and norms: fused kernels are in cores without a switch for
    training, and in models that do not ask it (Cosmos Predict 2, Anima and JoyImage in 0.33).
    """
    changed = []
    for name, module in list(sys.modules.items()):
        if name.startswith("comfy.") or name == "comfy_kitchen":
            for known, value in list(vars(module).items()):
                if (other := _pytorch_kernel(known, value)) is not None:
                    changed.append((vars(module), known, value, other))
    try:
        for namespace, name, _, other in changed:
            namespace[name] = other
        yield
    finally:
        for namespace, name, value, _ in changed:
            namespace[name] = value


def _pytorch_kernel(name: str, value: object) -> Callable | None:
    """What takes the place of a module's function of this name, or None: it stays."""
    if name in ATTENTION:
        return comfy.ldm.modules.attention.attention_pytorch
    if FUSED.fullmatch(name) and getattr(value, "__module__", "") == "comfy_kitchen":
        from comfy_kitchen.backends import eager

        return getattr(eager, name, None)
    return None


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions and matrix products of a GPU in full float32: cuDNN's default costs three digits of a score."""
    backends: Any = torch.backends
    off: bool | str
    switches, name, off = (backends.cudnn, backends.cuda.matmul), "allow_tf32", False
    try:
        before = [getattr(switch, name) for switch in switches]
    except RuntimeError:  # once somebody has used the newer switch, the older one cannot be read
        switches, name, off = (backends.cudnn.conv, backends.cuda.matmul), "fp32_precision", "ieee"
        before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, off)
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def sdpa(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention: sage, flash, sub-quadratic and split have no backward, or change with free memory."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


class Around:
    """An override of attention that the graph has, around PyTorch's: what it does to queries, keys and values stays.

    heeded: whether it has always called what it was given. A kernel of its own has no backward: PyTorch's attention
    takes its place, in that call.
    """

    def __init__(self, theirs: Callable) -> None:
        self.theirs, self.heeded = theirs, True

    def __call__(self, _: Any, *args: Any, **kwargs: Any) -> Tensor:
        called: list[bool] = []

        def pytorch(*args: Any, **kwargs: Any) -> Tensor:
            called.append(True)
            return sdpa(None, *args, **(kwargs | {"_inside_attn_wrapper": True}))  # else ComfyUI asks for the override

        try:
            out = self.theirs(pytorch, *args, **kwargs)
        except (RuntimeError, TypeError, ValueError, AssertionError) as problem:
            if called or out_of_memory(problem):
                raise
        if called:
            return out
        self.heeded = False
        return sdpa(None, *args, **kwargs)


def attention_of(model_options: dict) -> Callable:
    """The override of attention that leaves a gradient: PyTorch's, within the graph's own where there is one."""
    own = model_options.get("transformer_options", {}).get("optimized_attention_override")
    if own is None or own is sdpa or isinstance(own, Around):  # ours already, of whoever samples around this
        return own or sdpa
    return Around(own)
