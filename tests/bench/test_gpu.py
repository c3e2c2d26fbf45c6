"""The measurements on a GPU, rehearsed with small networks on whatever is here."""

from __future__ import annotations

import json
import os

import pytest

from bench import gpu
from testing.pack import ROOT

pytestmark = pytest.mark.skipif(not os.environ.get("MIRA_COMFYUI"), reason="needs a ComfyUI")


def test_pieces_run_in_processes_of_their_own_and_are_not_run_again(tmp_path, capfd):
    assert gpu.run_all(tmp_path, ["leaks", "repeat"], small=True) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["pieces"]["leaks"]["flat"] and len(found["pieces"]["leaks"]["live_tensors"]) == 3
    assert all(row["same_bits"] for name, row in found["pieces"]["repeat"].items() if "repeatable" in name)
    page = (tmp_path / "gpu.md").read_text()
    assert (
        "measures nothing" in page and "Not measured yet: tests-core" in page and "| demo, none, repeatable |" in page
    )
    capfd.readouterr()
    assert gpu.run_all(tmp_path, ["leaks"], small=True) == 0
    assert "leaks: there already" in capfd.readouterr().out


def test_rows_are_kept_as_they_come_and_gone_on_after(tmp_path, monkeypatch):
    asked = []

    def measure(name, problem=None):
        asked.append(name)
        if problem:
            raise problem
        return {"seconds": 1.0}

    table = gpu.Table(tmp_path / "speed.json")
    table.row("first", lambda: measure("first"))
    table.row("full", lambda: measure("full", RuntimeError("unable to find an engine\nof any kind")))
    for _ in range(gpu.BEGINS):  # as where the process is killed in it
        with pytest.raises(SystemExit):
            gpu.Table(tmp_path / "speed.json").row("long", lambda: measure("long", SystemExit()))
    with pytest.raises(KeyboardInterrupt):  # a person's, which counts for nothing
        gpu.Table(tmp_path / "speed.json").row("last", lambda: measure("last", KeyboardInterrupt()))
    table = gpu.Table(tmp_path / "speed.json")
    for name in ("first", "full", "long", "last"):
        table.row(name, lambda name=name: measure(name))
    assert asked == ["first", "full", *["long"] * gpu.BEGINS, "last", "last"]
    kept = json.loads((tmp_path / "speed.part").read_text())
    assert kept["first"] == kept["last"] == {"seconds": 1.0} and kept["full"] == {
        "failed": "RuntimeError: unable to find an engine"
    }
    assert "took longer" in kept["long"]["failed"]
    monkeypatch.setattr(gpu, "LIMIT", table.longest / 2)
    with pytest.raises(SystemExit):
        table.row("another", lambda: measure("another"))
    assert asked[-1] == "last" and "another" not in table.rows
    (tmp_path / "speed.part").rename(tmp_path / "speed-sd15-fp16.part")
    gpu.gather(tmp_path, small=True)
    page = (tmp_path / "gpu.md").read_text()
    assert "## speed-sd15-fp16 (unfinished)" in page and "| first | 1 |" in page


def test_whole_networks_are_not_begun_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MIRA_GPU", "")
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "add --gpu" in capsys.readouterr().err


def test_a_piece_that_fails_is_said_and_left_for_the_next_time(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MIRA_COMFYUI", str(tmp_path))
    assert gpu.run_all(tmp_path / "out", ["leaks"], small=True) == 1
    assert "leaks: FAILED" in capfd.readouterr().out and not (tmp_path / "out" / "leaks.json").exists()


def test_the_tables_say_what_was_measured():
    measured = json.loads((ROOT / "docs" / "results" / "gpu.json").read_text())
    first, second = measured["pieces"], measured["27 November 2026"]["pieces"]

    def of(piece, way):
        return (second.get(piece) or first[piece])[way]["iteration_over_sample"]

    cards = (ROOT / "README.md").read_text().partition("| 6 GB |")[2].splitlines()
    assert all("failed" not in first[f"card-sd15-6-{pixels}"]["last 3"] for pixels in (512, 768))
    assert f"an iteration takes {of('card-sdxl-12-1024', 'last 3'):.1f} plain pictures' time" in cards[1]
    assert f"the same, {of('card-sdxl-16-1024', 'last 3'):.1f} |" in cards[2]
    few_steps = of("speed-flow-bf16", "auto")  # of which there are eight: through all, as it comes
    assert f"8 steps: {few_steps:.1f};" in cards[3]
    table = (ROOT / "docs" / "gpu.md").read_text().partition("| | none |")[2]
    for piece in ("speed-sdxl-fp16", "speed-sd15-fp16", "speed-flow-bf16"):
        row = next(line for line in table.splitlines()[1:] if f"{of(piece, 'per_step'):.2f}" in line)
        repeatable = "per_step, repeatable" if "sdxl" in piece else "auto"
        assert all(f"{of(piece, way):.2f}" in row for way in (repeatable, "auto, last 3"))


def test_every_piece_has_a_size_that_its_model_is_known_at():
    assert all(model in gpu.SIDES and model in gpu.DTYPES for model in gpu.MODELS)
    assert len(set(gpu.PIECES)) == len(gpu.PIECES)
