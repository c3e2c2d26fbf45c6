"""The demo's CLIP: an open_clip model whose embedding table holds only the tokens that its captions use."""

from __future__ import annotations

import torch

CONFIG = dict(
    embed_dim=128,
    vision_cfg=dict(image_size=64, layers=4, width=192, head_width=64, patch_size=8),
    text_cfg=dict(context_length=77, width=128, heads=4, layers=3),
    quick_gelu=True,
)
VOCABULARY = 49408
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def new_clip(vocabulary: int = VOCABULARY):
    """An untrained open_clip CLIP of the demo's shape."""
    import open_clip

    text = dict(CONFIG["text_cfg"], vocab_size=vocabulary)
    return open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], text, quick_gelu=CONFIG["quick_gelu"])


def expand(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The full state dict of a shipped one: row 0 of the short table serves every token without a row.

    `tokens` (N,) are the ids of rows 1..N of the short table.
    """
    full = dict(state_dict)
    tokens, short = full.pop("tokens").long(), full["token_embedding.weight"]
    table = short[:1].repeat(VOCABULARY, 1)
    table[tokens] = short[1:]
    full["token_embedding.weight"] = table
    return full
