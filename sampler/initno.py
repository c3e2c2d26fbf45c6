"""InitNO (arXiv 2404.04650): an initial noise to which the model's attention answers with every subject of the prompt.

No reward is in it, and no sampling: one denoising step tells. Constants and schedule are the authors'.

Deviates: the loss on a map's background, which is in their code and not in their paper, is left out; the KL is held by
scaling, not by descending on it; of all iterates the best is kept, not the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .ending import Interrupts, attempt
from .rollout import total
from .variables import standard_kl

SHARPNESS = 100.0  # of the softmax over tokens, which makes a map of the small differences between them
ANSWERED = 0.5  # response above which the subjects' places are not known well enough to say that they overlap
UNKNOWN = 0.5  # what such a conflict counts when noises are compared: as much as any can
TRIAL = 10  # updates of every noise but the best
KL = 0.001  # per element: how far N(mu, sigma^2) may go from N(0, 1)
INSIDE = 0.999  # the share that a step of the way back goes beyond it, so that rounding does not keep it from ending
LR, EPS = 0.01, 1e-3  # of Adam
GRADIENT_SCALES = (2.0**10, 1.0)  # in float16 they are near its smallest numbers, or for some models its largest


@dataclass(frozen=True)
class Maps:
    """A model's attention for one image at one noise level, the mean over heads and layers of one resolution.

    cross (h, w, tokens): how much of each position's attention goes to each token, but for those that begin and end a
    text. own (h * w, h, w): how much goes to each position.
    """

    cross: Tensor
    own: Tensor


@dataclass(frozen=True)
class Settings:
    """rounds: noises that are tried, the given one first. iterations: updates of the best of them. response, conflict:
    both scores below these, and the noise is good (tau of the paper)."""

    rounds: int = 5
    iterations: int = 50
    response: float = 0.2
    conflict: float = 0.3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}: use 1 for the given noise alone, or more")
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}: it cannot be negative")

    @property
    def trial(self) -> int:
        """Updates of every noise; a single one gets them all."""
        return min(self.iterations, TRIAL) if self.rounds > 1 else self.iterations

    @property
    def evaluations(self) -> int:
        """At most so many."""
        return self.rounds * (self.trial + 1) + (self.iterations + 1 if self.rounds > 1 and self.iterations else 0)


@dataclass
class Found:
    """noise: as the given one. rows: (round, iteration, response, conflict) of every evaluation. best: its index.

    reason: why it ended. cut_short: by an interrupt, an error, or for want of memory.
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

    subjects: the tokens of each, as indices of `maps.cross`. response: 1 less the largest value of the map of the
    subject that is answered least. conflict: how much the self-attention of the subjects' places overlaps, the mean
    over pairs; 0 for one subject.
    """
    words = (SHARPNESS * maps.cross.float()).softmax(-1)
    of_each = smooth(torch.stack([words[..., list(tokens)].sum(-1) for tokens in subjects]))
    peaks, places = of_each.flatten(1).max(1)
    response = 1 - peaks.min()
    if len(subjects) < 2 or response > ANSWERED:
        return response, torch.zeros_like(response)
    own = smooth(maps.own.float()[places])
    pairs = [(a, b) for i, a in enumerate(own) for b in own[:i]]
    return response, torch.stack([torch.minimum(a, b).sum() / (a + b).sum() for a, b in pairs]).mean()


def hold_kl(mu: Tensor, log_variance: Tensor) -> None:
    """Scale both towards 0, in place, until the KL of N(mu, sigma^2) from N(0, 1) is at most `KL` per element."""
    while (kl := standard_kl(mu, log_variance.exp()).mean().item()) > KL:
        scale = INSIDE * math.sqrt(KL / kl)
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
    interrupts: Interrupts = (),
    mends: Callable[[BaseException], bool] = lambda problem: False,
) -> Found:
    """From `noise` (1, C, h, w) on, the best one: of the lowest response + conflict.

    attend: noise -> `Maps`, differentiable. Noise is mu + sigma z0, and Adam steps mu and log sigma^2. A noise that is
    not good after `TRIAL` updates, or cannot go on (no gradient, or values that are not finite), is followed by a
    fresh z0 from `generator`; after `rounds` of them the best goes on for `iterations`. An exception of `interrupts`
    or an error after the first evaluation, and running out of memory after the first update, end it with the best so
    far; what the caller `mends`, to begin again, is raised.
    Raises RuntimeError when the given noise's attention is not finite.
    """
    rows: list[tuple[int, int, float, float]] = []
    best, lowest, index = noise, math.inf, 0
    updates = 0

    def climb(number: int, start: Tensor, iterations: int) -> bool:
        """Whether it became good."""
        nonlocal best, lowest, index, updates
        mu, log_variance = leaves = [torch.zeros_like(noise).requires_grad_() for _ in range(2)]
        adam = torch.optim.Adam(leaves, lr=LR, eps=EPS)
        for k in range(iterations + 1):
            z = mu + (log_variance / 2).exp() * start
            response, conflict = scores(attend(z), subjects)
            row = (number, k, response.item(), conflict.item())
            rows.append(row)
            value = row[2] + (row[3] if len(subjects) < 2 or row[2] <= ANSWERED else UNKNOWN)
            if value < lowest:
                best, lowest, index = z.detach().clone(), value, len(rows) - 1
            on_iteration(*row)
            if row[2] < settings.response and row[3] < settings.conflict:
                return True
            if not math.isfinite(value):
                if lowest == math.inf:
                    raise RuntimeError("the model's attention to the given noise is not finite")
                return False
            if k < iterations:
                for scale in GRADIENT_SCALES:
                    gradients = torch.autograd.grad(scale * (response + conflict), leaves, retain_graph=scale > 1)
                    length = total(g.float().square().sum() for g in gradients)
                    if torch.isfinite(length):
                        break
                del z, response, conflict  # their graph is not alive while the next one is made
                if not (torch.isfinite(length) and length > 0):
                    return False
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient / scale
                adam.step()
                with torch.no_grad():
                    hold_kl(mu, log_variance)
                updates += 1
        return False

    def rounds() -> bool:
        start = noise
        for number in range(settings.rounds):
            if climb(number, start, settings.trial):
                return True
            start = torch.randn(noise.shape, generator=generator).to(noise)
        again = settings.rounds > 1 and settings.iterations
        return bool(again) and climb(rows[index][0], best, settings.iterations)

    good, cut = attempt(interrupts, rounds)
    if cut and (lowest == math.inf or (cut.memory and not updates) or mends(cut.problem)):
        raise cut.problem
    if cut:
        return Found(best, rows, index, f"{cut} after {len(rows)} evaluations: the best of them", True)
    reason = "every subject is answered" if good else "no noise became good in time: the best of them"
    return Found(best, rows, index, reason)
