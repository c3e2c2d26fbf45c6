"""Which seeds can be given up early, by what is predicted of them: `python dev.py bench pruning [--report]`.

Every seed's prediction at every step and its final image are scored once, by four rewards. Successive halving, pruning
against the best so far (after TTSnap, arXiv 2511.22242) and Best-of-N are then read off the same numbers, for any
count: an image's trajectory does not depend on the others. Rows are kept in output/pruning/ and not made again.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable

import torch

from bench.front import rewards
from bench.grid import Store
from bench.rows import file_run, gather, write
from testing.pack import ROOT, mira
from testing.world import World

import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip

vocabulary, JPEG = mira("demo.vocabulary"), mira("rewards.jpeg").JPEG
SearchSettings = mira("sampler.search").SearchSettings
RAW, OUT = ROOT / "output" / "pruning", ROOT / "docs" / "results"
STEPS, COUNT, SEEDS, RESAMPLES = 16, 15, 17, 200
COUNTS = (2, 4, 8, 16)
MARGINS = (0.0, 1.0)  # how many deviations of the calibration's error a seed may be behind


def scored() -> dict[str, Callable[[torch.Tensor], list[float]]]:
    known = rewards() | {"JPEG": JPEG()}
    return {name: lambda images, r=r: r.score(images, [""] * len(images)).tolist() for name, r in known.items()}


@torch.inference_mode()
def run(world: World, by: dict, seed: int) -> list[dict]:
    """Rows (animal, reward, p0 ... p15, final): of the prediction at every step, and of the image."""
    animals = vocabulary.ANIMALS[:COUNT]
    positive = world.encode_batch([vocabulary.caption(a, prefix=True) for a in animals])
    latent = torch.zeros(COUNT, 4, world.side, world.side)
    rows = {(a, name): {"animal": a, "reward": name} for a in animals for name in by}

    def look(column: str, x0: torch.Tensor) -> None:
        images = world.vae.decode(x0).movedim(-1, 1).float().clamp(0, 1)
        for name, score in by.items():
            for animal, value in zip(animals, score(images), strict=True):
                rows[animal, name][column] = value

    guider = world.guider(positive=positive)
    noise = comfy.sample.prepare_noise(latent, seed)
    done = guider.sample(
        noise, latent, comfy.samplers.sampler_object("euler_ancestral"), world.sigmas(steps=STEPS),
        callback=lambda step, x0, x, steps: look(f"p{step}", guider.model_patcher.model.process_latent_out(x0)),
        disable_pbar=True, seed=seed + world.apart,
    )  # fmt: skip
    look("final", done)
    return list(rows.values())


def table() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """reward -> predictions (animals, seeds, steps), finals (animals, seeds)."""
    found: dict[str, dict[tuple, list[float]]] = {}
    for row in csv.DictReader((OUT / "pruning_rows.csv").open()):
        values = [float(row[f"p{k}"]) for k in range(STEPS)] + [float(row["final"])]
        found.setdefault(row["reward"], {})[row["animal"], int(row["seed"])] = values
    out = {}
    for name, values in found.items():
        animals, seeds = sorted({a for a, _ in values}), sorted({s for _, s in values})
        both = torch.tensor([[values[a, s] for s in seeds] for a in animals], dtype=torch.float64)
        out[name] = both[..., :-1], both[..., -1]
    return out


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's, along the last dimension, its mean over the first."""
    ranks = torch.stack([v.argsort(-1).argsort(-1).double() for v in (x, y)])
    ranks = ranks - ranks.mean(-1, keepdim=True)
    return ((ranks[0] * ranks[1]).sum(-1) / (ranks[0].norm(dim=-1) * ranks[1].norm(dim=-1))).mean().item()


def best_of(finals: torch.Tensor, n: float) -> torch.Tensor:
    """(animals, seeds) -> (animals,): the mean of the best of n of them, exactly; between whole n on a line."""
    if n != int(n):
        low = math.floor(n)
        return best_of(finals, low) * (low + 1 - n) + best_of(finals, low + 1) * (n - low)
    ordered, count, n = finals.sort(-1).values, finals.shape[-1], int(n)
    odds = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
    return (ordered * torch.tensor(odds, dtype=ordered.dtype)).sum(-1)


def seeds_for(finals: torch.Tensor, reward: float) -> float:
    """How many seeds it takes until the best of them has so much, a mean over animals; infinite where all have less."""
    known = [best_of(finals, n).mean().item() for n in range(1, finals.shape[1] + 1)]
    above = next((k for k, v in enumerate(known) if v >= reward), None)
    if not above:
        return 1.0 if above == 0 else math.inf
    return above + (reward - known[above - 1]) / (known[above] - known[above - 1])


def looks(n: int) -> list[int]:
    return SearchSettings("halving", particles=n).looks(STEPS)


def halved(predictions: torch.Tensor, finals: torch.Tensor) -> tuple[float, float]:
    """Of n seeds, (n, steps) and (n,): the reward of the one that is left, and the passes."""
    alive, at, steps = torch.arange(len(finals)), 0, 0
    for step in looks(len(finals)):
        steps, at = steps + len(alive) * (step - at), step
        if step < STEPS:
            alive = alive[predictions[alive, step].topk(math.ceil(len(alive) / 2)).indices]
    return finals[alive].max().item(), steps / STEPS


def calibration(predictions: torch.Tensor, finals: torch.Tensor) -> list[tuple[float, float, float]]:
    """Per step: final = a + b prediction, by least squares, and the deviation of what is left."""
    found = []
    y = finals.flatten()
    for k in range(STEPS):
        x = predictions[..., k].flatten()
        b = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0).clamp(min=1e-12)
        a = y.mean() - b * x.mean()
        found.append((a.item(), b.item(), (y - a - b * x).std().item()))
    return found


def pruned(predictions: torch.Tensor, finals: torch.Tensor, by: list, margin: float) -> tuple[float, float]:
    """One seed after the other, given up at the first look at which its calibrated end is behind the best so far."""
    best, steps = -math.inf, 0
    for p, final in zip(predictions, finals.tolist(), strict=True):
        for step in looks(8)[:-1]:
            a, b, error = by[step]
            if a + b * p[step].item() + margin * error < best:
                steps += step
                break
        else:
            steps, best = steps + STEPS, max(best, final)
    return best, steps / STEPS


def resampled(method: Callable, predictions: torch.Tensor, finals: torch.Tensor, n: int) -> tuple[torch.Tensor, float]:
    """(animals,) rewards and the passes, means over draws of n seeds in an order of their own."""
    g = torch.Generator().manual_seed(n)
    rewards, passes = [], []
    for animal in range(len(finals)):
        some = [torch.randperm(finals.shape[1], generator=g)[:n] for _ in range(RESAMPLES)]
        ends = [method(animal, predictions[animal, s], finals[animal, s]) for s in some]
        rewards.append(sum(e[0] for e in ends) / len(ends))
        passes.append(sum(e[1] for e in ends) / len(ends))
    return torch.tensor(rewards, dtype=finals.dtype), sum(passes) / len(passes)


def report() -> None:
    """From the rows that stand in docs/results."""
    gather(RAW, OUT / "pruning_rows.csv", ("seed",))
    ranks, rows = [], []
    for reward, (predictions, finals) in table().items():
        each = {f"step_{k}": rank_correlation(predictions[..., k], finals) for k in (2, 4, 6, 8, 10, 12, 14)}
        ranks.append({"reward": reward, "images": finals.numel(), **each})
        others = [torch.arange(len(finals)) != animal for animal in range(len(finals))]
        fits = [calibration(predictions[o], finals[o]) for o in others]  # by the other animals
        methods = {"halving": lambda animal, p, f: halved(p, f)}
        methods |= {
            f"pruned_{m:g}": lambda animal, p, f, m=m, fits=fits: pruned(p, f, fits[animal], m) for m in MARGINS
        }
        for name, method in methods.items():
            for n in (n for n in COUNTS if n <= finals.shape[1]):
                got, passes = resampled(method, predictions, finals, n)
                more = got - best_of(finals, passes)
                rows.append({
                    "reward": reward, "method": name, "seeds": n, "passes": passes, "got": got.mean().item(),
                    "best_of_n_there": best_of(finals, passes).mean().item(), "more": more.mean().item(),
                    "se": (more.std() / len(more) ** 0.5).item(), "best_of_n": best_of(finals, n).mean().item(),
                    "seeds_for_as_much": seeds_for(finals, got.mean().item()),
                })  # fmt: skip
                print(*(f"{v:.3f}" if isinstance(v, float) else v for v in rows[-1].values()))
    write(OUT / "pruning.csv", rows)
    write(OUT / "pruning_ranks.csv", ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--report", action="store_true", help="only make the tables of what is there")
    args = parser.parse_args()
    if not args.report:
        Store(RAW, {"animals": COUNT, "steps": STEPS})
        world, by = World(), scored()
        for seed in range(args.seeds):
            if not (RAW / f"{seed}.csv").is_file():
                file_run(RAW / f"{seed}.csv", run(world, by, seed))
                print(f"seed {seed}", flush=True)
    report()


if __name__ == "__main__":
    main()
