"""The demo model as ComfyUI's own MODEL, CLIP and VAE, and its CLIPScore."""

from __future__ import annotations

import functools
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy_api.latest import io

from ..demo import clip as demo_clip
from ..demo import unet as demo_unet
from ..demo.weights import load
from ..rewards.aesthetic import Aesthetic, head_of
from ..rewards.clip import Encoder, Similarity, clip_score
from ..rewards.preprocess import Preprocessing
from ..rewards.text import ClipTokens, open_clip
from .shared.types import aliases, reward_output

TEXT = demo_clip.CONFIG["text_cfg"]
TEXT_CONFIG = {
    "hidden_act": "quick_gelu",
    "hidden_size": TEXT["width"],
    "intermediate_size": 4 * TEXT["width"],
    "num_attention_heads": TEXT["heads"],
    "num_hidden_layers": TEXT["layers"],
    "max_position_embeddings": TEXT["context_length"],
    "eos_token_id": 49407,
}


class DemoSD15(comfy.supported_models.SD15):
    """SD1.5 but for the size of its UNet."""

    unet_extra_config: dict = {}


def load_model() -> comfy.model_patcher.ModelPatcher:
    config = DemoSD15(demo_unet.CONFIG)
    config.set_inference_dtype(torch.float32, None)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model = config.get_model({}, "", device=offload)
    model.load_model_weights(load("unet"), "")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def load_clip() -> comfy.sd.CLIP:
    weights = demo_clip.expand(load("clip"))
    text = comfy.utils.clip_text_transformers_convert(
        {k: v for k, v in weights.items() if not k.startswith("visual.") and k != "logit_scale"}, "", ""
    )
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    options = {"clip_l_model_config": TEXT_CONFIG, "dtype": torch.float32}
    clip = comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(text), model_options=options)
    missing, unexpected = clip.load_sd(text)
    if missing or unexpected:
        raise RuntimeError(f"the demo's CLIP file does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return clip


def load_vae() -> comfy.sd.VAE:
    vae = comfy.sd.VAE(sd=load("vae"), dtype=torch.float32)
    vae.throw_exception_if_invalid()
    # As the model's: not in dynamic VRAM, so that it need not be copied out of it.
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.patcher.load_device, offload_device=vae.patcher.offload_device
    )
    return vae


@functools.cache
def _clip_network() -> torch.nn.Module:
    """One network for every node that asks, as ComfyUI's memory management knows it by its identity."""
    open_clip()  # which says what to do where it is not there
    network = demo_clip.new_clip()
    network.load_state_dict(demo_clip.expand(load("clip")))
    return network.eval().requires_grad_(False)


def demo_clip_score() -> Similarity:
    size = demo_clip.CONFIG["vision_cfg"]["image_size"]
    encoder = Encoder(_clip_network(), ClipTokens(TEXT["context_length"]), Preprocessing(size))
    return clip_score(encoder, typical=(45.0, 75.0))


def demo_aesthetic() -> Aesthetic:
    """Likes the demo model's 3d style (about 7) and not its flat one (about 4)."""
    encoder = demo_clip_score().encoder
    reward = Aesthetic(
        head_of(load("taste"), "taste.safetensors"), encoder.network, encoder.network.encode_image,
        encoder.preprocessing,
    )  # fmt: skip
    reward.facts = replace(reward.facts, name="Demo Aesthetic", typical=(4.0, 7.0))
    return reward


class MiraDemoModel(io.ComfyNode):
    NAME = "MIRA Demo Model"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraDemoModel",
            **aliases("example model", "tiny checkpoint", "test model"),
            display_name=cls.NAME,
            category="MIRA Alignment/loaders",
            description=(
                "A small SD1.5-style model that ships with the pack: 128 px emoji of 45 animals and 71 other "
                "subjects, four styles (3d, flat, cartoon, icon), twelve backgrounds. "
                'Prompt it as "generate an image of a fox" or "a 3d fox on a blue background".'
            ),
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="A small network of SD1.5's kind, 128 px."),
                io.Clip.Output("clip", display_name="clip", tooltip="Its text encoder."),
                io.Vae.Output("vae", display_name="vae", tooltip="Its decoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_model(), load_clip(), load_vae())


class MiraDemoCLIPScore(io.ComfyNode):
    NAME = "MIRA Demo CLIPScore"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraDemoCLIPScore",
            **aliases("clip score", "prompt alignment", "example reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description=(
                "100 times the cosine between image and prompt by the demo model's own CLIP. It knows emoji only: "
                "use it with the MIRA Demo Model. The optimiser needs the prompt as text."
            ),
            inputs=[],
            outputs=[reward_output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(demo_clip_score())


class MiraDemoAesthetic(io.ComfyNode):
    NAME = "MIRA Demo Aesthetic"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraDemoAesthetic",
            **aliases("aesthetic score", "example reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description=(
                "A taste for the demo model: a small head on its CLIP that likes the 3d style (about 7) and not the "
                "flat one (about 4). Small enough to be hacked, so that drift can be seen. It knows emoji only."
            ),
            inputs=[],
            outputs=[reward_output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(demo_aesthetic())
