"""UNets of SD1.5's architecture with random weights, its own size and a small one; and a small VAE."""

from __future__ import annotations

from collections.abc import Callable

from testing.pack import weights_at_once, with_comfyui

with_comfyui()

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch

from testing.world import World, demo

SD15 = dict(
    in_channels=4, out_channels=4, model_channels=320, channel_mult=[1, 2, 4, 4], num_res_blocks=[2, 2, 2, 2],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    transformer_depth_middle=1, context_dim=768, num_heads=8, num_head_channels=-1, image_size=32,
    use_spatial_transformer=True, use_linear_in_transformer=False, adm_in_channels=None,
    use_temporal_attention=False, legacy=False,
)  # fmt: skip
# The demo model's kinds of block on two levels, each as rarely as may be. (A narrower one GroupNorm does not allow.)
SMALL = demo.demo_unet.CONFIG | dict(
    model_channels=32, num_res_blocks=[0, 1], channel_mult=[1, 1], transformer_depth=[0],
    transformer_depth_output=[0, 1, 0],
)  # fmt: skip


def random_unet(config: dict, dtype: torch.dtype | None = None) -> comfy.model_patcher.ModelPatcher:
    """The same weights every time; dtype: float32, or float16 on a GPU, if it is not given. In dynamic VRAM where that
    is on, and then it can be loaded again without, as from a file.
    """
    device = comfy.model_management.get_torch_device()
    config = demo.DemoSD15(config)
    config.set_inference_dtype(dtype or (torch.float16 if device.type == "cuda" else torch.float32), None)
    torch.manual_seed(0)
    with torch.inference_mode(), weights_at_once():
        model = config.get_model({}, "", device=device)
        for name, p in model.diffusion_model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 1 / p[0].numel() ** 0.5)
            else:
                p.fill_(name.endswith("weight"))
        model.diffusion_model.out[-1].weight.mul_(0.3)  # as smooth a path as a trained model's
    plain, offload = comfy.model_patcher.ModelPatcher, comfy.model_management.unet_offload_device()
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    if kind is plain:
        return plain(model, device, offload)
    weights = {k: v.to("cpu", copy=True) for k, v in model.diffusion_model.state_dict().items()}

    def load(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
        with torch.inference_mode():
            network = config.get_model({}, "", device=offload)
            patcher = (plain if disable_dynamic else kind)(network, device, offload)
            network.load_model_weights(dict(weights), "", assign=patcher.is_dynamic())
        patcher.cached_patcher_init = (load, ())
        return patcher

    return load()


THIN = 16  # channels of the thin VAE, of the demo's 64


def thin_vae() -> comfy.sd.VAE:
    """The demo's with the two smallest of its residual blocks in either direction, and a quarter of its channels: in a
    twentieth of the time.
    """
    with torch.inference_mode():
        vae = demo.load_vae()
        decoder, encoder = vae.first_stage_model.taesd_decoder, vae.first_stage_model.taesd_encoder
        for layers, kept in ((decoder, (3, 8)), (encoder, (7, 11))):
            for number, layer in enumerate(layers):
                if type(layer).__name__ == "Block" and number not in kept:
                    layers[number] = torch.nn.Identity()
            for layer in layers.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    _keep_channels(layer)
        decoder[-1].weight.mul_(0.16)  # without the others its colours are far outside of an image's
    return vae


def _keep_channels(layer: torch.nn.Conv2d) -> None:
    """The first `THIN` of each side that has more, with outputs as large as of all."""
    rows, columns = min(layer.out_channels, THIN), min(layer.in_channels, THIN)
    weight = layer.weight[:rows, :columns] * (layer.in_channels / columns) ** 0.5
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(layer.bias[:rows].clone(), requires_grad=False)
    layer.out_channels, layer.in_channels = rows, columns


def small_world(**changes) -> World:
    """Networks that paint nothing, in a small part of the demo model's time."""
    return World(side=8, model=random_unet(SMALL, torch.float32), vae=thin_vae(), **changes)


def with_control(world: World, kept: Callable = lambda patcher: patcher) -> list:
    """The world's positive conditioning with a ControlNet of the network's shape and random weights. kept: the patcher
    that ComfyUI keeps it by, of its own.
    """
    from comfy.cldm.cldm import ControlNet

    config = {k: v for k, v in SMALL.items() if k not in ("out_channels", "transformer_depth_output")}
    with torch.inference_mode(), weights_at_once():
        torch.manual_seed(1)
        network = ControlNet(**config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.manual_cast)
        for p in network.parameters():
            p.data = torch.randn_like(p) * 0.02
        control = comfy.controlnet.ControlNet(network, load_device=world.model.load_device)
        control.control_model_wrapped = kept(control.control_model_wrapped)
        control = control.copy().set_cond_hint(torch.full((1, 3, 64, 64), 0.3), 0.5, (0.0, 1.0))
    (text, extra), *_ = world.positive
    return [[text, {**extra, "control": control, "control_apply_to_uncond": True}]]


def random_lora(model: comfy.model_patcher.ModelPatcher, scale: float, layers: tuple[str, ...] = ("to_v",)) -> dict:
    """Of rank 4, on the second attention in the middle of such a UNet, as Load LoRA reads it; the same every time."""
    g, lora = torch.Generator().manual_seed(0), {}
    for layer in layers:
        module = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.get_submodule(layer)
        name = f"lora_unet_middle_block_1_transformer_blocks_0_attn2_{layer.replace('.', '_')}"
        lora |= {
            f"{name}.lora_up.weight": torch.randn(module.out_features, 4, generator=g) * scale,
            f"{name}.lora_down.weight": torch.randn(4, module.in_features, generator=g) * scale,
            f"{name}.alpha": torch.tensor(4.0),
        }
    return lora


def sd15(dtype: torch.dtype | None = None, **config) -> comfy.model_patcher.ModelPatcher:
    """config: what is to be other than in SD1.5's own configuration."""
    return random_unet(SD15 | config, dtype)
