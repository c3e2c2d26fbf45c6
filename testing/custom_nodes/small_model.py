"""Small Model, for the tests' servers: outputs as MIRA Demo Model's, of networks that take a sixth of the time."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def know_the_pack_as_the_tests_do() -> None:
    """As `mira`, of the modules that ComfyUI has loaded under a name of its own: not a second time."""
    (demo,) = (name for name in sys.modules if name.endswith("mira.nodes.demo"))
    pack = demo.removesuffix(".nodes.demo")
    for name in [name for name in sys.modules if name == pack or name.startswith(f"{pack}.")]:
        sys.modules["mira" + name.removeprefix(pack)] = sys.modules[name]
    sys.path.append(str(ROOT))


class SmallModel:
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {}

    def load(self) -> tuple:
        if "mira" not in sys.modules:
            know_the_pack_as_the_tests_do()
        from testing.networks import SMALL, demo, random_unet, thin_vae

        with torch.random.fork_rng():  # weights are drawn, and what runs after a loader is to find no seed
            model = random_unet(SMALL, torch.float32)
        return model, demo.load_clip(), thin_vae()


NODE_CLASS_MAPPINGS = {"SmallModel": SmallModel}
