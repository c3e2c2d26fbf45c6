"""Each surrogate against the true KL, on one-dimensional data with an exact score (after the paper's section A.5).

`python dev.py bench gaussian` drives the mean of the samples to 2.5 in two ways and writes `gaussian.csv` and
`gaussian.png`: "shift" raises every sample alike (reward x0), "attract" pulls each one to 2.5 (reward -(x0 - 2.5)^2).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from testing.pack import ROOT, mira

Rollout = mira("sampler.rollout").Rollout
SURROGATES = mira("sampler.surrogates").SURROGATES
OUT = ROOT / "docs" / "results"
TARGET = 2.5


class Mixture:
    """Data sum_i p_i N(m_i, s^2) with its exact denoiser and density."""

    def __init__(self, means: tuple[float, ...], std: float):
        self.means, self.std = torch.tensor(means, dtype=torch.float64), std

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B, 1), sigma (B,) -> E[x0 | x]."""
        variance = self.std**2 + sigma[:, None] ** 2
        weights = (-((x - self.means) ** 2) / (2 * variance)).softmax(1)
        each = (self.std**2 * x + sigma[:, None] ** 2 * self.means) / variance
        return (weights * each).sum(1, keepdim=True)

    def log_density(self, x: Tensor) -> Tensor:
        terms = -((x - self.means) ** 2) / (2 * self.std**2)
        return terms.logsumexp(1) - math.log(len(self.means) * self.std * math.sqrt(2 * math.pi))

    def kl(self, samples: Tensor) -> float:
        """KL(samples || data), samples (B, 1): a Gaussian kernel estimate of their density, leave-one-out."""
        n = len(samples)
        width = 1.06 * samples.std() * n**-0.2
        gaps = -((samples - samples.T) ** 2) / (2 * width**2)
        gaps.fill_diagonal_(-math.inf)
        log_q = gaps.logsumexp(1) - math.log((n - 1) * width * math.sqrt(2 * math.pi))
        return (log_q - self.log_density(samples)).mean().item()


def ancestral(denoise, schedule: Tensor):
    """euler_ancestral, eta = 1, as a `Sample` of the core."""

    def sample(z_T, source, wrap):
        model, x = wrap(denoise), z_T * (1 + schedule[0] ** 2).sqrt()
        for s, t in itertools.pairwise(schedule):
            denoised = model(x, s * x.new_ones(len(x)))
            if t == 0:
                return denoised
            up = t * (1 - t**2 / s**2).sqrt()
            down = (t**2 - up**2).sqrt()
            x = x + (x - denoised) / s * (down - s) + up * source(lambda x=x: torch.randn_like(x))
        return x

    return sample


def drive(data: Mixture, way: str, steps: int, batch: int) -> list[dict]:
    """Plain noise optimisation until the mean is at the target; one row per iteration."""
    torch.manual_seed(0)
    schedule = torch.cat(
        [torch.linspace(math.log(40), math.log(0.02), steps, dtype=torch.float64).exp(), torch.zeros(1)]
    )
    rollout = Rollout(ancestral(data.denoise, schedule), schedule, memory="none")
    z = [torch.randn(batch, 1, dtype=torch.float64).requires_grad_() for _ in range(steps)]
    # Plain gradient ascent: AdamW's unit steps would move every noise by the same amount, whatever its effect.
    optimizer = torch.optim.SGD(z, lr=0.02 if way == "shift" else 0.01)
    rows, reference = [], None
    for k in range(1000):
        path = rollout(z)
        reference = reference or path.detach()
        rows.append(
            {
                "data": f"{len(data.means)} Gaussian{'s' * (len(data.means) > 1)}",
                "way": way,
                "iteration": k,
                "mean": path.x0.mean().item(),
            }
        )
        rows[-1] |= {"true_kl": data.kl(path.x0.detach())}
        rows[-1] |= {name: f(path.detach(), reference).mean().item() for name, f in SURROGATES.items()}
        if rows[-1]["mean"] >= TARGET - 0.02 or (k > 5 and rows[-1]["mean"] < rows[-2]["mean"] + 1e-4):
            break
        reward = path.x0 if way == "shift" else -((path.x0 - TARGET) ** 2)
        for leaf, g in zip(z, torch.autograd.grad(-reward.sum(), z), strict=True):
            leaf.grad = g
        optimizer.step()
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = list(dict.fromkeys((r["data"], r["way"]) for r in rows))
    figure, axes = plt.subplots(2, len(runs), figsize=(4 * len(runs), 7), layout="constrained", squeeze=False)
    for column, run in enumerate(runs):
        mine = [r for r in rows if (r["data"], r["way"]) == run]
        for name in SURROGATES:
            for row, x in ((0, "mean"), (1, "true_kl")):
                axes[row][column].plot([r[x] for r in mine], [r[name] for r in mine], label=name)
                axes[row][column].set(xlabel=x.replace("_", " "), yscale="symlog")
                axes[row][column].axhline(0, color="grey", linewidth=0.5)
        axes[0][column].plot([r["mean"] for r in mine], [r["true_kl"] for r in mine], "k--", label="true KL")
        axes[0][column].set(title=f"{run[0]}, {run[1]}")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = []
    for data in (Mixture((0.0,), 1.0), Mixture((-1.5, 1.5), 0.5)):
        for way in ("shift", "attract"):
            rows += drive(data, way, args.steps, args.batch)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "gaussian.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    plot(rows, args.out / "gaussian.png")


if __name__ == "__main__":
    main()
