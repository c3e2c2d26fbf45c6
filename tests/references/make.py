"""Makes scores.json: what the libraries' own pipelines give for the small networks of tests/core/small.py.

    python tests/references/make.py clip siglip demo     (open_clip, transformers, as ComfyUI's environment has them)
    python tests/references/make.py hps                  (needs hpsv2==1.2.0, and in its src/open_clip the file
                                                      bpe_simple_vocab_16e6.txt.gz of open_clip, which it lacks)
    python tests/references/make.py imagereward          (needs image-reward==1.5 and transformers==4.30.2)

Images go through Pillow, in 8 bits, exactly as in the libraries; nothing of this pack's rewards is used.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "core"), str(HERE.parents[1])]
import small

PROMPTS = [small.PROMPT, small.LONG]


def pictures():
    return {name: Image.fromarray(pixels) for name, pixels in small.images().items()}


def mlp(state, prefix="layers."):
    def linear(number):
        layer = torch.nn.Linear(*reversed(state[f"{prefix}{number}.weight"].shape))
        layer.load_state_dict({k: state[f"{prefix}{number}.{k}"] for k in ("weight", "bias")})
        return layer

    drop = torch.nn.Dropout
    return torch.nn.Sequential(
        linear(0), drop(0.2), linear(2), drop(0.2), linear(4), drop(0.1), linear(6), linear(7)
    ).eval()  # fmt: skip


def open_clip_scores(network, size: int) -> dict:
    import open_clip

    transform = open_clip.image_transform(size, is_train=False)
    tokens = open_clip.SimpleTokenizer()(PROMPTS)
    text = network.encode_text(tokens, normalize=True)
    out = {}
    for name, picture in pictures().items():
        image = network.encode_image(transform(picture)[None], normalize=True)
        out[name] = (100 * image @ text.T)[0].tolist()
    return out


def bare(name: str) -> None:
    """Make a package importable without running its own __init__."""
    package = types.ModuleType(name)
    folder = name.replace(".", "/")
    package.__path__ = [str(Path(d) / folder) for d in sys.path if (Path(d) / folder).is_dir()]
    sys.modules[name] = package


def clip() -> dict:
    import open_clip
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    network = small.open_clip_network()
    head = mlp(small.head_state(small.EMBED))
    transform = open_clip.image_transform(224, is_train=False)
    aesthetic = {}
    for name, picture in pictures().items():
        embedding = F.normalize(network.encode_image(transform(picture)[None]), dim=-1)
        aesthetic[name] = head(embedding)[0].tolist()
    # The tokeniser's files as ComfyUI ships them.
    tokenizer = CLIPTokenizer.from_pretrained(sys.argv[-1]) if Path(sys.argv[-1]).is_dir() else None
    if tokenizer is None:
        sys.exit("the last argument must be the folder of a CLIP tokenizer (ComfyUI's comfy/sd1_tokenizer)")
    hf = small.hf_clip_network()
    ids = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    text = F.normalize(hf.get_text_features(**ids).pooler_output, dim=-1)
    pick = {}
    for name, picture in pictures().items():
        pixels = CLIPImageProcessorPil()(picture, return_tensors="pt").pixel_values
        image = F.normalize(hf.get_image_features(pixels).pooler_output, dim=-1)
        pick[name] = (hf.logit_scale.exp() * image @ text.T)[0].tolist()
    quick = small.open_clip_network(quick_gelu=True)
    return {
        "aesthetic": aesthetic,
        "clipscore": open_clip_scores(network, 224),
        "clipscore_quick_gelu": open_clip_scores(quick, 224),
        "pickscore": pick,
    }


def siglip() -> dict:
    import tempfile

    from transformers import AutoTokenizer, SiglipImageProcessorPil

    network, out = small.siglip_network(), {}
    with tempfile.TemporaryDirectory() as folder:
        small.siglip_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    text = F.normalize(network.get_text_features(ids).pooler_output, dim=-1)
    processor = SiglipImageProcessorPil(size={"height": 64, "width": 64}, resample=Image.Resampling.BICUBIC)
    for name, picture in pictures().items():
        pixels = processor(picture, return_tensors="pt").pixel_values
        image = F.normalize(network.get_image_features(pixels).pooler_output, dim=-1)
        out[name] = (100 * image @ text.T)[0].tolist()
    return {"siglip": out}


def demo() -> dict:
    from demo import clip as demo_clip
    from demo.weights import load

    network = demo_clip.new_clip()
    network.load_state_dict(demo_clip.expand(load("clip")))
    return {"demo": open_clip_scores(network.eval(), demo_clip.CONFIG["vision_cfg"]["image_size"])}


def hps() -> dict:
    # The package's own __init__ wants download tools that scoring does not use.
    bare("hpsv2")
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.tokenizer import tokenize
    from hpsv2.src.open_clip.transform import image_transform

    vision = {k: v for k, v in small.VISION.items()}
    network = CLIP(small.EMBED, vision, dict(small.TEXT)).eval()
    network.load_state_dict(small.fill(small.open_clip_network().state_dict()))
    transform = image_transform(224, is_train=False, resize_longest_max=True)
    text, out = tokenize(PROMPTS), {}
    for name, picture in pictures().items():
        features = network(transform(picture)[None], text)
        features = (
            features if isinstance(features, dict) else dict(image_features=features[0], text_features=features[1])
        )
        out[name] = (features["image_features"] @ features["text_features"].T)[0].tolist()
    return {"hps": out}


def imagereward() -> dict:
    bare("ImageReward")  # they want training tools and OpenAI's package
    bare("ImageReward.models")
    from ImageReward.ImageReward import _transform
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    state = small.image_reward_state()
    vision = VisionTransformer(img_size=224, patch_size=32, embed_dim=64, depth=2, num_heads=1).eval()
    vision.load_state_dict({k.removeprefix("blip.visual_encoder."): v for k, v in state.items() if "visual_enc" in k})
    config = BertConfig(
        vocab_size=30524, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        add_cross_attention=True, encoder_width=64, layer_norm_eps=1e-12, hidden_act="gelu", type_vocab_size=2,
    )  # fmt: skip
    text = BertModel(config, add_pooling_layer=False).eval()
    text.load_state_dict({k.removeprefix("blip.text_encoder."): v for k, v in state.items() if "text_encoder" in k})
    tokenizer = BertTokenizer(str(HERE.parents[1] / "rewards" / "vocabulary" / "bert-base-uncased.txt"))
    head, out = mlp(state, "mlp.layers."), {}
    for name, picture in pictures().items():
        seen = vision(_transform(224)(picture)[None])
        out[name] = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
            hidden = text(
                ids.input_ids, attention_mask=ids.attention_mask, encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long), return_dict=True,
            ).last_hidden_state[:, 0]  # fmt: skip
            out[name].append(((head(hidden) - 0.16717362830052426) / 1.0333394966054072).item())
    return {"imagereward": out}


if __name__ == "__main__":
    file = HERE / "scores.json"
    scores = json.loads(file.read_text()) if file.is_file() else {}
    parts = {f.__name__: f for f in (clip, siglip, demo, hps, imagereward)}
    with torch.no_grad():
        for part in sys.argv[1:]:
            if part in parts:
                scores |= parts[part]()
    file.write_text(json.dumps(scores, indent=1) + "\n")
