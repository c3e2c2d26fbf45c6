"""What every reward is: a function of images and prompts, with the facts that its users need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Facts:
    """Higher is always better. `low`, `high`: the range; `typical`: where unoptimised images lie.

    preprocessing: what the network is shown, in words.
    """

    name: str
    low: float
    high: float
    typical: tuple[float, float]
    differentiable: bool = True
    needs_prompt: bool = False
    preprocessing: str = "none"

    def describe(self) -> str:
        """One line: the range, and where unoptimised images lie."""
        return f"typical {self.typical[0]:g} to {self.typical[1]:g}, range {self.low:g} to {self.high:g}"


def of_whole_images(total: Tensor, images: Tensor) -> Tensor:
    """The rewards (B,) of images (B, 3, H, W): NaN for one that is not finite, whatever a reward makes of it. As JPEG,
    for one, it is black, and small.
    """
    whole = torch.isfinite(images.detach()).flatten(1).all(1)
    return torch.where(whole.to(total.device), total, torch.nan)


class Reward:
    """Scores images one by one.

    __call__: images (B, 3, H, W), nominally in [0, 1] but not clamped, and one prompt per image -> the total (B,)
    and its named parts, each (B,). modules: the networks inside, for whoever manages memory.
    """

    facts: Facts
    modules: tuple[nn.Module, ...] = ()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        score = self.score(images, prompts)
        return score, {self.facts.name: score}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def several(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        """The total (B,) by each of several lists of prompts; where it can be, the images are encoded once."""
        return [self(images, prompts)[0] for prompts in texts]

    def evaluation(self, number: int) -> None:
        """Told before every evaluation of a run, from 0 on: a reward that draws random numbers seeds them with it."""

    def unfit(self, count: int) -> str | None:
        """Why `count` images cannot be scored together, or None: told before any of them is sampled."""
        return None

    def notices(self, prompts: Sequence[str]) -> list[str]:
        """What the user should know of these prompts, such as that one is too long."""
        return []
