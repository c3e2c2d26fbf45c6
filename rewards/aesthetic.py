"""The LAION aesthetic predictor v2: five linear layers, nothing between them, on a CLIP ViT-L/14 image embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Facts, Reward
from .clip import words
from .files import AESTHETIC_HEAD, WrongFile, require
from .half import place_of, through
from .preprocess import Preprocessing

LAYERS = (0, 2, 4, 6, 7)  # the released file keeps the numbers of the dropouts between them


class LinearHead(nn.Module):
    """(B, D) -> (B,)."""

    def __init__(self, weights: dict[str, Tensor], prefix: str = "layers.") -> None:
        super().__init__()
        self.width = weights[f"{prefix}{LAYERS[0]}.weight"].shape[1]
        parts = [(weights[f"{prefix}{i}.weight"], weights[f"{prefix}{i}.bias"]) for i in LAYERS]
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], device="meta") for w, _ in parts)
        for layer, (weight, bias) in zip(self.layers, parts, strict=True):
            layer.weight, layer.bias = (nn.Parameter(t.float(), requires_grad=False) for t in (weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


def head_of(state: dict[str, Tensor], file: str) -> LinearHead:
    node = "MIRA Load Aesthetic Reward"
    require(state, (AESTHETIC_HEAD,), file, node)
    for i in LAYERS:
        for name, sides in ((f"layers.{i}.weight", 2), (f"layers.{i}.bias", 1)):
            if name not in state or state[name].ndim != sides:
                raise WrongFile(f"{node}: {file} lacks {name}, or has it in another shape: use another file")
    head = LinearHead(state)
    sizes = [head.width, *(layer.out_features for layer in head.layers)]
    if sizes[-1] != 1 or sizes[:-1] != [layer.in_features for layer in head.layers]:
        raise WrongFile(f"{node}: {file} has layers of sizes {sizes}, which do not fit: use another file")
    return head


class Aesthetic(Reward):
    """1 to 10; above 9 an image is hacked, not beautiful.

    encode_image: pixels -> (B, D) by `network`; the embedding is normalised before the head sees it.
    """

    def __init__(
        self,
        head: LinearHead,
        network: nn.Module,
        encode_image: Callable[[Tensor], Tensor],
        preprocessing: Preprocessing,
    ) -> None:
        self.head, self.network, self.encode_image, self.preprocessing = head, network, encode_image, preprocessing
        self.modules = (network, head)
        self.facts = Facts("Aesthetic", 1.0, 10.0, (4.5, 6.5), preprocessing=words(preprocessing))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        embedding = through(self.encode_image, self.preprocessing(images), self.network)
        if embedding.shape[1] != self.head.width:
            raise ValueError(
                f"the aesthetic head reads embeddings of {self.head.width} numbers, but this CLIP makes "
                f"{embedding.shape[1]}: use CLIP ViT-L/14"
            )
        return self.head(F.normalize(embedding, dim=1).to(place_of(self.head)))
