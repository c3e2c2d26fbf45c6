"""Who of a population goes on: weights and draws, each (P, B): particle p of image b."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def select(values: Tensor, index: Tensor) -> Tensor:
    """values (P, B, ...), index (P', B) -> (P', B, ...)."""
    index = index.to(values.device)
    return values[index, torch.arange(index.shape[1], device=values.device)]


def multinomial(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """(P, B) -> (P, B): P independent draws of each image's particles, in proportion to their weights."""
    return torch.multinomial(log_weights.softmax(0).T, len(log_weights), True, generator=generator).T


def ssp(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """(P, B) -> (P, B): Srinivasan sampling: every particle gets floor or ceiling of its expected number of copies.

    Two fractional parts at a time trade what makes one of them whole, by a coin that keeps both expectations.
    """
    columns = []
    for weights in log_weights.double().softmax(0).T:
        count = len(weights)
        expected = (weights * count).tolist()
        copies = [math.floor(e + 1e-9) for e in expected]
        coins = torch.rand(count, generator=generator).tolist()
        left, share = 0, expected[0] - copies[0]
        for other in range(1, count):
            second = expected[other] - copies[other]
            both = share + second
            if both < 1:
                # One of them takes all, the other is settled.
                if both > 0 and coins[other] >= share / both:
                    left = other
                share = both
            elif coins[other] < (1 - second) / max(2 - both, 1e-12):
                copies[left] += 1
                left, share = other, both - 1
            else:
                copies[other] += 1
                share = both - 1
        if sum(copies) < count:
            copies[left] += 1  # what is left is whole, but for rounding
        columns.append(torch.repeat_interleave(torch.arange(count), torch.tensor(copies)))
    return torch.stack(columns, 1)


def effective(log_weights: Tensor) -> Tensor:
    """(P, B) -> (B,): the effective sample size, 1 / sum of the squared weights."""
    return 1 / log_weights.softmax(0).square().sum(0)
