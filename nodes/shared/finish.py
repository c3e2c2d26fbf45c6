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
) -> io.NodeOutput:
    """more: outputs after the trace; then, with `noises`, those that sample the kept iterates again."""
    samples, kept, notices = memo.take_iterate(done, iterate, node)
    trace = replace(done.result.trace, kept=kept, notices=[*done.result.trace.notices, *live.notices, *notices])
    travel(hidden.extra_pnginfo, hidden.unique_id, trace, getattr(hidden, "prompt", None))
    out = {k: v for k, v in latent.items() if k not in host.SCALES}  # as KSampler's
    plain = out.copy()
    out["samples"], plain["samples"] = samples, done.plain
    if noises:
        more += (done.noise, done.sampler)
    return io.NodeOutput(out, plain, trace, *more, ui=live.output(trace))
