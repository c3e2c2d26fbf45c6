"""A grid of runs that can be killed at any point and run again: one file per finished unit, all of one configuration.

Serial, or spread over a Ray cluster (`ray_map`): the files are the same.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from testing.pack import ROOT

# What decides a result: a change of any of these files is another code version.
CODE = (
    "sampler", "rewards", "nodes/host", "nodes/preference.py", "nodes/editor/judges.py", "nodes/shared/inputs.py",
    "nodes/shared/presets.py",
    "nodes/guidance.py", "nodes/shared/job.py", "nodes/demo.py", "nodes/loaders.py", "demo", "bench/methods.py",
    "bench/paper.py", "bench/rigs.py", "testing/world.py",
)  # fmt: skip


class Failure(Exception):
    """What failed and what to do about it."""


def code_version() -> str:
    """A digest of the code and weights that results depend on."""
    digest = hashlib.sha256()
    for name in CODE:
        path = ROOT / name
        if not path.exists():
            raise FileNotFoundError(f"{name}, on which results depend, is not there: was it renamed? See bench/grid.py")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix in (".py", ".safetensors"):
                digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """A folder of finished units, `<unit>.csv` with `<unit>.pt` beside it, and the configuration they belong to."""

    def __init__(self, folder: Path, config: dict):
        self.folder, self.config = folder, config
        path = folder / "config.json"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.dumps(config, indent=1, sort_keys=True)
        if not path.is_file():
            self._replace(path, wanted.encode())
            return
        found = json.loads(path.read_text())
        if different := [k for k in sorted(config.keys() | found.keys()) if config.get(k) != found.get(k)]:
            lines = "\n".join(f"  {k}: there {found.get(k)!r}, asked for {config.get(k)!r}" for k in different)
            raise Failure(
                f"{folder} holds results of another configuration:\n{lines}\n"
                "Ask for the same again, or give another folder with --out. Nothing was changed."
            )

    def has(self, unit: str) -> bool:
        return (self.folder / f"{unit}.csv").is_file()

    def write(self, unit: str, rows: Sequence[dict], tensors: dict) -> None:
        """Whole or not at all; the rows come last, so a unit with rows has its tensors."""
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        self._replace(self.folder / f"{unit}.pt", buffer.getvalue())
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._replace(self.folder / f"{unit}.csv", text.getvalue().encode())

    def _replace(self, path: Path, data: bytes) -> None:
        part = path.with_name(path.name + f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as problem:
            part.unlink(missing_ok=True)
            what = "the disk is full" if problem.errno == errno.ENOSPC else str(problem)
            raise Failure(
                f"writing {path} failed: {what}. {self.count()} finished units are safe; make room and run it again."
            ) from problem

    def count(self) -> int:
        return len(list(self.folder.glob("*.csv")))

    def rows(self) -> list[dict]:
        """All rows of all units, numbers as numbers. Raises Failure for a file that was damaged."""
        out = []
        for path in sorted(self.folder.glob("*.csv")):
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if None in row or None in row.values():
                        raise Failure(f"{path} is damaged: delete it and run the benchmark again")
                    out.append({k: number(v) for k, v in row.items()})
        return out

    def tensors(self, unit: str) -> dict:
        return torch.load(self.folder / f"{unit}.pt", weights_only=True, map_location="cpu")


def number(text: str) -> float | str | None:
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def serial_map(work: Callable[[str], None], units: Iterable[str]) -> None:
    for unit in units:
        work(unit)


def answers(address: str, timeout: float = 5.0) -> None:
    """Ray waits for minutes for a cluster that is not there: ask first. Raises Failure."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout).close()
    except (OSError, ValueError) as problem:
        raise Failure(
            f"there is no Ray cluster at {address} ({problem}): start one with `ray start --head`, give its address as "
            "HOST:PORT, or leave --ray out"
        ) from problem


def ray_map(address: str, module: str, options: dict, units: Sequence[str], attempts: int = 3) -> None:
    """`module`'s `worker(options)` makes a function of a unit in every worker; one worker per GPU, or per CPU without.

    address: of a running cluster, or "local". A unit whose worker died is tried again, `attempts` times in all.
    Raises Failure for a cluster that is not there, and at the end for units that never worked.
    """
    try:
        import ray
    except ImportError as problem:
        raise Failure("--ray needs Ray: python -m pip install ray") from problem
    if address != "local":
        answers(address)
    runtime = {"env_vars": {k: os.environ[k] for k in ("MIRA_COMFYUI", "MIRA_GPU") if k in os.environ}}
    runtime["env_vars"]["PYTHONPATH"] = str(ROOT)
    try:
        ray.init(
            address=None if address == "local" else address, runtime_env=runtime, log_to_driver=False,
            include_dashboard=False, num_cpus=options.get("workers") if address == "local" else None,
        )  # fmt: skip
    except Exception as problem:  # Ray raises many kinds for an address that nobody answers
        raise Failure(
            f"there is no Ray cluster at {address} ({problem}): start one with `ray start --head`, give its address, "
            "or leave --ray out"
        ) from problem

    class Worker:
        def __init__(self):
            import importlib

            self.run = importlib.import_module(module).worker(options)

        def __call__(self, unit: str) -> str:
            self.run(unit)
            return unit

        run_unit = __call__

    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        count = max(1, min(len(units), gpus or options.get("workers") or int(resources.get("CPU", 1))))
        actor = ray.remote(**({"num_gpus": 1} if gpus else {"num_cpus": 1}))(Worker)
        idle, running = [actor.remote() for _ in range(count)], {}
        waiting, tries, failed = list(units), dict.fromkeys(units, 0), {}
        while waiting or running:
            while idle and waiting:
                unit, worker = waiting.pop(0), idle.pop()
                tries[unit] += 1
                running[worker.run_unit.remote(unit)] = (unit, worker)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            unit, worker = running.pop(ready)
            try:
                ray.get(ready)
                print(unit, flush=True)
            except ray.exceptions.RayError as problem:
                died = isinstance(problem, ray.exceptions.RayActorError)
                print(f"{unit}: attempt {tries[unit]} failed: {str(problem).strip().splitlines()[-1]}", flush=True)
                if tries[unit] < attempts:
                    waiting.append(unit)
                else:
                    failed[unit] = str(problem).strip().splitlines()[-1]
                if died:
                    worker = actor.remote()
            idle.append(worker)
    finally:
        ray.shutdown()
    if failed:
        lines = "\n".join(f"  {unit}: {why}" for unit, why in failed.items())
        raise Failure(f"{len(failed)} units failed {attempts} times; all others are safe:\n{lines}")
