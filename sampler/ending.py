"""How a run ends before its time, and what it may still do: written once, for every loop."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from .memory import DIFFERS, differs, give_back, out_of_memory

log = logging.getLogger("mira")
T = TypeVar("T")
LOGGED = "mira_logged"  # on an exception
Interrupts = tuple[type[BaseException], ...]


@dataclass
class Cut:
    """What cut an attempt short. problem: the exception, whose frames, where it has any, hold no activations."""

    problem: BaseException
    memory: bool = False
    failed: bool = False

    @property
    def interrupted(self) -> bool:
        return not (self.memory or self.failed)

    def __str__(self) -> str:
        if self.failed:
            said = str(self.problem).splitlines() or [""]
            return f"error ({type(self.problem).__name__}: {said[0][:200]})"
        if self.memory:
            return DIFFERS if differs(self.problem) else "out of memory"
        return "interrupted"


def attempt(interrupts: Interrupts, work: Callable[..., T], *args: Any) -> tuple[T, Cut | None]:
    """(work(*args), None), or (nothing to be read, what cut it short): an exception of `interrupts`, running out of
    memory, or any other error, which is logged with where it came from: a loop that has an image hands it back,
    whatever happens.

    When it returns, nothing of a failed attempt is alive, so that a thriftier one finds the memory free: inside an
    `except` block it would not be.
    """
    try:
        return work(*args), None
    except interrupts as problem:
        cut = Cut(problem)
    except Exception as problem:
        cut = Cut(problem, memory=out_of_memory(problem))
        cut.failed = not cut.memory
    return cast(T, None), _let_go(cut)


def within_memory(work: Callable[..., T], *args: Any) -> tuple[T, Cut | None]:
    """As `attempt`, for what may be done with less memory: every other exception goes through."""
    try:
        return work(*args), None
    except RuntimeError as problem:
        if not out_of_memory(problem):
            raise
        cut = Cut(problem, memory=True)
    return cast(T, None), _let_go(cut)


def _let_go(cut: Cut) -> Cut:
    problem: BaseException | None = cut.problem
    seen: list[BaseException] = []
    if cut.failed and LOGGED not in cut.problem.__dict__:  # loops are inside of one another
        cut.problem.__dict__[LOGGED] = True
        log.error("%s", cut, exc_info=cut.problem)
    if not cut.failed:
        cut.problem.__traceback__ = cut.problem.__context__ = cut.problem.__cause__ = None
    while problem is not None and problem not in seen:
        seen.append(problem)
        traceback.clear_frames(problem.__traceback__)
        problem = problem.__cause__ or problem.__context__
    if cut.memory:
        give_back()
    return cut
