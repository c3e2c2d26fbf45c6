"""The published files, for whoever has to say what is missing and where it comes from. Sizes in GB (10^9 bytes)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    file: str
    gigabytes: float
    model: str  # its public id
    licence: str
    there: str = ""  # its name there, where that is another


AESTHETIC_HEAD = Published(
    "sac+logos+ava1-l14-linearMSE.pth",
    0.004,
    "christophschuhmann/improved-aesthetic-predictor (GitHub)",
    "Apache-2.0",
)
CLIP_L = Published(
    "clip-vit-large-patch14.safetensors", 1.71, "openai/clip-vit-large-patch14", "MIT", "model.safetensors"
)
HPS_2 = Published("HPS_v2_compressed.pt", 1.97, "xswu/HPSv2", "Apache-2.0")
HPS_21 = Published("HPS_v2.1_compressed.pt", 1.97, "xswu/HPSv2", "Apache-2.0")
PICKSCORE = Published("PickScore_v1.safetensors", 3.94, "yuvalkirstain/PickScore_v1", "MIT", "model.safetensors")
GOLDEN_NOISE = Published("sdxl.pth", 0.13, "Klayand/GoldenNoiseModel", "none stated")
IMAGE_REWARD = Published("ImageReward.pt", 1.79, "zai-org/ImageReward", "Apache-2.0")
