"""What methods that learn from preferences are made of: candidates, their energies, and steps along noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rollout import Path, Rollout, per_image
from .seeds import fresh
from .surrogates import SURROGATES, Surrogate

if TYPE_CHECKING:
    from .preference import PreferenceSettings


def mira_reversed(path: Path, reference: Path) -> Tensor:
    """S(z) - S(z0): the published sign turned round."""
    return -SURROGATES["mira"](path, reference)


def mira_two_sided(path: Path, reference: Path) -> Tensor:
    """Minus the two-sided departure of the score energy: winners stay near their reference, losers are driven off."""
    return -SURROGATES["mira_two_sided"](path, reference)


# R of the loss -log sigmoid(beta (R_winner - R_loser)); "mira" is Algorithm 2 to the letter, R = S(z0) - S(z).
ENERGIES: dict[str, Surrogate] = {
    "mira": SURROGATES["mira"],
    "mira_reversed": mira_reversed,
    "mira_two_sided": mira_two_sided,
}


@dataclass
class Candidate:
    """One image of each of the batch, from its noises. gradients: of the energy R, or of what the method follows."""

    noises: list[Tensor]
    path: Path
    images: Tensor
    energy: Tensor
    gradients: list[Tensor] | None = None


@dataclass
class Run:
    """What every method works with. render: latents -> images, differentiable where grad mode is on."""

    rollout: Rollout
    render: Callable[[Tensor], Tensor]
    settings: PreferenceSettings
    generator: torch.Generator
    evaluations: int = 0  # runs of the sampler, forward
    backwards: int = 0

    def fresh(self, like: Sequence[Tensor]) -> list[Tensor]:
        return fresh(like, self.generator)

    def look(self, noises: Sequence[Tensor], reference: Path | None, gradient: bool) -> Candidate:
        """Generate from `noises`; `reference` None: this is the reference. gradient: of the energy, for every noise."""
        z = [n.detach().requires_grad_(gradient) for n in noises]
        with torch.set_grad_enabled(gradient):
            path = self.rollout(z)
            energy = ENERGIES[self.settings.energy](path, reference or path.detach())
        self.evaluations += 1
        gradients = None
        if gradient:
            self.backwards += 1
            scale = self.settings.loss_scale
            found = torch.autograd.grad(energy.sum() * scale, z, allow_unused=True)
            gradients = [torch.zeros_like(n) if g is None else g / scale for g, n in zip(found, z, strict=True)]
        with torch.no_grad():
            images = self.render(path.x0.detach())
        return Candidate([n.detach() for n in z], path.detach(), images, energy.detach(), gradients)


def towards(noises: Sequence[Tensor], direction: Sequence[Tensor], share: float) -> list[Tensor]:
    """A step from `noises` along independent noise that stays where noise of this size lives: the variance is kept."""
    keep = math.sqrt(1 - share**2)
    return [keep * z + share * d for z, d in zip(noises, direction, strict=True)]


def clipped(gradients: list[Tensor], norm: float) -> tuple[list[Tensor], Tensor]:
    size = torch.stack([g.float().flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    if not norm:
        return gradients, size
    scale = (norm / size.clamp(min=1e-12)).clamp(max=1)
    return [g * per_image(scale.to(g), g) for g in gradients], size


def picked(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """Of several (B, ...) the one that each image of the batch has at `index` (B,)."""
    stacked = torch.stack(tuple(tensors), 1)
    return stacked[torch.arange(len(index), device=stacked.device), index.to(stacked.device)]


def pick_path(paths: Sequence[Path], index: Tensor) -> Path:
    """The path that each image of the batch has at `index` (B,)."""
    return replace(
        paths[0],
        x0=picked([p.x0 for p in paths], index),
        noises=tuple(picked(z, index) for z in zip(*(p.noises for p in paths), strict=True)),
        eps=tuple(picked(e, index) for e in zip(*(p.eps for p in paths), strict=True)),
    )


def pick(found: list[Candidate], index: Tensor) -> Candidate:
    """The candidate that each image of the batch has at `index` (B,)."""
    path = pick_path([c.path for c in found], index)
    images, energy = picked([c.images for c in found], index), picked([c.energy for c in found], index)
    return Candidate(list(path.noises), path, images, energy)
