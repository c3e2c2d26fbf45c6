"""The inputs and outputs that the sampling nodes share, and how settings are read from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...sampler.optimize import HOLD, KEEP, OPTIMIZERS, STOP, Settings
from ...sampler.rollout import WEIGHTINGS, Rollout
from ...sampler.surrogates import REGULARIZERS, SLOPED, SURROGATES
from ...sampler.variables import VARIABLES
from .presets import CUSTOM, DEFAULT, PRESETS, SUGGESTED, WORDS, named
from .types import MiraTrace

# As much reward at the same adherence as through all of them, for half the passes and less (docs/findings.md).
GRADIENT_STEPS = 3
# With fewer steps than these the last three are not enough: an image is decided in all of them (docs/speed.md).
FEW_STEPS = 10
AUTO = "auto"


HIDDEN = [io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt]


def vae_input(who: str = "reward") -> io.Input:
    return io.Vae.Input("vae", tooltip=f"The model's own VAE: the {who} looks at decoded images.")


def conditioned_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="As KSampler takes it, with its LoRAs and patches."),
        io.Conditioning.Input("positive", tooltip="What is to be in the picture."),
        io.Conditioning.Input("negative", tooltip="What is not to be in it. Not looked at where cfg is 1."),
    ]


def latent_input() -> io.Input:
    return io.Latent.Input(
        "latent_image", tooltip="Empty, or of an image to paint on; of a batch every image is optimised on its own."
    )


def linked_inputs(who: str = "reward") -> list[io.Input]:
    """What KSampler is connected to, and a VAE."""
    return [
        *conditioned_inputs(),
        latent_input(),
        vae_input(who),
    ]


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def sampling_inputs(seed: str) -> list:
    """KSampler's own widgets. seed: the tooltip of the seed."""
    return [
        seed_input(seed),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps of each image."),
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
            tooltip="Ancestral and SDE samplers inject noise at every step, and all of it counts here.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            tooltip="How the noise levels are spread over the steps.",
        ),
    ]


def schedule(model: ModelPatcher, values: dict) -> Tensor:
    """The sigmas that KSampler would take of a model that is loaded, (steps + 1,).

    A scheduler reads the model's own table, which lies in the CPU's memory until the model was first loaded, and a
    GPU's exp differs from a CPU's in the last bits: KSampler's first image is another than its second.
    """
    sampling = copy.deepcopy(model.get_model_object("model_sampling")).to(model.load_device)
    # No clone with another table: when it goes, it lets go of the memory that ComfyUI has locked for the model itself.
    of_it = SimpleNamespace(get_model_object=lambda name: sampling)
    return comfy.samplers.KSampler(
        of_it,
        steps=values["steps"],
        device=model.load_device,
        sampler=values["sampler_name"],
        scheduler=values["scheduler"],
        denoise=values.get("denoise", 1.0),
        model_options=model.model_options,
    ).sigmas


def restart_sigmas(model: ModelPatcher, values: dict) -> Callable:
    """share of the schedule -> the sigmas that KSampler would take for such a denoise."""
    return lambda share: schedule(model, values | {"denoise": values.get("denoise", 1.0) * share})


def advanced(*inputs: io.Input) -> list[io.Input]:
    """Hidden until somebody asks for them. By the dictionary, as the oldest core here has no argument for it."""
    for one in inputs:
        one.extra_dict = (one.extra_dict or {}) | {"advanced": True}
    return list(inputs)


def choosing_input(
    name: str, reads: Mapping[str, Iterable[str]], tooltip: str, default: str | None = None
) -> io.Combo.Input:
    """A choice, of which the editor learns what to leave out.

    reads: by a choice, the settings that mean something to it and not to every other.
    """
    some = {setting for settings in reads.values() for setting in settings}
    readers = {setting: [value for value, its in reads.items() if setting in its] for setting in sorted(some)}
    choice = io.Combo.Input(name, options=list(reads), default=default, tooltip=tooltip)
    choice.extra_dict = {"mira_read_by": named(readers)}  # as the oldest core here has no argument for it
    return choice


def method_input(methods: Mapping[str, Any], default: str, tooltip: str) -> io.Combo.Input:
    """methods: by name, each with what it `reads`."""
    return choosing_input("method", {name: method.reads for name, method in methods.items()}, tooltip, default)


def denoise_input():
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="Below 1 the latent image is kept in part (image to image).",
        optional=True,
    )


def memory_input():
    return io.Combo.Input(
        "memory",
        options=["auto", *Rollout.POLICIES],
        default="auto",
        optional=True,
        tooltip=(
            "What is kept for the backward pass. none: everything (fastest); per_step: only the latents; "
            "per_block: what goes into the model's blocks, of every step where that fits, else of one; offload: of "
            "one, and in the CPU's memory (slowest); auto: the fastest that fits, and thriftier when memory runs out. "
            "The record says which, and what it would take."
        ),
    )


def repeatable_input():
    return io.Boolean.Input(
        "repeatable",
        default=True,
        optional=True,
        tooltip=(
            "The same seed gives the same bits again, on a GPU too, where that makes an iteration slower. Off: nearly "
            "the same image, and small differences grow with the iterations."
        ),
    )


def dial_inputs() -> list:
    """What a person turns."""
    preset = io.Combo.Input(
        "preset",
        options=[*PRESETS, CUSTOM],
        default="balanced",
        tooltip=(
            "Sets the advanced inputs, and in the editor the two below. "
            f"{'; '.join(f'{k}: {v}' for k, v in WORDS.items())}."
        ),
    )
    preset.extra_dict = {"mira_presets": PRESETS, "mira_dials": SUGGESTED}  # for the editor
    return [
        preset,
        io.Int.Input(
            "iterations",
            default=DEFAULT.iterations,
            min=1,
            max=1000,
            tooltip=(
                "Updates of the noises. Each costs about one to two plain samples, or three to five with the whole "
                "gradient (gradient_steps 0). With more of them a run that has ended goes on. Each restart "
                "adds a picture to the record."
            ),
        ),
        io.Float.Input(
            "drift_limit",
            default=DEFAULT.drift_limit,
            min=0.0,
            max=1000000.0,
            step=0.01,
            round=0.0001,
            tooltip=(
                "How far an image may go, in each round: 0.02 stays close to what the model paints, 0.1 goes far. More "
                "reward, and less of the prompt, the higher it is. 0: no limit."
            ),
        ),
    ]


def advanced_inputs() -> list:
    """What a preset sets, and what it leaves. Optional ones stand behind all others, whatever the order here."""
    return advanced(
        io.Int.Input(
            "seeds",
            default=DEFAULT.seeds,
            min=1,
            max=1000,
            optional=True,
            tooltip=(
                "So many seeds are sampled, and each image begins from its best one: more reward for less drift, at "
                "one plain sample each. 1: the given seed, whose image is then changed."
            ),
        ),
        io.Int.Input(
            "restart_every",
            default=DEFAULT.restart_every,
            min=0,
            max=1000,
            optional=True,
            tooltip=(
                "After so many iterations the image is noised again (restart_denoise), the model paints it anew, and a "
                "new round goes on from there: what the model would not have painted goes, and the prompt comes back. "
                "0: no restart. drift_limit is of each round."
            ),
        ),
        restart_denoise_input(),
        io.Int.Input(
            "gradient_steps",
            default=-1,
            min=-1,
            max=10000,
            optional=True,
            tooltip=(
                "The gradient goes back through the network of so many of the last steps; the others cost what they "
                "cost in a plain sample, in time and memory. -1: 3 of them, or all where there are fewer than "
                f"{FEW_STEPS} or the sampler begins each step anew (lcm). 0: through all, the exact gradient, up to "
                "three times as slow."
            ),
        ),
        learning_rate_input(
            DEFAULT.lr,
            "How far an update moves the noises, in units of their standard deviation. The paper uses 0.01.",
            optional=True,
        ),
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            default=DEFAULT.optimizer,
            tooltip="adamw is the paper's; sgd (with Nesterov momentum 0.9) needs a larger learning rate; "
            "sphere: adam that keeps the norm of every noise.",
            optional=True,
        ),
        io.Float.Input(
            "clip_norm",
            default=DEFAULT.clip_norm,
            min=0.0,
            max=1000.0,
            step=0.01,
            tooltip="The largest gradient norm of one image. 0: no clipping.",
            optional=True,
        ),
        io.Combo.Input(
            "regularizer",
            options=list(REGULARIZERS),
            default=DEFAULT.regularizer,
            tooltip=(
                "What holds the image near the model. mira: the paper's loss; mira_two_sided: its score energy, held "
                "from both sides; score_distance: the distance of the scores; path_kl: the distance of the noises; "
                "latent_distance: the distance of the result; prno: DNO's; chi: ReNO's; none: plain noise "
                "optimisation."
            ),
            optional=True,
        ),
        beta_input(
            DEFAULT.beta,
            "The weight of the regularizer against the reward: higher means less reward and less drift.",
            optional=True,
        ),
        io.Combo.Input(
            "weighting",
            options=list(WEIGHTINGS),
            default="marginal",
            tooltip="The weights of the score energy over steps: 1 - abar (marginal) or DDIM's transition variance.",
            optional=True,
        ),
        io.Combo.Input(
            "measured",
            options=["guided", "conditional"],
            default="guided",
            tooltip="Which prediction the surrogates look at: the one that samples (with CFG), or the conditional one.",
            optional=True,
        ),
        io.Combo.Input(
            "drift_metric",
            options=list(SURROGATES),
            default=DEFAULT.drift_metric,
            tooltip="What the drift limit is measured in.",
            optional=True,
        ),
        io.Combo.Input(
            "hold",
            options=[AUTO, *HOLD],
            default=AUTO,
            optional=True,
            tooltip=(
                "Keeps the drift at drift_limit while the optimisation goes on. projection: draws the noises back "
                "(for drift_metric path_kl); dual_ascent: raises and lowers beta; no: see stop and keep. auto: "
                "projection where it applies and stop does not look at drift. Nothing is held when drift_limit is 0."
            ),
        ),
        io.Combo.Input(
            "keep",
            options=list(KEEP),
            default=DEFAULT.keep,
            tooltip=(
                "Which image comes back: the best reward among those within the drift limit, the best reward, "
                "or the last one (as in the paper). Each image of a batch on its own."
            ),
            optional=True,
        ),
        io.Combo.Input(
            "stop",
            options=list(STOP),
            default=DEFAULT.stop,
            tooltip=(
                "When to leave an image alone, in each round: never, on a plateau of its reward, past the drift limit, "
                "or either; plateau_at_limit: on a plateau, or held at the drift limit where it gains no more."
            ),
            optional=True,
        ),
        io.Int.Input(
            "patience",
            default=DEFAULT.patience,
            min=1,
            max=1000,
            tooltip="How many iterations without progress make a plateau.",
            optional=True,
        ),
        io.Combo.Input(
            "variables",
            options=list(VARIABLES),
            default=DEFAULT.variables,
            optional=True,
            tooltip=(
                "What is optimised: the whole trajectory of noises, the initial one, the injected ones, the first or "
                "second half of all; initno: a mean and a deviation of the initial noise."
            ),
        ),
        memory_input(),
        repeatable_input(),
        iterate_input(),
        io.Boolean.Input(
            "relative_beta",
            default=DEFAULT.relative_beta,
            optional=True,
            tooltip=(
                "beta as a share of the reward's pull: 1 makes regularizer and reward pull alike at the start, "
                f"whatever the reward's scale. For the regularizer {' and '.join(SLOPED)}; the record has the beta "
                "that it came to."
            ),
        ),
        final_restart_input(),
    )


def prompt_input():
    return io.String.Input(
        "prompt",
        default="",
        multiline=True,
        optional=True,
        tooltip=(
            "The prompt as text, for rewards that compare image and prompt. One for the whole batch; of a conditioning "
            "with several prompts, one a line."
        ),
    )


def iterate_input(chosen: str = "the one that `keep` chooses") -> io.Int.Input:
    return io.Int.Input(
        "iterate",
        default=-1,
        min=-1,
        max=2000,
        optional=True,
        tooltip=(f"Which iteration's image comes back: -1, {chosen}. Changing it alone runs nothing again."),
    )


def learning_rate_input(default: float, tooltip: str, optional: bool = False) -> io.Float.Input:
    return io.Float.Input(
        "learning_rate",
        default=default,
        min=0.0001,
        max=10.0,
        step=0.001,
        round=0.0001,
        tooltip=tooltip,
        optional=optional,
    )


def beta_input(default: float, tooltip: str, optional: bool = False) -> io.Float.Input:
    return io.Float.Input("beta", default=default, min=0.0, max=1000.0, step=0.01, tooltip=tooltip, optional=optional)


def restart_denoise_input(how: str = "How", default: float = DEFAULT.restart_denoise) -> io.Float.Input:
    return io.Float.Input(
        "restart_denoise",
        default=default,
        min=0.01,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip=(
            f"{how} far an image is noised again, as KSampler's denoise: high keeps the layout only, low keeps texture "
            "too, which some rewards live in."
        ),
    )


def final_restart_input() -> io.Float.Input:
    return io.Float.Input(
        "final_restart",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip=(
            "Paint the image that comes back anew at the end, from so much noise, as KSampler's denoise: takes away "
            "what the model would not have painted, and some of the reward. 0: no. Changing it alone runs nothing else "
            "again."
        ),
    )


def trace_outputs() -> list:
    return [
        io.Latent.Output("optimized", display_name="optimized", tooltip="The kept iterate of every image."),
        io.Latent.Output(
            "plain", display_name="plain", tooltip="The plain sample of the same seed, as KSampler gives it."
        ),
        MiraTrace.Output(
            "trace", display_name="trace", tooltip="The record: reward, drift and more at every iteration."
        ),
    ]


def noise_outputs() -> list:
    return [
        io.Noise.Output(
            "optimized_noise",
            display_name="noise",
            tooltip=(
                "The optimised noise of the kept iterate. With `sampler`, and the same sigmas, SamplerCustomAdvanced "
                "samples the image again; with another prompt, LoRA or model, what becomes of it there."
            ),
        ),
        io.Sampler.Output(
            "optimized_sampler",
            display_name="sampler",
            tooltip="The sampler with the optimised injected noises, restarts included. Belongs to `noise`.",
        ),
    ]


def settings_of(values: dict, kind: type = Settings) -> Any:
    """The `kind` of settings, `Settings` or `PreferenceSettings`, that a node's values say."""
    names = {field.name for field in fields(kind)}
    chosen = {k: v for k, v in values.items() if k in names} | {"lr": values["learning_rate"]}
    if kind is Settings:
        chosen["hold"] = choose_hold(chosen)
    return kind(**chosen)


def read_settings(node: str, values: dict, kind: type = Settings) -> Any:
    """The settings, before anything is sampled. Raises ValueError, naming the node, for what does not go together."""
    try:
        return settings_of(values, kind)
    except ValueError as problem:
        raise ValueError(f"{node}: {problem}") from problem


def gradient_steps(values: dict, steps: int, begins_anew: bool = False) -> int:
    """Through how many of the `steps` the gradient goes, for a node's values; 0: through all.

    begins_anew: of the sampler, see `probe.begins_anew`.
    """
    chosen = values.get("gradient_steps", 0)
    if chosen < 0:
        return 0 if steps < FEW_STEPS or begins_anew else GRADIENT_STEPS
    return chosen


def choose_hold(chosen: dict) -> str:
    """How the drift is held, for what a node's `hold` and its other inputs say."""
    wanted = chosen.get("hold", "no")  # a prompt from before there was such an input
    if not chosen.get("drift_limit"):
        return "no"  # there is nothing to hold without a limit
    if wanted != AUTO:
        return wanted
    applies = chosen.get("drift_metric") == "path_kl" and chosen.get("variables") != "initno"
    return "projection" if applies and "drift" not in chosen.get("stop", "") else "no"
