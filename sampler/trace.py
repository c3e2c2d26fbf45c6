"""The record of a run: one row per iteration and image, with what it was run with."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .surrogates import REGULARIZERS

VERSION = 1


@dataclass(frozen=True)
class Column:
    """said: what it holds. measured: something of an image, which a chart draws; else of the run's own keeping."""

    said: str
    measured: bool = True


# Of a row, beside the parts of a reward, `reward.<name>`. Not every method has all of them.
COLUMNS = {
    "iteration": Column("which one, from 0, the plain sample's", measured=False),
    "image": Column("of the batch, from 0", measured=False),
    "round": Column("from 1, where an image was noised again and optimised anew", measured=False),
    "level": Column("sigma at which the round began", measured=False),
    "reward": Column("what is optimised; for the best of a search's particles so far"),
    "reward_mean": Column("the same, the mean over those of a search's particles that have one"),
    "ess": Column("of weighted particles: how many count, effectively"),
    "preferred": Column(
        "the candidate that was chosen, from 0; -1: none was better; nan: nobody was asked", measured=False
    ),
    "path_kl": Column(
        "drift: half the square by which every noise differs, the KL of the two paths per latent element"
    ),
    "score_distance": Column(
        "drift: the square by which every predicted noise differs, weighted, summed over the steps"
    ),
    "mira": Column("the paper's S(z0) - S(z), of the scores' energies; may be below 0"),
    "mira_two_sided": Column("the same of every step, without its sign"),
    "latent_distance": Column("the mean square by which the latent differs"),
    "prno": Column("DNO's penalty of noise that does not look like noise"),
    "chi": Column("ReNO's penalty of the initial noise's norm"),
    "initno": Column("of a mean and a deviation that are optimised: their KL from 0 and 1"),
    "noise_norm": Column("the root mean square of all noises; 1 is typical"),
    "beta": Column("the penalty's weight, where it changes"),
    "gradient_norm": Column("of the loss with respect to the free noises, before it is clipped"),
    "lr": Column("the step as it is now; it is halved where a gradient is not finite", measured=False),
    "evaluations": Column("calls of the network so far; of MIRA-DPO, samples", measured=False),
    "backwards": Column("and with a gradient", measured=False),
    "seconds": Column("that this iteration took", measured=False),
    "memory_mb": Column(
        "the most that was in use so far, in 10^6 bytes; on a CPU what the process holds", measured=False
    ),
}


@dataclass
class Trace:
    """rows: dicts of numbers, always with `iteration` and `image`; parts of a reward as `reward.<name>`.

    settings: what the run was asked to do. kept: the returned iteration of each image. reasons: why each image's
    optimisation ended. notices: what the user should know of this run.
    """

    settings: dict = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def of(self, image: int) -> list[dict[str, float]]:
        """The rows of one image, in order of iteration."""
        return [row for row in self.rows if row["image"] == image]

    def summary(self, image: int = 0) -> tuple[dict[str, float], dict[str, float]]:
        """The rows of the plain sample and of the kept iterate of one image."""
        rows = self.of(image)
        return rows[0], next(row for row in rows if row["iteration"] == self.kept[image])

    def to_csv(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()

    def to_dict(self) -> dict:
        """Plain JSON: a number that is not finite becomes null (browsers refuse NaN)."""
        return {
            "version": VERSION,
            "settings": json_value(self.settings),
            "rows": [json_row(row) for row in self.rows],
            "kept": self.kept,
            "reasons": self.reasons,
            "notices": self.notices,
        }

    @classmethod
    def from_dict(cls, data: dict) -> Trace:
        """Raises ValueError for anything but what `to_dict` makes. Its messages hold nothing of what was found."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, dict) else None
            found = f" (found {version})" if isinstance(version, int) else ""
            raise ValueError(f"this is not a MIRA trace of version {VERSION}{found}")
        kinds = {"settings": dict, "rows": list, "kept": list, "reasons": list, "notices": list}
        data = {"notices": []} | data
        for name, kind in kinds.items():
            if not isinstance(data.get(name), kind):
                raise ValueError(f"this MIRA trace is damaged: its {name} are missing, or no {kind.__name__}")
        if not data["rows"] or not all(map(_is_row, data["rows"])):
            raise ValueError("this MIRA trace is damaged: a row is not of numbers with an iteration and an image")
        rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in data["rows"]]
        there = {(row["image"], row["iteration"]) for row in rows}
        if not data["kept"] or any(type(k) is not int or (b, k) not in there for b, k in enumerate(data["kept"])):
            raise ValueError("this MIRA trace is damaged: the iteration that it kept of an image is not in its rows")
        return cls(data["settings"], rows, data["kept"], data["reasons"], data["notices"])

    @classmethod
    def from_csv(cls, text: str) -> Trace:
        """The rows; settings and reasons are not in a CSV, and the last iteration counts as kept."""
        try:
            found = list(csv.DictReader(io.StringIO(text)))
        except csv.Error:
            raise ValueError("the CSV is damaged: it cannot be read as a table") from None
        if not found or not {"iteration", "image"} <= found[0].keys():
            raise ValueError("this is not the CSV of a MIRA trace: it needs the columns iteration and image, and rows")
        try:
            if any(None in row.values() or None in row for row in found):
                raise ValueError("a row has too few or too many cells")
            rows = [
                {k: int(v) if k in ("iteration", "image") else float(v) for k, v in row.items() if v != ""}
                for row in found
            ]
            if not all(map(_is_row, rows)):
                raise ValueError("an iteration or an image is below 0")
            images = max(int(row["image"]) for row in rows) + 1
            kept = [max(int(r["iteration"]) for r in rows if r["image"] == b) for b in range(images)]
        except (ValueError, KeyError):
            raise ValueError("the CSV is damaged or cut short: a cell is missing, or is no number") from None
        return cls({}, rows, kept, ["read from a CSV"] * images, ["read from a CSV: the last iteration counts as kept"])

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def rows_of(iteration: int, columns: dict[str, Tensor], **of_the_run: float) -> list[dict[str, float]]:
    """The rows of one iteration, one per image. columns: measurements by name, each (B,); of_the_run: what is the same
    for all images of the batch. Raises ValueError for a column that nobody could look up in `COLUMNS`.
    """
    for name in (*columns, *of_the_run):
        if name not in COLUMNS and name not in REGULARIZERS and not name.startswith("reward."):
            raise ValueError(f"a row has the column {name!r}, which COLUMNS does not tell of")
    values = {name: column.detach().cpu().double().tolist() for name, column in columns.items()}
    images = len(next(iter(values.values())))
    return [
        {"iteration": iteration, "image": b} | {name: v[b] for name, v in values.items()} | of_the_run
        for b in range(images)
    ]


def _is_row(row: Any) -> bool:
    """Numbers by name, null for one that is not finite, and an iteration and an image."""
    return (
        isinstance(row, dict)
        and all(type(row.get(k)) is int and row[k] >= 0 for k in ("iteration", "image"))
        and all(isinstance(k, str) and (v is None or type(v) in (int, float)) for k, v in row.items())
    )


def json_row(row: dict[str, float]) -> dict[str, float | None]:
    return {k: json_value(v) for k, v in row.items()}


def json_value(value: Any) -> Any:
    """JSON has no number for what is not finite: null, also within lists and dicts."""
    if isinstance(value, dict):
        return {k: json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
