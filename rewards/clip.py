"""Scores by the cosine between an image and its prompt: CLIPScore (arXiv 2104.08718), HPSv2 (2306.09341),
PickScore (2305.01569).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Facts, Reward
from .half import place_of, through
from .preprocess import Preprocessing
from .text import cut


@dataclass(frozen=True)
class Encoder:
    """An image-text network with all that goes with it.

    network: `encode_image(pixels)` and `encode_text(ids)`, each -> (B, D); tokens: prompts -> ids (see `text.py`).
    """

    network: Any
    tokens: Callable[[Sequence[str]], Tensor]
    preprocessing: Preprocessing
    name: str = ""


class Similarity(Reward):
    """scale * cos(image, prompt), per image."""

    def __init__(self, encoder: Encoder, facts: Facts, scale: float) -> None:
        self.encoder, self.facts, self.scale = encoder, facts, scale
        self.modules = (encoder.network,)
        self._text: tuple[tuple, Tensor] | None = None

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        """(B, D), unit length. The last prompts' encoding is kept: a run asks for the same ones every time."""
        place = place_of(self.encoder.network)
        key = (tuple(prompts), place.device, place.dtype)
        if self._text is None or self._text[0] != key:
            # Normal tensors, whoever asks first: a score under inference mode, or a run that needs gradients.
            with torch.inference_mode(False), torch.no_grad():
                ids = self.encoder.tokens(prompts).to(place.device)
                text = self.encoder.network.encode_text(ids)
                self._text = key, F.normalize(text if text.dtype.itemsize > 2 else text.float(), dim=1).clone()
        return self._text[1]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.several(images, [prompts])[0]

    def several(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        text = self._encode_text([prompt for prompts in texts for prompt in prompts])
        pixels = self.encoder.preprocessing(images)
        embedding = F.normalize(through(self.encoder.network.encode_image, pixels, self.encoder.network), dim=1)
        return [self.scale * (embedding * of_one).sum(1) for of_one in text.unflatten(0, (len(texts), -1))]

    def notices(self, prompts: Sequence[str]) -> list[str]:
        return cut(prompts, self.encoder.tokens)


def clip_score(encoder: Encoder, typical: tuple[float, float] = (15.0, 35.0)) -> Similarity:
    """100 times the cosine (without the paper's factor 2.5 and its clamp at 0). typical: CLIP's, unless told."""
    facts = Facts("CLIPScore", -100.0, 100.0, typical, needs_prompt=True, preprocessing=words(encoder.preprocessing))
    return Similarity(encoder, facts, 100.0)


def hps(encoder: Encoder, version: str) -> Similarity:
    """The cosine. version: "v2" or "v2.1", whose scores do not compare."""
    facts = Facts(
        f"HPS{version}", -1.0, 1.0, (0.2, 0.35), needs_prompt=True, preprocessing=words(encoder.preprocessing)
    )
    return Similarity(encoder, facts, 1.0)


def pick_score(encoder: Encoder, logit_scale: float) -> Similarity:
    """exp(logit_scale) times the cosine; exp(logit_scale) is 100 in the released network."""
    scale = float(torch.tensor(logit_scale).exp())
    facts = Facts(
        "PickScore", -scale, scale, (18.0, 24.0), needs_prompt=True, preprocessing=words(encoder.preprocessing)
    )
    return Similarity(encoder, facts, scale)


def words(preprocessing: Preprocessing) -> str:
    return f"{preprocessing.fit.__name__.replace('_', ' ')}, bicubic, {preprocessing.size} px"
