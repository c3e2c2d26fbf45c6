"""How the paths of restarts are read."""

from __future__ import annotations

import pytest
import torch

from bench.front import judge_module
from bench.restart import COLUMNS, Variant, against, at_last_passage, path_of, pooled, run
from testing.world import World, demo


def test_a_run_that_ended_sooner_stays_where_it_ended():
    rows = [
        {c: 10.0 * part + k for c in COLUMNS} | {"iterate": float(k), "part": part, "animal": "fox"}
        for part, length in ((0, 2), (1, 3))
        for k in range(length)
    ]
    images, path = path_of(rows)
    assert images == [(0, "fox"), (1, "fox")]
    assert path[0].tolist() == [[0, 10], [1, 11], [1, 12]]


def test_a_path_is_read_at_its_last_passage():
    rewards = torch.tensor([0.0, 2.0, 0.0, 2.0, 1.0])
    path = torch.stack([torch.arange(5.0), rewards])
    assert at_last_passage(path, 1.5) == pytest.approx([2.75, 1.5])
    assert at_last_passage(path, 3.0) is None


def path(rewards: list[float], adherences: list[float], images: int = 4) -> torch.Tensor:
    columns = {"reward": rewards, "adherence": adherences}
    rows = [torch.tensor(columns.get(c, [0.0] * len(rewards))) for c in COLUMNS]
    return torch.stack(rows)[:, :, None].expand(-1, -1, images)


def test_what_plain_optimisation_never_reaches_is_compared_with_its_best():
    """It has less of the reward there: the difference is rather too small. Below its way there is none."""
    plain, animals = path([0.0, 1.0, 2.0], [0.9, 0.7, 0.5]), ["fox", "cat", "dog", "owl"]
    within = against(path([1.5], [0.8]), plain, animals, None)
    beyond = against(path([3.0], [0.8]), plain, animals, None)
    assert within["adherence_above"] == pytest.approx(0.2) and within["resamples_reached"] == 1
    assert beyond["adherence_above"] == pytest.approx(0.3) and beyond["resamples_reached"] == 0
    assert against(path([-1.0], [0.8]), plain, animals, None) is None
    assert against(path([0.0, 3.0], [0.8, 0.8]), plain, animals, 2.5) is None
    together = pooled({"a": within, "b": beyond})
    assert together["adherence_above"] == pytest.approx(0.25) and together["p"] == 0 == together["resamples_reached"]


def test_the_best_of_more_samples_has_more_of_the_reward():
    clip = demo.demo_clip_score()
    judge = judge_module.load_judge()
    variant = Variant(best_of=(1, 4))
    rows, observer = run(World(side=8), judge, clip, variant, "brightness", part=0, steps=2, seed=0, count=2)
    of = {(r["animal"], r["passes"]): r["reward"] for r in rows}
    assert [r["kept"] for r in rows] == [0, 0, 1, 1] and len(observer.shown) == 2
    animals = {animal for animal, _ in of}
    assert len(animals) == 2 and all(of[a, 4.0] >= of[a, 1.0] for a in animals)
    assert any(of[a, 4.0] > of[a, 1.0] for a in animals)
