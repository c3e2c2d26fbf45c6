"""The arithmetic of the tables, on numbers whose answers are known, and a report of a small store."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from bench.grid import Failure, Store
from bench.tables import at, nearest, paired, report, verdict


def test_paired_differences():
    mean, se, p = paired(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    assert (mean, se) == (1.0, 0.0) and p == pytest.approx(2 / 16)  # only all-equal signs are as extreme
    mean, se, p = paired(torch.tensor([1.0, -1.0]))
    assert mean == 0 and p == 1
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(40, generator=g)
    assert paired(noise + 2)[2] < 0.001 and paired(noise - noise.mean())[2] > 0.9
    assert math.isnan(paired(torch.tensor([1.0]))[1])


def test_at_reads_a_path_between_its_points():
    x, y = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([10.0, 20.0, 0.0])
    assert at(x, y, 0.5) == 15 and at(x, y, 2.0) == 10 and at(x, y, -1) == 10
    assert math.isnan(at(x, y, 4.0))


def test_nearest_leaves_itself_out():
    points = torch.tensor([[0.0], [1.0], [5.0]])
    assert nearest(points, points).tolist() == [0, 0, 0]
    assert nearest(points, points, True).tolist() == [1, 1, 4]


def test_the_judge_is_its_rule():
    good = {"top1": 1.0, "natural": 1.0, "gain": 0.5}
    hacked = {"top1": 0.0, "natural": 0.0, "gain": 2.0}
    assert verdict(good, hacked) == 1 and verdict(hacked, good) == 0
    assert verdict(good, good) == 0.5
    assert verdict(good | {"gain": 1.0}, good | {"gain": 0.4}) == 1  # less than half of the better gain


def rows_of(method, drift, shift):
    out = []
    for animal in ("cat", "dog"):
        for k in (*range(4), -1):
            step = 3 if k == -1 else k
            row = {"method": method, "target": "brightness", "seed": 0, "animal": animal, "k": k}
            row |= {"reward": step * 1.0 + (shift if k == -1 else 0), "adherence": 1 - step / 4, "top1": 1.0}
            drifts = ("path_kl", "latent_distance", "score_distance")
            out.append(row | dict.fromkeys(drifts, step * drift) | {"clip_score": 50.0})
            if k == -1:
                out[-1] |= {"forward": 40 * drift, "backward": 30 * drift, "seconds": 1.0}
    return out


def test_a_report_of_a_small_store(tmp_path):
    store = Store(tmp_path / "in", {"model": "demo", "steps": 8})
    g = torch.Generator().manual_seed(0)

    def unit(n):
        e = torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=-1)
        return {"final_clip": e, "final_judge": e, "images": torch.zeros(n, 3, 8, 8, dtype=torch.uint8)}

    store.write("base__00__00", [{"method": "base", "seed": 0, "animal": a} for a in ("cat", "dog")], unit(2))
    store.write("base__01__00", [{"method": "base", "seed": 1, "animal": a} for a in ("cat", "dog")], unit(2))
    path = {"path_clip": torch.randn(4, 2, 4, generator=g), "path_judge": torch.randn(4, 2, 4, generator=g)}
    store.write("dno__brightness__0__00", rows_of("dno", 0.1, 0), unit(2) | path)
    for method in ("mira", "mira_beta_0.2", "mira_steps_4", "mira_steps_16"):
        shift = -0.5 if method == "mira_beta_0.2" else 0.5
        store.write(f"{method}__brightness__0__00", rows_of(method, 0.05, shift), unit(2) | path)
    for method, shift in (("dno", 0), ("mira_beta_0.2", 0.5)):
        dark = [r | {"target": "darkness"} for r in rows_of(method, 0.1, shift)]
        store.write(f"{method}__darkness__0__00", dark, unit(2) | path)
    report(tmp_path / "in", tmp_path / "out")
    text = (tmp_path / "out" / "paper.md").read_text()
    assert (tmp_path / "out" / "paper.png").stat().st_size > 1000
    assert "0.500 ±0.000" in text  # mira over dno, paired
    # At mira's path KL of .15, DNO's path has reward 1.5: mira has 3.5.
    assert "| mira | path_kl | 0.150 | 2.000 ±0.000 | -0.375 ±0.000 |" in text
    # After 5 passes DNO, which takes 10, is a third of the way from its first iteration to its second.
    assert "| mira | passes | 5.000 | 2.167 ±0.000 | -0.417 ±0.000 |" in text
    # All rewards: mira gains 3.5 where DNO gains 3, which it never reaches; at 2.5 DNO has adherence .375.
    assert "| mira | 1 | 2 | 1.167 | 0.000 | 0 |  |" in text
    # Of two rewards, one of which DNO does not reach: the gain is of both, the adherence of the other.
    assert "| mira_beta_0.2 | 2 | 2 | 1.000 | 0.000 | 1 | -0.125 ±0.000 |" in text
    configs = json.loads((tmp_path / "out" / "paper_config.json").read_text())
    assert configs == {target: {"model": "demo", "steps": 8} for target in ("brightness", "darkness")}
    rows = list(csv.DictReader((tmp_path / "out" / "paper_rows.csv").open()))
    assert len(rows) == 7 * len(rows_of("dno", 0.1, 0)) and "base" not in {r["method"] for r in rows}
    lines = (tmp_path / "out" / "paper_wins.csv").read_text().splitlines()
    assert lines[0].startswith("target,method,other,images,reward,adherence,clip_score")
    # More reward than DNO, whose last image it is by adherence and CLIPScore; the plain sample has more adherence.
    assert "brightness,mira,dno,2,1,0.5,0.5" in lines and "brightness,mira,plain,2,1,0,0.5" in lines
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"paper.png", "paper_steps.png", "paper_beta.png"}

    made = {p.name: p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix in (".csv", ".md", ".json")}
    report(tmp_path / "nothing", tmp_path / "out")  # in somebody's clone, from the rows that are kept
    assert made == {name: (tmp_path / "out" / name).read_text() for name in made}


def test_nothing_there(tmp_path):
    with pytest.raises(Failure, match="holds no benchmark"):
        report(tmp_path, tmp_path / "out")
    Store(tmp_path, {"model": "demo"})
    with pytest.raises(Failure, match="no finished runs"):
        report(tmp_path, tmp_path / "out")
