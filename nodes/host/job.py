"""What is to be done, in ComfyUI's own types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...rewards.base import Reward
from ...sampler.optimize import Settings
from ...sampler.preference import PreferenceSettings
from ...sampler.resume import Left
from ...sampler.search import SearchSettings

INTERRUPTS = (comfy.model_management.InterruptProcessingException,)
SCALES = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of an empty latent that was made for another model


def samples_of(model: ModelPatcher, latent: dict) -> Tensor:
    """The latents as the model works on them, as KSampler finds them: an empty one has no channels of its own."""
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    scales = {name: latent.get(name) for name in SCALES if name in known}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **scales)


@dataclass
class Job:
    """What to optimise, in ComfyUI's own types. prompts: one per image, for rewards that need them.

    node: the node's title, for messages. notices: what the user should know of the inputs. initial: seed -> the initial
    noise that the graph gives for it; without one, any. repeatable: the same bits every time, on a GPU too.
    restart_sigmas: share of the schedule -> the sigmas of a restart; without one, the tail of `sigmas`. resume: what a
    run of the same job left, to go on from.
    """

    guider: Any
    sampler: Any
    sigmas: Tensor
    noise: Tensor
    latent: Tensor
    vae: Any
    reward: Reward | None
    settings: Settings | PreferenceSettings | SearchSettings
    node: str = "MIRA"
    seed: int = 0
    initial: Callable[[int], Tensor] | None = None
    restart_sigmas: Callable[[float], Tensor] | None = None
    mask: Tensor | None = None
    prompts: Sequence[str] = ()
    notices: Sequence[str] = ()
    weighting: str = "marginal"
    measured: str = "guided"
    gradient_steps: int = 0
    memory: str = "auto"
    repeatable: bool = True
    gradient: bool = True  # whether the work needs one through the model
    resume: Left | None = None
    on_iteration: Callable = lambda k, rows, score: None
    on_seed: Callable = lambda count: None


def why_no_restart(sigmas: Tensor, initial: Tensor) -> str | None:
    """Why a restart would mean nothing in such a run, in words; None where it does. initial: z_T."""
    if len(sigmas) < 3:
        return "a schedule of one step has no level in between"
    if sigmas[-1] > 0:
        return "the sigmas end above 0, and what comes out is no image yet"
    if not initial.any():
        return "the graph adds no noise of its own (leftover noise in the latent)"
    return None
