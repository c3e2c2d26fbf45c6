"""The record in PNGs: in those that a run saves, and in one of its own for as long as the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from datetime import datetime
from pathlib import Path

import folder_paths
import torch
from PIL.PngImagePlugin import PngInfo

from ...rewards.preprocess import picture
from ...sampler.keep import Keeper
from ...sampler.optimize import KEEP, Score
from ...sampler.trace import Trace

PNG_KEY = "mira_traces"
FOLDER = "mira_unfinished"  # in ComfyUI's output folder
SHARE = 0.05  # of a run's time, at most, goes into writing
UNFINISHED = "the run was not finished: this is its best image so far"


def travel(extra_pnginfo: dict | None, node: str, trace: Trace) -> None:
    """Beside the workflow, in every PNG that this run saves from here on."""
    if extra_pnginfo is not None:
        extra_pnginfo.setdefault(PNG_KEY, {})[node] = trace.to_dict()


class Unfinished:
    """The best image so far of a run that goes on, with its record: a server that is killed in the middle loses
    neither. One PNG for each image of the batch, always whole, in the output folder; deleted when the run hands its
    result back.

    settings: of the run, as its record has them; `keep`, `drift_metric` and `drift_limit` tell what is the best.
    """

    def __init__(self, node: str, settings: dict, extra_pnginfo: dict | None):
        self.node, self.extra = node, extra_pnginfo or {}
        self.metric = settings.get("drift_metric")
        self.keeper: Keeper = None  # made of the first rows
        self.trace = Trace(settings)
        name = re.sub(r"\W+", "-", f"{datetime.now():%Y%m%d-%H%M%S-%f}_{node}")
        self.stem = Path(folder_paths.get_output_directory(), FOLDER, name)
        self.due = 0.0

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
