"""Which predictions of a step are made together: as ComfyUI decides it once, for as long as memory does not run out.

ComfyUI looks at the free memory at every call of the model before it takes the prompt and its negative as one batch.
What a gradient keeps changes that in the middle of a run, and a batch of two has other last bits than two of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...sampler.memory import times_given_back

MARGIN = 1.5  # times the estimate, which ComfyUI wants free


@contextmanager
def decided_once(model: Any, free_bytes: Callable[[], float]) -> Iterator[None]:
    """Within, batches of one shape are either always or never made, until something has found no memory. model:
    ComfyUI's, whose estimate of the memory is what it compares; free_bytes() is asked where the shape is met first.
    """
    before = vars(model).get("memory_required")  # another pack's
    estimate, fits = model.memory_required, dict[Any, bool]()

    def memory_required(input_shape: list, cond_shapes: dict | None = None) -> float:
        if cond_shapes is None:  # not about a batch
            return estimate(input_shape)
        shapes = times_given_back(), tuple(input_shape), repr(sorted(cond_shapes.items()))
        if shapes not in fits:
            fits[shapes] = estimate(input_shape, cond_shapes=cond_shapes) * MARGIN < free_bytes()
        return -math.inf if fits[shapes] else math.inf

    model.memory_required = memory_required
    try:
        yield
    finally:
        if before is None:
            vars(model).pop("memory_required", None)
        else:
            model.memory_required = before
