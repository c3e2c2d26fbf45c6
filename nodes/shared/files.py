"""The files that reward loaders offer, found in ComfyUI's model folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import folder_paths

from ...rewards.files import SHARD
from ...rewards.known import Published

FOLDER = "mira_rewards"
NPNETS = "npnets"  # where other packs look for golden noise networks, too
WEIGHTS = {".safetensors", ".sft", ".pt", ".pth", ".bin"}
INDEX = ".index.json"
ABSENT = " (not there yet)"  # after a published file's name that a loader offers in place of any


def register() -> None:
    """Make the pack's model folders known to ComfyUI, beside what extra_model_paths.yaml may have added."""
    for folder, kinds in ((FOLDER, WEIGHTS | {".json", ".py"}), (NPNETS, WEIGHTS)):
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
        paths, known = folder_paths.folder_names_and_paths[folder]
        folder_paths.folder_names_and_paths[folder] = (paths, set(known) | kinds)
    path = os.path.join(folder_paths.models_dir, FOLDER)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as problem:
        logging.getLogger("mira").warning("MIRA: %s could not be made (%s): make it to add rewards", path, problem)


def _weights(folder: str) -> list[str]:
    """Weight files, and the index in place of the shards that it names."""
    names = folder_paths.get_filename_list(folder)
    return [n for n in names if (Path(n).suffix in WEIGHTS and not SHARD.search(n)) or n.endswith(INDEX)]


def weights(*stock: str) -> list[str]:
    """Names found in mira_rewards and in these folders of ComfyUI's."""
    return list(dict.fromkeys(name for folder in (FOLDER, *stock) for name in _weights(folder)))


def scripts() -> list[str]:
    return [n for n in folder_paths.get_filename_list(FOLDER) if n.endswith(".py")]


def offered(names: list[str], published: Published, like: str = "") -> dict:
    """options and default of a file input: what is there, else the published name as absent, so that a new node says
    what it wants, and the editor sees that a workflow's file is missing. like: part of the name of those preferred.
    """
    options = names or [published.file + ABSENT]
    wanted = [n for n in options if like.lower() in n.lower()]
    return {"options": options, "default": (wanted or options)[0]}


def npnets() -> list[str]:
    return _weights(NPNETS)


def find(name: str, *stock: str) -> Path | None:
    name = name.removesuffix(ABSENT)
    for folder in (FOLDER, *stock):
        path = folder_paths.get_full_path(folder, name)
        if path:
            return Path(path)
    return None


def stamp(*names: str | None, stock: Sequence[str] = ()) -> str:
    """For a loader's `fingerprint_inputs`: another one when one of these files has changed. Whatever is no file's name
    has none; nor has one that comes from another node, whose name ComfyUI sees and not its file: to read gigabytes at
    every queueing would be worse.
    """
    found: list[Path] = []
    for path in filter(None, (find(name, *stock) for name in names if isinstance(name, str))):
        shards = [p for p in path.parent.iterdir() if SHARD.search(p.name)] if path.name.endswith(INDEX) else []
        found += [path, *sorted(shards)]
    return written(*found)


def written(*paths: str | Path) -> str:
    """Another text when one of these files was written again. Raises OSError."""
    return " ".join(f"{s.st_mtime_ns}:{s.st_size}" for s in map(os.stat, paths))


def missing(name: str | None, published: Published, *stock: str, into: str = FOLDER) -> str | None:
    """What to do about a file that is not there, or None. A name that is not known yet is None."""
    if name is None or find(name, *stock):
        return None
    folders = " or ".join(f"models/{f}" for f in (FOLDER, *stock))
    there = f", where it is {published.there}" if published.there else ""
    return (
        f"{name.removesuffix(ABSENT)} is not in {folders}. The published file is {published.file} (about "
        f"{published.gigabytes:g} GB) of {published.model}{there}: download it into models/{into} and refresh the node "
        "list (key R)"
    )
