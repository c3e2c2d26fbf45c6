"""What of a trajectory is optimised, and how it makes the noises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# T noises -> the indices that are free; z_T is 0. The early half is what the sampler asks for first.
SUBSETS: dict[str, Callable[[int], range]] = {
    "trajectory": lambda count: range(count),
    "initial": lambda count: range(1),
    "injected": lambda count: range(1, count),
    "early": lambda count: range((count + 1) // 2),
    "late": lambda count: range((count + 1) // 2, count),
}
VARIABLES = (*SUBSETS, "initno")


def standard_kl(mu: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mu, variance) || N(0, 1)) of every element."""
    return (mu.square() + variance - 1 - variance.log()) / 2


class Variables:
    """The leaves that an optimiser steps, and the noises that they make.

    name: one of `VARIABLES`. A subset of the noises is optimised as it is. "initno" writes z_T = mu + sigma z0 and
    optimises mu and sigma, element by element (InitNO, arXiv 2404.04650); the injected noises stay.
    mask: the part of the latent that is sampled at all, or None. What is not painted is noised with z_T as well, where
        the network sees it: no noise is free there, and no surrogate would see it move.
    begun: the leaves as they were. count (B,): how many elements are free.
    Raises ValueError when the run has no such noises.
    """

    def __init__(self, name: str, noises: Sequence[Tensor], mask: Tensor | None = None) -> None:
        self.name = name
        self.start = [n.detach().clone() for n in noises]
        self.inside = None if mask is None else (mask > 0).expand_as(self.start[0])
        if name == "initno":
            self.leaves = [torch.zeros_like(self.start[0]), torch.ones_like(self.start[0])]
        else:
            self.free = list(SUBSETS[name](len(self.start)))
            # Nothing outside of a mask, so that a leaf's norm is that of what is free.
            self.leaves = [self._within(self.start[i], torch.zeros_like(self.start[i])) for i in self.free]
        if not self.leaves:
            raise ValueError(
                f"variables is {name!r}, but this sampler injects no noise for it: use an ancestral or SDE sampler, "
                "or optimise the initial noise"
            )
        self.begun = [leaf.detach().clone() for leaf in self.leaves]
        free = torch.ones_like(self.start[0], dtype=torch.bool) if self.inside is None else self.inside
        self.count = len(self.leaves) * free.flatten(1).sum(1)
        for leaf in self.leaves:
            leaf.requires_grad_()

    def _within(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` where it is free, and `old` elsewhere."""
        return new.clone() if self.inside is None else torch.where(self.inside, new, old)

    def noises(self) -> list[Tensor]:
        """z_T, ..., z_1, differentiable in the leaves."""
        out = list(self.start)
        if self.name == "initno":
            mu, sigma = self.leaves
            out[0] = self._within(mu + sigma * self.start[0], self.start[0])
            return out
        for i, leaf in zip(self.free, self.leaves, strict=True):
            out[i] = leaf if self.inside is None else self._within(leaf, self.start[i])
        return out

    def penalty(self) -> Tensor | None:
        """InitNO's KL(N(mu, sigma^2) || N(0, 1)), the mean over elements, (B,); None for all others."""
        if self.name != "initno":
            return None
        mu, sigma = self.leaves
        kl = standard_kl(mu, sigma.square().clamp(min=1e-12))
        if self.inside is None:
            return kl.flatten(1).mean(1)
        return (kl * self.inside).flatten(1).sum(1) / self.inside.flatten(1).sum(1)
