"""Compressibility: minus the kilobytes of an image's JPEG, and a differentiable stand-in for them."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Facts, Reward
from .preprocess import picture

QUALITY = 95
# The quantisation tables that the standard suggests (ITU-T T.81, annex K), row by row.
LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
)  # fmt: skip
# A coefficient of c quantisation steps is taken to cost SLOPE / 2 * log2(1 + (c / KNEE)^2) bits, a block BLOCK bits and
# a file HEADER bytes besides. Fitted to Pillow's sizes at qualities 50 to 95 of noise, waves, flat colour and emoji.
KNEE, SLOPE, BLOCK, HEADER = 0.3, 1.66, 5.0, 623.0


def jpeg_bytes(image: Tensor, quality: int = QUALITY) -> int:
    """(3, H, W) in [0, 1], clamped and rounded to 8 bits -> the size of the file that Pillow writes."""
    file = io.BytesIO()
    picture(image).save(file, "JPEG", quality=quality)
    return file.tell()


def _dct() -> Tensor:
    """The orthonormal 8 x 8 DCT-II."""
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * n[None] + 1) * n[:, None] / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis


def table(base: tuple[int, ...], quality: int) -> Tensor:
    """libjpeg's table for a quality from 1 to 100, (8, 8)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * scale + 50) // 100).clamp(1, 255).view(8, 8)


def coefficients(channel: Tensor, base: tuple[int, ...], quality: int) -> Tensor:
    """(B, H, W) in 8-bit levels around 0 -> DCT coefficients in quantisation steps, (B, blocks, 8, 8).

    Blocks that the image fills only in part repeat its edge, as encoders do. The first coefficient of a block is taken
    relative to the block before it, as it is coded.
    """
    height, width = channel.shape[-2:]
    # By hand: padding has no backward that gives the same bits on a GPU every time.
    channel = torch.cat([channel, channel[..., -1:].expand(-1, -1, -width % 8)], 2)
    channel = torch.cat([channel, channel[:, -1:].expand(-1, -height % 8, -1)], 1)
    blocks = channel.unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2)
    dct = _dct().to(blocks)
    blocks = dct @ blocks @ dct.T / table(base, quality).to(blocks)
    first = blocks[..., 0, 0]
    change = torch.cat([first[:, :1], first[:, 1:] - first[:, :-1]], 1)
    return torch.cat([change[..., None], blocks.flatten(2)[..., 1:]], 2)


def estimated_bytes(images: Tensor, quality: int = QUALITY) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,): about the size of the JPEG (4:2:0), and smooth in every pixel."""
    r, g, b = (images * 255).unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    blue, red = (b - y) / 1.772, (r - y) / 1.402
    halves = [F.avg_pool2d(c[:, None], 2, ceil_mode=True)[:, 0] for c in (blue, red)]
    parts = [coefficients(y - 128, LUMINANCE, quality)]
    parts += [coefficients(c, CHROMINANCE, quality) for c in halves]
    bits = [torch.log2(1 + (c / KNEE).square()).flatten(1).sum(1) * SLOPE / 2 + BLOCK * c.shape[1] for c in parts]
    return HEADER + functools.reduce(torch.add, bits) / 8


class JPEG(Reward):
    """Minus the kilobytes (1000 bytes) of every image's JPEG. A black box: it has no gradient."""

    def __init__(self, quality: int = QUALITY) -> None:
        self.quality = quality
        self.facts = Facts("JPEG kB", -math.inf, 0.0, (-200.0, -5.0), differentiable=False, preprocessing="8 bits")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([-jpeg_bytes(i, self.quality) / 1000 for i in images], device=images.device)


class JPEGSurrogate(Reward):
    """Minus an estimate of the same kilobytes, which has a gradient."""

    def __init__(self, quality: int = QUALITY) -> None:
        self.quality = quality
        self.facts = Facts("JPEG kB (estimate)", -math.inf, 0.0, (-200.0, -5.0))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -estimated_bytes(images if images.dtype.itemsize > 2 else images.float(), self.quality) / 1000
