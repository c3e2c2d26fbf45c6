"""What keeps a gradient alive inside ComfyUI: inference mode, weights, attention, in-place sums, block checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# Layers that are worth a checkpoint of their own, by class name.
BLOCKS = {
    "ResBlock",  # UNets
    "BasicTransformerBlock",
    "JointBlock",  # SD3
    "DoubleStreamBlock",  # Flux, Chroma
    "SingleStreamBlock",
    "MMDiTBlock",  # AuraFlow
    "DiTBlock",
    "PixArtMSBlock",
    "HunYuanDiTBlock",
    "HiDreamImageBlock",
    "JointTransformerBlock",  # Lumina2, Z-Image
    "OmniGen2TransformerBlock",
    "QwenImageTransformerBlock",
    "ResidualAttentionBlock",  # open_clip
    "CLIPLayer",  # ComfyUI's CLIP vision
    "BlipEncoderLayer",
    "BlipTextLayer",
    "SiglipEncoderLayer",
}


def normal(value):
    """A copy, outside inference mode, of every tensor in nested lists, tuples and dicts; the rest as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: normal(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(normal(v) for v in value)
    return value


def made_in_inference_mode(t: Tensor) -> bool:
    # `is_inference()` forgets after `.to(dtype)`; the version counter is what autograd will ask for.
    try:
        t._version  # noqa: B018
    except RuntimeError:
        return True
    return False


def leave_inference_mode(module: nn.Module) -> None:
    """Re-register every weight and buffer that was made in inference mode: autograd cannot save those."""
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None and made_in_inference_mode(p):
                child._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)
        for name, b in child._buffers.items():
            if b is not None and made_in_inference_mode(b):
                child._buffers[name] = b.detach().clone()


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
def loaded(patchers: Sequence, memory: float) -> Iterator[None]:
    """ComfyUI's patchers on the device in one call (several could evict one another), with what a gradient needs.

    memory: bytes that the work within will take beside the weights.
    """
    comfy.model_management.load_models_gpu(list(patchers), memory_required=memory, force_full_load=True)
    modules = [patcher.model for patcher in patchers]
    for module in modules:
        leave_inference_mode(module)
    with frozen(modules):
        yield


def static(patcher):
    """Newer cores move weights while a model runs, which backward does not survive: a clone that stays put."""
    if "disable_dynamic" in inspect.signature(patcher.clone).parameters:
        return patcher.clone(disable_dynamic=True)
    return patcher


@contextmanager
def training() -> Iterator[None]:
    """Newer cores have kernels without a backward, and a switch that turns them off."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


class OutOfPlaceAdd(TorchFunctionMode):
    """x += y makes a new tensor: in-place residuals (Flux family) overwrite what backward needs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.add_ and torch.is_grad_enabled():
            return torch.add(*args, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def sdpa(_, *args, **kwargs):
    """PyTorch's attention: sage, flash, sub-quadratic and split have no backward, or change with free memory."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def blocks_checkpointed(root: nn.Module, place: Callable) -> Callable | None:
    """A context within which the blocks of `root` checkpoint themselves, or None where it has no known ones.

    place: the context of each block's forward; it must be there again when the block is recomputed in backward.
    """
    found = {name: m for name, m in root.named_modules() if type(m).__name__ in BLOCKS}
    # Outermost only: a block within a block would not be wrapped any more when the outer one is recomputed.
    blocks = [m for name, m in found.items() if not any(name.startswith(f"{outer}.") for outer in found)]
    if not blocks:
        return None

    @contextmanager
    def patched() -> Iterator[None]:
        def wrap(forward):
            def inside(*args, **kwargs):
                with place():
                    return forward(*args, **kwargs)

            def run(*args, **kwargs):
                if not torch.is_grad_enabled():
                    return forward(*args, **kwargs)
                return checkpoint(inside, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

            return run

        for block in blocks:
            block.forward = wrap(block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    return patched
