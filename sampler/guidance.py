"""Guidance by a second model or by a reward, as functions of predictions."""

from __future__ import annotations

from torch import Tensor

from .rollout import per_image


def blend(base: Tensor, tuned: Tensor, weight: Tensor | float) -> Tensor:
    """Reinforcement Learning Guidance: base + w (tuned - base), of any prediction that is affine in the other ones.

    1 is the tuned model, above 1 goes beyond it, between 0 and 1 lies between both.
    """
    return base + weight * (tuned - base)


def anneal(weight: float, noise: Tensor, power: float = 1.0) -> Tensor:
    """Annealed Importance Guidance: the blend's weight at a share of the noise schedule, 1 at its start, 0 at its end.

    The base model paints what is decided at high noise, the tuned one what is decided at low noise.
    """
    return weight * (1 - noise.clamp(0, 1)) ** power


def lean(denoised: Tensor, gradient: Tensor, contrast: Tensor, scale: float) -> Tensor:
    """DyMO's preference term (arXiv 2412.00759): a step along the reward's gradient, `scale` times as long as the
    difference of the conditional and the unconditional prediction, `contrast`. All (B, C, ...).

    Deviates from the authors' code, which takes the step after the sampler's: here it belongs to the prediction, so
    that it works with every sampler.
    """
    length = contrast.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1).clamp(min=1e-20)
    return denoised + scale * per_image(length, gradient).to(denoised) * gradient.to(denoised)


def within(noise: Tensor, start: float, end: float) -> Tensor:
    """Whether a share of the noise schedule (1 at the start) lies in [start, end], counted as progress from 0 to 1."""
    progress = 1 - noise
    return (progress >= start - 1e-6) & (progress <= end + 1e-6)
