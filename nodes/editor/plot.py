"""Line plots with Pillow alone: every ComfyUI has it, and matplotlib not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn larger and shrunk, for smooth lines
COLOURS = ("#3b78d8", "#e07b1a", "#2e9e5b", "#b8459b", "#7a6cd0", "#c0392b", "#16808f", "#8a6d3b")
INK, GRID, PAPER = "#222222", "#dddddd", "#ffffff"


@dataclass
class Line:
    """Points in order. marks: indices to be marked with a ring."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dashed: bool = False
    marks: Sequence[int] = ()
    dots: bool = False


@dataclass
class Panel:
    title: str
    x_label: str
    y_label: str
    lines: list[Line] = field(default_factory=list)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover the range."""
    if not math.isfinite(low) or not math.isfinite(high) or not math.isfinite(high - low):
        return [0.0, 1.0]
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # apart by rounding alone, or not at all
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    raw = (high - low) / count
    step = 10 ** math.floor(math.log10(raw))
    step *= next(f for f in (1, 2, 5, 10) if f * step >= raw)
    first = math.floor(low / step)
    return [step * i for i in range(first, math.ceil(high / step) + 1)]


def draw(panels: Sequence[Panel], size: tuple[int, int] = (560, 400)) -> Image.Image:
    """Panels side by side, each of this size in pixels."""
    width, height = size[0] * SCALE, size[1] * SCALE
    image = Image.new("RGB", (width * len(panels), height), PAPER)
    canvas = ImageDraw.Draw(image)
    for number, panel in enumerate(panels):
        _panel(canvas, panel, number * width, width, height)
    return image.resize((size[0] * len(panels), size[1]), Image.Resampling.LANCZOS)


def _panel(canvas: ImageDraw.ImageDraw, panel: Panel, left: int, width: int, height: int) -> None:
    small, large = (ImageFont.load_default(size=s * SCALE) for s in (11, 13))
    shown = [line for line in panel.lines if any(math.isfinite(v) for v in line.y)]
    legend = 17 * SCALE * len(shown)
    x0, y0 = left + 62 * SCALE, 30 * SCALE
    x1, y1 = left + width - 16 * SCALE, height - 44 * SCALE - legend
    canvas.text((left + width / 2, 8 * SCALE), panel.title, fill=INK, font=large, anchor="ma")
    points = [(x, y) for line in shown for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x + y)]
    xs, ys = ([p[i] for p in points] or [0.0, 1.0] for i in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            x0 + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (x1 - x0),
            y1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (y1 - y0),
        )

    for t in x_ticks:
        x = at(t, y_ticks[0])[0]
        canvas.line([(x, y0), (x, y1)], fill=GRID, width=SCALE)
        canvas.text((x, y1 + 4 * SCALE), f"{t:.4g}", fill=INK, font=small, anchor="ma")
    for t in y_ticks:
        y = at(x_ticks[0], t)[1]
        canvas.line([(x0, y), (x1, y)], fill=GRID, width=SCALE)
        canvas.text((x0 - 5 * SCALE, y), f"{t:.4g}", fill=INK, font=small, anchor="rm")
    canvas.text(((x0 + x1) / 2, y1 + 20 * SCALE), panel.x_label, fill=INK, font=small, anchor="ma")
    canvas.text((x0, y0 - 3 * SCALE), panel.y_label, fill=INK, font=small, anchor="lb")
    for row, line in enumerate(shown):
        _line(canvas, line, at)
        y = y1 + 40 * SCALE + row * 17 * SCALE
        canvas.line([(x0, y), (x0 + 22 * SCALE, y)], fill=line.colour, width=2 * SCALE)
        canvas.text((x0 + 28 * SCALE, y), line.label, fill=INK, font=small, anchor="lm")


def _line(canvas: ImageDraw.ImageDraw, line: Line, at: Any) -> None:
    places = [at(x, y) if math.isfinite(x + y) else None for x, y in zip(line.x, line.y, strict=True)]
    for i, (a, b) in enumerate(pairwise(places)):
        if a and b and not (line.dashed and i % 2):
            canvas.line([a, b], fill=line.colour, width=2 * SCALE)
    for i, place in enumerate(places):
        if place and (line.dots or i in line.marks or len(places) == 1):
            r = (6 if i in line.marks else 3) * SCALE
            box = [place[0] - r, place[1] - r, place[0] + r, place[1] + r]
            canvas.ellipse(box, outline=line.colour, width=2 * SCALE, fill=None if i in line.marks else line.colour)
