"""Noise optimisation whose gradient has the same power at every spatial frequency, as noise has (after gradient
preconditioning, arXiv 2602.08646; ours to read, as the paper's code is not here): a variant of the restart study
(`python dev.py bench restart --only whitened`).
"""

from __future__ import annotations

import torch

from testing.pack import mira

optimize, per_image = mira("sampler.optimize"), mira("sampler.rollout").per_image
whiten = mira("sampler.whitening").whiten


class Whitened(torch.optim.SGD):
    """SGD with momentum along the whitened gradient: lr is in units of the noise's deviation."""

    def __init__(self, z: list[torch.Tensor], lr: float):
        super().__init__(z, lr=lr, momentum=0.9, dampening=0.9)

    @torch.no_grad()
    def step(self) -> None:
        for z in self.param_groups[0]["params"]:
            z.grad = torch.where(per_image(z.grad.flatten(1).any(1), z.grad), whiten(z.grad), z.grad)
        super().step()


def register() -> None:
    """Not at import: the pack's own tables are to stay what they are for whoever else is in this process."""
    optimize.OPTIMIZERS["whitened"] = Whitened
