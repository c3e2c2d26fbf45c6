"""Emoji art from four npm packages, rasterised once and composed into training images on the fly.

`python -m demo.train.data` fetches the packages with `npm pack`, rasterises every subject in every style to
128 px RGBA and writes `<cache>/emoji.npz`. `EmojiWorld` composes batches from it.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from demo.vocabulary import ANIMALS, BACKGROUNDS, LABELS, STYLES, SUBJECTS, caption

SIZE = 128
PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@lobehub/fluent-emoji-flat@1.1.0",
    "cartoon": "@iconify-json/noto@1.2.9",
    "icon": "@iconify-json/twemoji@1.2.5",
    "labels": "emojibase-data@17.0.0",
}
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "demo"


def fetch(cache: Path) -> dict[str, Path]:
    """Download and unpack the packages; returns the folder of each key of `PACKAGES`."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm was not found: install Node.js, it fetches the emoji packages")
    folders = {}
    for key, package in PACKAGES.items():
        folder = cache / "npm" / key
        if not (folder / "package.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            packed = subprocess.run(
                [npm, "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
            ).stdout.split()[-1]
            with tarfile.open(folder / packed) as tar:
                for member in tar.getmembers():
                    member.name = member.name.split("/", 1)[-1]
                    tar.extract(member, folder, filter="data")
            (folder / packed).unlink()
        folders[key] = folder
    return folders


def _svg_to_rgba(svg: str) -> np.ndarray:
    from PIL import Image
    from resvg_py import svg_to_bytes

    png = bytes(svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _iconify(icons: dict, name: str) -> np.ndarray | None:
    icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
    if icon is None:
        return None
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    return _svg_to_rgba(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>')


def _fluent(folder: Path, hexcode: str) -> np.ndarray | None:
    from PIL import Image

    stem = hexcode.lower()
    for name in (stem, stem + "-fe0f", stem.replace("-fe0f", "")):
        for path in (folder / "assets" / f"{name}.webp", folder / "assets" / f"{name}.svg"):
            if path.suffix == ".svg" and path.exists():
                return _svg_to_rgba(path.read_text())
            if path.exists():
                return np.asarray(Image.open(path).convert("RGBA").resize((SIZE, SIZE), Image.LANCZOS))
    return None


def _fill(rgba: np.ndarray) -> np.ndarray:
    """Crop to the opaque part and centre it in a square that it just fills."""
    from PIL import Image

    ys, xs = np.nonzero(rgba[..., 3] > 8)
    crop = Image.fromarray(rgba[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
    scale = SIZE / max(crop.size)
    crop = crop.resize((max(1, round(crop.width * scale)), max(1, round(crop.height * scale))), Image.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(crop, ((SIZE - crop.width) // 2, (SIZE - crop.height) // 2))
    return np.asarray(canvas)


def rasterise(cache: Path) -> Path:
    """Write `emoji.npz`: rgba (N, 128, 128, 4) uint8, subject (N,), style (N,)."""
    out = cache / "emoji.npz"
    folders = fetch(cache)
    emoji = {e["label"].lower(): e for e in json.loads((folders["labels"] / "en/data.json").read_text())}
    icons = {s: json.loads((folders[s] / "icons.json").read_text()) for s in ("cartoon", "icon")}
    images, subjects, styles = [], [], []
    for subject_id, subject in enumerate(SUBJECTS):
        label = LABELS.get(subject, subject)
        if label not in emoji:
            raise RuntimeError(f"no emoji is labelled {label!r}")
        slug = re.sub(r"[^a-z0-9]+", "-", label)
        for style_id, style in enumerate(STYLES):
            art = _iconify(icons[style], slug) if style in icons else _fluent(folders[style], emoji[label]["hexcode"])
            if art is None:
                print(f"no {style} art for {subject}")
                continue
            images.append(_fill(art))
            subjects.append(subject_id)
            styles.append(style_id)
    np.savez_compressed(out, rgba=np.stack(images), subject=np.array(subjects), style=np.array(styles))
    print(f"{len(images)} images of {len(set(subjects))} subjects -> {out.name}")
    return out


class EmojiWorld:
    """Composes images (B, 3, 128, 128) in [0, 1] with their labels and captions.

    `animal_share` of the draws are the 45 animals, the rest any subject.
    """

    def __init__(self, cache: Path = CACHE, seed: int = 0, animal_share: float = 0.6):
        path = cache / "emoji.npz"
        data = np.load(path if path.exists() else rasterise(cache))
        self.rgba = torch.from_numpy(data["rgba"]).permute(0, 3, 1, 2).contiguous()
        self.subject = torch.from_numpy(data["subject"])
        self.style = torch.from_numpy(data["style"])
        self.animals = torch.nonzero(self.subject < len(ANIMALS)).flatten()
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values())) / 255
        self.animal_share = animal_share
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(n, generator=self.generator) * (high - low) + low

    def batch(self, n: int, jitter: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, 3, 128, 128) in [0, 1] and labels (n, 3): subject, style, background."""
        anything = torch.randint(len(self.rgba), (n,), generator=self.generator)
        animal = self.animals[torch.randint(len(self.animals), (n,), generator=self.generator)]
        index = torch.where(self._uniform(n) < self.animal_share, animal, anything)
        background = torch.randint(len(self.backgrounds), (n,), generator=self.generator)
        art = self.rgba[index].float() / 255

        scale = 0.89 + 0.04 * jitter * self._uniform(n, -1, 1)
        flip = torch.where(self._uniform(n) < 0.5, -1.0, 1.0)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = flip / scale, 1 / scale
        theta[:, 0, 2] = self._uniform(n, -0.03, 0.03) * jitter
        theta[:, 1, 2] = self._uniform(n, -0.03, 0.03) * jitter
        # Premultiplied, so that the colour under transparent pixels does not bleed into the edges.
        art = torch.cat([art[:, :3] * art[:, 3:], art[:, 3:]], 1)
        grid = F.affine_grid(theta, [n, 4, SIZE, SIZE], align_corners=False)
        art = F.grid_sample(art, grid, align_corners=False)

        ramp = torch.linspace(0.07, -0.07, SIZE).view(1, 1, SIZE, 1) * self._uniform(n, 0.5, 1).view(n, 1, 1, 1)
        canvas = (self.backgrounds[background].view(n, 3, 1, 1) * (1 + ramp) + ramp / 3).expand(n, 3, SIZE, SIZE)
        images = (canvas * (1 - art[:, 3:]) + art[:, :3]).clamp(0, 1)
        return images, torch.stack([self.subject[index], self.style[index], background], 1)

    def captions(self, labels: torch.Tensor) -> list[str]:
        """A caption for each row of labels: style in 60 %, background in 60 %, the long prefix in 30 %."""
        names = list(BACKGROUNDS)
        dice = torch.rand(len(labels), 3, generator=self.generator)
        return [
            caption(
                SUBJECTS[subject],
                STYLES[style] if d[0] < 0.6 else None,
                names[background] if d[1] < 0.6 else None,
                prefix=bool(d[2] < 0.3),
            )
            for (subject, style, background), d in zip(labels.tolist(), dice, strict=True)
        ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    rasterise(parser.parse_args().cache)
