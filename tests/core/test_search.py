"""Search and steering on data whose tilted distribution is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import gaussian
import pytest
import torch
from mira.sampler.hybrid import hybrid
from mira.sampler.optimize import Score
from mira.sampler.particles import Population
from mira.sampler.resampling import effective, multinomial, ssp
from mira.sampler.rollout import Rollout, noised
from mira.sampler.search import METHODS, SearchSettings, search
from mira.sampler.seeds import stream
from mira.sampler.steering import restart, shift
from mira.sampler.whitening import whiten

STEPS = 24
# The hybrid and restarts have tests of their own.
OWN = [name for name, method in METHODS.items() if not (method.optimizes or method.restarts)]
STEERING = [name for name, method in METHODS.items() if method.steers]


def problem(D=None, batch=1, steps=STEPS, seed=0, shape=(1, 1, 1)):
    """(chain, rollout, noises of the plain sample), in one dimension if nothing else is said."""
    levels = torch.linspace(math.log(20.0), math.log(0.02), steps, dtype=torch.float64).exp()
    schedule = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    D = D or gaussian.denoiser()
    g = torch.Generator().manual_seed(seed)
    z = [torch.randn(batch, *shape, dtype=torch.float64, generator=g) for _ in range(steps)]
    return gaussian.Chain(D, schedule), Rollout(gaussian.ancestral(D, schedule), schedule, memory="none"), z


def value(reward):
    """A `score` of one-dimensional latents."""

    def score(x0):
        total = reward(x0).flatten(1).sum(1)
        return Score(total, {"value": total.detach()}, x0.detach().expand(-1, 3, -1, -1))

    return score


def linear(x):
    return x


def moments(result):
    """Mean and standard deviation of the weighted last population, over all images."""
    w = result.log_weights.softmax(0).double() / result.log_weights.shape[1]
    x = result.particles[..., 0, 0, 0].double()
    mean = (w * x).sum()
    return mean.item(), ((w * (x - mean) ** 2).sum() ** 0.5).item()


def base_moments(D, steps=STEPS):
    """Of the sampler's own output, which differs from the data by its discretisation."""
    chain, _, _ = problem(D, steps=steps)
    x = chain.start(torch.randn(20000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))
    g = torch.Generator().manual_seed(8)
    x = chain.segment(
        x, 0, steps, lambda make: torch.randn(20000, 1, 1, 1, dtype=torch.float64, generator=g), lambda d: d
    )
    return x.flatten()


@pytest.mark.parametrize("method", ["fk_steering", "das"])
@pytest.mark.parametrize("potential", ["max", "difference"])
def test_steering_converges_to_the_tilted_gaussian(method, potential):
    # exp(s x) N(0, 1) is N(s, 1).
    if method == "das" and potential == "difference":
        pytest.skip("DAS has no potential")
    strength = 0.8
    chain, rollout, z = problem()
    settings = SearchSettings(method, particles=4000, strength=strength, interval=8, potential=potential)
    mean, std = moments(search(chain, rollout, value(linear), z, settings, most=4000))
    base = base_moments(None)
    expected = base.mean() + strength * base.var()
    assert mean == pytest.approx(expected.item(), abs=0.08)
    assert std == pytest.approx(base.std().item(), abs=0.08)


@pytest.mark.parametrize("method", ["fk_steering", "das"])
def test_steering_converges_to_the_tilted_mixture(method):
    # exp(s x) multiplies the modes at -+1.5 by exp(s (-+1.5) + s^2 std^2 / 2).
    strength = 0.4
    D = gaussian.mixture_denoiser()
    chain, rollout, z = problem(D)
    settings = SearchSettings(method, particles=4000, strength=strength, interval=3)
    result = search(chain, rollout, value(linear), z, settings, most=4000)
    base = base_moments(D)
    tilt = (strength * base).exp()
    share = ((base > 0) * tilt).sum() / tilt.sum()  # the exact share is 1 / (1 + exp(-3 s)) = .77
    w = result.log_weights.softmax(0).double()
    found = (w * (result.particles[..., 0, 0, 0] > 0)).sum()
    assert found.item() == pytest.approx(share.item(), abs=0.04)
    assert share.item() == pytest.approx(1 / (1 + math.exp(-3 * strength)), abs=0.04)


def test_das_reaches_where_choosing_among_particles_cannot():
    # In 256 dimensions exp(s sum x) moves every mean by s var; that is 13 standard deviations of the sum.
    strength = 0.8
    chain, rollout, z = problem(batch=8, shape=(1, 16, 16))
    means = {}
    for method in ("fk_steering", "das"):
        settings = SearchSettings(method, particles=8, strength=strength, interval=2, tempering=1.0)
        found = search(chain, rollout, value(linear), z, settings, most=8)
        means[method] = found.best.mean().item()
    expected = (base_moments(None).mean() + strength * base_moments(None).var()).item()
    assert means["das"] == pytest.approx(expected, rel=0.15)
    assert means["fk_steering"] < expected / 2


@pytest.mark.parametrize("n", [2, 8])
def test_best_of_n_has_the_kl_of_the_books(n):
    # KL = E[log(n F(r)^(n - 1))] over the best; F is the base's distribution function.
    chain, rollout, z = problem(batch=4000)
    result = search(chain, rollout, value(linear), z, SearchSettings("best_of_n", particles=n), most=n)
    base = base_moments(None)
    F = torch.distributions.Normal(base.mean(), base.std()).cdf(result.best.flatten())
    kl = (math.log(n) + (n - 1) * F.log()).mean().item()
    assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=0.05)


def test_best_of_one_is_the_plain_sample():
    chain, rollout, z = problem(batch=3)
    result = search(chain, rollout, value(linear), z, SearchSettings("best_of_n", particles=1))
    assert torch.equal(result.best, rollout(z).x0)
    assert result.trace.kept == [0, 0, 0]


@pytest.mark.parametrize("interval", [1, 3, 8])
def test_code_follows_the_best_continuation(interval):
    chain, rollout, z = problem(batch=200)
    plain = rollout(z).x0
    result = search(chain, rollout, value(linear), z, SearchSettings("code", particles=8, interval=interval), most=8)
    assert (result.best - plain).mean() > 0.8
    assert [r["iteration"] for r in result.trace.of(0)] == [*range(STEPS // interval + 1)]


def test_zero_order_climbs_and_never_falls():
    chain, rollout, z = problem(batch=50)
    result = search(
        chain, rollout, value(linear), z, SearchSettings("zero_order", particles=4, rounds=6, radius=0.5), most=4
    )
    plain = rollout(z).x0.flatten()
    assert (result.best.flatten() >= plain).all() and (result.best.flatten() - plain).mean() > 1
    # What came back is what its noises give.
    torch.testing.assert_close(rollout(result.best_noises).x0, result.best)


@pytest.mark.parametrize("method", OWN)
def test_how_many_run_at_once_changes_nothing(method):
    chain, rollout, z = problem(batch=2)
    settings = SearchSettings(method, particles=5, rounds=2, strength=2.0)
    one, all_ = (search(chain, rollout, value(linear), z, settings, seed=3, most=m) for m in (1, 5))
    torch.testing.assert_close(one.best, all_.best)
    assert [r["reward"] for r in one.trace.rows] == pytest.approx([r["reward"] for r in all_.trace.rows])
    again = search(chain, rollout, value(linear), z, settings, seed=3, most=5)
    assert torch.equal(again.best, all_.best)
    other = search(chain, rollout, value(linear), z, settings, seed=4, most=5)
    assert not torch.equal(other.best, all_.best)


@pytest.mark.parametrize("method", OWN)
def test_the_record_holds_the_result_and_its_cost(method):
    chain, rollout, z = problem(batch=2)
    calls = []

    class Counting(gaussian.Chain):
        def denoise(self, x, sigma):
            calls.append(len(x))
            return super().denoise(x, sigma)

        def segment(self, x, i, j, source, wrap):
            def counted(D):
                def call(x, sigma):
                    calls.append(len(x))
                    return D(x, sigma)

                return call

            chain = gaussian.Chain(counted(self.D), self.schedule)
            return chain.segment(x, i, j, source, wrap)

    counting = Counting(chain.D, chain.schedule)
    result = search(counting, rollout, value(linear), z, SearchSettings(method, particles=3, rounds=2), most=2)
    first, kept = result.trace.summary(1)
    assert first["path_kl"] == first["latent_distance"] == 0
    assert kept["reward"] == pytest.approx(result.best.flatten()[1].item(), rel=1e-5)
    assert kept["evaluations"] <= result.trace.settings["evaluations"] == sum(calls) / 2
    assert (result.trace.settings["backwards"] > 0) == METHODS[method].gradient
    if method in STEERING and METHODS[method].copies:  # the last row is of whole paths
        assert result.trace.kept == [result.trace.rows[-1]["iteration"]] * 2
        assert math.isnan(result.trace.of(0)[1]["path_kl"]) and result.trace.of(0)[-1]["path_kl"] > 0
    assert len(result.iterates) == len(result.trace.of(0))


OTHERWISE = {
    "rounds": 2, "interval": 3, "strength": 1.0, "potential": "difference", "ess": 0.0, "radius": 0.9,
    "tempering": 0.2, "iterations": 2, "lr": 0.3, "regularizer": "path_kl", "beta": 2.0, "restart_denoise": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("method", [name for name in METHODS if name != "restarts"])
def test_a_method_reads_what_it_is_said_to_read_and_nothing_else(method):
    chain, rollout, z = problem(batch=2, steps=8)
    usual = SearchSettings(method, particles=6, rounds=3, iterations=3, lr=0.1)

    def outcome(settings):
        if METHODS[method].optimizes:
            result = hybrid(rollout, value(linear), z, settings, seed=3)
        else:
            result = search(chain, rollout, value(linear), z, settings, seed=3, most=6)
        return [r["reward"] for r in result.trace.rows], result.best.flatten().tolist()

    usually, reads = outcome(usual), METHODS[method].reads
    unread = {name: v for name, v in OTHERWISE.items() if name not in reads}
    assert outcome(replace(usual, **unread)) == usually
    for name in reads:
        assert outcome(replace(usual, **{name: OTHERWISE[name]})) != usually, name


def test_ssp_copies_each_particle_by_floor_or_ceiling_and_without_bias():
    g = torch.Generator().manual_seed(0)
    log_weights = torch.tensor([[0.4], [0.05], [0.3], [0.25]]).log()
    counts = torch.stack([torch.bincount(ssp(log_weights, g)[:, 0], minlength=4) for _ in range(4000)]).double()
    expected = torch.tensor([1.6, 0.2, 1.2, 1.0], dtype=torch.double)
    assert (counts.sum(1) == 4).all()
    assert ((counts - expected).abs() < 1).all()
    torch.testing.assert_close(counts.mean(0), expected, atol=0.03, rtol=0)


def test_ssp_of_equal_weights_copies_each_once():
    g = torch.Generator().manual_seed(0)
    assert ssp(torch.zeros(6, 3), g).T.tolist() == [list(range(6))] * 3


def test_resampling_of_one_winner():
    log_weights = torch.tensor([[0.0, -1e9], [-1e9, 0.0], [-1e9, -1e9]])
    g = torch.Generator().manual_seed(0)
    for resample in (multinomial, ssp):
        assert resample(log_weights, g).T.tolist() == [[0, 0, 0], [1, 1, 1]]
    torch.testing.assert_close(effective(log_weights), torch.ones(2))
    torch.testing.assert_close(effective(torch.zeros(5, 2)), torch.full((2,), 5.0))


class Stop(BaseException):
    pass


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("problem_kind", ["interrupt", "memory"])
def test_what_was_found_before_it_was_stopped_comes_back(method, problem_kind):
    chain, rollout, z = problem(batch=2)
    looks = []

    def score(x0):
        looks.append(1)
        if len(looks) > 3:
            raise Stop if problem_kind == "interrupt" else torch.cuda.OutOfMemoryError("CUDA out of memory")
        return value(linear)(x0)

    settings = SearchSettings(method, particles=6, rounds=5, interval=2)
    result = search(chain, rollout, score, z, settings, most=1, interrupts=(Stop,))
    assert ("interrupted" if problem_kind == "interrupt" else "out of memory") in result.reason
    assert result.cut_short
    assert torch.isfinite(result.best).all()
    assert result.best.flatten().tolist() == pytest.approx(
        [max(r["reward"] for r in result.trace.of(b)) for b in range(2)], rel=1e-5
    )


def test_running_out_of_memory_halves_what_runs_at_once():
    chain, rollout, z = problem(batch=1)

    class Tight(gaussian.Chain):
        def segment(self, x, i, j, source, wrap):
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().segment(x, i, j, source, wrap)

    settings = SearchSettings("fk_steering", particles=6, interval=3, strength=1.0)
    tight = search(Tight(chain.D, chain.schedule), rollout, value(linear), z, settings, most=6)
    roomy = search(chain, rollout, value(linear), z, settings, most=6)
    torch.testing.assert_close(tight.best, roomy.best)
    assert "went on with 3" in tight.trace.notices[0] and "went on with 1" in tight.trace.notices[1]


@pytest.mark.parametrize("method", [m for m in STEERING if METHODS[m].copies])
def test_steering_needs_noise_to_steer(method):
    chain, rollout, z = problem()
    with pytest.raises(ValueError, match="injects none"):
        search(chain, rollout, value(linear), z[:1], SearchSettings(method))


@pytest.mark.parametrize("method", OWN)
def test_a_particle_whose_reward_is_not_a_number_dies(method):
    chain, rollout, z = problem(batch=1)

    for wrong in (torch.nan, torch.inf):
        settings = SearchSettings(method, particles=6, rounds=3, interval=2, strength=1.0)
        reward = lambda x, wrong=wrong: torch.where(x > 0.3, wrong * x, x)  # noqa: E731
        result = search(chain, rollout, value(reward), z, settings, most=6)
        assert torch.isfinite(result.best).all()
        # What comes back is alive, if anything is.
        rewards = [r["reward"] for r in result.trace.of(0)]
        assert all(math.isnan(r) or r > -1e6 for r in rewards)  # no number stands for none in the record
        alive = [r for r in rewards if not math.isnan(r)]
        assert not alive or math.isfinite(result.trace.summary()[1]["reward"])


@pytest.mark.parametrize(
    "change",
    [{"method": "x"}, {"potential": "x"}, {"particles": 0}, {"rounds": 0}, {"interval": -1}, {"strength": -1},
     {"strength": math.nan}, {"radius": 0}, {"radius": 1.1}],
)  # fmt: skip
def test_settings_say_what_is_wrong(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        replace(SearchSettings(), **change)


def test_papers_looks():
    assert SearchSettings("fk_steering").looks(100) == [20, 40, 60, 80, 100]
    assert SearchSettings("code").looks(100) == list(range(5, 101, 5))
    assert SearchSettings("das", interval=2).looks(3) == SearchSettings("ntrk").looks(3) == [1, 2, 3]  # das reads none
    assert SearchSettings("ntrk", interval=2).looks(5) == [2, 4, 5]
    assert SearchSettings("fk_steering", interval=3).looks(8) == [3, 6, 8]
    assert SearchSettings("code").looks(1) == [1]


# -- noise-tilted reverse kernels


def along(w):
    """The reward <w, x> of images of w's shape, and its whitened gradient: on a Gaussian the same at every x."""
    return value(lambda x: (x * w).flatten(1).sum(1, keepdim=True)), whiten(w[None])[0]


def test_ntrk_moves_a_gaussian_by_its_share_along_the_whitened_gradient():
    """The sampler is linear in its noises there, so the image is what they are: of mean share * u where they are
    injected, of mean 0 in the initial one, and of variance 1 throughout.
    """
    share, shape = 0.4, (1, 32, 32)
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).cumsum(1)  # far from white
    score, u = along(w)
    chain, rollout, z = problem(batch=24, shape=shape)
    result = search(chain, rollout, score, z, SearchSettings("ntrk", particles=1, rounds=1, radius=share))
    projected = torch.stack(
        [(n * u).flatten(1).mean(1) for n in result.best_noises]
    )  # of 24 images, deviation 1 / 32 each
    assert projected[0].mean().item() == pytest.approx(0, abs=0.02)
    assert projected[1:].mean(1).tolist() == pytest.approx([share] * (len(projected) - 1), abs=0.03)
    assert torch.stack(result.best_noises[1:]).var().item() == pytest.approx(1, abs=0.02)
    unit = [torch.zeros(1, *shape, dtype=torch.float64) for _ in z]
    moved = rollout([unit[0], *(u[None] * share for _ in z[1:])]).x0 - rollout(unit).x0
    expected = (moved * w).sum() / w.norm()
    found = ((result.particles[0] * w).flatten(1).sum(1) / w.norm()).mean()
    assert found.item() == pytest.approx(expected.item(), abs=0.6)  # 24 images of deviation 1
    assert expected > 3
    assert torch.equal(rollout(result.best_noises).x0, result.best)


@pytest.mark.parametrize("interval", [0, 3])
def test_ntrk_in_rounds_tilts_the_way_back_of_a_restart(interval):
    """Means go through the linear sampler as noises do: those of the image that is noised again, and of the tilt, which
    is the same at every x, and so at every step.
    """
    shape = (1, 16, 16)
    settings = SearchSettings("ntrk", particles=1, rounds=2, radius=0.5, restart_denoise=0.5, interval=interval)
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    score, u = along(w)
    chain, rollout, z = problem(batch=64, shape=shape)
    result = search(chain, rollout, score, z, settings)
    first = settings.restart_step(STEPS)
    assert first == STEPS // 2
    tilted = [torch.zeros(1, *shape, dtype=torch.float64), *(u[None] * settings.radius for _ in z[1:])]
    mean = rollout(tilted).x0
    noisy = noised(mean, rollout.schedule[first], torch.zeros_like(mean))
    mean = chain.segment(noisy, first, STEPS, lambda draw: u[None] * settings.radius, lambda d: d)
    found = (result.particles[0] * w).flatten(1).sum(1) / w.norm()
    assert found.mean().item() == pytest.approx(((mean * w).sum() / w.norm()).item(), abs=0.4)  # of 64, deviation 1
    rows = result.trace.of(0)
    whole, half = (math.ceil(n / max(1, interval)) for n in (STEPS, STEPS // 2))
    assert len(rows) == 1 + settings.rows(STEPS) == 1 + whole + half
    ends = [r["iteration"] for r in rows if math.isfinite(r["noise_norm"])]
    assert ends == [0, whole, whole + half]
    # The last step injects no noise, and has no gradient.
    assert result.trace.settings["backwards"] == (whole + half - 2 if interval < 2 else whole + half)
    assert [math.isfinite(rows[k]["path_kl"]) for k in ends] == [True, True, False]  # of two stretches, no likelihood
    assert all(n.shape == z[0].shape for n in result.best_noises) and len(result.best_noises) == len(z)
    assert torch.equal(result.best, result.particles[0]) and result.trace.kept == [ends[-1]] * 64


def test_ntrk_hands_back_the_plain_sample_where_that_is_better():
    chain, rollout, z = problem(batch=16, shape=(1, 4, 4))
    score, _ = along(torch.ones(1, 4, 4, dtype=torch.float64))
    settings = SearchSettings("ntrk", particles=1, rounds=2, radius=0.05)  # hardly any tilt: half of them end lower
    result = search(chain, rollout, score, z, settings)
    last, lower = result.trace.rows[-1]["iteration"], 0
    for b, kept in enumerate(result.trace.kept):
        rewards = {r["iteration"]: r["reward"] for r in result.trace.of(b)}
        assert (kept == last) == (rewards[last] > rewards[0])
        lower += kept == last and rewards[last] < rewards[STEPS]
    assert len(set(result.trace.kept)) > 1 and lower  # than the first round, but better than nothing


def test_ntrk_without_a_gradient_is_the_sampler():
    chain, rollout, z = problem(batch=3, shape=(1, 4, 4))
    flat = search(chain, rollout, value(lambda x: 0 * x), z, SearchSettings("ntrk", particles=2, rounds=1, radius=0.9))
    g = [stream(0, p) for p in range(2)]
    drawn = [torch.stack([torch.randn(3, 1, 4, 4, generator=one) for one in g]) for _ in z]
    drawn[0][0] = z[0]
    noises = [d[0].double() for d in drawn[: len(z)]]
    torch.testing.assert_close(flat.particles[0], rollout(noises).x0)


def test_ntrk_keeps_the_best_of_its_particles_and_of_the_plain_sample():
    chain, rollout, z = problem(batch=2, shape=(1, 8, 8))
    score, _ = along(torch.randn(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    one, four = (
        search(chain, rollout, score, z, SearchSettings("ntrk", particles=n, rounds=1), most=2) for n in (1, 4)
    )
    ends = [(r.trace.of(b)[-1]["reward"], r.trace.of(b)[0]["reward"]) for r in (one, four) for b in range(2)]
    assert all(end > plain for end, plain in ends)
    assert all(ends[2 + b][0] >= ends[b][0] for b in range(2))
    evaluations = 2 * STEPS  # of one particle: the plain sample's and its own, each prediction made once
    assert one.trace.settings["evaluations"] == evaluations and one.trace.settings["backwards"] == STEPS - 1


# -- successive halving


def test_halving_gives_up_the_worse_half_until_one_is_left():
    """On a Gaussian the prediction orders the particles as their ends are ordered, but for the noise that is to come:
    the survivor of n is nearly the best of n, for less of the work.
    """
    batch, steps, n = 150, 16, 8
    chain, rollout, noises = problem(batch=batch, steps=steps)
    settings = SearchSettings(method="halving", particles=n)
    result = search(chain, rollout, value(linear), noises, settings, most=4)
    assert settings.looks(steps) == [4, 8, 12, 16] and settings.rows(steps) == 4
    assert result.particles.shape[0] == 1 and (result.log_weights == 0).all()
    # 8 particles for four steps, 4 for four more, and so on; a prediction for each that is given up (another is the
    # next step of its particle); and the plain sample.
    assert result.trace.settings["evaluations"] == steps + (8 + 4 + 2 + 1) * 4 + 4 + 2 + 1
    best = search(chain, rollout, value(linear), noises, SearchSettings(particles=n), most=n)
    kept, plain, whole = (r.double().mean().item() for r in (result.best, noises_end(chain, noises), best.best))
    assert abs(plain) < 0.25 and whole > 1.0 and kept > plain + 0.7 * (whole - plain)
    assert result.trace.settings["evaluations"] < 0.75 * best.trace.settings["evaluations"]


def noises_end(chain, noises):
    rest = iter(noises[1:])
    return chain.segment(chain.start(noises[0]), 0, len(chain.schedule) - 1, lambda draw: next(rest), lambda d: d)


def test_halving_needs_no_noise_between_the_steps():
    schedule = problem(steps=4)[0].schedule
    chain = gaussian.Chain(gaussian.denoiser(), schedule, injects=False)
    z = [torch.randn(2, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]

    def sample(z, source, wrap):
        return chain.segment(chain.start(z), 0, 4, source, wrap)

    rollout = Rollout(sample, schedule, memory="none")
    result = search(chain, rollout, value(linear), z, SearchSettings(method="halving", particles=5))
    assert result.particles.shape[0] == 1
    with pytest.raises(ValueError, match="injects none"):
        search(chain, rollout, value(linear), z, SearchSettings(method="fk_steering", particles=5))


def test_halving_ends_with_what_is_left_where_steps_are_few():
    chain, rollout, noises = problem(steps=2, batch=3)
    result = search(chain, rollout, value(linear), noises, SearchSettings(method="halving", particles=9))
    assert result.particles.shape[0] == 5 and SearchSettings(method="halving", particles=1).looks(2) == [2]
    # The plain sample, which is known, competes.
    ends = torch.cat([result.particles, noises_end(chain, noises)[None]])[..., 0, 0, 0]
    torch.testing.assert_close(result.best[:, 0, 0, 0], ends.max(0).values)


@pytest.mark.parametrize("flow", [False, True])
def test_das_moves_the_noise_as_the_papers_proposal_moves_the_mean(flow):
    """DDIM's transition (eta = 1) in variance-preserving coordinates, its mean moved by sigma^2 grad r."""
    levels = [0.3, 0.7, 0.9] if flow else [0.1, 2.0, 14.0]
    signal = (lambda sigma: 1 - sigma) if flow else torch.ones_like
    for after, sigma in itertools.pairwise(map(torch.tensor, [*levels, 1.0] if flow else levels)):
        length = (signal(sigma) ** 2 + sigma**2).sqrt()  # x / length is variance-preserving
        abar, abar_after = ((signal(s) ** 2 / (signal(s) ** 2 + s**2)) for s in (sigma, after))
        up = ((1 - abar_after) / (1 - abar) * (1 - abar / abar_after)).sqrt()
        # r = x / length, of gradient 1 there and 1 / length here; the transition's noise has the factor `up`.
        torch.testing.assert_close(shift(sigma, after, signal) / length, up**2 / up)
    assert shift(sigma, torch.tensor(0.0), signal) == 0


def test_a_restart_noises_as_much_as_the_model_expects():
    """Some models' noise is not of unit variance: what they have at a level is `noise_scale` times as much."""
    chain, rollout, z = problem(shape=(1, 64, 64))
    state = SimpleNamespace(
        rollout=rollout, noises=z, fresh=lambda some, like: torch.randn(len(some), *like.shape).to(like)
    )
    sigma = chain.schedule[5].item()
    for scale in (1.0, 8.0):
        rollout.noise_scale = scale
        x = restart(state, Population(*[torch.ones(2, *z[0].shape, dtype=torch.float64)] * 2), 5).x
        assert (x - 1).std().item() == pytest.approx(scale * sigma, rel=0.03) and x.mean() == pytest.approx(
            1, abs=0.1 * scale * sigma
        )


@pytest.mark.parametrize("method", ["das", "ntrk"])
def test_a_gradient_that_overflows_is_taken_at_a_smaller_scale(method):
    settings = SearchSettings(method, particles=2, strength=1.0, rounds=1, radius=0.5)
    chain, rollout, z = problem(batch=2)

    def run(reward, **more):
        return search(chain, rollout, value(reward), z, replace(settings, **more), seed=1)

    wanted = run(linear)
    found = run(gaussian.narrow(linear), loss_scale=1024.0)
    torch.testing.assert_close(found.particles, wanted.particles)
    assert not any("not finite" in notice for notice in found.trace.notices)
    assert found.trace.settings["backwards"] == wanted.trace.settings["backwards"] + 1  # at 1024, once

    def broken(x):  # for the second image there is no room at any scale
        return gaussian.narrow(linear)(x) * torch.tensor([1.0, 1e4]).repeat(len(x) // 2).view(-1, 1, 1, 1)

    lame = run(broken, loss_scale=1024.0)
    torch.testing.assert_close(lame.particles[:, 0], wanted.particles[:, 0])
    assert lame.particles.isfinite().all() and any("not finite" in notice for notice in lame.trace.notices)
