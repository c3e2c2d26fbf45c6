"""Networks in half precision, whose gradients of a score would leave the range of its numbers, below or above."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOST = 100  # of these powers, in float32
LARGEST = 5  # the power of two that the largest gradient has at the network's end: as far from 2^-14 as from 2^15


class _Scaled(torch.autograd.Function):
    """x as it is. What its gradient is multiplied by is in `scales`, where both ends of a network find it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: list[Tensor]) -> Tensor:
        ctx.scales = scales
        return x.view_as(x)


class _Raised(_Scaled):
    """Where the gradient comes in: by a power of two for every image."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        largest = gradient.flatten(1).abs().amax(1)
        known = largest.isfinite() & (largest > 0)
        power = torch.where(known, largest, 1).log2().floor() + 1  # frexp's, which Apple's devices do not have
        ctx.scales[:] = [torch.ldexp(torch.ones_like(largest), (LARGEST - power).clamp(-MOST, MOST))]
        return gradient * _per_image(ctx.scales[0], gradient), None


class _Lowered(_Scaled):
    """Where it goes out: by that again."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return gradient / _per_image(ctx.scales[0], gradient), None


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """values (B,), shaped to multiply (B, ...)."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def place_of(network: nn.Module) -> Tensor:
    """A weight whose device and dtype inputs have to take."""
    return next(p for p in network.parameters() if p.is_floating_point())


def through(encode: Callable[[Tensor], Tensor], pixels: Tensor, network: nn.Module) -> Tensor:
    """encode(pixels), both (B, ...), in the network's own precision, in float32 (or float64) outside of it.

    Inside a half-precision network gradients have a scale of their own, whatever that of the score is.
    """
    place, scales = place_of(network), list[Tensor]()
    if place.dtype not in (torch.float16, torch.bfloat16):
        return encode(pixels.to(place))
    out = encode(_Lowered.apply(pixels, scales).to(place))
    return _Raised.apply(out.float(), scales)
