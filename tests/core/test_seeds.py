"""The best of several seeds to begin from."""

from __future__ import annotations

import pytest
import torch
from gaussian import noises, rollout
from mira.sampler.seeds import another, best_of, fresh, stream


def reward(x0):
    return x0.flatten(1).mean(1)


def sampling(r, z, seed):
    """n -> (x0, noises): of the given noises, and of fresh ones."""

    def sample(n):
        noises = z if n == 0 else fresh(z, stream(seed, n))
        return r(noises).x0, noises

    return sample


def test_every_image_begins_from_its_own_best_seed():
    r, z = rollout(), noises(batch=6)
    start = best_of(sampling(r, z, 3), reward, 5)
    assert start.rewards.shape == (5, 6) and start.cut is None
    torch.testing.assert_close(start.rewards[0], reward(r(z).x0))
    assert torch.equal(start.chosen, start.rewards.argmax(0)) and len(set(start.chosen.tolist())) > 1
    torch.testing.assert_close(r(start.noises).x0, start.x0)
    torch.testing.assert_close(reward(start.x0), start.rewards.max(0).values)
    kept = start.chosen == 0
    for new, old in zip(start.noises, z, strict=True):
        assert torch.equal(new[kept], old[kept])


def test_every_seed_is_told_and_a_stop_there_keeps_what_was_tried():
    told = []

    def tell(count):
        told.append(count)
        if count == 3:
            raise KeyboardInterrupt

    start = best_of(sampling(rollout(), noises(batch=2), 3), reward, 5, (KeyboardInterrupt,), tell)
    assert told == [1, 2, 3] and start.cut.interrupted and len(start.rewards) == 3


def test_it_repeats_and_more_seeds_only_add():
    r, z = rollout(), noises(batch=4)
    a, b, more = (best_of(sampling(r, z, 3), reward, n) for n in (3, 3, 6))
    assert all(torch.equal(x, y) for x, y in zip(a.noises, b.noises, strict=True))
    assert torch.equal(more.rewards[:3], a.rewards)
    assert not torch.equal(best_of(sampling(r, z, 4), reward, 3).rewards[1:], a.rewards[1:])
    assert torch.equal(best_of(sampling(r, z, 3), reward, 1).noises[0], z[0])


def test_streams_differ():
    draws = {tuple(torch.randn(3, generator=stream(s, n)).tolist()) for s in range(4) for n in range(-1, 4)}
    assert len(draws) == 20


def test_a_reward_that_is_not_a_number_is_never_the_best():
    def broken(x0):
        r = reward(x0)
        return torch.where(r > 0, torch.nan, r)

    start = best_of(sampling(rollout(), noises(batch=8), 0), broken, 4)
    picked = start.rewards.gather(0, start.chosen[None])[0]
    assert all(torch.isfinite(p) or not torch.isfinite(start.rewards[:, i]).any() for i, p in enumerate(picked))


class Stop(BaseException):
    pass


def full():
    return torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("problem", [Stop, full])
@pytest.mark.parametrize("after", [0, 2])
def test_cut_short_it_keeps_what_was_tried(after, problem):
    calls = []

    def failing(x0):
        if len(calls) == after:
            raise problem()
        calls.append(1)
        return reward(x0)

    sample = sampling(rollout(), noises(), 0)
    if not after:
        with pytest.raises(type(problem())):
            best_of(sample, failing, 5, (Stop,))
        return
    start = best_of(sample, failing, 5, (Stop,))
    assert start.rewards.shape == (2, 2) and start.cut.memory == (problem is full)
    assert start.cut.problem.__traceback__ is None  # it would hold the frames, and they every activation


def test_seeds_of_neighbours_are_apart():
    largest = 2**64 - 1
    seeds = [another(s, n) for s in (0, 1, 2, largest - 1, largest) for n in range(-1, 5)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**53 for s in seeds)  # as JavaScript has them


def test_no_stream_is_what_a_host_makes_of_a_candidates_seed():
    """z_T is drawn from `another`'s seed: injected once more, it would add up to twice the noise."""
    shape = (2, 4, 3, 3)
    for n in range(4):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(another(5, n)))
        assert not any(torch.equal(z, torch.randn(shape, generator=stream(5, m))) for m in range(-1, 5))


def test_an_infinite_reward_is_none():
    rewards = iter([1.0, float("inf"), 5.0])
    found = best_of(
        lambda n: (torch.full((1, 1), float(n)), [torch.zeros(1, 1)]), lambda x0: torch.tensor([next(rewards)]), 3
    )
    assert found.chosen.tolist() == [2] and found.x0.item() == 2
