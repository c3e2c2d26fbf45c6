"""Rewards that are closed formulas of the pixels.

Every measure takes images (B, 3, H, W), nominally in [0, 1] and not clamped: pixels beyond the range count, and a
saturated pixel still feels its reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Facts, Reward
from .preprocess import resize

EPS = 1e-8  # under a root: the gradient of a flat image is zero, not infinite
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def brightness(images: Tensor) -> Tensor:
    """(B,) in [-1, 1]: the mean of the raw output in [-1, 1], as in the paper."""
    return (images * 2 - 1).flatten(1).mean(1)


def darkness(images: Tensor) -> Tensor:
    """The negative of `brightness`."""
    return -brightness(images)


def luma(images: Tensor) -> Tensor:
    """(B, H, W)."""
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1)


def contrast(images: Tensor) -> Tensor:
    """(B,) in [0, 0.5]: the standard deviation of the luma (RMS contrast)."""
    return (luma(images).flatten(1).var(1, unbiased=False) + EPS).sqrt()


def colourfulness(images: Tensor) -> Tensor:
    """(B,) from 0 to about 1: sqrt(var_rg + var_yb) + 0.3 sqrt(mean_rg^2 + mean_yb^2), in units of 255 levels.

    Hasler and Suesstrunk, Measuring colourfulness in natural images (2003), whose scale runs to about 109.
    """
    r, g, b = images.unbind(1)
    opponents = torch.stack([r - g, (r + g) / 2 - b], 1).flatten(2)
    spread = (opponents.var(2, unbiased=False).sum(1) + EPS).sqrt()
    return spread + 0.3 * (opponents.mean(2).square().sum(1) + EPS).sqrt()


def sharpness(images: Tensor) -> Tensor:
    """(B,) from 0 on: the root mean square of the luma's Laplacian, where the whole stencil lies in the image."""
    y = luma(images)[:, None]
    laplacian = F.conv2d(y, y.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3))
    return (laplacian.square().flatten(1).mean(1) + EPS).sqrt()


def symmetry(images: Tensor) -> Tensor:
    """(B,) in [-1, 0]: minus the root mean square of the difference from the image's own mirror, left and right."""
    return -((images - images.flip(-1)).square().flatten(1).mean(1) + EPS).sqrt()


@dataclass(frozen=True)
class Measure:
    formula: Callable[[Tensor], Tensor]
    low: float
    high: float
    typical: tuple[float, float]


MEASURES = {
    "brightness": Measure(brightness, -1.0, 1.0, (-0.5, 0.5)),
    "darkness": Measure(darkness, -1.0, 1.0, (-0.5, 0.5)),
    "contrast": Measure(contrast, 0.0, 0.5, (0.1, 0.3)),
    "colourfulness": Measure(colourfulness, 0.0, 1.0, (0.1, 0.4)),
    "sharpness": Measure(sharpness, 0.0, 5.0, (0.02, 0.2)),
    "symmetry": Measure(symmetry, -1.0, 0.0, (-0.35, -0.1)),
}
REFERENCE = "match reference"


class PixelReward(Reward):
    """One of `MEASURES`.

    >>> grey = torch.full((2, 3, 8, 8), 0.75)
    >>> total, parts = PixelReward("brightness")(grey, ["a fox"] * 2)
    >>> total
    tensor([0.5000, 0.5000])
    """

    def __init__(self, measure: str) -> None:
        if measure not in MEASURES:
            raise ValueError(f"pixel reward {measure!r} is not one of {', '.join(MEASURES)}")
        self.measure = MEASURES[measure]
        self.facts = Facts(measure, self.measure.low, self.measure.high, self.measure.typical)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.measure.formula(images if images.dtype.itemsize > 2 else images.float())


class MatchReference(Reward):
    """Minus the root mean square difference from a reference image, which is resized to the images' size.

    reference: (1, 3, H, W) for all images, or one per image, in [0, 1].
    """

    def __init__(self, reference: Tensor) -> None:
        self.reference = reference
        self.facts = Facts(REFERENCE, -1.0, 0.0, (-0.6, -0.2), preprocessing="the reference resized, bicubic")

    def unfit(self, count: int) -> str | None:
        if len(self.reference) in (1, count):
            return None
        return f"{len(self.reference)} reference images for {count} images: give one, or one each"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """A search scores several particles of a whole batch: as often, the references come again."""
        particles, more = divmod(len(images), len(self.reference))
        if more:
            raise ValueError(self.unfit(len(images)))
        reference = resize(self.reference.to(images), (images.shape[-2], images.shape[-1]))
        difference = images.unflatten(0, (particles, len(reference))) - reference
        return -(difference.flatten(0, 1).square().flatten(1).mean(1) + EPS).sqrt()
