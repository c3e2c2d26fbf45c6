"""Noises of other seeds, and the best of several to begin from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rollout import Rollout, per_image


def stream(seed: int, number: int) -> torch.Generator:
    """A source of noise of its own for every (seed, number), number -1 or more."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number + 2) % 2**63)


def fresh(like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Noises of the same shapes, drawn one after the other."""
    return [torch.randn(z.shape, generator=generator).to(z) for z in like]


@dataclass(frozen=True)
class Start:
    """noises: z of the chosen seed of every image. rewards (seeds, B): of all that were tried. chosen (B,): which.

    interrupted: why fewer were tried than asked for, or None.
    """

    noises: list[Tensor]
    rewards: Tensor
    chosen: Tensor
    interrupted: BaseException | None = None


def best_of(
    rollout: Rollout,
    reward: Callable[[Tensor], Tensor],
    noises: Sequence[Tensor],
    count: int,
    seed: int,
    interrupts: tuple[type[BaseException], ...] = (),
) -> Start:
    """The best of `count` samples of the frozen model for every image: the given noises, and fresh ones from `seed`.

    reward: latents (B, C, ...) -> (B,). One run of the sampler each, without a gradient; noises of two are in memory.
    An exception of `interrupts` after the first one ends the choice with what was tried.
    """
    best = [n.detach() for n in noises]
    rewards: list[Tensor] = []
    chosen = torch.zeros(len(best[0]), dtype=torch.long)
    highest, interrupted = None, None
    for n in range(count):
        z = best if n == 0 else fresh(best, stream(seed, n))
        try:
            with torch.no_grad():
                found = reward(rollout(z).x0).detach().cpu().double()
        except interrupts as stop:
            if n == 0:
                raise
            interrupted = stop
            break
        rewards.append(found)
        found = found.nan_to_num(nan=-torch.inf)
        if highest is None:
            highest = found
            continue
        better = found > highest
        highest, chosen = torch.where(better, found, highest), torch.where(better, n, chosen)
        best = [torch.where(per_image(better.to(b.device), b), new, b) for new, b in zip(z, best, strict=True)]
    return Start(best, torch.stack(rewards), chosen, interrupted)
