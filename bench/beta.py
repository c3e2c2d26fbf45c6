"""MIRA's own penalty over a range of weights and readings: `python dev.py bench beta [--report]`.

beta is a share of the reward's pull (`Settings.relative_beta`): .03 to 3 of it. The readings of the score energy S are
Algorithm 1's with either weighting of its steps, and that of Eq. 21 to 23, where sigma^2 ||s||^2 of a transition is
its noise's own ||z_t||^2. Each is compared with plain optimisation by the same steps, at the same reward. Rows are kept
in output/beta/ and not made again; docs/results/beta*.csv hold them and what is read off them (docs/surrogates.md).
"""

from __future__ import annotations

import argparse
import csv
import sys
import time

from bench.front import judge_module
from bench.grid import Failure, Store
from bench.paths import COLUMNS, against, path_of
from bench.restart import Variant, run
from bench.rows import file_run, gather, write
from testing.pack import ROOT, mira
from testing.world import World, demo

surrogates, rollout = mira("sampler.surrogates"), mira("sampler.rollout")
RAW, OUT = ROOT / "output" / "beta", ROOT / "docs" / "results"
COUNT, STEPS = 10, 20  # animals, sampling steps; the gradient goes through all of them
SHARES = (0.03, 0.1, 0.3, 1.0, 3.0)
# How far a step goes and how often: as in our other studies, and as in the paper.
PLANS = {"short": {"lr": 0.04, "iterations": 6}, "paper": {"lr": 0.01, "iterations": 50}}


def transition_energy(path, reference):
    """S(z0) - S(z), where a step's energy is its noise's: Eq. 23 read with the score of the transition."""
    pairs = zip(reference.noises, path.noises, strict=True)
    return rollout.total(rollout.mean_square(z0, path.mask) - rollout.mean_square(z, path.mask) for z0, z in pairs)


LEVELS = {"brightness": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9), "aesthetic": (5.7, 6.0, 6.2)}

# By name: the regulariser and the weighting of its steps.
READINGS = {
    "mira": ("mira", "marginal"),
    "mira_ddim": ("mira", "transition"),
    "transition_energy": ("transition_energy", "marginal"),
}


def variant(plan: str, reading: str, share: float) -> Variant:
    """reading "dno": plain optimisation."""
    settings = PLANS[plan] | {"clip_norm": 0.0, "keep": "last"}
    if reading == "dno":
        return Variant(settings, gradient_steps=0)
    regularizer, weighting = READINGS[reading]
    penalty = {"regularizer": regularizer, "beta": share, "relative_beta": True}
    return Variant(settings | penalty, weighting=weighting, gradient_steps=0)


def read_rows() -> dict[tuple, list[dict]]:
    """By (reward, plan, reading, share), from the rows that stand in docs/results."""
    path = OUT / "beta_rows.csv"
    gather(RAW, path, ("optimised", "plan", "reading", "share"))
    runs: dict[tuple, list[dict]] = {}
    for row in csv.DictReader(path.open()):
        numbers = {k: float(row[k]) for k in ("iterate", "mira", "path_kl", *COLUMNS)}
        of = (row["optimised"], row["plan"], row["reading"], float(row["share"]))
        runs.setdefault(of, []).append(numbers | {"animal": row["animal"], "part": 0})
    return runs


def report() -> None:
    """From the rows that stand in docs/results."""
    runs, table, levels = read_rows(), [], []
    for (reward, plan, reading, share), mine in sorted(runs.items()):
        if (plain := runs.get((reward, plan, "dno", 0.0))) is None:
            continue
        (images, a), (_, b) = path_of(mine), path_of(plain)
        start, end = a[:, 0].mean(1), a[:, -1].mean(1)
        gain = (end - start)[1] / (b[1, -1] - b[1, 0]).mean()
        last = [r for r in mine if r["iterate"] == max(r["iterate"] for r in mine)]
        row = {
            "reward": reward, "plan": plan, "reading": reading, "share": share, "images": len(images),
            "start": start[1].item(), "end": end[1].item(), "of_plain_gain": gain.item(),
            "start_adherence": start[2].item(), "adherence": end[2].item(), "clip_score": end[3].item(),
            "mira": sum(r["mira"] for r in last) / len(last), "path_kl": sum(r["path_kl"] for r in last) / len(last),
        }  # fmt: skip
        animals, told = [animal for _, animal in images], ("plain_adherence", "adherence_above", "se")
        if reading != "dno" and (found := against(a, b, animals, None)):
            row |= {k: found[k] for k in told}
        for level in LEVELS[reward] if reading != "dno" else ():
            if found := against(a, b, animals, level):
                of = {"reward": reward, "plan": plan, "reading": reading, "share": share, "level": level}
                levels.append(of | {k: found[k] for k in told})
        table.append(row)
        above = f"{row['adherence_above']:+.3f}±{row['se']:.3f}" if "se" in row else "-"
        print(
            reward, plan, reading, f"{share:g}: {start[1]:.3f} -> {end[1]:.3f} ({gain:.2f} of the plain gain),",
            f"adherence {start[2]:.2f} -> {end[2]:.2f}, above plain {above}, S0 - S {row['mira']:+.2f}",
        )  # fmt: skip
    write(OUT / "beta.csv", table)
    write(OUT / "beta_levels.csv", levels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewards", nargs="*", default=["brightness", "aesthetic"])
    parser.add_argument("--plans", nargs="*", default=["short"], choices=list(PLANS))
    parser.add_argument("--readings", nargs="*", default=["dno", *READINGS], choices=["dno", *READINGS])
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    parser.add_argument("--report", action="store_true", help="only make the tables of what is there")
    args = parser.parse_args()
    if args.report:
        return report()
    surrogates.REGULARIZERS["transition_energy"] = transition_energy
    surrogates.SLOPED.append("transition_energy")
    Store(RAW, {"animals": COUNT, "steps": STEPS})
    world, judge, clip = World(), judge_module.load_judge(), demo.demo_clip_score()
    for plan in args.plans:
        for reading in args.readings:
            for share in args.shares if reading != "dno" else (0.0,):
                for reward in args.rewards:
                    path = RAW / f"{reward}-{plan}-{reading}-{share:g}.csv"
                    if path.is_file():
                        continue
                    start = time.perf_counter()
                    chosen = variant(plan, reading, share)
                    rows, _ = run(world, judge, clip, chosen, reward, part=0, steps=STEPS, seed=0, count=COUNT)
                    file_run(path, rows)
                    print(path.stem, f"{time.perf_counter() - start:.0f} s", flush=True)
    report()


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"bench beta: {failure}")
