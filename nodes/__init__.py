"""The nodes that ComfyUI sees: nothing outside this folder and the root `__init__.py` imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .demo import MiraDemoCLIPScore, MiraDemoModel
from .optimize import MiraOptimizeKSampler, MiraOptimizeSamplerAdvanced
from .rewards import MiraCombineRewards, MiraPixelReward

NODES: list[type[io.ComfyNode]] = [
    MiraOptimizeKSampler,
    MiraOptimizeSamplerAdvanced,
    MiraPixelReward,
    MiraDemoCLIPScore,
    MiraCombineRewards,
    MiraDemoModel,
]


class MiraExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> MiraExtension:
    return MiraExtension()
