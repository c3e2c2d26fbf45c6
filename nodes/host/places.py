"""Where a model's code writes over what backward needs: the same arithmetic without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# In-place arithmetic, and what gives the same without writing over what backward needs.
OUT_OF_PLACE: dict[Callable, Callable] = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.div_: torch.div,
}
GIVES_BACK = "comfy.text_encoders.llama"  # the module of blocks that go on with what a call with `out=` gives back
LEAST_COVER = 1e-20  # the sum of the prompts' strengths at a pixel: a mask has none between this and 0
NORMS = (nn.functional.layer_norm, nn.functional.rms_norm)


class OutOfPlace(TorchFunctionMode):
    """x += y, x *= y and so on make a new tensor: residuals of the Flux family, guidance that rescales. So does what
    HiDream-O1's blocks write into their input and give back; elsewhere what is given back may be of no interest.

    But in ComfyUI's own sampling code, which adds regions of the image into one tensor, and means it.
    """

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and func in OUT_OF_PLACE and not _called_by("comfy.samplers"):
            return OUT_OF_PLACE[func](*args, **kwargs).to(args[0].dtype)
        if "out" in kwargs and torch.is_grad_enabled() and _called_by(GIVES_BACK):
            kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        return func(*args, **kwargs)


class SlicesToo(OutOfPlace):
    """And a slice is a copy: x[:, :n] = f(x[:, :n]) writes over what f has saved (FreeU V2)."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        return out.clone() if func is Tensor.__getitem__ and torch.is_grad_enabled() else out


class NormsApart(OutOfPlace):
    """Writing into a slice stays what it is, and a norm keeps a copy of its input, over which it is done; what a tensor
    is multiplied with is not itself written over (PixelDiT).
    """

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in NORMS:
            args = (args[0].clone(), *args[1:])
        elif func is Tensor.addcmul_ and args[0] is args[1]:
            func = torch.addcmul
        elif func in OUT_OF_PLACE and args[0]._is_view():
            return func(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)


class Uncovered(TorchFunctionMode):
    """Where no prompt covers the image, ComfyUI divides nothing by 1e-37, and backward would overflow: by more than
    that, which gives nothing all the same.
    """

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        divides = func in (Tensor.div_, Tensor.__itruediv__)
        if divides and torch.is_tensor(args[1]) and torch.is_grad_enabled() and _called_by("comfy.samplers"):
            args = (args[0], args[1].clamp(min=LEAST_COVER))
        return func(*args, **(kwargs or {}))


def gaps_of(guider: Any) -> Callable:
    """The context in which a guider's prediction has a gradient where its prompts leave gaps."""
    conds = [c for cs in getattr(guider, "conds", {}).values() for c in cs]
    regional = any(c.get(part) is not None for c in conds for part in ("area", "mask", "strength"))
    return Uncovered if regional else nullcontext


# From one to the next where backward finds that something was overwritten, or that a gradient changes the prediction.
PLACES = (nullcontext, OutOfPlace, SlicesToo, NormsApart)


class Place:
    """The context that a network is run in: one of PLACES, from one to the next."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> AbstractContextManager:
        return PLACES[self.number]()

    @property
    def is_last(self) -> bool:
        return self.number == len(PLACES) - 1

    def go_on(self) -> None:
        """To the next, of which there must be one."""
        self.number += 1


def written_over(problem: BaseException) -> bool:
    """Whether something is written over that backward needs: the next place may do."""
    return any(sign in str(problem) for sign in ("inplace operation", "in-place operation", "functions with out="))


def _called_by(module: str) -> bool:
    """Whether the code that called torch is of this module."""
    frame: FrameType | None = sys._getframe(2)
    while frame and frame.f_globals is globals():  # modes of ours around one another
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == module
