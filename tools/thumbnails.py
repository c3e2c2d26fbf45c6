"""Runs the example workflows of the demo model and makes their thumbnails of the real results.

python -m tools.thumbnails [NAME ...]      (in ComfyUI's environment, $MIRA_COMFYUI set, as dev.py sets it)
"""

from __future__ import annotations

import asyncio
import io
import json
import sys

from PIL import Image, ImageDraw, ImageFont

from .comfy import Client, Server
from .examples import EXAMPLES, FOLDER, needs_files
from .workflow import to_prompt

SIDE, GAP = 256, 8
IN_A_ROW = 4


def joined(pictures: list[Image.Image]) -> Image.Image:
    """Side by side; many in rows."""
    if len(pictures) > IN_A_ROW:
        rows = [joined(pictures[i : i + IN_A_ROW]) for i in range(0, len(pictures), IN_A_ROW)]
        out = Image.new(
            "RGB", (max(r.width for r in rows), sum(r.height for r in rows) + GAP * (len(rows) - 1)), "white"
        )
        for number, row in enumerate(rows):
            out.paste(row, (0, number * (SIDE + GAP)))
        return out.resize((out.width // 2, out.height // 2), Image.Resampling.LANCZOS)
    scaled = [p.resize((max(1, round(p.width * SIDE / p.height)), SIDE), Image.Resampling.LANCZOS) for p in pictures]
    out = Image.new("RGB", (sum(p.width for p in scaled) + GAP * (len(scaled) - 1), SIDE), "white")
    x = 0
    for picture in scaled:
        out.paste(picture, (x, 0))
        x += picture.width + GAP
    return out


async def choose(client: Client) -> None:
    """The person at the screen, who likes whatever stands first."""
    while True:
        for waiting in (await client.get(f"/mira/choice?client_id={client.id}"))["pending"]:
            body = {"prompt_id": waiting["prompt_id"], "node_id": waiting["node"], "token": waiting["token"]}
            async with client.session.post(
                f"{client.url}/mira/choice", json=body | {"choice": 1, "client_id": client.id}
            ):
                pass
        await asyncio.sleep(0.1)


async def results(client: Client, name: str, info: dict) -> list[Image.Image]:
    """The saved images, the plain sample first, then the others."""
    prompt = to_prompt(json.loads((FOLDER / f"{name}.json").read_text()), info)
    chooser = asyncio.create_task(choose(client))
    outputs = await client.run(prompt)
    chooser.cancel()
    found = []
    for key, node in prompt.items():
        if node["class_type"] in ("SaveImage", "PreviewImage"):
            prefix = node["inputs"].get("filename_prefix", "zz")
            rank = 0 if "plain" in prefix or "before" in prefix else 2 if prefix == "zz" else 1
            for entry in outputs[key]["images"]:
                found.append((rank, Image.open(io.BytesIO(await client.image(entry))).convert("RGB")))
    # Plots, which are wide, cannot be read at this size.
    return [picture for _, picture in sorted(found, key=lambda pair: pair[0]) if picture.width < 2 * picture.height]


def card(name: str) -> Image.Image:
    """For a workflow whose files are not here: its name, and no picture that nobody made."""
    out = Image.new("RGB", (2 * SIDE + GAP, SIDE), "#26323f")
    canvas = ImageDraw.Draw(out)
    _, title = name.split(" ", 1)
    canvas.text((out.width / 2, SIDE / 2 - 20), title, fill="white", font=ImageFont.load_default(size=34), anchor="mm")
    small = ImageFont.load_default(size=16)
    canvas.text(
        (out.width / 2, SIDE / 2 + 24), "needs its checkpoint and scorer", fill="#9fb4c8", font=small, anchor="mm"
    )
    return out


async def make(names: list[str]) -> None:
    with Server() as server:
        async with Client(server.url) as client:
            info = await client.get("/object_info")
            for name in names:
                made = card(name) if needs_files(name) else joined(await results(client, name, info))
                made.save(FOLDER / f"{name}.jpg", quality=88)
                print(FOLDER / f"{name}.jpg", flush=True)


if __name__ == "__main__":
    asyncio.run(make(sys.argv[1:] or list(EXAMPLES)))
