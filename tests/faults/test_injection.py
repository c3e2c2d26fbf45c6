"""Every call that can fail fails once, at the beginning, in the middle and at the end of every loop, on a Gaussian.

What has to hold: an image that was reported is never lost. Whatever fails after the first one ends the run, or is got
round where memory ran out, with the best image so far, a whole record, and a reason that says what happened; before it,
the error itself goes through. The next run is as the first one was.

$MIRA_ALL_FAULTS: every kind at every call; otherwise what is an error like any other at two calls of every place.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import gaussian
import pytest
import torch
from mira.sampler import ending
from mira.sampler.hybrid import NoGradient, hybrid
from mira.sampler.initno import Maps, improve
from mira.sampler.initno import Settings as InitNO
from mira.sampler.methods import METHODS as PREFERENCES
from mira.sampler.optimize import Score, Settings, optimize
from mira.sampler.preference import PreferenceSettings, by_score, prefer
from mira.sampler.restart import Stretch, in_rounds, search_by_restarts
from mira.sampler.rollout import Rollout, noised
from mira.sampler.search import METHODS as SEARCHES
from mira.sampler.search import SearchSettings, search
from mira.sampler.trace import Trace

STEPS = 5


class Cancelled(Exception):
    pass


@pytest.fixture(autouse=True)
def quick(caplog, monkeypatch):
    caplog.set_level(logging.CRITICAL, "mira")  # hundreds of tracebacks, all of them asked for
    monkeypatch.setattr(ending, "give_back", lambda: None)  # a fifth of a second each; tests/core/test_ending.py has it


FAULTS = {
    "cancel": lambda: Cancelled(),
    "memory": lambda: torch.OutOfMemoryError("out of memory"),
    "error": lambda: RuntimeError("broken\nin two lines"),
    "disk": lambda: OSError(28, "No space left on device"),
    "lookup": lambda: KeyError("weight"),
}
ANY_ERROR = ("disk", "lookup")
ALL = bool(os.environ.get("MIRA_ALL_FAULTS"))


@dataclass
class Injector:
    """Counts the calls of every place, and raises `problem` at one of them."""

    place: str = ""
    at: int = -1
    problem: Callable[[], Exception] = RuntimeError
    calls: dict[str, int] = field(default_factory=dict)
    fired: bool = False

    def __call__(self, place: str) -> None:
        number = self.calls[place] = self.calls.get(place, 0) + 1
        if place == self.place and number == self.at:
            self.fired = True
            raise self.problem()


def measured(inject: Injector, denoiser=None):
    """(denoiser, score, what else a loop is given), with a place for a fault in each."""
    inner = denoiser or gaussian.denoiser()

    def D(x, sigma):
        inject("denoiser")
        return inner(x, sigma)

    def score(x0):
        inject("reward")
        reward = -(x0 - 1.5).square().flatten(1).mean(1)
        return Score(reward, {"r": reward.detach()}, x0.detach())

    def memory():
        inject("memory")
        return 0.0

    return D, score, dict(interrupts=(Cancelled,), memory=memory)


def seeing(inject: Injector, seen: list):
    def on_iteration(k, rows, score):
        seen.append((k, [row["reward"] for row in rows]))
        inject("event")

    return on_iteration


def optimizing(settings: Settings):
    def loop(inject, seen):
        D, score, more = measured(inject)
        return optimize(
            gaussian.rollout(STEPS, D=D), score, gaussian.noises(STEPS), settings, on_iteration=seeing(inject, seen),
            **more,
        )  # fmt: skip

    return loop


def restarting(inject: Injector, D, number: int, x0: torch.Tensor) -> Stretch:
    inject("restart")
    schedule = gaussian.schedule(STEPS)
    schedule = schedule / schedule[0]
    chain = gaussian.Chain(D, schedule)

    def sample(z, source, wrap):
        return chain.segment(noised(x0, schedule[0], z), 0, STEPS, source, wrap)

    return Stretch(Rollout(sample, schedule, memory="none"), gaussian.noises(STEPS, seed=number))


def rounds(inject, seen):
    D, score, more = measured(inject)
    first = Stretch(gaussian.rollout(STEPS, D=D), gaussian.noises(STEPS))
    settings = Settings(iterations=6, restart_every=2, lr=0.1, keep="best_reward")
    return in_rounds(
        first, score, settings, lambda n, x0: restarting(inject, D, n, x0), on_iteration=seeing(inject, seen), **more
    )


def searching(method: str):
    def loop(inject, seen):
        D, score, more = measured(inject)
        chain, z = gaussian.Chain(D, gaussian.schedule(STEPS)), gaussian.noises(STEPS)
        settings = SearchSettings(method, particles=4, rounds=3, interval=1, iterations=2, lr=0.1)
        more |= dict(seed=1, on_iteration=seeing(inject, seen))
        return search(chain, gaussian.rollout(STEPS, D=D), score, z, settings, most=2, **more)

    return loop


def hybrids(inject, seen):
    D, score, more = measured(inject)
    settings = SearchSettings("mira_fk", particles=2, rounds=2, iterations=2, lr=0.1)
    more |= dict(seed=1, on_iteration=seeing(inject, seen))
    return hybrid(gaussian.rollout(STEPS, D=D), score, gaussian.noises(STEPS), settings, **more)


def restarts(inject, seen):
    D, score, more = measured(inject)

    def sample(number, p, x0):
        z = gaussian.noises(STEPS, seed=10 * number + p)
        rollout = restarting(inject, D, 10 * number + p, x0).rollout if number else gaussian.rollout(STEPS, D=D)
        return rollout(z).x0, z

    settings = SearchSettings("restarts", particles=2, rounds=3)
    return search_by_restarts(sample, score, settings, steps=STEPS, on_iteration=seeing(inject, seen), **more)


def preferring(method: str):
    def loop(inject, seen):
        D, _, more = measured(inject)

        def render(x0):
            inject("render")
            return x0[:, :3]

        def judge(k, candidates):
            inject("judge")
            return by_score(torch.stack([-(c - 1.5).square().flatten(1).mean(1) for c in candidates], 1))

        settings = PreferenceSettings(iterations=5, method=method, lr=0.1, keep="incumbent")
        pair = [gaussian.noises(STEPS, seed=s) for s in (0, 1)]
        more |= dict(on_iteration=seeing(inject, seen))
        return prefer(gaussian.rollout(STEPS, D=D), render, judge, pair, settings, **more)

    return loop


LOOPS = {
    "optimize": optimizing(Settings(iterations=5, lr=0.1, keep="best_reward")),
    "held": optimizing(
        Settings(iterations=5, lr=0.1, keep="best_reward", hold="projection", drift_metric="path_kl", drift_limit=0.01)
    ),
    "weighed": optimizing(Settings(iterations=5, lr=0.1, keep="best_reward", regularizer="path_kl", beta=0.1)),
    "rounds": rounds,
    **{f"search {m}": searching(m) for m, facts in SEARCHES.items() if not (facts.optimizes or facts.restarts)},
    "search mira_fk": hybrids,
    "search restarts": restarts,
    **{f"prefer {m}": preferring(m) for m in PREFERENCES},
}
STEERED = {f"search {m}" for m, facts in SEARCHES.items() if facts.steers}


def kinds_at(at: int, count: int) -> dict:
    """What the call number `at` of `count` fails with."""
    return {k: f for k, f in FAULTS.items() if ALL or k not in ANY_ERROR or at in (1, count // 2)}


def check(name: str, result, seen: list, inject: Injector, kind: str) -> None:
    """What came back after a fault that was met with an image in hand, or got round."""
    assert all(torch.isfinite(x).all() for x in (result.best, result.last, *result.best_noises))
    trace = Trace.from_dict(json.loads(result.trace.to_json()))  # raises where a kept iterate has no row
    for b, k in enumerate(trace.kept):
        assert torch.equal(result.best[b].cpu(), result.iterates[k][b]), "the record is of another image"
        reported = [rewards[b] for _, rewards in seen if not math.isnan(rewards[b])]
        if name not in STEERED:  # whose last population takes the place of what it promised
            assert trace.summary(b)[1]["reward"] >= max(reported, default=-math.inf) - 1e-12, "a better image was lost"
    if not inject.fired or not result.cut_short:
        assert not inject.fired or kind == "memory"  # only that can be got round
        return
    said = {"cancel": "interrupted", "memory": "out of memory"}.get(kind, f"error ({type(inject.problem()).__name__}")
    assert said in result.reason and all(said in reason for reason in trace.reasons), result.reason
    assert "\n" not in result.reason


@pytest.mark.parametrize("name", LOOPS)
def test_no_fault_loses_an_image(name):
    loop, clean, reported = LOOPS[name], Injector(), []
    whole = loop(clean, reported)
    injected = 0
    for place, count in clean.calls.items():
        for at in sorted({1, 2, 3, count // 4, count // 2, count - 1, count} & set(range(1, count + 1))):
            for kind, problem in kinds_at(at, count).items():
                inject, seen = Injector(place, at, problem), []
                injected += 1
                try:
                    result = loop(inject, seen)
                except type(problem()) as raised:
                    assert inject.fired and not seen, f"{place} {at}, {kind}: {len(seen)} rows were lost"
                    assert kind in ("cancel", "memory") or raised.__traceback__.tb_next is not None
                    continue
                assert inject.fired, (place, at)
                check(name, result, seen, inject, kind)
    again = loop(Injector(), [])
    assert torch.equal(again.best, whole.best)
    assert [r["reward"] for r in again.trace.rows] == [r["reward"] for r in whole.trace.rows]
    assert injected >= 60
    print(f"{name}: {injected} faults")


def test_no_fault_loses_a_noise():
    """InitNO's loop, whose result is a noise."""

    def attend(inject):
        def of(z):
            inject("attention")
            cross = torch.zeros(5, 5, 3) + 0.05 * z.mean(1)[0, ..., None] * torch.tensor([1.0, 0.0, 0.0])
            return Maps(cross, torch.ones(25, 5, 5) / 25)

        return of

    def loop(inject, seen):
        def on_iteration(*row):
            seen.append(row)
            inject("event")

        z = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(3))
        settings = InitNO(rounds=2, iterations=12, response=0.0)
        return improve(
            attend(inject), z, [[0]], settings, torch.Generator().manual_seed(0), on_iteration=on_iteration,
            interrupts=(Cancelled,),
        )  # fmt: skip

    clean = Injector()
    whole = loop(clean, [])
    for place, count in clean.calls.items():
        for at in (1, 2, 3, count // 2, count - 1, count):
            for kind, problem in kinds_at(at, count).items():
                inject, seen = Injector(place, at, problem), []
                try:
                    found = loop(inject, seen)
                except type(problem()):
                    # One step's activations are the least that this needs: without room for them it is an error.
                    assert not seen or (kind == "memory" and len(seen) == 1)
                    continue
                assert found.cut_short and torch.isfinite(found.noise).all()
                assert found.rows[found.best] == min(seen, key=lambda row: row[2] + row[3])
    assert torch.equal(loop(Injector(), []).noise, whole.noise)


def test_what_was_never_possible_is_an_error_and_no_result():
    """A reward without a gradient: the plain image of a hybrid run is not what was asked for."""
    z = gaussian.noises(STEPS)
    flat = Score(torch.zeros(2), {}, torch.zeros(2, 3, 2, 2))
    with pytest.raises(NoGradient):
        hybrid(gaussian.rollout(STEPS), lambda x0: flat, z, SearchSettings("mira_fk", particles=2))
