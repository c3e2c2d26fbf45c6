"""ComfyUI's network definitions for training: the device and SDPA are chosen before they are imported."""

import comfy.cli_args
import torch

comfy.cli_args.args.cpu = not torch.cuda.is_available()
comfy.cli_args.args.use_pytorch_cross_attention = True

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD

__all__ = ["TAESD", "UNetModel"]
