"""What methods that learn from preferences are made of: candidates, their energies, and steps along noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gradients import LossScale, finite
from .rollout import Path, Rollout
from .seeds import fresh
from .surrogates import SURROGATES, Surrogate
from .variables import Variables

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
    """One image of each of the batch, from its noises. gradients: of the energy R."""

    noises: list[Tensor]
    path: Path
    images: Tensor
    energy: Tensor
    gradients: list[Tensor] = field(default_factory=list)


@dataclass
class Run:
    """What every method works with. render: latents -> images, differentiable where grad mode is on."""

    rollout: Rollout
    render: Callable[[Tensor], Tensor]
    settings: PreferenceSettings
    generator: torch.Generator
    evaluations: int = 0  # runs of the sampler, forward
    backwards: int = 0
    scale: LossScale | None = None

    def fresh(self, like: Sequence[Tensor]) -> list[Tensor]:
        return fresh(like, self.generator)

    def look(self, noises: Sequence[Tensor], reference: Path | None) -> Candidate:
        """Generate from `noises`; `reference` None: this is the reference."""
        with torch.no_grad():
            path = self.rollout([n.detach() for n in noises]).detach()
        self.evaluations += 1
        return self._candidate(path, self._energy(path, reference).detach())

    def look_along(self, variables: Variables, reference: Path | None) -> Candidate:
        """`look` at the noises that these make, with the energy's gradients with respect to what is free of them."""
        path, energy, gradients = self.slope(variables, lambda path: self._energy(path, reference))
        return self._candidate(path, energy, gradients)

    def slope(self, variables: Variables, value: Callable[[Path], Tensor]) -> tuple[Path, Tensor, list[Tensor]]:
        """The path of these noises, its value (B,), and the gradients of that with respect to what is free of them."""
        if self.scale is None:
            self.scale = LossScale(self.settings.loss_scale, len(variables.start[0]))
        while True:
            with torch.enable_grad():
                path = self.rollout(variables.noises())
                found = value(path)
            gradients = self.scale.gradients(found, variables.leaves)
            self.evaluations += 1
            self.backwards += 1
            path, found = path.detach(), found.detach()
            if not self.scale.lower(torch.isfinite(found) & ~finite(gradients)):
                return path, found, gradients

    def _energy(self, path: Path, reference: Path | None) -> Tensor:
        return ENERGIES[self.settings.energy](path, reference or path.detach())

    def _candidate(self, path: Path, energy: Tensor, gradients: Sequence[Tensor] = ()) -> Candidate:
        with torch.no_grad():
            images = self.render(path.x0)
        return Candidate(list(path.noises), path, images, energy, list(gradients))


def towards(noises: Sequence[Tensor], direction: Sequence[Tensor], share: float) -> list[Tensor]:
    """A step from `noises` along independent noise that stays where noise of this size lives: the variance is kept."""
    keep = math.sqrt(1 - share**2)
    return [keep * z + share * d for z, d in zip(noises, direction, strict=True)]


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
