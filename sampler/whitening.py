"""A direction as noise would have it: as strong at every spatial frequency."""

from __future__ import annotations

import torch
from torch import Tensor

from .rollout import per_image


def whiten(direction: Tensor) -> Tensor:
    """(B, C, H, W) -> the same shape: each ring of spatial frequencies with the same mean power, each image with a
    variance of 1; still uphill, as no frequency changes its phase. What is 0 everywhere stays 0.

    Rewards' gradients are strong at low frequencies, and a network answers to such "noise" with flat, saturated images
    (after the whitening operator of NTRK, arXiv 2606.18066; rings of a frequency each are our reading).
    """
    h, w = direction.shape[-2:]
    spectrum = torch.fft.fft2(direction.float())
    frequency = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.fftfreq(w)[None])
    ring = (frequency * max(h, w)).round().long().to(direction.device)
    power = spectrum.abs().square().mean(1)  # over channels, (B, H, W)
    count = torch.bincount(ring.flatten()).clamp(min=1)
    mean = power.new_zeros(len(power), len(count)).index_add(1, ring.flatten(), power.flatten(1)) / count
    # Relative to the image's own: a gradient may be of any size, and a ring without any power has nothing to raise.
    least = mean.amax(1, keepdim=True) * 1e-12
    factor = torch.where(mean > least, mean.clamp(min=torch.finfo(mean.dtype).tiny).rsqrt(), 0)
    white = torch.fft.ifft2(spectrum * factor[:, ring][:, None]).real
    deviation = white.flatten(1).std(1, correction=0)
    return (white / per_image(torch.where(deviation > 0, deviation, 1), white)).to(direction)
