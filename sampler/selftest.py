"""Does a gradient agree with a finite difference? Asked once, before anything is optimised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .rollout import difference

SEEN = 0.02  # a relative error at which a gradient is right
FAR = (0.1, 0.3, 0.03, 0.01)  # far more than bfloat16 rounds to; there is little curvature in a random direction


@dataclass(frozen=True)
class Checked:
    """wrong: the relative error of a gradient, infinite where it is zero or not finite; lacks: the same in a random
    direction, where a part that is missing shows. moved: how far f's value is off
    where a gradient is wanted, the largest of the batch, relative. What both were found with: plain, the value without
    a gradient, and the gradient itself; None where there is none. apart: how far the gradient is from that of a `known`
    one, relative.
    """

    wrong: float
    moved: float
    plain: Tensor
    gradient: Tensor | None = None
    apart: float = 0.0
    lacks: float = 0.0


def check(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: Sequence[float] = (1e-2, 1e-3, 1e-4),
    *,
    within: Callable[[], AbstractContextManager] = nullcontext,
    looked_at: Callable[[Tensor], Tensor] = lambda out: out,
    known: Checked | None = None,
    enough: float = SEEN,
    far: Sequence[float] = FAR,
) -> Checked:
    """Autograd's derivative of <f(x), v> along its own gradient, v fixed and random, against finite differences; the
    same along a random direction, v then being what f changes by, which a gradient that lacks a part cannot give; and
    looked_at(f(x)) with a gradient against the same without.

    f: (B, ...) -> (B, ...). steps: lengths of the difference, relative to x; the best agreement counts, because a
    long step meets curvature and a short one rounding, while a wrong gradient agrees at none. within: of forward and
    backward. known: what was found of f at x within something else, which is compared with and not measured again.
    enough: the error at which no other length is tried. far: the lengths in the random direction. Raises what f raises.
    """
    generator = torch.Generator().manual_seed(0)
    x = x.detach()
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    def total(t: Tensor) -> Tensor:
        # In float64 on the CPU: not every device has it.
        return t.cpu().double().sum()

    if known:
        plain = known.plain
    else:
        with torch.no_grad():
            plain = looked_at(f(x))
    with torch.enable_grad(), within():
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        if not out.requires_grad:
            return Checked(math.inf, 0.0, plain)
        moved = difference(looked_at(out.detach()), plain).max().item()
        (gradient,) = torch.autograd.grad(total(out * v), leaf)
    length = total(gradient**2).sqrt()
    if not torch.isfinite(length) or length == 0:
        return Checked(math.inf, moved, plain)
    if known and known.gradient is not None:
        apart = total((gradient - known.gradient) ** 2).sqrt() / total(known.gradient**2).sqrt()
        return Checked(known.wrong, moved, plain, gradient, apart.item(), known.lacks)
    best = math.inf
    for step in steps:
        direction = gradient * (total(x**2).sqrt() / length * step).item()
        with torch.no_grad():
            up, down = (total(f(x + sign * direction) * v) for sign in (1, -1))
        slope = total(gradient * direction)
        best = min(best, (((up - down) / 2 - slope).abs() / slope.abs()).item())
        if best < enough:
            break
    r = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    along = math.inf
    for step in far:
        direction = r * (total(x**2).sqrt() / total(r**2).sqrt() * step).item()
        with torch.no_grad():
            change = f(x + direction) - f(x - direction)
            # As large as v, for a backward pass in float16.
            change = change / (total(change**2) / change.numel()).sqrt().clamp(min=1e-30).item()
            # Of another length, so that its rounding is another, too.
            seen = total((f(x + direction / 2) - f(x - direction / 2)) * change)
        with torch.enable_grad(), within():
            leaf = x.clone().requires_grad_()
            (its,) = torch.autograd.grad(total(f(leaf) * change), leaf)
        said = total(its * direction)
        along = min(along, ((seen - said).abs() / seen.abs().clamp(min=1e-300)).item())
        if along < enough:
            break
    return Checked(best, moved, plain, gradient, lacks=along)
