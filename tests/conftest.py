"""The pack as the package `mira`, and ComfyUI from $MIRA_COMFYUI (set by `dev.py test`)."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = os.environ.get("MIRA_COMFYUI")

pack = types.ModuleType("mira")
pack.__path__ = [str(ROOT)]
sys.modules["mira"] = pack

if COMFYUI:
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import utils.extra_config  # noqa: F401  (as main.py does: later, `utils` would be another module)

collect_ignore_glob = [] if COMFYUI else ["comfy/*", "server/*"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
