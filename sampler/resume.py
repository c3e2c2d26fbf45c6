"""Where a run stood, so that it can go on as if it had not ended."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger("mira")


@dataclass(frozen=True)
class Left:
    """What a run goes on from. done: its iterations that are not done again; data: all else, for `thawed`."""

    data: bytes
    done: int


def leave(value: Any, done: int) -> Left | None:
    """What a run goes on from; None, with a warning, where it cannot be kept: that must not cost what it came to."""
    try:
        return Left(frozen(value), done)
    except Exception as problem:
        log.warning("this run cannot be gone on with: %s", problem)
        return None


def frozen(value: Any) -> bytes:
    """Tensors, optimisers and all, in the computer's own memory, apart from what goes on with the originals."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def thawed(data: bytes) -> Any:
    """What was `frozen`, where it was: on its devices, and what was one object is one again."""
    return torch.load(io.BytesIO(data), weights_only=False)  # our own bytes, of this process
