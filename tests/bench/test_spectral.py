"""Optimisation along whitened gradients, a variant of the restart study."""

from __future__ import annotations

import torch

from bench.spectral import Whitened


def test_an_image_that_is_left_alone_stays():
    z = torch.zeros(2, 4, 16, 16, requires_grad=True)
    z.grad = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    z.grad[1] = 0
    Whitened([z], 0.1).step()
    assert z[1].eq(0).all() and abs(z[0].std().item() - 0.1) < 1e-3
