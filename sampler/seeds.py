"""Noises of other seeds, and the best of several to begin from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ending import Cut, Interrupts, attempt
from .keep import chosen, comparable

APART = 2**22  # beyond every number of a candidate or a restart
SEEDS = 2**53 - 111  # a prime; the editor, whose numbers are JavaScript's, takes no larger seed as it is


def another(seed: int, number: int) -> int:
    """A seed for every (seed, number), number -2 or more; far from each other's, however near the given ones are.

    Any seed will do, ComfyUI's largest too. What comes out can be typed into the editor.
    """
    return (seed * 1_000_003 + number + 2) % SEEDS


def stream(seed: int, number: int) -> torch.Generator:
    """A source of random numbers of its own for every (seed, number), and none that a host makes of `another`'s seeds:
    it draws z_T from them, and the same numbers injected once more would add up to more noise than the model knows.
    """
    return torch.Generator().manual_seed(another(seed, APART + number))


def fresh(like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Noises of the same shapes, drawn one after the other."""
    return [torch.randn(z.shape, generator=generator).to(z) for z in like]


@dataclass(frozen=True)
class Start:
    """x0, noises: of the chosen seed of every image. rewards (seeds, B): of all that were tried. chosen (B,): which.

    cut: why fewer were tried than asked for, or None.
    """

    x0: Tensor
    noises: list[Tensor]
    rewards: Tensor
    chosen: Tensor
    cut: Cut | None = None


@torch.no_grad()
def best_of(
    sample: Callable[[int], tuple[Tensor, Sequence[Tensor]]],
    reward: Callable[[Tensor], Tensor],
    count: int,
    interrupts: Interrupts = (),
    on_tried: Callable[[int], None] = lambda n: None,
) -> Start:
    """The best of `count` samples of the frozen model for every image.

    sample: n -> (x0 (B, C, ...), its noises); 0 is the given seed's. reward: x0 -> (B,). Noises of two are in memory.
    on_tried: is told how many there are so far.
    An exception of `interrupts`, running out of memory and any other error after the first one end the choice with
    what was tried.
    """

    def try_seed(n: int) -> tuple[Tensor, list[Tensor], Tensor]:
        x0, noises = sample(n)
        return x0, [z.detach() for z in noises], reward(x0).detach().cpu().double()

    best, cut = attempt(interrupts, try_seed, 0)
    if cut:
        raise cut.problem
    x0, noises, found = best
    rewards, which = [found], torch.zeros(len(x0), dtype=torch.long)
    highest = comparable(found)
    _, cut = attempt(interrupts, on_tried, 1)
    for n in range(1, count):
        if cut:
            break
        other, cut = attempt(interrupts, try_seed, n)
        if cut:
            break
        its_x0, its_noises, found = other
        rewards.append(found)
        found = comparable(found)
        better = found > highest
        highest, which = torch.where(better, found, highest), torch.where(better, n, which)
        x0 = chosen(better, its_x0, x0)
        noises = [chosen(better, new, old) for new, old in zip(its_noises, noises, strict=True)]
        _, cut = attempt(interrupts, on_tried, n + 1)
    return Start(x0, noises, torch.stack(rewards), which, cut)
