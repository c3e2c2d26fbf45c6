"""Does a gradient agree with a finite difference? Asked once, before anything is optimised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .rollout import difference

SEEN = 0.02  # a relative error at which a gradient is right, and no other length of the difference is tried


def gradient_error(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: Sequence[float] = (1e-2, 1e-3, 1e-4),
    *,
    within: Callable[[], AbstractContextManager] = nullcontext,
    looked_at: Callable[[Tensor], Tensor] = lambda out: out,
) -> tuple[float, float]:
    """(the relative error of autograd's derivative of <f(x), v> along its own gradient, v fixed and random;
    how far looked_at(f(x)) with a gradient is from the same without, the largest of the batch, relative).

    f: (B, ...) -> (B, ...). steps: lengths of the difference, relative to x; the best agreement counts, because a
    long step meets curvature and a short one rounding, while a wrong gradient agrees at none. within: of forward and
    backward. An error is inf when the gradient is zero or not finite. Raises what f raises.
    """
    generator = torch.Generator().manual_seed(0)
    x = x.detach()
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    def total(t: Tensor) -> Tensor:
        # In float64 on the CPU: not every device has it.
        return t.cpu().double().sum()

    with torch.no_grad():
        expected = looked_at(f(x))
    with torch.enable_grad(), within():
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        if not out.requires_grad:
            return float("inf"), 0.0
        moved = difference(looked_at(out.detach()), expected).max().item()
        (gradient,) = torch.autograd.grad(total(out * v), leaf)
    length = total(gradient**2).sqrt()
    if not torch.isfinite(length) or length == 0:
        return float("inf"), moved
    best = float("inf")
    for step in steps:
        direction = gradient * (total(x**2).sqrt() / length * step).item()
        with torch.no_grad():
            up, down = (total(f(x + sign * direction) * v) for sign in (1, -1))
        slope = total(gradient * direction)
        best = min(best, (((up - down) / 2 - slope).abs() / slope.abs()).item())
        if best < SEEN:
            break
    return best, moved
