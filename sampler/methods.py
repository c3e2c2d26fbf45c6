"""How noises follow preferences: MIRA-DPO (Algorithm 2, arXiv 2510.01549) and its rivals, one class each.

`candidates()` makes what is compared, `learn(found, verdict)` moves the noises and gives the gradient norms, (B,).
What else is to be known of a method stands on its class, see `Method`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidates import Candidate, Run, pick, pick_path, picked, towards
from .gradients import clipping, norm, scaled, step
from .keep import chosen
from .optimize import OPTIMIZERS
from .rollout import Path, mean_square, per_image, total
from .variables import Variables

if TYPE_CHECKING:
    from .preference import Verdict

SAME = 1e-2  # of the first candidates' distance: below it, candidates have become the same image


class Method:
    """gradient: it goes through the model. numbers: it needs how much better, not only which. several: every candidate
    is a trajectory of its own, with its own reference. incumbent_first: the first candidate is the best so far, unless
    `between`: it has moved towards that, and is an image that nobody has compared.
    moves_winner: the noises of a comparison's winner are moved after it, to `updated()`.
    reads: the settings that mean something to it and not to every other.
    """

    gradient = numbers = several = incumbent_first = between = moves_winner = False
    reads: tuple[str, ...] = ()

    @staticmethod
    def trajectories(candidates: int) -> int:
        """How many trajectories it begins with."""
        return 1


class Dpo(Method):
    """Algorithm 2: the winner and the loser are pushed apart along the energy of their scores."""

    gradient = several = moves_winner = True
    reads = ("lr", "beta", "energy", "skip_ties", "kick", "optimizer", "clip_norm")

    @staticmethod
    def trajectories(candidates: int) -> int:
        return candidates

    def __init__(self, run: Run, trajectories: Sequence[Sequence[Tensor]]) -> None:
        self.run = run
        self.variables = [Variables("trajectory", t, run.rollout.mask) for t in trajectories]
        self.references: list[Path] = []
        s = run.settings
        self.optimizers = [OPTIMIZERS[s.optimizer](v.leaves, s.lr) for v in self.variables]
        self.apart: Tensor | None = None

    def candidates(self) -> list[Candidate]:
        # One after the other: each keeps its gradient only, so that the memory is that of one trajectory.
        references: Sequence[Path | None] = self.references or [None] * len(self.variables)
        found = [self.run.look_along(v, r) for v, r in zip(self.variables, references, strict=True)]
        self.references = self.references or [c.path for c in found]
        return found

    def learn(self, found: list[Candidate], verdict: Verdict) -> Tensor:
        s = self.run.settings
        energies = torch.stack([c.energy for c in found], 1)  # (B, n)
        self.winner = verdict.best
        best, worst = verdict.best.to(energies.device), verdict.worst.to(energies.device)
        margin = s.beta * (energies.gather(1, best[:, None]) - energies.gather(1, worst[:, None]))[:, 0]
        push = -s.beta * torch.sigmoid(-margin)  # d loss / d R_winner, and minus that for the loser
        moves = torch.ones_like(push, dtype=torch.bool)
        if s.skip_ties:
            moves &= ~verdict.tie.to(moves.device)
        size = torch.zeros_like(push)
        for i, (candidate, of_it, optimizer) in enumerate(zip(found, self.variables, self.optimizers, strict=True)):
            factor = torch.where(best == i, push, torch.where(worst == i, -push, torch.zeros_like(push)))
            factor = torch.where(moves, factor, torch.zeros_like(factor))
            gradients = scaled(candidate.gradients, factor)
            own = norm(gradients)
            size = torch.maximum(size, own.nan_to_num())
            gradients = scaled(gradients, clipping(own, s.clip_norm))
            step(optimizer, of_it.leaves, gradients, (factor != 0) & torch.isfinite(own))
        if s.kick:
            self._kick(found, best, worst)
        return size

    def updated(self) -> tuple[list[Tensor], Path]:
        """Of every image the last comparison's winner: its noises, moved by what was learned, and its reference."""
        made = [[z.detach() for z in v.noises()] for v in self.variables]
        noises = [picked(z, self.winner) for z in zip(*made, strict=True)]
        return noises, pick_path(self.references, self.winner)

    def _kick(self, found: list[Candidate], best: Tensor, worst: Tensor) -> None:
        latents = torch.stack([c.path.x0 for c in found], 1)
        images = torch.arange(len(best), device=best.device)
        apart = mean_square(latents[images, best] - latents[images, worst])
        self.apart = apart if self.apart is None else self.apart
        same = apart < SAME * self.apart
        for i, of_it in enumerate(self.variables):
            z = of_it.leaves
            kicked = towards(z, self.run.fresh(z), self.run.settings.kick)
            with torch.no_grad():
                for n, fresh in zip(z, kicked, strict=True):
                    n.copy_(torch.where(per_image(same & (worst == i), n), fresh, n))


class Challenged(Method):
    """An incumbent, and new challengers every time: one less than there are candidates."""

    incumbent_first = True

    def __init__(self, run: Run, trajectories: Sequence[Sequence[Tensor]]) -> None:
        self.run, self.noises = run, list(trajectories[0])
        self.first = [list(t) for t in trajectories[1:]]  # challengers of the first comparison
        self.incumbent: Candidate | None = None
        self.reference: Path | None = None

    def candidates(self) -> list[Candidate]:
        if self.incumbent is None:
            self.incumbent = self.run.look(self.noises, None)
            self.reference = self.incumbent.path
        challenges = self.challenges(self.incumbent.noises, self.run.settings.candidates - 1)
        return [self.incumbent, *(self.run.look(z, self.reference) for z in challenges)]

    def challenges(self, noises: list[Tensor], count: int) -> list[list[Tensor]]:
        """The noises of `count` challengers of an incumbent of these."""
        raise NotImplementedError

    def won(self, verdict: Verdict) -> Tensor:
        """(B,): where a challenger is liked most. A tie is not."""
        return (verdict.best > 0) & ~verdict.tie

    def take(self, won: Tensor, mine: Candidate, its: Candidate) -> None:
        """The incumbent is `mine` where it stood its ground, and its challenger where it did not."""

        def chosen_of(mine: Tensor, its: Tensor) -> Tensor:
            return chosen(won, its, mine)

        path = Path(
            chosen_of(mine.path.x0, its.path.x0),
            tuple(map(chosen_of, mine.path.noises, its.path.noises)),
            tuple(map(chosen_of, mine.path.eps, its.path.eps)),
            mine.path.sigmas,
            mine.path.weights,
            mine.path.mask,
        )
        noises = list(map(chosen_of, mine.noises, its.noises))
        self.incumbent = Candidate(noises, path, chosen_of(mine.images, its.images), chosen_of(mine.energy, its.energy))


class BestOfN(Challenged):
    """The challengers are other seeds: after k comparisons of n, the best of 1 + k (n - 1)."""

    @staticmethod
    def trajectories(candidates: int) -> int:
        return candidates

    def challenges(self, noises: list[Tensor], count: int) -> list[list[Tensor]]:
        first, self.first = self.first, []
        return first or [self.run.fresh(noises) for _ in range(count)]

    def learn(self, found: list[Candidate], verdict: Verdict) -> Tensor:
        won = self.won(verdict)
        self.take(won, found[0], pick(found, verdict.best))
        return torch.zeros(len(won))


class Dueling(Challenged):
    """Dueling-bandit gradient descent (Yue and Joachims, 2009): perturb, and move towards what is preferred.

    Deviates from the paper: steps keep the variance of the noises, whose typical sphere takes the place of its ball.
    Several challengers at once are its multi-dueling form (Schuth et al., 2016), winner takes all.
    """

    reads = ("explore", "step")

    def __init__(self, run: Run, trajectories: Sequence[Sequence[Tensor]]) -> None:
        super().__init__(run, trajectories)
        self.between = run.settings.step != 1

    def challenges(self, noises: list[Tensor], count: int) -> list[list[Tensor]]:
        self.directions = [self.run.fresh(noises) for _ in range(count)]
        return [towards(noises, d, self.run.settings.explore) for d in self.directions]

    def learn(self, found: list[Candidate], verdict: Verdict) -> Tensor:
        won, s = self.won(verdict), self.run.settings
        if won.any():
            moved = pick(found, verdict.best)
            if s.step < 1:
                directions = zip(*self.directions, strict=True)
                liked = [picked(noise, (verdict.best - 1).clamp(min=0)) for noise in directions]
                nearer = towards(found[0].noises, liked, s.step * s.explore)
                moved = self.run.look(nearer, self.reference)
            self.take(won, found[0], moved)
        return torch.zeros(len(won))


class Hybrid2(Method):
    """DNO's estimator for rewards without a gradient (arXiv 2405.18881): probes tell which way in pixel space pays."""

    gradient = numbers = True
    reads = ("lr", "explore", "optimizer", "clip_norm")

    def __init__(self, run: Run, trajectories: Sequence[Sequence[Tensor]]) -> None:
        self.run = run
        self.variables = Variables("trajectory", trajectories[0], run.rollout.mask)
        self.reference: Path | None = None
        self.optimizer = OPTIMIZERS[run.settings.optimizer](self.variables.leaves, run.settings.lr)

    def candidates(self) -> list[Candidate]:
        middle = self.run.look(self.variables.noises(), self.reference)
        self.reference = self.reference or middle.path
        probes, z = [], middle.noises
        for _ in range(self.run.settings.candidates - 1):
            near = [n + self.run.settings.explore * d for n, d in zip(z, self.run.fresh(z), strict=True)]
            probes.append(self.run.look(near, self.reference))
        return [middle, *probes]

    def learn(self, found: list[Candidate], verdict: Verdict) -> Tensor:
        if verdict.scores is None:
            raise ValueError("hybrid2 needs numbers, which a person or a list of choices does not give: use dpo")
        gain = (verdict.scores[:, 1:] - verdict.scores[:, :1]).nan_to_num(0, 0, 0)
        middle = found[0].images
        along = total(
            per_image(gain[:, i].to(middle), middle) * (probe.images - middle) for i, probe in enumerate(found[1:])
        ) / len(found[1:])
        along = along / per_image(along.flatten(1).norm(dim=1) + 1e-3, along)

        def towards_it(path: Path) -> Tensor:
            images = self.run.render(path.x0)
            return -(along.to(images) * images).flatten(1).sum(1)

        _, _, gradients = self.run.slope(self.variables, towards_it)
        size = norm(gradients)
        gradients = scaled(gradients, clipping(size, self.run.settings.clip_norm))
        step(self.optimizer, self.variables.leaves, gradients, torch.isfinite(size))
        return size


METHODS: dict[str, type[Dpo] | type[Dueling] | type[BestOfN] | type[Hybrid2]] = {
    "dpo": Dpo,
    "dueling": Dueling,
    "best_of_n": BestOfN,
    "hybrid2": Hybrid2,
}
