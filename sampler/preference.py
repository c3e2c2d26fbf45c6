"""Optimises noises from preferences alone: MIRA-DPO (Algorithm 2, arXiv 2510.01549) and the rivals that it has to beat.

Nothing flows through the judge: it only says which image of a few it likes most, and which least.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .memory import out_of_memory
from .optimize import OPTIMIZERS, Result
from .rollout import Path, Rollout, mean_square, per_image
from .surrogates import SURROGATES, Surrogate
from .trace import Trace

KEEP = ("last_winner", "incumbent")
SAME = 1e-2  # of the first candidates' distance: below it, candidates have become the same image


def mira_reversed(path: Path, reference: Path) -> Tensor:
    """S(z) - S(z0): the published sign turned round."""
    return -SURROGATES["mira"](path, reference)


def mira_two_sided(path: Path, reference: Path) -> Tensor:
    """Minus the two-sided departure of the score energy: winners stay near their reference, losers are driven off."""
    return -SURROGATES["mira_two_sided"](path, reference)


# R of the loss -log sigmoid(beta (R_winner - R_loser)); "mira" is Algorithm 2 to the letter, R = S(z0) - S(z).
ENERGIES: dict[str, Surrogate] = {
    "mira": SURROGATES["mira"],
    "mira_reversed": mira_reversed,
    "mira_two_sided": mira_two_sided,
}


@dataclass(frozen=True)
class PreferenceSettings:
    """The defaults are Algorithm 2 as published.

    iterations: comparisons. method: one of `METHODS`. candidates: images to choose from each time, for "dpo" (2) and
    the probes of "hybrid2". lr: the optimiser's step in units of the noise's deviation. beta, energy: of the loss, see
    `ENERGIES`. explore: the spread of "dueling"'s challenger and of "hybrid2"'s probes, in units of the noise's
    deviation. step: how far a win of "dueling"'s challenger moves the noises, as a share of `explore`. keep:
    "last_winner" (Algorithm 2), or "incumbent": never return what the judge liked less. skip_ties: learn nothing from a
    tie, rather than take the first as the winner. kick: how much fresh noise the loser gets when the candidates have
    become the same image; 0 is none.
    clip_norm: the largest gradient norm of one image; 0 does not clip. patience: ties of every image in a row after
    which nothing can be learned. loss_scale: multiplies the energy in backward and divides the gradients, for networks
    in float16.
    """

    iterations: int = 20
    method: str = "dpo"
    candidates: int = 2
    lr: float = 0.01
    beta: float = 1.0
    energy: str = "mira"
    explore: float = 0.3
    step: float = 1.0
    keep: str = "last_winner"
    skip_ties: bool = False
    kick: float = 0.0
    optimizer: str = "adamw"
    clip_norm: float = 1.0
    patience: int = 5
    loss_scale: float = 1.0

    def __post_init__(self):
        tables = {"method": METHODS, "energy": ENERGIES, "keep": KEEP, "optimizer": OPTIMIZERS}
        for name, table in tables.items():
            if getattr(self, name) not in table:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(table)}")
        for name, least in {"iterations": 1, "candidates": 2, "patience": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {least} or more")
        for name in ("lr", "beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("explore", "step"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0 and up to 1")
        if not 0 <= self.kick <= 1 or not self.clip_norm >= 0:
            raise ValueError(f"kick must lie in [0, 1] and clip_norm be 0 or more (got {self.kick}, {self.clip_norm})")


@dataclass
class Verdict:
    """best, worst: (B,) indices of candidates. tie: (B,). scores: (B, n) where the judge has numbers. stop: enough;
    back: the last choice again (neither says anything of these candidates)."""

    best: Tensor
    worst: Tensor
    tie: Tensor
    scores: Tensor | None = None
    stop: bool = False
    back: bool = False


# judge(k, candidates): images (B, 3, H, W) of every candidate -> a Verdict.
Judge = Callable[[int, Sequence[Tensor]], Verdict]


def by_score(scores: Tensor) -> Verdict:
    """(B, n) numbers, higher is better. One that is not a number loses; raises ValueError where none is one."""
    scores = scores.detach().cpu().double()
    if not torch.isfinite(scores).any(1).all():
        images = torch.nonzero(~torch.isfinite(scores).any(1)).flatten().tolist()
        raise ValueError(
            f"the reward gives no number for any candidate of image(s) {images}: there is nothing to prefer"
        )
    known = torch.where(torch.isfinite(scores), scores, -math.inf)
    return Verdict(known.argmax(1), known.argmin(1), known.amax(1) == known.amin(1), scores)


@dataclass
class Candidate:
    """One image of each of the batch, from its noises. gradients: of the energy R, or of what the method follows."""

    noises: list[Tensor]
    path: Path
    images: Tensor
    energy: Tensor
    gradients: list[Tensor] | None = None


@dataclass
class _Run:
    """What every method works with. render: latents -> images, differentiable where grad mode is on."""

    rollout: Rollout
    render: Callable[[Tensor], Tensor]
    settings: PreferenceSettings
    generator: torch.Generator
    evaluations: int = 0  # runs of the sampler, forward
    backwards: int = 0

    def fresh(self, like: Sequence[Tensor]) -> list[Tensor]:
        return [torch.randn(z.shape, generator=self.generator).to(z) for z in like]

    def look(self, noises: Sequence[Tensor], reference: Path | None, gradient: bool) -> Candidate:
        """Generate from `noises`; `reference` None: this is the reference. gradient: of the energy, for every noise."""
        z = [n.detach().requires_grad_(gradient) for n in noises]
        with torch.set_grad_enabled(gradient):
            path = self.rollout(z)
            energy = ENERGIES[self.settings.energy](path, reference or path.detach())
        self.evaluations += 1
        gradients = None
        if gradient:
            self.backwards += 1
            scale = self.settings.loss_scale
            found = torch.autograd.grad(energy.sum() * scale, z, allow_unused=True)
            gradients = [torch.zeros_like(n) if g is None else g / scale for g, n in zip(found, z, strict=True)]
        with torch.no_grad():
            images = self.render(path.x0.detach())
        return Candidate([n.detach() for n in z], path.detach(), images, energy.detach(), gradients)


def towards(noises: Sequence[Tensor], direction: Sequence[Tensor], share: float) -> list[Tensor]:
    """A step from `noises` along independent noise that stays where noise of this size lives: the variance is kept."""
    keep = math.sqrt(1 - share**2)
    return [keep * z + share * d for z, d in zip(noises, direction, strict=True)]


def _clipped(gradients: list[Tensor], norm: float) -> tuple[list[Tensor], Tensor]:
    size = torch.stack([g.float().flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    if not norm:
        return gradients, size
    scale = (norm / size.clamp(min=1e-12)).clamp(max=1)
    return [g * per_image(scale.to(g), g) for g in gradients], size


class _Dpo:
    """Algorithm 2: the winner and the loser are pushed apart along the energy of their scores."""

    def __init__(self, run: _Run, trajectories: Sequence[Sequence[Tensor]]):
        self.run = run
        self.z = [[n.detach().clone() for n in t] for t in trajectories]
        self.references: list[Path] = []
        s = run.settings
        self.optimizers = [OPTIMIZERS[s.optimizer](z, s.lr) for z in self.z]
        self.apart: Tensor | None = None

    def candidates(self) -> list[Candidate]:
        # One after the other: each keeps its gradient only, so that the memory is that of one trajectory.
        references = self.references or [None] * len(self.z)
        found = [self.run.look(z, r, True) for z, r in zip(self.z, references, strict=True)]
        self.references = self.references or [c.path for c in found]
        return found

    def learn(self, found: list[Candidate], verdict: Verdict) -> Tensor:
        s = self.run.settings
        energies = torch.stack([c.energy for c in found], 1)  # (B, n)
        best, worst = verdict.best.to(energies.device), verdict.worst.to(energies.device)
        margin = s.beta * (energies.gather(1, best[:, None]) - energies.gather(1, worst[:, None]))[:, 0]
        push = -s.beta * torch.sigmoid(-margin)  # d loss / d R_winner, and minus that for the loser
        # One candidate cannot be both: where all are equal, the first is the winner and the last the loser.
        worst = torch.where(best == worst, len(found) - 1 - best, worst)
        moves = torch.ones_like(push, dtype=torch.bool)
        if s.skip_ties:
            moves &= ~verdict.tie.to(moves.device)
        size = torch.zeros_like(push)
        for i, (candidate, z, optimizer) in enumerate(zip(found, self.z, self.optimizers, strict=True)):
            factor = torch.where(best == i, push, torch.where(worst == i, -push, torch.zeros_like(push)))
            factor = torch.where(moves, factor, torch.zeros_like(factor))
            gradients, norm = _clipped([g * per_image(factor.to(g), g) for g in candidate.gradients], s.clip_norm)
            finite = torch.isfinite(norm)
            size = torch.maximum(size, norm.nan_to_num())
            stepping = (factor != 0) & finite
            before = [n.clone() for n in z]
            for n, g in zip(z, gradients, strict=True):
                n.grad = torch.where(per_image(stepping, g), g, torch.zeros_like(g))
            optimizer.step()
            for n, b in zip(z, before, strict=True):
                n.copy_(torch.where(per_image(stepping, n), n, b))
        if s.kick:
            self._kick(found, best, worst)
        return size

    def _kick(self, found: list[Candidate], best: Tensor, worst: Tensor) -> None:
        latents = torch.stack([c.path.x0 for c in found], 1)
        images = torch.arange(len(best), device=best.device)
        apart = mean_square(latents[images, best] - latents[images, worst])
        self.apart = apart if self.apart is None else self.apart
        same = apart < SAME * self.apart
        for i, z in enumerate(self.z):
            kicked = towards(z, self.run.fresh(z), self.run.settings.kick)
            for n, fresh in zip(z, kicked, strict=True):
                n.copy_(torch.where(per_image(same & (worst == i), n), fresh, n))


class _Challenged:
    """An incumbent, and a challenger every time, both as (candidate, its reference)."""

    def __init__(self, run: _Run, trajectories: Sequence[Sequence[Tensor]]):
        self.run, self.noises = run, list(trajectories[0])
        self.first = list(trajectories[1]) if len(trajectories) > 1 else None  # the first challenger
        self.incumbent: Candidate | None = None
        self.reference: Path | None = None

    def candidates(self) -> list[Candidate]:
        if self.incumbent is None:
            self.incumbent = self.run.look(self.noises, None, False)
            self.reference = self.incumbent.path
        self.challenger = self.run.look(self.challenge(), self.reference, False)
        return [self.incumbent, self.challenger]

    def challenge(self) -> list[Tensor]:
        raise NotImplementedError

    def won(self, verdict: Verdict) -> Tensor:
        """(B,): where the challenger is liked more. A tie is not."""
        return (verdict.best == 1) & ~verdict.tie

    def take(self, won: Tensor, other: Candidate) -> None:
        """The incumbent where it stood its ground, `other` where it did not."""

        def chosen(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(per_image(won.to(a.device), a), b, a)

        mine, its = self.incumbent, other
        path = Path(
            chosen(mine.path.x0, its.path.x0),
            tuple(map(chosen, mine.path.noises, its.path.noises)),
            tuple(map(chosen, mine.path.eps, its.path.eps)),
            mine.path.sigmas,
            mine.path.weights,
            mine.path.mask,
        )
        noises = list(map(chosen, mine.noises, its.noises))
        self.incumbent = Candidate(noises, path, chosen(mine.images, its.images), chosen(mine.energy, its.energy))


class _BestOfN(_Challenged):
    """The challenger is another seed: after n comparisons, the best of n + 1."""

    def challenge(self) -> list[Tensor]:
        first, self.first = self.first, None
        return first if first is not None else self.run.fresh(self.noises)

    def learn(self, found: list[Candidate], verdict: Verdict) -> Tensor:
        won = self.won(verdict)
        self.take(won, found[1])
        return torch.zeros(len(won))


class _Dueling(_Challenged):
    """Dueling-bandit gradient descent (Yue and Joachims, 2009): perturb, and move towards what is preferred.

    Deviates from the paper: steps keep the variance of the noises, whose typical sphere takes the place of its ball.
    """

    def challenge(self) -> list[Tensor]:
        self.direction = self.run.fresh(self.noises)
        return towards(self.incumbent.noises, self.direction, self.run.settings.explore)

    def learn(self, found: list[Candidate], verdict: Verdict) -> Tensor:
        won, s = self.won(verdict), self.run.settings
        if won.any():
            moved = found[1]
            if s.step < 1:
                nearer = towards(self.incumbent.noises, self.direction, s.step * s.explore)
                moved = self.run.look(nearer, self.reference, False)
            self.take(won, moved)
        return torch.zeros(len(won))


class _Hybrid2:
    """DNO's estimator for rewards without a gradient (arXiv 2405.18881): probes tell which way in pixel space pays."""

    def __init__(self, run: _Run, trajectories: Sequence[Sequence[Tensor]]):
        self.run = run
        self.z = [n.detach().clone() for n in trajectories[0]]
        self.reference: Path | None = None
        self.optimizer = OPTIMIZERS[run.settings.optimizer](self.z, run.settings.lr)

    def candidates(self) -> list[Candidate]:
        middle = self.run.look(self.z, self.reference, False)
        self.reference = self.reference or middle.path
        probes = []
        for _ in range(self.run.settings.candidates - 1):
            near = [z + self.run.settings.explore * d for z, d in zip(self.z, self.run.fresh(self.z), strict=True)]
            probes.append(self.run.look(near, self.reference, False))
        return [middle, *probes]

    def learn(self, found: list[Candidate], verdict: Verdict) -> Tensor:
        if verdict.scores is None:
            raise ValueError("hybrid2 needs numbers, which a person or a list of choices does not give: use dpo")
        gain = (verdict.scores[:, 1:] - verdict.scores[:, :1]).nan_to_num(0, 0, 0)
        middle = found[0].images
        along = sum(
            per_image(gain[:, i].to(middle), middle) * (probe.images - middle) for i, probe in enumerate(found[1:])
        ) / len(found[1:])
        along = along / per_image(along.flatten(1).norm(dim=1) + 1e-3, along)
        z = [n.detach().requires_grad_() for n in self.z]
        with torch.enable_grad():
            images = self.run.render(self.run.rollout(z).x0)
            wanted = -(along.to(images) * images).sum()
        self.run.evaluations += 1
        self.run.backwards += 1
        scale = self.run.settings.loss_scale
        along_noise = torch.autograd.grad(wanted * scale, z, allow_unused=True)
        gradients = [torch.zeros_like(n) if g is None else g / scale for g, n in zip(along_noise, z, strict=True)]
        gradients, size = _clipped(gradients, self.run.settings.clip_norm)
        finite = torch.isfinite(size)
        before = [n.clone() for n in self.z]
        for n, g in zip(self.z, gradients, strict=True):
            n.grad = torch.where(per_image(finite, g), g, torch.zeros_like(g))
        self.optimizer.step()
        for n, b in zip(self.z, before, strict=True):
            n.copy_(torch.where(per_image(finite, n), n, b))
        return size


METHODS = {"dpo": _Dpo, "dueling": _Dueling, "best_of_n": _BestOfN, "hybrid2": _Hybrid2}


@dataclass
class _Kept:
    """The image that comes back, for each of the batch."""

    latent: Tensor | None = None
    noises: list[Tensor] = field(default_factory=list)
    images: Tensor | None = None
    score: Tensor | None = None
    iteration: Tensor | None = None

    def update(self, k: int, where: Tensor, winner: Candidate, score: Tensor | None) -> None:
        if self.latent is None:
            self.latent, self.noises = winner.path.x0.clone(), [n.clone() for n in winner.noises]
            self.images, self.score = winner.images, score
            self.iteration = torch.full((len(winner.images),), k)
            return

        def chosen(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(per_image(where.to(a.device), a), b, a)

        self.latent = chosen(self.latent, winner.path.x0)  # never in place: earlier states hold the same tensors
        self.noises = list(map(chosen, self.noises, winner.noises))
        self.images = chosen(self.images, winner.images)
        self.iteration = torch.where(where, k, self.iteration)
        if score is not None:
            self.score = torch.where(where, score, self.score)


def _pick(found: list[Candidate], index: Tensor) -> Candidate:
    """The candidate that each image of the batch has at `index` (B,)."""

    def picked(tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(tuple(tensors), 1)
        return stacked[torch.arange(len(index), device=stacked.device), index.to(stacked.device)]

    path = Path(
        picked([c.path.x0 for c in found]),
        tuple(picked(z) for z in zip(*(c.noises for c in found), strict=True)),
        tuple(picked(e) for e in zip(*(c.path.eps for c in found), strict=True)),
        found[0].path.sigmas,
        found[0].path.weights,
        found[0].path.mask,
    )
    return Candidate(list(path.noises), path, picked([c.images for c in found]), picked([c.energy for c in found]))


def prefer(
    rollout: Rollout,
    render: Callable[[Tensor], Tensor],
    judge: Judge,
    trajectories: Sequence[Sequence[Tensor]],
    settings: PreferenceSettings,
    *,
    seed: int = 0,
    history: int = 0,
    on_iteration: Callable[[int, list[dict], list[Tensor]], None] = lambda k, rows, images: None,
    interrupts: tuple[type[BaseException], ...] = (),
    memory: Callable[[], float] = lambda: 0.0,
) -> Result:
    """Optimise noises (z_T, ..., z_1), each (B, C, ...), by what `judge` prefers.

    trajectories: the noises of every first candidate; "dpo" uses all of them, the others the first, and "best_of_n"
    the second too. seed: of every further noise. history: how many choices can be taken back. Every image of the batch
    is judged on its own. An exception of `interrupts` after the first comparison, and running out of memory, end the
    run with the best so far.

    The record has, for each iteration and image, which candidate won (-1: a tie), the winner's surrogates against its
    own reference, and its reward and the loser's where the judge has numbers. `trace.settings["choices"]` repeats the
    run: (iteration, image, best, worst, tie) each.
    """
    run = _Run(rollout, render, settings, torch.Generator().manual_seed(seed))
    book = _Book(METHODS[settings.method](run, trajectories), run.generator, history)
    trace = book.trace

    def ask(images: Sequence[Tensor]) -> Verdict:
        verdict = judge(book.k, images)
        if verdict.stop or verdict.back:
            raise _Stop if verdict.stop else _Back
        of_each = zip(verdict.best.tolist(), verdict.worst.tolist(), verdict.tie.tolist(), strict=True)
        book.choices += [[book.k, b, *choice] for b, choice in enumerate(of_each)]
        return verdict

    reason, references = "", []
    while book.k < settings.iterations:
        started = time.perf_counter()
        book.remember()
        try:
            found = book.method.candidates()
            references = references or [c.path for c in found]
            verdict = ask([c.images for c in found])
            winner = _pick(found, verdict.best)
            score = None if verdict.scores is None else verdict.scores.gather(1, verdict.best[:, None])[:, 0]
            book.kept.update(book.k, _better(ask, settings, book.kept, winner, score), winner, score)
            norms = book.method.learn(found, verdict)
            started_from = references if settings.method == "dpo" else references[:1] * len(found)
            rows = _rows(book.k, run, found, verdict, started_from, norms, time.perf_counter() - started, memory())
            trace.rows += rows
            book.iterates = [*book.iterates[: book.k], winner.path.x0.cpu()]
            on_iteration(book.k, rows, [c.images for c in found])
        except RuntimeError as problem:
            if not out_of_memory(problem):
                raise
            if rollout.shrink():
                book.restore()
                trace.notices.append(f"out of memory at iteration {book.k}: went on with {rollout.memory} checkpoints")
                continue
            if book.kept.latent is None:
                raise
            reason = f"out of memory at iteration {book.k}"
            break
        except interrupts:
            if book.kept.latent is None:
                raise
            reason = f"interrupted at iteration {book.k}"
            break
        except _Back:
            book.restore(1)
            continue
        except _Stop:
            if book.kept.latent is None:  # nothing was chosen, so the plain sample it is
                nobody = torch.zeros(len(found[0].images), dtype=torch.long)
                undecided = Verdict(nobody, nobody, torch.ones_like(nobody, dtype=torch.bool))
                book.kept.update(0, nobody, found[0], None)
                seconds = time.perf_counter() - started
                trace.rows += _rows(0, run, found, undecided, [c.path for c in found], None, seconds, memory())
            reason = "the judge had enough"
            break
        book.ties = book.ties + 1 if verdict.tie.all() else 0
        if book.ties >= settings.patience:
            reason = f"{book.ties} ties in a row: the judge finds the images equal, so no preference can be learned"
            break
        book.k += 1
    reason, kept = reason or "all comparisons done", book.kept
    trace.kept = kept.iteration.tolist()
    trace.reasons = [reason] * len(trace.kept)
    trace.settings["choices"] = book.choices
    trace.settings["evaluations"] = {"forward": run.evaluations, "backward": run.backwards}
    return Result(kept.latent, found[0].path.x0, tuple(kept.noises), trace, reason, book.iterates)


class _Stop(Exception):
    """The judge had enough."""


class _Back(Exception):
    """The judge wants its last choice again."""


class _Book:
    """What a run has come to, and how it was before its last comparisons, so that a choice can be taken back."""

    def __init__(self, method, generator: torch.Generator, history: int):
        self.method, self.generator, self.history = method, generator, history
        self.k, self.ties, self.kept, self.trace, self.choices = 0, 0, _Kept(), Trace(), []
        self.past: list[tuple] = []
        self.iterates: list[Tensor] = []

    def remember(self) -> None:
        """The state before this comparison; of the last `history` ones before it too."""
        inner = copy.deepcopy({k: v for k, v in vars(self.method).items() if k != "run"})
        state = (self.k, self.ties, copy.copy(self.kept), len(self.trace.rows), len(self.choices))
        self.past = [*self.past, (inner, state, self.generator.get_state())][-self.history - 1 :]

    def restore(self, steps: int = 0) -> None:
        """To before this comparison, or before an earlier one where it is still known."""
        del self.past[len(self.past) - min(steps, len(self.past) - 1) :]
        inner, state, generator = self.past.pop()
        vars(self.method).update(inner)
        self.k, self.ties, self.kept, rows, choices = state
        del self.trace.rows[rows:], self.choices[choices:]
        self.generator.set_state(generator)


def _better(ask: Callable, s: PreferenceSettings, kept: _Kept, winner: Candidate, score: Tensor | None) -> Tensor:
    """(B,): where the winner takes the kept image's place."""
    everywhere = torch.ones(len(winner.images), dtype=torch.bool)
    if s.keep == "last_winner" or kept.latent is None:
        return everywhere
    if score is not None:
        return ~(score < kept.score)
    if s.method in ("dueling", "best_of_n"):
        return everywhere  # its first candidate is the incumbent already
    asked = ask([kept.images, winner.images])
    return (asked.best == 1) & ~asked.tie


def _rows(k, run, found, verdict, references, norms, seconds, memory) -> list[dict[str, float]]:
    columns = {"preferred": torch.where(verdict.tie, -1, verdict.best).double()}
    if verdict.scores is not None:
        columns["reward"] = verdict.scores.gather(1, verdict.best[:, None])[:, 0]
        columns["reward.loser"] = verdict.scores.gather(1, verdict.worst[:, None])[:, 0]
    with torch.no_grad():
        for name, surrogate in SURROGATES.items():
            all_of_them = torch.stack([surrogate(c.path, r) for c, r in zip(found, references, strict=True)], 1)
            columns[name] = all_of_them.cpu().gather(1, verdict.best[:, None])[:, 0]
    if norms is not None:
        columns["gradient_norm"] = norms
    values = {name: column.detach().cpu().double().tolist() for name, column in columns.items()}
    return [
        {"iteration": k, "image": b}
        | {name: column[b] for name, column in values.items()}
        | {"evaluations": run.evaluations, "seconds": seconds, "memory_mb": memory / 1e6}
        for b in range(len(verdict.best))
    ]
