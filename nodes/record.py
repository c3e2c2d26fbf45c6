"""The record of an earlier run, as a node."""

from __future__ import annotations

import json
import os
from typing import Any

from comfy_api.latest import io

from ..sampler.trace import Trace
from .editor.on_disk import PNG_KEY
from .shared.made import chosen, found, listed, path_input, stamp, why_not
from .shared.types import MiraTrace, aliases

SUFFIXES = (".png", ".webp", ".json", ".csv")
MOST_BYTES = 100 << 20
NO_FILE = "put a .png, .webp, .json or .csv into the input or output folder"


def trace_files() -> list[str]:
    return listed(SUFFIXES)


def trace_path(file: str) -> str:
    """The path of one of `trace_files`, or of another in ComfyUI's folders. Raises ValueError for what is no record."""
    path = found(file, SUFFIXES, NO_FILE)
    if os.path.getsize(path) > MOST_BYTES:
        raise ValueError(f"{file} is larger than {MOST_BYTES >> 20} MiB, which no record is: {NO_FILE}")
    return path


def text_in(path: str) -> str | None:
    """The records that a picture carries, or None: where ComfyUI puts what goes beside the workflow."""
    from PIL import Image, PngImagePlugin

    try:
        image = Image.open(path)
    except Image.DecompressionBombError as problem:
        raise ValueError(f"it is too large a picture ({problem})") from problem
    with image:
        image.seek(getattr(image, "n_frames", 1) - 1)  # an animated PNG has it after its last frame
        image.load()
        if isinstance(image, PngImagePlugin.PngImageFile):
            if PNG_KEY in image.info:
                return image.info[PNG_KEY]
            texts = [chunk[1].replace(b"\0", b":", 1) for chunk in image.private_chunks if chunk[0] == b"comf"]
        else:
            texts = [text.encode() for text in image.getexif().values() if isinstance(text, str)]
    before = f"{PNG_KEY}:".encode()
    return next((text.removeprefix(before).decode() for text in texts if text.startswith(before)), None)


def _mapping(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"where its record should be is a {type(value).__name__}")
    return value


def read_trace(path: str, index: int) -> Trace:
    """Raises ValueError for a file that holds no trace, a damaged one, or one of another version."""
    name = os.path.basename(path)
    try:
        if name.lower().endswith((".png", ".webp")):
            text = text_in(path)
            if text is None:
                raise ValueError("it carries no MIRA record (it was saved without one, or its metadata was removed)")
            traces = _mapping(json.loads(text))
            if not 0 <= index < len(traces):
                raise ValueError(f"it carries {len(traces)} record(s), so there is none of index {index}")
            return Trace.from_dict(_mapping(list(traces.values())[index]))
        with open(path, encoding="utf-8-sig") as file:  # some editors put a mark before the first character
            text = file.read()
        return Trace.from_csv(text) if name.lower().endswith(".csv") else Trace.from_dict(_mapping(json.loads(text)))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SyntaxError, RecursionError) as problem:
        raise ValueError(f"{MiraLoadTrace.NAME}: {name} cannot be read: {problem}") from problem


class MiraLoadTrace(io.ComfyNode):
    NAME = "MIRA Load Trace"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraLoadTrace",
            **aliases("load record", "open run", "history"),
            display_name=cls.NAME,
            category="MIRA Alignment/loaders",
            description="The record of an earlier run: of a picture that it saved, or of MIRA Drift Monitor's files.",
            inputs=[
                io.Combo.Input("file", options=trace_files() or [NO_FILE], tooltip="From the input or output folder."),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=9999,
                    tooltip="Which one, if a picture has several: its own first, then those of the rest of a list.",
                ),
                path_input("mira/fox_00001_.png"),
            ],
            outputs=[
                MiraTrace.Output("trace", display_name="trace", tooltip="For the MIRA Drift Monitor."),
                io.String.Output("record", display_name="record", tooltip="As JSON: for MIRA-DPO's choices."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None, path: str | None = "") -> bool | str:
        return why_not(trace_path, file, path)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, index: int, path: str | None = "") -> Any:
        return stamp(trace_path, file, path)

    @classmethod
    def execute(cls, file: str, index: int, path: str = "") -> io.NodeOutput:
        try:
            record = trace_path(chosen(file, path) or "")
        except ValueError as problem:
            raise ValueError(f"{cls.NAME}: {problem}") from None
        trace = read_trace(record, index)
        return io.NodeOutput(trace, trace.to_json())
