"""What a backward pass will need, and how to live with less of it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def out_of_memory(problem: BaseException) -> bool:
    """CUDA has an exception of its own; the CPU's and Apple's allocators raise a plain RuntimeError."""
    if isinstance(problem, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "out of memory")
    return isinstance(problem, RuntimeError) and any(w in str(problem) for w in words)


def give_back() -> None:
    """Hand what nobody uses any more back to the device, before something is tried again with less.

    To be called after the `except` block of what failed: an exception that is being handled holds its frames, and
    they hold every activation.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class _Enough(Exception):
    """More than was asked about."""


def saved_bytes(fn: Callable[[Tensor], object], x: Tensor, most: float = math.inf) -> float:
    """Bytes that autograd keeps for the backward pass of fn(x), each storage once, leaves (weights) left out.

    Above `most` it stops there, with fn half-way, and gives infinity: a card that cannot hold it need not try.
    """
    # Storages, which have no history: a hook that keeps tensors which have one is a cycle through C++ that no
    # collector sees. Held until the end, so that no address counts twice.
    storages: dict[int, torch.UntypedStorage] = {}
    total = 0

    def pack(t: Tensor) -> None:
        nonlocal total
        if isinstance(t, torch.nn.Parameter):
            return
        storage = t.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage
            total += storage.nbytes()
            if total > most:
                raise _Enough

    try:
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda nothing: nothing):
            fn(x.detach().requires_grad_())
    except _Enough:
        return math.inf
    finally:
        storages.clear()
    return total


def offloaded() -> AbstractContextManager:
    """Within, what autograd keeps waits in the CPU's memory. Weights stay where they are."""

    def pack(t: Tensor):
        # Bare tensors, as in `saved_bytes`. torch's own `save_on_cpu` returns a CPU tensor as it is, with its history.
        return t if isinstance(t, torch.nn.Parameter) else (t.device, t.detach().cpu())

    def unpack(packed) -> Tensor:
        if isinstance(packed, torch.nn.Parameter):
            return packed
        device, t = packed
        return t.to(device)

    return saved_tensors_hooks(pack, unpack)
