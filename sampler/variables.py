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
    Raises ValueError when the run has no such noises.
    """

    def __init__(self, name: str, noises: Sequence[Tensor]) -> None:
        self.name = name
        self.start = [n.detach().clone() for n in noises]
        if name == "initno":
            self.leaves = [torch.zeros_like(self.start[0]), torch.ones_like(self.start[0])]
        else:
            self.free = list(SUBSETS[name](len(self.start)))
            self.leaves = [self.start[i].clone() for i in self.free]
        if not self.leaves:
            raise ValueError(
                f"variables is {name!r}, but this sampler injects no noise for it: use an ancestral or SDE sampler, "
                "or optimise the initial noise"
            )
        for leaf in self.leaves:
            leaf.requires_grad_()

    def noises(self) -> list[Tensor]:
        """z_T, ..., z_1, differentiable in the leaves."""
        out = list(self.start)
        if self.name == "initno":
            mu, sigma = self.leaves
            out[0] = mu + sigma * self.start[0]
            return out
        for i, leaf in zip(self.free, self.leaves, strict=True):
            out[i] = leaf
        return out

    def penalty(self) -> Tensor | None:
        """InitNO's KL(N(mu, sigma^2) || N(0, 1)), the mean over elements, (B,); None for all others."""
        if self.name != "initno":
            return None
        mu, sigma = self.leaves
        return standard_kl(mu, sigma.square().clamp(min=1e-12)).flatten(1).mean(1)
