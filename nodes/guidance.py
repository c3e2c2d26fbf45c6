"""Guidance at sampling time: by a reward-tuned model (RLG, AIG), and by a reward's gradient (DyMO)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..rewards.base import Reward
from ..sampler.guidance import anneal, blend
from .host.dymo import DyMOGuider, share_of_noise
from .host.dynamic import copied, is_dynamic, static
from .host.patches import only_in, why_no_gradient
from .shared.checks import check_links, check_reward, check_vae, check_values, needs, needs_gradient, prompts_of
from .shared.inputs import conditioned_inputs, prompt_input, vae_input
from .shared.types import aliases, reward_input

SCHEDULES = ("constant", "annealed")
KEY = "mira_tuned"


def own_control(args: dict) -> dict:
    """The arguments of one call of a network, which takes a ControlNet's outputs off their lists as it goes."""
    control = args["c"].get("control")
    if control is None:
        return args
    return args | {"c": args["c"] | {"control": {k: list(v) for k, v in control.items()}}}


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


def on_its_own(tuned: ModelPatcher, model: ModelPatcher) -> ModelPatcher:
    """A patcher of `tuned` that can be loaded beside `model`: a LoRA's clone shares the base model's weights, which
    hold either with it or without it, so it gets a copy of its own.
    """
    if is_dynamic(tuned):
        return static(tuned, f"{MiraRLGuidance.NAME}: tuned", own=True)
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


class MiraRLGuidance(io.ComfyNode):
    NAME = "MIRA RL Guidance"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraRLGuidance",
            **aliases("guidance", "lora blend"),
            display_name=cls.NAME,
            category="MIRA Alignment/guidance",
            description=(
                "Blends a model with its reward-tuned version (DDPO, Diffusion-DPO, D3PO ..., a checkpoint or a LoRA): "
                "base + weight * (tuned - base). Constant: Reinforcement Learning Guidance, a dial for the tuning. "
                "Annealed: Annealed Importance Guidance, the base model early and the tuned one late."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model. Every step costs both models."),
                io.Model.Input(
                    "tuned", tooltip="The reward-tuned model: of the same kind. A LoRA on the base costs a second copy."
                ),
                io.Float.Input(
                    "weight",
                    default=1.5,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="0: the base model, 1: the tuned one, above 1: beyond it (the paper uses 1 to 3).",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="constant",
                    tooltip="constant: RLG. annealed: AIG, from the base model at high noise to the weight at the end.",
                ),
                io.Float.Input(
                    "power",
                    default=1.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="Of annealed: above 1 the base model has its way for longer.",
                ),
            ],
            outputs=[io.Model.Output("guided", display_name="guided", tooltip="For any sampler, in place of model.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, tuned: ModelPatcher, weight: float, schedule: str, power: float
    ) -> io.NodeOutput:
        check_links(cls.NAME, model=model, tuned=tuned)
        check_values(cls.NAME, cls.define_schema().inputs, dict(weight=weight, power=power, schedule=schedule))
        injected = {*getattr(model, "injections", ()), *getattr(tuned, "injections", ())}
        if injected and tuned.model is model.model:
            raise ValueError(
                f"{cls.NAME}: {' and '.join(sorted(injected))} is in the layers that model and tuned share, where it "
                "cannot be for one of them alone: load that LoRA without bypass"
            )
        base_kind, tuned_kind = type(model.model).__name__, type(tuned.model).__name__
        latents = [m.get_model_object("latent_format").latent_channels for m in (model, tuned)]
        if base_kind != tuned_kind or latents[0] != latents[1]:
            raise ValueError(
                f"{cls.NAME}: model is a {base_kind} and tuned a {tuned_kind}: use a reward-tuned version of the same "
                "model"
            )
        if is_untuned(tuned, model):
            raise ValueError(
                f"{cls.NAME}: tuned has the same weights as model, so there is nothing to blend: no name in its LoRA's "
                "file fitted (ComfyUI's log has them as 'lora key not loaded'). docs/tuned.md shows which files load, "
                "and renames the others"
            )
        if names := only_in(tuned.model_options, model.model_options):
            raise ValueError(
                f"{cls.NAME}: tuned has patches that model has not ({names}), and of tuned only the weights are used: "
                "put them on model, where they hold for both, or take them off tuned"
            )
        kinds = [m.get_model_object("model_sampling") for m in (model, tuned)]
        if float(kinds[0].sigma_max) != float(kinds[1].sigma_max):
            raise ValueError(
                f"{cls.NAME}: model and tuned have different noise schedules (sigma up to "
                f"{float(kinds[0].sigma_max):.4g} and {float(kinds[1].sigma_max):.4g}): patch both the same way"
            )
        ends = torch.tensor([float(kinds[0].sigma_max), float(kinds[0].sigma_min)])
        if not alike_at(ends, *kinds):
            raise ValueError(
                f"{cls.NAME}: model and tuned read what their networks say in different ways (ModelSamplingDiscrete "
                "and the like): patch both the same way"
            )
        guided, second = model.clone(), on_its_own(tuned, model)
        inner = guided.get_additional_models_with_key(KEY)  # a blend of a blend needs all of them loaded
        guided.set_additional_models(KEY, [*inner, second])
        before = guided.model_options.get("model_function_wrapper")
        weights, known = weights_of(guided), list[Any]()
        later = "is put on `guided`, which changes the base model alone: put it on both models, before this node"

        def call(apply: Callable, args: dict) -> Tensor:
            return before(apply, args) if before else apply(args["input"], args["timestep"], **args["c"])

        def both(apply: Callable, args: dict) -> Tensor:
            sigma, now = args["timestep"], guided.model.current_patcher
            if weight and getattr(now, "current_hooks", None):
                raise ValueError(
                    f"{cls.NAME}: the conditioning has a LoRA or weights of its own (hooks), which ComfyUI puts on "
                    "model and not on tuned: load them on both models instead"
                )
            if weight and now is not None:
                samplings = [m.get_model_object("model_sampling") for m in (now, second)]
                if known != (seen := [now.patches_uuid, *samplings]):
                    if weights_of(now) != weights:
                        raise ValueError(f"{cls.NAME}: a LoRA or other weights {later}")
                    if not alike_at(sigma, *samplings):
                        raise ValueError(f"{cls.NAME}: another model sampling {later}")
                    known[:] = seen
            noise = share_of_noise(kinds[0], sigma)
            w = anneal(weight, noise, power) if schedule == "annealed" else torch.full_like(noise, weight)
            if (w == 0).all():
                return call(apply, args)
            after = call(second.model.apply_model, own_control(args))
            if (w == 1).all():
                return after
            out = call(apply, own_control(args))
            return blend(out, after, w.reshape(-1, *[1] * (out.ndim - 1)).to(out))

        guided.set_model_unet_function_wrapper(both)
        return io.NodeOutput(guided)


class MiraDyMOGuider(io.ComfyNode):
    NAME = "MIRA DyMO Guider"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraDyMOGuider",
            **aliases("guidance", "reward guidance"),
            display_name=cls.NAME,
            category="MIRA Alignment/guidance",
            description=(
                "A CFG guider that leans towards a reward at every step (the preference term of DyMO): nothing is "
                "optimised, one sample costs about three. For SamplerCustomAdvanced."
            ),
            inputs=[
                *conditioned_inputs(),
                vae_input(),
                reward_input(),
                io.Float.Input(
                    "cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Classifier-free guidance."
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip=(
                        "How far a step leans, in units of the difference that the prompt makes to the prediction. "
                        "1: as far (DyMO)."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From where in the noise schedule on. DyMO leaves the beginning to the prompt.",
                ),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="And until where."),
                prompt_input(),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list,
        negative: list,
        vae: VAE,
        reward: Reward,
        cfg: float,
        scale: float,
        start_percent: float,
        end_percent: float,
        prompt: str = "",
    ) -> io.NodeOutput:
        check_links(cls.NAME, model=model, positive=positive, negative=negative, vae=vae)
        check_reward(cls.NAME, reward)
        values = dict(cfg=cfg, scale=scale, start_percent=start_percent, end_percent=end_percent)
        check_values(cls.NAME, cls.define_schema().inputs, values)
        needs_gradient(cls.NAME, reward, "MIRA Search KSampler, which needs no gradient")
        needs(cls.NAME, reward, prompt, None)
        if start_percent > end_percent:
            raise ValueError(
                f"{cls.NAME}: start_percent {start_percent} lies after end_percent {end_percent}: swap them"
            )
        check_vae(cls.NAME, model, vae)
        guider = DyMOGuider(
            cls.NAME, model, vae, reward, partial(prompts_of, prompt), scale, start_percent, end_percent
        )
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        if why := why_no_gradient(guider):
            raise ValueError(f"{cls.NAME}: {why}")
        return io.NodeOutput(guider)
