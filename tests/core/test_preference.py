"""Preferences on a Gaussian denoiser, where score, energy and gradient have closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import gaussian
import pytest
import torch
from mira.sampler import methods
from mira.sampler.candidates import Run, towards
from mira.sampler.methods import METHODS, OPTIMIZERS, Dpo
from mira.sampler.preference import ENOUGH, PreferenceSettings, Verdict, by_score, prefer
from mira.sampler.surrogates import SURROGATES
from mira.sampler.variables import Variables

MEAN = lambda images: images.flatten(1).mean(1)  # noqa: E731


def render(x0):
    return x0[:, :3]


def judged(score=MEAN, record=None):
    def judge(k, candidates):
        verdict = by_score(torch.stack([score(c) for c in candidates], 1))
        if record is not None:
            record.append(verdict)
        return verdict

    return judge


def pair(batch=2):
    return [gaussian.noises(batch=batch, seed=s) for s in (0, 1)]


def run(settings, judge=None, batch=2, memory="none", trajectories=None, **kwargs):
    return prefer(
        gaussian.rollout(memory=memory), render, judge or judged(), trajectories or pair(batch), settings, **kwargs
    )


def test_the_first_step_is_the_papers_loss_differentiated_at_once():
    """Algorithm 2's loss over both trajectories jointly, by autograd, against the sequential passes of ours."""
    beta, lr = 0.7, 0.1
    rollout, trajectories = gaussian.rollout(), pair()
    z = [[n.clone().requires_grad_() for n in t] for t in trajectories]
    with torch.no_grad():
        references = [rollout(t) for t in trajectories]
        # After one step away from the references, so that the margin is not 0.
        for t in z:
            for n in t:
                n += 0.05 * n.sign()
    paths = [rollout(t) for t in z]
    energy = [SURROGATES["mira"](p, r) for p, r in zip(paths, references, strict=True)]
    better = MEAN(paths[0].x0) > MEAN(paths[1].x0)
    margin = torch.where(better, energy[0] - energy[1], energy[1] - energy[0])
    loss = -torch.nn.functional.logsigmoid(beta * margin).sum()
    joint = torch.autograd.grad(loss, [n for t in z for n in t])

    settings = PreferenceSettings(beta=beta, lr=lr, optimizer="sgd", clip_norm=0)
    state = Run(rollout, render, settings, torch.Generator())
    method = Dpo(state, trajectories)
    method.references = [r.detach() for r in references]
    method.variables = [Variables("trajectory", t) for t in z]
    method.optimizers = [OPTIMIZERS["sgd"](v.leaves, lr) for v in method.variables]
    found = method.candidates()
    method.learn(found, by_score(torch.stack([MEAN(c.images) for c in found], 1)))
    moved = [n.detach() for v in method.variables for n in v.leaves]
    for before, after, gradient in zip((n.detach() for t in z for n in t), moved, joint, strict=True):
        # SGD with Nesterov momentum: the first step is lr (1 + 0.9) times the gradient.
        torch.testing.assert_close(before - after, lr * 1.9 * gradient, rtol=1e-9, atol=1e-12)


def test_the_winners_energy_moves_as_the_paper_says():
    """d loss / d S_w > 0 and d loss / d S_l < 0: the winner's score energy falls, the loser's rises."""

    def always_first(k, candidates):
        none = torch.zeros(2, dtype=torch.bool)
        return Verdict(torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long), none)

    for energy, sign in (("mira", 1), ("mira_reversed", -1)):
        result = run(PreferenceSettings(iterations=6, lr=0.05, energy=energy), always_first)
        for b in range(2):
            rows = result.trace.of(b)
            # `mira` in the record is S(z0) - S(z) of the winner.
            assert sign * (rows[-1]["mira"] - rows[0]["mira"]) > 0


def test_checkpointed_runs_are_the_same():
    a = run(PreferenceSettings(iterations=3, lr=0.05))
    b = run(PreferenceSettings(iterations=3, lr=0.05), memory="per_step")
    torch.testing.assert_close(a.best, b.best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_as_many_runs(method):
    """Of the first comparison's outcome: further noise is drawn for the whole batch."""
    settings = PreferenceSettings(iterations=1, method=method, lr=0.1, candidates=2)
    both = run(settings).trace
    for b in range(2):
        alone = run(settings, trajectories=[[n[b : b + 1] for n in t] for t in pair()]).trace
        if method in ("dpo", "best_of_n"):
            for name in ("reward", "reward.loser", "preferred", "path_kl"):
                assert both.of(b)[0][name] == pytest.approx(alone.of(0)[0][name], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_are_the_same_bit_for_bit(method):
    settings = PreferenceSettings(iterations=4, method=method, lr=0.1, candidates=3 if method == "dpo" else 2)
    trajectories = [gaussian.noises(seed=s) for s in range(3)]
    made = [[0, 0, 1, 0, False]]  # of an attempt that was given up
    a, b = (run(settings, trajectories=trajectories, seed=5, choices=choices) for choices in (None, made))
    assert torch.equal(a.best, b.best) and made is b.trace.settings["choices"]
    assert a.trace.settings["choices"] == b.trace.settings["choices"]
    assert torch.equal(gaussian.rollout()(a.best_noises).x0, a.best)  # regenerated from its stored noise


OTHERWISE = {
    "lr": 0.4, "beta": 5.0, "energy": "mira_reversed", "explore": 0.9, "step": 0.3, "skip_ties": True, "kick": 0.5,
    "optimizer": "sgd", "clip_norm": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_what_it_is_said_to_read_and_nothing_else(method, monkeypatch):
    """By the noises that it ends with, of a judge that finds a tie first, and as if two images were one for `kick`."""
    monkeypatch.setattr(methods, "SAME", 10.0)
    usual = PreferenceSettings(iterations=4, method=method, lr=0.1)

    def judge(k, candidates):
        verdict = by_score(torch.stack([MEAN(c) for c in candidates], 1))
        return replace(verdict, tie=torch.full_like(verdict.tie, k == 0))

    def outcome(settings):
        return [z.tolist() for z in run(settings, judge, seed=5).best_noises]

    usually, reads = outcome(usual), METHODS[method].reads
    unread = {name: v for name, v in OTHERWISE.items() if name not in reads}
    assert outcome(replace(usual, **unread)) == usually
    for name in reads:
        assert outcome(replace(usual, **{name: OTHERWISE[name]})) != usually, name


@pytest.mark.parametrize("method", ["dueling", "best_of_n", "hybrid2"])
def test_methods_that_follow_the_judge_raise_what_it_likes(method):
    settings = PreferenceSettings(
        iterations=40,
        method=method,
        lr=0.05,
        keep="incumbent",
        candidates=4,
        explore=0.3,
    )
    rows = run(settings).trace.of(0)
    assert rows[-1]["reward"] > rows[0]["reward.loser"] + 0.1


@pytest.mark.parametrize("method", ["best_of_n", "dueling"])
@pytest.mark.parametrize("candidates", [2, 4])
def test_of_all_challengers_the_best_comes_back(method, candidates):
    seen = []
    settings = PreferenceSettings(iterations=10, method=method, keep="incumbent", candidates=candidates)
    result = run(settings, judged(record=seen), trajectories=[gaussian.noises(seed=s) for s in range(candidates)])
    assert {v.scores.shape for v in seen} == {(2, candidates)}
    assert len({v for of in seen for v in of.scores[0].tolist()}) == 1 + 10 * (candidates - 1)
    best = torch.stack([v.scores.amax(1) for v in seen]).amax(0)
    torch.testing.assert_close(MEAN(result.best), best)


def test_several_challengers_and_a_smaller_step():
    settings = PreferenceSettings(iterations=12, method="dueling", candidates=4, step=0.5, keep="incumbent")
    rows = run(settings).trace.of(0)
    assert rows[-1]["reward"] > rows[0]["reward.loser"] + 0.1


def test_a_shorter_step_of_dueling_goes_the_same_way():
    one = run(PreferenceSettings(iterations=12, method="dueling", step=0.5, keep="incumbent"), seed=3)
    rewards = [r["reward"] for r in one.trace.of(0)]
    assert rewards[-1] > rewards[0]
    whole = run(PreferenceSettings(iterations=12, method="dueling", keep="incumbent"), seed=3)
    assert one.trace.settings["evaluations"]["forward"] > whole.trace.settings["evaluations"]["forward"] == 13


def test_dueling_steps_keep_the_noises_typical():
    z, d = gaussian.noises(batch=4000, seed=3), gaussian.noises(batch=4000, seed=4)
    for moved in towards(z, d, 0.4):
        assert moved.std().item() == pytest.approx(1, abs=0.02)


def test_the_incumbent_is_never_worse_than_what_was_seen():
    result = run(PreferenceSettings(iterations=8, lr=0.2, keep="incumbent"))
    for b in range(2):
        rewards = [r["reward"] for r in result.trace.of(b)]
        assert MEAN(result.best)[b].item() == pytest.approx(max(rewards), rel=1e-9)
        assert rewards[result.trace.kept[b]] == max(rewards)


def test_algorithm_2_returns_the_winner_after_its_update():
    """One comparison: AdamW's first step is lr in every element, but for its weight decay of 1 %."""
    start, lr = pair(), 0.1
    result = run(PreferenceSettings(iterations=1, lr=lr), trajectories=start)
    won = [int(r["preferred"]) for r in result.trace.rows[:2]]
    rows = result.trace.rows[2:]
    assert result.trace.kept == [1, 1] and len(result.iterates) == 2
    for b in range(2):
        for z, before in zip(result.best_noises, start[won[b]], strict=True):
            step = (z[b] - before[b] * (1 - 0.01 * lr)).abs()
            assert step.max().item() == pytest.approx(lr, rel=1e-3)
        assert rows[b]["iteration"] == 1 and rows[b]["path_kl"] > 0 and math.isnan(rows[b]["preferred"])
        assert rows[b]["reward"] == pytest.approx(MEAN(result.best)[b].item())
    torch.testing.assert_close(result.best, gaussian.rollout()(result.best_noises).x0)
    assert torch.equal(result.best, result.last)
    # Methods that do not move a winner end with their last comparison.
    assert run(PreferenceSettings(iterations=1, method="dueling", candidates=2)).trace.kept == [0, 0]


def test_of_equal_images_the_paper_takes_the_second():
    start, lr = pair(), 0.001
    result = run(PreferenceSettings(iterations=1, lr=lr), judged(lambda x: x.new_zeros(len(x))), trajectories=start)
    for z, before in zip(result.best_noises, start[1], strict=True):
        assert 0 < (z - before).abs().max() < 2 * lr


def test_an_incumbent_without_numbers_is_asked_for():
    asked = []

    def judge(k, candidates):
        asked.append(k)
        verdict = by_score(torch.stack([MEAN(c) for c in candidates], 1))
        verdict.scores = None
        return verdict

    result = run(PreferenceSettings(iterations=3, lr=0.2, keep="incumbent"), judge)
    assert asked == [0, 1, 1, 2, 2]
    assert "reward" not in result.trace.rows[0]


@pytest.mark.parametrize(("method", "asked"), [("best_of_n", 6), ("dueling", 6)])
def test_nobody_is_asked_twice_about_the_same_images(method, asked):
    """By a judge who always likes the best so far: a shorter step goes to no other."""
    seen = []

    def stays(k, candidates):
        seen.append(torch.equal(*candidates[:2]))
        nobody = torch.zeros(2, dtype=torch.long)
        return Verdict(nobody, nobody + 1, nobody > 0)

    run(PreferenceSettings(method=method, iterations=6, step=0.5), stays)
    assert len(seen) == asked and not any(seen)


def test_skipped_ties_change_nothing():
    def tie(k, candidates):
        return Verdict(
            torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)
        )

    start = pair()
    skipped = run(PreferenceSettings(iterations=3, skip_ties=True, patience=9), tie, trajectories=start)
    assert all(torch.equal(a, b) for a, b in zip(skipped.best_noises, start[1], strict=True))
    learned = run(PreferenceSettings(iterations=3, patience=9), tie, trajectories=start)
    assert not torch.equal(learned.best_noises[0], start[1][0])
    assert [r["preferred"] for r in skipped.trace.rows[:6]] == [-1] * 6


def test_a_judge_that_finds_all_equal_is_told():
    result = run(PreferenceSettings(iterations=20, patience=3), judged(lambda images: images.new_zeros(len(images))))
    assert "3 ties in a row" in result.reason and "no preference can be learned" in result.reason
    assert not result.cut_short
    assert len(result.trace.of(0)) == 3


def test_numbers_that_are_none():
    verdict = by_score(torch.tensor([[math.nan, 1.0, 0.5], [2.0, math.inf, 1.0]]))
    assert verdict.best.tolist() == [1, 0] and verdict.worst.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"no number for any candidate of image\(s\) \[1\]"):
        by_score(torch.tensor([[1.0, 2.0], [math.nan, math.nan]]))


def test_more_than_two_candidates_use_the_best_and_the_worst():
    trajectories = [gaussian.noises(seed=s) for s in range(4)]
    result = run(PreferenceSettings(iterations=2, candidates=4, lr=0.1), trajectories=trajectories)
    with torch.no_grad():
        rewards = torch.stack([MEAN(gaussian.rollout()(t).x0) for t in trajectories], 1)
    first = [c for c in result.trace.settings["choices"] if c[0] == 0]
    assert [c[2] for c in first] == rewards.argmax(1).tolist() and [c[3] for c in first] == rewards.argmin(1).tolist()


def test_a_kick_parts_candidates_that_are_the_same():
    same = gaussian.noises(seed=0)
    settings = PreferenceSettings(iterations=4, lr=1e-6, kick=0.5)
    result = run(settings, trajectories=[same, [n + 1e-7 for n in same]])
    rewards = [[r["reward"] - r["reward.loser"] for r in result.trace.of(b)] for b in range(2)]
    # Their own first distance is the measure, so nothing that has stayed as far apart is kicked ...
    assert max(rewards[0]) < 1e-3

    state = Run(gaussian.rollout(), render, settings, torch.Generator().manual_seed(0))
    method = Dpo(state, pair())
    method.apart = torch.full((2,), 1e9, dtype=torch.float64)  # ... and what has become 1 % of it is
    before = method.variables[1].begun
    found = method.candidates()
    method.learn(found, Verdict(torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([False, False])))
    assert (method.variables[1].leaves[0] - before[0]).std() > 0.3


@pytest.mark.parametrize("method", ["dpo", "hybrid2"])
def test_a_gradient_that_overflows_is_taken_at_a_smaller_scale(method):
    settings = PreferenceSettings(iterations=3, method=method, lr=0.1, candidates=3 if method == "hybrid2" else 2)
    narrow = gaussian.narrow(gaussian.denoiser())

    def run_at(scale, D=None):
        at_scale = replace(settings, loss_scale=scale)
        return prefer(gaussian.rollout(D=D), render, judged(), pair(), at_scale)

    wanted, found = run_at(1.0), run_at(2.0**16, narrow)
    torch.testing.assert_close(found.best, wanted.best)
    assert found.trace.settings["evaluations"]["backward"] > wanted.trace.settings["evaluations"]["backward"]


class Interrupted(Exception):
    pass


def test_an_interrupt_keeps_the_best_so_far():
    def judge(k, candidates):
        if k == 3:
            raise Interrupted
        return judged()(k, candidates)

    result = run(PreferenceSettings(iterations=9, lr=0.1), judge, interrupts=(Interrupted,))
    assert result.reason == "interrupted at iteration 3" and result.trace.kept == [2, 2]
    assert result.cut_short
    with pytest.raises(Interrupted):
        run(PreferenceSettings(), lambda k, c: (_ for _ in ()).throw(Interrupted()), interrupts=(Interrupted,))


def test_enough_is_enough():
    def judge(k, candidates):
        verdict = judged()(k, candidates)
        verdict.stop = ENOUGH if k == 2 else ""
        return verdict

    result = run(PreferenceSettings(iterations=9, lr=0.1), judge)
    assert result.reason == "the judge had enough" and len(result.trace.of(0)) == 2 and result.trace.kept == [1, 1]
    assert not result.cut_short
    first = run(PreferenceSettings(iterations=9), lambda k, c: Verdict(None, None, None, stop="nobody was there"))
    assert first.reason == "nobody was there" and first.cut_short  # asked again, it asks again
    assert first.trace.kept == [0, 0] and len(first.trace.of(0)) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.best_noises, pair()[0], strict=True))


@pytest.mark.parametrize("method", ["dpo", "dueling", "best_of_n"])
def test_a_choice_can_be_taken_back(method):
    """Wrong at the third comparison, back, right: the run is the one without the mistake."""
    settings = PreferenceSettings(iterations=6, lr=0.1, method=method, keep="incumbent")
    asked, shown = [], []

    def judge(k, candidates):
        asked.append(k)
        shown.append([c.clone() for c in candidates])
        verdict = judged()(k, candidates)
        verdict.scores = None if method != "dpo" else verdict.scores
        if len(asked) == 3:
            verdict.best, verdict.worst = verdict.worst, verdict.best
        if len(asked) == 4:
            return Verdict(None, None, None, back=True)
        return verdict

    def plain(k, candidates):
        verdict = judged()(k, candidates)
        verdict.scores = None if method != "dpo" else verdict.scores
        return verdict

    result = run(settings, judge, history=3)
    assert asked == [0, 1, 2, 3, 2, 3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(shown[2], shown[4], strict=True))  # the same pair again
    right = run(settings, plain)
    assert torch.equal(result.best, right.best)
    assert result.trace.settings["choices"] == right.trace.settings["choices"]
    assert [r["iteration"] for r in result.trace.of(0)] == list(range(6))


def test_back_at_the_beginning_asks_again():
    asked = []

    def judge(k, candidates):
        asked.append(k)
        return Verdict(None, None, None, back=True) if len(asked) == 1 else judged()(k, candidates)

    run(PreferenceSettings(iterations=2, lr=0.1), judge, history=3)
    assert asked == [0, 0, 1, 2]  # the last for the numbers of what comes back


def test_hybrid2_needs_numbers():
    def judge(k, candidates):
        verdict = judged()(k, candidates)
        verdict.scores = None
        return verdict

    with pytest.raises(ValueError, match="hybrid2 needs numbers"):
        run(PreferenceSettings(method="hybrid2"), judge)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "x"}, "choose one of dpo, dueling"),
        ({"energy": "x"}, "choose one of mira"),
        ({"iterations": 0}, "iterations is 0: it must be 1 or more"),
        ({"candidates": 1}, "candidates is 1"),
        ({"beta": 0}, "beta is 0: it must be above 0"),
        ({"explore": 1.5}, "explore is 1.5"),
        ({"kick": 2}, "kick must lie in"),
    ],
)
def test_settings(change, message):
    with pytest.raises(ValueError, match=message):
        PreferenceSettings(**change)
