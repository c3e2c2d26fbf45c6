"""For the tests' servers. Small Model: outputs as MIRA Demo Model's, of networks that take a sixth of the time. Small
Family: a checkpoint of one of the families of testing/families.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def know_the_pack_as_the_tests_do() -> None:
    """As `mira`, of the modules that ComfyUI has loaded under a name of its own: not a second time."""
    if "mira" in sys.modules:
        return
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
        know_the_pack_as_the_tests_do()
        from testing.networks import SMALL, demo, random_unet, thin_vae

        with torch.random.fork_rng():  # weights are drawn, and what runs after a loader is to find no seed
            model = random_unet(SMALL, torch.float32)
        return model, demo.load_clip(), thin_vae()


class SmallFamily:
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"name": ("STRING", {})}}

    def load(self, name: str) -> tuple:
        know_the_pack_as_the_tests_do()
        from testing.families import FAMILIES, Clip, make

        with torch.random.fork_rng():
            model, vae, *_ = make(name)
        return model, Clip(FAMILIES[name]), vae


NODE_CLASS_MAPPINGS = {"SmallModel": SmallModel, "SmallFamily": SmallFamily}
