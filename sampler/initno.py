"""InitNO (arXiv 2404.04650): an initial noise to which the model's attention answers with every subject of the prompt.

No reward is in it, and no sampling: one denoising step tells. Constants are the authors' (their published code has one
more loss, on the map's background, which the paper does not; it is left out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import out_of_memory
from .variables import standard_kl

SHARPNESS = 100.0  # of the softmax over tokens, which makes a map of the small differences between them
ANSWERED = 0.5  # response above which the subjects' places are not known well enough to say that they overlap
KL = 0.001  # per element: how far N(mu, sigma^2) may go from N(0, 1)
ADAM = {"lr": 0.01, "eps": 1e-3}
GRADIENT_SCALE = 2.0**10  # attention in float16 has gradients near its smallest numbers


@dataclass(frozen=True)
class Maps:
    """A model's attention for one image at one noise level, the mean over heads and layers of one resolution.

    cross (h, w, tokens): how much of each position's attention goes to each token. own (h * w, h, w): to each position.
    """

    cross: Tensor
    own: Tensor


@dataclass(frozen=True)
class Settings:
    """rounds: noises that are tried, the given one first. iterations: updates of each. response, conflict: both scores
    below these, and the noise is good (tau of the paper)."""

    rounds: int = 5
    iterations: int = 50
    response: float = 0.2
    conflict: float = 0.3

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}: use 1 for the given noise alone, or more")
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}: it cannot be negative")


@dataclass
class Found:
    """noise: as the given one. rows: (round, iteration, response, conflict) of every evaluation. best: its index.

    reason: why it ended. cut_short: by an interrupt, or for want of memory.
    """

    noise: Tensor
    rows: list[tuple[int, int, float, float]]
    best: int
    reason: str
    cut_short: bool = False


def smooth(maps: Tensor) -> Tensor:
    """(N, h, w), blurred by a Gaussian of 3 x 3 and deviation 0.5: one bright position is not yet a subject."""
    weights = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], device=maps.device) ** 2) / (2 * 0.5**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode="replicate"), kernel[None, None])[:, 0]


def scores(maps: Maps, subjects: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(response, conflict), both in [0, 1] and better when low.

    subjects: the tokens of each, as indices of `maps.cross`, of which the first (start) and the last (end) do not
    compete. response: 1 less the largest value of the map of the subject that is answered least. conflict: how much the
    self-attention of the subjects' places overlaps, the mean over pairs; 0 for one subject.
    """
    words = (SHARPNESS * maps.cross.float()[..., 1:-1]).softmax(-1)
    of_each = smooth(torch.stack([words[..., [t - 1 for t in tokens]].mean(-1) for tokens in subjects]))
    peaks, places = of_each.flatten(1).max(1)
    response = 1 - peaks.min()
    if len(subjects) < 2 or response > ANSWERED:
        return response, torch.zeros_like(response)
    own = smooth(maps.own.float()[places])
    pairs = [(a, b) for i, a in enumerate(own) for b in own[:i]]
    return response, torch.stack([torch.minimum(a, b).sum() / (a + b).sum() for a, b in pairs]).mean()


def held(mu: Tensor, log_variance: Tensor) -> None:
    """Scale both towards 0, in place, until the KL of N(mu, sigma^2) from N(0, 1) is at most `KL` per element."""
    while (kl := standard_kl(mu, log_variance.exp()).mean().item()) > KL:
        scale = 0.999 * math.sqrt(KL / kl)
        mu.mul_(scale)
        log_variance.mul_(scale)


def improve(
    attend: Callable[[Tensor], Maps],
    noise: Tensor,
    subjects: Sequence[Sequence[int]],
    settings: Settings,
    generator: torch.Generator,
    *,
    on_iteration: Callable[[int, int, float, float], None] = lambda *row: None,
    interrupts: tuple[type[BaseException], ...] = (),
) -> Found:
    """From `noise` (1, C, h, w) on, the one of the lowest response + conflict.

    attend: noise -> `Maps`, differentiable. Noise is mu + sigma z0, and Adam steps mu and log sigma^2, whose KL stays
    within `KL`. A noise that does not become good in time, or whose attention is not finite any more, is followed by a
    fresh z0 from `generator`. An exception of `interrupts` after the first evaluation, and running out of memory, end
    it with the best so far.
    Raises RuntimeError when the given noise's attention is not finite.
    """
    rows: list[tuple[int, int, float, float]] = []
    best, lowest, index = noise, math.inf, 0
    reason, cut_short, start = "no noise became good in time: the best of them", False, noise
    try:
        for number in range(settings.rounds):
            mu, log_variance = (torch.zeros_like(noise).requires_grad_() for _ in range(2))
            adam = torch.optim.Adam([mu, log_variance], **ADAM)
            for k in range(settings.iterations + 1):
                z = mu + (log_variance / 2).exp() * start
                response, conflict = scores(attend(z), subjects)
                row = (number, k, response.item(), conflict.item())
                rows.append(row)
                if row[2] + row[3] < lowest:
                    best, lowest, index = z.detach().clone(), row[2] + row[3], len(rows) - 1
                on_iteration(*row)
                if row[2] < settings.response and row[3] < settings.conflict:
                    return Found(best, rows, index, "every subject is answered")
                if not math.isfinite(row[2] + row[3]):
                    if lowest == math.inf:
                        raise RuntimeError("the model's attention to the given noise is not finite")
                    break
                if k < settings.iterations:
                    loss = GRADIENT_SCALE * (response + conflict)
                    gradients = torch.autograd.grad(loss, [mu, log_variance])
                    mu.grad, log_variance.grad = (g / GRADIENT_SCALE for g in gradients)
                    adam.step()
                    with torch.no_grad():
                        held(mu, log_variance)
            start = torch.randn(noise.shape, generator=generator).to(noise)
    except RuntimeError as problem:
        if not out_of_memory(problem) or not rows:
            raise
        reason, cut_short = f"out of memory after {len(rows)} evaluations: the best of them", True
    except interrupts:
        if not rows:
            raise
        reason, cut_short = f"interrupted after {len(rows)} evaluations: the best of them", True
    return Found(best, rows, index, reason, cut_short)
