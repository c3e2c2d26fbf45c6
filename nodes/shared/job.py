"""A `host.Job` from what a KSampler is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...rewards.base import Reward
from .. import host
from .checks import prompts_of
from .inputs import restart_sigmas, schedule
from .scores import score_latent


def cfg_guider(model: ModelPatcher, positive: list, negative: list, cfg: float) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def ksampler_noise(samples: Tensor, latent: dict) -> Callable:
    """seed -> the initial noise that KSampler makes for these latents."""
    return lambda seed: comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))


@dataclass(frozen=True)
class KSamplerInputs:
    """What a node that samples as KSampler does is given, but for its other widgets."""

    model: ModelPatcher
    positive: list
    negative: list
    latent: dict
    vae: VAE
    seed: int
    cfg: float
    prompt: str


def ksampler_job(given: KSamplerInputs, values: dict, **more: Any) -> host.Job:
    """What KSampler would sample; values: the node's widgets by name, more: the rest of the job."""
    model, latent = given.model, given.latent
    samples = host.samples_of(model, latent)
    initial = ksampler_noise(samples, latent)
    guider = cfg_guider(model, given.positive, given.negative, given.cfg)
    prompts, notices = prompts_of(given.prompt, guider, len(samples))
    return host.Job(
        guider=guider,
        sampler=comfy.samplers.sampler_object(values["sampler_name"]),
        sigmas=schedule(model, values),
        noise=initial(given.seed),
        initial=initial,
        restart_sigmas=restart_sigmas(model, values),
        latent=samples,
        vae=given.vae,
        seed=given.seed,
        mask=latent.get("noise_mask"),
        prompts=prompts,
        notices=notices,
        memory=values.get("memory", "auto"),
        repeatable=values.get("repeatable", True),
        **more,
    )


def restart_at_end(
    given: KSamplerInputs, values: dict, share: float, reward: Reward | None = None
) -> host.FinalRestart | None:
    """What `final_restart` asks for, of what KSampler would sample; None for 0."""
    if not share:
        return None
    model, latent = given.model, given.latent
    guider = cfg_guider(model, given.positive, given.negative, given.cfg)
    return host.FinalRestart(
        share,
        guider,
        comfy.samplers.sampler_object(values["sampler_name"]),
        schedule(model, values),
        ksampler_noise(host.samples_of(model, latent), latent),
        given.seed,
        latent.get("noise_mask"),
        restart_sigmas(model, values),
        reward and scoring(given.vae, reward, given.prompt, guider),
    )


def scoring(vae: VAE, reward: Reward, prompt: str, guider: Any) -> Callable[[Tensor], Tensor]:
    """latents (B, C, ...) -> the rewards (B,) of their images, against the prompts that the run scored them against."""
    return lambda latent: score_latent(vae, reward, latent, prompts_of(prompt, guider, len(latent))[0])


def describe(node: str, values: dict, seed: int, prompt: str, reward: str) -> dict:
    """What a run was asked to do, as its record has it: the widgets' values, and by which reward (or judge)."""
    plain = {k: v for k, v in values.items() if isinstance(v, (int, float, str))}
    return plain | {"node": node, "seed": seed, "prompt": prompt or "", "reward": reward}
