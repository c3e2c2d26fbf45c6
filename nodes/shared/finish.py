"""What the sampling nodes hand back."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...sampler.trace import Trace
from .. import host
from ..editor.live import LiveRun
from ..editor.on_disk import travel
from . import memo

log = logging.getLogger("mira")


def tell(node: str, trace: Trace, notices: Iterable[str]) -> None:
    """To the log, and into the record that the node shows."""
    for notice in notices:
        log.warning("%s: %s", node, notice)
        trace.notices.append(notice)


def finish(
    node: str,
    hidden: Any,
    done: host.Optimized,
    live: LiveRun,
    latent: dict,
    iterate: int,
    *more: Any,
    noises: bool = True,
    restart: host.FinalRestart | None = None,
    inputs: dict | None = None,
) -> io.NodeOutput:
    """more: outputs after the trace; then, with `noises`, those that sample the kept iterates again. restart: of what
    comes back, but for a run that was cancelled, which is not gone on with unasked. inputs: of the run, as `memo` has
    them.
    """
    samples, kept, notices = memo.take_iterate(done, iterate, noises)
    trace = replace(done.result.trace, kept=kept)
    if restart and done.result.cut_short and iterate < 0:
        notices = [*notices, "final_restart was left out, for the run was cut short: Repaint makes up for it"]
    elif restart:
        before, (samples, told, cut) = samples, restart(samples)
        if cut:
            memo.ask_again(inputs or {})
        elif samples is not before:
            whose = "record, noise and sampler are" if noises else "record is"
            told = [
                f"painted anew at the end (final_restart): the {whose} of the image before that",
                # A person gives no numbers, and what was painted anew has none either.
                *restart.compare([trace.summary(b)[1].get("reward", math.nan) for b in range(len(kept))], samples),
                *told,
            ]
            trace.settings = trace.settings | {"final_restart": restart.share, "final_restart_seed": restart.number}
        notices = [*notices, *told]
    trace.notices = [*trace.notices, *live.notices, *notices]
    travel(hidden.extra_pnginfo, hidden.unique_id, trace, getattr(hidden, "prompt", None))
    out = {k: v for k, v in latent.items() if k not in host.SCALES}  # as KSampler's
    plain = out.copy()
    out["samples"], plain["samples"] = samples, done.plain
    if noises:
        more += (done.noise, done.sampler)
    return io.NodeOutput(out, plain, trace, *more, ui=live.output(trace))
