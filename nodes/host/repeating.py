"""The same bits every time, as long as the device has a way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ...sampler.memory import NO_ENGINE

log = logging.getLogger("mira")
T = TypeVar("T")


@contextmanager
def repeatable(wanted: bool = True) -> Iterator[None]:
    """The same bits every time, on a GPU too. An operation that cannot raises RuntimeError (`has_no_repeatable_way`);
    then `give_up_repeating` is for the rest. Not wanted, it only sees to it that this ends here.

    It also wants CUBLAS_WORKSPACE_CONFIG in the environment before CUDA starts, which the pack's `__init__` sees to.
    """
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory  # nothing here reads what it has not written
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    choices = cudnn.deterministic, cudnn.benchmark
    try:
        if wanted:
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False
            cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark = choices


def give_up_repeating() -> None:
    """Until `repeatable` ends."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def has_no_repeatable_way(problem: BaseException) -> bool:
    return isinstance(problem, RuntimeError) and "deterministic" in str(problem)


def has_no_engine(problem: BaseException) -> bool:
    """Of cuDNN's, none fits into a full card; or none repeats, which it tells in the same words."""
    return any(w in str(problem).lower() for w in NO_ENGINE)


class Repeating:
    """Work outside of a run that is the same bits every time, as long as the device has a way: else that is logged."""

    def __init__(self, node: str) -> None:
        self.node, self.possible = node, True

    def __call__(self, device: torch.device, work: Callable[[], T]) -> T:
        if self.possible and device.type == "cuda":
            try:
                with repeatable():
                    return work()
            except RuntimeError as problem:
                if not self.gives_up(problem):
                    raise
        return work()

    def gives_up(self, problem: BaseException) -> bool:
        """Whether it goes on without, from now on: nothing else than that may mend this."""
        if not self.possible or not (has_no_repeatable_way(problem) or has_no_engine(problem)):
            return False
        self.possible = False
        said = str(problem).splitlines()[0]
        log.warning("%s: does not repeat to the bit on this device: %s", self.node, said)
        return True
