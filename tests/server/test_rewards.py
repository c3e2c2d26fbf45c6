"""Rewards and scores through the real server: files from a models folder of the user's, Best-of-N, and bad input."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
import small
import torch
from safetensors.torch import save_file

from testing.servers import WITH_SMALL_MODEL
from tools.comfy import ROOT, Client, Server, ServerError

PROMPT = "generate an image of a fox"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extra")
    models = folder / "rewards"
    models.mkdir()
    torch.save({"state_dict": small.fill(small.open_clip_network().state_dict())}, models / "HPS_v2.1_compressed.pt")
    save_file({"x": torch.zeros(1)}, models / "other.safetensors")
    (models / "warmth.py").write_text((ROOT / "docs/examples/warmth.py").read_text())
    (models / "broken.py").write_text(
        'FACTS = {"name": "b", "typical": (0, 1)}\n\ndef score(images, prompts):\n    return 1 / 0\n'
    )
    config = folder / "paths.yaml"
    config.write_text(f"mine:\n    base_path: {folder}\n    mira_rewards: rewards\n")
    with Server(arguments=("--extra-model-paths-config", str(config), *WITH_SMALL_MODEL)) as server:
        yield server


def graph(reward: dict, batch=3, top_k=2, prompt=PROMPT):
    """Best-of-N: three stock nodes, a reward, Score Images and Rank Images."""
    return {
        "1": {"class_type": "SmallModel", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": PROMPT}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": batch}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 1,
                "steps": 3, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": reward,
        "8": {"class_type": "MiraScoreImages", "inputs": {"images": ["6", 0], "reward": ["7", 0], "prompt": prompt}},
        "9": {"class_type": "MiraRankImages", "inputs": {"images": ["6", 0], "scores": ["8", 0], "top_k": top_k}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "best"}},
        "11": {"class_type": "MiraScoreImages", "inputs": {"images": ["9", 0], "reward": ["7", 0], "prompt": prompt}},
    }  # fmt: skip


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def run(server, prompt):
    async def go():
        async with Client(server.url) as client:
            prompt_id = await client.submit(prompt)
            events = [event async for event in client.events(prompt_id)]
            return events, await client.outputs(prompt_id)

    return asyncio.run(go())


def get(server, path):
    async def go():
        async with Client(server.url) as client:
            return await client.get(path)

    return asyncio.run(go())


REWARDS = [
    node("MiraDemoCLIPScore"),
    node("MiraLoadHPSReward", file="HPS_v2.1_compressed.pt", version="v2.1", precision="auto"),
    node("MiraRewardFromPython", file="warmth.py"),
    node("MiraJPEGReward", kind="black box", quality=95),
    node("MiraPixelReward", measure="colourfulness"),
]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda r: r["class_type"])
def test_best_of_n(server, reward):
    _, outputs = run(server, graph(reward))
    scores, best = outputs["8"]["mira_scores"], outputs["11"]["mira_scores"]
    assert len(scores) == 3 and len(outputs["10"]["images"]) == 2
    assert best == pytest.approx(
        sorted(scores, reverse=True)[:2], rel=1e-3 if os.environ.get("MIRA_GPU") else 1e-4, abs=1e-6
    )
    assert "typical" in outputs["8"]["mira_text"][0]


def test_loaders_list_the_users_files(server):
    info = get(server, "/object_info")
    options = info["MiraLoadHPSReward"]["input"]["required"]["file"]
    listed = options[1]["options"] if options[0] == "COMBO" else options[0]
    assert "HPS_v2.1_compressed.pt" in listed and "warmth.py" not in listed


def error_of(server, prompt):
    with pytest.raises(ServerError) as caught:
        run(server, prompt)
    return str(caught.value)


def test_a_missing_file_is_told_before_anything_runs(server):
    message = error_of(server, graph(node("MiraLoadImageReward", file="ImageReward.pt", precision="auto")))
    assert "zai-org/ImageReward" in message and "models/mira_rewards" in message


def test_wrong_and_broken_files(server):
    message = error_of(
        server, graph(node("MiraLoadHPSReward", file="other.safetensors", version="v2", precision="auto"))
    )
    assert "other.safetensors is of an unknown kind (it begins with x)" in message
    message = error_of(server, graph(node("MiraRewardFromPython", file="broken.py")))
    assert "broken.py, line 4 (return 1 / 0): ZeroDivisionError" in message


def test_another_machine_is_refused(server):
    reward = node(
        "MiraRewardFromHTTP", url="http://192.0.2.1/score", name="x", needs_prompt=False, timeout=1.0, retries=0,
        typical_low=0.0, typical_high=1.0,
    )  # fmt: skip
    assert "MIRA_HTTP_HOSTS=192.0.2.1" in error_of(server, graph(reward))


def test_an_empty_prompt(server):
    assert "prompt is empty" in error_of(server, graph(node("MiraDemoCLIPScore"), prompt=""))


def test_the_web_folder_is_served(server):
    scripts = get(server, "/extensions")
    assert [s for s in scripts if s.endswith("/mira.js")] and [s for s in scripts if s.endswith("/text.js")]


def test_what_the_record_says_of_a_long_prompt(server):
    prompt = graph(node("MiraDemoCLIPScore"))
    prompt = {k: v for k, v in prompt.items() if k in "1234 7".replace(" ", "")}
    prompt["5"] = node(
        "MiraOptimizeKSampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["4", 0],
        vae=["1", 2], reward=["7", 0], seed=1, steps=2, cfg=5.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        preset="custom", iterations=1, learning_rate=0.02, regularizer="none", beta=0.0, keep="last",
        drift_limit=0.0, stop="never", patience=3, memory="auto", drift_metric="path_kl", optimizer="adamw",
        clip_norm=1.0, weighting="marginal", measured="guided", prompt=small.LONG,
    )  # fmt: skip
    prompt["6"] = node("VAEDecode", samples=["5", 0], vae=["1", 2])
    prompt["9"] = node("PreviewImage", images=["6", 0])
    events, _ = run(server, prompt)
    (done,) = (data for kind, data in events if kind == "executed" and data["node"] == "5")
    assert "cut to 77" in json.dumps(done["output"]["mira"][0]["notices"])
