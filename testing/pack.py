"""The pack as the package `mira`, as ComfyUI imports it: its modules are relative to one another."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def mira(module: str):
    """A module of the pack, for example `mira("sampler.rollout")`."""
    if "mira" not in sys.modules:
        pack = types.ModuleType("mira")
        pack.__path__ = [str(ROOT)]
        sys.modules["mira"] = pack
    return importlib.import_module(f"mira.{module}")


def with_comfyui(sdpa: bool = False) -> None:
    """Put the ComfyUI that `dev.py` chose on the path, on the CPU unless --gpu was given.

    sdpa: plain samples use PyTorch's attention too, as optimised ones always do, so that their times compare.
    $MIRA_DYNAMIC: dynamic VRAM, which ComfyUI's main.py turns on where there is an NVIDIA card.
    """
    if "comfy.cli_args" in sys.modules:
        return
    sys.path.insert(0, os.environ["MIRA_COMFYUI"])
    dynamic = bool(os.environ.get("MIRA_DYNAMIC"))
    if dynamic:
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.cli_args

    comfy.cli_args.args.use_pytorch_cross_attention = sdpa
    comfy.cli_args.args.cpu = not (os.environ.get("MIRA_GPU") and torch.cuda.is_available())
    import utils.extra_config  # noqa: F401  (as main.py does: later, `utils` would be another module)

    if dynamic:
        import comfy.memory_management
        import comfy.model_management
        import comfy.model_patcher

        if not comfy_aimdo.control.init_devices(d.index for d in comfy.model_management.get_all_torch_devices()):
            raise RuntimeError("comfy-aimdo finds no card")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


@contextmanager
def weights_at_once() -> Iterator[None]:
    """Networks that are made within have weights at once: in dynamic VRAM ComfyUI's layers wait for a file's."""
    memory = sys.modules.get("comfy.memory_management")  # absent in older ones
    dynamic = getattr(memory, "aimdo_enabled", False)
    if dynamic:
        memory.aimdo_enabled = False
    try:
        yield
    finally:
        if dynamic:
            memory.aimdo_enabled = True


def as_node(node, unique_id: str = "1"):
    """A node's class as the executor makes it: of its hidden inputs in older cores, of a dict with them in newer."""
    from comfy_api.latest import io

    hidden = {io.Hidden.unique_id: unique_id}
    return node.PREPARE_CLASS_CLONE({**hidden, "hidden_inputs": hidden})
