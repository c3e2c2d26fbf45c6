"""Trains the demo's aesthetic-like head: `python dev.py train taste` writes `demo/weights/taste.safetensors`.

Five linear layers on the demo CLIP's image embedding, in the layout of the LAION predictor, taught that the model's own
"3d" images are worth 7 and its "flat" ones 4. A taste of one rendering style is enough to be wanted, and small enough
to be hacked: both can be seen.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from demo import vocabulary
from demo.weights import FOLDER
from testing.world import World, demo

SIZES = (128, 64, 16, 8, 4, 1)
LAYERS = (0, 2, 4, 6, 7)
LIKED, DISLIKED = ("3d", 7.0), ("flat", 4.0)
SHARE = 0.8  # of the subjects; the others test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    world, clip = World(), demo.demo_clip_score()
    subjects = list(vocabulary.SUBJECTS)
    embeddings = []
    for n, (style, _) in enumerate((LIKED, DISLIKED)):
        prompts = [vocabulary.caption(s, style, prefix=True) for s in subjects]
        images = world.paint(prompts, 77_000 + 1000 * n, steps=args.steps)
        with torch.no_grad():
            pixels = clip.encoder.preprocessing(images)
            embeddings.append(F.normalize(clip.encoder.network.encode_image(pixels), dim=1))
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(subjects), generator=g)
    seen, unseen = order[: int(SHARE * len(subjects))], order[int(SHARE * len(subjects)) :]
    torch.manual_seed(0)
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.05)
    wanted = torch.tensor([LIKED[1], DISLIKED[1]])
    x = torch.stack(embeddings, 1)
    for step in range(600):
        loss = (head(x[seen] + 0.02 * torch.randn(x[seen].shape, generator=g))[..., 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            with torch.no_grad():
                test = head(x[unseen])[..., 0]
            right = (test[:, 0] > test[:, 1]).float().mean().item()
            print(f"step {step + 1} loss {loss:.3f}, unseen subjects: 3d {test[:, 0].mean():.2f}, "
                  f"flat {test[:, 1].mean():.2f}, ranked right {right:.3f}")  # fmt: skip
    state = {}
    for layer, number in zip(head, LAYERS, strict=True):
        state |= {f"layers.{number}.weight": layer.weight, f"layers.{number}.bias": layer.bias}
    path = FOLDER / "taste.safetensors"
    save_file({k: v.detach().contiguous() for k, v in state.items()}, path)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
