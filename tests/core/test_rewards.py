import pytest
import torch
from mira.rewards.clip import CLIPScore, preprocess
from mira.rewards.combine import WeightedSum
from mira.rewards.pixel import PixelReward


def test_brightness_is_the_mean_in_minus_one_to_one():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.full((3, 4, 4), 1.5)])
    total, parts = PixelReward("brightness")(images, [""] * 3)
    assert total.tolist() == [-1, 1, 2]  # not clamped: the paper's darkness passes 1
    assert parts["brightness"] is total
    assert PixelReward("darkness")(images, [""] * 3)[0].tolist() == [1, -1, -2]


def test_a_saturated_image_still_feels_its_reward():
    images = torch.full((1, 3, 4, 4), 1.2, requires_grad=True)
    PixelReward("brightness")(images, [""])[0].sum().backward()
    assert (images.grad > 0).all()


@pytest.mark.parametrize("measure", ["brightness", "darkness"])
def test_gradcheck_pixels(measure):
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    reward = PixelReward(measure)
    # The sum runs in float32, as norms and means do: a looser step.
    assert torch.autograd.gradcheck(lambda x: reward.score(x, ["", ""]), images, eps=1e-3, atol=1e-3)


def test_unknown_measure():
    with pytest.raises(ValueError, match="is not one of brightness, darkness"):
        PixelReward("shine")


def test_preprocessing_is_torchvisions():
    from torchvision.transforms.v2 import functional as T

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    for shape in ((3, 96, 128), (3, 128, 128), (3, 130, 97)):
        image = torch.rand(1, *shape)
        expected = T.resize(image, [64], T.InterpolationMode.BICUBIC, antialias=True)
        expected = T.normalize(T.center_crop(expected, [64, 64]), list(mean), list(std))
        torch.testing.assert_close(preprocess(image, 64, mean, std), expected, atol=1e-4, rtol=0)


class ToyCLIP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image = torch.nn.Linear(3 * 64, 5)
        self.text = torch.nn.Embedding(300, 5)
        self.texts = 0

    def encode_image(self, x):
        return self.image(x.flatten(1))

    def encode_text(self, ids):
        self.texts += 1
        return self.text(ids).sum(1)


def toy_score():
    clip = ToyCLIP()
    reward = CLIPScore(
        clip, lambda texts: torch.tensor([[len(t), ord(t[0])] for t in texts]), 8, (0.5,) * 3, (0.5,) * 3
    )
    return clip, reward


def test_clip_score_is_a_cosine_per_image_and_prompts_are_encoded_once():
    clip, reward = toy_score()
    images = torch.rand(2, 3, 8, 8)
    scores = reward.score(images, ["a", "bb"])
    for i, text in enumerate(("a", "bb")):
        a = clip.encode_image((images[i : i + 1] - 0.5) / 0.5)
        b = clip.text(torch.tensor([[len(text), ord(text[0])]])).sum(1)
        assert scores[i].item() == pytest.approx(100 * torch.cosine_similarity(a, b).item(), rel=1e-5)
    reward.score(images, ["a", "bb"])
    assert clip.texts == 1
    reward.score(images, ["a", "c"])
    assert clip.texts == 2


def test_clip_score_has_a_gradient_for_every_pixel():
    _, reward = toy_score()
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    reward.score(images, ["a"]).sum().backward()
    assert (images.grad != 0).float().mean() > 0.95


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
