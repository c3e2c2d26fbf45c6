"""CLIPScore: 100 times the cosine between an image and its prompt (arXiv 2104.08718, without its factor 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Facts, Reward


def preprocess(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bicubic, antialiased resize of the shorter side to `size`, centre crop, normalisation; differentiable.

    images (B, 3, H, W) in [0, 1]; values beyond the range pass through, so that saturated pixels keep a gradient.
    """
    height, width = images.shape[-2:]
    # Sizes and offsets are rounded as torchvision rounds them: the reference pipelines are made of it.
    shape = tuple(size * side // min(height, width) for side in (height, width))
    images = F.interpolate(images, size=shape, mode="bicubic", antialias=True, align_corners=False)
    top, left = (round((side - size) / 2) for side in shape)
    images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (mean, std))
    return (images - mean) / std


class CLIPScore(Reward):
    """clip: a module with open_clip's `encode_image` and `encode_text`; tokenize: prompts -> (B, context) ids."""

    def __init__(
        self,
        clip: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "CLIPScore",
    ):
        self.facts = Facts(name, -100.0, 100.0, (15.0, 80.0), needs_prompt=True)
        self.clip, self.tokenize = clip, tokenize
        self.size, self.mean, self.std = size, mean, std
        self.modules = (clip,)
        self._text: tuple[tuple, Tensor] | None = None

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        """(B, D), unit length. The last prompts' encoding is kept: a run asks for the same ones every time."""
        parameter = next(self.clip.parameters())
        key = (tuple(prompts), parameter.device, parameter.dtype)
        if self._text is None or self._text[0] != key:
            with torch.no_grad():
                ids = self.tokenize(list(prompts)).to(parameter.device)
                self._text = key, F.normalize(self.clip.encode_text(ids).float(), dim=1).clone()
        return self._text[1]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        text = self._encode_text(prompts)
        pixels = preprocess(images.float(), self.size, self.mean, self.std)
        parameter = next(self.clip.parameters())
        embedding = self.clip.encode_image(pixels.to(parameter)).float()
        return 100 * (F.normalize(embedding, dim=1) * text).sum(1)
