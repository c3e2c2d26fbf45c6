"""The spectra of the benchmark's whitened gradients."""

from __future__ import annotations

import torch

from bench.spectral import Whitened, whiten


def ring_power(x: torch.Tensor) -> list[float]:
    power = torch.fft.fft2(x.double()).abs().square().mean(0)
    at = torch.fft.fftfreq(16) * 16
    ring = torch.hypot(at[:, None], at[None]).round()
    return [power[ring == r].mean().item() for r in range(1, 12)]


def test_every_ring_has_the_power_of_every_other():
    g = torch.Generator().manual_seed(0)
    smooth = torch.randn(2, 4, 16, 16, generator=g).cumsum(-1).cumsum(-2) * 1e-6
    before, after = ring_power(smooth[0]), ring_power(whiten(smooth)[0])
    assert max(before) > 100 * min(before)
    assert max(after) < 1.001 * min(after)
    torch.testing.assert_close(whiten(smooth).flatten(1).std(1), torch.ones(2), rtol=1e-4, atol=0)
    torch.testing.assert_close(whiten(smooth * 1e3), whiten(smooth), rtol=1e-3, atol=1e-4)


def test_an_image_that_is_left_alone_stays():
    z = torch.zeros(2, 4, 16, 16, requires_grad=True)
    z.grad = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    z.grad[1] = 0
    Whitened([z], 0.1).step()
    assert z[1].eq(0).all() and abs(z[0].std().item() - 0.1) < 1e-3
