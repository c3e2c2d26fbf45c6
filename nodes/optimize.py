"""The optimising samplers as nodes."""

from __future__ import annotations

import math

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io
from PIL import Image
from server import PromptServer

from ..rewards.base import Reward
from ..sampler.optimize import KEEP, OPTIMIZERS, STOP, Score, Settings
from ..sampler.rollout import WEIGHTINGS, Rollout
from ..sampler.surrogates import REGULARIZERS, SURROGATES
from ..sampler.trace import json_row
from . import host
from .types import MiraReward, MiraTrace

PREVIEW = 512
DEFAULT = Settings()

# Inputs that both samplers share, in the order in which a node shows them.
SETTINGS = (
    "iterations",
    "learning_rate",
    "regularizer",
    "beta",
    "keep",
    "drift_limit",
    "stop",
    "patience",
    "memory",
    "drift_metric",
    "optimizer",
    "clip_norm",
    "weighting",
    "measured",
)


def settings_inputs() -> list:
    return [
        io.Int.Input(
            "iterations",
            default=DEFAULT.iterations,
            min=0,
            max=1000,
            tooltip="Updates of the noises. Each costs two to three plain samples.",
        ),
        io.Float.Input(
            "learning_rate",
            default=DEFAULT.lr,
            min=0.0001,
            max=10.0,
            step=0.001,
            round=0.0001,
            tooltip="How far an update moves the noises, in units of their standard deviation. The paper uses 0.01.",
        ),
        io.Combo.Input(
            "regularizer",
            options=list(REGULARIZERS),
            default=DEFAULT.regularizer,
            tooltip=(
                "What holds the image near the model. mira: the paper's loss; mira_two_sided: its score energy, held "
                "from both sides; score_distance: the distance of the scores; path_kl: the distance of the noises; "
                "latent_distance: the distance of the result; prno: DNO's; none: plain noise optimisation."
            ),
        ),
        io.Float.Input(
            "beta",
            default=DEFAULT.beta,
            min=-1000.0,
            max=1000.0,
            step=0.01,
            tooltip="The weight of the regularizer against the reward: higher means less reward and less drift.",
        ),
        io.Combo.Input(
            "keep",
            options=list(KEEP),
            default=DEFAULT.keep,
            tooltip=(
                "Which image comes back: the best reward among those within the drift limit, the best reward, "
                "or the last one (as in the paper). Each image of a batch on its own."
            ),
        ),
        io.Float.Input(
            "drift_limit",
            default=DEFAULT.drift_limit,
            min=0.0,
            max=1000000.0,
            step=0.01,
            round=0.0001,
            tooltip="The largest drift (by drift_metric) that `keep` and `stop` accept. 0: no limit.",
        ),
        io.Combo.Input(
            "stop",
            options=list(STOP),
            default=DEFAULT.stop,
            tooltip="When to leave an image alone: never, on a plateau of its reward, past the drift limit, or either.",
        ),
        io.Int.Input(
            "patience",
            default=DEFAULT.patience,
            min=1,
            max=1000,
            tooltip="How many iterations without progress make a plateau.",
        ),
        io.Combo.Input(
            "memory",
            options=["auto", *Rollout.POLICIES],
            default="auto",
            tooltip=(
                "What is kept for the backward pass. none: everything (fastest); per_step: only the latents; "
                "per_block: less still inside a step; auto: the fastest that fits, and thriftier when memory runs out."
            ),
        ),
        io.Combo.Input(
            "drift_metric",
            options=list(SURROGATES),
            default=DEFAULT.drift_metric,
            tooltip="What the drift limit is measured in.",
        ),
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            default=DEFAULT.optimizer,
            tooltip="adamw is the paper's; sgd (with Nesterov momentum 0.9) needs a larger learning rate.",
        ),
        io.Float.Input(
            "clip_norm",
            default=DEFAULT.clip_norm,
            min=0.0,
            max=1000.0,
            step=0.01,
            tooltip="The largest gradient norm of one image. 0: no clipping.",
        ),
        io.Combo.Input(
            "weighting",
            options=list(WEIGHTINGS),
            default="marginal",
            tooltip="The weights of the score energy over steps: 1 - abar (marginal) or DDIM's transition variance.",
        ),
        io.Combo.Input(
            "measured",
            options=["guided", "conditional"],
            default="guided",
            tooltip="Which prediction the surrogates look at: the one that samples (with CFG), or the conditional one.",
        ),
    ]


def prompt_input():
    return io.String.Input(
        "prompt",
        default="",
        multiline=True,
        optional=True,
        tooltip="The prompt as text, for rewards that compare image and prompt. One for the whole batch.",
    )


def trace_outputs() -> list:
    return [
        io.Latent.Output("optimized", tooltip="The kept iterate of every image."),
        io.Latent.Output("plain", tooltip="The plain sample of the same seed, as KSampler gives it."),
        MiraTrace.Output("trace", tooltip="The record: reward, drift and more at every iteration."),
    ]


# --- bad input ------------------------------------------------------------------------------------------------------


def complain(values: dict) -> str | None:
    """What is wrong with plain values, or None. A value that is not known yet (a linked input) is None."""

    def below(name, least, why):
        value = values.get(name)
        return value is not None and (not math.isfinite(value) or value < least) and f"{name} is {value}: {why}"

    drift = values.get("stop") and "drift" in values["stop"]
    return (
        below("iterations", 1, "nothing would be optimised; use 1 or more, or a KSampler for a plain sample")
        or below("steps", 1, "nothing would be sampled; use 1 or more")
        or below("beta", 0, "a negative weight would reward drift; use 0 or more")
        or below("learning_rate", 1e-12, "the noises would not move; use a value above 0, such as 0.01")
        or below("drift_limit", 0, "use 0 for no limit, or a value above 0")
        or below("clip_norm", 0, "use 0 for no clipping, or a value above 0")
        or below("patience", 1, "use 1 or more")
        or (
            values.get("denoise") is not None
            and not 0 < values["denoise"] <= 1
            and f"denoise is {values['denoise']}: use a value above 0 and up to 1"
        )
        or (
            drift
            and values.get("drift_limit") == 0
            and f"stop is {values['stop']} but drift_limit is 0: set a limit above 0"
        )
        or None
    )


def wrong_sigmas(sigmas: torch.Tensor) -> str | None:
    if len(sigmas) < 2:
        return f"sigmas has {len(sigmas)} values, so nothing would be sampled; give 2 or more"
    if not (sigmas[1:] < sigmas[:-1]).all():
        return "sigmas does not descend: use the output of a scheduler as it is"
    if sigmas[-1] != 0:
        return (
            f"sigmas ends at {sigmas[-1].item():.3g}, not 0: the image would still be noisy, and a reward of it means "
            "nothing; optimise the low half of split sigmas, which ends at 0"
        )
    return None


def check(node: str, model, sampler, latent: dict, vae, reward: Reward, prompt: str, values: dict) -> None:
    """Raise ValueError before any sampling starts, saying what is wrong, where, and how to mend it."""

    def fail(message: str):
        raise ValueError(f"{node}: {message}")

    if message := complain(values):
        fail(message)
    if not isinstance(reward, Reward):
        fail(f"reward is a {type(reward).__name__}: connect a MIRA reward node")
    if not reward.facts.differentiable:
        fail(f"reward {reward.facts.name!r} has no gradient: use a differentiable reward here")
    if reward.facts.needs_prompt and not (prompt or "").strip():
        fail(f"reward {reward.facts.name!r} compares image and prompt, but prompt is empty: give the prompt as text")
    samples = latent["samples"]
    if samples.numel() == 0:
        fail(f"latent_image has shape {tuple(samples.shape)}: the batch is empty; ask for at least one image")
    fixed = comfy.sample.fix_empty_latent_channels(model, samples)
    if getattr(fixed, "is_nested", False) or fixed.ndim != 4:
        fail(f"latent_image has shape {tuple(fixed.shape)} in this model: only (B, C, H, W) images can be optimised")
    if not torch.isfinite(samples).all():
        fail("latent_image holds NaN or infinite values: look at the node that made it")
    if "noise_mask" in latent and latent["noise_mask"].numel() == 0:
        fail("latent_image has an empty noise_mask")
    channels = model.get_model_object("latent_format").latent_channels
    if fixed.shape[1] != channels:
        fail(
            f"latent_image has {fixed.shape[1]} channels, but model works in {channels}: "
            "encode the image with the model's own VAE"
        )
    if vae.latent_channels != channels:
        fail(f"vae decodes latents of {vae.latent_channels} channels, but model makes {channels}: use its own VAE")
    why = host.why_not_differentiable(sampler, model.get_model_object("model_sampling"))
    if why:
        name = values.get("sampler_name", type(sampler).__name__)
        fail(f"sampler {name} cannot be optimised through: {why}. Use euler_ancestral, euler or dpmpp_2m")


# --- running --------------------------------------------------------------------------------------------------------


def settings_of(values: dict) -> Settings:
    names = set(Settings.__dataclass_fields__)
    return Settings(lr=values["learning_rate"], **{k: v for k, v in values.items() if k in names})


def reporter(node_id: str, iterations: int):
    """Progress bar, preview and an event per iteration, to the client that asked for the run."""
    bar = comfy.utils.ProgressBar(iterations + 1, node_id=node_id)
    server = PromptServer.instance

    def report(k: int, rows: list[dict], score: Score) -> None:
        event = {"node": node_id, "iteration": k, "iterations": iterations, "rows": [json_row(r) for r in rows]}
        server.send_sync("mira.step", event, server.client_id)
        pixels = (score.images[0].clamp(0, 1) * 255).round().byte().movedim(0, 2).cpu().numpy()
        preview = Image.fromarray(pixels)
        bar.update_absolute(k + 1, iterations + 1, ("JPEG", preview, PREVIEW))

    return report


def run(node: str, node_id: str, guider, sampler, sigmas, noise, seed, latent: dict, vae, reward, prompt, values):
    """Optimise and wrap: the outputs of both nodes."""
    model = guider.model_patcher
    latent = latent.copy()
    latent["samples"] = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    settings = settings_of(values)
    job = host.Job(
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        noise=noise,
        latent=latent["samples"],
        vae=vae,
        reward=reward,
        settings=settings,
        seed=seed,
        mask=latent.get("noise_mask"),
        prompts=[prompt or ""] * len(latent["samples"]),
        weighting=values["weighting"],
        measured=values["measured"],
        memory=values["memory"],
        on_iteration=reporter(node_id, settings.iterations),
    )
    done = host.run(job)
    trace = done.result.trace
    trace.settings |= {k: v for k, v in values.items() if isinstance(v, (int, float, str))} | {
        "node": node,
        "seed": seed,
        "prompt": prompt or "",
        "reward": reward.facts.name,
    }
    out, plain = latent.copy(), latent.copy()
    out["samples"], plain["samples"] = done.latent, done.plain
    return io.NodeOutput(out, plain, trace, ui={"mira": [trace.to_dict()]})


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
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Makes the noises that the optimisation starts from, as KSampler's does.",
                ),
                io.Int.Input("steps", default=20, min=0, max=10000, tooltip="Sampling steps of each image."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance. At 1 the negative prompt is not used, and a step costs half.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler_ancestral",
                    tooltip="Ancestral and SDE samplers inject noise at every step, and all of it is optimised.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise levels are spread over the steps.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the latent image is kept in part (image to image).",
                ),
                *settings_inputs(),
                prompt_input(),
            ],
            outputs=trace_outputs(),
            hidden=[io.Hidden.unique_id],
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
        return complain(locals()) or True

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, vae, reward, seed, cfg, prompt="", **values
    ) -> io.NodeOutput:
        node = "MIRA Optimize KSampler"
        sampler = comfy.samplers.sampler_object(values["sampler_name"])
        check(node, model, sampler, latent_image, vae, reward, prompt, values)
        sigmas = comfy.samplers.KSampler(
            model,
            steps=values["steps"],
            device=model.load_device,
            sampler=values["sampler_name"],
            scheduler=values["scheduler"],
            denoise=values["denoise"],
            model_options=model.model_options,
        ).sigmas
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        return run(
            node,
            cls.hidden.unique_id,
            guider,
            sampler,
            sigmas,
            noise,
            seed,
            latent_image,
            vae,
            reward,
            prompt,
            values | {"cfg": cfg},
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
            ],
            outputs=trace_outputs(),
            hidden=[io.Hidden.unique_id],
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
        return complain(locals()) or True

    @classmethod
    def execute(cls, noise, guider, sampler, sigmas, latent_image, vae, reward, prompt="", **values) -> io.NodeOutput:
        node = "MIRA Optimize Sampler (Advanced)"
        if message := wrong_sigmas(sigmas):
            raise ValueError(f"{node}: {message}")
        model = guider.model_patcher
        check(node, model, sampler, latent_image, vae, reward, prompt, values)
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        initial = noise.generate_noise({**latent_image, "samples": samples})
        return run(
            node,
            cls.hidden.unique_id,
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
        )
