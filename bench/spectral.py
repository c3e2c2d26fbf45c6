"""Two rivals that shape a gradient's spectrum, as variants of the restart study (`python dev.py bench restart`).

whitened: noise optimisation whose gradient has the same power at every spatial frequency, as noise has (after gradient
preconditioning, arXiv 2602.08646). ntrk: one trajectory, in which a share of every injected noise is the whitened
gradient of the prediction's reward (after NTRK, arXiv 2606.18066); no optimisation, and one backward pass a step.
Both are ours to read: the papers' code is not here.
"""

from __future__ import annotations

import math

import torch

from testing.pack import mira

optimize, search = mira("sampler.optimize"), mira("sampler.search")
steering, per_image = mira("sampler.steering"), mira("sampler.rollout").per_image
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of an injected noise, that the reward chooses


def whiten(g: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W): every ring of spatial frequencies gets the same mean power, and each image a variance of 1."""
    h, w = g.shape[-2:]
    spectrum = torch.fft.fft2(g.float())
    ring = torch.hypot(torch.fft.fftfreq(h)[:, None] * h, torch.fft.fftfreq(w)[None] * w).round().long().to(g.device)
    power = spectrum.abs().square().mean(1)  # over channels, (B, H, W)
    count = torch.zeros(int(ring.max()) + 1, device=g.device).index_add_(
        0, ring.flatten(), torch.ones_like(power[0]).flatten()
    )
    mean = power.new_zeros(len(g), len(count)).index_add_(1, ring.flatten(), power.flatten(1)) / count
    white = torch.fft.ifft2(spectrum / mean[:, ring].clamp(min=1e-20).sqrt()[:, None]).real
    return (white / per_image(white.flatten(1).std(1).clamp(min=1e-20), white)).to(g)


class Whitened(torch.optim.SGD):
    """SGD with momentum along the whitened gradient: lr is in units of the noise's deviation."""

    def __init__(self, z: list[torch.Tensor], lr: float):
        super().__init__(z, lr=lr, momentum=0.9, dampening=0.9)

    @torch.no_grad()
    def step(self) -> None:
        for z in self.param_groups[0]["params"]:
            z.grad = torch.where(per_image(z.grad.flatten(1).any(1), z.grad), whiten(z.grad), z.grad)
        super().step()


def ntrk(run, settings):
    """settings.radius: the share; see `SHARES`."""
    population, share = steering.start(run), settings.radius
    schedule = run.rollout.schedule
    for i in range(run.steps):
        population.x0, gradient, _ = run.gradient(population.x, schedule[i], settings.loss_scale)
        wanted = torch.stack([whiten(g) for g in gradient])

        def drawn(some, call, like, wanted=wanted):
            return math.sqrt(1 - share**2) * run.fresh(some, like) + share * wanted[list(some)].to(like)

        run.advance(population, i, i + 1, drawn, population.x0)
    reward, parts, images = run.score(population.x)
    run.report(1, population, reward, parts, images, True)
    return population.x, torch.zeros(run.count, run.batch)


def register() -> None:
    """Not at import: the pack's own tables are to stay what they are for whoever else is in this process."""
    optimize.OPTIMIZERS["whitened"] = Whitened
    search.METHODS["ntrk"] = search.Method(ntrk, gradient=True, steers=True)
