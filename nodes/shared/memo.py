"""The last runs of the optimising nodes, so that another of their iterates can be taken without running again."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable

from ..host import Optimized

PLAIN = (int, float, str, bool, type(None))
MOST = 2  # runs whose iterates are held

_runs: OrderedDict[str, tuple[dict, object]] = OrderedDict()


def _held(value) -> Callable:
    """Gives the value back. Models and the like are not kept alive by having been used."""
    if isinstance(value, PLAIN):
        return lambda: value
    try:
        return weakref.ref(value)
    except TypeError:  # lists and dicts: conditioning, latents
        return lambda: value


def _same(a: dict, b: dict) -> bool:
    """Plain values by value; models and the like by identity, as ComfyUI hands the same ones to an unchanged node."""
    if a.keys() != b.keys():
        return False
    pairs = [(a[k](), b[k]) for k in a]
    return all(x is y or (isinstance(x, PLAIN) and isinstance(y, PLAIN) and x == y) for x, y in pairs)


def recall(node: str, inputs: dict):
    """What was remembered of a run of these very inputs, or None."""
    before = _runs.get(node)
    return before[1] if before and _same(before[0], inputs) else None


def remember(node: str, inputs: dict, run) -> None:
    _runs[node] = ({k: _held(v) for k, v in inputs.items()}, run)
    _runs.move_to_end(node)
    while len(_runs) > MOST:
        _runs.popitem(last=False)


def taken(done: Optimized, iterate: int, node: str):
    """(latent, kept iterations): the kept ones for -1, else that iterate of every image. Raises ValueError."""
    trace = done.result.trace
    if iterate < 0:
        return done.latent, trace.kept
    if iterate >= len(done.iterates):
        raise ValueError(
            f"{node}: iterate is {iterate}, but the run ended at iteration {len(done.iterates) - 1}: use that, or -1 "
            "for the one that `keep` chooses"
        )
    return done.iterates[iterate], [iterate] * len(trace.kept)
