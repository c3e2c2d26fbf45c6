"""A run that goes on where it stood is the run that never ended."""

from __future__ import annotations

from dataclasses import replace

import gaussian
import pytest
import torch
from mira.sampler.optimize import Score, Settings
from mira.sampler.restart import Stretch, in_rounds, lengths
from mira.sampler.resume import Left, frozen, thawed
from mira.sampler.rollout import Rollout, noised

PLAIN = Settings(iterations=6, lr=0.1, keep="best_reward", drift_metric="path_kl")
MEASURED = ("seconds", "memory_mb")  # of the machine


class Stopped(Exception):
    pass


def score(x0):
    reward = -(x0 - 2).square().flatten(1).mean(1)
    return Score(reward, {"r": reward.detach()}, x0.detach())


def first() -> Stretch:
    return Stretch(gaussian.rollout(), gaussian.noises())


def restart(number: int, x0: torch.Tensor) -> Stretch:
    """The Gaussian process from x0 on, noised to 1."""
    schedule = gaussian.schedule(6)
    schedule = schedule / schedule[0]
    chain = gaussian.Chain(gaussian.denoiser(), schedule)

    def sample(z, source, wrap):
        return chain.segment(noised(x0, schedule[0], z), 0, 6, source, wrap)

    return Stretch(Rollout(sample, schedule, memory="none"), gaussian.noises(6, seed=number))


def run(settings, resume=None, cancel=None, reported=None, fails=0, score=score):
    """cancel: after the report of this iterate; fails: within so many-th evaluation of this call."""
    calls = []

    def on_iteration(k, rows, s):
        if reported is not None:
            reported.append(k)
        if k == cancel:
            raise Stopped

    def scored(x0):
        calls.append(1)
        if len(calls) == fails:
            raise Stopped
        return score(x0)

    options = dict(on_iteration=on_iteration, interrupts=(Stopped,), resume=resume)
    done = in_rounds(first(), scored, settings, restart, **options)
    if done.left:  # as the host keeps it
        done.left = Left(thawed(frozen(done.left.value)), done.left.done)
    return done


def rows(result):
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in result.trace.rows]


def same(one, other):
    assert rows(one) == rows(other)
    assert (one.trace.kept, one.trace.reasons, one.reason) == (other.trace.kept, other.trace.reasons, other.reason)
    for a, b in zip((one.best, one.last, *one.best_noises), (other.best, other.last, *other.best_noises), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one.iterates, other.iterates, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one.segments, other.segments, strict=True):
        assert torch.equal(a.part, b.part) and all(map(torch.equal, a.noises, b.noises))


WAYS = {
    "adamw": PLAIN,
    "momentum": replace(PLAIN, optimizer="normalized", regularizer="mira", beta=0.1),
    "on the sphere": replace(PLAIN, optimizer="sphere", keep="last"),
    "held": replace(PLAIN, hold="projection", drift_limit=0.02, stop="plateau_at_limit"),
    "a weight that adapts": replace(
        PLAIN, hold="dual_ascent", drift_limit=0.02, regularizer="path_kl", beta=1.0, keep="best_within_drift"
    ),
    "other variables": replace(PLAIN, variables="initno"),
    "rounds": replace(PLAIN, restart_every=2),
    "rounds, to the last": replace(PLAIN, restart_every=3, keep="last"),
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("cancel", [1, 4, 6])
def test_a_run_that_was_cancelled_goes_on_as_if_it_had_not(settings, cancel):
    whole = run(settings)
    if cancel >= len(whole.iterates):
        pytest.skip("it ends before")
    cut = run(settings, cancel=cancel)
    assert cut.cut_short and cut.left.done == cancel
    reported = []
    same(run(settings, resume=cut.left, reported=reported), whole)
    assert reported == list(range(cancel, len(whole.iterates)))


def test_what_ended_by_itself_has_nothing_left():
    ended = run(WAYS["held"])
    assert len(ended.iterates) < 7 and not ended.cut_short and ended.left is None


def test_it_can_be_cancelled_again_and_again():
    settings, left = WAYS["rounds"], None
    for cancel in (1, 1, 3, 5, 8):
        left = run(settings, resume=left, cancel=cancel).left
        assert left.done == cancel
    same(run(settings, resume=left), run(settings))


@pytest.mark.parametrize("name", ["adamw", "momentum", "a weight that adapts", "other variables"])
def test_more_iterations_go_on_from_the_last(name):
    settings = WAYS[name]
    further = replace(settings, iterations=10)
    same(run(further, resume=run(settings).left), run(further))


@pytest.mark.parametrize("keep", ["best_reward", "last", "best_within_drift"])
@pytest.mark.parametrize(
    ("every", "few", "many"), [(2, 4, 8), (2, 4, 5), (3, 7, 9), (3, 7, 11), (3, 3, 6), (4, 2, 7), (1, 2, 3)]
)
def test_more_iterations_go_on_in_the_last_round_and_in_further_ones(keep, every, few, many):
    settings = replace(
        PLAIN, keep=keep, drift_limit=0.1 if "drift" in keep else 0.0, iterations=few, restart_every=every
    )
    further = replace(settings, iterations=many)
    reported, whole = [], run(further)
    left = run(settings).left
    assert left.done == few + len(lengths(settings)) - 1
    same(run(further, resume=left, reported=reported), whole)
    assert reported == list(range(left.done, len(whole.iterates)))  # the last iterate is made once more
    cut = run(further, resume=run(settings).left, cancel=left.done + 1)
    same(run(further, resume=cut.left), whole)


def test_rounds_that_ended_by_themselves_have_more_after_them():
    held = replace(WAYS["held"], restart_every=5, iterations=10)
    further = replace(held, iterations=15)
    ended, whole = run(held), run(further)
    assert len(ended.iterates) < 12 and ended.left.done == len(ended.iterates)
    same(run(further, resume=ended.left), whole)
    again = run(held, resume=ended.left)  # nothing is left to do in these
    assert again.reason == ended.reason and torch.equal(again.best, ended.best) and not again.cut_short


@pytest.mark.parametrize(("few", "many"), [(2, 6), (4, 6), (4, 8), (3, 4)])
def test_a_restart_that_is_cut_loses_nothing_of_the_run_that_goes_on(few, many):
    """The round that was to go on had begun before: its images and rows come back, and the next time it goes on."""
    settings = replace(PLAIN, iterations=few, restart_every=2, keep="best_reward")
    further = replace(settings, iterations=many)
    before = run(settings)

    def full(number, x0):
        raise Stopped

    options = dict(interrupts=(Stopped,), resume=Left(thawed(frozen(before.left.value)), before.left.done))
    cut = in_rounds(first(), score, further, full, **options)
    assert (
        cut.cut_short and rows(cut)[: len(rows(before))] == rows(before) and len(cut.iterates) >= len(before.iterates)
    )
    assert cut.trace.kept == before.trace.kept and torch.equal(cut.best, before.best)
    left = Left(thawed(frozen(cut.left.value)), cut.left.done)
    same(run(further, resume=left), run(further))


def test_a_cancelled_round_that_goes_on_and_is_cut_in_its_restart_loses_nothing():
    settings = replace(PLAIN, iterations=8, restart_every=4)
    before = run(settings, cancel=7)

    def full(number, x0):
        raise Stopped

    cut = in_rounds(first(), score, settings, full, interrupts=(Stopped,), resume=before.left)
    assert rows(cut) == rows(before) and torch.equal(cut.best, before.best) and cut.trace.kept == before.trace.kept
    same(run(settings, resume=cut.left), run(settings))


def test_a_round_that_ended_by_itself_has_others_after_it_where_there_are_restarts():
    held = replace(WAYS["held"], restart_every=5, iterations=5)
    ended, further = run(held), replace(held, iterations=10)
    assert len(ended.iterates) < 6 and ended.left.done == len(ended.iterates)
    same(run(further, resume=ended.left), run(further))


def test_rounds_are_of_as_many_iterations_but_for_the_last():
    def parts(iterations, every):
        return lengths(Settings(iterations=iterations, restart_every=every))

    assert [parts(n, 4) for n in (0, 1, 4, 5, 8, 11)] == [[0], [1], [4], [4, 1], [4, 4], [4, 4, 3]]
    assert [parts(n, 0) for n in (0, 1, 9)] == [[0], [1], [9]]


@pytest.mark.parametrize("name", ["adamw", "rounds", "rounds, to the last"])
def test_a_second_cancel_before_anything_is_new_hands_back_what_there_was(name):
    """Within the first evaluation: of an iterate that was seen already, or of one that was not."""
    settings = WAYS[name]
    cases = [(run(settings, cancel=5), settings), (run(settings, fails=5), settings)]
    if not settings.restart_every:
        cases.append((run(settings), replace(settings, iterations=12)))
    for before, longer in cases:
        cut = run(longer, resume=before.left, fails=1)
        assert cut.cut_short and cut.trace.kept == before.trace.kept and torch.equal(cut.best, before.best)
        assert rows(cut) == rows(before)
        same(run(longer, resume=cut.left), run(longer))


def test_an_iterate_that_is_made_again_takes_its_own_place():
    """Without a gradient it may differ in the last bits: of a longer run it counts as it is with one."""

    def rounded(x0):
        found = score(x0)
        return found if torch.is_grad_enabled() else replace(found, total=found.total + 10)

    longer = replace(PLAIN, iterations=9)
    short = run(PLAIN, score=rounded)
    assert short.trace.kept == [6, 6]
    same(run(longer, resume=short.left, score=rounded), run(longer, score=rounded))


def test_a_cancelled_restart_is_begun_anew():
    calls = []

    def once(number, x0):
        calls.append(number)
        if len(calls) == 2:
            raise Stopped
        return restart(number, x0)

    cut = in_rounds(first(), score, WAYS["rounds"], once, interrupts=(Stopped,))
    assert "before round 3" in cut.reason and cut.left.done == 6
    same(run(WAYS["rounds"], resume=cut.left), run(WAYS["rounds"]))


def test_half_an_update_is_no_state_to_go_on_from(monkeypatch):
    steps = []

    def step(self, closure=None):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("broken in the middle")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    cut = run(PLAIN)
    assert cut.cut_short and cut.left is None


def test_what_is_frozen_keeps_its_identities():
    leaf = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adam([leaf])
    again, other = thawed(frozen((leaf, optimizer)))
    assert again is other.param_groups[0]["params"][0] and again is not leaf and again.requires_grad


def test_what_cannot_be_kept_costs_nothing(monkeypatch, caplog):
    def full(*_):
        raise MemoryError("no memory left")

    monkeypatch.setattr(torch, "save", full)
    assert frozen(torch.ones(1)) is None
    assert "cannot be gone on with: no memory left" in caplog.text
