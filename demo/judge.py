"""The held-out judge of the demo: which subject, style and background does an image show?

Trained on its own, and used by no reward: it measures adherence to the prompt independently.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vocabulary import BACKGROUNDS, STYLES, SUBJECTS
from .weights import load

SIZE = 64


def block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Judge(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> logits of subjects, styles and backgrounds."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96, 160)
        self.body = nn.Sequential(
            *(
                layer
                for a, b in itertools.pairwise(widths)
                for layer in (
                    block(a, b),
                    nn.Conv2d(b, b, 3, padding=1, groups=b, bias=False),
                    nn.Conv2d(b, b, 1),
                    nn.ReLU(),
                )
            )
        )
        self.mix = nn.Sequential(nn.Flatten(), nn.Linear(160 * 16, 128), nn.ReLU())
        self.subject = nn.Linear(128, len(SUBJECTS))
        self.style = nn.Linear(128, len(STYLES))
        self.background = nn.Linear(128, len(BACKGROUNDS))

    def features(self, images: Tensor) -> Tensor:
        """(B, 128): what all three are read off."""
        small = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        return self.mix(self.body(small.clamp(0, 1) * 2 - 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(images)
        return self.subject(features), self.style(features), self.background(features)


def load_judge() -> Judge:
    judge = Judge()
    judge.load_state_dict(load("judge"))
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def adherence(judge: Judge, images: Tensor, subjects: list[str]) -> Tensor:
    """(B,): the probability that the judge gives to the prompted subject of each image."""
    wanted = torch.tensor([SUBJECTS.index(s) for s in subjects])
    return judge(images)[0].softmax(1).gather(1, wanted[:, None])[:, 0]
