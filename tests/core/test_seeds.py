"""The best of several seeds to begin from."""

from __future__ import annotations

import pytest
import torch
from gaussian import noises, rollout
from mira.sampler.seeds import best_of, stream


def reward(x0):
    return x0.flatten(1).mean(1)


def test_every_image_begins_from_its_own_best_seed():
    r, z = rollout(), noises(batch=6)
    start = best_of(r, reward, z, 5, seed=3)
    assert start.rewards.shape == (5, 6) and start.interrupted is None
    torch.testing.assert_close(start.rewards[0], reward(r(z).x0))
    assert torch.equal(start.chosen, start.rewards.argmax(0)) and len(set(start.chosen.tolist())) > 1
    torch.testing.assert_close(reward(r(start.noises).x0), start.rewards.max(0).values)
    kept = start.chosen == 0
    for new, old in zip(start.noises, z, strict=True):
        assert torch.equal(new[kept], old[kept])


def test_it_repeats_and_more_seeds_only_add():
    r, z = rollout(), noises(batch=4)
    a, b, more = (best_of(r, reward, z, n, seed=3) for n in (3, 3, 6))
    assert all(torch.equal(x, y) for x, y in zip(a.noises, b.noises, strict=True))
    assert torch.equal(more.rewards[:3], a.rewards)
    assert not torch.equal(best_of(r, reward, z, 3, seed=4).rewards[1:], a.rewards[1:])
    assert torch.equal(best_of(r, reward, z, 1, seed=3).noises[0], z[0])


def test_streams_differ():
    draws = {tuple(torch.randn(3, generator=stream(s, n)).tolist()) for s in range(4) for n in range(-1, 4)}
    assert len(draws) == 20


def test_a_reward_that_is_not_a_number_is_never_the_best():
    def broken(x0):
        r = reward(x0)
        return torch.where(r > 0, torch.nan, r)

    start = best_of(rollout(), broken, noises(batch=8), 4, seed=0)
    picked = start.rewards.gather(0, start.chosen[None])[0]
    assert all(torch.isfinite(p) or not torch.isfinite(start.rewards[:, i]).any() for i, p in enumerate(picked))


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 2])
def test_stopped_it_keeps_what_was_tried(after):
    calls = []

    def stopping(x0):
        if len(calls) == after:
            raise Stop
        calls.append(1)
        return reward(x0)

    if not after:
        with pytest.raises(Stop):
            best_of(rollout(), stopping, noises(), 5, 0, (Stop,))
        return
    start = best_of(rollout(), stopping, noises(), 5, 0, (Stop,))
    assert start.rewards.shape == (2, 2) and isinstance(start.interrupted, Stop)
