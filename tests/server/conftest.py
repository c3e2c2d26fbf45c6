"""One real ComfyUI with the pack in it for all who need no folder of their own."""

from __future__ import annotations

import shutil

import pytest

from testing.servers import WITH_SMALL_MODEL
from tools.comfy import ROOT, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """With Small Model, and the demo's LoRA, `bright.safetensors`, where Load LoRA finds it."""
    folder = tmp_path_factory.mktemp("loras")
    shutil.copy(ROOT / "demo" / "weights" / "bright_lora.safetensors", folder / "bright.safetensors")
    config = folder / "paths.yaml"
    config.write_text(f"mine:\n    base_path: {folder.parent}\n    loras: {folder.name}\n")
    with Server(arguments=("--extra-model-paths-config", str(config), *WITH_SMALL_MODEL)) as server:
        yield server
