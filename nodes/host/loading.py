"""What lies on the device: models through ComfyUI's memory management, with what a gradient needs of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import psutil
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from .dynamic import is_dynamic
from .inference_mode import leave_inference_mode

EVERYTHING = 1e30  # bytes, more than any device has


class WholePatcher(ModelPatcher):
    """Of a network that is on the device whole or not at all: a part that ComfyUI leaves behind comes when it is used
    in ComfyUI's own layers, and nowhere else.
    """

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *args: Any, **kwargs: Any) -> int:
        return super().partially_load(device_to, EVERYTHING, *args, **kwargs)

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        return 0  # ComfyUI then takes it away whole


def patcher_of(module: nn.Module) -> ModelPatcher:
    """One ModelPatcher per reward network, kept on it, so that ComfyUI's memory management knows it."""
    if not hasattr(module, "mira_patcher"):
        management = comfy.model_management
        module.mira_patcher = WholePatcher(
            module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )
    return module.mira_patcher


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, no weight asks for a gradient: only the noises do, and no activation is kept for the weights."""
    asking = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


@contextmanager
def _uncollected() -> Iterator[None]:
    """While ComfyUI walks its list of loaded models: a network that is collected meanwhile takes its entry along."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def load(patchers: Sequence, memory: float = 0, least: float | None = None, beside: Sequence = ()) -> None:
    """Onto the device by ComfyUI, in one call: several could evict one another.

    memory: bytes that are wanted beside the weights, for which other models make room. least: bytes for which weights
    would stay behind, to come when they are used; None: all of them come. beside: patchers for which those stay behind
    too: where it places them, ComfyUI knows nothing of what is to come after.
    """
    rest = sum(p.model_size() - p.loaded_size() for p in beside)
    management = comfy.model_management
    # A weight that is moved outside inference mode is one that no stock node can use any more, and making room moves
    # those of other models too.
    with torch.inference_mode(), _uncollected():
        if least is None:
            management.load_models_gpu([*patchers, *beside], memory_required=memory, force_full_load=True)
        else:
            least = max(least, management.minimum_inference_memory()) + rest
            management.load_models_gpu(list(patchers), memory_required=memory + rest, minimum_memory_required=least)
            device = patchers[0].load_device
            # Older hosts, and dynamic VRAM, leave what is on the card already as large as it is.
            if device.type != "cpu" and management.get_free_memory(device) < least:
                management.free_memory(least, device)
            there = management.current_loaded_models
            placed = loaded_of(patchers)
            there[:] = [m for m in there if m not in placed]  # from which it would take the room, though there is some
            try:
                management.load_models_gpu(list(beside), minimum_memory_required=0)
            finally:
                there.extend(placed)


def loaded_of(patchers: Sequence) -> list:
    """ComfyUI's entries of these and of what their patches bring along."""
    wanted = [m for p in patchers for m in (p, *p.model_patches_models())]
    return [m for m in comfy.model_management.current_loaded_models if any(m.model is p for p in wanted)]


def unload_all_but(patchers: Sequence, device: torch.device) -> None:
    """Every other model leaves the device."""
    with torch.inference_mode(), _uncollected():  # as in `load`
        comfy.model_management.free_memory(EVERYTHING, device, keep_loaded=loaded_of(patchers))


@contextmanager
def loaded(patchers: Sequence, memory: float, least: float | None = None, beside: Sequence = ()) -> Iterator[None]:
    """ComfyUI's patchers on the device, with what a gradient needs of them.

    memory, least, beside: see `load`. With a `least` there is no gradient: weights may stay behind as in ComfyUI's own
    sampling, which keeps what lies where of those: none is replaced.
    """
    gradient = least is None
    for patcher in {m for p in [*patchers, *beside] for m in (p, *p.model_patches_models())}:
        if gradient and is_dynamic(patcher):
            raise RuntimeError(
                f"{type(patcher.model).__name__}: its weights are in dynamic VRAM, which no gradient survives: start "
                "ComfyUI with --disable-dynamic-vram"
            )
    load(patchers, memory, least, beside)
    patchers = [*patchers, *beside]
    modules = [patcher.model for patcher in patchers]
    if gradient:
        management = comfy.model_management
        # A full load is none there. Other packs leave weights elsewhere too, and bring them themselves.
        for patcher in patchers if management.vram_state == management.VRAMState.NO_VRAM else ():
            if any(p.device.type != patcher.load_device.type for p in patcher.model.parameters()):
                raise RuntimeError(
                    f"{type(patcher.model).__name__}: ComfyUI has left weights in the CPU's memory, and a gradient "
                    "needs all of them on the card: start ComfyUI without --novram"
                )
        with torch.inference_mode(False):
            for module in modules:
                leave_inference_mode(module)
    with frozen(modules):
        yield


def free_bytes() -> float:
    device = comfy.model_management.get_torch_device()
    return comfy.model_management.get_free_memory(device)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def used_bytes() -> float:
    """Peak memory of the GPU, or this process's resident memory on a CPU."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
