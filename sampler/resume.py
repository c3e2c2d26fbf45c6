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
    """What a run goes on from. done: its iterations that are not made again. value: all else, for the same function."""

    value: Any
    done: int


def frozen(value: Any) -> bytes | None:
    """Tensors, optimisers and all, in the computer's own memory, apart from what goes on with the originals. None, with
    a warning, where that does not work: it must not cost what a run came to.
    """
    out = io.BytesIO()
    try:
        torch.save(value, out)
    except Exception as problem:
        log.warning("this run cannot be gone on with: %s", problem)
        return None
    return out.getvalue()


def thawed(data: bytes) -> Any:
    """What was `frozen`, where it was: on its devices, and what was one object is one again."""
    return torch.load(io.BytesIO(data), weights_only=False)  # our own bytes, of this process
