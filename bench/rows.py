"""The rows of a study, one for an image of an iterate: written run by run, and gathered into docs/results."""

from __future__ import annotations

import csv
from pathlib import Path


def write(path: Path, rows: list[dict]) -> None:
    """A table of all columns that any row has, floats to five digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def file_run(path: Path, rows: list[dict]) -> None:
    """Whole or not at all."""
    write(path.with_suffix(".tmp"), rows)
    path.with_suffix(".tmp").replace(path)


def short(value: str) -> str:
    try:
        return f"{float(value):.5g}"
    except ValueError:  # a name
        return value


def gather(raw: Path, path: Path, names: tuple[str, ...]) -> None:
    """The rows of all runs in `raw`, whose files are called by `names`, in place of the same ones of `path`."""
    kept, new = [], []
    for file in sorted(raw.glob("*.csv")):
        of = dict(zip(names, file.stem.split("-"), strict=True))
        for row in csv.DictReader(file.open()):
            new.append(of | {k: short(v) for k, v in row.items() if v != ""})
    here = {tuple(r[k] for k in names) for r in new}
    if path.is_file():
        known = csv.DictReader(path.open())
        kept = [r for r in known if tuple(r[k] for k in names) not in here]
    if new:
        write(path, kept + new)
