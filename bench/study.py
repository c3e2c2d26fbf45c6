"""Pairs of a benchmark's images for people and for models to judge: `python dev.py bench study [--methods ...]`.

Writes a folder: PNGs, `pairs.json`, and `index.html`, a page without a server that shows one pair after the other in
random order and sides, takes a click or the keys 1, 2 and 0 (a tie), and saves the answers to a file.
`--answers FILE ...` prints the win rates of such files.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import sys
from pathlib import Path

from PIL import Image

from bench.grid import Failure
from bench.tables import AGAINST, animals_of, opened
from bench.vlm import table
from testing.pack import ROOT, mira

vocabulary = mira("demo.vocabulary")
PAGE = Path(__file__).with_name("study.html")


def save(image, path: Path) -> None:
    Image.fromarray(image.movedim(0, 2).numpy()).save(path)


def pairs(store, methods: list[str], limit: int, seed: int, out: Path) -> list[dict]:
    found = []
    for file in sorted(store.folder.glob("*.csv")):
        unit = file.stem
        if unit.startswith("base__"):
            continue
        method, target, run, block = unit.split("__")
        other = f"{AGAINST}__{target}__{run}__{block}"
        if method == AGAINST or (methods and method not in methods) or not store.has(other):
            continue
        of_unit = animals_of(file)
        one, two = store.tensors(unit)["images"], store.tensors(other)["images"]
        for b, animal in enumerate(of_unit):
            of = animal if animal in vocabulary.ANIMALS else str(b)  # a prompt is no name of a file
            found.append((f"{unit}__{of}", method, target, animal, one[b], two[b]))
    random.Random(seed).shuffle(found)
    listing = []
    for name, method, target, animal, a, b in found[:limit]:
        # An answer is about these images: those of another run have another name.
        name += "-" + hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest()[:8]
        save(a, out / f"{name}_a.png")
        save(b, out / f"{name}_b.png")
        prompt = animal if store.config.get("prompts") else vocabulary.caption(animal, prefix=True)
        listing.append({"id": name, "method": method, "against": AGAINST, "target": target, "prompt": prompt,
                        "a": f"{name}_a.png", "b": f"{name}_b.png"})  # fmt: skip
    return listing


def write(folder: Path, listing: list[dict]) -> None:
    """pairs.json and the page, which carries the list: a page from a file may not read another one."""
    (folder / "pairs.json").write_text(json.dumps({"pairs": listing}, indent=1))
    shown = [{k: p[k] for k in ("id", "prompt", "a", "b")} for p in listing]
    page = PAGE.read_text().replace("/*PAIRS*/[]", json.dumps(shown).replace("</", "<\\/"))
    study = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]
    (folder / "index.html").write_text(page.replace('/*STUDY*/""', f'"{study}"'))


def answered(folder: Path, files: list[Path]) -> str:
    """The table of people's answers, as the page saves them."""
    if not (folder / "pairs.json").is_file():
        raise Failure(f"{folder} holds no pairs.json: --out is the folder that the page is in")
    known = {p["id"]: p for p in json.loads((folder / "pairs.json").read_text())["pairs"]}
    rows = []
    for path in files:
        if not path.is_file():
            raise Failure(f"{path}: there is no such file; it is what the page's button saves")
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        if not found or not {"pair", "winner"} <= found[0].keys():
            raise Failure(f"{path} holds no answers (pair, winner): it is what the page's button saves")
        if strangers := [r["pair"] for r in found if r["pair"] not in known]:
            raise Failure(
                f"{path}: {len(strangers)} of {len(found)} answers are to pairs of another study, {strangers[0]}"
            )
        rows += [known[r["pair"]] | r for r in found]
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "output" / "paper", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "study")
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answers", nargs="+", type=Path, metavar="FILE",
                        help="no new pairs: the win rates of what people answered to those in --out")  # fmt: skip
    args = parser.parse_args()
    if args.answers:
        print(answered(args.out, args.answers))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    listing = pairs(opened(args.source), args.methods, args.pairs, args.seed, args.out)
    if not listing:
        raise Failure(f"{args.source} holds no images of two methods to compare")
    write(args.out, listing)
    print(f"{len(listing)} pairs: open {args.out / 'index.html'}, or `python dev.py bench judge {args.out} --url ...`")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"bench study: {failure}")
