"""What is wrong with a run's inputs, said before any sampling starts: where, what, and how to mend it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy import sd1_clip
from comfy.model_patcher import ModelPatcher
from comfy.sampler_helpers import prepare_mask
from comfy.sd import VAE
from comfy_api.latest import io

from ...rewards.base import Reward
from ...sampler.optimize import stops_at_no_limit
from ..host import samples_of
from ..host.probe import begins_anew, injects_noise, why_not_differentiable
from .inputs import gradient_steps

NO_WORDS = re.compile(r"\bembedding:\S+|<lora:[^>]*>")

APART = ("prompt", "iterate", "choices", "final_restart")  # inputs that are no settings of a run
# Why a value below an input's range makes no sense, where it is worth a word.
TOO_SMALL = {
    "iterations": "nothing would be optimised (a KSampler gives the plain sample)",
    "steps": "nothing would be sampled",
    "beta": "a negative weight would reward drift",
    "learning_rate": "the noises would not move",
}


def complain(values: dict, inputs: Sequence[io.Input]) -> str | None:
    """What is wrong with the plain values of a node's inputs, or None.

    A value that is not known yet (a linked input) is None. The inputs' own ranges are the only ones: ComfyUI looks at
    them before anything is queued, but not at those of the inputs that a node validates itself, of which it tells an
    error once for each, nor at a linked value.
    """
    for known in inputs:
        low, high, value = getattr(known, "min", None), getattr(known, "max", None), values.get(known.id)
        options = getattr(known, "options", None)
        if options and value is not None and value not in options:
            return f"{known.id} is {_shown(value)}: choose one of {', '.join(map(str, options))}"
        if isinstance(known, io.String.Input) and not isinstance(value, (str, type(None))):
            return f"{known.id} is {_kind(value)}: give it a text"
        if low is None or high is None or value is None:
            continue
        if not isinstance(value, (int, float)):
            return f"{known.id} is {_kind(value)}: give it a number"
        if not low <= value <= high:  # NaN too
            why = f"{TOO_SMALL[known.id]}; " if value < low and known.id in TOO_SMALL else ""
            return f"{known.id} is {_shown(value)}: {why}use {low:g} to {high:g}"
        if isinstance(known, io.Int.Input) and value != int(value):
            return f"{known.id} is {_shown(value)}: use a whole number"
    stop, limit = values.get("stop"), values.get("drift_limit")
    return stops_at_no_limit(stop, limit) if stop is not None and limit is not None else None


def _shown(value: object) -> str:
    return str(value) if len(str(value)) < 25 else f"{str(value)[:20]}..."


def fill_in(inputs: Sequence[io.Input], values: dict) -> dict:
    """The values of a prompt made by hand, which may leave optional inputs out, with those inputs' defaults."""
    left = [i for i in inputs if i.optional and i.id not in APART]
    return {i.id: i.default for i in left if getattr(i, "default", None) is not None} | values


def check_values(node: str, inputs: Sequence[io.Input], values: dict) -> None:
    """Raise ValueError where `complain` has something to say, now that every value is known."""
    for known in inputs:
        if known.id in values and values[known.id] is None:
            raise ValueError(f"{node}: {known.id} is empty: give it a value")
    if message := complain(values, inputs):
        raise ValueError(f"{node}: {message}")


def check_said(node: str, inputs: Sequence[io.Input], prompt: str | None, **values: Any) -> None:
    """`check_values`, of a prompt too, which may be left out."""
    check_values(node, inputs, values | ({} if prompt is None else {"prompt": prompt}))


def check_reward(node: str, reward: object, name: str = "reward") -> Reward:
    """Return it. Raises ValueError for what is no reward: a literal in the link's place."""
    if not isinstance(reward, Reward):
        raise ValueError(f"{node}: {name} is {_kind(reward)}: connect a MIRA reward node")
    return reward


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def check_places(node: str, name: str, latent: dict) -> None:
    """Raise ValueError for a LATENT whose `batch_index` does not tell the place of every image."""
    images, places = len(latent["samples"]), latent.get("batch_index")
    if places is not None and len(places) < images:
        raise ValueError(
            f"{node}: {name} has {images} images, but its batch_index tells the place of {len(places)} only"
        )


def wrong_sigmas(sigmas: torch.Tensor) -> str | None:
    if len(sigmas) < 2:
        return f"sigmas has {len(sigmas)} values, so nothing would be sampled; give 2 or more"
    if not torch.isfinite(sigmas).all():
        return "sigmas has NaN or infinite values: use the output of a scheduler as it is"
    if not (sigmas[1:] < sigmas[:-1]).all():
        return (
            "sigmas does not descend at every step (a scheduler may give a level twice, as Laplace does at its ends): "
            "take fewer steps, or another scheduler"
        )
    if sigmas[-1] != 0:
        return (
            f"sigmas ends at {sigmas[-1].item():.3g}, not 0: the image would still be noisy, and a reward of it means "
            "nothing; of split sigmas optimise the low half, and of a scheduler's that ends above 0 (Laplace) add a 0"
        )
    return None


def check(
    node: str,
    model: ModelPatcher,
    sampler: Any,
    latent: dict,
    vae: VAE,
    reward: Reward,
    prompt: str,
    values: dict,
    effective: dict,
) -> None:
    """Raise ValueError before any sampling starts, saying what is wrong, where, and how to mend it.

    values: the node's widgets; effective: the same with its preset in them.
    """
    check_reward(node, reward)
    needs_gradient(node, reward, "MIRA-DPO Preference or MIRA Search KSampler, which only rank images by it")
    check_latent(node, model, latent, vae, sampler, values)
    needs(node, reward, prompt, len(latent["samples"]))
    free = effective.get("variables")
    if free in ("injected", "late") and not injects_noise(sampler, model.get_model_object("model_sampling")):
        raise ValueError(
            f"{node}: variables is {free}, but the sampler injects no noise: use an ancestral or SDE sampler, such as "
            "euler_ancestral, or optimise the initial noise"
        )


def check_reach(node: str, model: ModelPatcher, sampler: Any, steps: int, values: dict) -> None:
    """Raise ValueError where the gradient would not come to what is optimised."""
    free, through = values.get("variables", "trajectory"), gradient_steps(values, steps)
    if free not in ("initial", "early", "initno") or not 0 < through < steps:
        return
    if values["gradient_steps"] > 0 and begins_anew(sampler, model.get_model_object("model_sampling")):
        raise ValueError(
            f"{node}: variables is {free}, but sampler {values.get('sampler_name') or name_of(sampler)} begins each "
            f"step anew, and the gradient of the last {through} of {steps} does not come to it: set gradient_steps to 0"
        )


def needs_gradient(node: str, reward: Reward, instead: str) -> None:
    if not reward.facts.differentiable:
        raise ValueError(
            f"{node}: reward {reward.facts.name!r} has no gradient: use a differentiable reward here, or {instead}"
        )


def needs(node: str, reward: Reward, prompt: str, count: int | None) -> None:
    """Raise ValueError where the reward cannot score `count` images (None: not known yet) against this prompt."""
    if count and (why := reward.unfit(count)):
        raise ValueError(f"{node}: reward {reward.facts.name!r}: {why}")
    if reward.facts.needs_prompt and not (prompt or "").strip():
        raise ValueError(
            f"{node}: reward {reward.facts.name!r} compares image and prompt, but prompt is empty: give it as text"
        )


def name_of(sampler: Any) -> str:
    """A SAMPLER's name as KSampler's list has it, or that of its class."""
    function = getattr(sampler, "sampler_function", None)
    while isinstance(function, functools.partial):  # nodes that set options of a sampler
        function = function.func
    if (name := getattr(function, "__name__", "__call__")) == "__call__":  # an object that can be called, or its method
        owner = getattr(function, "__self__", function)
        name = type(sampler if owner is None else owner).__name__
    return name.removeprefix("sample_")


def spoken(prompt: str) -> str:
    """What a prompt says, without what ComfyUI's tokenizer reads in it (weights in brackets, embeddings) and LoRA tags:
    to a scorer they would be words.
    """
    parts = sd1_clip.token_weights(sd1_clip.escape_important(prompt), 1.0)
    text = sd1_clip.unescape_important("".join(text for text, _ in parts))
    return re.sub(r"[ \t]{2,}", " ", NO_WORDS.sub(" ", text)).strip() if NO_WORDS.search(text) else text


def prompts_of(prompt: str, guider: Any, count: int) -> tuple[list[str], list[str]]:
    """(the text that each of `count` images is scored against, notices).

    Where the conditioning is a batch of several prompts, their texts are given one a line.
    """
    given, prompt = prompt or "", spoken(prompt or "")
    said = [f"the reward reads the prompt without weights, embeddings and LoRA tags: {prompt}"] * (prompt != given)
    batches = [c.get("cross_attn") for c in guider.original_conds.get("positive", ())]
    several = [len(t) for t in batches if torch.is_tensor(t) and len(t) > 1 and not (t == t[:1]).all()]
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    if several and len(lines) in (several[0], count):
        return (lines * count)[:count], said
    notices = said
    if several and count > 1 and lines:
        notices = [
            *said,
            f"the conditioning holds {several[0]} prompts, but all images are scored against the same text: give "
            f"prompt {several[0]} lines, one for each",
        ]
    return [prompt] * count, notices


def _is_conditioning(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in value)
    return pairs and all(torch.is_tensor(t) and isinstance(more, dict) for t, more in value)


# What a link of each input's name has to be, and what gives it: ComfyUI lets any literal pass in a link's place.
LINKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (lambda x: hasattr(x, "get_model_object"), "a model loader's MODEL"),
    "tuned": (lambda x: hasattr(x, "get_model_object"), "a model loader's MODEL"),
    "clip": (lambda x: hasattr(x, "tokenize"), "a checkpoint's CLIP, or a CLIP loader's"),
    "vae": (lambda x: hasattr(x, "first_stage_model"), "the checkpoint's VAE, or a Load VAE"),
    "positive": (_is_conditioning, "a CLIP Text Encode"),
    "negative": (_is_conditioning, "a CLIP Text Encode"),
    "latent_image": (lambda x: isinstance(x, dict), "an Empty Latent Image, or a VAE Encode"),
    "noise": (lambda x: hasattr(x, "generate_noise"), "a RandomNoise"),
    "guider": (lambda x: hasattr(x, "model_patcher"), "a CFGGuider"),
    "sampler": (lambda x: hasattr(x, "sample"), "a KSamplerSelect"),
    "sigmas": (lambda x: torch.is_tensor(x) and x.ndim == 1, "a BasicScheduler"),
    "latents": (lambda x: isinstance(x, dict) and torch.is_tensor(x.get("samples")), "a LATENT, the images' own"),
    "masks": (torch.is_tensor, "a MASK, one for each image"),
}


def check_links(node: str, **given: Any) -> None:
    """Raise ValueError for a link, by its input's name, that is of another kind: a literal in its place, or nothing."""
    for name, value in given.items():
        fits, source = LINKS[name]
        if not fits(value):
            raise ValueError(f"{node}: {name} is {_kind(value)}: connect {source}")
    samples = given.get("latent_image", {}).get("samples")
    if getattr(samples, "is_nested", False):  # several latents of one sample, as ComfyUI has them for some models
        raise ValueError(
            f"{node}: latent_image holds several latents of one sample (video with audio), which no reward here sees: "
            "connect an image's or a video's alone"
        )
    if "latent_image" in given and not torch.is_tensor(samples):
        raise ValueError(f"{node}: latent_image holds no latents: connect an Empty Latent Image, or a VAE Encode")
    vae = given.get("vae")
    if vae is not None and vae.first_stage_model is None:
        raise ValueError(
            f"{node}: vae is empty: the file that it comes from holds no VAE that ComfyUI knows; connect a Load VAE"
        )


def check_vae(node: str, model: ModelPatcher, vae: VAE) -> None:
    """Raise ValueError for a VAE of other latents than the model's, or of anything but red, green and blue."""
    form = model.get_model_object("latent_format")
    channels, dimensions = form.latent_channels, getattr(form, "latent_dimensions", 2)
    if vae.latent_channels != channels:
        raise ValueError(
            f"{node}: vae decodes latents of {vae.latent_channels} channels, but model makes {channels}: use its own "
            "VAE (if it is that, MIRA does not know the model)"
        )
    decoded = getattr(vae, "latent_dim", dimensions)  # of a VAE of another pack's making it is not known
    if getattr(vae, "extra_1d_channel", None) is not None or not dimensions >= decoded > 1:
        made = {1: "sound", 2: "images", 3: "video"}.get(decoded, "something else")
        raise ValueError(
            f"{node}: vae is one of {made}, whose latents have another shape than model's: use the model's own VAE"
        )
    if (colours := getattr(vae, "conv_out_channels", 3)) != 3:
        raise ValueError(
            f"{node}: vae decodes to {colours} channels, but rewards look at red, green and blue: use a VAE without "
            "alpha"
        )


def check_mask(node: str, mask: Any, latent: torch.Tensor) -> None:
    """Raise ValueError for a noise_mask that is none, or under which a latent (B, C, ..., h, w) cannot change."""

    def fail(message: str) -> None:
        raise ValueError(f"{node}: latent_image has {message}")

    if not isinstance(mask, torch.Tensor) or not mask.is_floating_point() or mask.ndim < 2:
        what = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        fail(f"a noise_mask that is no MASK but {what}: make it with Set Latent Noise Mask")
    if mask.numel() == 0:
        fail("an empty noise_mask")
    if not torch.isfinite(mask).all():
        fail("a noise_mask with NaN or infinite values: look at the node that made it")
    if not (mask > 0).any():
        fail("a noise_mask that is black everywhere, so nothing would change: paint where it may")
    if not (prepare_mask(mask, latent.shape, mask.device) > 0).any():
        fail(
            f"a noise_mask of which nothing is left at {latent.shape[-1]} x {latent.shape[-2]}, the latent's size: "
            "paint a larger spot"
        )


def check_latent(
    node: str, model: ModelPatcher, latent: dict, vae: VAE, sampler: Any, values: dict, gradient: bool = True
) -> None:
    """The latent, the VAE and, where a gradient is needed, the sampler: as `check`."""

    def fail(message: str) -> None:
        raise ValueError(f"{node}: {message}")

    check_links(node, model=model, vae=vae, latent_image=latent)
    samples = latent["samples"]
    if not samples.is_floating_point():
        fail(f"latent_image is of {samples.dtype}: latents are floating-point numbers; look at the node that made it")
    check_places(node, "latent_image", latent)
    if samples.numel() == 0:
        fail(f"latent_image has shape {tuple(samples.shape)}: the batch is empty; ask for at least one image")
    fixed = samples_of(model, latent)
    sides = 2 + getattr(model.get_model_object("latent_format"), "latent_dimensions", 2)
    frames = fixed.shape[2] if fixed.ndim == 5 else 1
    if getattr(fixed, "is_nested", False) or sides < 4 or fixed.ndim != sides or frames != 1:
        fail(
            f"latent_image has shape {tuple(fixed.shape)} in this model: only images, (B, C, H, W) or of one frame, "
            "can be optimised"
        )
    if not torch.isfinite(samples).all():
        fail("latent_image holds NaN or infinite values: look at the node that made it")
    if latent.get("noise_mask") is not None:
        check_mask(node, latent["noise_mask"], fixed)
    channels = model.get_model_object("latent_format").latent_channels
    if fixed.shape[1] != channels:
        fail(
            f"latent_image has {fixed.shape[1]} channels, but model works in {channels}: "
            "encode the image with the model's own VAE"
        )
    check_vae(node, model, vae)
    if not gradient:
        return
    why = why_not_differentiable(sampler, model.get_model_object("model_sampling"))
    if why:
        name = values.get("sampler_name") or name_of(sampler)
        fail(f"sampler {name} cannot be optimised through: {why}. Use euler_ancestral, euler or dpmpp_2m")
