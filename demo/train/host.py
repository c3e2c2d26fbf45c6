"""ComfyUI's network definitions for training: choose CPU and SDPA before anything of ComfyUI is imported."""

import comfy.cli_args
import torch

comfy.cli_args.args.cpu = not torch.cuda.is_available()
comfy.cli_args.args.use_pytorch_cross_attention = True
