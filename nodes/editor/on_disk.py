"""The record in PNGs: in those that a run saves, and in one of its own for as long as the run goes on."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import time
from collections import OrderedDict
from datetime import datetime
from pathlib import Path

import folder_paths
import torch
from PIL.PngImagePlugin import PngInfo

from ...rewards.preprocess import picture
from ...sampler.keep import Keeper
from ...sampler.optimize import KEEP, Score
from ...sampler.trace import Trace
from .graph import digest_of, place_in_list, run_by, running, with_all_before

PNG_KEY = "mira_traces"
FOLDER = "mira_unfinished"  # in ComfyUI's output folder
MOST_RECORDS = 64
SHARE = 0.05  # of a run's time, at most, goes into writing
UNFINISHED = "the run was not finished: this is its best image so far"


# By what a node was asked: its records, by the place in a list. ComfyUI's cache knows no names of nodes either.
_records: OrderedDict[str, dict[int, dict]] = OrderedDict()


class Records(dict):
    """By node, with #1 and so on after it for the further elements of a list: its record.

    Every picture begins with its own: while a node writes, as SaveImage, the records of those that are nearest before
    it in the graph come first. And what is written while ComfyUI maps a node over a list is of one element: that one's
    record has the node's name then, and those of the others follow.
    """

    prompt: dict | None = None  # of the graph, where it is known

    def items(self):
        node, place = running(), place_in_list()
        near = with_all_before(self.prompt, [node]) if self.prompt and node else {}
        names = sorted(self, key=lambda name: near.get(name.split("#")[0], math.inf))  # the others in their order
        own = {name.split("#")[0]: name for name in names if place and name.endswith(f"#{place}")}
        first = {node: self[name] for node, name in own.items()}
        others = {f"{k}#0" if k in own else k: self[k] for k in names if k not in own.values()}
        return (first | others).items()

    def __reduce__(self):  # a copy is what there is, in its order, and stays so
        return dict, (dict.copy(self),)


def travel(extra_pnginfo: dict | None, node: str, trace: Trace, prompt: dict | None = None) -> None:
    """Beside the workflow, in every PNG that this run saves from here on. A list has a record for each of its elements.

    prompt: of the graph; ComfyUI may take the node's result from its cache next time, and then `remembered` adds the
    record to the PNGs.
    """
    place, record = place_in_list(), trace.to_dict()
    if isinstance(extra_pnginfo, dict):  # a client may send anything in its place
        traces = records_of(extra_pnginfo, prompt)
        for name in () if place else of_node(traces, node):  # what an earlier run of the node has left
            del traces[name]
        traces[name_of(node, place)] = record
    if prompt and node in prompt:
        asked = digest_of(prompt, node)
        _records[asked] = (_records.get(asked, {}) if place else {}) | {place: record}
        _records.move_to_end(asked)
        while len(_records) > MOST_RECORDS:
            _records.popitem(last=False)


def name_of(node: str, place: int) -> str:
    return f"{node}#{place}" if place else node


def records_of(extra_pnginfo: dict, prompt: dict | None) -> Records:
    """Those that go with a prompt's pictures, a client's own among them."""
    traces = extra_pnginfo.get(PNG_KEY)
    if not isinstance(traces, Records):
        traces = extra_pnginfo[PNG_KEY] = Records(traces if isinstance(traces, dict) else {})
    traces.prompt = prompt or traces.prompt
    return traces


def of_node(traces: dict[str, dict], node: str) -> dict[str, dict]:
    """A node's own records, one for each element of a list."""
    return {name: traces[name] for name in traces if name.split("#")[0] == node}


def remembered(request: dict) -> dict:
    """A handler of prompts that are queued: the records of nodes that were asked for just this before. One that runs
    after all writes its own.
    """
    prompt, extra = request.get("prompt"), (request.get("extra_data") or {}).get("extra_pnginfo")
    if isinstance(prompt, dict) and isinstance(extra, dict) and _records:
        for node in run_by(prompt):
            if str(prompt[node].get("class_type")).startswith("Mira"):
                known = _records.get(digest_of(prompt, node), {})
                records_of(extra, prompt).update({name_of(node, place): record for place, record in known.items()})
        if not extra.get(PNG_KEY):
            extra.pop(PNG_KEY, None)
    return request


class Unfinished:
    """The best image so far of a run that goes on, with its record: a server that is killed in the middle loses
    neither. One PNG for each image of the batch, always whole, in the output folder; deleted when the run hands its
    result back.

    settings: of the run, as its record has them; `keep`, `drift_metric` and `drift_limit` tell what is the best.
    """

    def __init__(self, node: str, settings: dict, extra_pnginfo: dict | None) -> None:
        self.node, self.extra = node, extra_pnginfo or {}
        self.metric = settings.get("drift_metric")
        self.keeper: Keeper = None  # made of the first rows
        self.trace = Trace(settings)
        name = re.sub(r"\W+", "-", f"{datetime.now():%Y%m%d-%H%M%S-%f}_{node}")
        self.stem = Path(folder_paths.get_output_directory(), FOLDER, name)
        self.due = 0.0

    def go_on(self, before: Unfinished, done: int) -> None:
        """Begin with what an earlier run's first `done` iterations came to."""
        self.keeper = copy.copy(before.keeper)
        self.trace.rows = [r for r in before.trace.rows if r["iteration"] < done]

    def files(self) -> list[Path]:
        return [self.stem.with_name(f"{self.stem.name}_{b}.png") for b in range(len(self.trace.kept))]

    def __call__(self, k: int, rows: list[dict], score: Score) -> None:
        """After every iterate, as `on_iteration`; a writing that took long is not repeated soon. Raises OSError."""
        scored = "reward" in rows[0]  # a person's choices have no numbers: there the newest one is the best
        if self.keeper is None:
            keep = self.trace.settings.get("keep")
            keep = (keep if keep in KEEP else "best_reward") if scored else "last"
            self.keeper = Keeper(keep, self.trace.settings.get("drift_limit", 0.0))
        reward = torch.tensor([row["reward"] if scored else 0.0 for row in rows])
        drift = torch.tensor([row.get(self.metric, 0.0) for row in rows]).nan_to_num(nan=0.0)
        active = torch.ones(len(rows), dtype=torch.bool)
        self.keeper.update(k, reward, drift, score.images.detach().float().cpu(), (), active)
        self.trace.rows = [r for r in self.trace.rows if r["iteration"] < k] + rows
        self.trace.kept = self.keeper.iteration.tolist()
        self.trace.reasons = [UNFINISHED] * len(rows)
        if time.monotonic() >= self.due:
            started = time.monotonic()
            self._write()
            self.due = time.monotonic() + (time.monotonic() - started) / SHARE

    def _write(self) -> None:
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        traces = {**self.extra.get(PNG_KEY, {}), self.node: self.trace.to_dict()}
        told = PngInfo()
        for name, value in {**self.extra, PNG_KEY: traces}.items():
            told.add_text(name, json.dumps(value))
        for image, file in zip(self.keeper.latent, self.files(), strict=True):
            half = file.with_suffix(".part")
            picture(image).save(half, "PNG", pnginfo=told, compress_level=1)
            os.replace(half, file)

    def done(self) -> None:
        """The run handed its result back."""
        for file in self.files():
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
                file.with_suffix(".part").unlink(missing_ok=True)
