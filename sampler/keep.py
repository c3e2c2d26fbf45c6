"""Which iterate comes back, for each image of a batch on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .rollout import per_image


class Keeper:
    """Keeps one iterate per image by a stated criterion.

    policy: "last" (the newest finite one), "best_reward", or "best_within_drift": the best reward among those whose
    drift is at most `drift_limit` (0: no limit). The plain sample has drift 0, so there always is one.
    """

    def __init__(self, policy: str, drift_limit: float):
        self.policy = policy
        self.limit = drift_limit if policy == "best_within_drift" and drift_limit > 0 else math.inf
        self.latent: Tensor | None = None

    def update(
        self, k: int, reward: Tensor, drift: Tensor, latent: Tensor, noises: Sequence[Tensor], active: Tensor
    ) -> None:
        """reward, drift, active: (B,). Images that are not active keep what they have."""
        reward, drift = reward.detach().cpu().double(), drift.detach().cpu().double()
        if self.latent is None:
            self.latent = latent.clone()
            self.noises = [z.detach().clone() for z in noises]
            self.iteration = torch.full((len(reward),), k)
            self.reward = reward.nan_to_num(nan=-math.inf)
            self.best, self.first, self.progress = self.reward.clone(), self.reward.clone(), self.iteration.clone()
            return
        finite = torch.isfinite(reward) & active
        better = finite & (drift <= self.limit)
        if self.policy != "last":
            better = better & (reward > self.reward)
        self.reward = torch.where(better, reward, self.reward)
        self.iteration = torch.where(better, k, self.iteration)
        where = better.to(latent.device)
        self.latent = torch.where(per_image(where, latent), latent, self.latent)
        for kept, z in zip(self.noises, noises, strict=True):
            kept.copy_(torch.where(per_image(where, kept), z.detach(), kept))
        gain = (self.best - self.first).clamp(min=0)
        self.progress = torch.where(finite & (reward > self.best + 1e-3 * gain), k, self.progress)
        self.best = torch.where(finite, torch.maximum(reward, self.best), self.best)

    def since_progress(self, k: int) -> Tensor:
        """(B,): iterations since the best reward last rose by more than 0.1 % of its gain."""
        return k - self.progress
