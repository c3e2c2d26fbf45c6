"""The optimising samplers as nodes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..rewards.base import Reward
from ..sampler.restart import lengths
from ..sampler.resume import Left
from . import host
from .editor.live import LiveRun
from .host.probe import begins_anew
from .shared import memo
from .shared.checks import check, check_links, check_reach, check_said, complain, fill_in, prompts_of, wrong_sigmas
from .shared.finish import finish, tell
from .shared.inputs import (
    HIDDEN,
    advanced,
    advanced_inputs,
    denoise_input,
    dial_inputs,
    gradient_steps,
    latent_input,
    linked_inputs,
    noise_outputs,
    prompt_input,
    read_settings,
    restart_sigmas,
    sampling_inputs,
    schedule,
    trace_outputs,
    vae_input,
)
from .shared.job import cfg_guider, describe, ksampler_noise, scoring
from .shared.presets import apply_preset
from .shared.types import aliases, reward_input, shown_again

log = logging.getLogger("mira")
# What a prompt from before presets may leave out.
UNSAID = {"weighting": "marginal", "measured": "guided", "memory": "auto"}


def fill_unsaid(inputs: Sequence[io.Input], values: dict) -> dict:
    """The widgets' values with those that the prompt leaves out."""
    return fill_in(inputs, values) if "preset" in values else UNSAID | values


def run(
    node: str, hidden: Any, values: dict, effective: dict, overruled: list[str], *, latent: dict, reward: Reward,
    prompt: str, identity: dict, **given: Any,
) -> io.NodeOutput:  # fmt: skip
    """Optimise and wrap: the outputs of both nodes. values: the widgets; effective, overruled: see
    `presets.applied`; given: the rest of a `host.Job`.

    identity: what the job's own objects are made of. Guiders and the like are made anew for every execution: what they
    are made of tells whether it is the same run.
    """
    iterate, share = values.get("iterate", -1), values.get("final_restart", 0.0)
    later = ("iterate", "final_restart")  # what is done to a run that there is
    widgets, effective = ({k: v for k, v in of.items() if k not in later} for of in (values, effective))
    inputs = widgets | {f"{memo.USED}{k}": v for k, v in effective.items()}
    inputs |= {"vae": given["vae"], "reward": reward, "prompt": prompt, "seed": given["seed"]} | identity

    def work():
        before, why_anew = memo.left_of(hidden, inputs, effective)
        notices = [*overruled, why_anew] if why_anew else overruled
        return run_optimization(
            node, hidden, effective, notices, before, latent=latent, reward=reward, prompt=prompt, **given
        )

    done = memo.of(hidden, inputs, (iterate, share), work)
    restart = None
    if share:
        of = {name: given[name] for name in ("guider", "sampler", "sigmas", "initial", "seed")}
        restart = host.FinalRestart(
            share, mask=latent.get("noise_mask"), restart_sigmas=given.get("restart_sigmas"),
            score=scoring(given["vae"], reward, prompt, given["guider"]), **of,
        )  # fmt: skip
    return finish(node, hidden, *done, latent, iterate, restart=restart, inputs=inputs)


def run_optimization(
    node: str,
    hidden: Any,
    values: dict,
    notices: list[str],
    before: tuple[Left, LiveRun] | None,
    *,
    latent: dict,
    reward: Reward,
    prompt: str,
    guider: Any,
    **given: Any,
) -> tuple[host.Optimized, LiveRun]:
    """One run: (what came out, what the editor was told). notices: of the node's own. before: the run that it goes
    on from, if any.
    """
    model, sampler, sigmas = guider.model_patcher, given["sampler"], given["sigmas"]
    samples = host.samples_of(model, latent)
    settings = read_settings(node, values)
    prompts, told_first = prompts_of(prompt, guider, len(samples))
    told = {"drift_metric": settings.drift_metric, "drift_limit": settings.drift_limit}
    record = describe(node, values, given["seed"], prompt, reward.facts.name)
    seeds = settings.seeds if settings.seeds > 1 and not before else 0
    noise = given["initial"](given["seed"])
    rounds = 1 if host.why_no_restart(sigmas, noise) else len(lengths(settings))  # as they will be taken
    live = LiveRun(hidden, settings.iterations + rounds - 1, told, record, seeds)
    if before:
        live.go_on(before[1], before[0].done)
    job = host.Job(
        resume=before[0] if before else None,
        guider=guider,
        noise=noise,
        node=node,
        latent=samples,
        reward=reward,
        settings=settings,
        mask=latent.get("noise_mask"),
        prompts=prompts,
        notices=told_first,
        weighting=values["weighting"],
        measured=values["measured"],
        gradient_steps=gradient_steps(
            values, len(sigmas) - 1, begins_anew(sampler, model.get_model_object("model_sampling"))
        ),
        memory=values["memory"],
        repeatable=values.get("repeatable", True),
        on_iteration=live,
        on_seed=live.tell_seeds,
        **given,
    )
    done = host.run(job)
    trace = done.result.trace
    trace.notices += notices
    tell(node, trace, reward.notices(job.prompts))
    trace.settings |= record
    return done, live


class MiraOptimizeKSampler(io.ComfyNode):
    NAME = "MIRA Optimize KSampler"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraOptimizeKSampler",
            **aliases(
                "align",
                "alignment",
                "improve",
                "beautiful",
                "better image",
                "reward",
                "optimise",
                "optimize",
                "ksampler",
            ),
            display_name=cls.NAME,
            category="MIRA Alignment/sampling",
            description=(
                "A KSampler that optimises its noises so that the image scores higher on a reward, while it stays "
                "near what the model would paint. Cancel stops it and hands back the best image so far."
            ),
            inputs=[
                *linked_inputs(),
                reward_input(),
                *sampling_inputs("Makes the noises that the optimisation starts from, as KSampler's does."),
                *dial_inputs(),
                prompt_input(),
                *advanced(denoise_input()),
                *advanced_inputs(),
            ],
            outputs=[*trace_outputs(), *noise_outputs()],
            hidden=HIDDEN,
            **shown_again(),
        )

    @classmethod
    def validate_inputs(cls, drift_limit: float | None = None, stop: str | None = None) -> bool | str:
        return complain(locals(), cls.define_schema().inputs) or True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return memo.cuts(inputs)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list,
        negative: list,
        latent_image: dict,
        vae: VAE,
        reward: Reward,
        seed: int,
        cfg: float,
        prompt: str = "",
        **values: Any,
    ) -> io.NodeOutput:
        node, inputs = cls.NAME, cls.define_schema().inputs
        check_said(node, inputs, prompt, **values, cfg=cfg, seed=seed)
        check_links(node, positive=positive, negative=negative)
        effective, overruled = apply_preset(values)
        values, effective = fill_unsaid(inputs, values), fill_unsaid(inputs, effective)
        sampler = comfy.samplers.sampler_object(values["sampler_name"])
        check(node, model, sampler, latent_image, vae, reward, prompt, values, effective)
        sigmas = schedule(model, values)
        check_reach(node, model, sampler, len(sigmas) - 1, effective)
        return run(
            node,
            cls.hidden,
            values | {"cfg": cfg},
            effective | {"cfg": cfg},
            overruled,
            latent=latent_image,
            reward=reward,
            prompt=prompt,
            identity={"model": model, "positive": positive, "negative": negative, "latent": latent_image},
            guider=cfg_guider(model, positive, negative, cfg),
            sampler=sampler,
            sigmas=sigmas,
            restart_sigmas=restart_sigmas(model, values),
            initial=ksampler_noise(host.samples_of(model, latent_image), latent_image),
            seed=seed,
            vae=vae,
        )


class MiraOptimizeSamplerAdvanced(io.ComfyNode):
    NAME = "MIRA Optimize Sampler (Advanced)"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraOptimizeSamplerAdvanced",
            **aliases("align", "reward", "optimise", "optimize", "custom sampler"),
            display_name=cls.NAME,
            category="MIRA Alignment/sampling",
            description="MIRA Optimize KSampler for any NOISE, GUIDER, SAMPLER and SIGMAS, as SamplerCustomAdvanced.",
            inputs=[
                io.Noise.Input("noise", tooltip="Where the optimisation begins, and which seeds it is compared with."),
                io.Guider.Input("guider", tooltip="With the model and the prompts."),
                io.Sampler.Input("sampler", tooltip="One that a gradient goes through; others are refused by name."),
                io.Sigmas.Input("sigmas", tooltip="The schedule, whole or a part of it."),
                latent_input(),
                vae_input(),
                reward_input(),
                *dial_inputs(),
                prompt_input(),
                *advanced_inputs(),
            ],
            outputs=[*trace_outputs(), *noise_outputs()],
            hidden=HIDDEN,
            **shown_again(),
        )

    @classmethod
    def validate_inputs(cls, drift_limit: float | None = None, stop: str | None = None) -> bool | str:
        return complain(locals(), cls.define_schema().inputs) or True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return memo.cuts(inputs)

    @classmethod
    def execute(
        cls,
        noise: Any,
        guider: Any,
        sampler: Any,
        sigmas: Tensor,
        latent_image: dict,
        vae: VAE,
        reward: Reward,
        prompt: str = "",
        **values: Any,
    ) -> io.NodeOutput:
        node, inputs = cls.NAME, cls.define_schema().inputs
        check_links(node, sigmas=sigmas)
        if message := wrong_sigmas(sigmas):
            raise ValueError(f"{node}: {message}")
        check_links(node, noise=noise, guider=guider, sampler=sampler)
        check_said(node, inputs, prompt, **values)
        effective, overruled = apply_preset(values)
        values, effective = fill_unsaid(inputs, values), fill_unsaid(inputs, effective)
        model = guider.model_patcher
        check(node, model, sampler, latent_image, vae, reward, prompt, values, effective)
        check_reach(node, model, sampler, len(sigmas) - 1, effective)
        samples = host.samples_of(model, latent_image)

        def initial(seed: int) -> Tensor:
            other = copy.copy(noise)
            if seed != noise.seed:
                try:
                    other.seed = seed
                except AttributeError:  # of two noises, say, and their seeds
                    log.debug("%s: the seed of %s cannot be set", node, type(noise).__name__)
            return other.generate_noise({**latent_image, "samples": samples})

        return run(
            node,
            cls.hidden,
            values,
            effective,
            overruled,
            latent=latent_image,
            reward=reward,
            prompt=prompt,
            identity={"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent": latent_image},
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            initial=initial,
            seed=noise.seed,
            vae=vae,
        )
