"""ComfyUI's image families, small and with random weights: whatever the network is, its gradient is right.

`MIRA_FAMILIES=all` runs every one of them; otherwise a few that differ most.
"""

from __future__ import annotations

import os

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models as models
import pytest
import torch
from comfy.ldm.flux.model import FluxParams
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from mira import nodes
from mira.nodes import host
from mira.nodes.host import process
from mira.rewards.pixel import PixelReward

from testing.pack import as_node, weights_at_once
from tools.examples import EXAMPLES, needs_files

UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=[1, 1],
    transformer_depth=[0, 1], transformer_depth_output=[0, 0, 1, 1], transformer_depth_middle=1, num_head_channels=32,
    num_heads=-1, use_spatial_transformer=True, use_temporal_attention=False, legacy=False, context_dim=48,
)  # fmt: skip
FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=48, hidden_size=96,
    mlp_ratio=2.0, num_heads=3, depth=1, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=False,
)  # fmt: skip
if "txt_ids_dims" in FluxParams.__dataclass_fields__:  # newer cores
    FLUX["txt_ids_dims"] = []
MMDIT = dict(
    in_channels=16, patch_size=2, depth=2, input_size=None, adm_in_channels=32, pos_embed_max_size=32,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
    pos_embed_scaling_factor=None,
)  # fmt: skip
# name: (ComfyUI's configuration, its options, latent channels, frames or 0, what is in CI)
FAMILIES = {
    "SD15": (models.SD15, UNET, 4, 0, False),
    "SD20": (models.SD20, UNET | {"use_linear_in_transformer": True}, 4, 0, False),
    "SDXL": (models.SDXL, UNET | dict(num_classes="sequential", adm_in_channels=2816), 4, 0, True),
    "SD3": (models.SD3, MMDIT, 16, 0, True),
    "Flux": (models.Flux, FLUX, 16, 0, True),
    "AuraFlow": (
        models.AuraFlow,
        dict(global_conddim=96, max_seq=64, cond_seq_dim=48, n_layers=3, n_double_layers=1, dim=96, n_heads=3), 4, 0,
        False,
    ),
    "PixArtSigma": (
        models.PixArtSigma,
        dict(image_model="pixart_sigma", num_heads=3, hidden_size=96, depth=2, input_size=64, pe_interpolation=1,
             patch_size=2, in_channels=4, micro_condition=False, caption_channels=48, model_max_length=77), 4, 0,
        False,
    ),
    "HunyuanDiT": (
        models.HunyuanDiT,
        dict(image_model="hydit", depth=4, hidden_size=96, num_heads=3, mlp_ratio=2.0, patch_size=2, in_channels=4,
             text_states_dim=48, text_states_dim_t5=48, text_len=77, text_len_t5=77, input_size=None), 4, 0, False,
    ),
    "Lumina2": (
        models.Lumina2,
        dict(image_model="lumina2", patch_size=2, in_channels=16, dim=96, n_layers=2, n_refiner_layers=1, n_heads=3,
             n_kv_heads=3, axes_dims=[8, 12, 12], axes_lens=[300, 64, 64], cap_feat_dim=48, qk_norm=True), 16, 0, True,
    ),
    "QwenImage": (
        models.QwenImage,
        dict(image_model="qwen_image", num_layers=2, in_channels=64, out_channels=16, attention_head_dim=32,
             num_attention_heads=3, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)), 16, 1, True,
    ),
    "Chroma": (
        models.Chroma,
        {k: v for k, v in FLUX.items() if k not in ("vec_in_dim", "guidance_embed")}
        | dict(image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=96, hidden_dim=64, n_layers=2),
        16, 0, False,
    ),
    "ZImage": (
        getattr(models, "ZImage", None),
        dict(image_model="lumina2", patch_size=2, in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=8,
             n_kv_heads=8, axes_dims=[8, 12, 12], axes_lens=[300, 64, 64], cap_feat_dim=48, qk_norm=True,
             ffn_dim_multiplier=2.0, rope_theta=256.0, z_image_modulation=True, time_scale=1000.0,
             pad_tokens_multiple=32), 16, 0, False,
    ),
    "Flux2": (
        getattr(models, "Flux2", None),
        FLUX | dict(
            image_model="flux2", in_channels=128, out_channels=128, axes_dim=[8, 8, 8, 8], mlp_ratio=3.0, theta=2000,
            patch_size=1, qkv_bias=False, global_modulation=True, vec_in_dim=None, mlp_silu_act=True, ops_bias=False,
            default_ref_method="index", ref_index_scale=10.0,
        ),
        128, 0, False,
    ),
    "OmniGen2": (
        models.Omnigen2,
        dict(image_model="omnigen2", in_channels=16, hidden_size=96, num_layers=2, num_refiner_layers=1,
             num_attention_heads=3, num_kv_heads=3, multiple_of=32, axes_dim_rope=(8, 12, 12), axes_lens=(300, 64, 64),
             text_feat_dim=48), 16, 0, False,
    ),
    "CosmosPredict2": (
        models.CosmosT2IPredict2,
        dict(image_model="cosmos_predict2", max_img_h=64, max_img_w=64, max_frames=4, in_channels=16, out_channels=16,
             patch_spatial=2, patch_temporal=1, model_channels=96, num_blocks=2, num_heads=3,
             crossattn_emb_channels=48, pos_emb_cls="rope3d", use_adaln_lora=True, adaln_lora_dim=16), 16, 1, False,
    ),
    "CascadeC": (
        models.Stable_Cascade_C,
        dict(c_hidden=[64, 64], nhead=[2, 2], blocks=[[1, 2], [2, 1]], c_cond=64, c_clip_text=48,
             c_clip_text_pooled=32, c_clip_img=768, c_r=32, stable_cascade_stage="c"), 16, 0, False,
    ),
    "Wan21": (
        models.WAN21_T2V,
        dict(image_model="wan2.1", model_type="t2v", dim=96, ffn_dim=128, num_layers=2, num_heads=3, text_dim=48,
             patch_size=(1, 2, 2), freq_dim=64, in_dim=16, out_dim=16, qk_norm=True, cross_attn_norm=True, eps=1e-6),
        16, 1, False,
    ),
}  # fmt: skip
FAMILIES = {name: family for name, family in FAMILIES.items() if family[0]}  # older cores lack the newest
HERE = [name for name, family in FAMILIES.items() if family[-1] or os.environ.get("MIRA_FAMILIES") == "all"]


class Decoder(torch.nn.Module):
    """A small decoder of any number of channels, of images or of one frame."""

    def __init__(self, channels: int):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Upsample(scale_factor=2),
            torch.nn.Conv2d(16, 3, 3, padding=1),
        )  # fmt: skip

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        frames = z.shape[2] if z.ndim == 5 else 0
        images = self.layers(z[:, :, 0] if frames else z)
        return images.unsqueeze(2) if frames else images


class Vae:
    """What `host` asks of ComfyUI's VAE."""

    vae_dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, channels: int):
        self.latent_channels = channels
        self.device = comfy.model_management.get_torch_device()
        self.first_stage_model = Decoder(channels)
        self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, self.device, torch.device("cpu"))

    def process_output(self, image):
        return image.add(1).div(2).clamp(0, 1)

    def memory_used_decode(self, shape, dtype):
        return 0


def made(name: str, dtype=torch.float32):
    """(model, VAE, conditioning, latent)."""
    kind, options, channels, frames, _ = FAMILIES[name]
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(), weights_at_once():
        config = kind(dict(options))
        config.set_inference_dtype(dtype, None)
        torch.manual_seed(0)
        model = config.get_model({}, "", device=device)
        for p in model.diffusion_model.parameters():
            p.fill_(1) if p.ndim == 1 else p.normal_(0, 0.7 / p[0].numel() ** 0.5)
        patcher = comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))
        g = torch.Generator().manual_seed(3)
        length = 77
        width = 32 if name != "SDXL" else 1280

        def cond():
            extra = {"pooled_output": torch.randn(1, width, generator=g)}
            if name == "HunyuanDiT":
                extra |= {
                    "conditioning_mt5xl": torch.randn(1, length, 48, generator=g),
                    "attention_mask_mt5xl": torch.ones(1, length),
                    "attention_mask": torch.ones(1, length),
                }
            if name in ("Lumina2", "ZImage", "OmniGen2", "QwenImage"):
                extra |= {"attention_mask": torch.ones(1, length, dtype=torch.long), "num_tokens": length}
            return [[torch.randn(1, length, 48, generator=g), extra]]

        side = 40 if name.startswith("PixArt") else 16  # its positions count in pieces of 64, rounded
        shape = (1, channels, 1, side, side) if frames else (1, channels, side, side)
        return patcher, Vae(channels), {"positive": cond(), "negative": cond()}, torch.zeros(shape)


def optimize(world, parts, sampler="euler", **options):
    model, vae, conds, latent = parts
    with torch.inference_mode():
        job = world.job(
            model=model, vae=vae, latent=latent, sampler=sampler, steps=3, cfg=3.0, iterations=2, beta=0, **conds,
            **options,
        )  # fmt: skip
        return host.run(job)


@pytest.mark.every_host
@pytest.mark.parametrize("name", HERE)
def test_a_family_is_optimised_rightly(world, name, monkeypatch):
    seen = []
    original = process.check
    monkeypatch.setattr(process, "check", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    parts = made(name)
    done = {memory: optimize(world, parts, memory=memory) for memory in ("none", "per_step", "per_block")}
    assert max(c.wrong for c in seen) < 0.05 and max(c.moved for c in seen) < 1e-3
    model, _, conds, latent = parts
    stock = world.ksampler(model=model, latent=latent, steps=3, cfg=3.0, sampler="euler", **conds)
    assert torch.equal(done["none"].plain, stock) and done["none"].latent.shape == stock.shape
    rewards = [r["reward"] for r in done["none"].result.trace.of(0)]
    assert rewards[-1] > rewards[0]
    for memory in ("per_step", "per_block"):
        scale = done["none"].latent.abs().max().item()
        torch.testing.assert_close(done[memory].latent, done["none"].latent, atol=1e-3 * scale, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in HERE if n in ("SDXL", "Flux") or os.environ.get("MIRA_FAMILIES") == "all"])
def test_in_half_precision(world, name, dtype):
    done = optimize(world, made(name, dtype))
    rewards = [r["reward"] for r in done.result.trace.of(0)]
    assert torch.isfinite(done.latent).all() and max(rewards) > rewards[0]


def test_a_frame_is_an_image_and_a_video_is_refused(world):
    from mira.nodes.shared.checks import check_latent

    model, vae, _, latent = made("QwenImage")
    sampler = __import__("comfy.samplers").samplers.sampler_object("euler")
    check_latent("here", model, {"samples": latent}, vae, sampler, {})
    check_latent("here", model, {"samples": torch.zeros(1, 16, 16, 16)}, vae, sampler, {})
    with pytest.raises(ValueError, match="only images"):
        check_latent("here", model, {"samples": torch.zeros(1, 16, 5, 16, 16)}, vae, sampler, {})
    assert PixelReward("brightness").facts.differentiable


# What the examples for checkpoints are about.
OF = {
    "mira_sd15_aesthetic": "SD15", "mira_sdxl_hps": "SDXL", "mira_sdxl_lightning": "SDXL",
    "mira_z_image_turbo": "ZImage", "mira_flux2_klein": "Flux2", "mira_qwen_image": "QwenImage",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in EXAMPLES if needs_files(name)])
def test_an_example_runs_on_a_small_network_of_its_family(world, name):
    """As it is saved, but for sizes, the scorer, and how often."""
    if OF[name] not in FAMILIES:
        pytest.skip("this ComfyUI does not know the model")
    model, vae, conds, latent = made(OF[name])
    described = EXAMPLES[name]()
    said = described["mira"].values
    shared = dict(
        latent_image={"samples": latent}, vae=vae, reward=PixelReward("brightness"), prompt="a fox",
        preset=said.get("preset", "balanced"), iterations=4,
    )  # fmt: skip
    with torch.inference_mode():
        if described["mira"].kind == "MiraOptimizeKSampler":
            options = {"steps": 20, "cfg": 5.0, "sampler_name": "euler_ancestral", "scheduler": "normal"} | said
            options["steps"] = min(options["steps"], 8)
            done = as_node(nodes.MiraOptimizeKSampler).execute(model=model, **conds, **(options | shared))
        else:
            done = as_node(nodes.MiraOptimizeSamplerAdvanced).execute(
                noise=Noise_RandomNoise(described["noise"].values["noise_seed"]),
                guider=world.guider(model, **conds, cfg=described["guider"].values["cfg"]),
                sampler=comfy.samplers.sampler_object(described["sampler"].values["sampler_name"]),
                sigmas=world.sigmas(model, steps=described["sigmas"].values["steps"], scheduler="simple"), **shared,
            )  # fmt: skip
    optimized, plain, trace = done.args[:3]
    rows = trace.of(0)
    assert optimized["samples"].shape == plain["samples"].shape and len(rows) > 4
    assert rows[trace.kept[0]]["reward"] > rows[0]["reward"]


@pytest.mark.parametrize("memory", ["none", "per_block"])
def test_guidance_that_rescales_in_place(world, memory):
    """Skip layer guidance multiplies its result where it is."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT as Node

    model, *rest = made("SD3")
    options = dict(
        model=model, double_layers="0", single_layers="", scale=3.0, start_percent=0.0, end_percent=1.0,
        rescaling_scale=0.5,
    )  # fmt: skip
    with torch.inference_mode():
        patched = Node.execute(**options) if hasattr(Node, "execute") else Node().skip_guidance(**options)
        patched = (patched.args if hasattr(patched, "args") else patched)[0]
    rewards = [r["reward"] for r in optimize(world, (patched, *rest), memory=memory).result.trace.of(0)]
    assert rewards[-1] > rewards[0]
