"""Trains the demo's CLIP (text encoder and CLIPScore reward): contrastive, every matching pair a positive.

`python -m demo.train.clip --minutes 25` writes `<cache>/clip.pt` every minute and resumes from it.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
import torch.nn.functional as F

from demo.clip import MEAN, STD, new_clip
from demo.train.data import CACHE, EmojiWorld
from demo.vocabulary import BACKGROUNDS, STYLES, SUBJECTS, caption

LENGTH = 28  # the longest caption has fewer tokens; later positions are never needed in training


def tokenizer():
    import open_clip

    return open_clip.SimpleTokenizer(context_length=77)


def used_tokens() -> torch.Tensor:
    """Sorted ids of every token that a caption can hold, start and end included, padding left out."""
    tokenize = tokenizer()
    texts = [caption(s, style, "white", True) for s, style in itertools.product(SUBJECTS, (None, *STYLES))]
    texts += [caption("cat", None, b, True) for b in BACKGROUNDS] + ["photo picture drawing emoji bright dark style"]
    ids = tokenize(texts).unique()
    assert tokenize(texts)[:, LENGTH:].max() == 0
    return ids[ids > 0]


class ShortTokenizer:
    """Text to rows of the short table: 0 for a token without a row (and for padding)."""

    def __init__(self):
        self.tokens = used_tokens()
        self.tokenize = tokenizer()
        self.row = torch.zeros(49408, dtype=torch.long)
        self.row[self.tokens] = torch.arange(1, len(self.tokens) + 1)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.row[self.tokenize(texts)[:, :LENGTH]]


def encode_text(clip, rows: torch.Tensor) -> torch.Tensor:
    """open_clip's `encode_text` on the first LENGTH positions: under a causal mask the rest changes nothing."""
    x = clip.token_embedding(rows) + clip.positional_embedding[:LENGTH]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:LENGTH, :LENGTH]))
    return x[torch.arange(len(x)), rows.argmax(1)] @ clip.text_projection


def matches(labels: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """(texts, images) bool: the image shows everything that the caption says."""
    said = [set(c.split()) for c in captions]
    style = torch.tensor([next((i for i, s in enumerate(STYLES) if s in w), -1) for w in said])
    ground = torch.tensor(
        [next((i for i, b in enumerate(BACKGROUNDS) if c.endswith(f" {b} background")), -1) for c in captions]
    )
    subject_ok = labels[:, None, 0] == labels[None, :, 0]
    style_ok = (style[:, None] < 0) | (style[:, None] == labels[None, :, 1])
    ground_ok = (ground[:, None] < 0) | (ground[:, None] == labels[None, :, 2])
    return subject_ok & style_ok & ground_ok


def info_nce(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """-log of the probability of any positive, both ways."""
    only = logits.masked_fill(~positive, float("-inf"))
    rows = logits.logsumexp(1) - only.logsumexp(1)
    columns = logits.logsumexp(0) - only.logsumexp(0)
    return (rows.mean() + columns.mean()) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch", type=int, default=96)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    world = EmojiWorld(seed=2, animal_share=0.4)
    tokenize = ShortTokenizer()
    clip = new_clip(len(tokenize.tokens) + 1)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    decay = [p for p in clip.parameters() if p.ndim > 1]
    plain = [p for p in clip.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0}], lr=1e-3, betas=(0.9, 0.98)
    )
    path, step, spent = CACHE / "clip.pt", 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        clip.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    accuracy, last_save, start = 0.0, time.time(), time.time() - spent

    def save():
        torch.save(
            {
                "model": clip.state_dict(),
                "optimizer": optimizer.state_dict(),
                "tokens": tokenize.tokens,
                "step": step,
                "spent": time.time() - start,
            },
            path.with_suffix(".tmp"),
        )
        path.with_suffix(".tmp").replace(path)

    while (elapsed := time.time() - start) < args.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100) * max(0.02, 1 - elapsed / (args.minutes * 60))
        images, labels = world.batch(args.batch, jitter=1.5)
        captions = world.captions(labels)
        rows = tokenize(captions)
        # Now and then an unknown word, so that the shared row means "some word".
        unknown = torch.rand(rows.shape, generator=world.generator) < 0.01
        rows = torch.where(unknown & (rows > 0) & (rows < len(tokenize.tokens) - 1), 0, rows)
        small = F.interpolate(images, size=64, mode="bicubic", antialias=True, align_corners=False)
        small = small + 0.02 * torch.randn(small.shape, generator=world.generator)
        with torch.autocast("cpu", torch.bfloat16):
            image = clip.encode_image((small - mean) / std)
            text = encode_text(clip, rows)
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        positive = matches(labels, captions)
        logits = clip.logit_scale.exp().clamp(max=100) * text @ image.T
        loss = info_nce(logits, positive)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        step += 1
        hit = positive.gather(0, logits.argmax(0)[None])[0].float().mean().item()
        accuracy = hit if step == 1 else 0.98 * accuracy + 0.02 * hit
        if step % 20 == 0:
            print(f"step {step} {elapsed / 60:.1f} min loss {loss:.3f} in-batch {accuracy:.3f}", flush=True)
        if time.time() - last_save > 60:
            save()
            last_save = time.time()
    save()


if __name__ == "__main__":
    main()
