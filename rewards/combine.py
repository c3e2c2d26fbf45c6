"""Rewards made of rewards: a weighted sum, a difference of two prompts, and a mean over random crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Facts, Reward
from .preprocess import resample

# ReNO's composite (arXiv 2406.04312): the weights of its losses, by the names of the rewards.
RENO = {"HPSv2.1": 5.0, "ImageReward": 1.0, "CLIPScore": 0.01, "PickScore": 0.05}
SCALINGS = ("by typical range", "raw", "ReNO")


def scaled(rewards: Sequence[Reward], weights: Sequence[float], scaling: str) -> list[float]:
    """The factor of every reward's raw score. scaling: one of `SCALINGS`.

    "by typical range": a weight of 1 counts the width of a reward's typical range as 1. "ReNO": its own weights.
    Raises ValueError for a reward that ReNO's composite does not have.
    """
    if scaling == "raw":
        return list(weights)
    if scaling == "by typical range":
        return [w / (r.facts.typical[1] - r.facts.typical[0]) for r, w in zip(rewards, weights, strict=True)]
    unknown = [r.facts.name for r in rewards if r.facts.name not in RENO]
    if unknown:
        raise ValueError(
            f"ReNO's composite has no {', '.join(unknown)}: it is made of {', '.join(RENO)}; connect those, or choose "
            "another scaling"
        )
    return [RENO[r.facts.name] * w for r, w in zip(rewards, weights, strict=True)]


class WeightedSum(Reward):
    """sum_i w_i r_i; every part stays in the record, in its own units. A negative weight asks for less of it, and one
    of 0 only looks: such a part need not be differentiable.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        if not rewards or len(rewards) != len(weights):
            raise ValueError(f"a weighted sum needs one weight per reward (got {len(rewards)} and {len(weights)})")
        self.rewards, self.weights = tuple(rewards), tuple(weights)
        self.modules = tuple(dict.fromkeys(m for r in rewards for m in r.modules))
        facts = [r.facts for r in rewards]
        ends = [sorted((w * f.low, w * f.high)) for w, f in zip(weights, facts, strict=True) if w]
        usual = [sorted((w * f.typical[0], w * f.typical[1])) for w, f in zip(weights, facts, strict=True)]
        self.facts = Facts(
            " + ".join(f"{w:.3g} {f.name}" for w, f in zip(weights, facts, strict=True)),
            sum(e[0] for e in ends),
            sum(e[1] for e in ends),
            (sum(u[0] for u in usual), sum(u[1] for u in usual)),
            all(f.differentiable for w, f in zip(weights, facts, strict=True) if w),
            any(f.needs_prompt for f in facts),
            "each its own",
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        total: Tensor | float = 0.0
        parts: dict[str, Tensor] = {}
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                score, inner = reward(images, prompts)
            if weight:
                total = weight * score.to(images.device) + total
            for name, part in inner.items():
                number = sum(key == name or key.startswith(f"{name} #") for key in parts)
                parts[f"{name} #{number + 1}" if number else name] = part
        return torch.as_tensor(total), parts

    def evaluation(self, number: int) -> None:
        for reward in self.rewards:
            reward.evaluation(number)

    def unfit(self, count: int) -> str | None:
        return next(filter(None, (r.unfit(count) for r in self.rewards)), None)

    def notices(self, prompts: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(notice for r in self.rewards for notice in r.notices(prompts)))


class Relative(Reward):
    """r(image, prompt + wanted) - r(image, prompt + unwanted): what a scorer likes in any image cancels, and what is
    left is the words' difference (semantic relative preference, arXiv 2509.06942, Section 3.2).

    Raises ValueError for a reward that reads no prompt, and where both words are the same.
    """

    def __init__(self, reward: Reward, wanted: str, unwanted: str) -> None:
        facts = reward.facts
        if not facts.needs_prompt:
            raise ValueError(f"reward {facts.name!r} does not read the prompt, so words make no difference to it")
        if wanted.strip() == unwanted.strip():
            raise ValueError(f"wanted and unwanted are both {wanted.strip()!r}: give other words to one of them")
        self.reward, self.wanted, self.unwanted = reward, wanted.strip(), unwanted.strip()
        self.modules = reward.modules
        width = facts.high - facts.low
        usual = (facts.typical[1] - facts.typical[0]) / 2
        self.facts = Facts(
            f"{facts.name}, relative", -width, width, (-usual, usual), facts.differentiable, True, facts.preprocessing
        )

    def prompts(self, prompts: Sequence[str], words: str) -> list[str]:
        return [", ".join(filter(None, (prompt.strip(), words))) for prompt in prompts]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        texts = [self.prompts(prompts, self.wanted), self.prompts(prompts, self.unwanted)]
        liked, disliked = self.reward.several(images, texts)
        name = self.reward.facts.name
        return liked - disliked, {f"{name} wanted": liked, f"{name} unwanted": disliked}

    def evaluation(self, number: int) -> None:
        self.reward.evaluation(number)

    def unfit(self, count: int) -> str | None:
        return self.reward.unfit(count)

    def notices(self, prompts: Sequence[str]) -> list[str]:
        both = self.prompts(prompts, self.wanted) + self.prompts(prompts, self.unwanted)
        return self.reward.notices(both)


class Augmented(Reward):
    """The mean score of random crops and mirror images: patterns that only work at one alignment stop paying.

    crops: how many each time. smallest: the least side of a crop, as a share of the image's. Every evaluation of a run
    draws anew, from stream(number of the evaluation); all images of a batch share the crops.
    """

    def __init__(
        self, reward: Reward, crops: int, smallest: float, flip: bool, stream: Callable[[int], torch.Generator]
    ) -> None:
        if crops < 1 or not 0 < smallest <= 1:
            raise ValueError(f"crops must be 1 or more and the smallest side in (0, 1] (got {crops} and {smallest})")
        self.reward, self.crops, self.smallest, self.flip, self.stream = reward, crops, smallest, flip, stream
        self.facts, self.modules = reward.facts, reward.modules
        self.number = 0

    def evaluation(self, number: int) -> None:
        self.number = number
        self.reward.evaluation(number)

    def unfit(self, count: int) -> str | None:
        return self.reward.unfit(count)

    def notices(self, prompts: Sequence[str]) -> list[str]:
        return self.reward.notices(prompts)

    def several(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        scores = [self.reward.several(view, texts) for view in self.views(images)]
        return [torch.stack(of_one).mean(0) for of_one in zip(*scores, strict=True)]

    def views(self, images: Tensor) -> list[Tensor]:
        g = self.stream(self.number)
        height, width = images.shape[-2:]
        views = []
        for _ in range(self.crops):
            share, top, left, mirror = torch.rand(4, generator=g).tolist()
            share = self.smallest + (1 - self.smallest) * share
            h, w = max(1, round(height * share)), max(1, round(width * share))
            top, left = round(top * (height - h)), round(left * (width - w))
            view = images[..., top : top + h, left : left + w]
            if (h, w) != (height, width):
                view = resample(view, (height, width), "bilinear")
            views.append(view.flip(-1) if self.flip and mirror < 0.5 else view)
        return views

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        scores = [self.reward(view, prompts) for view in self.views(images)]
        total = torch.stack([s for s, _ in scores]).mean(0)
        return total, {name: torch.stack([p[name] for _, p in scores]).mean(0) for name in scores[0][1]}
