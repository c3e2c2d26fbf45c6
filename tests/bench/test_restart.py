"""How the paths of restarts are read."""

from __future__ import annotations

import pytest
import torch

from bench.front import judge_module
from bench.likeness import Likeness, beside, stacked
from bench.likeness import against as likeness_against
from bench.paths import COLUMNS, against, at_equal_passes, at_last_passage, path_of, pooled
from bench.restart import Variant, best_of_draws, chosen_within, first_rounds, run, together_with
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


def test_at_equal_passes():
    """Beside a path of two, four and six passes: after five, half-way between its last two; after nine, at its end."""
    plain, animals = path([0.0, 1.0, 2.0], [0.9, 0.7, 0.5]), ["fox", "cat", "dog", "owl"]
    plain = plain.clone()
    plain[0] = torch.tensor([2.0, 4.0, 6.0])[:, None]
    mine = path([1.0], [0.8])[:, 0]
    after = {passes: at_equal_passes(mine, plain, animals, passes) for passes in (1.0, 5.0, 9.0)}
    assert [a["reward_at_equal_passes"] for a in after.values()] == pytest.approx([1.0, -0.5, -1.0])
    assert [a["adherence_at_equal_passes"] for a in after.values()] == pytest.approx([-0.1, 0.2, 0.3])
    assert after[5.0]["adherence_at_equal_passes_se"] == pytest.approx(0, abs=1e-6)


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


@pytest.mark.parametrize(
    ("variant", "passes"),
    [
        (Variant(fk=(2, 3)), [4, 5]),
        (Variant({"iterations": 2}, first=0.8), [3, 6, 9]),
        (Variant(fk=(2,), then=0.5), [5]),
        (Variant(searched=2), [2, 5, 8.2, 11.4]),
    ],
    ids=["fk", "restarted first", "fk restarted", "searched"],
)
def test_what_a_path_costs_and_how_its_images_are_remembered(variant, passes):
    world, judge, clip = World(side=8), judge_module.load_judge(), demo.demo_clip_score()
    rows, observer = run(world, judge, clip, variant, "brightness", part=0, steps=2, seed=0, count=2)
    assert [r["passes"] for r in rows[::2]] == passes[: len(rows) // 2]
    found = stacked(observer.embeddings)
    assert {name: e.shape[:2] for name, e in found.items()} == dict.fromkeys(("clip", "judge"), (len(rows) // 2, 2))


def test_a_files_size_is_counted_where_an_estimate_of_it_is_optimised():
    """Sizes are whole bytes, in kilobytes."""
    world, judge, clip = World(side=8), judge_module.load_judge(), demo.demo_clip_score()
    rows, _ = run(world, judge, clip, Variant({"iterations": 1}), "JPEG", part=0, steps=2, seed=0, count=2)
    sizes = [-1000 * r["reward"] for r in rows]
    assert len(sizes) == 4 and all(size > 500 and abs(size - round(size)) < 1e-2 for size in sizes)


def test_the_best_of_several_draws_is_chosen_at_every_iterate_and_costs_all_of_them():
    def draw(seed, rewards):
        of = {"animal": "fox", "part": ("0", seed), "passes": 2.0, "adherence": 0.5}
        return [of | {"iterate": float(k), "reward": r} for k, r in enumerate(rewards)]

    best = best_of_draws([draw("0", [1.0, 5.0]), draw("1", [3.0, 4.0]), draw("0", [2.0])])
    assert [(r["reward"], r["passes"], r["kept"]) for r in best] == [(3.0, 6.0, 1.0)]
    assert best_of_draws([draw("0", [1.0]), draw("1", [2.0])])[0]["part"] == ("0", "0")


def test_likeness_to_the_models_own_images():
    g = torch.Generator().manual_seed(0)

    def around(place, *shape):
        features = torch.randn(*shape, 8, generator=g) + place
        return {"clip": torch.nn.functional.normalize(features, dim=-1), "judge": features}

    like = Likeness(around(0.0, 60))
    near, far = like(around(0.0, 40)), like(around(4.0, 40))
    assert near["natural"] > 0.7 and far["natural"] < 0.1 and far["cmmd"] > 5 * near["cmmd"]
    # Plain optimisation goes away from them while its reward rises to 1; what is compared has half of that.
    path = [around(4.0 * k / 4, 40) for k in range(5)]
    plain = {name: torch.stack([p[name] for p in path]) for name in path[0]}
    rewards = torch.linspace(0, 1, 5)[:, None].expand(5, 40)
    animals = [f"animal {n}" for n in range(40)]
    found = likeness_against(around(0.0, 40), torch.full((40,), 0.5), plain, rewards, animals, like)
    at_half = like(path[2])
    assert found["plain_cmmd"] == pytest.approx(at_half["cmmd"]) and found["cmmd"] < found["plain_cmmd"]
    assert found["natural"] > found["plain_natural"] == pytest.approx(at_half["natural"])
    above = torch.full((40,), -0.5)  # what plain optimisation begins above
    assert likeness_against(around(0.0, 40), above, plain, rewards, animals, like) is None
    beyond = likeness_against(around(0.0, 40), above + 2, plain, rewards, animals, like)
    assert beyond["plain_cmmd"] == pytest.approx(like(path[-1])["cmmd"])
    assert 0 < found["cmmd_above_se"] < found["plain_cmmd"] - found["cmmd"]
    ends = beside([{"clip": torch.ones(2, 3, 4)}, {"clip": torch.zeros(1, 1, 4)}])
    assert ends["clip"].shape == (2, 4, 4)


def image(rewards, drifts, kept, animal="fox", part=("0", "0")) -> list[dict]:
    return [
        dict.fromkeys(COLUMNS, 0.0)
        | {"iterate": float(k), "part": part, "animal": animal, "reward": r, "path_kl": d, "kept": float(k == kept)}
        for k, (r, d) in enumerate(zip(rewards, drifts, strict=True))
    ]


def test_the_first_rounds_of_a_longer_run():
    """A round begins where nothing has moved; of an image that was kept later, the best of what is left is kept."""
    drifts = [0.0, 0.1, 0.0, 0.1, 0.2, 0.0, 0.3]
    late = image([0, 3, 1, 2, 4, 5, 9], drifts, 6, "late")
    early = image([0, 8, 1, 2, 4, 5, 6], [0.0, 0.1, 0.0, 0.1, 0.2, 0.0, 0.0], 1, "early")
    found = first_rounds(late + early, 2)
    assert {(r["animal"], r["iterate"]) for r in found} == {(a, k) for a in ("late", "early") for k in range(5)}
    assert {(r["animal"], r["iterate"]) for r in found if r["kept"]} == {("late", 4), ("early", 1)}
    assert len(first_rounds(late, 1)) == 2 and len(first_rounds(late, 3)) == 7


def test_every_image_s_best_within_a_drift():
    rows = image([1, 5, 3], [0.0, 0.4, 0.2], 2) + image([2, 1, 9], [0.0, 0.1, 0.3], 2, "cat")
    found = chosen_within(rows)
    last = max(r["iterate"] for r in found)
    assert {(r["animal"], r["reward"]) for r in found if r["iterate"] == 0} == {("fox", 1), ("cat", 2)}
    assert {(r["animal"], r["reward"]) for r in found if r["iterate"] == last} == {("fox", 5), ("cat", 9)}
    of_fox = [r["reward"] for r in sorted(found, key=lambda r: r["iterate"]) if r["animal"] == "fox"]
    assert of_fox == sorted(of_fox) and 3 in of_fox


def test_images_stand_beside_the_same_draw_or_beside_every_one():
    mine = image([1], [0.0], 0)
    other = image([2], [0.0], 0) + image([3], [0.0], 0, part=("0", "1")) + image([4], [0.0], 0, part=("1", "0"))
    a, b, shared = together_with(mine, other, every_draw=False)
    assert (a[1].tolist(), b[1].tolist(), shared) == ([[1]], [[2]], [(("0", "0"), "fox")])
    a, b, shared = together_with(mine, other, every_draw=True)
    assert a[1].tolist() == [[1, 1]] and b[1].tolist() == [[2, 3]] and len(shared) == 2
