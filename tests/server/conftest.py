"""One real ComfyUI with the pack in it for all who need no folder of their own."""

from __future__ import annotations

import shutil

import pytest
import small
import torch
from safetensors.torch import save_file

from tools.comfy import ROOT, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """With what a user has in a models folder: the demo's LoRA as `bright.safetensors`, and files of rewards."""
    folder = tmp_path_factory.mktemp("models")
    loras, rewards = folder / "loras", folder / "rewards"
    loras.mkdir(), rewards.mkdir()
    shutil.copy(ROOT / "demo" / "weights" / "bright_lora.safetensors", loras / "bright.safetensors")
    torch.save({"state_dict": small.fill(small.open_clip_network().state_dict())}, rewards / "HPS_v2.1_compressed.pt")
    save_file({"x": torch.zeros(1)}, rewards / "other.safetensors")
    shutil.copy(ROOT / "docs" / "examples" / "warmth.py", rewards)
    (rewards / "broken.py").write_text(
        'FACTS = {"name": "b", "typical": (0, 1)}\n\ndef score(images, prompts):\n    return 1 / 0\n'
    )
    config = folder / "paths.yaml"
    config.write_text(f"mine:\n    base_path: {folder}\n    loras: loras\n    mira_rewards: rewards\n")
    with Server(arguments=("--extra-model-paths-config", config)) as server:
        yield server
