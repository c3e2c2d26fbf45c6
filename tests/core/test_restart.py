"""Restarts: what they do to a KL divergence where it is known, and rounds of them as one run."""

from __future__ import annotations

import math

import gaussian
import pytest
import torch
from mira.sampler.optimize import Score, Settings, optimize
from mira.sampler.restart import Stretch, in_rounds, search_by_restarts, tail
from mira.sampler.rollout import Rollout, noised
from mira.sampler.search import SearchSettings

MEAN, STD = 0.5, 0.8  # of the data


def kl(mean: float, variance: float, std: float = STD) -> float:
    """KL(N(mean, variance) || N(MEAN, std^2))."""
    ratio = variance / std**2
    return ((mean - MEAN) ** 2 / std**2 + ratio - 1 - math.log(ratio)) / 2


def restarted(mean: float, variance: float, sigma: float, std: float = STD) -> tuple[float, float]:
    """N(mean, variance) after noising to sigma and the model's own way back: docs/restart.md, Eq. 2."""
    kappa = std**2 / (std**2 + sigma**2)
    return MEAN + kappa * (mean - MEAN), kappa**2 * (variance + sigma**2) + kappa * sigma**2


def sampled_from(x0: torch.Tensor, sigma: float, std: float = STD, steps: int = 400) -> torch.Tensor:
    """By the code: noised, and a fine ancestral sampler back."""
    levels = torch.linspace(math.log(sigma), math.log(0.002), steps, dtype=torch.float64).exp()
    schedule = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    chain = gaussian.Chain(gaussian.denoiser(MEAN, std), schedule)
    x = noised(x0, schedule[0], torch.randn_like(x0))
    return chain.segment(x, 0, steps, lambda draw: draw(), lambda D: D)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("mean", "std"), [(2.0, 0.8), (0.5, 0.2), (1.5, 1.6)])
def test_a_restart_moves_a_gaussian_as_the_closed_form_says(sigma, mean, std):
    torch.manual_seed(0)
    x0 = mean + std * torch.randn(40_000, 1, dtype=torch.float64)
    found = sampled_from(x0, sigma)
    wanted_mean, wanted_variance = restarted(mean, std**2, sigma)
    assert found.mean().item() == pytest.approx(wanted_mean, abs=0.02)
    assert found.var().item() == pytest.approx(wanted_variance, rel=0.04)


@pytest.mark.parametrize(("mean", "std"), [(2.0, 0.8), (0.5, 0.2), (1.5, 1.6), (-1.0, 0.4)])
def test_the_drift_falls_with_the_level_and_never_rises(mean, std):
    before, levels = kl(mean, std**2), (0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
    after = [kl(*restarted(mean, std**2, sigma)) for sigma in levels]
    for sigma, back in zip(levels, after, strict=True):  # of either channel: noised it is between the two
        assert back <= kl(mean, std**2 + sigma**2, math.hypot(STD, sigma)) <= before
    assert all(a > b for a, b in zip([before, *after], after, strict=False))
    assert after[-1] < 1e-3 * before
    # The reward x gains less, too: nothing is for free.
    gains = [restarted(mean, std**2, sigma)[0] - MEAN for sigma in (0.1, 1.0, 10.0)]
    assert abs(gains[0]) > abs(gains[1]) > abs(gains[2]) or mean == MEAN


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_what_is_on_the_front_stays_on_it(sigma):
    """The tilt exp(lambda x) of a Gaussian is the least KL for its gain, and so is what a restart makes of it."""
    mean, variance = restarted(MEAN + 1.5, STD**2, sigma)
    assert variance == pytest.approx(STD**2)
    assert kl(mean, variance) == pytest.approx((mean - MEAN) ** 2 / (2 * STD**2))
    # Off it (a variance that pays for nothing), the same gain is cheaper after a restart than before one.
    wasted = kl(MEAN + 1.5, (STD / 4) ** 2) - kl(MEAN + 1.5, STD**2)
    mean, variance = restarted(MEAN + 1.5, (STD / 4) ** 2, sigma)
    assert kl(mean, variance) - kl(mean, STD**2) < wasted


def test_where_the_model_is_sure_a_departure_goes_first():
    """Layout varies much and texture little: noised alike, the texture comes back and the layout stays."""
    wide, narrow = restarted(2.0, 1.0, 0.5, std=1.0)[0] - MEAN, restarted(2.0, 0.01, 0.5, std=0.1)[0] - MEAN
    assert wide == pytest.approx(1.5 * 0.8) and narrow == pytest.approx(1.5 / 26)


def test_a_mixture_drifts_less_after_a_restart_too():
    """Numerically: a tilted and a narrowed mixture, on a grid, through the exact kernel."""
    x = torch.linspace(-8, 8, 1201, dtype=torch.float64)
    step = (x[1] - x[0]).item()

    def normal(mean: float, std: float) -> torch.Tensor:
        return (-((x - mean) ** 2) / (2 * std**2)).exp() / (std * math.sqrt(2 * math.pi))

    def of(q: torch.Tensor, p: torch.Tensor) -> float:
        return ((q / p.clamp(min=1e-300)).clamp(min=1e-300).log() * q).sum().item() * step

    p = (normal(-1.5, 0.5) + normal(1.5, 0.5)) / 2
    tilted = p * (1.2 * x).exp()
    for q in (tilted / (tilted.sum() * step), normal(2.6, 0.15)):
        drifts, before = [of(q, p)], of(q, p)
        for sigma in (0.2, 0.6, 1.5, 4.0):
            there = (-((x[:, None] - x[None]) ** 2) / (2 * sigma**2)).exp()  # x_t by x_0
            there = there / (there.sum(0, keepdim=True) * step)
            noisy = there @ q * step
            back = there * p[None]  # p(x_0 | x_t)
            back = back / (back.sum(1, keepdim=True) * step)
            drifts.append(of(noisy @ back * step, p))
            assert drifts[-1] < of(noisy, there @ p * step) < before
        assert drifts == sorted(drifts, reverse=True) and drifts[-1] < 0.2 * drifts[0]


def test_noised_is_the_forward_process_of_either_kind():
    x0, z = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(noised(x0, torch.tensor(2.0), z), x0 + 2 * z)
    flow = noised(x0, torch.tensor([0.25, 0.5]), z, signal=lambda s: 1 - s)
    torch.testing.assert_close(flow[0], 0.75 * x0[0] + 0.25 * z[0])
    torch.testing.assert_close(flow[1], 0.5 * x0[1] + 0.5 * z[1])


def test_the_tail_of_a_schedule():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    assert torch.equal(tail(sigmas, 1.0), sigmas)
    half = tail(sigmas, 0.5)
    torch.testing.assert_close(half, torch.tensor([2.0, 2.0**0.5, 1.0, 0.5, 0.0]))
    assert (tail(sigmas, 0.01).diff() < 0).all() and tail(sigmas, 0.01)[-1] == 0
    assert tail(torch.tensor([14.0, 0.0]), 0.5).tolist() == [7.0, 0.0]


# -- rounds

TARGET = 2.0


def score(x0):
    reward = -(x0 - TARGET).square().flatten(1).mean(1)
    return Score(reward, {"r": reward.detach()}, x0.detach())


def stretch(number: int, x0: torch.Tensor, sigma: float = 1.0, steps: int = 6) -> Stretch:
    """The Gaussian process from x0 on, noised to sigma."""
    schedule = gaussian.schedule(steps)
    schedule = schedule * sigma / schedule[0]
    chain = gaussian.Chain(gaussian.denoiser(), schedule)

    def sample(z, source, wrap):
        return chain.segment(noised(x0, schedule[0], z), 0, steps, source, wrap)

    return Stretch(Rollout(sample, schedule, memory="none"), gaussian.noises(steps, seed=number))


SETTINGS = Settings(iterations=7, restart_every=3, lr=0.1, keep="best_reward", drift_metric="path_kl")


def first() -> Stretch:
    return Stretch(gaussian.rollout(), gaussian.noises())


def test_rounds_are_one_run_with_one_record():
    seen = []
    result = in_rounds(first(), score, SETTINGS, stretch, on_iteration=lambda k, rows, s: seen.append((k, len(rows))))
    rows = result.trace.of(1)
    assert [k for k, _ in seen] == [r["iteration"] for r in rows] == list(range(7 + 3))
    assert [r["round"] for r in rows] == [1] * 4 + [2] * 4 + [3] * 2
    assert rows[0]["level"] > rows[4]["level"] == rows[9]["level"] == pytest.approx(1.0)
    assert len(result.iterates) == 10
    # A round's drift is of its own, from its restart on.
    assert [r["path_kl"] for r in rows if r["iteration"] in (0, 4, 8)] == [0, 0, 0]
    for image in range(2):
        _, kept = result.trace.summary(image)
        assert kept["reward"] == max(r["reward"] for r in result.trace.of(image))
        torch.testing.assert_close(result.best[image].float(), result.iterates[kept["iteration"]][image].float())
    assert result.reason == "all iterations done" and not result.cut_short


def test_one_round_is_the_optimisation_itself():
    settings = Settings(iterations=4, lr=0.1, keep="best_reward")
    start = first()
    whole = in_rounds(start, score, settings, stretch)
    alone = optimize(start.rollout, score, start.noises, settings)
    assert torch.equal(whole.best, alone.best) and whole.trace.kept == alone.trace.kept
    assert [r.keys() for r in whole.trace.rows] == [r.keys() for r in alone.trace.rows]
    assert all(torch.equal(a, b) for a, b in zip(whole.best_noises, alone.best_noises, strict=True))


def test_a_round_goes_on_from_what_the_last_one_kept():
    given = []

    def restart(number, x0):
        given.append(x0.clone())
        return stretch(number, x0)

    result = in_rounds(first(), score, SETTINGS, restart)
    kept = optimize(first().rollout, score, first().noises, Settings(iterations=3, lr=0.1, keep="best_reward")).best
    assert torch.equal(given[0], kept) and len(given) == 2
    last = in_rounds(first(), score, Settings(iterations=7, restart_every=3, lr=0.1, keep="last"), stretch)
    assert last.trace.kept == [9, 9] and torch.equal(last.best, last.last)
    assert result.trace.reasons == ["all iterations done"] * 2


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [4, 5, 9])
def test_a_cancel_in_a_later_round_hands_back_the_best_of_all(at):
    def cancel(k, rows, s):
        if k == at:
            raise Stopped

    result = in_rounds(first(), score, SETTINGS, stretch, on_iteration=cancel, interrupts=(Stopped,))
    assert result.cut_short and "interrupted" in result.reason
    best = max(r["reward"] for r in result.trace.of(0))
    assert result.trace.summary(0)[1]["reward"] == best


@pytest.mark.parametrize("problem", [Stopped(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_restart_that_fails_costs_nothing(problem):
    def restart(number, x0):
        if number == 2:
            raise problem
        return stretch(number, x0)

    result = in_rounds(first(), score, SETTINGS, restart, interrupts=(Stopped,))
    assert result.reason.endswith("before round 3") and result.cut_short
    assert {r["round"] for r in result.trace.rows} == {1, 2} and torch.isfinite(result.best).all()


def test_a_round_that_is_not_finite_is_no_beginning_of_the_next():
    begun = []

    def restart(number, x0):
        begun.append(x0.clone())
        return stretch(number, torch.full_like(x0, math.nan) if number == 1 else x0)

    result = in_rounds(first(), score, SETTINGS, restart)
    assert torch.equal(begun[0], begun[1]) and torch.isfinite(result.best).all()
    assert {r["round"] for r in result.trace.rows} == {1, 2, 3}
    assert all(math.isfinite(result.trace.summary(b)[1]["reward"]) for b in range(2))
    last = in_rounds(first(), score, Settings(iterations=4, restart_every=2, lr=0.1, keep="last"), restart)
    assert torch.isfinite(last.best).all()


def test_a_reward_that_is_full_in_a_later_round_ends_nothing():
    """Where the reward has no gradient left there is nothing to gain, which is no error once there is an image."""

    def full(x0):
        reward = (x0 - 0.5).clamp(max=0).flatten(1).mean(1)
        return Score(reward, {"r": reward.detach()}, x0.detach())

    def restart(number, x0):
        return stretch(number, torch.full_like(x0, 50.0), sigma=0.05)

    result = in_rounds(first(), full, Settings(iterations=2, restart_every=1, lr=0.1, keep="best_reward"), restart)
    assert result.trace.summary(0)[1]["reward"] == 0 and not result.cut_short


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"restart_every": -1}, "restart_every is -1"),
        ({"restart_denoise": 0.0}, "restart_denoise is 0.0"),
        ({"restart_denoise": 1.5}, "restart_denoise is 1.5"),
        ({"restart_denoise": math.nan}, "restart_denoise is nan"),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(ValueError, match=words):
        Settings(**wrong)


# -- the search

SEARCH = SearchSettings("restarts", particles=3, rounds=5)


def candidate(number: int, p: int, x0):
    if number == 0:
        start = Stretch(gaussian.rollout(), gaussian.noises(seed=p))
    else:
        start = stretch(100 * number + p, x0)
    return start.rollout(start.noises).x0, start.noises


def test_the_search_climbs_and_never_falls():
    seen = []
    result = search_by_restarts(candidate, score, SEARCH, steps=6, on_iteration=lambda k, rows, s: seen.append(k))
    assert seen == list(range(SEARCH.rows(6) + 1))
    for image in range(2):
        rewards = [r["reward"] for r in result.trace.of(image)]
        assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.5
        assert result.trace.summary(image)[1]["reward"] == rewards[-1]
        assert score(result.best).total[image].item() == pytest.approx(rewards[-1])
    assert result.trace.rows[-1]["evaluations"] == 6 * 3 * 6 == result.trace.settings["evaluations"]


@pytest.mark.parametrize("at", [0, 1, 2, 7])
def test_a_search_that_is_cancelled_keeps_the_best_and_its_row(at):
    calls = []

    def sample(number, p, x0):
        calls.append(1)
        if len(calls) > at:
            raise Stopped
        return candidate(number, p, x0)

    if at == 0:
        with pytest.raises(Stopped):
            search_by_restarts(sample, score, SEARCH, steps=6, interrupts=(Stopped,))
        return
    result = search_by_restarts(sample, score, SEARCH, steps=6, interrupts=(Stopped,))
    assert result.cut_short and result.reason.startswith("interrupted")
    for image in range(2):
        best = result.trace.summary(image)[1]["reward"]
        assert score(result.best).total[image].item() == pytest.approx(best)
