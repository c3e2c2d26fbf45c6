"""A model and its tuned version as one: both predict, and their predictions are blended (RLG, AIG)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sampler.guidance import anneal, blend
from .dymo import share_of_noise
from .dynamic import copied, is_dynamic, static
from .patches import names_of_keeping, only_in

KEY = "mira_tuned"
KEEPS = "keeps what one model makes in a step for the later ones, and here are two: bypass it"
COMPILED = "torch.compile"  # ComfyUI's key of the wrapper that puts a compiled network into a model's place


def why_not_alike(model: ModelPatcher, tuned: ModelPatcher) -> str | None:
    """None, or why their predictions cannot be blended."""
    injected = {*getattr(model, "injections", ()), *getattr(tuned, "injections", ())}
    if injected and tuned.model is model.model:
        return (
            f"{' and '.join(sorted(injected))} is in the layers that model and tuned share, where it cannot be for "
            "one of them alone: load that LoRA without bypass"
        )
    base_kind, tuned_kind = type(model.model).__name__, type(tuned.model).__name__
    latents = [m.get_model_object("latent_format").latent_channels for m in (model, tuned)]
    if base_kind != tuned_kind or latents[0] != latents[1]:
        return f"model is a {base_kind} and tuned a {tuned_kind}: use a reward-tuned version of the same model"
    if is_untuned(tuned, model):
        return (
            "tuned has the same weights as model, so there is nothing to blend: no name in its LoRA's file fitted "
            "(ComfyUI's log has them as 'lora key not loaded'). docs/tuned.md shows which files load, and renames the "
            "others"
        )
    if names := only_in(tuned.model_options, model.model_options):
        return (
            f"tuned has patches that model has not ({names}), and of tuned only the weights are used: put them on "
            "model, where they hold for both, or take them off tuned"
        )
    if names := names_of_keeping(model.model_options):
        return f"{names} {KEEPS}"
    kinds = [m.get_model_object("model_sampling") for m in (model, tuned)]
    highest = [float(kind.sigma_max) for kind in kinds]
    if highest[0] != highest[1]:
        return (
            f"model and tuned have different noise schedules (sigma up to {highest[0]:.4g} and {highest[1]:.4g}): "
            "patch both the same way"
        )
    if not alike_at(torch.tensor([highest[0], float(kinds[0].sigma_min)]), *kinds):
        return (
            "model and tuned read what their networks say in different ways (ModelSamplingDiscrete and the like): "
            "patch both the same way"
        )
    return None


def rl_guidance(
    node: str, model: ModelPatcher, tuned: ModelPatcher, weight: float, schedule: str, power: float
) -> ModelPatcher:
    """A clone of `model` that predicts what it and `tuned` do, blended. See `sampler.guidance.anneal` for the rest.

    The wrapper is a function, which older hosts leave alone where they copy a model's options to the bottom.
    """
    guided, second = model.clone(), on_its_own(node, tuned, model)
    inner = guided.get_additional_models_with_key(KEY)  # a blend of a blend needs all of them loaded
    guided.set_additional_models(KEY, [*inner, second])
    network, kind = guided.model, guided.get_model_object("model_sampling")
    before = guided.model_options.get("model_function_wrapper")
    weights, known = weights_of(guided), list[Any]()

    def check(now: Any, sigma: Tensor) -> None:
        """now: the patcher that samples."""
        if getattr(now, "current_hooks", None):
            raise ValueError(
                f"{node}: the conditioning has a LoRA or weights of its own (hooks), which ComfyUI puts on model and "
                "not on tuned: load them on both models instead"
            )
        if names := names_of_keeping(now.model_options):
            raise ValueError(f"{node}: {names} {KEEPS}")
        samplings = [m.get_model_object("model_sampling") for m in (now, second)]
        if known == (seen := [now.patches_uuid, *samplings]):
            return
        later = "is put on `guided`, which changes the base model alone: put it on both models, before this node"
        if weights_of(now) != weights:
            raise ValueError(f"{node}: a LoRA or other weights {later}")
        if not alike_at(sigma, *samplings):
            raise ValueError(f"{node}: another model sampling {later}")
        known[:] = seen

    def call(apply: Callable, args: dict) -> Tensor:
        return before(apply, args) if before else apply(args["input"], args["timestep"], **args["c"])

    def both(apply: Callable, args: dict) -> Tensor:
        sigma, now = args["timestep"], network.current_patcher
        if now is None:  # what samples is a copy that stays where it is
            now = getattr(getattr(apply, "__self__", None), "current_patcher", None)
        if weight and now is not None:
            check(now, sigma)
        noise = share_of_noise(kind, sigma)
        w = anneal(weight, noise, power) if schedule == "annealed" else torch.full_like(noise, weight)
        if (w == 0).all():
            return call(apply, args)
        after = call(second.model.apply_model, of_another(own_control(args), second))
        if (w == 1).all():
            return after
        out = call(apply, own_control(args))
        return blend(out, after, w.reshape(-1, *[1] * (out.ndim - 1)).to(out))

    guided.set_model_unet_function_wrapper(both)
    return guided


def own_control(args: dict) -> dict:
    """The arguments of one call of a network, which takes a ControlNet's outputs off their lists as it goes."""
    control = args["c"].get("control")
    if control is None:
        return args
    return args | {"c": args["c"] | {"control": {k: list(v) for k, v in control.items()}}}


def of_another(args: dict, patcher: ModelPatcher) -> dict:
    """The arguments of a call, for another network than they were made for: under names of its own, by which caches
    tell conditionings apart (EasyCache), and without the compiled network that takes the place of any
    (TorchCompileModel).
    """
    options = dict(args["c"].get("transformer_options", {}))
    if "uuids" in options:
        options["uuids"] = [uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {id(patcher)}") for name in options["uuids"]]
    if wrappers := options.get("wrappers"):
        options["wrappers"] = {
            kind: {key: w for key, w in keyed.items() if key != COMPILED} for kind, keyed in wrappers.items()
        }
    return args | {"c": args["c"] | {"transformer_options": options}}


def same(a: Any, b: Any) -> bool:
    """Whether two clones' options or patches are the same things in the same places; what is in doubt is not."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or (isinstance(a, (str, int, float)) and a == b)


def is_untuned(tuned: ModelPatcher, model: ModelPatcher) -> bool:
    """Whether `tuned` is a clone of `model` with nothing changed, as Load LoRA leaves it when no name in the file fits.

    The model itself is no such clone: Load LoRA hands it on at strength 0, or bypassed.
    """
    parts = (
        "patches", "object_patches", "hook_patches", "weight_wrapper_patches", "model_options", "wrappers", "callbacks",
        "injections", "attachments", "additional_models",
    )  # fmt: skip
    alike = all(same(getattr(tuned, p, None), getattr(model, p, None)) for p in parts)
    return tuned is not model and tuned.model is model.model and alike


def alike_at(sigma: Tensor, one: Any, other: Any) -> bool:
    """Whether two of ComfyUI's model samplings read a network's output the same way at these noise levels, (B,)."""
    sigma = sigma.flatten()
    x = torch.linspace(-1, 1, len(sigma) * 4, device=sigma.device).reshape(-1, 4, 1, 1)

    def read(sampling: Any) -> list[Tensor]:
        return [
            sampling.timestep(sigma), sampling.calculate_input(sigma, x), sampling.calculate_denoised(sigma, x, 2 * x),
        ]  # fmt: skip

    return all(torch.allclose(a.float(), b.float(), rtol=1e-3) for a, b in zip(read(one), read(other), strict=True))


def weights_of(patcher: ModelPatcher) -> tuple:
    """What a patcher has on its model's weights and layers, as far as it takes to see that there is more."""
    return {name: len(patches) for name, patches in patcher.patches.items()}, set(getattr(patcher, "injections", ()))


def on_its_own(node: str, tuned: ModelPatcher, model: ModelPatcher) -> ModelPatcher:
    """A patcher of `tuned` that can be loaded beside `model`: a LoRA's clone shares the base model's weights, which
    hold either with it or without it, so it gets a copy of its own.
    """
    if is_dynamic(tuned):
        return static(tuned, f"{node}: tuned", own=True)
    patcher = tuned.clone()
    if tuned.model is not model.model:
        return patcher
    # Loaded clones have their patches in the shared weights: out with them before those are copied.
    comfy.model_management.unload_all_models()
    patcher.model = copied(tuned.model)
    patcher.backup, patcher.object_patches_backup = {}, {}
    # When a clone is gone, ComfyUI's list of what is loaded goes on with its parent: this one's has another network.
    patcher.parent = None
    return patcher
