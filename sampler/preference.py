"""Optimises noises from preferences alone: the loop around the methods of `methods.py`.

Nothing flows through the judge: it only says which image of a few it likes most, and which least.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .candidates import ENERGIES, Candidate, Run, pick
from .ending import Interrupts, attempt
from .keep import Kept, chosen, comparable
from .methods import METHODS
from .optimize import OPTIMIZERS, Result
from .rollout import Path, Rollout
from .seeds import stream
from .surrogates import SURROGATES
from .trace import Trace, rows_of

KEEP = ("last_winner", "incumbent")


@dataclass(frozen=True)
class PreferenceSettings:
    """The defaults are Algorithm 2 as published.

    iterations: comparisons. method: one of `METHODS`. candidates: images to choose from each time (of "hybrid2", its
    probes and one). lr: the optimiser's step in units of the noise's deviation. beta, energy: of the loss, see
    `ENERGIES`. explore: the spread of "dueling"'s challenger and of "hybrid2"'s probes, in units of the noise's
    deviation. step: how far a win of "dueling"'s challenger moves the noises, as a share of `explore`. keep:
    "last_winner" (Algorithm 2: of "dpo" its noises after their update, sampled once more), or "incumbent": never return
    what the judge liked less. skip_ties: learn nothing from a tie, rather than take the last as the winner. kick: how
    much fresh noise the loser gets when the candidates have become the same image; 0 is none.
    clip_norm: the largest gradient norm of one image; 0 does not clip. patience: ties of every image in a row after
    which nothing can be learned. loss_scale: multiplies the energy in backward and divides the gradients, for networks
    in float16; it is lowered for an image whose gradients overflow.
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

    @property
    def ends_with_update(self) -> bool:
        """Whether what comes back is sampled after the last comparison."""
        return self.keep == "last_winner" and METHODS[self.method].moves_winner

    def __post_init__(self) -> None:
        tables: dict[str, Collection[str]] = {
            "method": METHODS,
            "energy": ENERGIES,
            "keep": KEEP,
            "optimizer": OPTIMIZERS,
        }
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


ENOUGH = "the judge had enough"


@dataclass
class Verdict:
    """best, worst: (B,) indices of candidates. tie: (B,). scores: (B, n) where the judge has numbers. stop: why no more
    is asked, `ENOUGH` or what kept the judge from it; back: the last choice again (neither says anything of these
    candidates)."""

    best: Tensor
    worst: Tensor
    tie: Tensor
    scores: Tensor | None = None
    stop: str = ""
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
    known = comparable(scores)
    return Verdict(known.argmax(1), known.argmin(1), known.amax(1) == known.amin(1), scores)


@dataclass
class _Kept(Kept):
    """With its images, and its score where the judge has numbers."""

    images: Tensor = field(init=False)
    score: Tensor | None = None

    def update(self, k: int, where: Tensor, winner: Candidate, score: Tensor | None) -> None:
        first = self.empty
        self.take(k, where, winner.path.x0, winner.noises)
        self.images = winner.images if first else chosen(where, winner.images, self.images)
        if score is not None:
            self.score = score if self.score is None else torch.where(where, score, self.score)


def prefer(
    rollout: Rollout,
    render: Callable[[Tensor], Tensor],
    judge: Judge,
    trajectories: Sequence[Sequence[Tensor]],
    settings: PreferenceSettings,
    *,
    seed: int = 0,
    history: int = 0,
    choices: list[list] | None = None,
    on_iteration: Callable[[int, list[dict], list[Tensor]], None] = lambda k, rows, images: None,
    interrupts: Interrupts = (),
    memory: Callable[[], float] = lambda: 0.0,
) -> Result:
    """Optimise noises (z_T, ..., z_1), each (B, C, ...), by what `judge` prefers.

    trajectories: the noises of every first candidate; "dpo" and "best_of_n" use all of them, the others the first.
    judge: one that has a `rewind` is told how many choices stand where a comparison is made again.
    seed: of every further noise. history: how many choices can be taken back. Every image of the batch is judged on its
    own. An exception of `interrupts`, running out of memory and any other error end the run after the first comparison
    with the best so far.

    The record has, for each iteration and image, which candidate won (-1: a tie), the winner's surrogates against its
    own reference, and its reward and the loser's where the judge has numbers. `trace.settings["choices"]` repeats the
    run: (iteration, image, best, worst, tie) each. choices: a list to put them into, in place of what is there, for who
    wants them as they are made.
    """
    run = Run(rollout, render, settings, stream(seed, 0))
    compared = _Comparisons(run, METHODS[settings.method](run, trajectories), judge, history, on_iteration, memory)
    if choices is not None:
        choices.clear()  # of an attempt that the host has given up
        compared.choices = choices
    trace, reason, cut_short = compared.trace, "", False
    while compared.k < settings.iterations:
        _, cut = attempt(interrupts, compared.remember)
        remembered = cut is None
        try:
            if remembered:
                verdict, cut = attempt(interrupts, compared.compare)
        except _Back:
            compared.restore(1)
            continue
        except _Stop as stop:
            if compared.kept.empty:
                compared.keep_plain()
            reason = str(stop)
            cut_short = reason != ENOUGH
            break
        finally:
            rollout.let_go()
        if cut:
            if cut.memory and rollout.shrink():
                if remembered:
                    compared.begin_again()
                trace.notices.append(f"{cut} at iteration {compared.k}: went on with {rollout.way}")
                continue
            if not trace.rows or (cut.failed and not compared.reported):
                raise cut.problem
            reason, cut_short = f"{cut} at iteration {compared.k}", True
            break
        compared.ties = compared.ties + 1 if verdict.tie.all() else 0
        if compared.ties >= settings.patience:
            reason = f"{compared.ties} ties in a row: the judge finds the images equal, so no preference can be learned"
            break
        compared.k += 1
    latest = compared.found[0].path.x0
    if not reason and settings.ends_with_update:
        _, cut = attempt(interrupts, compared.end_with_update)
        rollout.let_go()
        latest = compared.iterates[-1]
        if cut:
            reason, cut_short = f"{cut} at iteration {compared.k}", True
    reason, kept = reason or "all comparisons done", compared.kept
    trace.kept = kept.iteration.tolist()
    trace.reasons = [reason] * len(trace.kept)
    trace.settings["choices"] = compared.choices
    trace.settings["evaluations"] = {"forward": run.evaluations, "backward": run.backwards}
    return Result(kept.latent, latest, tuple(kept.noises), trace, reason, compared.iterates, cut_short)


class _Stop(BaseException):
    """No more is asked, and why: no error, of which `attempt` would make an end."""


class _Back(BaseException):
    """The judge wants its last choice again."""


class _Comparisons:
    """What a run has come to, and how it was before its last comparisons, so that a choice can be taken back."""

    def __init__(
        self, run: Run, method: Any, judge: Judge, history: int, on_iteration: Callable, memory: Callable[[], float]
    ) -> None:
        self.run, self.method, self.judge, self.history = run, method, judge, history
        self.on_iteration, self.memory = on_iteration, memory
        self.k, self.ties, self.kept, self.trace = 0, 0, _Kept(), Trace()
        self.choices: list[list] = []
        self.iterates: list[Tensor] = []
        self.past: list[tuple] = []
        self.references: list[Path] = []  # the first candidates
        self.found: list[Candidate] = []  # the newest ones
        self.reported = False

    def remember(self) -> None:
        """The state before this comparison; of the last `history` ones before it too."""
        inner = copy.deepcopy({k: v for k, v in vars(self.method).items() if k != "run"})
        state = (self.k, self.ties, copy.copy(self.kept), len(self.trace.rows), len(self.choices))
        self.past = [*self.past, (inner, state, self.run.generator.get_state())][-self.history - 1 :]

    def restore(self, steps: int = 0) -> None:
        """To before this comparison, or before an earlier one where it is still known."""
        del self.past[len(self.past) - min(steps, len(self.past) - 1) :]
        inner, state, generator = self.past.pop()
        vars(self.method).update(inner)
        self.k, self.ties, self.kept, rows, choices = state
        del self.trace.rows[rows:], self.choices[choices:], self.iterates[self.k :]
        self.run.generator.set_state(generator)

    def begin_again(self) -> None:
        """This comparison, of which the judge may have answered a part."""
        self.restore()
        getattr(self.judge, "rewind", lambda made: None)(len(self.choices))

    def compare(self) -> Verdict:
        """The method's next candidates: judged, kept, learned from and reported."""
        started = time.perf_counter()
        found = self.found = self.method.candidates()
        self.references = self.references or [c.path for c in found]
        verdict = self._ask([c.images for c in found])
        if self.method.moves_winner:  # one candidate cannot be both: of equal ones the last has won, the first lost
            best = torch.where(verdict.tie, len(found) - 1, verdict.best)
            verdict = replace(verdict, best=best, worst=torch.where(verdict.tie, 0, verdict.worst))
        winner = pick(found, verdict.best)
        score = None if verdict.scores is None else verdict.scores.gather(1, verdict.best[:, None])[:, 0]
        better = self._better(winner, score)
        started_from = self.references if self.method.several else self.references[:1] * len(found)
        norms = None
        try:
            norms = self.method.learn(found, verdict)
        finally:  # what was chosen is kept, also where nothing could be learned from it
            rows = self._rows(found, verdict, started_from, started, norms)
            self._keep(better, winner, score, rows)
        self.reported = True
        self.on_iteration(self.k, rows, [c.images for c in found])
        return verdict

    def keep_plain(self) -> None:
        """Where nothing was chosen, the plain sample it is."""
        rows = self._rows(self.found, _undecided(self.found), [c.path for c in self.found], time.perf_counter())
        self._keep(_everywhere(self.found[0]), self.found[0], None, rows)

    def end_with_update(self) -> None:
        """Algorithm 2's last line: what comes back is the last winner after its update, which nobody has compared."""
        started = time.perf_counter()
        noises, reference = self.method.updated()
        winner = self.run.look(noises, reference)
        scores = self.judge(self.k, [winner.images]).scores if self.kept.score is not None else None
        rows = self._rows([winner], _undecided([winner], scores), [reference], started)
        for row in rows:
            row["preferred"] = math.nan  # it was not compared, and no tie either
        self._keep(_everywhere(winner), winner, None if scores is None else scores[:, 0], rows)
        self.on_iteration(self.k, rows, [winner.images])

    def _ask(self, images: Sequence[Tensor]) -> Verdict:
        verdict = self.judge(self.k, images)
        if verdict.stop or verdict.back:
            raise _Stop(verdict.stop) if verdict.stop else _Back
        self._note(zip(verdict.best.tolist(), verdict.worst.tolist(), verdict.tie.tolist(), strict=True))
        return verdict

    def _note(self, of_each: Iterable[tuple[int, int, bool]]) -> None:
        self.choices += [[self.k, b, *choice] for b, choice in enumerate(of_each)]

    def _better(self, winner: Candidate, score: Tensor | None) -> Tensor:
        """(B,): where the winner takes the kept image's place."""
        kept, method, everywhere = self.kept, self.method, _everywhere(winner)
        if self.run.settings.keep == "last_winner" or kept.empty:
            return everywhere
        is_asked = (method.between or not method.incumbent_first) and not torch.equal(kept.images, winner.images)
        if score is not None and kept.score is not None:
            better = ~(score < kept.score)
            if is_asked:  # of a judge without numbers, who is to repeat this
                self._note([(w, 1 - w, False) for w in better.int().tolist()])
            return better
        if method.incumbent_first and not method.between:
            return everywhere
        if not is_asked:
            return ~everywhere
        asked = self._ask([kept.images, winner.images])
        return (asked.best == 1) & ~asked.tie

    def _keep(self, where: Tensor, winner: Candidate, score: Tensor | None, rows: list[dict[str, float]]) -> None:
        iterates = [*self.iterates[: self.k], winner.path.x0.cpu()]  # which may fail, so that it comes first
        self.kept.update(self.k, where, winner, score)
        self.iterates = iterates
        self.trace.rows += rows

    def _rows(
        self, found: Sequence[Candidate], verdict: Verdict, references: Sequence[Path], started: float,
        norms: Tensor | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
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
        seconds, memory = time.perf_counter() - started, self.memory() / 1e6
        return rows_of(self.k, columns, evaluations=self.run.evaluations, seconds=seconds, memory_mb=memory)


def _everywhere(candidate: Candidate) -> Tensor:
    """(B,)"""
    return torch.ones(len(candidate.images), dtype=torch.bool)


def _undecided(found: Sequence[Candidate], scores: Tensor | None = None) -> Verdict:
    first = torch.zeros(len(found[0].images), dtype=torch.long)
    return Verdict(first, first, _everywhere(found[0]), scores)
