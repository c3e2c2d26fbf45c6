"""ImageReward v1.0 (arXiv 2304.05977): BLIP's image transformer, BERT that reads it, and a linear head on [CLS]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .aesthetic import LinearHead
from .base import Facts, Reward
from .clip import words
from .half import place_of, through
from .networks import adopt, depth
from .preprocess import Preprocessing
from .text import BertTokens, cut

# The mean and deviation of the raw scores, by which the authors standardise.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class Network(nn.Module):
    """transformers' BLIP halves; sizes as in the file's tensors."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        _, positions, width = state["blip.visual_encoder.pos_embed"].shape
        patch = state["blip.visual_encoder.patch_embed.proj.weight"].shape[-1]
        self.size = round((positions - 1) ** 0.5) * patch
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(state["blip.visual_encoder.blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=depth(state, r"blip\.visual_encoder\.blocks\.(\d+)\."),
            num_attention_heads=max(1, width // 64),
            image_size=self.size,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        vocabulary, text_width = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
        text = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(state["blip.text_encoder.encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=depth(state, r"blip\.text_encoder\.encoder\.layer\.(\d+)\."),
            num_attention_heads=max(1, text_width // 64),
            max_position_embeddings=len(state["blip.text_encoder.embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
            hidden_act="gelu",
        )
        with torch.device("meta"):
            self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        for module in self.text.modules():
            if "position_ids" in module._buffers:  # in no file, as it is a mere count
                module.position_ids = torch.arange(text.max_position_embeddings)[None]

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, S, S), (B, context) twice -> what BERT makes of [CLS], (B, D)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        return self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[:, 0]


def network_of(state: dict[str, Tensor], path: Path) -> Network:
    network = Network(state)
    theirs, named = "blip.visual_encoder.", {}
    pairs = dict(VISION)
    for i in range(network.vision.config.num_hidden_layers):
        pairs |= {f"blocks.{i}.{a}": f"encoder.layers.{i}.{b}" for a, b in BLOCK.items()}
    for a, b in pairs.items():
        for end in ("", ".weight", ".bias"):
            if theirs + a + end in state:
                named[f"vision.{b}{end}"] = state[theirs + a + end]
    named |= {
        k.replace("blip.text_encoder.", "text."): v for k, v in state.items() if k.startswith("blip.text_encoder.")
    }
    return adopt(network, named, path.name)


class ImageReward(Reward):
    """(raw - mean) / deviation: about -2 to 2."""

    def __init__(self, network: Network, head: LinearHead) -> None:
        self.network, self.head = network, head
        self.modules = (network, head)
        self.tokens = BertTokens()
        self.preprocessing = Preprocessing(network.size)
        self.facts = Facts(
            "ImageReward", -3.0, 3.0, (-1.0, 1.5), needs_prompt=True, preprocessing=words(self.preprocessing)
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        ids, mask = self.tokens(prompts).to(place_of(self.network).device).unbind(1)
        features = through(lambda pixels: self.network(pixels, ids, mask), self.preprocessing(images), self.network)
        return (self.head(features.to(place_of(self.head))) - MEAN) / STD

    def notices(self, prompts: Sequence[str]) -> list[str]:
        return cut(prompts, self.tokens)


def image_reward_of(state: dict[str, Tensor], path: Path) -> ImageReward:
    """state: of the released ImageReward.pt's layout."""
    return ImageReward(network_of(state, path), LinearHead(state, "mlp.layers."))
