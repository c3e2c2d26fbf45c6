"""A server that is killed in the middle of a run: what was found is on the disk, whole, and opens in the next one."""

from __future__ import annotations

import asyncio
import json
import shutil

from PIL import Image

from tools.comfy import ROOT, Client, Server
from tools.workflow import find, to_prompt

QUICKSTART = json.loads((ROOT / "example_workflows" / "01 Quickstart.json").read_text())
OPTIMIZER = "MiraOptimizeKSampler"


async def quickstart(client, **inputs):
    prompt = to_prompt(QUICKSTART, await client.get("/object_info"))
    prompt[find(prompt, OPTIMIZER)]["inputs"] |= dict(preset="custom", restart_every=0, seeds=1, stop="never") | inputs
    prompt[find(prompt, "EmptyLatentImage")]["inputs"] |= dict(width=64, height=64, batch_size=2)
    return prompt


def test_killed_in_the_middle(tmp_path, server):
    async def until_killed(server):
        async with Client(server.url) as client:
            prompt = await quickstart(client, steps=3, iterations=500)
            body = {"prompt": prompt, "client_id": client.id, "extra_data": {"extra_pnginfo": {"workflow": QUICKSTART}}}
            async with client.session.post(f"{client.url}/prompt", json=body) as answer:
                id_ = (await answer.json())["prompt_id"]
            rows = []
            async for kind, data in client.events(id_):
                if kind == "mira.step":
                    rows.append(data["rows"])
                if len(rows) == 6:
                    server.process.kill()
                    server.process.wait()
                    return rows

    with Server(tmp_path) as to_be_killed:
        rows = asyncio.run(until_killed(to_be_killed))
    left = (tmp_path / "output" / "mira_unfinished").iterdir()
    files = sorted(f for f in left if f.suffix != ".part")  # what was being written when it was killed
    assert [f.suffix for f in files] == [".png"] * 2
    for b, file in enumerate(files):
        with Image.open(file) as image:
            image.load()
            assert image.size == (64, 64) and json.loads(image.info["workflow"])["nodes"]
            (record,) = json.loads(image.info["mira_traces"]).values()
        told = [row for row in record["rows"] if row["image"] == b]
        # Writing takes a share of the time at most, so the last few iterates may be missing.
        assert len(told) >= 2
        for row, of_each in zip(told, rows, strict=False):
            assert row["reward"] == of_each[b]["reward"]
        kept = next(row for row in told if row["iteration"] == record["kept"][b])
        assert kept["reward"] == max(row["reward"] for row in told)
        assert record["settings"]["iterations"] == 500 and "not finished" in record["reasons"][b]

    async def opened(server):
        async with Client(server.url) as client:
            name = f"mira_unfinished/{files[1].name} [output]"
            prompt = {
                "1": {"class_type": "MiraLoadTrace", "inputs": {"file": name, "index": 0}},
                "2": {
                    "class_type": "MiraDriftMonitor",
                    "inputs": {"trace_1": ["1", 0], "drift_metric": "path_kl", "filename_prefix": ""},
                },
            }
            return (await client.run(prompt))["2"]

    shutil.copytree(tmp_path / "output", server.folder / "output", dirs_exist_ok=True)
    outputs = asyncio.run(opened(server))
    assert outputs["mira"][0]["rows"] and "reward" in outputs["mira_text"][0]


def test_a_run_that_ends_leaves_nothing_there(server):
    async def run():
        async with Client(server.url) as client:
            await client.run(await quickstart(client, steps=2, iterations=2))

    before = set((server.folder / "output").rglob("*.png"))
    asyncio.run(run())
    shown = set((server.folder / "output").rglob("*.png")) - before
    assert shown and not any("unfinished" in str(p) for p in shown)
