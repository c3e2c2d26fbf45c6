"""MIRA trajectories side by side, on a Gaussian whose optimum is known."""

from __future__ import annotations

import gaussian
import pytest
import torch
from mira.sampler.hybrid import hybrid
from mira.sampler.optimize import Score
from mira.sampler.search import SearchSettings
from mira.sampler.surrogates import REGULARIZERS

TARGET = 1.5


def score(x0):
    reward = -(x0 - TARGET).square().flatten(1).mean(1)
    return Score(reward, {"r": reward.detach()}, x0.detach())


SETTINGS = SearchSettings("mira_fk", particles=3, rounds=4, iterations=4, lr=0.1, regularizer="path_kl", beta=0.1)


def test_the_best_trajectory_survives_and_climbs():
    rollout, z = gaussian.rollout(), gaussian.noises()
    seen = []
    result = hybrid(rollout, score, z, SETTINGS, seed=1, on_iteration=lambda k, rows, s: seen.append(k))
    assert seen == [0, 1, 2, 3, 4] == [r["iteration"] for r in result.trace.of(1)]
    for image in range(2):
        first, kept = result.trace.summary(image)
        assert first["path_kl"] == 0 and kept["path_kl"] > 0
        assert kept["reward"] > first["reward"] / 4  # rewards are negative
    torch.testing.assert_close(rollout(result.best_noises).x0.detach(), result.best)
    # One run for the plain sample, one for the survivor's reference, and (4 + 1) for each particle in each round.
    assert result.trace.settings["evaluations"] == (1 + 1 + 4 * 3 * 5) * 6


def test_more_trajectories_find_more():
    rollout, z = gaussian.rollout(), gaussian.noises(batch=6)
    means = [
        hybrid(rollout, score, z, SearchSettings("mira_fk", particles=p, rounds=2, iterations=2, lr=0.05), seed=2)
        .trace.rows[-6:]
        for p in (1, 6)
    ]  # fmt: skip
    one, six = (sum(r["reward"] for r in rows) / 6 for rows in means)
    assert six > one


def test_the_same_seed_gives_the_same_bits():
    rollout, z = gaussian.rollout(), gaussian.noises()
    a, b = (hybrid(rollout, score, z, SETTINGS, seed=5).best for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, hybrid(rollout, score, z, SETTINGS, seed=6).best)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [2, 6, 7, 9, 24])
def test_stopped_in_the_middle_it_hands_back_the_best_so_far(after):
    rollout, z, calls = gaussian.rollout(), gaussian.noises(), []

    def stopping(x0):
        calls.append(1)
        if len(calls) > after:
            raise Stop
        return score(x0)

    result = hybrid(rollout, stopping, z, SETTINGS, seed=1, interrupts=(Stop,))
    assert "interrupted" in result.reason or "stopped in round" in result.reason
    assert result.cut_short
    best = [max(r["reward"] for r in result.trace.of(b)) for b in range(2)]
    assert score(result.best).total.tolist() == pytest.approx(best)


@pytest.mark.parametrize("dead", [2, 7])
def test_a_trajectory_that_is_not_finite_dies_alone(dead):
    """The dead-th look gives no number: the second trajectory's first one, or its last."""
    rollout, z, looks = gaussian.rollout(), gaussian.noises(), []

    def failing(x0):
        looks.append(1)
        out = score(x0)
        return out if len(looks) != dead + 5 else Score(out.total * torch.nan, out.parts, out.images)

    result = hybrid(rollout, failing, z, SETTINGS, seed=1)
    assert result.reason == "all rounds done" and not result.cut_short
    assert [r["iteration"] for r in result.trace.of(0)] == [0, 1, 2, 3, 4]
    assert result.trace.summary(0)[1]["reward"] > result.trace.summary(0)[0]["reward"] / 4


def test_a_reward_without_a_gradient_is_said():
    def constant(x0):
        return Score(x0.detach().flatten(1).mean(1), {}, x0.detach())

    with pytest.raises(RuntimeError, match="no gradient"):
        hybrid(gaussian.rollout(), constant, gaussian.noises(), SETTINGS)


def test_who_survives_is_weighed_by_the_regulariser_that_was_asked_for(monkeypatch):
    """One of nobody's list, that likes least what the reward likes most."""

    def lowness(path, reference):
        return path.x0.flatten(1).mean(1)

    monkeypatch.setitem(REGULARIZERS, "lowness", lowness)
    seen = []

    def mean(x0):
        reward = x0.flatten(1).mean(1)
        seen.append(reward.detach())
        return Score(reward, {}, x0.detach())

    settings = SearchSettings("mira_fk", particles=3, rounds=1, iterations=1, lr=0.01, regularizer="lowness", beta=2.0)
    result = hybrid(gaussian.rollout(), mean, gaussian.noises(), settings, seed=1)
    ends = torch.stack(seen[2::2])  # the plain sample, then two looks at every particle
    assert len(ends) == 3
    for image in range(2):
        assert result.trace.of(image)[-1]["reward"] == pytest.approx(ends[:, image].min().item())
