"""What Algorithm 2 gains over choosing among seeds: `python dev.py bench preference [--animals N]`.

JPEG size and brightness as black boxes on the demo model: every method judges the same number of images (41), and the
network passes that each needed are counted (a backward pass as two forward ones). Best of 2 stands beside them: it is
where Algorithm 2 begins. The best of N images in the judge's eyes comes back (keep = incumbent). --clicks: instead,
what ten choices are worth to a person who is shown several images at a time. Every run is kept in output/preference/
and not repeated; its rows are gathered in docs/results/preference_rows.csv, from which --report makes preference.csv
and preference_clicks.csv. The images go to preference_<reward>.jpg.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import replace

import torch

from bench.grid import Failure, Store
from bench.model import sheet
from bench.rows import file_run, gather, write
from testing.pack import ROOT, mira
from testing.world import World, host

judge_module, vocabulary = mira("demo.judge"), mira("demo.vocabulary")
node, judges, core = mira("nodes.preference"), mira("nodes.editor.judges"), mira("sampler.preference")
PixelReward, JPEG = mira("rewards.pixel").PixelReward, mira("rewards.jpeg").JPEG
RAW, OUT = ROOT / "output" / "preference", ROOT / "docs" / "results"
STEPS, SEED, JUDGED = 6, 0, 40

Settings = core.PreferenceSettings
DPO = dict(method="dpo", iterations=JUDGED // 2, keep="incumbent")
METHODS = {
    "best_of_n, 2 images": Settings(method="best_of_n", iterations=1, keep="incumbent"),
    "best_of_n": Settings(method="best_of_n", iterations=JUDGED, keep="incumbent"),
    "dueling, explore 0.3": Settings(method="dueling", iterations=JUDGED, explore=0.3, keep="incumbent"),
    "dueling, explore 0.6": Settings(method="dueling", iterations=JUDGED, explore=0.6, keep="incumbent"),
    "hybrid2, 4 probes": Settings(
        method="hybrid2", iterations=JUDGED // 5, candidates=5, explore=0.01, lr=0.05, keep="incumbent"
    ),
    "dpo (Algorithm 2)": Settings(**DPO, lr=0.01),
    "dpo, lr 0.05": Settings(**DPO, lr=0.05),
    "dpo, lr 0.05, reversed": Settings(**DPO, lr=0.05, energy="mira_reversed"),
    "dpo, lr 0.05, both sides": Settings(**DPO, lr=0.05, energy="mira_two_sided"),
}
CHOICES = {
    f"{method}, {n} at a time": Settings(method=method, iterations=10, candidates=n, explore=0.6, keep="incumbent")
    for method in ("dueling", "best_of_n")
    for n in (2, 4, 9)
}
REWARDS = {"JPEG": JPEG, "brightness": lambda: PixelReward("brightness")}


def run(world: World, judge, reward: str, name: str, animals: list[str]) -> tuple[list[dict], torch.Tensor]:
    prompts = [vocabulary.caption(a, prefix=True) for a in animals]
    settings = (METHODS | CHOICES)[name]
    job = world.job(
        positive=world.encode_batch(prompts), steps=STEPS, batch=len(animals), reward=REWARDS[reward](),
        prompts=prompts, seed=SEED, memory="none",
    )  # fmt: skip
    job = replace(job, settings=settings, gradient=node.METHODS[settings.method].gradient)
    by_reward = lambda process: judges.RewardJudge(lambda images: process.scoring.reward(images)[0])  # noqa: E731
    with torch.inference_mode():
        done = host.run(job, node.preferring(by_reward, SEED, 0))
        images = torch.cat([world.vae.decode(x[None]) for x in done.latent]).movedim(3, 1)
        plain = torch.cat([world.vae.decode(x[None]) for x in done.plain]).movedim(3, 1)
    score = REWARDS[reward]()
    before, after = (score(i, prompts)[0].tolist() for i in (plain, images))
    kept_before, kept_after = (judge_module.adherence(judge, i, animals).tolist() for i in (plain, images))
    cost = done.result.trace.settings["evaluations"]
    rows = []
    for b, animal in enumerate(animals):
        best = done.result.trace.kept[b]
        row = next(r for r in done.result.trace.of(b) if r["iteration"] == best)
        rows.append(
            {
                "animal": animal,
                "before": before[b],
                "after": after[b],
                "gain": after[b] - before[b],
                "adherence_before": kept_before[b],
                "adherence_after": kept_after[b],
                "path_kl": row["path_kl"],
                "passes": cost["forward"] + 2 * cost["backward"],
            }
        )
    return rows, images


def summary(rows: list[dict]) -> dict:
    def column(name):
        return torch.tensor([float(r[name]) for r in rows], dtype=torch.float64)

    names = ("before", "after", "gain", "adherence_before", "adherence_after", "path_kl", "passes")
    out = {name: column(name).mean().item() for name in names}
    return out | {"gain_se": (column("gain").std() / len(rows) ** 0.5).item()}


def report() -> None:
    """From the rows that stand in docs/results."""
    path = OUT / "preference_rows.csv"
    gather(RAW, path, ("reward", "method"))
    if not path.is_file():
        raise Failure(f"neither {RAW} nor {OUT} holds runs: run `python dev.py bench preference` first")
    rows = list(csv.DictReader(path.open()))
    for methods, name in ((METHODS, "preference"), (CHOICES, "preference_clicks")):
        table = [
            {"reward": reward, "method": method} | summary(of)
            for reward in REWARDS
            for method in methods
            if (of := [r for r in rows if (r["reward"], r["method"]) == (reward, method)])
        ]
        for row in table:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        if table:
            write(OUT / f"{name}.csv", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--animals", type=int, default=10)
    parser.add_argument("--clicks", action="store_true")
    parser.add_argument("--report", action="store_true", help="only make tables of what is there")
    args = parser.parse_args()
    if args.report:
        return report()
    Store(RAW, {"animals": args.animals, "steps": STEPS, "seed": SEED})
    methods, shown = (CHOICES, RAW / "clicks") if args.clicks else (METHODS, OUT / "preference")
    world, judge = World(), judge_module.load_judge()
    animals = list(vocabulary.ANIMALS[: args.animals])
    for reward in REWARDS:
        pictures = []
        for name in methods:
            file = RAW / f"{reward}-{name}.csv"
            if not file.is_file():
                rows, images = run(world, judge, reward, name, animals)
                torch.save(images, file.with_suffix(".pt"))
                file_run(file, rows)
                print(file.stem, flush=True)
            pictures.append(torch.load(file.with_suffix(".pt"), weights_only=True))
        sheet(torch.cat(pictures), len(animals), shown.with_name(f"{shown.name}_{reward}.jpg"))
    report()


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"bench preference: {failure}")
