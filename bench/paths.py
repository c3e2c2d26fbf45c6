"""How paths of reward against adherence are read: at one reward, by animals that are drawn again."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

RESAMPLES = 1000
COLUMNS = ("passes", "reward", "adherence", "clip_score")


def path_of(rows: list[dict]) -> tuple[list, torch.Tensor]:
    """(images, (columns, iterates, images)); a run that ended sooner than others stays where it ended."""
    of: dict[tuple, dict[float, dict]] = {}
    for r in rows:
        of.setdefault((r["part"], r["animal"]), {})[r["iterate"]] = r
    images, iterates = sorted(of), sorted({r["iterate"] for r in rows})
    table = [[of[i].get(k, of[i][max(of[i])]) for i in images] for k in iterates]
    return images, torch.tensor([[[r[c] for r in line] for line in table] for c in COLUMNS])


def at_last_passage(path: torch.Tensor, level: float) -> torch.Tensor | None:
    """(columns, iterates), means -> (columns,) where the reward last rises through `level`, None if never."""
    reward = path[1]
    below = torch.nonzero((reward[:-1] < level) & (reward[1:] >= level)).flatten()
    if not len(below):
        return None
    k = int(below[-1])
    share = (level - reward[k]) / (reward[k + 1] - reward[k])
    return path[:, k] * (1 - share) + path[:, k + 1] * share


def at_passes(path: torch.Tensor, passes: float) -> torch.Tensor:
    """(columns, iterates), means -> (columns,) after so much work; its end where it has not so much, and its beginning
    where it has more."""
    work = path[0]
    k = int(torch.searchsorted(work, passes, right=True)) - 1
    if k < 0 or k + 1 == len(work):
        return path[:, max(k, 0)]
    share = (passes - work[k]) / (work[k + 1] - work[k])
    return path[:, k] * (1 - share) + path[:, k + 1] * share


def resampled(animals: list[str], times: int) -> Iterator[list[int]]:
    """Indices of the images of as many animals, drawn with replacement; all draws of an animal together."""
    names = sorted(set(animals))
    of = {a: [n for n, b in enumerate(animals) if b == a] for a in names}
    g = torch.Generator().manual_seed(0)
    for _ in range(times):
        some = torch.randint(len(names), (len(names),), generator=g).tolist()
        yield [n for i in some for n in of[names[i]]]


def against(mine: torch.Tensor, plain: torch.Tensor, animals: list[str], level: float | None) -> dict | None:
    """At one reward: passes, adherence and CLIPScore less plain optimisation's, with a bootstrap over animals.

    level None: at the reward of `mine`'s end; where plain optimisation never has as much, less that of its own best:
    a difference that is rather too small. resamples_reached: the share of resamples in which it gets as far.
    resamples: the difference in adherence in each, NaN where there is none; there: in which it gets as far.
    """

    def once(chosen: list[int]) -> torch.Tensor | None:
        path, other = mine[:, :, chosen].mean(2), plain[:, :, chosen].mean(2)
        at = path[1, -1].item() if level is None else level
        a = path[:, -1] if level is None else at_last_passage(path, at)
        b = at_last_passage(other, at)
        there = torch.tensor(float(b is not None))
        if level is None and at > other[1].max():
            b = other[:, other[1].argmax()]
        return None if a is None or b is None else torch.stack([a[0], b[0], b[2], a[2] - b[2], a[3] - b[3], there])

    everyone = once(list(range(mine.shape[2])))
    if everyone is None:
        return None
    nowhere = torch.tensor([math.nan] * 5 + [0.0])
    found = [once(chosen) for chosen in resampled(animals, RESAMPLES)]
    known = [one for one in found if one is not None]
    # Of a few that got so far nothing can be said.
    spread = torch.stack(known).std(0) if len(known) > RESAMPLES // 2 else nowhere
    every = torch.stack([nowhere if one is None else one for one in found])
    passes, plain_passes, plain_adherence, more, clip, _ = everyone.tolist()
    return {
        "passes": passes, "plain_passes": plain_passes, "plain_adherence": plain_adherence,
        "adherence_above": more, "se": spread[3].item(), "clip_above": clip, "clip_se": spread[4].item(),
        "resamples_reached": every[:, 5].mean().item(), "resamples": every[:, 3], "there": every[:, 5] > 0,
    }  # fmt: skip


def at_equal_passes(mine: torch.Tensor, plain: torch.Tensor, animals: list[str], passes: float) -> dict:
    """Of what came back, (columns, images), reward and adherence less plain optimisation's after as many passes, with a
    bootstrap over animals.
    """

    def once(chosen: list[int]) -> torch.Tensor:
        return (mine[:, chosen].mean(1) - at_passes(plain[:, :, chosen].mean(2), passes))[1:3]

    reward, adherence = once(list(range(mine.shape[1]))).tolist()
    reward_se, adherence_se = torch.stack([once(some) for some in resampled(animals, RESAMPLES)]).std(0).tolist()
    return {
        "reward_at_equal_passes": reward, "reward_at_equal_passes_se": reward_se,
        "adherence_at_equal_passes": adherence, "adherence_at_equal_passes_se": adherence_se,
    }  # fmt: skip


def in_figures(found: dict | None) -> dict:
    """An `against` for a table: without its resamples; nothing where there is none."""
    return {k: v for k, v in (found or {}).items() if k not in ("resamples", "there")}


def pooled(found: dict[str, dict]) -> dict:
    """Of several rewards' `against`, of the same animals: the mean difference in adherence over the rewards, its
    bootstrap error; p, the share of resamples in which it is not above 0; the share in which plain optimisation gets
    to all of the rewards.
    """
    mean = torch.stack([one["resamples"] for one in found.values()]).mean(0)
    there = torch.stack([one["there"] for one in found.values()]).all(0)
    mean = mean[~mean.isnan()]
    return {
        "rewards": " ".join(found),
        "adherence_above": sum(one["adherence_above"] for one in found.values()) / len(found),
        "se": mean.std().item(), "p": (mean <= 0).double().mean().item(),
        "resamples_reached": there.double().mean().item(),
    }  # fmt: skip
