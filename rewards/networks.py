"""Networks from state dicts: CLIP of either layout as open_clip's, SigLIP as transformers'.

Sizes come from the tensors. Networks are made without storage and take the file's tensors as their own: nothing is
initialised or copied.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .clip import Encoder
from .files import HF_CLIP, HF_SIGLIP, OPEN_CLIP, OPEN_SIGLIP, Kind, WrongFile
from .preprocess import Preprocessing, crop_torchvision, crop_transformers, squash
from .text import ClipTokens, FolderTokens, open_clip

# Widths of attention heads that are not 64, by the width of the image transformer (open_clip's configurations).
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
NAMES = {
    (768, 12, 32): "ViT-B/32", (768, 12, 16): "ViT-B/16", (1024, 24, 14): "ViT-L/14", (1280, 32, 14): "ViT-H/14",
    (1408, 40, 14): "ViT-g/14", (1664, 48, 14): "ViT-bigG/14", (1152, 27, 14): "SO400M/14",
}  # fmt: skip
# OpenAI's networks use QuickGELU, and of this size theirs are the usual ones.
QUICK_GELU_BY_SIZE = {"ViT-L/14"}
Network = TypeVar("Network", bound=nn.Module)
OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}


def depth(state: dict[str, Tensor], pattern: str) -> int:
    """The number of layers whose names match `pattern`, which has the layer's number as its group."""
    return 1 + max(int(m[1]) for k in state if (m := re.match(pattern, k)))


def adopt(network: Network, state: dict[str, Tensor], file: str) -> Network:
    """Give `network`, made without storage, these tensors. Raises WrongFile where a name or a size does not fit."""
    wanted = network.state_dict()
    wrong = [k for k in wanted if k not in state or state[k].shape != wanted[k].shape]
    if wrong:
        found = f"has shape {tuple(state[wrong[0]].shape)}" if wrong[0] in state else "is missing"
        raise WrongFile(
            f"{file}: {wrong[0]} {found}, where {tuple(wanted[wrong[0]].shape)} is needed ({len(wrong)} such): the "
            "file is of another architecture, or incomplete"
        )
    network.load_state_dict({k: state[k] for k in wanted}, assign=True)
    return network.eval().requires_grad_(False)


def _fused(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One Hugging Face transformer layer's names and tensors as open_clip's."""
    names = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    layer = {}
    for kind in ("weight", "bias"):
        for theirs, ours in names.items():
            if f"{prefix}{theirs}.{kind}" in state:
                layer[f"{ours}.{kind}"] = state[f"{prefix}{theirs}.{kind}"]
        parts = [f"{prefix}self_attn.{x}_proj.{kind}" for x in "qkv"]
        if all(name in state for name in parts):
            layer[f"attn.in_proj_{kind}"] = torch.cat([state[name] for name in parts])
    return layer


def open_clip_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP (or one half of it) in Hugging Face's layout, in open_clip's: the same numbers under other names."""
    names = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "logit_scale": "logit_scale",
    }
    out = {}
    for theirs, ours in names.items():
        for end in ("", ".weight", ".bias"):
            if theirs + end in state:
                out[ours + end] = state[theirs + end]
    for theirs, ours in (("visual_projection", "visual.proj"), ("text_projection", "text_projection")):
        if f"{theirs}.weight" in state:
            out[ours] = state[f"{theirs}.weight"].T.contiguous()
    for theirs, ours in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        layers = sorted({m[1] for k in state if (m := re.match(rf"{theirs}\.encoder\.layers\.(\d+)\.", k))})
        for number in layers:
            for name, tensor in _fused(state, f"{theirs}.encoder.layers.{number}.").items():
                out[f"{ours}.resblocks.{number}.{name}"] = tensor
    return out


def config_beside(path: Path) -> dict:
    """Hugging Face's config.json next to the weights, or {}."""
    file = path.parent / "config.json"
    try:
        config = json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, RecursionError, OSError) as problem:
        raise WrongFile(f"{file.name} beside {path.name} is no JSON ({problem})") from problem
    halves = [config.get(k) for k in ("vision_config", "text_config")] if isinstance(config, dict) else [0]
    if not all(half is None or isinstance(half, dict) for half in halves):
        raise WrongFile(f"{file.name} beside {path.name} is not a model's: move it away, or use the model's own")
    return config


def uses_quick_gelu(state: dict[str, Tensor], path: Path, name: str, width: int) -> bool:
    """Which GELU a network was trained with is not in its weights: OpenAI's marks, its config.json, or its size say.

    width: of its vision tower. A folder may have several models' files, and one's config.json.
    """
    if state.keys() & OPENAI_MARKS:
        return True
    config = config_beside(path)
    vision = config.get("vision_config") or config
    its_own = str(config.get("model_type", "clip")).startswith("clip") and vision.get("hidden_size", width) == width
    if its_own and (act := vision.get("hidden_act")):
        return act == "quick_gelu"
    return name in QUICK_GELU_BY_SIZE


def vision_sizes(state: dict[str, Tensor]) -> dict:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    layers = depth(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"])
    return dict(
        image_size=side * patch, patch_size=patch, width=width, layers=layers, mlp_ratio=hidden / width,
        head_width=HEAD_WIDTHS.get(width, min(64, width)),
    )  # fmt: skip


def name_of(state: dict[str, Tensor]) -> str:
    """The usual name of a CLIP (open_clip's layout) of these sizes, or the sizes."""
    v = vision_sizes(state)
    size = (v["width"], v["layers"], v["patch_size"])
    return NAMES.get(size, "ViT of width {}, {} layers, patch {}".format(*size))


def clip_of(state: dict[str, Tensor], kind: Kind, path: Path, quick_gelu: bool | None = None) -> Encoder:
    """A CLIP with both halves. kind: OPEN_CLIP or HF_CLIP, the layout. quick_gelu None: found out."""
    marks = state
    if kind is not OPEN_CLIP:
        state = open_clip_layout(state)
    _complete(state, ("visual.proj", "text_projection"), path.name)
    name, vision = name_of(state), vision_sizes(state)
    if quick_gelu is None:
        quick_gelu = uses_quick_gelu(marks, path, name, vision["width"])
    context, width = state["positional_embedding"].shape
    text = dict(
        context_length=context,
        vocab_size=len(state["token_embedding.weight"]),
        width=width,
        heads=max(1, width // 64),
        layers=depth(state, r"transformer\.resblocks\.(\d+)\."),
    )
    with torch.device("meta"):
        network = open_clip().CLIP(state["visual.proj"].shape[1], vision, text, quick_gelu=quick_gelu)
    # Made without storage like the rest, but in no file.
    network.attn_mask = torch.full((context, context), float("-inf")).triu(1)
    network = adopt(network, {"logit_scale": torch.zeros(()), **state}, path.name)
    fit = crop_torchvision if kind is OPEN_CLIP else crop_transformers
    gelu = "QuickGELU" if quick_gelu else "GELU"
    return Encoder(network, ClipTokens(context), Preprocessing(vision["image_size"], fit), f"{name}, {gelu}")


def clip_image_half(
    state: dict[str, Tensor], kind: Kind, path: Path, quick_gelu: bool | None = None
) -> tuple[nn.Module, Preprocessing, str]:
    """The image transformer alone: pixels -> embedding (B, D)."""
    transformer = open_clip().transformer
    marks = state
    if kind is not OPEN_CLIP:
        state = open_clip_layout(state)
    _complete(state, ("visual.proj",), path.name)
    name, sizes = name_of(state), vision_sizes(state)
    if quick_gelu is None:
        quick_gelu = uses_quick_gelu(marks, path, name, sizes["width"])
    heads = sizes["width"] // sizes.pop("head_width")
    with torch.device("meta"):
        network = transformer.VisionTransformer(
            **sizes,
            heads=heads,
            output_dim=state["visual.proj"].shape[1],
            act_layer=transformer.QuickGELU if quick_gelu else nn.GELU,
        )
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    # Every reference of an image score is made of torchvision's transforms.
    return adopt(network, visual, path.name), Preprocessing(sizes["image_size"], crop_torchvision), name


def _complete(state: dict[str, Tensor], names: tuple[str, ...], file: str) -> None:
    for name in names:
        if name not in state:
            raise WrongFile(
                f"{file} lacks {name}, the projection into the space that image and text share (files for diffusion "
                "models often do): use the whole CLIP"
            )


class SigLIP(nn.Module):
    """transformers' SigLIP with open_clip's two methods."""

    def __init__(self, vision: Any, text: Any) -> None:
        super().__init__()
        from transformers.models.siglip.modeling_siglip import SiglipTextModel, SiglipVisionModel

        self.vision, self.text = SiglipVisionModel(vision), SiglipTextModel(text)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.vision(pixel_values=pixels).pooler_output

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.text(input_ids=ids).pooler_output


def siglip_of(state: dict[str, Tensor], kind: Kind, path: Path) -> Encoder:
    """kind: HF_SIGLIP or OPEN_SIGLIP, the layout. Its tokeniser is not in the weights: its files must lie beside."""
    from transformers import SiglipTextConfig, SiglipVisionConfig

    if not FolderTokens.there(path.parent):
        raise WrongFile(
            f"{path.name} is a SigLIP, whose tokeniser is a file of its own: put the tokenizer.json (or spiece.model) "
            f"and tokenizer_config.json of the same model into {path.parent}, a folder for this model alone"
        )
    if kind is OPEN_SIGLIP:
        state = _siglip_from_open_clip(state)
    patches, width = state["vision_model.embeddings.position_embedding.weight"].shape
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    size = round(patches**0.5) * patch
    context, text_width = state["text_model.embeddings.position_embedding.weight"].shape
    heads = config_beside(path)

    def config(cls: type, part: str, width: int, **more: Any) -> Any:
        layers = depth(state, rf"{part}\.encoder\.layers\.(\d+)\.")
        hidden = len(state[f"{part}.encoder.layers.0.mlp.fc1.bias"])
        # SO400M's heads are 72 wide; of the usual sizes all others' are 64.
        number = (heads.get(f"{part.split('_')[0]}_config") or {}).get("num_attention_heads")
        number = number or max(1, width // (72 if width == 1152 else 64))
        return cls(
            hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=number, **more
        )

    vision = config(SiglipVisionConfig, "vision_model", width, image_size=size, patch_size=patch)
    text = config(
        SiglipTextConfig,
        "text_model",
        text_width,
        vocab_size=len(state["text_model.embeddings.token_embedding.weight"]),
        max_position_embeddings=context,
        projection_size=len(state["text_model.head.bias"]),
    )
    with torch.device("meta"):
        network = SigLIP(vision, text)
    # transformers 4 keeps the halves in an inner module, transformers 5 does not: names are told by their endings.
    named = {}
    for name in network.state_dict():
        half, rest = name.split(".", 1)
        named[name] = f"{half}_model.{rest.removeprefix(f'{half}_model.')}"
    network = adopt(network, {ours: state[theirs] for ours, theirs in named.items() if theirs in state}, path.name)
    for part, count in ((network.vision, patches), (network.text, context)):
        for module in part.modules():
            if "position_ids" in module._buffers:
                module.position_ids = torch.arange(count)[None]
    name = f"SigLIP of width {width}, {vision.num_hidden_layers} layers, patch {patch}"
    return Encoder(
        network, FolderTokens(path.parent, context), Preprocessing(size, squash, (0.5,) * 3, (0.5,) * 3), name
    )


def _siglip_from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's SigLIP (timm's image tower) in Hugging Face's layout: the same numbers under other names."""
    out = {}

    def both(theirs: str, ours: str, source: dict[str, Tensor] = state) -> None:
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in source:
                out[f"{ours}.{kind}"] = source[f"{theirs}.{kind}"]

    def split(theirs: str, ours: str, names: str) -> None:
        for end, kind in ((".weight", "weight"), (".bias", "bias")):
            key = theirs + end if theirs + end in state else f"{theirs}_{kind}"
            for name, part in zip(names, state[key].chunk(len(names)), strict=True):
                out[f"{ours}.{name}_proj.{kind}"] = part

    trunk, ours = "visual.trunk", "vision_model"
    both(f"{trunk}.patch_embed.proj", f"{ours}.embeddings.patch_embedding")
    out[f"{ours}.embeddings.position_embedding.weight"] = state[f"{trunk}.pos_embed"][0]
    for i in range(depth(state, r"visual\.trunk\.blocks\.(\d+)\.")):
        theirs, layer = f"{trunk}.blocks.{i}", f"{ours}.encoder.layers.{i}"
        split(f"{theirs}.attn.qkv", f"{layer}.self_attn", "qkv")
        pairs = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
        for a, b in {**pairs, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
            both(f"{theirs}.{a}", f"{layer}.{b}")
    both(f"{trunk}.norm", f"{ours}.post_layernorm")
    pool, head = f"{trunk}.attn_pool", f"{ours}.head"
    out[f"{head}.probe"] = state[f"{pool}.latent"]
    for kind in ("weight", "bias"):
        out[f"{head}.attention.in_proj_{kind}"] = torch.cat([state[f"{pool}.q.{kind}"], state[f"{pool}.kv.{kind}"]])
    for a, b in {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
        both(f"{pool}.{a}", f"{head}.{b}")
    out["text_model.embeddings.token_embedding.weight"] = state["text.token_embedding.weight"]
    out["text_model.embeddings.position_embedding.weight"] = state["text.positional_embedding"]
    for i in range(depth(state, r"text\.transformer\.resblocks\.(\d+)\.")):
        theirs, layer = f"text.transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        split(f"{theirs}.attn.in_proj", f"{layer}.self_attn", "qkv")
        pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
        for a, b in {**pairs, "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}.items():
            both(f"{theirs}.{a}", f"{layer}.{b}")
    both("text.ln_final", "text_model.final_layer_norm")
    both("text.text_projection", "text_model.head")
    return out


ENCODERS = {OPEN_CLIP: clip_of, HF_CLIP: clip_of, HF_SIGLIP: siglip_of, OPEN_SIGLIP: siglip_of}
