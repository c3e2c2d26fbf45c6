"""What a backward pass will need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def out_of_memory(problem: BaseException) -> bool:
    """CUDA has an exception of its own; the CPU's and Apple's allocators raise a plain RuntimeError."""
    if isinstance(problem, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "out of memory")
    return isinstance(problem, RuntimeError) and any(w in str(problem) for w in words)


def saved_bytes(fn: Callable[[Tensor], object], x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of fn(x), each storage once, leaves (weights) left out."""
    storages: dict[int, int] = {}
    kept = []  # holds the tensors, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            storage = t.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn(x.detach().requires_grad_())
    return sum(storages.values())
