"""Trains the held-out judge on images of its own seed, softened and disturbed as decoded latents are.

`python -m demo.train.judge --minutes 10` writes `<cache>/judge.pt`.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from demo.judge import SIZE, Judge
from demo.train.data import CACHE, EmojiWorld


def disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, 128, 128) -> (B, 3, 64, 64): a random softness, noise and a little brightness."""
    size = int(torch.randint(36, 97, (), generator=generator))
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    images = F.interpolate(images, size=SIZE, mode="bilinear", antialias=True, align_corners=False)
    n = len(images)
    level = 0.06 * torch.rand(n, 1, 1, 1, generator=generator)
    gain = 1 + 0.1 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    return (images * gain + level * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(10)
    world = EmojiWorld(seed=11, animal_share=0.4)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    start, step, average = time.time(), 0, [0.0, 0.0, 0.0]
    while (elapsed := time.time() - start) < args.minutes * 60:
        lr = 2e-3 * min(1, (step + 1) / 100) * max(0.01, 1 - elapsed / (args.minutes * 60))
        optimizer.param_groups[0]["lr"] = lr
        images, labels = world.batch(96, jitter=2)
        logits = judge(disturb(images, world.generator))
        loss = sum(F.cross_entropy(x, y, label_smoothing=0.05) for x, y in zip(logits, labels.T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        hits = [(x.argmax(1) == y).float().mean().item() for x, y in zip(logits, labels.T, strict=True)]
        average = [0.97 * a + 0.03 * h for a, h in zip(average, hits, strict=True)]
        if step % 20 == 0:
            print(
                f"step {step} {elapsed / 60:.1f} min loss {loss:.3f} " + " ".join(f"{a:.3f}" for a in average),
                flush=True,
            )
    judge.eval()
    fresh = EmojiWorld(seed=99, animal_share=0.4)
    images, labels = fresh.batch(512)
    with torch.no_grad():
        logits = judge(images)
    print("clean:", [(x.argmax(1) == y).float().mean().item() for x, y in zip(logits, labels.T, strict=True)])
    torch.save({"model": judge.state_dict(), "step": step}, CACHE / "judge.pt")


if __name__ == "__main__":
    main()
