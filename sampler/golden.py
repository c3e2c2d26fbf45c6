"""A network that turns noise into noise that suits the prompt better: Golden Noise (arXiv 2411.09502, its NPNet).

The published weights are for SDXL's latents at 1024 px and its 77 x 2048 prompt features; sizes are read off a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SWIN_SIDE, SWIN_HEAD = 224, 32  # of the Swin transformer: its input, and the width of an attention head
PARTS = ("unet_svd", "unet_embedding", "alpha", "beta")
TEXT = ("embeeding", "embedding")  # the published files spell it the first way


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Singular(nn.Module):
    """Moves the singular values of the noise, whose four channels are laid out as one square."""

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        width = 2 * side

        def two(middle: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, middle), nn.ReLU(), nn.Linear(middle, width))

        self.mlp1, self.mlp2, self.mlp3 = two(64), two(64), nn.Sequential(nn.Linear(width, width))
        self.attention, self.mlp4 = _Attention(width), two(hidden)
        self.bn = nn.BatchNorm2d(width)  # in the files, and never used

    def forward(self, noise: Tensor) -> Tensor:
        square = noise.unflatten(1, (2, 2)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)  # (a h) x (c w)
        u, s, v = torch.linalg.svd(square)
        told = self.mlp1(u.mT) + self.mlp2(v) + self.mlp3(s)[:, None]
        moved = u @ torch.diag_embed(self.mlp4(self.attention(told).mean(1)) + s) @ v
        side = noise.shape[-1]
        return moved.unflatten(2, (2, side)).unflatten(1, (2, side)).permute(0, 1, 3, 2, 4).flatten(1, 2)


class _Swin(nn.Module):
    """A Swin transformer's last features, whose 7 x 7 x width the authors read as 7 channels of 7 x width."""

    def __init__(self, width: int, depths: tuple[int, ...], classes: int) -> None:
        from timm.models.swin_transformer import SwinTransformer  # comes with open_clip

        super().__init__()
        self.upconv, self.downconv = nn.Conv2d(7, 4, 1), nn.Conv2d(4, 3, 1)
        heads = tuple(width * 2**i // SWIN_HEAD for i in range(len(depths)))
        self.swin = SwinTransformer(
            img_size=SWIN_SIDE, window_size=7, embed_dim=width, depths=depths, num_heads=heads, num_classes=classes
        )

    def forward(self, noise: Tensor) -> Tensor:
        features = self.swin.forward_features(self.downconv(F.interpolate(noise, [SWIN_SIDE] * 2)))
        return self.upconv(F.interpolate(features, noise.shape[-2:]))


class GoldenNoise(nn.Module):
    """side: of the latents. features: of the whole prompt, tokens times width."""

    def __init__(
        self, side: int, features: int, hidden: int, width: int, depths: tuple[int, ...], classes: int
    ) -> None:
        super().__init__()
        self.side, self.features = side, features
        self.unet_svd, self.unet_embedding = _Singular(side, hidden), _Swin(width, depths, classes)
        self.text = nn.ModuleDict({"linear": nn.Linear(features, 8)})
        self.alpha, self.beta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, noise: Tensor, prompt: Tensor) -> Tensor:
        """noise (B, 4, side, side), prompt (B, tokens, width) -> noise of the same shape.

        Raises ValueError for latents and prompts of another size than the network was trained for.
        """
        if noise.shape[1:] != (4, self.side, self.side):
            raise ValueError(
                f"golden noise was trained for latents of 4 x {self.side} x {self.side} ({8 * self.side} px), not "
                f"{' x '.join(map(str, noise.shape[1:]))}: use that size"
            )
        if prompt[0].numel() != self.features:
            raise ValueError(
                f"golden noise was trained for prompts of {self.features} features (77 tokens of "
                f"{self.features // 77}), not {' x '.join(map(str, prompt.shape[1:]))}: use its model's text encoders, "
                "and a prompt of up to 75 tokens"
            )
        scale, shift = self.text["linear"](prompt.flatten(1))[:, :, None, None].chunk(2, 1)
        text = F.group_norm(noise, 1, eps=1e-6) * (1 + scale) + shift
        return (
            self.unet_svd(noise)
            + (2 * torch.sigmoid(self.alpha) - 1) * text
            + self.beta * self.unet_embedding(noise + text)
        )


def load(path: Path) -> GoldenNoise:
    """The network of a published file; nothing in the file is run. Raises ValueError for any other file."""
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # pickle raises many kinds for what is none, with advice to run what is in it
        raise ValueError(
            f"{path.name} cannot be read as weights, or needs more than those (nothing in a file is run): take the one "
            "that was published"
        ) from None
    text = next((name for name in TEXT if isinstance(parts, Mapping) and name in parts), None)
    if text is None or any(name not in parts for name in PARTS):
        raise ValueError(f"{path.name} is no golden noise network: it needs {', '.join(PARTS)} and {TEXT[0]}")
    try:
        return _of(parts, parts[text])
    except (LookupError, ArithmeticError, AttributeError, TypeError, RuntimeError, ValueError) as problem:
        raise ValueError(f"{path.name} is damaged, or of another version: {problem}") from None


def _of(parts: Mapping[str, Any], text: Mapping[str, Tensor]) -> GoldenNoise:
    svd, swin = dict(parts["unet_svd"]), dict(parts["unet_embedding"])
    # Tables that follow from the sizes: old versions of timm kept them in the file.
    swin = {k: v for k, v in swin.items() if not k.endswith(("relative_position_index", "attn_mask"))}
    blocks = [re.match(r"swin\.layers\.(\d+)\.blocks\.(\d+)\.", name) for name in swin]
    found = {(int(m[1]), int(m[2])) for m in blocks if m}
    depths = tuple(sum(layer == i for layer, _ in found) for i in range(1 + max(layer for layer, _ in found)))
    network = GoldenNoise(
        side=svd["mlp3.0.weight"].shape[0] // 2,
        features=text["linear.weight"].shape[1],
        hidden=svd["mlp4.0.weight"].shape[0],
        width=swin["swin.patch_embed.proj.weight"].shape[0],
        depths=depths,
        classes=swin["swin.head.fc.weight"].shape[0],
    )
    state = {f"unet_svd.{k}": v for k, v in svd.items()} | {f"unet_embedding.{k}": v for k, v in swin.items()}
    state |= {f"text.{k}": v for k, v in text.items()}
    state |= {name: torch.as_tensor(parts[name]).detach().reshape(1) for name in ("alpha", "beta")}
    own = {k: v for k, v in network.state_dict().items() if k.endswith(("relative_position_index", "attn_mask"))}
    network.load_state_dict(state | own)
    return network.float().eval().requires_grad_(False)
