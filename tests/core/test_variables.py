"""What is optimised, on which surface, and how drift is held: closed forms on a linear model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gaussian import noises, rollout
from mira.sampler.candidates import Run
from mira.sampler.guidance import anneal, blend, lean, within
from mira.sampler.methods import METHODS
from mira.sampler.optimize import OPTIMIZERS, Score, Settings, optimize
from mira.sampler.preference import PreferenceSettings, by_score
from mira.sampler.rollout import Rollout
from mira.sampler.surrogates import chi
from mira.sampler.variables import VARIABLES, Variables


def mean_reward(x0):
    r = x0.flatten(1).mean(1)
    return Score(r, {"mean": r.detach()}, x0.detach())


def run(**settings):
    return optimize(rollout(), mean_reward, noises(), Settings(**{"keep": "last", "lr": 0.05} | settings))


def moved(result) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(result.best_noises, noises(), strict=True)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trajectory", [1, 1, 1, 1, 1, 1]),
        ("initial", [1, 0, 0, 0, 0, 0]),
        ("injected", [0, 1, 1, 1, 1, 1]),
        ("early", [1, 1, 1, 0, 0, 0]),
        ("late", [0, 0, 0, 1, 1, 1]),
        ("initno", [1, 0, 0, 0, 0, 0]),
    ],
)
def test_only_what_is_free_moves(name, expected):
    result = run(iterations=4, variables=name)
    assert moved(result) == [bool(e) for e in expected]
    for row in result.trace.of(0)[1:]:
        assert row["reward"] > result.trace.of(0)[0]["reward"]


def inpainting(steps=6):
    """Half of an image is to be painted. What is given, 0.5, is noised with z_T, and the network sees both."""
    mask = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    mask[..., 0, :] = 1
    whole = rollout(steps)

    def sample(z_T, source, wrap):
        def beside(D):
            def seen(x, sigma):
                x = torch.where(mask > 0, x, 0.5 + sigma.view(-1, 1, 1, 1) * z_T)
                denoised = D(x, sigma)  # of a pixel, from all
                return torch.where(mask > 0, denoised + denoised.mean((1, 2, 3), keepdim=True), 0.5)

            return seen

        return whole.sample(z_T, source, lambda D: wrap(beside(D)))

    return Rollout(sample, whole.schedule, memory="none", mask=mask), mask


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variables", ["trajectory", "initno"])
def test_around_a_mask_no_noise_is_optimised(optimizer, variables):
    """There no surrogate counts it, though the network sees it."""
    if (optimizer, variables) == ("sphere", "initno"):
        pytest.skip("refused")
    painted, mask = inpainting()
    settings = Settings(iterations=1, lr=0.05, optimizer=optimizer, variables=variables, keep="last", clip_norm=0)
    result = optimize(painted, mean_reward, noises(), settings)
    outside = mask.expand(2, 3, 2, 2) == 0
    steps = [z - z0 for z, z0 in zip(result.best_noises, noises(), strict=True)]
    assert all((s[outside] == 0).all() for s in steps) and (steps[0][~outside] != 0).all()
    if optimizer == "sphere":
        for z, z0 in zip(result.best_noises, noises(), strict=True):
            inside = [(n * mask).flatten(1).norm(dim=1) for n in (z, z0)]
            torch.testing.assert_close(*inside)
    if optimizer == "normalized" and variables == "trajectory":  # lr 0.1 x (1 - dampening), over what is free
        size = torch.stack([(s * mask).square().sum((1, 2, 3)) for s in steps]).sum(0) / (6 * 6)
        torch.testing.assert_close(size.sqrt(), torch.full((2,), 0.05, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["dpo", "hybrid2"])
def test_nor_is_it_by_preferences(name):
    painted, mask = inpainting()
    settings = PreferenceSettings(method=name, lr=0.05)
    trajectories = [noises(seed=s) for s in (0, 1)][: METHODS[name].trajectories(2)]
    method = METHODS[name](Run(painted, lambda x0: x0, settings, torch.Generator()), trajectories)
    for _ in range(2):
        found = method.candidates()
        method.learn(found, by_score(torch.stack([c.images.flatten(1).mean(1) for c in found], 1)))
    outside = mask.expand(2, 3, 2, 2) == 0
    optimised = [method.variables] if name == "hybrid2" else method.variables
    for variables, start in zip(optimised, trajectories, strict=True):
        steps = [z.detach() - z0 for z, z0 in zip(variables.noises(), start, strict=True)]
        assert all((s[outside] == 0).all() for s in steps) and (steps[0][~outside] != 0).all()


def test_initno_optimises_a_mean_and_a_deviation_and_pays_their_kl():
    z = noises()
    variables = Variables("initno", z)
    assert torch.equal(variables.noises()[0], z[0]) and variables.penalty().tolist() == [0, 0]
    mu, sigma = variables.leaves
    with torch.no_grad():
        mu.fill_(0.5), sigma.fill_(2.0)
    torch.testing.assert_close(variables.noises()[0], 0.5 + 2 * z[0])
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(0.5, 2.0), torch.distributions.Normal(0, 1))
    assert variables.penalty().tolist() == pytest.approx([expected.item()] * 2)
    free, held = (run(iterations=30, variables="initno", beta=b) for b in (0.0, 5.0))
    assert held.trace.rows[-1]["reward"] < free.trace.rows[-1]["reward"]
    assert 0 < held.trace.rows[-1]["initno"] < min(0.05, free.trace.rows[-1]["initno"])


def test_a_deterministic_sampler_has_no_injected_noise():
    with pytest.raises(ValueError, match="injects no noise"):
        Variables("injected", noises()[:1])
    assert set(VARIABLES) == {"trajectory", "initial", "injected", "early", "late", "initno"}


def test_steps_on_the_sphere_keep_every_norm():
    result = run(iterations=10, optimizer="sphere")
    for z, z0 in zip(result.best_noises, noises(), strict=True):
        torch.testing.assert_close(z.flatten(1).norm(dim=1), z0.flatten(1).norm(dim=1))
    assert result.trace.rows[-1]["reward"] > result.trace.rows[1]["reward"]
    assert result.trace.rows[-1]["noise_norm"] == pytest.approx(result.trace.rows[1]["noise_norm"])
    assert run(iterations=10, optimizer="adam").trace.rows[-1]["noise_norm"] != pytest.approx(
        result.trace.rows[1]["noise_norm"], abs=1e-3
    )


def test_projection_holds_the_drift_and_finds_the_best_within():
    """The best of a linear reward in the ball path_kl <= L is z0 + a sqrt(2 L d) / |a|, a its gradient."""
    limit, z0 = 0.05, noises()
    held = dict(hold="projection", drift_metric="path_kl", drift_limit=limit)
    result = run(iterations=60, optimizer="sgd", lr=1.0, **held)
    drift = [r["path_kl"] for r in result.trace.rows]
    assert max(drift) <= limit * 1.001 and drift[-1] == pytest.approx(limit, rel=1e-3)
    leaves = [z.clone().requires_grad_() for z in z0]
    a = torch.autograd.grad(rollout()(leaves).x0.mean(dim=(1, 2, 3)).sum(), leaves)
    size = torch.cat([g[0].flatten() for g in a]).norm().item()
    best = math.sqrt(2 * limit * z0[0][0].numel()) * size
    gain = result.trace.of(0)[-1]["reward"] - result.trace.of(0)[0]["reward"]
    assert gain == pytest.approx(best, rel=0.01)
    # Adam moves every element alike, whatever its share of the reward: less of it at the same drift.
    adam = run(iterations=60, optimizer="adam", lr=0.05, **held)
    assert adam.trace.of(0)[-1]["reward"] < result.trace.of(0)[-1]["reward"]


def test_dual_ascent_settles_at_the_limit():
    limit = 0.05
    settings = dict(
        hold="dual_ascent", drift_metric="path_kl", drift_limit=limit, regularizer="path_kl", optimizer="adam"
    )
    result = run(iterations=300, lr=0.01, beta=0.1, **settings)
    late = [r["path_kl"] for r in result.trace.of(0)[-50:]]
    assert sum(late) / 50 == pytest.approx(limit, rel=0.15)
    assert {"beta"} <= result.trace.rows[-1].keys()
    assert run(iterations=3).trace.rows[-1].get("beta") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hold": "projection"}, "needs a drift_limit"),
        ({"hold": "projection", "drift_limit": 1.0}, "needs drift_metric path_kl"),
        ({"hold": "dual_ascent", "drift_limit": 1.0}, "regularizer is none"),
        ({"hold": "x"}, "hold is 'x'"),
        ({"variables": "x"}, "variables is 'x'"),
        ({"variables": "initno", "optimizer": "sphere"}, "optimizer sphere moves noises"),
        (
            {"variables": "initno", "hold": "projection", "drift_limit": 1.0, "drift_metric": "path_kl"},
            "optimised as they are",
        ),
    ],
)
def test_settings_say_what_does_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_chi_is_least_at_the_norm_of_typical_noise():
    path = rollout()(noises())
    d = path.noises[0][0].numel()
    scaled = []
    for square in (d - 1, 0.25 * d, 4 * d):
        z = path.noises[0] / path.noises[0].flatten(1).norm(dim=1).view(-1, 1, 1, 1) * square**0.5
        scaled.append(chi(replace(path, noises=(z, *path.noises[1:])), path))
    assert scaled[0].abs().max() < 1e-6
    assert (scaled[1] > 1).all() and (scaled[2] > 1).all()
    expected = 2 * d - (d - 1) / 2 * math.log(4 * d) - ((d - 1) / 2 - (d - 1) / 2 * math.log(d - 1))
    assert scaled[2].tolist() == pytest.approx([expected] * 2)


def test_gradient_steps_cut_the_network_only():
    full, z = rollout(), noises()

    def gradient(r):
        leaves = [n.clone().requires_grad_() for n in z]
        return torch.autograd.grad(r(leaves).x0.sum(), leaves, allow_unused=True)

    whole = gradient(full)
    for count in (1, 3, 6, 9):
        cut = gradient(rollout(gradient_steps=count))
        same = [torch.allclose(a, b) for a, b in zip(whole, cut, strict=True)]
        # The noises that enter within the last `count` calls have their whole gradient; earlier ones only a part.
        assert same == [i >= 6 - count for i in range(6)]
        assert torch.equal(rollout(gradient_steps=count)(z).x0, full(z).x0)
        leaves = [n.clone().requires_grad_() for n in z]
        path = rollout(gradient_steps=count)(leaves)
        # The score of a step whose network is a constant is one too.
        assert [e.requires_grad for e in path.eps] == [i >= 6 - count for i in range(6)]


def test_guidance_formulas():
    base, tuned = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    assert [blend(base, tuned, w).mean().item() for w in (0, 1, 2.5)] == [0, 1, 2.5]
    noise = torch.tensor([1.0, 0.5, 0.0])
    assert anneal(2.0, noise).tolist() == [0, 1, 2] and anneal(2.0, noise, 2.0).tolist() == [0, 0.5, 2]
    assert within(noise, 0.5, 1.0).tolist() == [False, True, True]
    denoised, gradient = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4) * 1e-6
    contrast = torch.randn(2, 3, 4, 4)
    step = lean(denoised, gradient, contrast, 0.7) - denoised
    torch.testing.assert_close(step.flatten(1).norm(dim=1), 0.7 * contrast.flatten(1).norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(step.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2), atol=1e-4, rtol=0)


def test_normalized_steps_know_no_scale_of_the_reward():
    def scaled(factor):
        def score(x0):
            r = factor * x0.flatten(1).mean(1)
            return Score(r, {"mean": r.detach()}, x0.detach())

        return score

    settings = Settings(iterations=5, optimizer="normalized", lr=0.05, keep="last")
    small, large = (optimize(rollout(), scaled(f), noises(), settings) for f in (1e-3, 1e3))
    torch.testing.assert_close(small.best, large.best)
    # The first step has the length lr, in units of the noise's deviation, over all noises together.
    one = optimize(
        rollout(), scaled(1.0), noises(), Settings(iterations=1, optimizer="normalized", lr=0.05, keep="last")
    )
    assert [r["path_kl"] for r in one.trace.rows[-2:]] == pytest.approx([0.05**2 * 6 / 2] * 2, rel=1e-4)


def test_normalized_steps_buy_more_reward_for_the_same_drift_than_adam():
    found = {name: run(iterations=8, optimizer=name, lr=0.03).trace.of(0) for name in ("adam", "normalized")}
    adam = found["adam"][-1]
    before = max((r for r in found["normalized"] if r["path_kl"] <= adam["path_kl"]), key=lambda r: r["path_kl"])
    gain = {k: v[-1]["reward"] - v[0]["reward"] for k, v in found.items()}
    per_drift = {k: gain[k] / v[-1]["path_kl"] ** 0.5 for k, v in found.items()}
    assert per_drift["normalized"] > per_drift["adam"] * 1.05
    assert before["iteration"] > 0
