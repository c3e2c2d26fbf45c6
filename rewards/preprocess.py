"""From images to what a scorer's network sees: equal to the reference pipelines', and differentiable.

images are (B, 3, H, W), nominally in [0, 1]. The references read 8-bit files with Pillow, so values beyond the range
are clamped, and every pass of a resize is rounded to 8 bits. The gradient goes straight through both, as if they were
not there (Bengio et al., arXiv 1308.3432): the score is the one that the saved image gets, and a saturated pixel still
feels its reward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> what its file shows: clamped and rounded to 8 bits."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().movedim(0, 2).contiguous().cpu().numpy()
    return Image.fromarray(pixels)


def straight_through(images: Tensor, seen: Tensor) -> Tensor:
    """The values of `seen` with the gradient of `images`."""
    return images + (seen - images).detach()


class _Resampled(torch.autograd.Function):
    """torch's antialiased resampling, with a backward that is a matrix product along each side.

    torch's own adds up in any order on a GPU, so that no run repeats, and on some backends there is none.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
        ctx.sides, ctx.mode = tuple(zip(images.shape[-2:], shape, strict=True)), mode
        return F.interpolate(images, size=shape, mode=mode, antialias=True, align_corners=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (height, width), like = ctx.sides, gradient
        if width[0] != width[1]:
            gradient = gradient @ _weights(*width, ctx.mode).to(like).T
        if height[0] != height[1]:
            gradient = _weights(*height, ctx.mode).to(like) @ gradient
        return gradient, None, None


@functools.lru_cache(maxsize=16)
def _weights(before: int, after: int, mode: str) -> Tensor:
    """(before, after): the share of every pixel of a line in every pixel of the resampled line."""
    lines = torch.eye(before, dtype=torch.float64)[None, None]
    return F.interpolate(lines, size=(before, after), mode=mode, antialias=True, align_corners=False)[0, 0]


def resample(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """(..., H, W) to `shape`, antialiased; the same bits and the same gradient every time, on a GPU too."""
    return _Resampled.apply(images, shape, mode)


def resize(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bicubic and antialiased, as Pillow's: first along the width, then along the height."""
    for step in ((images.shape[-2], shape[1]), shape):
        if tuple(images.shape[-2:]) != step:
            images = resample(images, step, "bicubic")
            images = straight_through(images, (images * 255).round().clamp(0, 255) / 255)
    return images


def crop_torchvision(images: Tensor, size: int) -> Tensor:
    """The shorter side to `size`, then the centre: OpenAI's and open_clip's, made of torchvision."""
    return _crop(images, size, lambda spare: round(spare / 2))


def crop_transformers(images: Tensor, size: int) -> Tensor:
    """The same by Hugging Face's processors, which round the offset of the centre down."""
    return _crop(images, size, lambda spare: spare // 2)


def _crop(images: Tensor, size: int, offset: Callable[[int], int]) -> Tensor:
    height, width = images.shape[-2:]
    # Sizes are truncated as both libraries truncate them.
    images = resize(images, (size * height // min(height, width), size * width // min(height, width)))
    top, left = (offset(side - size) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def pad_longest(images: Tensor, size: int) -> Tensor:
    """The longer side to `size`, then black around it (HPSv2)."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resize(images, (round(height * scale), round(width * scale)))
    spare = [size - side for side in images.shape[-2:]]
    left, top = spare[1] // 2, spare[0] // 2
    return F.pad(images, (left, spare[1] - left, top, spare[0] - top))


def squash(images: Tensor, size: int) -> Tensor:
    """Both sides to `size`, whatever the proportions (SigLIP)."""
    return resize(images, (size, size))


@dataclass(frozen=True)
class Preprocessing:
    """It travels with a network: fit(images, size), then (x - mean) / std of every channel."""

    size: int
    fit: Callable[[Tensor, int], Tensor] = crop_torchvision
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        images = images if images.dtype.itemsize > 2 else images.float()
        images = self.fit(straight_through(images, images.clamp(0, 1)), self.size)
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std
