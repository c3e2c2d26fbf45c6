"""Surrogates of the drift from the frozen model, each a function of a path and its reference, (B,).

`reference` is the path of the unchanged noises z0. Norms are means over latent elements, so a value does not
depend on the resolution. All are 0 at z = z0. The reference path holds no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .rollout import Path, mean_square, total

Surrogate = Callable[[Path, Path], Tensor]


def energies(path: Path) -> Tensor:
    """w_t ||s(x_t)||^2 of every denoiser call, (T, B)."""
    return torch.stack([w * mean_square(e, path.mask) for e, w in zip(path.eps, path.weights, strict=True)])


def mira(path: Path, reference: Path) -> Tensor:
    """S(z0) - S(z), MIRA Eq. 4 (arXiv 2510.01549), with the published sign."""
    return (energies(reference) - energies(path)).sum(0)


def mira_two_sided(path: Path, reference: Path) -> Tensor:
    """sum_t |S_t(z) - S_t(z0)|: any departure of the score energy from the reference trajectory's."""
    return (energies(path) - energies(reference)).abs().sum(0)


def score_distance(path: Path, reference: Path) -> Tensor:
    """sum_t w_t ||eps_hat(x_t(z)) - eps_hat(x_t(z0))||^2."""
    terms = zip(path.eps, reference.eps, path.weights, strict=True)
    return total(w * mean_square(e - e0, path.mask) for e, e0, w in terms)


def path_kl(path: Path, reference: Path) -> Tensor:
    """1/2 sum_t ||z_t - z0_t||^2: the KL between the two Gaussian paths given their noises.

    >>> def at(*noises):
    ...     return Path(torch.zeros(1, 4), tuple(torch.full((1, 4), z) for z in noises), (), (), ())
    >>> path_kl(at(0.5, 1.0), at(0.0, 1.0))
    tensor([0.1250])
    """
    return total(mean_square(z - z0, path.mask) for z, z0 in zip(path.noises, reference.noises, strict=True)) / 2


def latent_distance(path: Path, reference: Path) -> Tensor:
    """||x0(z) - x0(z0)||^2."""
    return mean_square(path.x0 - reference.x0, path.mask)


def none(path: Path, reference: Path) -> Tensor:
    """Plain noise optimisation (DNO, arXiv 2405.18881)."""
    return path.x0.new_zeros(len(path.x0), dtype=torch.float32)


# Logged at every iteration, whichever is in the loss.
SURROGATES: dict[str, Surrogate] = {
    f.__name__: f for f in (mira, mira_two_sided, score_distance, path_kl, latent_distance)
}


def _prno_log_p(rows: Tensor) -> Tensor:
    """rows (P, m, k) -> (P,): the two concentration bounds of DNO's regulariser."""
    m, k = rows.shape[1:]
    m1 = rows.mean(1).norm(dim=1)
    covariance = rows.mT @ rows / m
    m2 = torch.linalg.matrix_norm(covariance - torch.eye(k, dtype=rows.dtype, device=rows.device), 2)
    log_2 = torch.tensor(2.0, dtype=rows.dtype, device=rows.device).log()
    logp1 = torch.minimum(-m * m1**2 / (2 * k), -log_2)
    excess = ((1 + m2).sqrt() - 1 - (k / m) ** 0.5).clamp(min=0)
    return logp1 + torch.minimum(-m * excess**2 / 2, -log_2)


def prno(path: Path, reference: Path, k: int = 4, permutations: int = 100) -> Tensor:
    """DNO's probability regularisation of the noises (arXiv 2405.18881, PRNO).

    Deviates from the authors' code: the permutations are the same at every iteration, so that a run repeats.
    """
    z = torch.cat([n.flatten(1) for n in path.noises], 1)
    z = z if z.dtype == torch.float64 else z.float()
    z = z[:, : z.shape[1] // k * k]
    generator = torch.Generator().manual_seed(0)
    out = -_prno_log_p(z.unflatten(1, (-1, k)))
    mixed = torch.zeros_like(out)
    for _ in range(permutations):
        order = torch.randperm(z.shape[1], generator=generator).to(z.device)
        mixed = mixed - _prno_log_p(z[:, order].unflatten(1, (-1, k)))
    return out + mixed / permutations


def chi(path: Path, reference: Path) -> Tensor:
    """ReNO's ||z||^2 / 2 - (d - 1) log ||z|| of the initial noise, less its least value (arXiv 2406.04312).

    The negative log density of the norm of d standard normals: lowest at ||z||^2 = d - 1. A sum, not a mean over
    elements: its authors' weight is 0.01.
    """
    z = path.noises[0].flatten(1)
    z = z if z.dtype == torch.float64 else z.float()
    d = z.shape[1]
    square = z.square().sum(1)
    least = (d - 1) / 2 * (1 - torch.tensor(float(d - 1)).log().item())
    return square / 2 - (d - 1) / 2 * square.log() - least


# What may stand in the loss.
REGULARIZERS: dict[str, Surrogate] = {**SURROGATES, "prno": prno, "chi": chi, "none": none}
# Those with a gradient at z = z0 that says something: the distances are least there, prno is flat over much of what is
# likely, and chi is least where typical noise lies, so that its gradient there is the luck of the draw.
SLOPED = ["mira"]
