"""Resumable results: nothing is lost, counted twice or mixed; and two Ray workers write the same files."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from bench import grid
from bench.grid import Failure, Store, code_version, ray_map, serial_map

CONFIG = {"model": "demo", "steps": 8, "code": "abc"}
ROWS = [{"method": "dno", "k": 0, "reward": 0.25, "animal": "fox"}, {"method": "dno", "k": -1, "reward": 1.5}]


def test_what_was_written_comes_back(tmp_path):
    store = Store(tmp_path / "out", CONFIG)
    store.write("a__b", ROWS, {"x": torch.arange(3)})
    again = Store(tmp_path / "out", CONFIG)
    assert again.has("a__b") and not again.has("a__c") and again.count() == 1
    assert again.rows() == [ROWS[0], {"method": "dno", "k": -1.0, "reward": 1.5, "animal": None}]
    assert torch.equal(again.tensors("a__b")["x"], torch.arange(3))


def test_another_configuration_is_refused_and_left_alone(tmp_path):
    Store(tmp_path, CONFIG).write("a", ROWS, {})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(Failure, match=r"code: there 'abc', asked for 'def'(.|\n)*another folder with --out"):
        Store(tmp_path, CONFIG | {"code": "def"})
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path, CONFIG)
    store.write("a", ROWS, {})

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failure, match=r"the disk is full\. 1 finished units are safe"):
        store.write("b", ROWS, {})
    monkeypatch.undo()
    assert not store.has("b") and not list(tmp_path.glob("*.part")) and len(store.rows()) == 2


def test_killed_between_its_two_files_a_unit_is_not_done(tmp_path, monkeypatch):
    store, real = Store(tmp_path, CONFIG), Store._replace

    def dying(self, path, data):
        if path.suffix == ".csv":
            raise KeyboardInterrupt
        real(self, path, data)

    monkeypatch.setattr(Store, "_replace", dying)
    with pytest.raises(KeyboardInterrupt):
        store.write("a", ROWS, {})
    monkeypatch.undo()
    assert not store.has("a")
    store.write("a", ROWS, {})
    assert len(store.rows()) == 2


def test_a_damaged_file_is_named(tmp_path):
    store = Store(tmp_path, CONFIG)
    store.write("a", ROWS[:1], {})
    path = tmp_path / "a.csv"
    path.write_text(path.read_text()[:-8])
    with pytest.raises(Failure, match=r"a\.csv is damaged: delete it"):
        store.rows()


def test_the_code_version_changes_with_the_code(tmp_path, monkeypatch):
    before = code_version()
    assert before == code_version() and len(before) == 12
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    monkeypatch.setattr(grid, "CODE", ("x.py",))
    (tmp_path / "x.py").write_text("1")
    one = code_version()
    (tmp_path / "x.py").write_text("2")
    assert code_version() != one
    (tmp_path / "x.py").rename(tmp_path / "y.py")
    with pytest.raises(FileNotFoundError, match=r"x\.py, on which results depend, is not there"):
        code_version()


def test_serial_runs_all_in_order():
    seen = []
    serial_map(seen.append, ["a", "b"])
    assert seen == ["a", "b"]


# What the Ray workers run: a module of this name in every process.
WORKER = """
import os
from pathlib import Path
from bench.grid import Store

def worker(options):
    store = Store(Path(options["out"]), options["config"])
    def run(unit):
        marker = Path(options["out"]) / (unit + ".tried")
        if unit == "dies" and not marker.exists():
            marker.touch()
            os._exit(1)
        if unit == "never":
            raise ValueError("this unit never works")
        if not store.has(unit):
            store.write(unit, [{"unit": unit, "pid": os.getpid()}], {})
    return run
"""


@pytest.fixture
def ray_worker(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    folder = tmp_path / "module"
    folder.mkdir()
    (folder / "grid_worker.py").write_text(WORKER)
    monkeypatch.setattr(grid, "ROOT", Path(os.pathsep.join([str(grid.ROOT), str(folder)])))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they starve beside other tests
    yield {"out": str(tmp_path / "out"), "config": CONFIG, "workers": 2}
    ray.shutdown()


def test_two_ray_workers_write_the_same_files_survive_a_death_and_name_what_never_works(tmp_path, ray_worker, capsys):
    """In one start of Ray, which takes its time."""
    units = ["a", "b", "dies", "never", "c", "d"]
    with pytest.raises(Failure, match=r"1 units failed 2 times(.|\n)*never: .*this unit never works"):
        ray_map("local", "grid_worker", ray_worker, units, attempts=2)
    rows = Store(tmp_path / "out", CONFIG).rows()
    assert sorted(r["unit"] for r in rows) == sorted({*units} - {"never"})
    assert len({r["pid"] for r in rows}) >= 2
    assert "dies: attempt 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there(address):
    pytest.importorskip("ray")
    with pytest.raises(Failure, match=rf"no Ray cluster at {address} .*leave --ray out"):
        ray_map(address, "grid_worker", {}, ["a"])


def test_without_ray_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Failure, match="pip install ray"):
        ray_map("local", "x", {}, ["a"])
