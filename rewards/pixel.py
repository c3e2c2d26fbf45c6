"""Rewards that are closed formulas of the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .base import Facts, Reward


def brightness(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,) in [-1, 1]: the mean of the raw output in [-1, 1].

    Not clamped, as in the paper: pixels beyond the range count, and a saturated pixel still feels its reward.
    """
    return (images.float() * 2 - 1).flatten(1).mean(1)


def darkness(images: Tensor) -> Tensor:
    """The negative of `brightness`."""
    return -brightness(images)


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"brightness": brightness, "darkness": darkness}


class PixelReward(Reward):
    """One of `MEASURES`."""

    def __init__(self, measure: str):
        if measure not in MEASURES:
            raise ValueError(f"pixel reward {measure!r} is not one of {', '.join(MEASURES)}")
        self.facts = Facts(measure, -1.0, 1.0, (-0.5, 0.5))
        self.measure = MEASURES[measure]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.measure(images)
