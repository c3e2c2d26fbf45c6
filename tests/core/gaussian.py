"""Problems with known answers: a Gaussian denoiser and samplers written out from their formulas."""

from __future__ import annotations

import itertools

import torch
from mira.sampler.rollout import Rollout

SHAPE = (3, 2, 2)


def denoiser(mean: float = 0.0, std: float = 1.0):
    """E[x0 | x] for data N(mean, std^2): exact."""

    def D(x, sigma):
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)

    return D


def ancestral(D, schedule):
    """k-diffusion's euler_ancestral, eta = 1, as a `Sample`."""

    chain = Chain(D, schedule)
    return lambda z_T, source, wrap: chain.segment(chain.start(z_T), 0, len(schedule) - 1, source, wrap)


def ddim(D, schedule):
    """DDIM with eta = 1 in variance-preserving coordinates (arXiv 2010.02502, Eq. 12), as a `Sample`."""

    def sample(z_T, source, wrap):
        model = wrap(D)
        abar = 1 / (1 + schedule**2)
        y = z_T * 1.0
        for i in range(len(schedule) - 1):
            a, b = abar[i], abar[i + 1]
            x = y / a.sqrt()
            x0 = model(x, schedule[i] * x.new_ones(len(x)))
            eps = (y - a.sqrt() * x0) / (1 - a).sqrt()
            sigma = ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
            y = b.sqrt() * x0 + (1 - b - sigma**2).clamp(min=0).sqrt() * eps
            if b < 1:
                y = y + sigma * source(lambda x=x: torch.randn_like(x))
        return y

    return sample


def schedule(steps: int = 6) -> torch.Tensor:
    return torch.cat([torch.linspace(2.3, -2, steps, dtype=torch.float64).exp(), torch.zeros(1, dtype=torch.float64)])


def rollout(steps: int = 6, memory: str = "none", D=None, **kwargs) -> Rollout:
    s = schedule(steps)
    return Rollout(ancestral(D or denoiser(), s), s, memory=memory, **kwargs)


def noises(steps: int = 6, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *SHAPE, dtype=torch.float64, generator=g) for _ in range(steps)]


class Chain:
    """`ancestral` in pieces, as `particles.Chain`; without noise in between, Euler's method."""

    def __init__(self, D, schedule, injects=True):
        self.D, self.schedule, self.injects = D, schedule, injects

    def of(self, z_T):
        return self

    def start(self, z_T):
        return z_T * (1 + self.schedule[0] ** 2).sqrt()

    def denoise(self, x, sigma):
        return self.D(x, sigma)

    def segment(self, x, i, j, source, wrap):
        part = self.schedule[i : j + 1]
        model, ones = wrap(self.D), x.new_ones(len(x))
        for s, t in itertools.pairwise(part):
            denoised = model(x, s * ones)
            if t == 0:
                return denoised
            up = (t**2 * (s**2 - t**2) / s**2).sqrt() * self.injects
            down = (t**2 - up**2).sqrt()
            x = x + (x - denoised) / s * (down - s)
            if self.injects:
                x = x + up * source(lambda x=x: torch.randn_like(x))
        return x


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = torch.where(gradient.abs() < 1e-6, 0, gradient)
        return torch.where(gradient.abs() > 100, torch.inf, gradient)


def narrow(f):
    """f, in whose backward there is no room for a gradient above 100 or below 1e-6, as if in a narrower float16."""
    return lambda *arguments: _Narrow.apply(f(*arguments))


def mixture_denoiser(modes=(-1.5, 1.5), std: float = 0.5):
    """E[x0 | x] for an equal mixture of N(m, std^2), one dimension: exact."""

    def D(x, sigma):
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        total = std**2 + sigma**2
        logits = torch.stack([-((x - m) ** 2) / (2 * total) for m in modes])
        means = torch.stack([(std**2 * x + sigma**2 * m) / total for m in modes])
        return (logits.softmax(0) * means).sum(0)

    return D
