"""What the sampling nodes hand back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from .. import host
from ..editor.live import LiveRun
from ..editor.on_disk import travel
from . import memo


def finish(
    node: str,
    hidden: Any,
    done: host.Optimized,
    live: LiveRun,
    latent: dict,
    iterate: int,
    *more: Any,
    noises: Any = True,
    restart: host.FinalRestart | None = None,
) -> io.NodeOutput:
    """more: outputs after the trace; then, with `noises`, those that sample the kept iterates again. restart: of what
    comes back."""
    samples, kept, notices = memo.take_iterate(done, iterate, node)
    settings = done.result.trace.settings
    if restart:
        samples, said, told = restart(samples)
        settings, notices = settings | said, [*notices, *told]
    notices = [*done.result.trace.notices, *live.notices, *notices]
    trace = replace(done.result.trace, kept=kept, notices=notices, settings=settings)
    travel(hidden.extra_pnginfo, hidden.unique_id, trace, getattr(hidden, "prompt", None))
    out = {k: v for k, v in latent.items() if k not in host.SCALES}  # as KSampler's
    plain = out.copy()
    out["samples"], plain["samples"] = samples, done.plain
    if noises:
        more += (done.noise, done.sampler)
    return io.NodeOutput(out, plain, trace, *more, ui=live.output(trace))
