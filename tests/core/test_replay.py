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
from torch import Tensor


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

    settings = Settings(iterations=6, restart_every=2, lr=lr, keep=keep, restart_denoise=0.7)
    result = in_rounds(Stretch(process(), gaussian.noises()), score, settings, restart)
    x, segments = None, result.segments
    assert segments[0].part.all() and [s.denoise for s in segments] == [1.0] + [0.7] * (len(segments) - 1)
    for segment in segments:
        sampled = process(x)(segment.noises).x0
        x = sampled if x is None else chosen(segment.part, sampled, x)
    assert torch.equal(x, result.best)
    if keep == "last":
        assert len(segments) == 3 and all(s.part.all() for s in segments)


def drawn(segment: Segment, sigmas: Tensor, count: int) -> list:
    """The first `count` noises of a run over sigmas, as numbers; None where one is drawn."""
    source = segment.source(sigmas)
    return [None if (z := source(lambda: None)) is None else z.item() for _ in range(count)]


def recorded(per_step: int = 1) -> Segment:
    """Four steps, with the numbers of their noises in their noises; the last step draws none."""
    z = [torch.full((1, 1), float(n)) for n in range(1 + 3 * per_step)]
    return Segment(torch.tensor([14.0, 9.0, 4.0, 1.0, 0.0]), tuple(z), torch.ones(1, dtype=torch.bool))


def test_other_steps_take_each_noise_once_at_its_place():
    segment = recorded()
    assert drawn(segment, segment.schedule, 3) == [1, 2, 3]
    assert drawn(segment, torch.linspace(14, 0, 3), 1) == [2]
    more = drawn(segment, torch.linspace(14, 0, 9), 7)
    assert more == [1, None, 2, None, 3, None, None]  # as far apart as they were


@pytest.mark.parametrize("per_step", [1, 2])
def test_a_split_schedule_goes_on_with_the_noises_of_its_steps(per_step):
    segment = recorded(per_step)
    high, low = segment.schedule[:3], segment.schedule[2:]
    whole = drawn(segment, segment.schedule, 3 * per_step)
    assert drawn(segment, high, 2 * per_step) + drawn(segment, low, per_step) == whole
    assert len(drawn(segment, torch.tensor([7.7]), 1)) == 1  # of another schedule, and no step
    assert segment.place(low) == 2 and segment.place(low * 1.01) is None
    assert segment.place(torch.linspace(14, 0, 9)) is None


def test_a_file_of_them(tmp_path):
    path = tmp_path / "x.safetensors"
    segments = [
        Segment(
            torch.tensor([3.0, 1.0, 0.0]), (torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)), torch.ones(2).bool()
        ),
        Segment(torch.tensor([1.0, 0.0]), (torch.randn(2, 4, 3, 3),), torch.tensor([True, False]), 0.5, 77),
    ]
    replay.save(path, segments, {"seed": 3})
    again, facts = replay.load(path)
    assert facts == {"seed": 3} and [(s.denoise, s.seed) for s in again] == [(1.0, 0), (0.5, 77)]
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
