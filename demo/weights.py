"""Where the demo's weights are, and how they are read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "weights"


def load(name: str) -> dict[str, torch.Tensor]:
    """`unet`, `vae`, `clip`, `judge` or `taste`, in float32."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"the demo model's file {path} is missing: reinstall the pack, or train it again as demo/MODEL_CARD.md says"
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
