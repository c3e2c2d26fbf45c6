"""Does a gradient agree with a finite difference? Asked once, before anything is optimised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradient_error(f: Callable[[Tensor], Tensor], x: Tensor, steps: Sequence[float] = (1e-2, 1e-3, 1e-4)) -> float:
    """The relative error of autograd's derivative of <f(x), v> along its own gradient, v fixed and random.

    f: (B, ...) -> (B, ...). steps: lengths of the difference, relative to x; the best agreement counts, because a
    long step meets curvature and a short one rounding, while a wrong gradient agrees at none. inf when the gradient
    is zero or not finite. Raises what f raises.
    """
    generator = torch.Generator().manual_seed(0)
    x = x.detach()
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    def total(t: Tensor) -> Tensor:
        # In float64 on the CPU: not every device has it.
        return t.cpu().double().sum()

    def inner(y: Tensor) -> Tensor:
        return total(f(y) * v)

    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        out = inner(leaf)
        if not out.requires_grad:
            return float("inf")
        (gradient,) = torch.autograd.grad(out, leaf)
    length = total(gradient**2).sqrt()
    if not torch.isfinite(length) or length == 0:
        return float("inf")
    best = float("inf")
    for step in steps:
        direction = gradient * (total(x**2).sqrt() / length * step).item()
        with torch.no_grad():
            difference = (inner(x + direction) - inner(x - direction)) / 2
        slope = total(gradient * direction)
        best = min(best, ((difference - slope).abs() / slope.abs()).item())
        if best < 0.02:
            break
    return best
