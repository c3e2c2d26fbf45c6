"""The hybrid of MIRA and FK steering: several trajectories are optimised side by side, and the best ones survive."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .candidates import picked, towards
from .ending import Interrupts, attempt
from .keep import Kept, comparable
from .optimize import NoGradient, Result, Score, Settings, optimize
from .rollout import Path, Rollout
from .search import SearchSettings
from .seeds import fresh, stream
from .trace import Trace


@dataclass
class End:
    """Where a trajectory came to: a row for each image, images (B, 3, H, W), latent (B, C, ...), its noises, and why
    it ended before its time, or None."""

    rows: list[dict]
    images: Tensor
    latent: Tensor
    noises: list[Tensor]
    ended: str | None = None


class _Hybrid:
    """A run's state: the trajectories that are alive, what they are measured from, and the best image so far."""

    def __init__(
        self,
        rollout: Rollout,
        score: Callable[[Tensor], Score],
        trajectories: list[list[Tensor]],
        settings: SearchSettings,
        generator: torch.Generator,
        on_iteration: Callable[[int, list[dict], Score], None],
        interrupts: Interrupts,
        memory: Callable[[], float],
    ) -> None:
        self.rollout, self.score, self.settings, self.generator = rollout, score, settings, generator
        self.on_iteration, self.interrupts, self.memory = on_iteration, interrupts, memory
        self.inner = Settings(
            iterations=settings.iterations, lr=settings.lr, regularizer=settings.regularizer, beta=settings.beta,
            keep="last", loss_scale=settings.loss_scale,
        )  # fmt: skip
        self.trajectories = trajectories
        self.reference: Path | None = None  # of the lineage that survived; in the first round every one is its own
        self.trace, self.kept = Trace(), Kept()
        self.iterates: list[Tensor] = []
        self.batch, self.steps = len(trajectories[0][0]), len(rollout.schedule) - 1
        self.best_reward = torch.full((self.batch,), -math.inf, dtype=torch.double)
        self.runs = 0  # of the sampler

    def record(self, k: int, end: End, seconds: float | None = None) -> None:
        """The rows of the round's best trajectories, and the best image so far."""
        more = {"iteration": k, "evaluations": self.runs * self.steps, "memory_mb": self.memory() / 1e6}
        more |= {} if seconds is None else {"seconds": seconds}
        rows = [r | more for r in end.rows]
        self.trace.rows.extend(rows)
        self.iterates.append(end.latent.cpu())
        reward = comparable(torch.tensor([r["reward"] for r in rows], dtype=torch.double))
        better = (reward > self.best_reward) | (k == 0)
        self.best_reward = torch.where(better, reward, self.best_reward)
        self.kept.take(k, better, end.latent, end.noises)
        self.on_iteration(k, rows, Score(reward, {}, end.images))

    def climb(self, noises: Sequence[Tensor], iterations: int) -> End:
        """MIRA on one trajectory."""
        latest: list = []

        def seen(i: int, rows: list[dict], score: Score) -> None:
            self.runs += 1
            latest[:] = [rows, score.images.cpu()]

        done = optimize(
            self.rollout, self.score, noises, replace(self.inner, iterations=iterations), reference=self.reference,
            on_iteration=seen, interrupts=self.interrupts, memory=self.memory,
        )  # fmt: skip
        self.trace.notices.extend(n for n in done.trace.notices if n not in self.trace.notices)
        # A trajectory whose reward or gradient is not finite ends alone; a cancelled one ends the run.
        return End(latest[0], latest[1], done.last, list(done.best_noises), done.reason if done.cut_short else None)

    def best(self, ends: Sequence[End]) -> tuple[End, Tensor]:
        """Of every image the trajectory of the highest objective, reward - beta R; and which one, (B,)."""
        beta, regularizer = self.settings.beta, self.settings.regularizer

        def objective(row: dict) -> float:
            return row["reward"] - (0.0 if regularizer == "none" else beta * row[regularizer])

        objectives = torch.tensor([list(map(objective, end.rows)) for end in ends])
        index = comparable(objectives).argmax(0)
        rows = [ends[p].rows[b] for b, p in enumerate(index.tolist())]
        noises = [picked(z, index) for z in zip(*(end.noises for end in ends), strict=True)]
        latent, images = (picked([getattr(end, name) for end in ends], index) for name in ("latent", "images"))
        return End(rows, images, latent, noises), index

    def round(self, k: int) -> str | None:
        """All climb, the best survives, and all others begin around it. Why it ended before its time, or None."""
        started, ended = time.perf_counter(), None
        ends: list[End] = []
        for z in self.trajectories:
            end, cut = attempt(self.interrupts, self.climb, z, self.settings.iterations)
            if cut:
                if not ends:
                    raise cut.problem
                ended = f"{cut} in round {k}"
                break
            ends.append(end)
            if ended := end.ended:
                break
        best, index = self.best(ends)
        self.record(k, best, time.perf_counter() - started)
        if ended:
            return ended
        if self.reference is None and k < self.settings.rounds:
            with torch.no_grad():
                begun = [picked(z, index) for z in zip(*self.trajectories, strict=True)]
                self.reference = self.rollout(begun).detach()
            self.runs += 1
        around = [fresh(best.noises, self.generator) for _ in range(self.settings.particles - 1)]
        self.trajectories = [best.noises, *(towards(best.noises, other, self.settings.radius) for other in around)]
        return None

    def rounds(self) -> str | None:
        self.record(0, self.climb(self.trajectories[0], 0))
        for k in range(1, self.settings.rounds + 1):
            if ended := self.round(k):
                return ended
        return None


def hybrid(
    rollout: Rollout,
    score: Callable[[Tensor], Score],
    noises: Sequence[Tensor],
    settings: SearchSettings,
    *,
    seed: int = 0,
    others: Callable[[int, Sequence[Tensor]], Sequence[Tensor]] | None = None,
    on_iteration: Callable[[int, list[dict], Score], None] = lambda k, rows, score: None,
    interrupts: Interrupts = (),
    memory: Callable[[], float] = lambda: 0.0,
) -> Result:
    """`rounds` times: MIRA for `iterations` on each of `particles` trajectories, then all go on from the best one.

    The best is the one of the highest MIRA objective, reward - beta R, R measured from the plain sample of its own
    lineage. As copies would stay copies, all but one take a step of `radius` along fresh noise. The first trajectory
    is the plain sample's, the p-th begins from others(p, noises). Returns as `optimize` does; a row per round,
    iteration 0 is the plain sample.
    """
    generator = stream(seed, -1)
    trajectories = [[n.detach() for n in noises]]
    others = others or (lambda p, like: fresh(like, generator))
    trajectories += [list(others(p, noises)) for p in range(1, settings.particles)]
    run = _Hybrid(rollout, score, trajectories, settings, generator, on_iteration, interrupts, memory)
    ended, cut = attempt(interrupts, run.rounds)
    if cut and (run.kept.empty or isinstance(cut.problem, NoGradient)):
        raise cut.problem
    if cut:
        ended = f"{cut} after round {run.trace.rows[-1]['iteration']}"
    reason = ended or "all rounds done"
    run.trace.kept, run.trace.reasons = run.kept.iteration.tolist(), [reason] * run.batch
    run.trace.settings |= {"evaluations": run.runs * run.steps}
    return Result(
        run.kept.latent,
        run.iterates[-1].to(run.kept.latent),
        tuple(run.kept.noises),
        run.trace,
        reason,
        run.iterates,
        ended is not None,
    )
