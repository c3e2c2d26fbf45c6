"""Statistics of noises and of sets of images, by which drift is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def noise_statistics(noises: Sequence[Tensor]) -> dict[str, list[float]]:
    """Of each image's whole trajectory, z (B, C, ...) each: norm over its expectation, mean, deviation, skewness,
    excess kurtosis, and spectral whiteness: the deviation of the radial power spectrum from flat, relative.

    See `expected` for what noise that is still N(0, I) gives.
    """
    z = torch.cat([n.detach().float().flatten(1) for n in noises], 1)
    centred = z - z.mean(1, keepdim=True)
    deviation = centred.square().mean(1).sqrt().clamp(min=1e-12)
    unit = centred / deviation[:, None]
    values = {
        "norm": z.norm(dim=1) / z.shape[1] ** 0.5,
        "mean": z.mean(1),
        "deviation": deviation,
        "skewness": unit.pow(3).mean(1),
        "kurtosis": unit.pow(4).mean(1) - 3,
        "whiteness": torch.stack([spectrum(n) for n in noises]).mean(0).sub(1).square().mean(1).sqrt(),
    }
    return {name: v.cpu().double().tolist() for name, v in values.items()}


def rings(height: int, width: int) -> Tensor:
    """The octave of every frequency, (height, width), 0 for the lowest; the mean itself counts to it."""
    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    radius = (fy.square() + fx.square()).sqrt().clamp(min=1e-6)
    octaves = max(1, int(math.log2(max(2, min(height, width)))))
    return (octaves + torch.log2(radius * 2)).floor().clamp(0, octaves - 1).long()


def spectrum(noise: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, octaves): mean power of every octave over that of N(0, 1); all 1 for white noise."""
    power = torch.fft.fft2(noise.detach().float()).abs().square().mean(1) / (noise.shape[-1] * noise.shape[-2])
    ring = rings(*noise.shape[-2:]).to(power.device)
    count = int(ring.max()) + 1
    sums = power.new_zeros(len(power), count).index_add(1, ring.flatten(), power.flatten(1))
    return sums / torch.bincount(ring.flatten(), minlength=count).to(sums)


def expected(noises: Sequence[Tensor], sigmas: float = 3.0) -> dict[str, tuple[float, float]]:
    """The range of every statistic under N(0, I), by its standard error; whiteness by drawing noise of these shapes."""
    n = sum(z[0].numel() for z in noises)
    spread = {"norm": (1, (1 / (2 * n)) ** 0.5), "mean": (0, n**-0.5), "deviation": (1, (1 / (2 * n)) ** 0.5)}
    spread |= {"skewness": (0, (6 / n) ** 0.5), "kurtosis": (0, (24 / n) ** 0.5)}
    out = {name: (middle - sigmas * error, middle + sigmas * error) for name, (middle, error) in spread.items()}
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(12, *z.shape[1:], generator=g) for z in noises]
    white = torch.tensor(noise_statistics(drawn)["whiteness"])
    return out | {"whiteness": (0.0, (white.mean() + sigmas * white.std()).item())}


def cmmd(x: Tensor, y: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CLIP maximum mean discrepancy (arXiv 2401.09603): the biased MMD^2 with a Gaussian kernel, times `scale`.

    x (N, D), y (M, D): embeddings of unit length. Raises ValueError for fewer than two on a side.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"CMMD compares two sets of images, but has {len(x)} and {len(y)}: give at least 2 of each")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * sigma**2)).mean()

    x, y = x.double(), y.double()
    return (scale * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))).item()


def spectral_distance(x: Tensor, y: Tensor) -> float:
    """How differently two sets of embeddings vary, x (N, D) against y (M, D); 0: alike, 1: the images of x are one.

    The distance of the eigenvalues of the sets' covariances, each in order, over their norm in y (our reading of the
    diversity measure of Annealed Importance Guidance, arXiv 2409.06493). A set that has moved as a whole has not
    changed: that is what `cmmd` sees. Spectra depend on how many images they are of, so only the first min(N, M) of
    each count. NaN for a y whose images are all the same. Raises ValueError for fewer than three.
    """
    n = min(len(x), len(y))
    if n < 3:
        raise ValueError(f"the variety of {len(x)} and {len(y)} image(s) cannot be compared: give at least 3 of each")

    def eigenvalues(a: Tensor) -> Tensor:
        return torch.linalg.svdvals(a[:n].double() - a[:n].double().mean(0)).square() / (n - 1)

    mine, theirs = eigenvalues(x), eigenvalues(y)
    return ((mine - theirs).norm() / theirs.norm()).item() if theirs.any() else math.nan


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (drift, reward) points that no other beats in both: less drift and more reward."""
    front, best = [], -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        drift, reward = points[i]
        if math.isfinite(drift) and math.isfinite(reward) and reward > best:
            front.append(i)
            best = reward
    return front


def spread(embeddings: Tensor) -> Tensor:
    """(N, D) of unit length -> (N,): the mean distance of each to the others."""
    if len(embeddings) < 3:
        raise ValueError(f"the spread of {len(embeddings)} image(s) says nothing: give 3 or more")
    distances = torch.cdist(embeddings.double(), embeddings.double())
    return distances.sum(1) / (len(embeddings) - 1)
