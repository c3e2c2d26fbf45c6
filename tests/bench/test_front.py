"""The comparison of two paths, on paths whose distance is known."""

from __future__ import annotations

import csv

import pytest

from bench import front
from bench.front_tables import compare, compare_curves, curves, draws, report, seeds, several
from bench.grid import Failure
from testing.world import World, demo


def rows(slope, reach=10, images=6, lift=0.0):
    """reward = k, adherence = 1 - slope k (+ lift once it moves), for every image alike but for an offset."""
    return [
        {"iteration": k, "part": 0, "animal": f"a{b}", "reward": float(k)}
        | {"adherence": 1 - slope * k + lift * (k > 0) + b}
        for k in range(reach + 1)
        for b in range(images)
    ]


def test_no_runs_make_no_tables(tmp_path):
    (tmp_path / "front.csv").write_text("what was measured")
    with pytest.raises(Failure, match="holds runs"):
        report(tmp_path / "raw", tmp_path)
    assert (tmp_path / "front.csv").read_text() == "what was measured"


def test_equal_paths_do_not_differ():
    found = compare(rows(0.05), rows(0.05), "adherence")
    assert [found[n] for n in ("quarter", "half", "three_quarters", "area")] == pytest.approx([0] * 4)
    assert found["area_se"] == pytest.approx(0, abs=1e-9) and found["gain"] == 1 and found["images"] == 6


def test_the_difference_is_read_at_equal_reward():
    found = compare(rows(0.03), rows(0.05), "adherence")
    assert [found[n] for n in ("quarter", "half", "three_quarters")] == pytest.approx([0.05, 0.1, 0.15])
    assert found["area"] == pytest.approx(0.02 * 10 * 0.8 * (12 + 1) / 2 / 12)


def test_what_is_not_reached_is_not_compared():
    found = compare(rows(0.03, reach=5), rows(0.05), "adherence")
    assert found["half"] == pytest.approx(0.1) and found["three_quarters"] != found["three_quarters"]
    assert found["gain"] == 0.5


def test_curves_pair_images():
    images, values = curves(rows(0.05, images=3), ("reward", "adherence"))
    assert images == [(0, "a0"), (0, "a1"), (0, "a2")] and values.shape == (2, 11, 3)
    assert values[1, 0].tolist() == [1, 2, 3]


def test_of_several_seeds_the_best_reward_is_kept():
    def of(shift):
        return [r | {"reward": r["reward"] + shift, "clip_score": 0.0} for r in rows(0.05, reach=2, images=2)]

    runs = {("b", "dno"): of(0.0), ("b", "dno_again_1"): of(1.0), ("b", "dno_again_2"): of(2.0)}
    paths = draws(runs, "b")
    found = {(r["seeds"], r["iterations"]): r for r in seeds(paths, "b")}
    assert [found[n, 0]["reward"] for n in (1, 2, 3)] == pytest.approx([1, (1 + 2 + 2) / 3, 2])
    assert found[3, 2]["cost"] == 21 and found[3, 2]["reward"] == 4
    assert draws({("b", "dno"): of(0.0)}, "b") is None
    # Two draws reach a reward 2 / 3 earlier, when adherence is higher by .05 times as much.
    compared = compare_curves(several(paths, 2)[:2], several(paths, 1)[:2])
    assert compared["three_quarters"] == pytest.approx(0.05 * 2 / 3, abs=1e-4) and compared["images"] == 2


def test_variants_of_their_own_making_begin_where_plain_optimisation_does(tmp_path, monkeypatch):
    for name, value in {"COUNT": 2, "STEPS": 2, "ITERATIONS": 1, "SCALES": (0.0, 1.0), "RAW": tmp_path}.items():
        monkeypatch.setattr(front, name, value)
    world, judge, clip = World(side=8), front.judge_module.load_judge(), demo.demo_clip_score()
    names = ("dno", "typicality", "clip_features")
    for name in names:
        front.run(world, judge, clip, name, "brightness", 0)
    front.run_guided(world, judge, clip, "brightness", 0)
    of = {name: list(csv.DictReader(front.file_of(name, "brightness").open())) for name in (*names, "dymo")}
    begun = {name: [row["reward"] for row in rows[:2]] for name, rows in of.items()}
    assert begun == dict.fromkeys(of, begun["dno"])
    assert all(len(rows) == 4 and rows[2]["reward"] != rows[0]["reward"] for rows in of.values())
