import math
from dataclasses import replace

import pytest
import torch
from mira.rewards.combine import Augmented, Relative, WeightedSum, scaled
from mira.rewards.jpeg import JPEG
from mira.rewards.pixel import MEASURES, MatchReference, PixelReward
from mira.sampler.seeds import stream


def flat(value, size=8):
    return torch.full((1, 3, size, size), float(value))


def test_brightness_is_the_mean_in_minus_one_to_one():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.full((3, 4, 4), 1.5)])
    total, parts = PixelReward("brightness")(images, [""] * 3)
    assert total.tolist() == [-1, 1, 2]  # not clamped: the paper's darkness passes 1
    assert parts["brightness"] is total
    assert PixelReward("darkness")(images, [""] * 3)[0].tolist() == [1, -1, -2]


def test_measures_on_images_with_known_answers():
    def of(measure, image):
        return PixelReward(measure).score(image, [""]).item()

    for measure in ("contrast", "colourfulness", "sharpness", "symmetry"):
        assert of(measure, flat(0.3)) == pytest.approx(0, abs=2e-4)
    half = torch.cat([torch.zeros(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], 3)  # black and white
    assert of("contrast", half) == pytest.approx(0.5, abs=1e-4)
    assert of("symmetry", half) == pytest.approx(-1, abs=1e-4)
    assert of("symmetry", torch.cat([half, half.flip(-1)], 3)) == pytest.approx(0, abs=2e-4)
    # Two of the six columns that the stencil covers whole lie at the edge, where the Laplacian is 1 in size.
    assert of("sharpness", half) == pytest.approx(math.sqrt(2 / 6), abs=1e-4)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1  # rg = 1 and yb = 1/2 everywhere: no spread, and a mean of sqrt(1.25)
    assert of("colourfulness", red) == pytest.approx(0.3 * math.sqrt(1.25), abs=2e-4)


def test_references_of_a_batch_come_again_for_every_particle():
    references, images = torch.rand(2, 3, 8, 8), torch.rand(3, 2, 3, 8, 8)
    reward = MatchReference(references)
    together = reward.score(images.flatten(0, 1), [""] * 6).unflatten(0, (3, 2))
    for p in range(3):
        torch.testing.assert_close(together[p], reward.score(images[p], [""] * 2))


def test_match_reference():
    reference = torch.rand(1, 3, 8, 8)
    reward = MatchReference(reference)
    assert reward.score(reference.clone(), [""]).item() == pytest.approx(0, abs=2e-4)
    assert reward.score(reference + 0.25, [""]).item() == pytest.approx(-0.25, abs=1e-4)
    assert reward.score(torch.rand(2, 3, 16, 12), ["", ""]).shape == (2,)  # another size
    with pytest.raises(ValueError, match="2 reference images for 3 images"):
        MatchReference(torch.rand(2, 3, 8, 8)).score(torch.rand(3, 3, 8, 8), [""] * 3)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_saturated_image_still_feels_its_reward(measure):
    images = (torch.rand(1, 3, 8, 8) + 1.2).requires_grad_()
    PixelReward(measure)(images, [""])[0].sum().backward()
    assert (images.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("measure", MEASURES)
def test_gradcheck_pixels(measure):
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    reward = PixelReward(measure)
    assert torch.autograd.gradcheck(lambda x: reward.score(x, ["", ""]), images)


@pytest.mark.parametrize("measure", MEASURES)
def test_scores_are_per_image(measure):
    images, reward = torch.rand(3, 3, 8, 8), PixelReward(measure)
    alone = torch.cat([reward.score(i[None], [""]) for i in images])
    torch.testing.assert_close(reward.score(images, [""] * 3), alone)


def test_unknown_measure():
    with pytest.raises(ValueError, match="is not one of brightness, darkness"):
        PixelReward("shine")


def test_weighted_sum_keeps_parts_in_their_own_units():
    bright, dark = PixelReward("brightness"), PixelReward("darkness")
    reward = WeightedSum([bright, dark, bright], [1.0, 0.5, -2.0])
    total, parts = reward(torch.full((1, 3, 2, 2), 0.75), [""])
    assert total.item() == pytest.approx(0.5 - 0.25 - 1.0)
    assert {k: v.item() for k, v in parts.items()} == {"brightness": 0.5, "darkness": -0.5, "brightness #2": 0.5}
    assert reward.facts.low == pytest.approx(-3.5) and reward.facts.high == pytest.approx(3.5)
    assert not reward.facts.needs_prompt
    with pytest.raises(ValueError, match="one weight per reward"):
        WeightedSum([bright], [])


def test_a_weight_of_nothing_only_looks():
    """At what has no gradient, or no number, too."""
    bright, other = PixelReward("brightness"), JPEG()
    reward, images = WeightedSum([bright, other], [1.0, 0.0]), torch.rand(1, 3, 8, 8, requires_grad=True)
    assert reward.facts.differentiable and not WeightedSum([bright, other], [1.0, 0.1]).facts.differentiable
    total, parts = reward(images, [""])
    assert torch.equal(total, parts["brightness"]) and not parts["JPEG kB"].requires_grad
    assert torch.autograd.grad(total.sum(), images)[0].any()
    other.score = lambda images, prompts: torch.full((len(images),), torch.nan)
    assert torch.isfinite(reward(images, [""])[0]).all()


def test_scaling():
    bright, contrast = PixelReward("brightness"), PixelReward("contrast")
    assert scaled([bright, contrast], [1, -2], "raw") == [1, -2]
    # The typical ranges are 1 and 0.2 wide.
    assert scaled([bright, contrast], [1, -2], "by typical range") == pytest.approx([1, -10])
    with pytest.raises(ValueError, match=r"has no brightness, contrast: it is made of HPSv2\.1, ImageReward"):
        scaled([bright, contrast], [1, 1], "ReNO")


def test_augmentation_is_seeded_by_run_and_evaluation():
    images = torch.rand(2, 3, 16, 16)
    reward = Augmented(PixelReward("contrast"), crops=3, smallest=0.5, flip=True, stream=lambda n: stream(5, n))

    def run(numbers):
        scores = []
        for number in numbers:
            reward.evaluation(number)
            scores.append(reward(images, ["", ""])[0])
        return torch.stack(scores)

    first = run(range(3))
    assert torch.equal(first, run(range(3)))  # two runs in a row
    assert not torch.equal(first[0], first[1])  # fresh crops every time
    reward.evaluation(1)
    assert torch.equal(first[1], reward(images, ["", ""])[0])  # a recomputation sees the same crops
    torch.testing.assert_close(first[1][:1], reward(images[:1], [""])[0])  # whoever else is in the batch


def test_augmentation_of_the_whole_image_is_the_reward():
    images = torch.rand(2, 3, 16, 16)
    plain = PixelReward("sharpness")
    same = Augmented(plain, crops=2, smallest=1.0, flip=True, stream=lambda n: stream(0, n))
    torch.testing.assert_close(same(images, ["", ""])[0], plain.score(images, ["", ""]))
    with pytest.raises(ValueError, match="crops must be 1 or more"):
        Augmented(plain, crops=0, smallest=1.0, flip=True, stream=lambda n: stream(0, n))


def test_gradcheck_augmented():
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    reward = Augmented(PixelReward("contrast"), crops=2, smallest=0.6, flip=True, stream=lambda n: stream(0, n))
    assert torch.autograd.gradcheck(lambda x: reward(x, [""])[0], images)


class Words(PixelReward):
    """Brightness times the number of the prompt's letters: reads the prompt, and counts how often it is asked."""

    def __init__(self):
        super().__init__("brightness")
        self.facts = replace(self.facts, needs_prompt=True, name="words")

    def score(self, images, prompts):
        return super().score(images, prompts) * torch.tensor([float(len(p)) for p in prompts]).to(images)


def test_a_relative_reward_is_the_words_difference():
    images = torch.rand(2, 3, 4, 4)
    reward = Relative(Words(), " sunny ", "grim")
    total, parts = reward(images, ["a fox", ""])
    bright = PixelReward("brightness").score(images, ["", ""])
    torch.testing.assert_close(total, bright * (len("sunny") - len("grim")))
    assert list(parts) == ["words wanted", "words unwanted"]
    torch.testing.assert_close(parts["words unwanted"][1], bright[1] * len("grim"))
    assert reward.facts.needs_prompt and reward.facts.low == -reward.facts.high == -2.0
    # Under crops the difference is of the same crops.
    crops = Augmented(Words(), crops=2, smallest=0.5, flip=True, stream=lambda n: stream(3, n))
    relative, whole = Relative(crops, "sunny", "grim"), crops(images, ["x", "x"])[0]
    torch.testing.assert_close(relative(images, ["x", "x"])[0], whole * (len("sunny") - len("grim")))


def test_what_is_no_relative_reward():
    with pytest.raises(ValueError, match="'brightness' does not read the prompt"):
        Relative(PixelReward("brightness"), "a", "b")
    with pytest.raises(ValueError, match="wanted and unwanted are both 'a'"):
        Relative(Words(), "a ", "a")
