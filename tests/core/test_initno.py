"""InitNO on attention maps that are known."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from testing.pack import mira

initno = mira("sampler.initno")
Maps, Settings = initno.Maps, initno.Settings
SIDE, TOKENS = 5, 3
CENTRE = 1 / (1 + 2 * math.exp(-2)) ** 2  # of the blur


def flat() -> torch.Tensor:
    return torch.zeros(SIDE, SIDE, TOKENS)


def own(*, shared: bool) -> torch.Tensor:
    """Every position attends to the whole image, or to its own row alone."""
    if shared:
        return torch.ones(SIDE**2, SIDE, SIDE) / SIDE**2
    rows = torch.zeros(SIDE, SIDE, SIDE, SIDE)
    for r in range(SIDE):
        rows[r, :, r] = 1 / SIDE
    return rows.flatten(0, 1)


def test_response_is_of_the_subject_that_is_answered_least():
    cross = flat()
    cross[2, 2, 0] = 1.0  # there the softmax over three words is 1, and a third everywhere else
    response, conflict = initno.scores(Maps(cross, own(shared=True)), [[0]])
    assert response.item() == pytest.approx(1 - (CENTRE + (1 - CENTRE) / 3), abs=1e-5) and conflict.item() == 0
    both, _ = initno.scores(Maps(cross, own(shared=True)), [[0], [1]])
    assert both.item() == pytest.approx(2 / 3, abs=1e-5)


def test_a_subject_of_two_tokens_is_answered_by_both():
    cross = flat()
    cross[..., :2] = 1.0
    assert initno.scores(Maps(cross, own(shared=True)), [[0, 1]])[0].item() == pytest.approx(0, abs=1e-5)
    assert initno.scores(Maps(cross, own(shared=True)), [[0]])[0].item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(("shared", "expected"), [(True, 0.5), (False, 0.0)])
def test_conflict_is_the_overlap_of_what_the_places_attend_to(shared, expected):
    cross = flat()
    cross[0, :, 0] = 1.0
    cross[4, :, 1] = 1.0
    response, conflict = initno.scores(Maps(cross, own(shared=shared)), [[0], [1]])
    assert response < initno.ANSWERED and conflict.item() == pytest.approx(expected, abs=1e-5)


def test_where_nobody_answers_places_are_not_known():
    response, conflict = initno.scores(Maps(flat(), own(shared=True)), [[0], [1]])
    assert response > initno.ANSWERED and conflict == 0


def test_the_kl_is_held_along_the_same_way():
    mu, log_variance = torch.full((1, 1, 4, 4), 0.3), torch.full((1, 1, 4, 4), -0.2)
    initno.hold_kl(mu, log_variance)
    variance = log_variance.exp()
    kl = ((mu.square() + variance - 1 - log_variance) / 2).mean().item()
    assert 0.98 * initno.KL < kl <= initno.KL and (mu / log_variance).mean().item() == pytest.approx(-1.5)
    near = torch.full((1, 1, 4, 4), 0.01)
    initno.hold_kl(near, torch.zeros_like(near))
    assert (near == 0.01).all()


def attend(z: torch.Tensor) -> Maps:
    """The more the noise's mean, the more attention to the first word, in the middle."""
    cross = flat()
    cross[..., 0] = 0.02 + z.mean()
    return Maps(cross, own(shared=True))


def improve(settings, noise=None, seed=0, attend=attend, subjects=((0,),), **more):
    noise = torch.zeros(1, 4, SIDE, SIDE) if noise is None else noise
    return initno.improve(attend, noise, subjects, settings, torch.Generator().manual_seed(seed), **more)


def test_noise_moves_towards_the_answer_and_not_far():
    found = improve(Settings(rounds=1, iterations=6, response=0.0))
    assert len(found.rows) == 7 and found.rows[6][2] < found.rows[0][2] / 10 and found.best == 6
    # From noise of 0 only the mean can move: KL = mean(mu^2) / 2.
    assert 0.9 * initno.KL < found.noise.square().mean() / 2 <= initno.KL
    assert found.reason.startswith("no noise became good")


def test_nothing_of_an_evaluation_is_alive_in_the_next():
    kept, alive = [], []

    def watched(z):
        alive.append([ref() for ref in kept if ref() is not None])
        saved = torch.ones_like(z)  # by the product, for its backward
        kept.append(weakref.ref(saved))
        return attend(z * saved)

    improve(Settings(rounds=1, iterations=4, response=0.0), attend=watched)
    assert len(alive) == 5 and not any(alive)


def test_good_noise_is_left_as_it_is():
    noise = torch.ones(1, 4, SIDE, SIDE)
    found = improve(Settings(), noise)
    assert torch.equal(found.noise, noise) and len(found.rows) == 1 and found.reason == "every subject is answered"


def test_noises_are_tried_and_the_best_one_goes_on():
    settings = Settings(rounds=6, iterations=12, response=0.0)

    def weak(z):
        return attend(z / 10)

    found = improve(settings, attend=weak)
    tried, went_on = found.rows[: 6 * 11], found.rows[6 * 11 :]
    assert [r[:2] for r in tried] == [(n, k) for n in range(6) for k in range(11)]
    assert len(found.rows) == settings.evaluations
    best = min(tried, key=lambda r: r[2] + r[3])
    assert [r[:2] for r in went_on] == [(best[0], k) for k in range(13)] and went_on[0][2] == best[2]
    assert found.rows[found.best] == min(found.rows, key=lambda r: r[2] + r[3])
    again, other = improve(settings, attend=weak), improve(settings, attend=weak, seed=1)
    assert torch.equal(again.noise, found.noise) and again.rows == found.rows and other.rows != found.rows
    assert len(improve(Settings(4, 0, 0.0)).rows) == 4  # chooses only


def test_a_conflict_that_is_not_known_is_no_advantage():
    """Nearly nobody answers the given noise, and both answer the next one, in overlapping places."""

    def overlapping(z):
        cross = flat()
        cross[0, :, 0] = cross[4, :, 1] = 0.003 if z.abs().sum() == 0 else 1.0
        return Maps(cross + 0 * z.mean(), own(shared=True))

    found = improve(Settings(2, 0, 0.0), attend=overlapping, subjects=[[0], [1]])
    (_, _, response, conflict), (_, _, *second) = found.rows
    assert response > initno.ANSWERED and conflict == 0 and sum(second) > 0.49
    assert found.best == 1


@pytest.mark.parametrize(
    ("stop", "said"),
    [(KeyboardInterrupt(), "interrupted after 5"), (torch.OutOfMemoryError("full"), "out of memory after 5")],
)
def test_cut_short_it_hands_back_the_best_so_far(stop, said):
    def stopping(number, k, *_):
        if k == 4:
            raise stop

    found = improve(Settings(1, 20, 0.0), on_iteration=stopping, interrupts=(KeyboardInterrupt,))
    assert found.cut_short and found.best == 4 and said in found.reason
    with pytest.raises(type(stop)):
        improve(Settings(), interrupts=(KeyboardInterrupt,), attend=lambda z: stopping(0, 4))


def test_without_room_for_one_update_it_is_an_error():
    class Full(torch.autograd.Function):
        forward = staticmethod(lambda ctx, z: z.clone())

        @staticmethod
        def backward(ctx, gradient):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        improve(Settings(1, 5, 0.0), attend=lambda z: attend(Full.apply(z)))


def test_a_noise_without_a_gradient_is_not_tried_further():
    found = improve(Settings(3, 20, 0.0), attend=lambda z: attend(z.detach() + 0 * z))
    assert [r[:2] for r in found.rows] == [(0, 0), (1, 0), (2, 0), (found.rows[-1][0], 0)]


def test_attention_that_is_not_finite_ends_a_noise_and_at_once_it_is_an_error():
    with pytest.raises(RuntimeError, match="the given noise is not finite"):
        improve(Settings(), torch.full((1, 4, SIDE, SIDE), torch.nan))

    def breaking(z):
        maps = attend(z)
        return Maps(maps.cross * torch.where(z.mean().abs() > 0.015, torch.nan, 1.0), maps.own)

    found = improve(Settings(2, 20, 0.0), attend=breaking)
    assert [r[0] for r in found.rows[:4]] == [0, 0, 0, 1] and torch.isfinite(found.noise).all()
    assert math.isnan(found.rows[2][2]) and found.rows[found.best][2] < found.rows[0][2]


@pytest.mark.parametrize(("values", "message"), [({"rounds": 0}, "rounds is 0"), ({"iterations": -1}, "negative")])
def test_settings_say_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def test_what_the_caller_mends_is_raised_and_ends_nothing():
    """A backward without a deterministic form, say, which is met after the first evaluation."""

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("x does not have a deterministic implementation")

    def refusing(z):
        return attend(Refused.apply(z))

    settings = Settings(response=0.0)
    assert improve(settings, attend=refusing).cut_short
    with pytest.raises(RuntimeError, match="deterministic"):
        improve(settings, attend=refusing, mends=lambda problem: "deterministic" in str(problem))
