"""Small networks of the scorers' architectures, and their files: weights drawn by name, the same on any machine."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import torch
from torch import Tensor

VISION = dict(image_size=224, layers=2, width=64, head_width=64, patch_size=32)
TEXT = dict(context_length=77, width=64, heads=1, layers=2, vocab_size=49408)
EMBED = 32
PROMPT = "a watercolour fox, jumping over the lazy dog's café"
HEADS = ("layers.", "mlp.layers.")
LONG = " ".join(f"word{i}" for i in range(60))


def drawn(name: str, shape: tuple[int, ...], spread: float) -> Tensor:
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=g) * spread


def fill(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names and shapes with drawn weights: matrices of unit gain, biases small, norms near one."""
    out = {}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name.endswith("logit_scale"):
            out[name] = torch.tensor(100.0).log().expand(shape).clone()
        elif not tensor.is_floating_point():
            out[name] = tensor.clone()
        elif len(shape) < 2:
            out[name] = drawn(name, shape, 0.1) + (1.0 if "norm" in name.lower() or ".ln_" in name else 0.0)
        else:
            gain = 2.0 if name.startswith(HEADS) else 0.5  # else the scores of all images would be nearly the same
            out[name] = drawn(name, shape, gain / float(np.prod(shape[1:])) ** 0.5 if "embed" not in name else 0.3)
    return out


def images() -> dict[str, np.ndarray]:
    """Name -> (H, W, 3) in 8 bits: sizes that need no resizing, downsampling, upsampling, and an odd crop."""
    out = {}
    for number, (height, width) in enumerate([(224, 224), (512, 512), (300, 451), (96, 131)]):
        y, x = np.mgrid[0:height, 0:width].astype(np.float64)
        y, x = y / height, x / width
        waves = [np.sin(2 * np.pi * ((3 + c + number) * x + (2 + c) * y * (1 + x) + 0.3 * c)) for c in range(3)]
        disc = (((x - 0.5) ** 2 + (y - 0.4) ** 2) < 0.06)[..., None] * np.array([0.4, -0.2, 0.1])
        out[f"{height}x{width}"] = ((np.stack(waves, -1) * 0.25 + 0.5 + disc).clip(0, 1) * 255).round().astype(np.uint8)
    return out


def tensor_of(image: np.ndarray) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(image).movedim(2, 0)[None].float() / 255


def open_clip_network(quick_gelu: bool = False):
    import open_clip

    network = open_clip.CLIP(EMBED, VISION, TEXT, quick_gelu=quick_gelu)
    network.load_state_dict(fill(network.state_dict()))
    return network.eval()


def hf_clip_network(act: str = "gelu"):
    from transformers import CLIPConfig, CLIPModel

    vision = dict(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, image_size=224,
        patch_size=32, hidden_act=act,
    )  # fmt: skip
    text = dict(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, vocab_size=49408,
        max_position_embeddings=77, hidden_act=act, eos_token_id=49407, bos_token_id=49406, pad_token_id=49407,
    )  # fmt: skip
    network = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=EMBED))
    network.load_state_dict(fill(network.state_dict()))
    return network.eval()


def siglip_network(image_size: int = 64):
    from transformers import SiglipConfig, SiglipModel

    vision = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, image_size=image_size,
        patch_size=16,
    )  # fmt: skip
    text = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, vocab_size=100,
        max_position_embeddings=16, projection_size=64,
    )  # fmt: skip
    network = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    network.load_state_dict(fill(network.state_dict()))
    return network.eval()


def siglip_tokenizer(folder) -> None:
    """A tokeniser's files as they lie beside a SigLIP, with a small vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"a fox on blue red ground watercolour , jumping over the lazy dog".split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def head_state(width: int, prefix: str = "layers.") -> dict[str, Tensor]:
    """The five layers of the aesthetic and ImageReward heads, with their released names."""
    sizes = [width, 1024, 128, 64, 16, 1]
    state = {}
    for number, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(sizes), strict=True):
        state |= {f"{prefix}{number}.weight": torch.empty(b, a), f"{prefix}{number}.bias": torch.empty(b)}
    return fill(state)


def image_reward_state() -> dict[str, Tensor]:
    """ImageReward.pt's names and, but for depth and widths, shapes."""
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    w, h, d = 64, 256, 128
    shapes = {
        f"{v}cls_token": (1, 1, w), f"{v}pos_embed": (1, 50, w), f"{v}patch_embed.proj.weight": (w, 3, 32, 32),
        f"{v}patch_embed.proj.bias": (w,), f"{v}norm.weight": (w,), f"{v}norm.bias": (w,),
        f"{t}embeddings.word_embeddings.weight": (30524, d), f"{t}embeddings.position_embeddings.weight": (512, d),
        f"{t}embeddings.LayerNorm.weight": (d,), f"{t}embeddings.LayerNorm.bias": (d,),
        "blip.vision_proj.weight": (16, w), "blip.vision_proj.bias": (16,),
        "blip.text_proj.weight": (16, d), "blip.text_proj.bias": (16,),
    }  # fmt: skip

    def linear(name, out, into):
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name, size):
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    for i in range(2):
        b = f"{v}blocks.{i}."
        norm(f"{b}norm1", w), norm(f"{b}norm2", w)
        linear(f"{b}attn.qkv", 3 * w, w), linear(f"{b}attn.proj", w, w)
        linear(f"{b}mlp.fc1", h, w), linear(f"{b}mlp.fc2", w, h)
        b = f"{t}encoder.layer.{i}."
        for attention, source in (("attention", d), ("crossattention", w)):
            linear(f"{b}{attention}.self.query", d, d)
            linear(f"{b}{attention}.self.key", d, source), linear(f"{b}{attention}.self.value", d, source)
            linear(f"{b}{attention}.output.dense", d, d), norm(f"{b}{attention}.output.LayerNorm", d)
        linear(f"{b}intermediate.dense", h, d), linear(f"{b}output.dense", d, h), norm(f"{b}output.LayerNorm", d)
    state = fill({name: torch.empty(shape) for name, shape in shapes.items()})
    return {**state, f"{t}embeddings.position_ids": torch.arange(512)[None], **head_state(d, "mlp.layers.")}
