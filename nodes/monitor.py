"""The MIRA Drift Monitor: reward against drift, of one run or several, and what the numbers say in plain words."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import folder_paths
import numpy as np
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..rewards.clip import Similarity
from ..rewards.half import place_of
from ..sampler.statistics import cmmd, pareto, spectral_distance, spread
from ..sampler.surrogates import SURROGATES
from ..sampler.trace import Trace
from .editor.live import text_output
from .editor.plot import COLOURS, Line, Panel, draw
from .host import patcher_of
from .host.loading import load
from .shared.checks import check_values, spoken
from .shared.images import to_core
from .shared.scores import score_images
from .shared.types import MiraReward, MiraTrace, aliases

log = logging.getLogger("mira")
SLOTS = 4
SIGMAS = 2.0  # of the base model's own spread


@dataclass
class Run:
    """One trace with what is known of its images. means: a row per iteration, over the images of the batch."""

    label: str
    trace: Trace
    images: Tensor | None
    means: list[dict[str, float]]

    def curve(self, column: str) -> list[float]:
        return [row.get(column, math.nan) for row in self.means]

    def kept(self, column: str) -> float:
        """The mean over images of the kept iterates' values."""
        values = []
        for image, iteration in enumerate(self.trace.kept):
            row = next((r for r in self.trace.of(image) if r["iteration"] == iteration), None)
            values.append(math.nan if row is None else row.get(column, math.nan))
        return sum(values) / len(values) if values else math.nan


def run_of(number: int, trace: Trace, images: Tensor | None) -> Run:
    """Raises ValueError for what is no trace, and for images that are not the trace's."""
    if not isinstance(trace, Trace) or not trace.rows:
        found = "an empty trace" if isinstance(trace, Trace) else f"a {type(trace).__name__}"
        raise ValueError(
            f"{MiraDriftMonitor.NAME}: trace_{number} is {found}: connect the trace of an optimising node or MIRA Load "
            "Trace"
        )
    if images is not None:
        images = to_core(images, f"{MiraDriftMonitor.NAME}: images_{number}")
        if len(images) != len(trace.kept):
            raise ValueError(
                f"{MiraDriftMonitor.NAME}: images_{number} has {len(images)} image(s), but trace_{number} is of "
                f"{len(trace.kept)}: connect the images of that run"
            )
    s = trace.settings
    method = s.get("method") or s.get("preset") or s.get("regularizer") or "run"
    beta = f" beta {s['beta']:g}" if s.get("beta") and s.get("regularizer", "none") != "none" else ""
    means = []
    for k in sorted({r["iteration"] for r in trace.rows}):
        rows = [r for r in trace.rows if r["iteration"] == k]
        names = {n for r in rows for n, v in r.items() if isinstance(v, (int, float))}
        means.append({n: sum(r.get(n, math.nan) for r in rows) / len(rows) for n in names})
    return Run(f"{number}: {method}{beta}", trace, images, means)


def plots(runs: list[Run], metric: str) -> Tensor:
    """(1, H, W, 3): reward and surrogates by iteration, and the plane of drift and reward with the Pareto front."""
    reward = Panel("Reward", "iteration", "reward")
    drift = Panel("Drift", "iteration", metric)
    plane = Panel("Reward against drift", metric, "reward")
    points = [(r.curve(metric), r.curve("reward")) for r in runs]
    for i, (run, (x, y)) in enumerate(zip(runs, points, strict=True)):
        colour, steps = COLOURS[i % len(COLOURS)], run.curve("iteration")
        marks = [k for k, step in enumerate(steps) if step in run.trace.kept]
        reward.lines.append(Line(run.label, steps, y, colour, marks=marks))
        drift.lines.append(Line(run.label, steps, x, colour, marks=marks))
        plane.lines.append(Line(run.label, x, y, colour, marks=marks, dots=True))
    if len(runs) == 1:
        drift.title, drift.y_label, drift.lines = "Every surrogate", "each over its largest value", []
        for i, name in enumerate(SURROGATES):
            values = runs[0].curve(name)
            most = max((abs(v) for v in values if math.isfinite(v)), default=0.0) or 1.0
            label = f"{name} (largest {most:.3g})"
            drift.lines.append(Line(label, runs[0].curve("iteration"), [v / most for v in values], COLOURS[i]))
    everything = [(a, b) for x, y in points for a, b in zip(x, y, strict=True)]
    front = [everything[i] for i in pareto(everything)]
    plane.lines.append(Line("Pareto front", [p[0] for p in front], [p[1] for p in front], "#999999", dashed=True))
    pixels = np.asarray(draw([reward, drift, plane]), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]


@torch.no_grad()
def embed(clip: Similarity, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, D), of unit length, by the CLIP of a CLIPScore."""
    load([patcher_of(m) for m in clip.modules])
    place = place_of(clip.encoder.network)
    out = [
        clip.encoder.network.encode_image(clip.encoder.preprocessing(i[None].to(place.device)).to(place))
        for i in images
    ]
    return F.normalize(torch.cat(out).float(), dim=1).cpu()


def texts_of(trace: Trace, given: str) -> list[str]:
    """What images in their order are compared with, from the first again where there are more of them: the given text,
    or what the rewards of the run read; nothing where neither is known.
    """
    texts = trace.settings.get("prompts")
    if given.strip() or not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
        texts = [spoken(given.strip() or str(trace.settings.get("prompt") or ""))]
    return texts if any(texts) else []


def clip_scores(clip: Similarity, images: Tensor, texts: list[str]) -> Tensor:
    return score_images(clip, images, (texts * len(images))[: len(images)])[0]


def measure(run: Run, metric: str, clip: Any, texts: list[str], base: dict | None) -> dict:
    """The numbers of one run: its kept iterates against its plain samples, and against the base model's images."""
    first = run.means[0]
    out = {"run": run.label, "kept": run.trace.kept, "reward_plain": first.get("reward", math.nan)}
    out["reward"] = run.kept("reward")
    out["gain"] = out["reward"] - out["reward_plain"]
    out |= {name: run.kept(name) for name in SURROGATES}
    out["drift"] = out[metric]
    if clip is not None and run.images is not None:
        if texts:
            out["clip_score"] = clip_scores(clip, run.images, texts).mean().item()
        if base is not None:
            embeddings = embed(clip, run.images)
            distances = torch.cdist(embeddings.double(), base["embeddings"].double())
            out["distance_to_base"] = distances.mean().item()
            if len(embeddings) > 1:
                out["cmmd"] = cmmd(embeddings, base["embeddings"])
            if len(embeddings) > 2:
                out["spectral_distance"] = spectral_distance(embeddings, base["embeddings"])
    out["noise"] = noise_warnings(run.trace)
    return out


def noise_warnings(trace: Trace) -> list[str]:
    """The statistics of the kept noises that N(0, I) would hardly give."""
    found = trace.settings.get("noise_statistics") or {}
    warnings = []
    for name, (low, high) in (found.get("expected") or {}).items():
        values = (found.get("kept") or {}).get(name, [])
        worst = max(values, key=lambda v: max(low - v, v - high), default=None)
        if worst is not None and not low <= worst <= high:
            warnings.append(f"{name} {worst:.4g} (N(0, I): {low:.4g} to {high:.4g})")
    return warnings


def verdict(row: dict, base: dict | None) -> str:
    """Plain words. The thresholds are the base model's own spread over seeds."""
    gain = "reward unknown" if math.isnan(row["gain"]) else f"reward {row['gain']:+.3g}"
    tail = f"; its noise is no longer typical: {', '.join(row['noise'])}" if row["noise"] else ""
    drift = "not measured" if math.isnan(row["drift"]) else f"{row['drift']:.3g}"
    if base is None:
        missing = "no verdict without base_images (plain samples of other seeds) and clip"
        return f"{gain}, drift {drift}; {missing}{tail}"
    reasons: list[str] = []
    fine: list[str] = []
    if "distance_to_base" in row:
        low, high = base["distance"]
        text = f"distance to the base images {row['distance_to_base']:.3g}, their own {low:.3g} ± {high:.3g}"
        (reasons if row["distance_to_base"] > low + SIGMAS * high else fine).append(text)
    if "clip_score" in row and "clip_score" in base:
        mean, deviation = base["clip_score"]
        text = f"CLIPScore {row['clip_score']:.4g}, the base images' {mean:.4g} ± {deviation:.2g}"
        (reasons if row["clip_score"] < mean - SIGMAS * deviation else fine).append(text)
    if not reasons and not fine:
        return f"{gain}, drift {drift}; no verdict without the run's own images{tail}"
    if reasons:
        return f"hacked: {gain}, but {'; '.join(reasons)}{tail}"
    return f"{gain}, drift within the base model's own seed-to-seed spread ({'; '.join(fine)}){tail}"


def base_of(images: Tensor, clip: Similarity, texts: list[str]) -> dict:
    embeddings = embed(clip, images)
    apart = spread(embeddings)
    out = {"embeddings": embeddings, "distance": (apart.mean().item(), apart.std().item())}
    if len(set(texts)) == 1:  # else nobody knows which of them a base image is of
        scores = clip_scores(clip, images, texts)
        out["clip_score"] = (scores.mean().item(), scores.std().item())
    return out


def at_equal_drift(runs: list[Run], metric: str) -> list[str]:
    """The reward of every run where they have drifted equally far: where the shortest path ends."""
    curves = [(r.label, r.curve(metric), r.curve("reward")) for r in runs]
    ends = [max((x for x in xs if math.isfinite(x)), default=0.0) for _, xs, _ in curves]
    level = min(ends)
    if len(runs) < 2 or level <= 0:
        return []
    lines = [f"at equal drift ({metric} {level:.3g}):"]
    for label, xs, ys in curves:
        for (a, b), (c, d) in zip(pairwise(xs), pairwise(ys), strict=True):
            if a <= level <= b and b > a:
                lines.append(f"  {label}: reward {c + (level - a) / (b - a) * (d - c):.4g}")
                break
    return lines


def text_of(rows: list[dict], extra: list[str]) -> str:
    columns = ["reward_plain", "reward", "gain", "drift", *SURROGATES]
    columns += ["clip_score", "distance_to_base", "cmmd", "spectral_distance"]
    used = [c for c in columns if any(isinstance(r.get(c), float) and math.isfinite(r[c]) for r in rows)]
    # A line per number, a column per run: nodes are narrow.
    table = [["", *(r["run"] for r in rows)]]
    table += [[c, *(f"{r.get(c, math.nan):.4g}" for r in rows)] for c in used]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, *extra])


def write(runs: list[Run], prefix: str) -> list[str]:
    """CSV and JSON of every run into ComfyUI's output folder; the names of the files."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    names = []
    for number, run in enumerate(runs, 1):
        for ending, text in (("csv", run.trace.to_csv()), ("json", run.trace.to_json())):
            file = f"{name}_{counter:05}_run{number}.{ending}"
            with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
                out.write(text)
            names.append(os.path.join(subfolder, file))
    return names


class MiraDriftMonitor(io.ComfyNode):
    NAME = "MIRA Drift Monitor"

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for i in range(1, SLOTS + 1):
            inputs.append(
                MiraTrace.Input(
                    f"trace_{i}",
                    optional=i > 1,
                    tooltip="Of an optimising node, or of MIRA Load Trace: a run to look at.",
                )
            )
        for i in range(1, SLOTS + 1):
            inputs.append(
                io.Image.Input(f"images_{i}", optional=True, tooltip=f"The images of trace_{i}, as they were returned.")
            )
        return io.Schema(
            node_id="MiraDriftMonitor",
            **aliases("drift", "hacking", "chart", "compare runs"),
            display_name=cls.NAME,
            category="MIRA Alignment/scores",
            description=(
                "Plots reward and drift of one run or several, writes the records to the output folder, and says "
                "whether an image is still one that the base model would paint. For that it needs plain samples of "
                "other seeds and a CLIPScore."
            ),
            inputs=[
                *inputs,
                io.Image.Input("base_images", optional=True, tooltip="Plain samples of other seeds: 3 or more."),
                MiraReward.Input("clip", optional=True, tooltip="A CLIPScore, whose CLIP compares images and prompt."),
                io.Combo.Input(
                    "drift_metric",
                    options=list(SURROGATES),
                    default="path_kl",
                    tooltip="What counts as drift in the plots and in the comparison at equal drift.",
                ),
                io.String.Input(
                    "filename_prefix", default="mira/drift", tooltip="Of the CSV and JSON files in the output folder."
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For the CLIPScore. Empty: the prompt that the first trace was made with, if it knows it.",
                ),
            ],
            outputs=[
                io.Image.Output("plot", display_name="plot", tooltip="Reward and drift of every run."),
                io.String.Output(
                    "table", display_name="table", tooltip="A line for each number, a column for each run."
                ),
                io.String.Output("verdict", display_name="verdict", tooltip="The same in words."),
                io.Float.Output("gain", display_name="gain", is_output_list=True, tooltip="Reward won, per trace."),
                io.Float.Output("drift", display_name="drift", is_output_list=True, tooltip="Of the kept images."),
                io.Float.Output(
                    "clip_score", display_name="clip_score", is_output_list=True, tooltip="By `clip`, per trace."
                ),
                io.Float.Output("cmmd", display_name="cmmd", is_output_list=True, tooltip="Against base_images."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        drift_metric: str,
        filename_prefix: str,
        base_images: Tensor | None = None,
        clip: Any = None,
        prompt: str = "",
        **inputs: Any,
    ) -> io.NodeOutput:
        values = {"drift_metric": drift_metric, "filename_prefix": filename_prefix}
        check_values(cls.NAME, cls.define_schema().inputs, values)
        numbers = [i for i in range(1, SLOTS + 1) if inputs.get(f"trace_{i}") is not None]
        if not numbers:
            raise ValueError(f"{cls.NAME}: trace_1 is empty: connect the trace of a MIRA node")
        stray = [i for i in range(1, SLOTS + 1) if inputs.get(f"images_{i}") is not None and i not in numbers]
        if stray:
            raise ValueError(f"{cls.NAME}: images_{stray[0]} is connected without trace_{stray[0]}; connect both")
        runs = [run_of(i, inputs[f"trace_{i}"], inputs.get(f"images_{i}")) for i in numbers]
        if clip is not None and not isinstance(clip, Similarity):
            name = getattr(getattr(clip, "facts", None), "name", type(clip).__name__)
            raise ValueError(f"{cls.NAME}: clip is {name}, which has no CLIP to compare images by; connect a CLIPScore")
        if base_images is not None and clip is None:
            raise ValueError(f"{cls.NAME}: base_images needs a clip to be compared by; connect a CLIPScore")
        texts = texts_of(runs[0].trace, prompt or "")
        base = None
        if base_images is not None:
            try:
                base = base_of(to_core(base_images, f"{cls.NAME}: base_images"), clip, texts)
            except ValueError as problem:
                raise ValueError(f"{cls.NAME}: base_images: {problem}") from problem
        rows = [measure(run, drift_metric, clip, texts, base) for run in runs]
        says = [f"{run.label}: {verdict(row, base)}" for run, row in zip(runs, rows, strict=True)]
        try:
            files = f"written: {', '.join(write(runs, filename_prefix))}"
        except Exception as problem:  # the plots and the verdict are worth more than their files
            files = f"not written: {' '.join(str(problem).split())}"
            log.warning("%s: %s", cls.NAME, files)
        notices = [f"{run.label}: {n}" for run in runs for n in run.trace.notices]
        table = text_of(rows, [*at_equal_drift(runs, drift_metric), *notices])
        said = "\n".join(says)
        shown = "\n\n".join([said, table, files])

        drawn = runs[0].trace.to_dict()
        if len(runs) > 1:
            drawn["notices"] = [f"the chart is of {runs[0].label}", *drawn.get("notices", ())]

        def column(name: str) -> list[float]:
            return [row.get(name, math.nan) for row in rows]

        return io.NodeOutput(
            plots(runs, drift_metric), table, said, column("gain"), column("drift"), column("clip_score"),
            column("cmmd"), ui=text_output(shown, mira=[drawn]),
        )  # fmt: skip
