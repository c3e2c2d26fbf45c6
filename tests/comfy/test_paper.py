"""The benchmark of the paper's comparison, small: what it counts, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import sys

import pytest

from bench import paper
from bench.grid import Failure, Store
from bench.methods import ALL, METHODS, halving_cost, lengths, most_to_halve

SMALL = ["--animals", "5", "--seeds", "1", "--iterations", "1", "--steps", "2", "--rewards", "JPEG"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(paper, "BASE", 1)
    monkeypatch.setattr(sys, "argv", ["paper", *SMALL, *map(str, arguments)])
    return paper.main()


def test_every_kind_of_method_at_the_cost_that_it_says(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "out"
    monkeypatch.setitem(paper.BLOCK, "demo", 2)
    monkeypatch.setattr(f"{__name__}.SMALL", [*SMALL, "--animals", "2", "--pixels", "64"])
    methods = ("dno", "fk_steering", "halving", "das", "mira_dpo", "dymo", "rlg")
    assert run(monkeypatch, "--out", folder, "--methods", *methods) == 0
    store = Store(folder, json.loads((folder / "config.json").read_text()))
    rows = [r for r in store.rows() if r.get("k") == -1]
    assert len(rows) == 12 and all(r["reward"] < 0 and 0 <= r["adherence"] <= 1 for r in rows)
    cost = {r["method"]: (r["forward"], r["backward"]) for r in rows}
    # Budget 4, two steps each. DNO: two runs and one backward. FK: the plain sample and three particles. DAS: the plain
    # sample, and one particle that is looked at and steered. DPO: both candidates, there and back, once. DyMO: one
    # sample, whose first step is left alone; RLG has no tuned model for this reward.
    assert cost == {
        "dno": (4, 2),
        "fk_steering": (8, 0),
        "halving": (2 * halving_cost(most_to_halve(4), 2), 0),
        "das": (4, 2),
        "mira_dpo": (4, 4),
        "dymo": (2, 1),
    }
    assert [r["k"] for r in store.rows() if r["method"] == "dno" and r["animal"] == "cat"] == [0, 1, -1]
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    capsys.readouterr()
    assert run(monkeypatch, "--out", folder, "--methods", "dno", "fk_steering", "das", "mira_dpo") == 0
    assert "5 units, 5 done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert run(monkeypatch, "--out", folder, "--report", folder / "report") == 0
    assert "| das | 2 |" in (folder / "report" / "paper.md").read_text()
    with pytest.raises(Failure, match="results of another configuration"):
        run(monkeypatch, "--out", folder, "--steps", "3")


def test_prompts_of_a_file_take_the_animals_place(monkeypatch, tmp_path):
    monkeypatch.setitem(paper.BLOCK, "demo", 2)
    sets = tmp_path / "sets.json"
    sets.write_text(json.dumps({"pairs": [{"prompt": p} for p in ("a cat and a frog", "a dog and a lion", "a horse")]}))
    arguments = ["--out", tmp_path / "out", "--methods", "dno", "--prompts", sets, "--set", "pairs", "--animals", "2"]
    assert run(monkeypatch, *arguments) == 0
    rows = Store(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text())).rows()
    assert {r["animal"] for r in rows} == {"a cat and a frog", "a dog and a lion"}
    assert all(r["clip_score"] > 0 and "adherence" not in r for r in rows)  # the judge knows animals alone
    assert run(monkeypatch, "--out", tmp_path / "out", "--report", tmp_path / "report") == 0
    assert "plain" in (tmp_path / "report" / "paper_wins.csv").read_text()
    lines = tmp_path / "prompts.txt"
    lines.write_text("a fox in snow\n\n a fox in snow \na red car\n")
    assert paper.read_prompts(lines, None) == ["a fox in snow", "a red car"]
    table, of_each = tmp_path / "PartiPrompts.tsv", tmp_path / "geneval.jsonl"
    table.write_text('Prompt\tCategory\nyin-yang\tAbstract\n"a" red car\tVehicles\nyin-yang\tAbstract\n')
    assert paper.read_prompts(table, None) == ["yin-yang", '"a" red car']
    of_each.write_text('{"tag": "one", "prompt": "a photo of a bench"}\n{"tag": "one", "prompt": "a photo of a cow"}\n')
    assert paper.read_prompts(of_each, None) == ["a photo of a bench", "a photo of a cow"]
    table.write_text("Text\tCategory\nyin-yang\tAbstract\n")
    with pytest.raises(Failure, match=r"cannot be read: KeyError\('prompt'\)"):
        paper.read_prompts(table, None)
    with pytest.raises(Failure, match="has the sets pairs: choose one with --set"):
        paper.read_prompts(sets, None)
    with pytest.raises(Failure, match="cannot be read"):
        paper.read_prompts(tmp_path / "none.txt", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards", "hps"], "--rewards hps needs --hps, a file"),
        (["--animals", "7"], "5 at a time"),
        (["--animals", "50"], "there are 45 animals"),
        (["--model", "sd15"], "needs --checkpoint FILE"),
        (["--model", "sd15", "--checkpoint", "/nowhere/model.safetensors"], "there is no such file"),
        (["--model", "pixart", "--checkpoint", __file__], "needs --text-encoder"),
        (["--aesthetic-head", "x.pth"], "needs --clip"),
    ],
)
def test_bad_input(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(Failure, match=message):
        run(monkeypatch, "--out", tmp_path / "out", *arguments)


@pytest.mark.parametrize("budget", [19, 31, 151])
def test_no_method_asks_for_more_than_the_budget(budget):
    """In plain samples, a backward pass counting two; the rules that docs/benchmark.md gives."""
    for name, method in METHODS.items():
        s = method.settings(budget, "brightness", 0.01, 8)
        if method.guider:
            cost = s.particles * {"dymo": 3, "rlg": 2, "aig": 2}[name]
        elif hasattr(s, "particles"):
            cost = {
                "halving": halving_cost(s.particles), "best_of_n": s.particles,
                "zero_order": 1 + s.rounds * s.particles, "fk_steering": 1 + s.particles,
                "code": 1 + s.particles, "das": 1 + 3 * s.particles,
                "ntrk": 1 + 3 * s.particles * (1 + (s.rounds - 1) * (8 - s.restart_step(8)) / 8),
                "mira_fk": 2 + s.rounds * s.particles * (3 * s.iterations + 1),
            }[s.method]  # fmt: skip
        elif hasattr(s, "explore"):
            cost = {"dpo": 6 * s.iterations, "dueling": 1 + s.iterations, "hybrid2": 8 * s.iterations}[s.method]
        else:
            an_iteration = 1 + 2 * (method.gradient_steps or 8) / 8
            cost = (s.seeds if s.seeds > 1 else 0) + an_iteration * s.iterations + 1 + 2 * (len(lengths(s)) - 1)
        assert budget / 3 < cost <= budget, name


def test_every_method_has_settings_for_every_reward():
    for method in ALL.values():
        for reward in paper.REWARDS:
            assert method.settings(4, reward, 0.01, 8).lr > 0
    assert {"dno", "dno_prno", "mira", "reno", "initno", "best_of_n", "das", "mira_dpo", "hybrid2"} <= METHODS.keys()
