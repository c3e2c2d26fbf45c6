"""Many short runs of mixed nodes on one server: memory, threads, open files and files on the disk stay what they were.

$MIRA_SOAK_RUNS: how many, 200 for a real one.
"""

from __future__ import annotations

import asyncio
import json
import os
from statistics import mean

import psutil
import pytest

from testing.servers import WITH_SMALL_MODEL, on_small_model
from tools.comfy import ROOT, Client, Server
from tools.workflow import to_prompt

RUNS = int(os.environ.get("MIRA_SOAK_RUNS", "16"))
SHORT = dict(
    steps=2,
    iterations=2,
    rounds=1,
    restart_every=0,
    seeds=2,
    particles=2,
    candidates=2,
    width=64,
    height=64,
    preset="custom",
)
EXAMPLES = ("01 Quickstart", "08 Search - small JPEG", "03 Preferences - small JPEG", "05 Combine rewards")


@pytest.mark.timeout(60 + 40 * RUNS)
def test_nothing_grows(tmp_path):
    async def go(server):
        process, seen = psutil.Process(server.process.pid), []
        async with Client(server.url) as client:
            info = await client.get("/object_info")
            for number in range(RUNS):
                workflow = json.loads((ROOT / "example_workflows" / f"{EXAMPLES[number % 4]}.json").read_text())
                prompt = to_prompt(on_small_model(workflow), info)
                for node in prompt.values():
                    node["inputs"] |= {k: v for k, v in SHORT.items() if k in node["inputs"]}
                    node["inputs"] |= {"seed": number} if "seed" in node["inputs"] else {}
                    if node["class_type"] == "SaveImage":  # ComfyUI's own files are its own
                        node["class_type"], node["inputs"] = "PreviewImage", {"images": node["inputs"]["images"]}
                await client.run(prompt)
                if number % 4 == 3:  # after each of them once
                    mine = sum(1 for p in (tmp_path / "temp").rglob("mira/*")) + len(
                        list((tmp_path / "output").rglob("*.*"))
                    )
                    seen.append((process.memory_info().rss / 1e6, process.num_threads(), process.num_fds(), mine))
        return seen

    with Server(tmp_path, arguments=WITH_SMALL_MODEL) as server:
        seen = asyncio.run(go(server))
    print("\nMB, threads, open files, files:", *(f"{mb:.0f} {t} {o} {f}" for mb, t, o, f in seen), sep="\n")
    settled = seen[len(seen) // 4 :]
    half = len(settled) // 2
    before, after = ([mean(s[i] for s in part) for i in range(4)] for part in (settled[:half], settled[half:]))
    assert after[0] < before[0] * 1.03 + 20, (before, after)
    assert after[1] <= before[1] + 2 and after[2] <= before[2] + 2, (before, after)
    assert seen[-1][3] <= 32 * 8, "thumbnails of the last 32 runs, and no more"
