"""The random generators of torch that a network may draw from without being asked to."""

from __future__ import annotations

from typing import Any

import comfy.sample
import torch
from torch import Tensor


def seed_generators(latent: Tensor, seed: int, batch_index: Any = None) -> None:
    """As whoever makes the noise of a seed for latents (B, C, ...) leaves them, from which patches draw then (token
    merging, tiling).
    """
    comfy.sample.prepare_noise(latent, seed, batch_index)


def random_state(device: torch.device) -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def same_state(a: tuple, b: tuple) -> bool:
    return all(x is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


class RandomState:
    """A context in which torch's global generators go on from a given state, and forget it afterwards."""

    def __init__(self, state: tuple, device: torch.device) -> None:
        self.state, self.device = state, device

    def _set(self, state: tuple) -> None:
        cpu, cuda = state
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)

    def __enter__(self) -> None:
        self.before = random_state(self.device)
        self._set(self.state)

    def __exit__(self, *_: Any) -> None:
        self._set(self.before)
