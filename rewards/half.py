"""Networks in half precision, whose gradients of a score would vanish below float16's smallest number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 2.0**12


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return gradient * ctx.scale, None


def place_of(network: nn.Module) -> Tensor:
    """A weight whose device and dtype inputs have to take."""
    return next(p for p in network.parameters() if p.is_floating_point())


def through(encode: Callable[[Tensor], Tensor], pixels: Tensor, network: nn.Module) -> Tensor:
    """encode(pixels) in the network's own precision, in float32 (or float64) outside of it.

    Inside a half-precision network gradients are `SCALE` times larger.
    """
    place = place_of(network)
    half = place.dtype in (torch.float16, torch.bfloat16)
    if half:
        pixels = _ScaleGradient.apply(pixels, 1 / SCALE)
    out = encode(pixels.to(place))
    if half:
        return _ScaleGradient.apply(out.float(), SCALE)
    return out
