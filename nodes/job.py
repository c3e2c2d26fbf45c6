"""A `host.Job` from what a KSampler is given."""

from __future__ import annotations

import comfy.sample
import comfy.samplers

from . import host
from .settings import schedule


def cfg_guider(model, positive, negative, cfg: float) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def ksampler_job(model, positive, negative, latent: dict, vae, seed: int, cfg: float, prompt: str, values, **more):
    """What KSampler would sample; values: the node's widgets by name, more: the rest of the job."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    return host.Job(
        guider=cfg_guider(model, positive, negative, cfg),
        sampler=comfy.samplers.sampler_object(values["sampler_name"]),
        sigmas=schedule(model, values),
        noise=comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        latent=samples,
        vae=vae,
        seed=seed,
        mask=latent.get("noise_mask"),
        prompts=[prompt or ""] * len(samples),
        memory=values["memory"],
        **more,
    )


def plain_values(values: dict) -> dict:
    """The widgets' values, as a record holds them."""
    return {k: v for k, v in values.items() if isinstance(v, (int, float, str))}
