import contextlib
import itertools
import json
import math
import weakref

import pytest
import torch
from gaussian import ancestral, denoiser, narrow, noises, rollout, schedule
from mira.sampler.keep import Keeper
from mira.sampler.optimize import Score, Settings, optimize
from mira.sampler.rollout import Rollout, draw
from mira.sampler.surrogates import REGULARIZERS
from mira.sampler.trace import COLUMNS, Trace, rows_of


def mean_reward(x0):
    r = x0.flatten(1).mean(1)
    return Score(r, {"mean": r.detach()}, x0.detach())


def run(settings, score=mean_reward, steps=6, batch=2, r=None, **kwargs):
    return optimize(r or rollout(steps), score, noises(steps, batch), settings, **kwargs)


def test_zero_iterations_are_the_plain_sample_bit_for_bit():
    sample = ancestral(denoiser(), schedule())
    x0, z = draw(sample, noises(1)[0])
    result = optimize(Rollout(sample, schedule()), mean_reward, z, Settings(iterations=0))
    assert torch.equal(result.best, x0) and torch.equal(result.last, x0)
    assert [row["iteration"] for row in result.trace.of(0)] == [0]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_optimum_is_the_closed_form(optimizer):
    """A linear model, reward mean(x0), penalty path_kl: z* = z0 + a_t / beta with x0 = sum_t a_t z_t."""
    z0 = noises()
    leaves = [z.clone().requires_grad_() for z in z0]
    a = [g.mean().item() for g in torch.autograd.grad(rollout()(leaves).x0.sum(), leaves)]
    lr, iterations = (0.05, 400) if optimizer == "adam" else (2.0, 150)
    settings = Settings(
        iterations=iterations, lr=lr, beta=0.5, regularizer="path_kl", optimizer=optimizer, clip_norm=0, keep="last"
    )
    result = run(settings)
    for z, reference, coefficient in zip(result.best_noises, z0, a, strict=True):
        torch.testing.assert_close(z, reference + coefficient / 0.5, atol=2e-3, rtol=0)


def test_a_batch_of_three_is_three_runs():
    settings = Settings(iterations=5, beta=0.3, regularizer="mira_two_sided", lr=0.05)
    together = run(settings, batch=3)
    for b in range(3):
        z = [n[b : b + 1] for n in noises(6, 3)]
        alone = optimize(rollout(), mean_reward, z, settings)
        torch.testing.assert_close(alone.best, together.best[b : b + 1])
        assert [r["reward"] for r in alone.trace.of(0)] == pytest.approx([r["reward"] for r in together.trace.of(b)])


def test_two_runs_are_the_same_bits():
    a, b = (run(Settings(iterations=4, regularizer="prno", beta=0.1)) for _ in range(2))
    assert torch.equal(a.best, b.best)


def test_a_regulariser_is_one_function_and_one_line(monkeypatch):
    """It is in the loss, and in the record, by being in the table alone."""

    def farness(path, reference):
        return sum((z - z0).abs().flatten(1).mean(1) for z, z0 in zip(path.noises, reference.noises, strict=True))

    monkeypatch.setitem(REGULARIZERS, "farness", farness)
    free, held = (run(Settings(iterations=4, regularizer="farness", beta=b)).trace.of(0) for b in (0.0, 100.0))
    assert free[0]["farness"] == held[0]["farness"] == 0
    assert free[-1]["farness"] > held[-1]["farness"] > 0


@pytest.mark.parametrize("memory", ["none", "per_step"])
def test_a_relative_beta_makes_both_gradients_pull_alike(memory):
    """One step of a model of N(0, 1) data: x0 = a z and eps_hat = k z, so grad r = a / n and grad S = 2 w k^2 z / n."""

    def sample(z_T, source, wrap):
        D = wrap(lambda x, sigma: x / (1 + sigma.view(-1, 1) ** 2))
        return D(z_T * 5**0.5, torch.full((len(z_T),), 2.0))

    z = torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.2, -0.1]])
    one_step = Rollout(sample, torch.tensor([2.0, 0.0]), memory=memory)
    w = one_step([z]).weights[0][0].item()
    a, k = 5**0.5 / 5, 2 * 5**0.5 / 5
    settings = Settings(
        iterations=1, lr=0.1, beta=0.25, relative_beta=True, regularizer="mira", optimizer="sgd", clip_norm=0
    )
    for scale in (1.0, 1000.0):
        result = optimize(one_step, lambda x0, f=scale: Score(f * x0.mean(1), {}, x0.detach()), [z], settings)
        length = z.norm(dim=1, keepdim=True)
        betas = 0.25 * scale * a * 3**0.5 / (2 * w * k**2 * length.flatten())
        for b in range(2):
            assert [row["beta"] for row in result.trace.of(b)] == pytest.approx([betas[b].item()] * 2, rel=1e-5)
        step = 0.1 * 1.9 * scale * a / 3 * (1 + 0.25 * 3**0.5 * z / length)  # 1.9: the first of Nesterov's momentum
        torch.testing.assert_close(result.last, a * (z + step))


def test_a_relative_beta_of_nothing_is_refused_and_a_bad_image_does_not_stop_the_others():
    settings = Settings(iterations=2, beta=0.1, relative_beta=True, regularizer="mira")
    no_injected_variance = rollout(1, weighting="transition")  # one step: S counts nothing
    with pytest.raises(RuntimeError, match=r"mira has no gradient at the unchanged noises of image\(s\) \[0, 1\]"):
        run(settings, steps=1, r=no_injected_variance)

    def broken(x0):
        r = x0.flatten(1).mean(1)
        return Score(torch.stack([r[0], r[1] * math.nan]), {}, x0.detach())

    plain, scaled = (
        run(Settings(iterations=2, beta=0.1, relative_beta=True, regularizer="mira", loss_scale=s), broken).trace.of(0)
        for s in (1.0, 1024.0)
    )
    assert plain[0]["beta"] == pytest.approx(scaled[0]["beta"], rel=1e-4) != 0.1


def test_dual_ascent_of_a_relative_beta_has_a_relative_floor():
    settings = dict(iterations=4, beta=1e-9, relative_beta=True, regularizer="mira", hold="dual_ascent", lr=1e-4,
                    drift_limit=10.0, drift_metric="path_kl")  # fmt: skip
    betas = [[row["beta"] for row in run(Settings(**settings), scaled).trace.of(0)] for scaled in (
        mean_reward, lambda x0: Score(1e-3 * x0.flatten(1).mean(1), {}, x0.detach()),
    )]  # fmt: skip
    for one, thousandth in zip(*betas, strict=True):
        assert one == pytest.approx(1000 * thousandth, rel=1e-3)


def test_the_record_has_every_surrogate_and_the_truth():
    result = run(Settings(iterations=3))
    rows = result.trace.of(1)
    assert [r["iteration"] for r in rows] == [0, 1, 2, 3]
    for name in ("reward", "mira", "mira_two_sided", "score_distance", "path_kl", "latent_distance"):
        assert name in rows[0]
    assert rows[0]["path_kl"] == 0 < rows[3]["path_kl"]
    z0 = torch.cat([z[1].flatten() for z in noises()])
    assert rows[0]["noise_norm"] == pytest.approx(z0.square().mean().sqrt().item())
    assert rows[3]["reward"] == pytest.approx(result.last[1].mean().item())
    assert "gradient_norm" in rows[0] and "gradient_norm" not in rows[3]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_reward_rises(optimizer):
    rows = run(Settings(iterations=5, beta=0, optimizer=optimizer)).trace.of(0)
    assert all(b["reward"] > a["reward"] for a, b in itertools.pairwise(rows))


def test_clipping_bounds_the_step():
    settings = dict(iterations=1, lr=1.0, beta=0, optimizer="sgd")
    free, clipped = (run(Settings(**settings, clip_norm=c)).trace.of(0) for c in (0, 1e-3))
    assert clipped[0]["gradient_norm"] == free[0]["gradient_norm"]
    ratio = clipped[1]["path_kl"] / free[1]["path_kl"]
    assert ratio == pytest.approx((1e-3 / free[0]["gradient_norm"]) ** 2, rel=1e-6)


def test_loss_scale_changes_nothing_else():
    a, b = (run(Settings(iterations=3, loss_scale=s)) for s in (1.0, 1024.0))
    torch.testing.assert_close(a.best, b.best)


def test_loss_scale_is_lowered_when_gradients_overflow():
    def score(x0):
        return mean_reward(narrow(torch.clone)(x0))

    free, scaled = (run(Settings(iterations=3, beta=0, loss_scale=s), score) for s in (1.0, 2.0**16))
    assert scaled.reason == "all iterations done"
    torch.testing.assert_close(scaled.best, free.best)


def test_an_image_whose_gradient_never_fits_leaves_the_others_their_loss_scale():
    def score(x0):
        small = 1e-6 * narrow(torch.clone)(x0)  # with no loss scale: no gradient
        r = small.flatten(1).mean(1)
        return Score(torch.stack([r[0], r[1] * 1e12]), {}, x0.detach())

    settings = Settings(iterations=6, lr=0.05, loss_scale=2.0**16, keep="best_reward")
    result = run(settings, score)
    rewards = [row["reward"] for row in result.trace.of(0)]
    assert all(b > a for a, b in itertools.pairwise(rewards)) and len(rewards) == 7
    assert result.trace.kept == [6, 0]
    assert result.trace.reasons[1].startswith("reward or gradient not finite on the plain sample")


def test_an_image_whose_reward_is_flat_does_not_stop_the_others():
    def score(x0):
        r = x0.flatten(1).mean(1)
        return Score(r * torch.tensor([1.0, 0.0], dtype=r.dtype), {}, x0.detach())

    result = run(Settings(iterations=3, keep="best_reward"), score)
    assert result.trace.kept == [3, 0]
    why = result.trace.reasons
    assert why[0] == "all iterations done" and "gradient of its reward is zero" in why[1]
    assert [n for n in result.trace.notices if n.startswith("image 1: the gradient of its reward is zero")]
    assert torch.equal(result.best[1], result.iterates[0][1])


# --- what comes back ------------------------------------------------------------------------------------------------


def keeper(policy, limit, rewards, drifts):
    k = Keeper(policy, limit)
    for i, (r, d) in enumerate(zip(rewards, drifts, strict=True)):
        z = torch.full((2, 1), float(i))
        k.update(i, torch.tensor(r), torch.tensor(d), z, [z], torch.tensor([True, True]))
    return k


@pytest.mark.parametrize(
    ("policy", "limit", "expected"),
    [
        ("last", 0.0, [3, 3]),
        ("best_reward", 0.0, [2, 3]),
        ("best_within_drift", 0.0, [2, 3]),
        ("best_within_drift", 0.5, [1, 0]),
    ],
)
def test_keep(policy, limit, expected):
    rewards = [[0.0, 0.0], [1.0, 1.0], [3.0, 2.0], [2.0, 4.0]]
    drifts = [[0.0, 0.0], [0.4, 0.6], [0.8, 0.8], [0.9, 0.9]]
    k = keeper(policy, limit, rewards, drifts)
    assert k.iteration.tolist() == expected
    assert k.latent.flatten().tolist() == expected and k.noises[0].flatten().tolist() == expected


def test_nan_is_never_kept():
    k = keeper("last", 0.0, [[0.0, 0.0], [math.nan, 1.0]], [[0.0, 0.0], [0.1, 0.1]])
    assert k.iteration.tolist() == [0, 1]


def test_best_within_drift_respects_the_limit_on_a_real_path():
    result = run(Settings(iterations=12, lr=0.05, beta=0, drift_metric="path_kl", drift_limit=0.1))
    for b in range(2):
        _, kept = result.trace.summary(b)
        assert kept["path_kl"] <= 0.1
        after = result.trace.of(b)[int(kept["iteration"]) + 1]
        assert after["path_kl"] > 0.1


# --- stopping -------------------------------------------------------------------------------------------------------


def test_stop_on_drift_leaves_each_image_at_its_own_time():
    def score(x0):
        r = x0.flatten(1).mean(1) * torch.tensor([1.0, 0.0])
        return Score(r - 1e-3 * x0.flatten(1).square().mean(1), {}, x0.detach())

    settings = Settings(
        iterations=20, lr=0.05, beta=0, stop="drift", drift_metric="path_kl", drift_limit=0.05, optimizer="sgd"
    )
    result = run(settings, score)
    assert result.trace.reasons[0] == "path_kl passed 0.05"
    assert result.trace.reasons[1] == "all iterations done"
    moved = [r["path_kl"] for r in result.trace.of(0)]
    stopped = next(i for i, v in enumerate(moved) if v > 0.05)
    assert len(set(moved[stopped:])) == 1


def test_stop_where_a_held_image_gains_no_more():
    """On the ball the optimum is its rim's nearest point: what comes after it is only time."""
    held = dict(iterations=60, lr=0.1, hold="projection", drift_metric="path_kl", drift_limit=0.02, keep="best_reward")
    whole, early = run(Settings(**held)), run(Settings(**held, stop="plateau_at_limit"))
    last = [early.trace.of(b)[-1]["iteration"] for b in range(2)]
    assert max(last) < 30 and all("gains no more" in r for r in early.trace.reasons)
    for b in range(2):
        (start, best), (_, reached) = early.trace.summary(b), whole.trace.summary(b)
        assert best["path_kl"] == pytest.approx(0.02, rel=1e-2)
        assert best["reward"] - start["reward"] > 0.9 * (reached["reward"] - start["reward"])
    free = run(Settings(iterations=6, lr=0.1, stop="plateau_at_limit"))
    assert free.reason == "all iterations done"


def test_stop_on_a_plateau():
    def score(x0):
        r = x0.flatten(1).mean(1).clamp(max=0.3) + 1e-9 * x0.flatten(1).mean(1)
        return Score(r, {}, x0.detach())

    result = run(Settings(iterations=100, lr=0.1, beta=0, stop="plateau", patience=4), score)
    assert result.reason == "no progress for 4 iterations"
    assert len(result.trace.of(0)) < 60


# --- nothing is lost ------------------------------------------------------------------------------------------------


class Cancelled(BaseException):
    pass


def failing(at, problem):
    """mean_reward whose `at`-th call raises."""
    calls = iter(range(1000))

    def score(x0):
        if next(calls) == at:
            raise problem
        return mean_reward(x0)

    return score


def test_an_interrupt_hands_back_the_best_so_far():
    result = run(Settings(iterations=10, beta=0), failing(4, Cancelled()), interrupts=(Cancelled,))
    assert result.reason == "interrupted at iteration 4" and result.cut_short
    assert result.trace.kept == [3, 3] and len(result.trace.of(0)) == 4
    torch.testing.assert_close(result.best, run(Settings(iterations=3, beta=0)).best)


def test_an_interrupt_from_the_progress_bar_counts_too():
    def report(k, rows, score):
        if k == 2:
            raise Cancelled

    result = run(Settings(iterations=10, beta=0), interrupts=(Cancelled,), on_iteration=report)
    assert result.reason == "interrupted at iteration 2" and result.trace.kept == [2, 2]


def test_an_interrupt_before_anything_is_an_interrupt():
    with pytest.raises(Cancelled):
        run(Settings(iterations=10), failing(0, Cancelled()), interrupts=(Cancelled,))


def test_out_of_memory_goes_on_thriftier_and_then_ends_with_the_best():
    calls = iter(range(1000))

    def score(x0):
        if next(calls) in (3, 6, 8, 10, 11):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return mean_reward(x0)

    r = rollout(blocks=contextlib.nullcontext)
    result = run(Settings(iterations=10, beta=0), score, r=r)
    assert r.memory == "offload"
    apart = "checkpointing, with what decoding and reward keep in the CPU's memory"
    assert [n.split("went on with ")[1] for n in result.trace.notices] == [
        "per_step checkpointing", f"per_step {apart}", f"per_block {apart}", "offload checkpointing",
    ]  # fmt: skip
    assert result.reason == "out of memory at iteration 7" and result.cut_short
    torch.testing.assert_close(result.best, run(Settings(iterations=6, beta=0)).best)


def test_not_finite_halves_the_step_and_goes_on():
    calls = iter(range(1000))

    def score(x0):
        r = x0.flatten(1).mean(1)
        if next(calls) == 3:
            r = r * torch.tensor([math.nan, 1.0])
        return Score(r, {}, x0.detach())

    result = run(Settings(iterations=8, beta=0), score)
    assert math.isnan(result.trace.of(0)[3]["reward"])
    assert result.reason == "all iterations done"
    reached = [r["path_kl"] for r in result.trace.of(0)]
    assert reached[2] < reached[4] < reached[3]
    assert result.trace.kept == [8, 8]
    # The other image never noticed.
    clean = run(Settings(iterations=8, beta=0))
    torch.testing.assert_close(result.best[1], clean.best[1])


def test_not_finite_for_good_gives_up_with_the_best():
    calls = iter(range(1000))

    def score(x0):
        r = x0.flatten(1).mean(1)
        return Score(r / 0 * 0 if next(calls) >= 4 else r, {}, x0.detach())

    result = run(Settings(iterations=50, beta=0), score)
    assert result.reason == "reward or gradient not finite 4 times in a row"
    assert not result.cut_short
    assert result.trace.kept == [3, 3] and torch.isfinite(result.best).all()
    assert len(result.trace.of(0)) < 12


def test_a_plain_sample_that_is_not_finite_ends_at_once():
    result = run(Settings(iterations=5), lambda x0: Score(x0.flatten(1).mean(1) * math.nan, {}, x0.detach()))
    assert result.reason == "reward or gradient not finite on the plain sample"
    assert len(result.trace.of(0)) == 1


def test_no_gradient_is_said_and_not_optimised():
    with pytest.raises(RuntimeError, match="no gradient with respect to the image"):
        run(Settings(iterations=2), lambda x0: Score(x0.detach().flatten(1).mean(1), {}, x0.detach()))
    with pytest.raises(RuntimeError, match="zero for every image"):
        run(Settings(iterations=2), lambda x0: Score(x0.flatten(1).mean(1) * 0, {}, x0.detach()))
    with pytest.raises(RuntimeError, match="does not depend on the noise"):  # as of an image that flows to an image
        run(Settings(iterations=2), r=Rollout(lambda z_T, source, wrap: torch.ones(2, 3), schedule(6)))


# --- settings and record --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": -1}, "beta is -1"),
        ({"beta": math.nan}, "beta is nan"),
        ({"iterations": -1}, "iterations is -1"),
        ({"lr": 0}, "lr is 0"),
        ({"regularizer": "kl"}, "choose one of mira"),
        ({"relative_beta": True, "beta": 0.1, "regularizer": "path_kl"}, "that of path_kl is zero or chance there"),
        ({"relative_beta": True, "beta": 0.1, "regularizer": "chi"}, "that of chi is zero or chance there"),
        ({"stop": "drift"}, "stop is drift, which needs a drift_limit"),
        ({"stop": "plateau", "patience": 0}, "patience is 0"),
    ],
)
def test_settings_name_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_what_is_not_finite_is_null_in_a_record_wherever_it_stands():
    """A browser reads no NaN."""
    trace = Trace(
        {"seed_rewards": [[math.nan, 1.0]], "of": {"it": -math.inf}}, [{"iteration": 0, "image": 0, "r": math.nan}], [0]
    )
    found = json.loads(trace.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert found["settings"] == {"seed_rewards": [[None, 1.0]], "of": {"it": None}} and found["rows"][0]["r"] is None


def test_a_column_that_nobody_could_look_up_is_an_error():
    assert rows_of(0, {"reward": torch.ones(1), "reward.detail": torch.ones(1)}, seconds=1.0)[0]["seconds"] == 1
    with pytest.raises(ValueError, match="column 'surprise', which COLUMNS does not tell of"):
        rows_of(0, {"reward": torch.ones(1), "surprise": torch.ones(1)})
    assert set(REGULARIZERS) - {"none"} <= set(COLUMNS)


def test_trace_round_trip_and_csv():
    trace = run(Settings(iterations=2)).trace
    trace.rows[3]["reward"] = math.nan
    again = Trace.from_dict(__import__("json").loads(trace.to_json()))
    assert math.isnan(again.rows[3]["reward"])
    assert again.rows[0] == trace.rows[0] and again.kept == trace.kept
    lines = trace.to_csv().splitlines()
    assert lines[0].startswith("iteration,image,reward") and len(lines) == 1 + 3 * 2
    with pytest.raises(ValueError, match="not a MIRA trace of version 1"):
        Trace.from_dict({"version": 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": None}, "its settings are missing"),
        ({"rows": "SECRET"}, "its rows are missing"),
        ({"rows": []}, "a row is not of numbers"),
        ({"rows": [{"iteration": 0}]}, "a row is not of numbers"),
        ({"rows": [{"iteration": 0, "image": 0, "reward": "SECRET"}]}, "a row is not of numbers"),
        ({"kept": [7, 0]}, "that it kept"),
        ({"kept": [["SECRET"]]}, "that it kept"),
        ({"notices": 3}, "its notices are missing"),
    ],
)
def test_a_damaged_trace_is_told_at_the_door_and_not_quoted(change, message):
    data = run(Settings(iterations=1)).trace.to_dict()
    assert Trace.from_dict(data).kept
    with pytest.raises(ValueError, match=f"damaged: .*{message}") as told:
        Trace.from_dict(data | change)
    assert "SECRET" not in str(told.value)


@pytest.mark.parametrize(("change", "words"), [({"optimizer": "sphere"}, "sphere"), ({"regularizer": "chi"}, "chi")])
def test_what_means_nothing_without_an_initial_noise_is_refused(change, words):
    z = noises()
    z[0] = torch.zeros_like(z[0])
    with pytest.raises(ValueError, match=f"is {words}.*zero: use"):
        optimize(rollout(), mean_reward, z, Settings(iterations=1, beta=1.0, **change))


def test_nothing_of_an_iteration_is_alive_in_the_next():
    """On a card its images, its gradients and what its graph kept are memory that the next one wants."""
    before, sample = [], rollout()

    def score(x0):
        got = mean_reward(x0)
        before[:] = [weakref.ref(got.images), weakref.ref(got.total)] if x0.requires_grad else before
        return got

    class Watched:
        schedule, mask = sample.schedule, None

        def __call__(self, z):
            assert not any(ref() is not None for ref in before)
            return sample(z)

        def let_go(self):
            sample.let_go()

    result = optimize(Watched(), score, noises(), Settings(iterations=3))
    assert before and len(result.iterates) == 4
