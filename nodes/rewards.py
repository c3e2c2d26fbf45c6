"""Reward nodes that need no file."""

from __future__ import annotations

from comfy_api.latest import io

from ..rewards.combine import WeightedSum
from ..rewards.pixel import MEASURES, PixelReward
from .types import MiraReward

SLOTS = 4


class MiraPixelReward(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MiraPixelReward",
            display_name="Pixel Reward",
            category="MIRA/rewards",
            description="A reward that is a formula of the pixels: the mean brightness or darkness, from -1 to 1.",
            inputs=[
                io.Combo.Input(
                    "measure",
                    options=list(MEASURES),
                    tooltip="brightness: the mean pixel, -1 is black and 1 is white; darkness: its negative.",
                )
            ],
            outputs=[MiraReward.Output("reward", display_name="reward")],
        )

    @classmethod
    def execute(cls, measure) -> io.NodeOutput:
        return io.NodeOutput(PixelReward(measure))


class MiraCombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = []
        for i in range(1, SLOTS + 1):
            inputs += [
                MiraReward.Input(f"reward_{i}", optional=i > 1),
                io.Float.Input(
                    f"weight_{i}",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.01,
                    optional=i > 1,
                    tooltip=f"What reward_{i} counts, in its own units. Negative: less of it.",
                ),
            ]
        return io.Schema(
            node_id="MiraCombineRewards",
            display_name="Combine Rewards",
            category="MIRA/rewards",
            description=(
                "A weighted sum of rewards; each part stays in the record. Rewards have different scales: "
                "a CLIPScore of 100 weighs as much as a brightness of 1 with weights 0.01 and 1."
            ),
            inputs=inputs,
            outputs=[MiraReward.Output("reward", display_name="reward")],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        used = [i for i in range(1, SLOTS + 1) if inputs.get(f"reward_{i}") is not None]
        weights = [inputs.get(f"weight_{i}", 1.0) for i in used]
        if not any(weights):
            raise ValueError("Combine Rewards: every weight is 0, so there is nothing to optimise; set one")
        return io.NodeOutput(WeightedSum([inputs[f"reward_{i}"] for i in used], weights))
