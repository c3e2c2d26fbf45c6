"""`python dev.py demo`: the quickstart workflow on the demo model, with plain noise optimisation for contrast."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import csv
import json
import statistics
import sys
import time
from pathlib import Path

from tools.comfy import ROOT, Client, Server, ServerError, stop_cleanly
from tools.workflow import find, to_prompt

WORKFLOW = ROOT / "example_workflows" / "01 Quickstart.json"
OUTPUT = ROOT / "output" / "demo"
OPTIMIZER = "MiraOptimizeKSampler"


async def optimise(client: Client, prompt: dict, label: str) -> tuple[dict, dict[str, bytes]]:
    """Run the prompt with a progress bar; returns the record and the PNGs by file name prefix."""
    from tqdm import tqdm

    node = find(prompt, OPTIMIZER)
    inputs = prompt[node]["inputs"]
    drift, iterations = inputs["drift_metric"], inputs["iterations"]
    rounds = -(-iterations // (inputs["restart_every"] or iterations))
    prompt_id = await client.submit(prompt)
    with tqdm(total=iterations + rounds, desc=label, unit="it") as bar:
        async for kind, data in client.events(prompt_id):
            if kind == "mira.step":
                row = data["rows"][0]
                bar.set_postfix(reward=f"{row['reward']:.3f}", drift=f"{row[drift]:.3f}")
                bar.update()
    outputs = await client.outputs(prompt_id)
    images = {}
    for id, output in outputs.items():
        for entry in output.get("images", []):
            images[prompt[id]["inputs"]["filename_prefix"].split("/")[-1]] = await client.image(entry)
    return outputs[node]["mira"][0], images


def rows_of(record: dict) -> tuple[dict, dict]:
    """The rows of the plain sample and of the kept iterate."""
    return record["rows"][0], record["rows"][record["kept"][0]]


def judge(paths: list[Path], subject: str) -> list[float]:
    import numpy as np
    import torch
    from PIL import Image

    from demo.judge import adherence, load_judge

    pixels = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])
    images = torch.from_numpy(pixels).movedim(-1, 1).float() / 255
    return adherence(load_judge(), images, [subject] * len(paths)).tolist()


def plot(records: dict[str, dict], pictures: list[tuple[str, Path]], drift: str, reward: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["reward", "drift", "plane"], [name for name, _ in pictures]], figsize=(11, 7), layout="constrained"
    )
    for label, record in records.items():
        iterations = [r["iteration"] for r in record["rows"]]
        rewards = [r["reward"] for r in record["rows"]]
        drifts = [r[drift] for r in record["rows"]]
        kept = record["kept"][0]
        axes["reward"].plot(iterations, rewards, label=label)
        axes["drift"].plot(iterations, drifts, label=label)
        (line,) = axes["plane"].plot(drifts, rewards, label=label)
        axes["plane"].plot(drifts[kept], rewards[kept], "o", color=line.get_color())
    axes["reward"].set(xlabel="iteration", ylabel=reward)
    axes["drift"].set(xlabel="iteration", ylabel=drift)
    axes["plane"].set(xlabel=drift, ylabel=reward, title="the dot is what came back")
    axes["reward"].legend()
    for name, picture in pictures:
        axes[name].imshow(plt.imread(picture))
        axes[name].set(title=name)
        axes[name].axis("off")
    figure.savefig(path, dpi=110)


@contextlib.asynccontextmanager
async def explained(server: Server):
    """What goes wrong while the server works, with what it printed last."""
    try:
        yield
    except (ServerError, ValueError, OSError, asyncio.TimeoutError) as problem:
        text = f"{problem or type(problem).__name__}\nThe server printed last:\n{server.tail(15)}"
        raise ServerError(text) from problem


async def demo() -> dict:
    workflow = json.loads(WORKFLOW.read_text())
    OUTPUT.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    print("Starting ComfyUI ...", flush=True)
    with Server() as server:
        async with Client(server.url) as client, explained(server):
            prompt = to_prompt(workflow, await client.get("/object_info"))
            inputs = prompt[find(prompt, OPTIMIZER)]["inputs"]
            text = prompt[inputs["prompt"][0]]["inputs"]["value"]
            plain = copy.deepcopy(prompt)
            plain[find(prompt, OPTIMIZER)]["inputs"] |= {
                "preset": "custom", "learning_rate": 0.03, "keep": "last", "stop": "never", "hold": "no",
                "drift_limit": 0.0, "seeds": 1, "restart_every": 0, "gradient_steps": 0,
            }  # fmt: skip
            mira, images = await optimise(client, prompt, "MIRA")
            dno, contrast = await optimise(client, plain, "DNO ")
    pictures = [("before", images["plain"]), ("after MIRA", images["optimized"]), ("after DNO", contrast["optimized"])]
    paths = []
    for name, png in pictures:
        paths.append(OUTPUT / f"{name.replace(' ', '_').lower()}.png")
        paths[-1].write_bytes(png)
    with (OUTPUT / "record.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *mira["rows"][0]])  # the last row has no gradient, the first has all
        writer.writeheader()
        for label, record in (("mira", mira), ("dno", dno)):
            writer.writerows({"run": label, **row} for row in record["rows"])
    drift, reward = inputs["drift_metric"], mira["settings"]["reward"]
    plot(
        {"MIRA": mira, "DNO": dno},
        [(n, p) for (n, _), p in zip(pictures, paths, strict=True)],
        drift,
        reward,
        OUTPUT / "plot.png",
    )
    (_, after), (before, dno_after) = rows_of(mira), rows_of(dno)  # MIRA's begins from the best of several seeds
    subject = text.split()[-1]
    adherence = judge(paths, subject)
    seconds = [r["seconds"] for r in mira["rows"][1:-1]]
    summary = {
        "reward": {
            "name": reward,
            "before": before["reward"],
            "after": after["reward"],
            "dno_after": dno_after["reward"],
        },
        "drift": {"name": drift, "before": before[drift], "after": after[drift], "dno_after": dno_after[drift]},
        "adherence": {
            "name": f"probability of {subject!r} by the held-out judge",
            "before": adherence[0],
            "after": adherence[1],
            "dno_after": adherence[2],
        },
        "iterations": inputs["iterations"],
        "steps": inputs["steps"],
        "seconds": time.perf_counter() - started,
        "iteration_over_sampling": statistics.median(seconds) / mira["settings"]["sampling_seconds"],
    }
    (OUTPUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> int:
    stop_cleanly()
    try:
        summary = asyncio.run(demo())
    except ServerError as problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"\n{'':12}{'before':>10}{'MIRA':>10}{'DNO':>10}")
    for key in ("reward", "drift", "adherence"):
        entry = summary[key]
        print(f"{key:12}{entry['before']:10.3f}{entry['after']:10.3f}{entry['dno_after']:10.3f}  {entry['name']}")
    print(
        f"\n{summary['iterations']} iterations of {summary['steps']} steps; one costs "
        f"{summary['iteration_over_sampling']:.1f} plain samples; {summary['seconds']:.0f} s in all."
    )
    print(f"Images, plot.png, record.csv and summary.json are in {OUTPUT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
