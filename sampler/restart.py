"""Restarts: an image is noised again to a middle level, and the frozen model samples it from there.

Noising is a channel, and sampling back is another, so neither can raise a KL divergence (the data processing
inequality): of all that this package does, a restart alone lowers the drift of an image whatever the reward was, and
without an estimate of it. docs/restart.md has the proposition and what it does not say. One restart is SDEdit
(arXiv 2108.01073) of an optimised image; to go back and forth while sampling is Restart sampling (arXiv 2306.14878)
and the self-recurrence of universal guidance (arXiv 2302.07121).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .ending import Interrupts, attempt
from .keep import Kept, chosen, comparable
from .optimize import Result, Score, Settings, optimize
from .replay import Segment
from .resume import Left
from .rollout import Rollout
from .search import SearchSettings
from .surrogates import SURROGATES
from .trace import Trace, rows_of


def tail(sigmas: Tensor, denoise: float) -> Tensor:
    """The last share `denoise` of a schedule, (T + 1,), in as many steps as the whole: what KSampler's denoise does
    where the scheduler is known. Between two given levels the new ones are geometric, but before a last zero linear.
    """
    count = len(sigmas) - 1
    at = torch.linspace(count * (1 - denoise), count, count + 1, dtype=torch.float64)
    low = at.floor().clamp(max=count - 1).long()
    share, ends = at - low, sigmas.detach().cpu().double()
    a, b = ends[low], ends[low + 1]
    geometric = (a.clamp(min=1e-12).log() * (1 - share) + b.clamp(min=1e-12).log() * share).exp()
    out = torch.where((a > 0) & (b > 0), geometric, a * (1 - share) + b * share)
    out[-1] = ends[-1]
    return out.to(sigmas)


@dataclass(frozen=True)
class Stretch:
    """The sampling process from a level on: rollout, and the noises (z of the level first) of its plain run. seed: see
    `replay.Segment`.
    """

    rollout: Rollout
    noises: Sequence[Tensor]
    seed: int = 0


@dataclass
class _Rounds:
    """What rounds have come to. number: how many are done. way, kept_way (B, rounds): which of them an image has gone
    through, the one that goes on and the one that is kept. base: what the next one restarts. last, reasons: of the
    newest one.
    """

    number: int = 0
    trace: Trace = field(default_factory=Trace)
    kept: Kept = field(default_factory=Kept)
    iterates: list[Tensor] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    best: Tensor = field(init=False)
    way: Tensor = field(init=False)
    kept_way: Tensor = field(init=False)
    base: Tensor = field(init=False)
    last: Tensor = field(init=False)
    reasons: list[str] = field(default_factory=list)

    def snapshot(self) -> _Rounds:
        """As it is now. Tensors are never changed in place."""
        now = copy.copy(self)
        now.trace = Trace(rows=list(self.trace.rows), notices=list(self.trace.notices))
        now.kept, now.iterates, now.segments = copy.copy(self.kept), list(self.iterates), list(self.segments)
        return now

    def add(self, done: Result, segment: Segment, settings: Settings) -> None:
        """A round's result: better images take the place of what was kept."""
        first, rounds = len(self.iterates), len(lengths(settings))
        rewards = {(row["image"], row["iteration"]): row["reward"] for row in done.trace.rows}
        its = torch.tensor(done.trace.kept) + first
        reward = torch.tensor([rewards[b, k] for b, k in enumerate(its.tolist())], dtype=torch.double)
        finite, reward = reward.isfinite(), comparable(reward)
        way = torch.zeros(len(its), rounds, dtype=torch.bool)
        if not self.number:
            better, self.best = finite, reward
            way[:, 0] = True
            self.kept_way = way
        else:
            better = finite if settings.keep == "last" else reward > self.best
            self.best = torch.where(better, reward, self.best)
            kept_way = torch.cat([self.kept_way, way[:, self.kept_way.shape[1] :]], dim=1)  # of fewer rounds
            way[:, : self.way.shape[1]] = self.way
            way[:, self.number] = True
            self.kept_way = chosen(better, way, kept_way)
        self.kept.take(its, better, done.best, done.best_noises)
        self.base = chosen(finite, done.best, self.kept.latent)  # what is no image is no beginning either
        self.way = chosen(finite, way, self.kept_way)
        self.segments.append(segment)
        self.trace.rows += done.trace.rows
        self.trace.notices += [n for n in done.trace.notices if n not in self.trace.notices]
        self.iterates += done.iterates
        self.last, self.reasons = done.last, done.trace.reasons
        self.number += 1


def lengths(settings: Settings) -> list[int]:
    """How many iterations each round has: all as many, and the last one what is left."""
    whole, rest = divmod(settings.iterations, settings.restart_every or max(1, settings.iterations))
    return [settings.restart_every or settings.iterations] * whole + [rest] * (rest > 0 or not whole)


def in_rounds(
    stretch: Stretch,
    score: Callable[[Tensor], Score],
    settings: Settings,
    restart: Callable[[int, Tensor], Stretch],
    *,
    on_iteration: Callable[[int, list[dict], Score], None] = lambda k, rows, score: None,
    interrupts: Interrupts = (),
    memory: Callable[[], float] = lambda: 0.0,
    resume: Left | None = None,
) -> Result:
    """`optimize` in rounds of `restart_every`, each but the first from a restart of what the one before kept.

    restart: (round from 1 on, x0 (B, C, ...)) -> the stretch that begins with x0 noised again. A round's drift is
    measured from the plain run of its own stretch. The record goes on over rounds: a round's iteration 0 is its
    restart, and has a number of its own; where there may be several, rows have `round` and `level` (the stretch's first
    sigma). Of every image the best over all rounds comes back, by the criterion of `settings.keep`. An interrupt,
    running out of memory and any other error end the run with that. resume: `Result.left` of such a run, to go on in
    its round, or of one that ended, to go on with more iterations.
    """
    parts = lengths(settings)
    rounds, inner, ended = resume.value if resume else (_Rounds(), None, None)
    done: Result | None = None
    before, reason, left = rounds, "", None

    def optimize_round(number: int, stretch: Stretch) -> Result:
        first, level = len(rounds.iterates), stretch.rollout.schedule[0].item()

        def report(k: int, rows: list[dict], score: Score) -> None:
            for row in rows:
                row["iteration"] = first + k
                if settings.restart_every:
                    row |= {"round": number + 1, "level": level}
            on_iteration(first + k, rows, score)

        run = replace(settings, iterations=parts[number], restart_every=0)
        return optimize(
            stretch.rollout, score, stretch.noises, run, check_reward=number == 0, on_iteration=report,
            interrupts=interrupts, memory=memory, resume=inner,
        )  # fmt: skip

    for number in range(rounds.number, len(parts)):
        before, done = rounds.snapshot(), None
        if number:
            stretch, cut = attempt(interrupts, restart, number, rounds.base)
            if cut:
                reason = f"{cut} before round {number + 1}"
                if inner:  # nor is the round lost that was to go on: what there was comes back, to go on from again
                    rounds, left = ended, resume
                break
        found, cut = attempt(interrupts, optimize_round, number, stretch)
        if cut:
            if not number:
                raise cut.problem
            reason = f"{cut} in round {number + 1}"
            break
        done, inner = found, None
        noises = tuple(z.detach().cpu() for z in done.best_noises)
        part = torch.ones(len(done.best), dtype=torch.bool)  # until it is known what was kept
        denoise = settings.restart_denoise if number else 1.0
        segment = Segment(stretch.rollout.schedule.detach().cpu(), noises, part, denoise, stretch.seed)
        rounds.add(done, segment, settings)
        if done.cut_short:
            break
    trace, kept = rounds.trace, rounds.kept
    trace.kept = kept.iteration.tolist()
    trace.reasons = [reason] * len(trace.kept) if reason else rounds.reasons
    there, begins = done.left if done else None, done is None  # a round that was cut before it began is begun anew
    if done and not (done.cut_short or there) and settings.restart_every:  # by itself; more rounds may follow
        before, begins = rounds.snapshot(), True
    if not left and (there or begins):
        left = Left((before, there, rounds.snapshot()), len(before.iterates) + (there.done if there else 0))
    return Result(
        kept.latent,
        rounds.last,
        tuple(kept.noises),
        trace,
        reason or (done.reason if done else "; ".join(dict.fromkeys(rounds.reasons))),
        rounds.iterates,
        bool(reason or (done and done.cut_short)),
        [s for s in (replace(s, part=rounds.kept_way[:, n]) for n, s in enumerate(rounds.segments)) if s.part.any()],
        left=left,
    )


@torch.no_grad()
def search_by_restarts(
    sample: Callable[[int, int, Tensor | None], tuple[Tensor, Sequence[Tensor]]],
    score: Callable[[Tensor], Score],
    settings: SearchSettings,
    *,
    steps: int,
    on_iteration: Callable[[int, list[dict], Score], None] = lambda k, rows, score: None,
    interrupts: Interrupts = (),
    memory: Callable[[], float] = lambda: 0.0,
) -> Result:
    """The best of `settings.particles` seeds, then `settings.rounds` times the best of as many restarts of it.

    A round without a better image keeps what there was: a search over sampling paths (arXiv 2501.09732), whose noisy
    states are images noised again. sample: (round, particle, x0 or None) -> (x0 (B, C, ...), its noises); round 0 are
    seeds, and particle 0 of it is the plain sample. Row 0 of the record is that, row 1 the best seed, and one for
    every round follows. Ends as `search.search` does. steps: network evaluations of one sample.
    """
    trace, iterates, kept = Trace(), [], Kept()
    runs, started = 0, time.perf_counter()
    best: Tensor
    images: Tensor

    def try_candidate(number: int, p: int) -> Tensor:
        """The rewards (B,) of one candidate, which is kept where it is better."""
        nonlocal best, images, runs
        x0, noises = sample(number, p, kept.latent if number else None)
        found = score(x0)
        reward = comparable(found.total.detach().cpu().double())
        if kept.empty:
            best, images, better = reward, found.images, torch.ones(len(reward), dtype=torch.bool)
        else:
            better = reward > best
            best, images = torch.where(better, reward, best), chosen(better, found.images, images)
        kept.take(number + 1 if p or number else 0, better, x0, noises)
        runs += 1
        return reward

    def report(k: int, tries: list[Tensor]) -> None:
        nonlocal started
        blank = torch.full_like(best, math.nan)
        found = torch.stack([best, *tries])
        found = torch.where(found.isfinite(), found, math.nan)
        columns = {"reward": found[0], "reward_mean": found[1:].nanmean(0)}
        columns |= {name: blank for name in (*SURROGATES, "noise_norm")}
        seconds, started = time.perf_counter() - started, time.perf_counter()
        rows = rows_of(k, columns, evaluations=runs * steps, backwards=0, seconds=seconds, memory_mb=memory() / 1e6)
        trace.rows.extend(rows)
        iterates.append(kept.latent.cpu())
        on_iteration(k, rows, Score(best, {}, images))

    def search_all() -> None:
        first = try_candidate(0, 0)
        report(0, [first])
        report(1, [first, *(try_candidate(0, p) for p in range(1, settings.particles))])
        for number in range(1, settings.rounds + 1):
            report(number + 1, [try_candidate(number, p) for p in range(settings.particles)])

    _, cut = attempt(interrupts, search_all)
    if cut and not trace.rows:
        raise cut.problem
    # A candidate that was kept in a round that was cut short has no row of its own: it takes the place of the last.
    last = int(trace.rows[-1]["iteration"])
    if cut and (kept.iteration > last).any():
        attempt(interrupts, report, last + 1, [best])  # the row is there, whatever becomes of telling it
        last += 1
    reason = f"{cut} after row {last}" if cut else "all rounds done"
    trace.kept, trace.reasons = kept.iteration.tolist(), [reason] * len(best)
    trace.settings |= {"evaluations": runs * steps, "backwards": 0}
    return Result(kept.latent, iterates[-1].to(kept.latent), tuple(kept.noises), trace, reason, iterates, bool(cut))
