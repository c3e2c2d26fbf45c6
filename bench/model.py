"""The demo model's quality: does it paint what the prompt asks for, by the held-out judge?

`python dev.py bench model` samples the 45 animals x 4 seeds (25 steps, CFG 5), with and without a background in the
prompt, prints the judge's top-1, and writes contact sheets and `model.json` to docs/results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from testing.pack import ROOT, mira
from testing.world import World, demo

judge_module, vocabulary = mira("demo.judge"), mira("demo.vocabulary")
OUT = ROOT / "docs" / "results"
ANIMALS = vocabulary.ANIMALS


def sheet(images: torch.Tensor, columns: int, path: Path) -> None:
    from PIL import Image

    rows = [torch.cat(list(images[i : i + columns]), 2) for i in range(0, len(images) // columns * columns, columns)]
    pixels = (torch.cat(rows, 1).clamp(0, 1) * 255).round().byte().movedim(0, 2).numpy()
    Image.fromarray(pixels).save(path, quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    world, judge = World(), judge_module.load_judge()
    score = demo.demo_clip_score()
    backgrounds, styles = list(vocabulary.BACKGROUNDS), list(vocabulary.STYLES)
    hits = {"subject": [], "subject_on_background": [], "background": [], "style": [], "clip_score": []}
    plain, asked = [], []
    for seed in range(args.seeds):
        prompts = [vocabulary.caption(a, prefix=True) for a in ANIMALS]
        images = world.paint(prompts, 1000 * seed)
        plain.append(images)
        hits["subject"] += (judge(images)[0].argmax(1) == torch.arange(45)).tolist()
        hits["clip_score"] += score.score(images, prompts).tolist()
        wanted = [(i * 5 + seed * 3) % 12 for i in range(45)]
        style = [(i + seed) % 4 for i in range(45)]
        prompts = [
            vocabulary.caption(a, styles[s], backgrounds[b]) for a, b, s in zip(ANIMALS, wanted, style, strict=True)
        ]
        images = world.paint(prompts, 1000 * seed + 500)
        asked.append(images)
        subject, styled, background = (x.argmax(1) for x in judge(images))
        hits["subject_on_background"] += (subject == torch.arange(45)).tolist()
        hits["background"] += (background == torch.tensor(wanted)).tolist()
        hits["style"] += (styled == torch.tensor(style)).tolist()
    result = {name: sum(values) / len(values) for name, values in hits.items()} | {"images": 45 * args.seeds}
    missed = torch.tensor(hits["subject"]).view(args.seeds, 45).float().mean(0)
    result["weakest"] = {ANIMALS[i]: missed[i].item() for i in missed.argsort()[:8].tolist()}
    print(json.dumps(result, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "model.json").write_text(json.dumps(result, indent=1) + "\n")
    sheet(torch.cat(plain[:2]), 15, args.out / "animals.jpg")
    sheet(asked[0], 15, args.out / "backgrounds.jpg")


if __name__ == "__main__":
    main()
