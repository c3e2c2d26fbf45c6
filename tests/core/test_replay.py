"""What was sampled, sampled again from its record."""

from __future__ import annotations

import gaussian
import pytest
import torch
from mira.sampler import replay
from mira.sampler.keep import chosen
from mira.sampler.optimize import Score, Settings
from mira.sampler.replay import Segment
from mira.sampler.restart import Stretch, in_rounds
from mira.sampler.rollout import Rollout, noised


def process(x0=None, sigma=1.0, steps=6) -> Rollout:
    """The Gaussian's sampler from the highest level, or from x0 noised to sigma."""
    if x0 is None:
        return gaussian.rollout()
    schedule = gaussian.schedule(steps)
    schedule = schedule * sigma / schedule[0]
    chain = gaussian.Chain(gaussian.denoiser(), schedule)

    def sample(z, source, wrap):
        return chain.segment(noised(x0, schedule[0], z), 0, steps, source, wrap)

    return Rollout(sample, schedule, memory="none")


def score(x0):
    reward = -(x0 - torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)).square().flatten(1).mean(1)
    return Score(reward, {}, x0.detach())


@pytest.mark.parametrize("keep", ["last", "best_reward"])
@pytest.mark.parametrize("lr", [0.1, 2.0])
def test_segments_are_the_way_to_every_image_that_was_kept(keep, lr):
    """Also where a round made it worse, and was left out, of one image or of both."""

    def restart(number, x0):
        return Stretch(process(x0), gaussian.noises(6, seed=number))

    settings = Settings(iterations=6, rounds=3, lr=lr, keep=keep, restart_denoise=0.7)
    result = in_rounds(Stretch(process(), gaussian.noises()), score, settings, restart)
    x, segments = None, result.segments
    assert segments[0].part.all() and [s.denoise for s in segments] == [1.0] + [0.7] * (len(segments) - 1)
    for segment in segments:
        sampled = process(x)(segment.noises).x0
        x = sampled if x is None else chosen(segment.part, sampled, x)
    assert torch.equal(x, result.best)
    if keep == "last":
        assert len(segments) == 3 and all(s.part.all() for s in segments)


def drawn(segment: Segment, steps: int) -> list:
    source = segment.source(steps)
    return [source(lambda: None) for _ in range(steps - 1)]


def test_other_steps_take_each_noise_once_at_its_place():
    z = [torch.full((1, 1), float(n)) for n in range(4)]  # of the level, and of three of four steps
    segment = Segment(torch.arange(5).flip(0).float(), tuple(z), torch.ones(1, dtype=torch.bool))
    assert [v.item() for v in drawn(segment, 4)] == [1, 2, 3]
    assert [v.item() for v in drawn(segment, 2)] == [2]
    more = [None if v is None else v.item() for v in drawn(segment, 8)]
    assert [v for v in more if v is not None] == [1, 2, 3] and len(more) == 7


def test_a_file_of_them(tmp_path):
    path = tmp_path / "x.safetensors"
    segments = [
        Segment(
            torch.tensor([3.0, 1.0, 0.0]), (torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)), torch.ones(2).bool()
        ),
        Segment(torch.tensor([1.0, 0.0]), (torch.randn(2, 4, 3, 3),), torch.tensor([True, False]), 0.5),
    ]
    replay.save(path, segments, {"seed": 3})
    again, facts = replay.load(path)
    assert facts == {"seed": 3} and [s.denoise for s in again] == [1.0, 0.5]
    for a, b in zip(again, segments, strict=True):
        assert torch.equal(a.schedule, b.schedule) and torch.equal(a.part, b.part)
        assert all(torch.equal(x, y) for x, y in zip(a.noises, b.noises, strict=True))


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([], "it has no noises"),
        ([Segment(torch.zeros(1), (torch.zeros(1, 1),), torch.ones(1).bool())], "a schedule of shape"),
        ([Segment(torch.ones(2), (), torch.ones(1).bool())], "and 0 noises"),
        ([Segment(torch.ones(2), (torch.zeros(1, 1), torch.zeros(1, 2)), torch.ones(1).bool())], "several shapes"),
        ([Segment(torch.ones(2), (torch.full((1, 1), torch.nan),), torch.ones(1).bool())], "no numbers"),
        ([Segment(torch.ones(2), (torch.zeros(2, 1),), torch.ones(1).bool())], "noises of 2"),
    ],
)
def test_a_file_that_cannot_be_is_damaged(tmp_path, segments, words):
    path = tmp_path / "x.safetensors"
    replay.save(path, segments, {})
    with pytest.raises(ValueError, match=f"x.safetensors is damaged: .*{words}"):
        replay.load(path)
