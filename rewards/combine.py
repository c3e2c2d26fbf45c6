"""A weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Facts, Reward


class WeightedSum(Reward):
    """sum_i w_i r_i; every part stays in the record, in its own units. A negative weight asks for less of it."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]):
        if not rewards or len(rewards) != len(weights):
            raise ValueError(f"a weighted sum needs one weight per reward (got {len(rewards)} and {len(weights)})")
        self.rewards, self.weights = tuple(rewards), tuple(weights)
        self.modules = tuple(dict.fromkeys(m for r in rewards for m in r.modules))
        facts = [r.facts for r in rewards]
        ends = [sorted((w * f.low, w * f.high)) for w, f in zip(weights, facts, strict=True)]
        usual = [sorted((w * f.typical[0], w * f.typical[1])) for w, f in zip(weights, facts, strict=True)]
        self.facts = Facts(
            " + ".join(f"{w:g} {f.name}" for w, f in zip(weights, facts, strict=True)),
            sum(e[0] for e in ends),
            sum(e[1] for e in ends),
            (sum(u[0] for u in usual), sum(u[1] for u in usual)),
            all(f.differentiable for f in facts),
            any(f.needs_prompt for f in facts),
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = 0.0, {}
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            score, inner = reward(images, prompts)
            total = weight * score.to(images.device) + total
            for name, part in inner.items():
                number = sum(key == name or key.startswith(f"{name} #") for key in parts)
                parts[f"{name} #{number + 1}" if number else name] = part
        return total, parts
