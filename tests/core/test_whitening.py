"""Directions that are as strong at every spatial frequency, as noise is."""

from __future__ import annotations

import torch
from mira.sampler.statistics import spectrum
from mira.sampler.whitening import whiten


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
    torch.testing.assert_close(whiten(smooth * 1e3), whiten(smooth), rtol=1e-3, atol=1e-4)


def test_whitening_levels_every_ring_and_stays_uphill():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 24, 16, generator=g)
    smooth = x.cumsum(-1).cumsum(-2) * torch.tensor([1e-9, 1.0, 1e9])[:, None, None, None]
    white = whiten(smooth)
    torch.testing.assert_close(white.flatten(1).square().mean(1), torch.ones(3))
    torch.testing.assert_close(spectrum(white), torch.ones(3, 4), atol=0.2, rtol=0)
    assert spectrum(smooth)[1].max() > 100 * spectrum(smooth)[1].min()
    assert all((white * smooth).flatten(1).sum(1) > 0)
    cosine = torch.nn.functional.cosine_similarity(whiten(x).flatten(1), x.flatten(1))
    assert cosine.min() > 0.95  # noise is white already
    assert not whiten(torch.zeros(1, 2, 8, 8)).any()
    torch.testing.assert_close(whiten(smooth[:, :, None])[:, :, 0], white)  # an image as a video of one frame


def test_whitening_measures_what_is_painted():
    """A gradient lives there alone, and what is kept is painted over."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :4, :4] = 1
    g = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * mask
    inside = whiten(g, mask)[..., :4, :4]
    torch.testing.assert_close(inside.flatten(1).square().mean(1), torch.ones(2))
