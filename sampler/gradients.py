"""Gradients of every image's loss, through networks in float16 too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rollout import per_image

SCALE_STEP = 16  # by how much a scale falls when gradients overflow


class LossScale:
    """What the loss of every image is multiplied by in backward, and its gradients are divided by again.

    Gradients of a mean over pixels are near float16's smallest numbers; above its largest there is no room at all. So
    an image whose gradient overflows takes a smaller scale, and the others of its batch keep theirs.
    """

    def __init__(self, value: float, batch: int) -> None:
        self.value = torch.full((batch,), float(value))

    def gradients(self, loss: Tensor, leaves: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor]:
        """Of (B,) values with respect to leaves (B, ...); zero where they do not depend on them.

        >>> z = torch.ones(2, 3, requires_grad=True)
        >>> LossScale(1024, 2).gradients(z.square().sum(1), [z])[0][0]
        tensor([2., 2., 2.])
        """
        scale = self.value.to(loss)
        found = torch.autograd.grad((loss * scale).sum(), leaves, retain_graph=retain_graph, allow_unused=True)
        return [
            torch.zeros_like(z) if g is None else g / per_image(self.value.to(g), g)
            for g, z in zip(found, leaves, strict=True)
        ]

    def lower(self, overflowed: Tensor) -> bool:
        """overflowed (B,): whose gradient is not finite though its loss is. Whether one of them has a scale to lower,
        so that its gradient is worth another try."""
        where = overflowed.cpu() & (self.value > 1)
        self.value = torch.where(where, (self.value / SCALE_STEP).clamp(min=1), self.value)
        return bool(where.any())


def finite(tensors: Sequence[Tensor]) -> Tensor:
    """(B,): whether every element of each image is a number."""
    return torch.stack([torch.isfinite(t).flatten(1).all(1) for t in tensors]).all(0)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """(B,): the norm over all tensors (B, ...) of each image, in float32 at least."""
    sizes = [(t if t.dtype == torch.float64 else t.float()).flatten(1).norm(dim=1) for t in tensors]
    return torch.stack(sizes).norm(dim=0)


def scaled(tensors: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Every image's part of the tensors (B, ...) times its own of the factors (B,)."""
    return [t * per_image(factors.to(t), t) for t in tensors]


def clipping(norms: Tensor, most: float) -> Tensor:
    """(B,): what gradients of such norms are scaled by, so that none is larger; most 0 does not clip."""
    return (most / norms.clamp(min=1e-12)).clamp(max=1) if most else torch.ones_like(norms)


@torch.no_grad()
def step(
    optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor], gradients: Sequence[Tensor], where: Tensor
) -> list[Tensor]:
    """Moves the images of `where` (B,), and gives the leaves as they were. The others stay where they
    are; that their momentum fades meanwhile only shortens their next steps.
    """
    before = [z.detach().clone() for z in leaves]
    for z, g in zip(leaves, gradients, strict=True):
        z.grad = torch.where(per_image(where.to(g.device), g), g, 0)
    optimizer.step()
    for z, b in zip(leaves, before, strict=True):
        z.copy_(torch.where(per_image(where.to(z.device), z), z, b))
    return before
