"""The hybrid of MIRA and FK steering: several trajectories are optimised side by side, and the best ones survive."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .candidates import towards
from .ending import Interrupts, attempt
from .keep import Kept
from .optimize import NoGradient, Result, Score, Settings, optimize
from .rollout import Path, Rollout
from .search import SearchSettings
from .seeds import fresh, stream
from .trace import Trace


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
    inner = Settings(
        iterations=settings.iterations,
        lr=settings.lr,
        regularizer=settings.regularizer,
        beta=settings.beta,
        keep="last",
        loss_scale=settings.loss_scale,
    )
    generator = stream(seed, -1)
    trajectories = [[n.detach() for n in noises]]
    others = others or (lambda p, like: fresh(like, generator))
    trajectories += [list(others(p, noises)) for p in range(1, settings.particles)]
    reference: Path | None = None  # of the lineage that survived; in the first round every trajectory is its own
    batch, steps = len(noises[0]), len(rollout.schedule) - 1
    trace, iterates = Trace(), []
    kept, best_reward = Kept(), torch.full((batch,), -math.inf, dtype=torch.double)
    runs = 0

    def record(k: int, rows: list[dict], latent: Tensor, z: Sequence[Tensor], images: Tensor) -> None:
        nonlocal best_reward
        rows = [r | {"iteration": k, "evaluations": runs * steps, "memory_mb": memory() / 1e6} for r in rows]
        trace.rows.extend(rows)
        iterates.append(latent.cpu())
        reward = torch.tensor([r["reward"] for r in rows], dtype=torch.double)
        better = (reward > best_reward) | (k == 0)
        best_reward = torch.where(better, reward, best_reward)
        kept.take(k, better, latent, z)
        on_iteration(k, rows, Score(reward, {}, images))

    def weighed(row: dict) -> float:
        penalty = 0.0 if settings.regularizer == "none" else row[settings.regularizer]
        return row["reward"] - settings.beta * penalty

    def climb(z: Sequence[Tensor], reference: Path | None, iterations: int):
        """(the last rows, images, latent, noises, why it ended before its time or None)."""
        nonlocal runs
        latest: list = []

        def seen(i: int, rows: list[dict], score: Score) -> None:
            nonlocal runs
            runs += 1
            latest[:] = [rows, score.images]

        done = optimize(
            rollout, score, z, replace(inner, iterations=iterations), reference=reference, on_iteration=seen,
            interrupts=interrupts, memory=memory,
        )  # fmt: skip
        trace.notices.extend(n for n in done.trace.notices if n not in trace.notices)
        # A trajectory whose reward or gradient is not finite ends alone; a cancelled one ends the run.
        return *latest, done.last, list(done.best_noises), done.reason if done.cut_short else None

    def round_(k: int) -> str | None:
        """Why it ended before its time, or None."""
        nonlocal reference, trajectories, runs
        started, ended = time.perf_counter(), None
        ends: list[list] = []
        for z in trajectories:
            end, cut = attempt(interrupts, climb, z, reference, settings.iterations)
            if cut:
                if not ends:
                    raise cut.problem
                ended = f"{cut} in round {k}"
                break
            *end, ended = end
            ends.append(end)
            if ended:
                break
        objective = torch.tensor([list(map(weighed, rows)) for rows, *_ in ends]).nan_to_num(nan=-math.inf)
        index = objective.argmax(0)
        rows = [ends[p][0][b] | {"seconds": time.perf_counter() - started} for b, p in enumerate(index.tolist())]
        winner = [_picked(z, index) for z in zip(*(e[3] for e in ends), strict=True)]
        record(k, rows, _picked([e[2] for e in ends], index), winner, _picked([e[1] for e in ends], index))
        if ended:
            return ended
        if reference is None and k < settings.rounds:
            with torch.no_grad():
                reference = rollout([_picked(z, index) for z in zip(*trajectories, strict=True)]).detach()
            runs += 1
        trajectories = [winner]
        for _ in range(settings.particles - 1):
            trajectories.append(towards(winner, fresh(winner, generator), settings.radius))
        return None

    def rounds() -> str | None:
        rows, images, latent, z, _ = climb(trajectories[0], None, 0)
        record(0, rows, latent, z, images)
        for k in range(1, settings.rounds + 1):
            if ended := round_(k):
                return ended
        return None

    ended, cut = attempt(interrupts, rounds)
    if cut and (kept.latent is None or isinstance(cut.problem, NoGradient)):
        raise cut.problem
    if cut:
        ended = f"{cut} after round {trace.rows[-1]['iteration']}"
    reason = ended or "all rounds done"
    trace.kept, trace.reasons = kept.iteration.tolist(), [reason] * batch
    trace.settings |= {"evaluations": runs * steps}
    return Result(
        kept.latent, iterates[-1].to(kept.latent), tuple(kept.noises), trace, reason, iterates, ended is not None
    )


def _picked(values: Sequence[Tensor], index: Tensor) -> Tensor:
    """Of each image b, values[index[b]][b]."""
    return torch.stack([values[p][b] for b, p in enumerate(index.tolist())])
