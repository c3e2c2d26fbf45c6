"""How like the frozen model's own images those of a path are: CMMD, and how many of them are natural.

*Natural* is an image that is as near to one of the model's own, in the features of the held-out judge, as 95 % of those
are to one another. Both are of sets of images, so they are compared where the mean reward is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.paper import Evaluator
from bench.paths import at_last_passage, resampled
from bench.tables import natural_within, nearest
from testing.pack import mira

cmmd = mira("sampler.statistics").cmmd
RESAMPLES = 200

Embeddings = dict[str, torch.Tensor]  # "clip", "judge": (..., D)


def evaluator(judge, clip) -> Evaluator:
    """Gives rows with `adherence` and `clip_score`, and embeddings."""
    return Evaluator(SimpleNamespace(clip_score=clip, judge=judge, others={}))


def stacked(looks: list[Embeddings]) -> Embeddings:
    """(iterates, images, D) of the looks of one path."""
    return {name: torch.stack([look[name] for look in looks]) for name in looks[0]}


def beside(parts: list[Embeddings]) -> Embeddings:
    """One path of all images, (iterates, images, D); a path that ended sooner than others stays where it ended."""
    longest = max(len(part["clip"]) for part in parts)

    def filled(path: torch.Tensor) -> torch.Tensor:
        return torch.cat([path, path[-1:].expand(longest - len(path), -1, -1)])

    return {name: torch.cat([filled(part[name]) for part in parts], 1) for name in parts[0]}


class Likeness:
    """base: embeddings of the model's own images, (N, D)."""

    def __init__(self, base: Embeddings):
        self.base = {name: found.float() for name, found in base.items()}
        self.limit = natural_within(self.base["judge"])

    def __call__(self, of: Embeddings) -> dict[str, float]:
        """Of a set, (B, D)."""
        natural = (nearest(of["judge"], self.base["judge"]) <= self.limit).double().mean().item()
        return {"cmmd": cmmd(of["clip"].float(), self.base["clip"]), "natural": natural}


def save(file: Path, found: Embeddings) -> None:
    """Whole or not at all."""
    torch.save(found, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def load(file: Path) -> Embeddings:
    return torch.load(file, weights_only=True)


def base_of(file: Path, sample: Callable[[], list[Embeddings]]) -> Embeddings:
    """Sampled once and kept in `file`."""
    if not file.is_file():
        found = sample()
        save(file, {name: torch.cat([f[name] for f in found]) for name in found[0]})
    return load(file)


def against(
    kept: Embeddings, kept_reward: torch.Tensor, plain: Embeddings, plain_reward: torch.Tensor, animals: list[str],
    like: Likeness,
) -> dict[str, float] | None:  # fmt: skip
    """The kept images, (B, D), and plain optimisation's path, (iterates, B, D), at the mean reward of those, or at its
    best where it never has as much. rewards: (B,), (iterates, B). `..._above_se`: bootstrap errors over animals of the
    differences; NaN where many resamples begin above that reward. None where all images do.
    """

    def once(chosen: list[int]) -> torch.Tensor | None:
        mine = like({name: found[chosen] for name, found in kept.items()})
        rewards = plain_reward[:, chosen].mean(1)
        sets = [like({name: found[k, chosen] for name, found in plain.items()}) for k in range(len(rewards))]
        path = torch.tensor([[0.0, r, s["cmmd"], s["natural"]] for r, s in zip(rewards.tolist(), sets, strict=True)]).T
        level = kept_reward[chosen].mean().item()
        other = path[:, int(rewards.argmax())] if level > rewards.max() else at_last_passage(path, level)
        if other is None:  # it begins above
            return None
        return torch.tensor([mine["cmmd"], mine["natural"], other[2].item(), other[3].item()])

    everyone = once(list(range(len(animals))))
    if everyone is None:
        return None
    known = [one for chosen in resampled(animals, RESAMPLES) if (one := once(chosen)) is not None]
    found = dict(zip(("cmmd", "natural", "plain_cmmd", "plain_natural"), everyone.tolist(), strict=True))
    drawn = torch.stack(known) if len(known) > RESAMPLES // 2 else torch.full((2, 4), math.nan)
    errors = (drawn[:, :2] - drawn[:, 2:]).std(0).tolist()
    return found | {"cmmd_above_se": errors[0], "natural_above_se": errors[1]}
