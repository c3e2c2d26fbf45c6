"""The files of ComfyUI's input and output folders: what runs have made, and what people have put there."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .files import written

MOST_LISTED = 300


# Seconds after which a folder whose time is the same is the same: file systems' clocks are coarse. And for how long it
# is believed, as some (of networks, of clouds) do not note when a folder changed.
SETTLED, STALE = 2.0, 30.0

# By the output folder and suffixes: when it was looked at, the time of every folder in it, and the newest files.
_known: dict[tuple, tuple[float, dict[str, float], list[str]]] = {}


def listed(suffixes: Sequence[str]) -> list[str]:
    """The files of the input folder, and the newest ones of the output folder: all of somebody's images would make up
    most of what ComfyUI tells of its nodes. Any other is given by its name.
    """
    suffixes = tuple(suffixes)
    names = [f for f in sorted(os.listdir(folder_paths.get_input_directory())) if f.lower().endswith(suffixes)]
    return names + [f"{name} [output]" for name in _newest(folder_paths.get_output_directory(), suffixes)]


def _newest(output: str, suffixes: tuple[str, ...]) -> list[str]:
    """Nothing is looked at again while no folder has changed: ComfyUI asks several times for every prompt."""
    if known := _known.get((output, suffixes)):
        looked, folders, newest = known
        with contextlib.suppress(OSError):
            if 0 <= time.time() - looked < STALE and all(
                os.path.getmtime(folder) == at for folder, at in folders.items()
            ):
                return newest
    folders, made, now = {}, [], time.time()
    with contextlib.suppress(OSError):
        folders[output] = os.path.getmtime(output)
    for folder, inner, files in os.walk(output):
        for name in inner:  # before they are looked into, so that what comes meanwhile is a change
            with contextlib.suppress(OSError):
                folders[os.path.join(folder, name)] = os.path.getmtime(os.path.join(folder, name))
        for name in files:
            if name.lower().endswith(suffixes):
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):  # it went meanwhile
                    made.append((os.path.getmtime(path), os.path.normpath(os.path.relpath(path, output))))
    newest = [name for _, name in sorted(made, reverse=True)[:MOST_LISTED]]
    _known.pop((output, suffixes), None)
    if now - max(folders.values(), default=now) > SETTLED:
        _known[output, suffixes] = now, folders, newest
    return newest


def chosen(file: str | None, path: str) -> str | None:
    """What is to be read: `path`, in the output folder unless it names another (`fox.png [temp]`), or else `file`."""
    path = path.strip().strip('"')  # as a file manager copies it
    if not path:
        return file
    return path if path.endswith("]") else f"{path} [output]"


def path_input(example: str) -> io.String.Input:
    """Beside a list of files, and last of a node's inputs."""
    return io.String.Input(
        "path",
        default="",
        optional=True,
        tooltip=(
            f"One that is not in the list of the newest {MOST_LISTED}: its path in the output folder, as {example}. "
            "Given, it counts instead of file."
        ),
    )


def found(file: str, suffixes: Sequence[str], remedy: str) -> str:
    """The path of a file in ComfyUI's folders. Raises ValueError for any other: a workflow comes from strangers."""
    if not isinstance(file, str) or not file:
        raise ValueError(f"file is empty: {remedy}")
    outside = f"{file} lies outside of ComfyUI's input, output and temp folders: {remedy}"
    try:
        path = os.path.realpath(folder_paths.get_annotated_filepath(file))
    except ValueError:  # newer ones look themselves
        raise ValueError(outside) from None
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    )
    if not any(Path(path).is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise ValueError(outside)
    if not path.lower().endswith(tuple(suffixes)):
        raise ValueError(f"{file} is none of {', '.join(suffixes)}: {remedy}")
    if not os.path.exists(path):
        raise ValueError(f"{file} is not there: {remedy}, and refresh the nodes (key R)")
    if not os.path.isfile(path):
        raise ValueError(f"{file} is no regular file: {remedy}")
    return path


def why_not(find: Callable[[str], str], file: str | None, path: str | None = "") -> bool | str:
    """For a node's `validate_inputs`: what `find` has against what is `chosen`, or True; None is not known yet."""
    try:
        if path is not None and (name := chosen(file, path)) is not None:
            find(name)
    except ValueError as problem:
        return str(problem)
    return True


def stamp(find: Callable[[str], str], file: str | None, path: str | None = "") -> str | float:
    """For a node's `fingerprint_inputs`: another one when the file has changed, and always of one not known yet."""
    if path is None or (name := chosen(file, path)) is None:
        return math.nan
    try:
        name = find(name)
    except ValueError:
        return ""
    return written(name)
