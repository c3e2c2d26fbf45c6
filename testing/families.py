"""ComfyUI's image families at reduced size with random weights, as a ComfyUI that knows them builds them."""

from __future__ import annotations

import importlib
import math
import zlib
from dataclasses import dataclass, field

from testing.pack import weights_at_once, with_comfyui

with_comfyui()

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch


@dataclass(frozen=True)
class Family:
    """config: the name of ComfyUI's configuration. channels: of a latent, which has one frame where `frame`. width: of
    the text's embedding. pooled: of the whole text's. extra: what else is in the conditioning. pixels: there is no
    VAE. side: of a latent. quick: among the few that every run of the tests looks at.
    """

    config: str
    options: dict
    channels: int
    frame: bool = False
    width: int = 48
    pooled: int = 32
    extra: dict = field(default_factory=dict)
    pixels: bool = False
    side: int = 16
    quick: bool = False


LENGTH = 77  # of a text, in tokens
MASKED = {"attention_mask": torch.ones(1, LENGTH, dtype=torch.long), "num_tokens": LENGTH}
UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=[1, 1],
    transformer_depth=[0, 1], transformer_depth_output=[0, 0, 1, 1], transformer_depth_middle=1, num_head_channels=32,
    num_heads=-1, use_spatial_transformer=True, use_temporal_attention=False, legacy=False, context_dim=48,
)  # fmt: skip
FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=48, hidden_size=96,
    mlp_ratio=2.0, num_heads=3, depth=1, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=False, txt_ids_dims=[],
)  # fmt: skip
CHROMA = FLUX | dict(image_model="chroma", in_dim=64, out_dim=96, hidden_dim=64, n_layers=2, vec_in_dim=None)
MMDIT = dict(
    in_channels=16, patch_size=2, depth=2, input_size=None, adm_in_channels=32, pos_embed_max_size=32,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
    pos_embed_scaling_factor=None,
)  # fmt: skip
PIXART = dict(
    num_heads=3, hidden_size=96, depth=2, input_size=64, pe_interpolation=1, patch_size=2, in_channels=4,
    micro_condition=False, caption_channels=48, model_max_length=LENGTH,
)  # fmt: skip
HYDIT = dict(
    depth=4, hidden_size=96, num_heads=3, mlp_ratio=2.0, patch_size=2, in_channels=4, text_states_dim=48,
    text_states_dim_t5=48, text_len=LENGTH, text_len_t5=LENGTH, input_size=None,
)  # fmt: skip
HYDIT_TEXT = {
    "conditioning_mt5xl": torch.randn(1, LENGTH, 48, generator=torch.Generator().manual_seed(4)),
    "attention_mask_mt5xl": torch.ones(1, LENGTH), "attention_mask": torch.ones(1, LENGTH),
}  # fmt: skip
# "<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n<|boi_token|><|tms_token|>"
HIDREAM_TEXT = [151644, 872, 198, 100, 200, 300, 151645, 198, 151644, 77091, 198, 151669, 151673]
COSMOS = dict(
    max_img_h=64, max_img_w=64, max_frames=4, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
    model_channels=96, num_blocks=2, num_heads=3, crossattn_emb_channels=48, pos_emb_cls="rope3d", use_adaln_lora=True,
    adaln_lora_dim=16,
)  # fmt: skip
LUMINA = dict(
    patch_size=2, in_channels=16, dim=96, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3,
    axes_dims=[8, 12, 12], axes_lens=[300, 64, 64], cap_feat_dim=48, qk_norm=True,
)  # fmt: skip
ZIMAGE = LUMINA | dict(
    dim=256, n_heads=8, n_kv_heads=8, ffn_dim_multiplier=2.0, rope_theta=256.0, z_image_modulation=True,
    time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip
OMNIGEN = dict(
    in_channels=16, hidden_size=96, num_layers=2, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=3,
    multiple_of=32, axes_dim_rope=(8, 12, 12), axes_lens=(300, 64, 64),
)  # fmt: skip
QWEN = dict(
    num_layers=2, attention_head_dim=32, num_attention_heads=3, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
)
HUNYUAN = dict(
    image_model="hunyuan_video", in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, axes_dim=[16, 16],
    context_in_dim=48, hidden_size=96, mlp_ratio=2.0, num_heads=3, depth=1, depth_single_blocks=2, theta=256,
    qkv_bias=True, byt5=False, guidance_embed=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None,
    meanflow_sum=False,
)  # fmt: skip

FAMILIES = {
    "SD 1.5": Family("SD15", UNET, 4),
    "SD 2": Family("SD20", UNET | {"use_linear_in_transformer": True}, 4),
    "SDXL": Family("SDXL", UNET | dict(num_classes="sequential", adm_in_channels=2816), 4, pooled=1280, quick=True),
    "SDXL refiner": Family(
        "SDXLRefiner", UNET | dict(num_classes="sequential", adm_in_channels=2560), 4, pooled=1280
    ),
    "Stable Cascade (stage C)": Family(
        "Stable_Cascade_C",
        dict(c_hidden=[64, 64], nhead=[2, 2], blocks=[[1, 2], [2, 1]], c_cond=64, c_clip_text=48,
             c_clip_text_pooled=32, c_clip_img=768, c_r=32, stable_cascade_stage="c"), 16,
    ),
    "SD 3": Family("SD3", MMDIT, 16, quick=True),
    "AuraFlow": Family(
        "AuraFlow", dict(global_conddim=96, max_seq=64, cond_seq_dim=48, n_layers=3, n_double_layers=1, dim=96,
                         n_heads=3), 4,
    ),
    # The positions of the next two count in pieces of 64, rounded.
    "PixArt alpha": Family("PixArtAlpha", PIXART | {"image_model": "pixart_alpha"}, 4, side=40),
    "PixArt sigma": Family("PixArtSigma", PIXART | {"image_model": "pixart_sigma"}, 4, side=40),
    "HunyuanDiT": Family("HunyuanDiT", HYDIT | {"image_model": "hydit"}, 4, extra=HYDIT_TEXT),
    "HunyuanDiT 1.1": Family("HunyuanDiT1", HYDIT | {"image_model": "hydit1"}, 4, extra=HYDIT_TEXT),
    "HunyuanImage 2.1": Family("HunyuanImage21", HUNYUAN, 64),
    "FLUX.1": Family("Flux", FLUX, 16, quick=True),
    "FLUX.2": Family(
        "Flux2",
        FLUX | dict(
            image_model="flux2", in_channels=128, out_channels=128, axes_dim=[8, 8, 8, 8], mlp_ratio=3.0, theta=2000,
            patch_size=1, qkv_bias=False, global_modulation=True, vec_in_dim=None, mlp_silu_act=True, ops_bias=False,
            default_ref_method="index", ref_index_scale=10.0,
        ), 128,
    ),
    "LongCat-Image": Family("LongCatImage", FLUX | dict(vec_in_dim=None, txt_ids_dims=[1, 2]), 16),
    "Chroma": Family("Chroma", CHROMA | dict(in_channels=64, out_channels=64), 16),
    "Chroma Radiance": Family(
        "ChromaRadiance",
        CHROMA | dict(
            image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=16,
            nerf_mlp_ratio=2, nerf_depth=2, nerf_max_freqs=4, nerf_tile_size=512, nerf_final_head_type="conv",
            nerf_embedder_dtype=torch.float32, use_x0=False,
            use_sequential_txt_ids=False,
        ), 3, pixels=True, side=64,
    ),
    "HiDream-I1": Family(
        "HiDream",
        dict(image_model="hidream", attention_head_dim=32, axes_dims_rope=[16, 8, 8], caption_channels=[48, 48],
             max_resolution=[32, 32], in_channels=16, llama_layers=[0, 1], num_attention_heads=3, num_routed_experts=4,
             num_activated_experts=2, num_layers=1, num_single_layers=1, out_channels=16, patch_size=2,
             text_emb_dim=32), 16,
        extra={"conditioning_llama3": torch.randn(1, 2, LENGTH, 48, generator=torch.Generator().manual_seed(5))},
    ),
    "Lumina 2": Family("Lumina2", LUMINA | {"image_model": "lumina2"}, 16, extra=MASKED, quick=True),
    "Z-Image": Family("ZImage", ZIMAGE | {"image_model": "lumina2"}, 16, extra=MASKED),
    "Z-Image (pixels)": Family(
        "ZImagePixelSpace",
        ZIMAGE | dict(image_model="zimage_pixel", patch_size=16, in_channels=3, decoder_in_channels=768,
                      decoder_hidden_size=64, decoder_num_res_blocks=2, decoder_max_freqs=4), 3,
        extra=MASKED, pixels=True, side=64,
    ),
    "HiDream-O1": Family(
        "HiDreamO1",
        dict(
            image_model="hidream_o1",
            text_config_overrides=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                       num_attention_heads=2, num_key_value_heads=1, head_dim=32, rope_dims=[8, 4, 4]),
            vision_config_overrides=dict(hidden_size=64, num_heads=2, intermediate_size=128, depth=1,
                                         num_position_embeddings=16),
        ), 3, pixels=True, side=64, extra={"text_input_ids": torch.tensor([HIDREAM_TEXT])},
    ),
    "OmniGen 2": Family("Omnigen2", OMNIGEN | {"image_model": "omnigen2", "text_feat_dim": 48}, 16, extra=MASKED),
    "Boogu": Family(
        "Boogu", OMNIGEN
        | {"image_model": "boogu", "instruction_feat_dim": 48, "num_double_stream_layers": 1}, 16, extra=MASKED,
    ),
    "Qwen-Image": Family(
        "QwenImage", QWEN | dict(image_model="qwen_image", in_channels=64, out_channels=16), 16, frame=True,
        extra=MASKED, quick=True,
    ),
    "Mage-Flow": Family("MageFlow", QWEN | dict(image_model="mage_flow", in_channels=128, out_channels=128), 128),
    "Cosmos Predict 2": Family("CosmosT2IPredict2", COSMOS | {"image_model": "cosmos_predict2"}, 16, frame=True),
    "Anima": Family(
        "Anima", COSMOS | {"image_model": "anima", "crossattn_emb_channels": 1024}, 16, frame=True, width=1024,
        extra={"t5xxl_ids": torch.arange(LENGTH), "t5xxl_weights": torch.ones(LENGTH)},
    ),
    "Wan 2.1": Family(
        "WAN21_T2V",
        dict(image_model="wan2.1", model_type="t2v", dim=96, ffn_dim=128, num_layers=2, num_heads=3, text_dim=48,
             patch_size=(1, 2, 2), freq_dim=64, in_dim=16, out_dim=16, qk_norm=True, cross_attn_norm=True, eps=1e-6),
        16, frame=True,
    ),
    "Kandinsky 5": Family(
        "Kandinsky5Image",
        dict(image_model="kandinsky5", model_dim=96, axes_dims=(8, 12, 12), rope_scale_factor=(1.0, 1.0, 1.0),
             time_dim=64, ff_dim=128, visual_embed_dim=64, num_text_blocks=1, num_visual_blocks=2, in_text_dim=48,
             in_text_dim2=32), 16, frame=True,
    ),
    "Krea 2": Family(
        "Krea2",
        dict(image_model="krea2", features=96, channels=16, patch=2, layers=2, heads=3, kvheads=3, txtlayers=2,
             txtdim=24, txtheads=2, txtkvheads=2), 16, frame=True,
    ),
    "JoyImage": Family(
        "JoyImage",
        dict(image_model="joyimage", in_channels=16, hidden_size=96, patch_size=[1, 2, 2], num_layers=2,
             num_attention_heads=3, text_dim=48, rope_dim_list=[8, 12, 12]), 16, frame=True, quick=True,
    ),
    "Ideogram 4": Family(
        "Ideogram4",
        dict(image_model="ideogram4", in_channels=128, num_layers=2, num_attention_heads=3, attention_head_dim=32,
             intermediate_size=128, adaln_dim=32, llm_features_dim=48, rope_theta=10000, mrope_section=(8, 4, 4),
             norm_eps=1e-5), 128,
    ),
    "Lens": Family(
        "Lens",
        dict(image_model="lens", in_channels=128, out_channels=32, num_layers=2, num_attention_heads=2,
             enc_hidden_dim=24, multi_layer_encoder_feature=True, selected_layer_index=(0, 1)), 128,
    ),
    "PixelDiT": Family(
        "PixelDiTT2I",
        dict(image_model="pixeldit_t2i", num_groups=3, hidden_size=96, pixel_hidden_size=8, pixel_attn_hidden_size=96,
             pixel_num_groups=3, patch_depth=2, pixel_depth=1, patch_size=16, txt_embed_dim=48,
             txt_max_length=LENGTH), 3, pixels=True, side=64, quick=True,
    ),
    "ERNIE-Image": Family(
        "ErnieImage",
        dict(image_model="ernie", hidden_size=96, num_attention_heads=3, num_layers=2, ffn_hidden_size=128,
             in_channels=128, out_channels=128, patch_size=1, text_in_dim=48, rope_axes_dim=(8, 12, 12)), 128,
    ),
}  # fmt: skip


# Families whose network takes a dataclass of options, which gained fields over time.
PARAMS = {
    "flux": "flux.model.FluxParams", "flux2": "flux.model.FluxParams", "chroma": "chroma.model.ChromaParams",
    "chroma_radiance": "chroma_radiance.model.ChromaRadianceParams",
    "hunyuan_video": "hunyuan_video.model.HunyuanVideoParams",
}  # fmt: skip


def known() -> list[str]:
    """Of FAMILIES, those that this ComfyUI has: older ones lack the newest."""
    return [name for name, family in FAMILIES.items() if hasattr(comfy.supported_models, family.config)]


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
        images = self.layers(z[:, :, 0] if z.ndim == 5 else z)
        return images.unsqueeze(2) if z.ndim == 5 else images


class Vae:
    """What `host` asks of ComfyUI's VAE."""

    vae_dtype = torch.float32

    def __init__(self, channels: int, frame: bool = False):
        self.latent_channels, self.latent_dim = channels, 3 if frame else 2
        self.device = comfy.model_management.get_torch_device()
        self.first_stage_model = Decoder(channels)
        self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, self.device, torch.device("cpu"))

    def process_output(self, image):
        return image.add(1).div(2).clamp(0, 1)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """As the node VAE Decode asks for it: (B, height, width, 3)."""
        comfy.model_management.load_models_gpu([self.patcher])
        images = self.process_output(self.first_stage_model.decode(samples.to(self.device)))
        return (images[:, :, 0] if images.ndim == 5 else images).movedim(1, -1).cpu()

    def memory_used_decode(self, shape, dtype):
        return 0


class Clip:
    """What the node CLIP Text Encode asks of ComfyUI's: an embedding of the family's size, another for every text."""

    def __init__(self, family: Family):
        self.family = family

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return _conditioning(self.family, torch.Generator().manual_seed(zlib.crc32(tokens.encode())))


def _conditioning(family: Family, g: torch.Generator) -> list:
    extra = {"pooled_output": torch.randn(1, family.pooled, generator=g), **family.extra}
    return [[torch.randn(1, LENGTH, family.width, generator=g), extra]]


# How weights are stored, and what is computed in.
PRECISIONS = {
    "float64": (torch.float64, None), "float32": (torch.float32, None), "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None), "fp8": (torch.float8_e4m3fn, torch.bfloat16), "scaled fp8": (torch.bfloat16, None),
}  # fmt: skip


def make(name: str, precision: str = "float32"):
    """(model, VAE, conditioning, latent) of a family. precision: of PRECISIONS; "scaled fp8" is as files have it:
    linear layers in fp8 with a factor each.
    """
    family = FAMILIES[name]
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(), weights_at_once():
        made = _network(family, *PRECISIONS[precision], device)
        if precision == "scaled fp8":
            made = _scaled(family, made, device)
        patcher = comfy.model_patcher.ModelPatcher(made, device, torch.device("cpu"))
        g = torch.Generator().manual_seed(3)
        shape = (1, family.channels, *([1] if family.frame else []), family.side, family.side)
        vae = (
            comfy.sd.VAE({"pixel_space_vae": torch.tensor(1.0)})
            if family.pixels
            else Vae(family.channels, family.frame)
        )
        return patcher, vae, {n: _conditioning(family, g) for n in ("positive", "negative")}, torch.zeros(shape)


def _config(family: Family, stored: torch.dtype, computed: torch.dtype | None):
    options = dict(family.options)
    if where := PARAMS.get(options.get("image_model", "")):
        module, params = where.rsplit(".", 1)
        fields = getattr(importlib.import_module(f"comfy.ldm.{module}"), params).__dataclass_fields__
        options = {name: value for name, value in options.items() if name in fields or name == "image_model"}
    config = getattr(comfy.supported_models, family.config)(options)
    config.unet_config.update(options)  # some configurations have sizes of their own
    config.set_inference_dtype(stored, computed)
    return config


def _network(family: Family, stored: torch.dtype, computed: torch.dtype | None, device: torch.device):
    torch.manual_seed(0)
    made = _config(family, stored, computed).get_model({}, "", device=device)
    for p in made.diffusion_model.parameters():
        drawn = torch.ones(p.shape) if p.ndim <= 1 else torch.randn(p.shape) * 0.7 / math.prod(p.shape[1:]) ** 0.5
        p.copy_(drawn)
    return made


def _scaled(family: Family, made, device: torch.device):
    """The same, from a state dict in the format of the files that are called so."""
    state = made.diffusion_model.state_dict()
    linear = [n for n, m in made.diffusion_model.named_modules() if isinstance(m, torch.nn.Linear) and n]
    largest = torch.finfo(torch.float8_e4m3fn).max
    for layer in linear:
        weight = state[f"{layer}.weight"].float()
        scale = weight.abs().max() / largest
        state[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{layer}.scale_weight"] = scale
    config = _config(family, torch.bfloat16, None)
    if hasattr(comfy.utils, "convert_old_quants"):  # 0.4 on
        state["scaled_fp8"] = torch.zeros(1, dtype=torch.float8_e4m3fn)
        state, _ = comfy.utils.convert_old_quants(state, "")
        config.quant_config = comfy.utils.detect_layer_quantization(state, "")
    else:
        config.scaled_fp8 = torch.float8_e4m3fn
    quantised = config.get_model({}, "", device=device)
    quantised.diffusion_model.load_state_dict(state, strict=False)
    return quantised
