"""Tables and plots of the front study, from its rows: `python dev.py bench front --report`."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch

from bench.grid import Failure
from bench.rows import gather, write
from bench.tables import at

GRID = 12  # levels of the area between two curves
REACH = 0.8  # of plain optimisation's gain: where the area ends
RESAMPLES = 400
COLUMNS = ("reward", "adherence", "clip_score")
DRIFTS = ("path_kl", "score_distance", "mira", "mira_two_sided", "latent_distance")


def load(folder: Path, path: Path) -> dict[tuple[str, str], list[dict]]:
    """(reward, variant) -> rows of all parts, `animal` telling the image. The runs in `folder` are added to `path`."""
    gather(folder, path, ("variant", "optimised", "part"))
    found: dict[tuple[str, str], list[dict]] = {}
    for row in csv.DictReader(path.open()) if path.is_file() else ():
        numbers = {c: float(row[c] or math.nan) for c in (*COLUMNS, *DRIFTS)}
        of = {"iteration": int(row["iteration"]), "part": int(row["part"]), "animal": row["animal"]}
        found.setdefault((row["optimised"], row["variant"]), []).append(of | numbers)
    return found


def curves(rows: list[dict], columns: tuple[str, ...]) -> tuple[list, torch.Tensor]:
    """(images, (columns, iterations + 1, images))."""
    table = {(r["iteration"], r["part"], r["animal"]): r for r in rows}
    images = sorted({(p, a) for _, p, a in table})
    steps = sorted({k for k, _, _ in table})
    values = [[[table[(k, *i)][c] for i in images] for k in steps] for c in columns]
    return images, torch.tensor(values, dtype=torch.double)


def compare(mine: list[dict], plain: list[dict], column: str) -> dict:
    """`column` at equal reward, less plain optimisation's: at a quarter, half and three quarters of plain's gain, and
    the mean over all levels that both reach (the area between the curves). Standard errors by bootstrap over images."""
    columns = ("reward", column)
    images, a = curves(mine, columns)
    others, b = curves(plain, columns)
    shared = [i for i in images if i in others]
    return compare_curves(a[:, :, [images.index(i) for i in shared]], b[:, :, [others.index(i) for i in shared]])


def compare_curves(a: torch.Tensor, b: torch.Tensor) -> dict:
    """Of (reward and a column, iterations + 1, images), for the same images: see `compare`."""

    def once(chosen: torch.Tensor) -> list[float]:
        x, y = a[:, :, chosen].mean(2)
        x0, y0 = b[:, :, chosen].mean(2)
        start, gain = x0[0].item(), (x0.max() - x0[0]).item()

        def over(share: float) -> float:
            level = start + share * gain
            return at(x, y, level) - at(x0, y0, level)

        area = [over(REACH * (n + 1) / GRID) for n in range(GRID)]
        area = [v for v in area if not math.isnan(v)]
        return [over(0.25), over(0.5), over(0.75), sum(area) / len(area) if area else math.nan]

    g = torch.Generator().manual_seed(0)
    count = a.shape[2]
    everyone = once(torch.arange(count))
    boot = torch.tensor([once(torch.randint(count, (count,), generator=g)) for _ in range(RESAMPLES)])
    out: dict = {"images": count}
    for n, name in enumerate(("quarter", "half", "three_quarters", "area")):
        spread = boot[:, n][torch.isfinite(boot[:, n])]
        out[name] = everyone[n]
        out[f"{name}_se"] = spread.std().item() if len(spread) > RESAMPLES // 2 else math.nan
    gained = a[0].mean(1)
    gained0 = b[0].mean(1)
    out["gain"] = ((gained.max() - gained[0]) / (gained0.max() - gained0[0])).item()
    return out


def draws(runs: dict, reward: str) -> torch.Tensor | None:
    """(draws, (reward, adherence, CLIPScore), iterations + 1, images): plain optimisation from three seeds, if run."""
    members = [(reward, n) for n in ("dno", "dno_again_1", "dno_again_2") if (reward, n) in runs]
    if len(members) < 3:
        return None
    return torch.stack([curves([r for r in runs[m] if r["part"] == 0], COLUMNS)[1] for m in members])


def several(paths: torch.Tensor, count: int) -> torch.Tensor:
    """(columns, iterations + 1, images): of each image the draw of the highest reward, among `count` of them.

    The mean over all ways to choose so many, so that no draw is favoured.
    """
    chosen = []
    for some in torch.combinations(torch.arange(len(paths)), count):
        among = paths[some]
        best = among[:, 0].argmax(0).expand(1, *among.shape[1:])
        chosen.append(among.gather(0, best)[0])
    return torch.stack(chosen).mean(0)


def seeds(paths: torch.Tensor, reward: str) -> list[dict]:
    """Some iterations from each of several seeds, the best reward kept: what comes of it, and what it costs."""
    out = []
    for count in range(1, len(paths) + 1):
        for k, values in enumerate(several(paths, count).mean(2).T.tolist()):
            row = {"optimised": reward, "seeds": count, "iterations": k, "cost": count * (3 * k + 1)}
            out.append(row | dict(zip(COLUMNS, values, strict=True)))
    return out


def report(folder: Path, out: Path) -> None:
    runs = load(folder, out / "front_rows.csv")
    if not runs:
        raise Failure(f"neither {folder} nor {out} holds runs: run `python dev.py bench front` first")
    rows = []
    for (reward, name), mine in runs.items():
        if name == "dno" or (reward, "dno") not in runs:
            continue
        for column in ("adherence", "clip_score"):
            compared = compare(mine, runs[reward, "dno"], column)
            rows.append({"reward": reward, "variant": name, "column": column} | compared)
    drawn = {r: d for r in dict.fromkeys(r for r, _ in runs) if (d := draws(runs, r)) is not None}
    for reward, paths in drawn.items():
        for count in range(2, len(paths) + 1):
            for n, column in enumerate(("adherence", "clip_score"), 1):
                compared = compare_curves(several(paths, count)[[0, n]], several(paths, 1)[[0, n]])
                rows.append({"reward": reward, "variant": f"best_of_{count}_runs", "column": column} | compared)
    rows.sort(key=lambda r: (r["column"], r["reward"], -(r["area"] if r["area"] == r["area"] else -9)))
    write(out / "front.csv", rows)
    means = []
    columns = (*COLUMNS, *DRIFTS)
    for (reward, name), mine in runs.items():
        images, values = curves(mine, columns)
        for k, of in enumerate(values.mean(2).T.tolist()):
            row = {"optimised": reward, "variant": name, "images": len(images), "iteration": k}
            means.append(row | dict(zip(columns, of, strict=True)))
    write(out / "front_paths.csv", means)
    if drawn:
        write(out / "front_seeds.csv", [row for reward, paths in drawn.items() for row in seeds(paths, reward)])
    plot(runs, out / "front.png")
    for row in rows:
        if row["column"] == "adherence":
            print(row["reward"], row["variant"], f"{row['images']} images",
                  *(f"{n} {row[n]:+.3f}±{row[n + '_se']:.3f}" for n in ("quarter", "half", "three_quarters", "area")),
                  f"gain {row['gain']:.2f}")  # fmt: skip


def plot(runs: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rewards = list(dict.fromkeys(r for r, _ in runs))
    figure, axes = plt.subplots(2, len(rewards), figsize=(5.5 * len(rewards), 10), layout="constrained", squeeze=False)
    for column, reward in enumerate(rewards):
        mine = {name: rows for (r, name), rows in runs.items() if r == reward}
        for n, (name, rows) in enumerate(mine.items()):
            # Of all parts there are: only the first is in every variant, so that curves begin together.
            _, values = curves([r for r in rows if r["part"] == 0] or rows, COLUMNS)
            x, *ys = values.mean(2)
            style = dict(color="black", linewidth=2.5, zorder=5) if name == "dno" else dict(color=f"C{n % 10}")
            for axis, y in zip(axes[:, column], ys, strict=True):
                axis.plot(x, y, marker=".", linestyle=("-", "--", ":")[n // 10 % 3], label=name, **style)
        axes[0][column].set(title=f"optimised: {reward}", xlabel="reward", ylabel="adherence (held-out judge)")
        axes[1][column].set(xlabel="reward", ylabel="CLIPScore")
        axes[0][column].legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=70)
    plt.close(figure)
