"""The nodes that ComfyUI sees: nothing outside this folder and the root `__init__.py` imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .demo import MiraDemoAesthetic, MiraDemoCLIPScore, MiraDemoModel
from .editor import judges, live, on_disk
from .guidance import MiraDyMOGuider, MiraRLGuidance
from .initno import MiraInitNONoise
from .loaders import (
    MiraLoadAestheticReward,
    MiraLoadCLIPScore,
    MiraLoadHPSReward,
    MiraLoadImageReward,
    MiraLoadPickScoreReward,
)
from .monitor import MiraDriftMonitor
from .noise import MiraGoldenNoise, MiraLoadNoise, MiraSaveNoise
from .optimize import MiraOptimizeKSampler, MiraOptimizeSamplerAdvanced
from .preference import MiraDPOPreference
from .record import MiraLoadTrace
from .rewards import (
    MiraAugmentReward,
    MiraCombineRewards,
    MiraJPEGReward,
    MiraPixelReward,
    MiraRelativeReward,
    MiraRewardFromHTTP,
    MiraRewardFromPython,
)
from .score import MiraRankImages, MiraScoreImages
from .search import MiraSearchKSampler, MiraTiltKSampler
from .shared import files

NODES: list[type[io.ComfyNode]] = [
    MiraOptimizeKSampler,
    MiraOptimizeSamplerAdvanced,
    MiraDPOPreference,
    MiraSearchKSampler,
    MiraTiltKSampler,
    MiraRLGuidance,
    MiraDyMOGuider,
    MiraInitNONoise,
    MiraPixelReward,
    MiraJPEGReward,
    MiraLoadAestheticReward,
    MiraLoadHPSReward,
    MiraLoadPickScoreReward,
    MiraLoadImageReward,
    MiraLoadCLIPScore,
    MiraDemoCLIPScore,
    MiraDemoAesthetic,
    MiraRewardFromPython,
    MiraRewardFromHTTP,
    MiraCombineRewards,
    MiraAugmentReward,
    MiraRelativeReward,
    MiraScoreImages,
    MiraRankImages,
    MiraDriftMonitor,
    MiraLoadTrace,
    MiraSaveNoise,
    MiraLoadNoise,
    MiraGoldenNoise,
    MiraDemoModel,
]


class MiraExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> MiraExtension:
    judges.register_routes()
    live.register_routes()
    PromptServer.instance.add_on_prompt_handler(on_disk.remembered)
    files.register()  # before the schemas list what is in it
    return MiraExtension()
