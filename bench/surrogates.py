"""The sign question on the demo model: reward, prompt adherence and every surrogate along whole optimisation paths.

`python dev.py bench surrogates` optimises the 45 animals for brightness, darkness and CLIPScore: plainly (DNO) on all,
with each regulariser on the first 15. Every run is kept in output/surrogates/ and not repeated; all its rows go to
docs/results/surrogates_rows.csv, from which the tables and plots beside it are made.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import torch

from bench.grid import Failure, Store
from bench.model import sheet
from bench.rows import file_run, gather, write
from testing.pack import ROOT, mira
from testing.world import PixelReward, World, demo

judge_module, vocabulary = mira("demo.judge"), mira("demo.vocabulary")
SURROGATES = mira("sampler.surrogates").SURROGATES
WeightedSum = mira("rewards.combine").WeightedSum
RAW = ROOT / "output" / "surrogates"
OUT = ROOT / "docs" / "results"
ANIMALS = vocabulary.ANIMALS

# (regulariser, beta, how many animals). A batch has the same noises in every method, so that runs pair up.
# A CLIPScore is weighted by 0.03, so that all gains are of order 1.
METHODS = (
    ("none", 0.0, 45),
    ("mira", 1.0, 15),
    ("mira_two_sided", 5.0, 15),
    ("score_distance", 5.0, 15),
    ("latent_distance", 0.3, 15),
    ("path_kl", 1.0, 15),
)
REWARDS = ("brightness", "darkness", "CLIPScore")
STEPS, ITERATIONS, LR, BATCH, SEED = 8, 12, 0.025, 15, 0


def raw(reward: str, regularizer: str, beta: float, suffix: str = ".csv") -> Path:
    return RAW / f"{reward}-{regularizer}-{beta:g}{suffix}"


def run(world: World, judge, clip_score, reward: str, regularizer: str, beta: float, count: int) -> list[dict]:
    """A row for every iterate and image of one method, what the judge and CLIPScore say of it included."""
    target = WeightedSum([clip_score], [0.03]) if reward == "CLIPScore" else PixelReward(reward)
    animals, rows, pictures = ANIMALS[:count], [], []
    for start in range(0, len(animals), BATCH):
        some = animals[start : start + BATCH]
        prompts = [vocabulary.caption(a, prefix=True) for a in some]
        positive = world.encode_batch(prompts)

        def observe(k, new, score, some=some, prompts=prompts):
            with torch.no_grad():
                clips = clip_score.score(score.images, prompts).tolist()
            kept = judge_module.adherence(judge, score.images, list(some)).tolist()
            for row, animal, a, c in zip(new, some, kept, clips, strict=True):
                measured = {name: row[name] for name in ("iteration", "reward", "noise_norm", *SURROGATES)}
                rows.append({"animal": animal, "adherence": a, "clip_score": c} | measured)
            if k in (0, 3, 7, ITERATIONS) and len(pictures) < 4:
                pictures.append(score.images)

        world.optimize(
            positive=positive, steps=STEPS, iterations=ITERATIONS, batch=len(some), reward=target, prompts=prompts,
            regularizer=regularizer, beta=beta, lr=LR, seed=SEED + start, on_iteration=observe, memory="none",
        )  # fmt: skip
    sheet(torch.cat(pictures), BATCH, raw(reward, regularizer, beta, ".jpg"))
    return rows


def curve(rows: list[dict], column: str) -> torch.Tensor:
    """(iterations + 1, animals)."""
    animals = list(dict.fromkeys(r["animal"] for r in rows))
    table = {(r["iteration"], r["animal"]): r[column] for r in rows}
    return torch.tensor([[table[k, a] for a in animals] for k in range(ITERATIONS + 1)], dtype=torch.float64)


def at(x: torch.Tensor, y: torch.Tensor, level: float) -> float:
    """y where the path x first reaches the level; nan where it never does."""
    for k in range(1, len(x)):
        if x[k] >= level > x[k - 1]:
            t = (level - x[k - 1]) / (x[k] - x[k - 1])
            return (y[k - 1] + t * (y[k] - y[k - 1])).item()
    return float("nan")


def matched(mine: list[dict], plain: list[dict], fraction: float, resamples: int = 300) -> tuple[float, float, float]:
    """Adherence at a fraction of plain optimisation's gain: the method's, plain's, and the standard error of the
    difference (bootstrap over the animals that both have)."""
    animals = list(dict.fromkeys(r["animal"] for r in mine))
    plain = [r for r in plain if r["animal"] in set(animals)]
    reward, kept = curve(mine, "reward"), curve(mine, "adherence")
    reward0, kept0 = curve(plain, "reward"), curve(plain, "adherence")
    if not torch.allclose(reward[0], reward0[0], atol=1e-3):
        raise RuntimeError("the runs do not start from the same images, so they cannot be compared image by image")
    generator = torch.Generator().manual_seed(0)

    def once(index):
        x0 = reward0[:, index].mean(1)
        level = (x0[0] + fraction * (x0[-1] - x0[0])).item()
        return at(reward[:, index].mean(1), kept[:, index].mean(1), level), at(x0, kept0[:, index].mean(1), level)

    a, b = once(torch.arange(len(animals)))
    boot = [once(torch.randint(len(animals), (len(animals),), generator=generator)) for _ in range(resamples)]
    differences = torch.tensor([x - y for x, y in boot])
    differences = differences[torch.isfinite(differences)]
    return a, b, differences.std().item() if len(differences) > resamples // 2 else float("nan")


def losses(rows: list[dict]) -> tuple[list[dict], torch.Tensor]:
    """The iterates of images that begin above one half of adherence, and which of them have lost half of their own."""
    first = {r["animal"]: r["adherence"] for r in rows if r["iteration"] == 0}
    cases = [r for r in rows if r["iteration"] and first[r["animal"]] > 0.5]
    return cases, torch.tensor([r["adherence"] < first[r["animal"]] / 2 for r in cases])


def tells(rows: list[dict], surrogate: str) -> float:
    """The area under the ROC curve of `losses`, as a surrogate tells them."""
    cases, lost = losses(rows)
    value = torch.tensor([r[surrogate] for r in cases], dtype=torch.float64)
    higher = (value[lost][:, None] - value[~lost]).sign()
    return (higher.mean().item() + 1) / 2 if len(higher) else float("nan")


def load() -> dict[tuple[str, str, float], list[dict]]:
    """By (reward, regularizer, beta), from the rows in docs/results. Raises Failure where plain ones are missing."""
    path = OUT / "surrogates_rows.csv"
    gather(RAW, path, ("optimised", "regularizer", "beta"))
    runs: dict[tuple[str, str, float], list[dict]] = {}
    for row in csv.DictReader(path.open()) if path.is_file() else ():
        numbers = {k: float(row[k]) for k in ("adherence", "clip_score", "reward", "noise_norm", *SURROGATES)}
        of = (row["optimised"], row["regularizer"], float(row["beta"]))
        runs.setdefault(of, []).append(numbers | {"animal": row["animal"], "iteration": int(row["iteration"])})
    if missing := [reward for reward in REWARDS if (reward, "none", 0.0) not in runs]:
        raise Failure(f"{path.name} lacks plain optimisation of {', '.join(missing)}, which all tables begin with")
    return runs


def report() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs, out = load(), OUT
    columns = ["reward", "adherence", "clip_score", "noise_norm", *SURROGATES]
    with (out / "surrogates.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["optimised", "regularizer", "beta", "images", "iteration", *columns, "adherence_se"])
        for (reward, regularizer, beta), rows in runs.items():
            curves = {c: curve(rows, c) for c in columns}
            n = curves["reward"].shape[1]
            for k in range(ITERATIONS + 1):
                se = curves["adherence"][k].std().item() / n**0.5
                values = [f"{curves[c][k].mean().item():.5g}" for c in columns]
                writer.writerow([reward, regularizer, beta, n, k, *values, f"{se:.3g}"])
    fractions = (0.25, 0.5, 0.75)
    with (out / "surrogates_matched.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["optimised", "regularizer", "beta", "gain", "adherence", "dno_adherence", "se_of_difference"])
        for (reward, regularizer, beta), rows in runs.items():
            for fraction in fractions:
                values = matched(rows, runs[reward, "none", 0.0], fraction)
                writer.writerow([reward, regularizer, beta, fraction, *(f"{v:.3f}" for v in values)])
                print(reward, regularizer, beta, fraction, *(f"{v:.3f}" for v in values))
    with (out / "surrogates_thresholds.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["optimised", "surrogate", "at_90_percent_of_adherence", "at_75_percent", "at_50_percent"])
        for reward in REWARDS:
            rows = runs.get((reward, "none", 0.0), [])
            for surrogate in SURROGATES if rows else ():
                lost, value = -curve(rows, "adherence").mean(1), curve(rows, surrogate).mean(1)
                levels = [at(lost, value, lost[0].item() * share) for share in (0.9, 0.75, 0.5)]
                writer.writerow([reward, surrogate, *(f"{v:.3g}" for v in levels)])
                print(reward, surrogate, *(f"{v:.3g}" for v in levels))
    plain = [r | {"animal": (reward, r["animal"])} for reward in REWARDS for r in runs[reward, "none", 0.0]]
    lost = losses(plain)[1]
    counts = {"lost": lost.sum().item(), "not_lost": (~lost).sum().item()}
    areas = [{"surrogate": name, "area": tells(plain, name)} | counts for name in ("noise_norm", *SURROGATES)]
    write(out / "surrogates_tell.csv", areas)
    print(*(f"{r['surrogate']} {r['area']:.2f}" for r in areas), counts)
    ends = {reward: curve(runs[reward, "none", 0.0], "mira")[-1] for reward in REWARDS}
    signs = [{"optimised": r, "mira": v.mean().item(), "se": v.std().item() / len(v) ** 0.5} for r, v in ends.items()]
    write(out / "surrogates_sign.csv", signs)
    figure, axes = plt.subplots(3, len(REWARDS), figsize=(15, 12), layout="constrained")
    for column, reward in enumerate(REWARDS):
        subset = {r["animal"] for key, rows in runs.items() if key[0] == reward and key[1] != "none" for r in rows}
        for (name, regularizer, beta), rows in runs.items():
            if name != reward:
                continue
            mine = [r for r in rows if not subset or r["animal"] in subset]
            label = "none (DNO)" if regularizer == "none" else f"{regularizer} {beta:g}"
            style = "k--" if regularizer == "none" else "-"
            x = curve(mine, "reward").mean(1)
            axes[0][column].plot(x, curve(mine, "adherence").mean(1), style, marker=".", label=label)
            axes[1][column].plot(x, curve(mine, "clip_score").mean(1), style, marker=".", label=label)
        axes[0][column].set(title=f"optimised: {reward}", xlabel="reward", ylabel="adherence (held-out judge)")
        axes[1][column].set(xlabel="reward", ylabel="CLIPScore")
        rows = runs.get((reward, "none", 0.0))
        for surrogate in SURROGATES if rows else ():
            axes[2][column].plot(curve(rows, surrogate).mean(1), label=surrogate)
        axes[2][column].axhline(0, color="grey", linewidth=0.5)
        axes[2][column].set(xlabel="iteration of plain optimisation", yscale="symlog")
    axes[0][0].legend(fontsize=7)
    axes[2][0].legend(fontsize=7)
    figure.savefig(out / "surrogates.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewards", nargs="*", default=REWARDS, choices=REWARDS)
    parser.add_argument("--report", action="store_true", help="only make tables and plots of what is there")
    args = parser.parse_args()
    if args.report:
        return report()
    Store(RAW, {"steps": STEPS, "iterations": ITERATIONS, "lr": LR, "batch": BATCH, "seed": SEED})
    world, judge, clip_score = World(), judge_module.load_judge(), demo.demo_clip_score()
    for regularizer, beta, count in METHODS:
        for reward in args.rewards:
            path = raw(reward, regularizer, beta)
            if path.is_file():
                continue
            start = time.perf_counter()
            file_run(path, run(world, judge, clip_score, reward, regularizer, beta, count))
            print(path.stem, f"{time.perf_counter() - start:.0f} s", flush=True)
    report()


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"bench surrogates: {failure}")
