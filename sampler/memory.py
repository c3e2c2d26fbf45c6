"""What a backward pass will need, and how to live with less of it."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

NO_ENGINE = ("unable to find an engine", "valid cudnn algorithm")  # of cuDNN
FULL = (
    "out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "allocation_failed",
    "cublas_status_not_init", "cudnn_status_not_init", "out_of_device_memory", "invalid buffer size",
    "not enough gpu video memory", "out_of_memory", "memoryallocation", "out_of_resources",
    "vram grow failed", "vram reservation failed", *NO_ENGINE,
)  # fmt: skip


DIFFERS = "a recomputation that differs (a reward or a node that counts or draws by itself? Set memory to none)"


def differs(problem: BaseException) -> bool:
    """Whether a part that is computed again for its backward came out otherwise."""
    return isinstance(problem, CheckpointError)


def out_of_memory(problem: BaseException) -> bool:
    """CUDA has an exception of its own; other allocators, cuBLAS and cuDNN raise a plain RuntimeError.

    cuDNN on a full card finds no engine, or no algorithm, that would do with the room that is left.
    A checkpoint whose recomputation differs counts too: a host's own fallback, which took less memory, may be why.
    """
    if differs(problem) or isinstance(problem, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(problem, RuntimeError) and any(w in str(problem).lower() for w in FULL)


_given_back = 0


def times_given_back() -> int:
    """How often memory has run out in this process: `give_back` was called so often."""
    return _given_back


def give_back() -> None:
    """Hand what nobody uses any more back to the device, before something is tried again with less.

    To be called after the `except` block of what failed: an exception that is being handled holds its frames, and
    they hold every activation.
    """
    global _given_back
    _given_back += 1
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # what has failed may be reported once more
            torch.cuda.empty_cache()
            _unlock()


def unlock() -> None:
    """At the end of a run: hand page-locked memory that nobody uses any more back, which PyTorch keeps for the
    process's life. In the next run there may be more of it than this one got.
    """
    _unlock()
    _locked.most = _most()


def _unlock() -> None:
    if torch.cuda.is_initialized() and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
    _locked.held = +_locked.used


class _Enough(BaseException):
    """More than was asked about. No Exception: code of the user's, which is measured too, may catch those."""


def _is_weight(t: Tensor) -> bool:
    """A parameter, or a view of one: a linear layer saves its transposed weight."""
    return isinstance(t if t._base is None else t._base, torch.nn.Parameter)


def saved_bytes(fn: Callable[[Tensor], object], x: Tensor, most: float = math.inf) -> float:
    """Bytes that autograd keeps for the backward pass of fn(x), each storage once, leaves (weights) left out.

    Above `most` it stops there, with fn half-way, and gives infinity: a card that cannot hold it need not try.
    """
    # Storages, which have no history: a hook that keeps tensors which have one is a cycle through C++ that no
    # collector sees. Held until the end, so that no address counts twice.
    storages: dict[int, torch.UntypedStorage] = {}
    total = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        if _is_weight(t):
            return t
        storage = t.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage
            total += storage.nbytes()
            if total > most:
                raise _Enough
        return t.detach()  # bare too, and there: guidance may take a gradient of its own inside fn

    try:
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda t: t):
            fn(x.detach().requires_grad_())
    except _Enough:
        return math.inf
    finally:
        storages.clear()
    return total


LOCKED = 8 * 2**30  # bytes at most
# Where a container's own limit is, by the system's newer and older way; "max": none.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def _most() -> int:
    """How much memory may be locked: what is, is nobody else's."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # not on Windows
        return LOCKED // 2
    for limit in LIMITS:
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(limit.read_text()))
    return min(LOCKED, min(sizes) // 4)


class _PageLocked:
    """Copies of a card's tensors in page-locked memory, which it reaches several times as fast as other memory, as
    long as they are few enough, and the system allows them.

    PyTorch locks powers of two, and keeps what is freed for others of the same size, until `_unlock`.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used: Counter[int] = Counter()  # by size, how many copies there are ...
        self.held: Counter[int] = Counter()  # ... and how many PyTorch has locked memory for

    def take(self, size: int) -> bool:
        """Whether there is room for one more of so many bytes, which counts from now on."""
        if self.used[size] >= self.held[size]:
            if self._bytes() + size > self.most and self.used != self.held:
                _unlock()
            if self._bytes() + size > self.most:
                return False
        self.used[size] += 1
        self.held[size] = max(self.held[size], self.used[size])
        return True

    def give(self, size: int) -> None:
        self.used[size] -= 1

    def copy(self, t: Tensor) -> Tensor | None:
        size = 1 << max(0, t.numel() * t.element_size() - 1).bit_length()
        if not t.is_cuda or not self.take(size):
            return None
        try:
            there = torch.empty_like(t, device="cpu", pin_memory=True)
        except RuntimeError:  # no more of it may be locked: what is, does; a fast way less, not a fault
            self.give(size)
            self.held[size] = self.used[size]
            self.most = self._bytes()
            return None
        weakref.finalize(there, self.give, size).atexit = False
        return there.copy_(t, non_blocking=True)  # in the stream's order, as is every use of either

    def _bytes(self) -> int:
        return sum(size * count for size, count in self.held.items())


_locked = _PageLocked(_most())


def offloaded() -> AbstractContextManager:
    """Within, what autograd keeps waits in the CPU's memory. Weights stay where they are."""

    def on_cpu(t: Tensor) -> Tensor:
        fast = _locked.copy(t)
        return t.cpu() if fast is None else fast

    def pack(t: Tensor) -> Any:
        # Bare tensors, as in `saved_bytes`. torch's own `save_on_cpu` returns a CPU tensor as it is, with its history.
        return t if _is_weight(t) else (t.device, on_cpu(t.detach()))

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, t = packed
        return t.to(device, non_blocking=t.is_pinned())

    return saved_tensors_hooks(pack, unpack)
