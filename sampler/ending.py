"""How a run ends before its time, and what it may still do: written once, for every loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .memory import give_back, out_of_memory

T = TypeVar("T")
Interrupts = tuple[type[BaseException], ...]


@dataclass
class Cut:
    """What cut an attempt short. problem: the exception, without its frames, which hold every activation."""

    problem: BaseException
    memory: bool

    def __str__(self) -> str:
        return "out of memory" if self.memory else "interrupted"


def attempt(interrupts: Interrupts, work: Callable[..., T], *args) -> tuple[T | None, Cut | None]:
    """(work(*args), None), or (None, what cut it short): an exception of `interrupts`, or running out of memory.

    When it returns, nothing of a failed attempt is alive, so that a thriftier one finds the memory free: inside an
    `except` block it would not be. Other exceptions go through.
    """
    try:
        return work(*args), None
    except interrupts as problem:
        cut = Cut(problem, memory=False)
    except RuntimeError as problem:
        if not out_of_memory(problem):
            raise
        cut = Cut(problem, memory=True)
    cut.problem.__traceback__ = cut.problem.__context__ = cut.problem.__cause__ = None
    if cut.memory:
        give_back()
    return None, cut
