"""Guidance at sampling time: by a reward-tuned model (RLG, AIG), and by a reward's gradient (DyMO)."""

from __future__ import annotations

from functools import partial

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io

from ..rewards.base import Reward
from .host.blending import rl_guidance, why_not_alike
from .host.dymo import DyMOGuider
from .host.patches import why_no_gradient
from .shared.checks import check_links, check_reward, check_vae, check_values, needs, needs_gradient, prompts_of
from .shared.inputs import conditioned_inputs, prompt_input, vae_input
from .shared.types import aliases, reward_input

SCHEDULES = ("constant", "annealed")


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
        if why := why_not_alike(model, tuned):
            raise ValueError(f"{cls.NAME}: {why}")
        return io.NodeOutput(rl_guidance(cls.NAME, model, tuned, weight, schedule, power))


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
