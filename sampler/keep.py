"""Which iterate comes back, for each image of a batch on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .rollout import per_image

PROGRESS = 1e-3  # the share of its gain so far that an image's best reward rises by, or it makes no progress


def chosen(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """where (B,), new and old (B, ...): each image's new value, or its old one."""
    return torch.where(per_image(where.to(old.device), old), new, old)


def comparable(reward: Tensor) -> Tensor:
    """The same, but that what is not finite (NaN, infinity) is worse than everything: no reward is that good."""
    return torch.where(torch.isfinite(reward), reward, -math.inf)


@dataclass
class Kept:
    """What comes back: latent (B, C, ...), noises, each (B, C, ...), and of which iteration each image is, (B,). empty:
    nothing is there yet.
    """

    latent: Tensor = field(init=False)
    noises: list[Tensor] = field(init=False)
    iteration: Tensor = field(init=False)
    empty: bool = True

    def take(self, k: int | Tensor, where: Tensor, latent: Tensor, noises: Sequence[Tensor]) -> None:
        """Iterate k, or k of each image, for the images of `where`, (B,); the first one for all. Never in place: what
        was kept before may still be in somebody's hands, and memory may run out half-way.
        """
        if self.empty:
            self.empty, self.latent, self.noises = False, latent.detach().clone(), [z.detach().clone() for z in noises]
            self.iteration = torch.as_tensor(k).expand(len(latent)).clone()
            return
        kept = chosen(where, latent.detach(), self.latent)
        if len(noises) != len(self.noises):  # of a stretch with another number of steps: those of the newer one
            self.noises = [z.detach().clone() for z in noises] if where.any() else self.noises
        else:
            self.noises = [chosen(where, new.detach(), old) for new, old in zip(noises, self.noises, strict=True)]
        self.latent, self.iteration = kept, torch.where(where.cpu(), torch.as_tensor(k), self.iteration)


class Keeper(Kept):
    """Keeps one iterate per image by a stated criterion.

    policy: "last" (the newest finite one), "best_reward", or "best_within_drift": the best reward among those whose
    drift is at most `drift_limit` (0: no limit). The plain sample has drift 0, so there always is one.
    """

    def __init__(self, policy: str, drift_limit: float) -> None:
        super().__init__()
        self.policy = policy
        self.limit = drift_limit if policy == "best_within_drift" and drift_limit > 0 else math.inf

    def update(
        self, k: int, reward: Tensor, drift: Tensor, latent: Tensor, noises: Sequence[Tensor], active: Tensor
    ) -> None:
        """reward, drift, active: (B,). Images that are not active keep what they have."""
        reward, drift = reward.detach().cpu().double(), drift.detach().cpu().double()
        if self.empty:
            self.take(k, active, latent, noises)
            self.reward = comparable(reward)
            self.best, self.first, self.progress = self.reward.clone(), self.reward.clone(), self.iteration.clone()
            return
        finite = torch.isfinite(reward) & active
        begins = finite & ~torch.isfinite(self.first)  # what it gains counts from the first reward that there is
        self.first = torch.where(begins, reward, self.first)
        better = finite & (drift <= self.limit)
        if self.policy != "last":
            better = better & (reward > self.reward)
        self.take(k, better, latent, noises)
        self.reward = torch.where(better, reward, self.reward)
        gain = (self.best - self.first).nan_to_num(0).clamp(min=0)
        self.progress = torch.where(begins | (finite & (reward > self.best + PROGRESS * gain)), k, self.progress)
        self.best = torch.where(finite, torch.maximum(reward, self.best), self.best)

    def since_progress(self, k: int) -> Tensor:
        """(B,): iterations since the best reward last rose by more than `PROGRESS` of its gain."""
        return k - self.progress
