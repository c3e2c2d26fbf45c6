"""The optimising samplers as nodes."""

from __future__ import annotations

import copy
import logging

import comfy.samplers
from comfy_api.latest import io

from ..sampler.optimize import Settings
from ..sampler.rivals import RIVALS
from . import host
from .editor.live import LiveRun
from .host.probe import begins_anew
from .shared import memo
from .shared.checks import check, check_reach, complain, prompts_of, wrong_sigmas
from .shared.finish import finish
from .shared.inputs import (
    AS_SET,
    as_set,
    gradient_steps,
    iterate_input,
    method_inputs,
    prompt_input,
    restart_sigmas,
    sampling_inputs,
    schedule,
    settings_inputs,
    settings_of,
    trace_outputs,
)
from .shared.job import cfg_guider, ksampler_noise, plain_values
from .shared.types import MiraReward

log = logging.getLogger("mira")


def run(
    node: str, hidden, guider, sampler, sigmas, initial, seed, latent: dict, vae, reward, prompt, values, identity,
    restart_sigmas=None,
):  # fmt: skip
    """Optimise and wrap: the outputs of both nodes. initial, restart_sigmas: see `host.Job`."""
    iterate, node_id = values.pop("iterate", -1), hidden.unique_id
    # Guiders and the like are made anew for every execution: what they are made of tells whether it is the same run.
    inputs = values | {"vae": vae, "reward": reward, "prompt": prompt, "seed": seed} | identity
    before = memo.recall(node_id, inputs)
    if before is None:
        before = optimized(
            node, node_id, guider, sampler, sigmas, initial, seed, latent, vae, reward, prompt, values, restart_sigmas
        )
        memo.remember(node_id, inputs, before)
    done, live = before
    return finish(node, hidden, done, live, latent, iterate)


def optimized(
    node, node_id, guider, sampler, sigmas, initial, seed, latent: dict, vae, reward, prompt, values, restart_sigmas
):
    """One run: (what came out, what the editor was told)."""
    model = guider.model_patcher
    latent = latent.copy()
    latent["samples"] = host.samples_of(model, latent)
    settings = understood(node, values)
    prompts, notices = prompts_of(prompt, guider, len(latent["samples"]))
    if settings.rounds < values.get("rounds", 1) and as_set(values):
        notices.append(f"rounds is {values['rounds']}, but there were {settings.rounds}: one for every iteration")
    live = LiveRun(node_id, settings.iterations + settings.rounds - 1, {"drift_metric": settings.drift_metric})
    job = host.Job(
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        noise=initial(seed),
        initial=initial,
        restart_sigmas=restart_sigmas,
        node=node,
        latent=latent["samples"],
        vae=vae,
        reward=reward,
        settings=settings,
        seed=seed,
        mask=latent.get("noise_mask"),
        prompts=prompts,
        notices=notices,
        weighting=values["weighting"],
        measured=values["measured"],
        gradient_steps=gradient_steps(
            values, len(sigmas) - 1, begins_anew(sampler, model.get_model_object("model_sampling"))
        ),
        memory=values["memory"],
        repeatable=values.get("repeatable", True),
        on_iteration=live,
    )
    done = host.run(job)
    trace = done.result.trace
    if replaced := RIVALS.get(values.get("method", AS_SET)):
        said = ", ".join(f"{k} {v}" for k, v in replaced.items())
        trace.notices.append(f"method {values['method']} was run with its authors' settings: {said}")
    for notice in reward.notices(job.prompts):
        log.warning("%s: %s", node, notice)
        trace.notices.append(notice)
    trace.settings |= plain_values(values) | {
        "node": node,
        "seed": seed,
        "prompt": prompt or "",
        "reward": reward.facts.name,
    }
    return done, live


def understood(node: str, values: dict) -> Settings:
    """The settings, before anything is sampled. Raises ValueError for what does not go together."""
    try:
        return settings_of(values)
    except ValueError as problem:
        raise ValueError(f"{node}: {problem}") from problem


class MiraOptimizeKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MiraOptimizeKSampler",
            display_name="MIRA Optimize KSampler",
            category="MIRA/sampling",
            description=(
                "A KSampler that optimises its noises so that the image scores higher on a reward, while it stays "
                "near what the model would paint. Cancel stops it and hands back the best image so far."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Vae.Input("vae", tooltip="The model's own VAE: the reward looks at decoded images."),
                MiraReward.Input("reward"),
                *sampling_inputs("Makes the noises that the optimisation starts from, as KSampler's does."),
                *settings_inputs(),
                prompt_input(),
                iterate_input(),
                *method_inputs(),
            ],
            outputs=trace_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(
        cls,
        iterations=None,
        steps=None,
        beta=None,
        learning_rate=None,
        drift_limit=None,
        clip_norm=None,
        patience=None,
        denoise=None,
        stop=None,
    ):
        return complain(locals(), cls.define_schema().inputs) or True

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, vae, reward, seed, cfg, prompt="", **values
    ) -> io.NodeOutput:
        node = "MIRA Optimize KSampler"
        sampler = comfy.samplers.sampler_object(values["sampler_name"])
        check(node, cls.define_schema().inputs, model, sampler, latent_image, vae, reward, prompt, values)
        sigmas = schedule(model, values)
        check_reach(node, model, sampler, len(sigmas) - 1, values)
        initial = ksampler_noise(host.samples_of(model, latent_image), latent_image)
        return run(
            node,
            cls.hidden,
            cfg_guider(model, positive, negative, cfg),
            sampler,
            sigmas,
            initial,
            seed,
            latent_image,
            vae,
            reward,
            prompt,
            values | {"cfg": cfg},
            {"model": model, "positive": positive, "negative": negative, "latent": latent_image},
            restart_sigmas(model, values),
        )


class MiraOptimizeSamplerAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MiraOptimizeSamplerAdvanced",
            display_name="MIRA Optimize Sampler (Advanced)",
            category="MIRA/sampling",
            description="MIRA Optimize KSampler for any NOISE, GUIDER, SAMPLER and SIGMAS, as SamplerCustomAdvanced.",
            inputs=[
                io.Noise.Input("noise"),
                io.Guider.Input("guider"),
                io.Sampler.Input("sampler"),
                io.Sigmas.Input("sigmas"),
                io.Latent.Input("latent_image"),
                io.Vae.Input("vae", tooltip="The model's own VAE: the reward looks at decoded images."),
                MiraReward.Input("reward"),
                *settings_inputs(),
                prompt_input(),
                iterate_input(),
                *method_inputs(),
            ],
            outputs=trace_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(
        cls,
        iterations=None,
        beta=None,
        learning_rate=None,
        drift_limit=None,
        clip_norm=None,
        patience=None,
        stop=None,
    ):
        return complain(locals(), cls.define_schema().inputs) or True

    @classmethod
    def execute(cls, noise, guider, sampler, sigmas, latent_image, vae, reward, prompt="", **values) -> io.NodeOutput:
        node = "MIRA Optimize Sampler (Advanced)"
        if message := wrong_sigmas(sigmas):
            raise ValueError(f"{node}: {message}")
        model = getattr(guider, "model_patcher", guider)  # what is no guider is no model either
        check(node, cls.define_schema().inputs, model, sampler, latent_image, vae, reward, prompt, values)
        check_reach(node, model, sampler, len(sigmas) - 1, values)
        samples = host.samples_of(model, latent_image)

        def initial(seed: int):
            other = copy.copy(noise)
            if seed != noise.seed:
                other.seed = seed
            return other.generate_noise({**latent_image, "samples": samples})

        return run(
            node,
            cls.hidden,
            guider,
            sampler,
            sigmas,
            initial,
            noise.seed,
            latent_image,
            vae,
            reward,
            prompt,
            values,
            {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent": latent_image},
        )
