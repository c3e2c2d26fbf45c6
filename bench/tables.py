"""Tables and plots of the benchmark, from its files alone: `python dev.py bench paper --report [FOLDER]`.

The rows of a report stay in its folder, and what the store has not got is made from them: all but what is read off the
images' embeddings (CMMD, spectral distance), which is taken over from the tables.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import torch

from bench.grid import Failure, Store
from bench.grid import number as parsed
from bench.rows import write
from testing.pack import mira

cmmd, spectral_distance = mira("sampler.statistics").cmmd, mira("sampler.statistics").spectral_distance
AGAINST = "dno"
COLUMNS = (
    "reward", "adherence", "top1", "clip_score", "hps", "pickscore", "mira", "mira_two_sided", "score_distance",
    "path_kl", "latent_distance", "forward", "backward", "seconds", "memory_mb",
)  # fmt: skip
RESAMPLES = 400


OF_EMBEDDINGS = ("cmmd", "spectral_distance")


def opened(folder: Path) -> Store | None:
    config = folder / "config.json"
    return Store(folder, json.loads(config.read_text())) if config.is_file() else None


def read(path: Path) -> list[dict]:
    """The rows of a table, numbers as numbers; none where there is no such table."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{k: parsed(v) for k, v in row.items()} for row in csv.DictReader(file)]


def animals_of(file: Path) -> list[str]:
    """The images of a unit, in their order."""
    with file.open(newline="") as rows:
        return list(dict.fromkeys(r["animal"] for r in csv.DictReader(rows)))


def nearest(features: torch.Tensor, base: torch.Tensor, leave_out: bool = False) -> torch.Tensor:
    """The distance of every row to the nearest base image, in the judge's features."""
    distance = torch.cdist(features.float(), base.float())
    if leave_out:
        distance.fill_diagonal_(math.inf)
    return distance.amin(1)


def natural_within(base: torch.Tensor) -> torch.Tensor:
    """How near to a base image one is natural: as 95 % of those are to one another."""
    return nearest(base, base, True).quantile(0.95)


def verdict(a: dict, b: dict) -> float:
    """The demo's judge, a rule: who fulfils more of (the prompt is right, the image is natural, the reward rose by half
    of what the better of the two gained) wins; 1, 0, or 0.5 for a tie.
    """
    best = max(a["gain"], b["gain"])
    points = [r["top1"] + r["natural"] + float(best > 0 and r["gain"] >= best / 2) for r in (a, b)]
    return 0.5 if points[0] == points[1] else float(points[0] > points[1])


def paired(differences: torch.Tensor) -> tuple[float, float, float]:
    """Mean, its standard error, and the two-sided p of a sign-flip test (exact up to 10 differences)."""
    d = differences.double()
    n, mean = len(d), d.mean()
    if n < 2:
        return mean.item(), math.nan, math.nan
    if n <= 10:
        signs = torch.tensor([[1 if i >> k & 1 else -1 for k in range(n)] for i in range(2**n)], dtype=torch.double)
    else:
        signs = torch.randint(2, (20_000, n), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
        signs[0] = 1  # what was seen is one of the ways, so that p is never 0
    flipped = (signs * d).mean(1).abs()
    return mean.item(), (d.std() / n**0.5).item(), (flipped >= mean.abs() - 1e-12).double().mean().item()


def as_written(value: float | str | None) -> float | str | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


class Results:
    """All finals and paths of a store, and of rows of an earlier report of which it has no such target and method, by
    target and method, images in one order for all methods.
    """

    def __init__(self, store: Store | None, earlier: list[dict]):
        made = store.rows() if store else []
        # As they are written, so that the tables are the same when they are made from the rows.
        self.rows = [{k: as_written(v) for k, v in r.items()} for r in made if r["method"] != "base"]
        there = {(r["target"], r["method"]) for r in self.rows}
        self.rows += [r for r in earlier if (r["target"], r["method"]) not in there]
        self.finals: dict[tuple[str, str], dict[tuple, dict]] = {}
        self.paths: dict[tuple[str, str], dict[tuple, dict[int, dict]]] = {}
        for r in self.rows:
            key, image = (r["target"], r["method"]), (int(r["seed"]), r["animal"])
            if r["k"] == -1:
                self.finals.setdefault(key, {})[image] = r
            else:
                self.paths.setdefault(key, {}).setdefault(image, {})[int(r["k"])] = r
        self.targets = list(dict.fromkeys(t for t, _ in self.finals))
        self.methods = list(dict.fromkeys(m for _, m in self.finals))
        self.embeddings: dict[tuple[str, str], dict[tuple, dict[str, torch.Tensor]]] = {}
        base_clip, base_judge = [], []
        for file in sorted(store.folder.glob("*.csv")) if store else ():
            unit = file.stem
            tensors = store.tensors(unit)
            if unit.startswith("base__"):
                base_clip.append(tensors["final_clip"])
                base_judge += [tensors["final_judge"]] if "final_judge" in tensors else []
                continue
            method, target, seed, _ = unit.split("__")
            size = len(tensors["images"])
            animals = animals_of(file)
            for b in range(size):
                of = {k: v[:, b] if k.startswith("path_") else v[b] for k, v in tensors.items() if k != "images"}
                self.embeddings.setdefault((target, method), {})[int(seed), animals[b]] = of
        self.base_clip = torch.cat(base_clip).float() if base_clip else None
        self.base_judge = torch.cat(base_judge).float() if base_judge else None
        self._plain()

    def _plain(self) -> None:
        """What every image gained, and whether it is as near to a base image as 95 % of those are to one another."""
        if self.base_judge is not None:
            limit = natural_within(self.base_judge)
        for (target, method), images in self.finals.items():
            for image, row in images.items():
                if row.get("forward") is not None:
                    row["passes"] = row["forward"] + 2 * row["backward"]
                start = self.paths.get((target, AGAINST), {}).get(image, {}).get(0)
                row["gain"] = row["reward"] - start["reward"] if start else math.nan
                if (target, method) in self.embeddings and self.base_judge is not None:
                    features = self.embeddings[target, method][image]["final_judge"][None]
                    row["natural"] = float(nearest(features, self.base_judge)[0] <= limit)

    def shared(self, target: str, a: str, b: str) -> list[tuple]:
        one, two = self.finals.get((target, a), {}), self.finals.get((target, b), {})
        return [i for i in one if i in two]

    def clip(self, target: str, method: str, k: int | None = None) -> torch.Tensor:
        """(N, D): the embeddings of the finals, or of iteration k."""
        found = self.embeddings[target, method].values()
        return torch.stack([e["final_clip"] if k is None else e["path_clip"][k] for e in found]).float()


def summary(results: Results, target: str, method: str, earlier: dict) -> dict:
    """earlier: the same of an earlier report, for what only embeddings tell."""
    rows = list(results.finals[target, method].values())
    out: dict = {"target": target, "method": method, "images": len(rows)}
    for column in (*COLUMNS, "gain", "natural"):
        values = [r[column] for r in rows if r.get(column) is not None]
        if values:
            out[column] = sum(values) / len(values)
    seeds = sorted({s for s, _ in results.finals[target, method]})
    means = torch.tensor(
        [
            sum(v) / len(v)
            for s in seeds
            if (v := [r["reward"] for (seed, _), r in results.finals[target, method].items() if seed == s])
        ]
    )
    out["reward_se_seeds"] = (means.std() / len(means) ** 0.5).item() if len(means) > 1 else math.nan
    if (target, method) not in results.embeddings:
        out |= {name: earlier[name] for name in OF_EMBEDDINGS if earlier.get(name) is not None}
    elif results.base_clip is not None:
        embeddings = results.clip(target, method)
        out["cmmd"] = cmmd(embeddings, results.base_clip)
        if min(len(embeddings), len(results.base_clip)) > 2:
            out["spectral_distance"] = spectral_distance(embeddings, results.base_clip)
    images = results.shared(target, method, AGAINST)
    mine, other = results.finals[target, method], results.finals.get((target, AGAINST), {})
    if images and method != AGAINST:
        for column in ("reward", "adherence"):
            if mine[images[0]].get(column) is not None:
                difference = torch.tensor([mine[i][column] - other[i][column] for i in images])
                names = (f"{column}_over_{AGAINST}", f"{column}_over_{AGAINST}_se", f"{column}_p")
                out |= dict(zip(names, paired(difference), strict=True))
        if "natural" in mine[images[0]]:
            wins = [verdict(mine[i], other[i]) for i in images]
            out["win_rate"] = sum(wins) / len(wins)
    return out


def at(x: torch.Tensor, y: torch.Tensor, level: float) -> float:
    """y on the line through the path's points where x first reaches the level; nan where it never does."""
    if x[0] >= level:
        return y[0].item()
    for k in range(1, len(x)):
        if x[k] >= level > x[k - 1]:
            return (y[k - 1] + (level - x[k - 1]) / (x[k] - x[k - 1]) * (y[k] - y[k - 1])).item()
    return math.nan


def number(value) -> float:
    return math.nan if value is None else value


def path(results: Results, target: str, method: str, images: list, column: str) -> torch.Tensor:
    """(K + 1,): the mean over images."""
    found = [results.paths[target, method][i] for i in images]
    # An image that stopped early stays where it was.
    last = max(max(f) for f in found)
    if column == "passes":
        # One forward, then one back and one forward an iteration.
        whole = sum(results.finals[target, method][i]["passes"] for i in images) / len(images)
        return whole * torch.tensor([(1 + 3 * k) / (1 + 3 * last) for k in range(last + 1)], dtype=torch.double)
    values = [[number(f[min(k, max(f))].get(column)) for k in range(last + 1)] for f in found]
    return torch.tensor(values, dtype=torch.double).mean(0)


def matched(results: Results, target: str, method: str, drift: str) -> dict | None:
    """The method's reward and adherence less those of early-stopped DNO at the same drift; intervals by bootstrap."""
    images = results.shared(target, method, AGAINST)
    if not images or method == AGAINST or drift not in results.finals[target, method][images[0]]:
        return None
    if any(results.finals[target, method][i].get(drift) is None for i in images):
        return None
    columns = [c for c in ("reward", "adherence") if results.finals[target, method][images[0]].get(c) is not None]
    g = torch.Generator().manual_seed(0)

    def once(chosen: list) -> tuple[float, float, float]:
        final = [results.finals[target, method][i] for i in chosen]
        level = sum(r[drift] for r in final) / len(final)
        x = path(results, target, AGAINST, chosen, drift)
        out = []
        for column in columns:
            mine = sum(r[column] for r in final) / len(final)
            out.append(mine - at(x, path(results, target, AGAINST, chosen, column), level))
        return level, *out, *[math.nan] * (2 - len(out))

    level, reward, adherence = once(images)
    boot = [
        once([images[j] for j in torch.randint(len(images), (len(images),), generator=g)]) for _ in range(RESAMPLES)
    ]
    spread = torch.tensor(boot, dtype=torch.double)[:, 1:]
    # Where DNO's path does not go as far, there is nothing to compare, and with it no error.
    reached = torch.isfinite(spread)
    share = reached.double().mean(0)
    values = [reward, adherence]
    se = [
        s[ok].std().item() if of > 0.5 and math.isfinite(v) else math.nan
        for s, ok, of, v in zip(spread.T, reached.T, share.tolist(), values, strict=True)
    ]
    return {"target": target, "method": method, "drift": drift, "level": level, "reward_over_dno": reward,
            "reward_se": se[0], "adherence_over_dno": adherence, "adherence_se": se[1],
            "resamples_reached": share[0].item()}  # fmt: skip


def together(results: Results, method: str) -> dict | None:
    """Of all rewards, counting alike: the gain as a share of DNO's; and of those where DNO goes as far (`reached`),
    adherence less that of DNO stopped at the same reward. Images are resampled for all rewards at once, for they share
    their noises; resamples in which DNO falls short are left out."""
    targets = [t for t in results.targets if (t, method) in results.finals and (t, AGAINST) in results.finals]
    if method == AGAINST or not targets:
        return None
    images = [i for i in results.shared(targets[0], method, AGAINST)
              if all(i in results.finals[t, m] for t in targets for m in (method, AGAINST))]  # fmt: skip
    if not images or results.finals[targets[0], method][images[0]].get("adherence") is None:
        return None
    g = torch.Generator().manual_seed(0)

    def once(chosen: list) -> tuple[list[float], list[float]]:
        shares, kept = [], []
        for target in targets:
            final = [results.finals[target, method][i] for i in chosen]
            reward, adherence = (sum(r[c] for r in final) / len(final) for c in ("reward", "adherence"))
            x, y = (path(results, target, AGAINST, chosen, c) for c in ("reward", "adherence"))
            gain = (x.max() - x[0]).item()
            shares.append((reward - x[0].item()) / gain if gain > 0 else math.nan)
            kept.append(adherence - at(x, y, reward))
        return shares, kept

    point = torch.tensor(once(images), dtype=torch.double)
    boot = torch.tensor(
        [once([images[j] for j in torch.randint(len(images), (len(images),), generator=g)]) for _ in range(RESAMPLES)],
        dtype=torch.double,
    )  # (resamples, (share, adherence), rewards)
    reached = torch.isfinite(point[1])
    share, adherence = point[0].mean().item(), point[1][reached].mean().item()
    boot = torch.stack([boot[:, 0].mean(1), boot[:, 1][:, reached].mean(1)], 1)
    errors = [s.std().item() if len(s := c[torch.isfinite(c)]) > RESAMPLES // 2 else math.nan for c in boot.T]
    return {"method": method, "rewards": len(targets), "images": len(images), "share": share, "share_se": errors[0],
            "reached": int(reached.sum()), "adherence_over_dno": adherence, "adherence_se": errors[1]}  # fmt: skip


def matched_reward(results: Results, target: str, method: str) -> dict | None:
    """Adherence less that of early-stopped DNO at the same reward, for methods that reach what DNO reaches."""
    row = matched(results, target, method, "reward")
    return row and {k: v for k, v in row.items() if not k.startswith("reward_")} | {"drift": "(reward)"}


WINS = ("reward", "adherence", "clip_score", "hps", "pickscore")


def wins(results: Results, target: str, method: str, other: str) -> dict | None:
    """Of each score the share of images in which the method's is higher; ties count half. other: a method, or "plain",
    the sample that DNO began from."""
    mine = results.finals[target, method]
    theirs = results.finals.get((target, other), {})
    if other == "plain":
        theirs = {image: path[0] for image, path in results.paths.get((target, AGAINST), {}).items() if 0 in path}
    images = [i for i in mine if i in theirs]
    if method == other or not images:
        return None
    row: dict = {"target": target, "method": method, "other": other, "images": len(images)}
    for column in WINS:
        pairs = [(mine[i].get(column), theirs[i].get(column)) for i in images]
        if all(a is not None and b is not None for a, b in pairs):
            row[column] = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    return row


def markdown(rows: list[dict], columns: dict[str, str], title: str) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name)
            if isinstance(value, float):
                value = "" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
            if name.endswith("_over_dno") and value:
                error = row.get(f"{name}_se", row.get(name.replace("_over_dno", "_se")))
                p = row.get(name.replace("_over_dno", "_p"))
                value += f" ±{error:.3f}" if error is not None and not math.isnan(error) else ""
                value += f" (p {p:.3f})" if p is not None and not math.isnan(p) else ""
            cells.append("" if value is None else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


MAIN = {
    "method": "method", "images": "images", "reward": "reward", "reward_over_dno": "over DNO",
    "adherence": "adherence", "adherence_over_dno": "over DNO", "top1": "top 1", "clip_score": "CLIPScore",
    "hps": "HPS", "pickscore": "PickScore",
    "cmmd": "CMMD", "spectral_distance": "spectral distance", "natural": "natural", "win_rate": "wins over DNO",
    "path_kl": "path KL",
    "score_distance": "score distance", "forward": "forward", "backward": "backward", "seconds": "seconds",
}  # fmt: skip
TOGETHER = {"method": "method", "rewards": "rewards", "images": "images", "share": "gain / DNO's", "share_se": "±",
            "reached": "of these DNO reaches", "adherence_over_dno": "adherence over DNO"}  # fmt: skip
WON = {"method": "method", "images": "images", "reward": "reward", "adherence": "adherence",
       "clip_score": "CLIPScore", "hps": "HPS", "pickscore": "PickScore"}  # fmt: skip
MATCHED = {"method": "method", "drift": "drift", "level": "level", "reward_over_dno": "reward over DNO",
           "adherence_over_dno": "adherence over DNO", "resamples_reached": "reached"}  # fmt: skip


def report(folder: Path, out: Path) -> None:
    store, earlier = opened(folder), read(out / "paper_rows.csv")
    if not (store or earlier):
        raise Failure(f"{folder} holds no benchmark (no config.json): run `python dev.py bench paper` first")
    results = Results(store, earlier)
    if not results.finals:
        raise Failure(f"{folder} holds no finished runs yet")
    out.mkdir(parents=True, exist_ok=True)
    known = {(r["target"], r["method"]): r for r in read(out / "paper.csv")}
    tables = {
        t: [summary(results, t, m, known.get((t, m), {})) for m in results.methods if (t, m) in results.finals]
        for t in results.targets
    }
    configs = json.loads(file.read_text()) if (file := out / "paper_config.json").is_file() else {}
    if store:
        configs |= {t: store.config for t, _ in results.embeddings}
    file.write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")
    config = configs[results.targets[0]]
    rivals = [
        row
        for t in results.targets
        for m in results.methods
        if (t, m) in results.finals and (t, AGAINST) in results.finals
        for row in (matched(results, t, m, "path_kl"), matched(results, t, m, "latent_distance"),
                    matched(results, t, m, "passes"), matched_reward(results, t, m))
        if row
    ]  # fmt: skip
    write(out / "paper_rows.csv", results.rows)
    write(out / "paper.csv", [r for rows in tables.values() for r in rows])
    write(out / "paper_matched.csv", rivals)
    pooled = [row for m in results.methods if (row := together(results, m))]
    write(out / "paper_together.csv", pooled)
    won = [
        row
        for target, method in results.finals
        for other in ("plain", *results.methods)
        if (row := wins(results, target, method, other))
    ]
    write(out / "paper_wins.csv", won)
    parts = [
        "# The paper's comparison on the " + str(config["model"]) + " model",
        "Made by `python dev.py bench paper --report` from [every image](paper_rows.csv), of runs of these "
        "[configurations](paper_config.json).",
        "One budget for all methods, counted in network passes per image (forward, backward). ± is the standard error "
        "over images, p a paired sign-flip test. CMMD is against the frozen model's own images. *Natural*: as near to "
        "one of those, in the held-out judge's features, as 95 % of them are to one another. *Wins*: the image that "
        "fulfils more of (judge's top 1 is the prompt, natural, at least half of the better one's gain); ties count "
        "half. Another seed is far from the plain sample by every drift (path KL 8), but for `default`, which counts "
        "its own from the seed that it began from. Guided methods have no drift from the frozen model's noises. Errors "
        "of the matched tables are bootstrapped, over the share of resamples (*reached*) in which DNO goes as far.",
    ]
    if pooled:
        parts.append(
            markdown(
                pooled, TOGETHER, "All rewards together: the gain as a share of DNO's, and adherence at equal reward"
            )
        )
    for target, rows in tables.items():
        parts.append(
            markdown(rows, {k: v for k, v in MAIN.items() if any(k in r for r in rows)}, f"Optimised: {target}")
        )
    for target in results.targets:
        over = [r for r in won if r["target"] == target and r["other"] == "plain"]
        shown = {k: v for k, v in WON.items() if any(k in r for r in over)}
        if over:
            parts.append(markdown(over, shown, f"{target}: the share of images that beat their plain sample, by score"))
    for target in results.targets:
        mine = [r for r in rivals if r["target"] == target]
        parts.append(
            markdown(mine, MATCHED, f"{target}: against early-stopped DNO at the same drift, passes or reward")
        )
    (out / "paper.md").write_text("\n\n".join(parts) + "\n")
    if store:  # whose images are all there
        plots(results, out)
        sweep_plot(results, out, "steps", "sampling steps", {m: (config["steps"], m) for m in results.methods})
        sweep_plot(results, out, "beta", "beta (0: DNO)", {"mira": (0, AGAINST)})
    print(f"{out / 'paper.md'}, {sum(len(v) for v in results.finals.values())} images")


def sweep_plot(results: Results, out: Path, key: str, label: str, also: dict) -> None:
    """Reward and adherence of the methods `<name>_<key>_<value>` against the value, over the images that all have.

    also: name -> one more (value, method).
    """
    import matplotlib.pyplot as plt

    families: dict[str, dict[float, str]] = {}
    for method in results.methods:
        name, _, value = method.partition(f"_{key}_")
        if value:
            families.setdefault(name, {})[float(value)] = method
    swept = [m for members in families.values() for m in members.values()]
    targets = [t for t in results.targets if any((t, m) in results.finals for m in swept)]
    if not targets:
        return
    figure, axes = plt.subplots(2, len(targets), figsize=(5 * len(targets), 7), squeeze=False, layout="constrained")
    for column, target in enumerate(targets):
        for name, members in families.items():
            there = {n: results.finals[target, m] for n, m in sorted([also[name], *members.items()])
                     if (target, m) in results.finals}  # fmt: skip
            shared = [i for i in next(iter(there.values()), {}) if all(i in rows for rows in there.values())]
            for axis, what in zip(axes[:, column], ("reward", "adherence"), strict=True):
                values = [
                    sum(number(rows[i].get(what)) for i in shared) / max(1, len(shared)) for rows in there.values()
                ]
                axis.plot(list(there), values, marker="o", label=f"{name}, {len(shared)} images")
                axis.set(xlabel=label, ylabel=what, title=f"optimised: {target}")
    axes[0][0].legend(fontsize=7)
    figure.savefig(out / f"paper_{key}.png", dpi=75)
    plt.close(figure)


def plots(results: Results, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, len(results.targets), figsize=(5 * len(results.targets), 13), layout="constrained", squeeze=False
    )
    for column, target in enumerate(results.targets):
        top, middle, bottom = axes[:, column]
        for n, method in enumerate(results.methods):
            if (target, method) not in results.finals:
                continue
            images, colour = list(results.finals[target, method]), f"C{n % 10}"
            style = dict(linestyle="--", color="black") if method == AGAINST else dict(color=colour)
            if (target, method) in results.paths:
                images = list(results.paths[target, method])
                reward = path(results, target, method, images, "reward")
                top.plot(reward, path(results, target, method, images, "adherence"), label=method, **style)  # fmt: skip
                if (target, method) in results.embeddings and results.base_clip is not None:
                    drift = [cmmd(results.clip(target, method, k), results.base_clip) for k in range(len(reward))]
                    middle.plot(drift, label=method, **style)
                bottom.plot(path(results, target, method, images, "score_distance"), label=method, **style)  # fmt: skip
            else:
                rows = results.finals[target, method].values()
                marker = "os^vD*Pp"[n % 8]
                means = [sum(number(r.get(c)) for r in rows) / len(rows) for c in ("reward", "adherence")]
                top.plot(*means, marker, label=method,
                         color=colour)  # fmt: skip
        top.set(title=f"optimised: {target}", xlabel="reward", ylabel="adherence (held-out judge)")
        middle.set(xlabel="iteration", ylabel="CMMD to the frozen model's images")
        bottom.set(xlabel="iteration", ylabel="score distance")
    axes[0][0].legend(fontsize=7, ncols=2)
    figure.savefig(out / "paper.png", dpi=75)
    plt.close(figure)
