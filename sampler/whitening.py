"""A direction as noise would have it: as strong at every spatial frequency."""

from __future__ import annotations

import torch
from torch import Tensor

from .rollout import mean_square, per_image


def whiten(direction: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, C, ..., H, W) -> the same shape: each ring of spatial frequencies with the same mean power, each image with a
    mean square of 1, in the masked part where there is one; still uphill, as no frequency changes its phase. What is 0
    everywhere stays 0.

    Rewards' gradients are strong at low frequencies, and a network answers to such "noise" with flat, saturated images
    (after the whitening operator of NTRK, arXiv 2606.18066; rings of a frequency each are our reading).
    """
    h, w = direction.shape[-2:]
    spectrum = torch.fft.fft2(direction.float())
    frequency = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.fftfreq(w)[None])
    ring = (frequency * max(h, w)).round().long().to(direction.device)
    power = spectrum.abs().square().flatten(1, -3).mean(1)  # over channels, (B, H, W)
    count = torch.bincount(ring.flatten()).clamp(min=1)
    mean = power.new_zeros(len(power), len(count)).index_add(1, ring.flatten(), power.flatten(1)) / count
    # Relative to the image's own: a gradient may be of any size, and a ring without any power has nothing to raise.
    least = mean.amax(1, keepdim=True) * 1e-12
    factor = torch.where(mean > least, mean.clamp(min=torch.finfo(mean.dtype).tiny).rsqrt(), 0)
    factor = factor[:, ring].reshape(-1, *[1] * (direction.ndim - 3), h, w)
    white = torch.fft.ifft2(spectrum * factor).real
    size = mean_square(white, mask).sqrt()
    return (white / per_image(torch.where(size > 0, size, 1), white)).to(direction)
