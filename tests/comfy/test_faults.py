"""Faults in ComfyUI's own parts, one at a time, through the nodes: the best image comes back, and what only reports
costs nothing.

$MIRA_ALL_FAULTS: every method, every kind at every place; otherwise three methods, and the kinds take turns.
"""

from __future__ import annotations

import itertools
import json
import logging
import os

import comfy.model_management
import comfy.samplers
import pytest
import torch
from mira.nodes.editor import live, on_disk
from mira.nodes.host.dynamic import static
from mira.rewards.pixel import PixelReward
from mira.sampler import ending
from mira.sampler.trace import Trace

from testing.pack import as_node, mira

nodes = mira("nodes")
Cancelled = comfy.model_management.InterruptProcessingException
FAULTS = {
    "cancel": lambda: Cancelled(),
    "memory": lambda: torch.OutOfMemoryError("out of memory"),
    "error": lambda: RuntimeError("broken"),
    "lookup": lambda: KeyError("weight"),
}
ALL = bool(os.environ.get("MIRA_ALL_FAULTS"))
FAILING = ("network", "decoder", "reward")
REPORTING = ("thumbnail", "event", "disk")
QUICK = dict(preset="custom", iterations=3, restart_every=0, seeds=1, drift_limit=0.0, stop="never")
RUNS = {
    "optimize": ("MiraOptimizeKSampler", QUICK),
    "exact": ("MiraOptimizeKSampler", QUICK | {"gradient_steps": 0, "memory": "per_step"}),
    "seeds and rounds": (
        "MiraOptimizeKSampler", QUICK | {"iterations": 4, "restart_every": 2, "seeds": 2, "drift_limit": 0.05}
    ),
    **{
        f"search {m}": (
            "MiraSearchKSampler", {"method": m, "particles": 3, "rounds": 2, "interval": 1, "iterations": 1}
        )
        for m in ("best_of_n", "zero_order", "fk_steering", "das", "ntrk", "mira_fk", "restarts")
    },
    **{
        f"prefer {m}": ("MiraDPOPreference", {"judge": "reward", "method": m, "iterations": 3})
        for m in ("dueling", "dpo")
    },
}  # fmt: skip


class Injector:
    """Counts the calls of every place, and raises `problem` at one of them."""

    def __init__(self):
        self.arm()

    def arm(self, place: str = "", at: int = 0, problem=None) -> None:
        self.place, self.at, self.problem = place, at, problem
        self.calls = dict.fromkeys((*FAILING, *REPORTING), 0)
        self.seen: list[list[float]] = []  # the rewards of every iterate that was reported
        self.fired = False

    def around(self, place: str, inner):
        def call(*args, **kwargs):
            self.calls[place] += 1
            if place == self.place and self.calls[place] == self.at:
                self.fired = True
                raise self.problem()
            return inner(*args, **kwargs)

        return call


@pytest.fixture
def inject(world, monkeypatch, prompt_server, caplog):
    inject, reward = Injector(), PixelReward("brightness")
    # In dynamic VRAM the network that a gradient goes through is a copy.
    networks = {patcher.model.diffusion_model for patcher in (world.model, static(world.model, "here"))}
    for network in networks:
        monkeypatch.setattr(network, "forward", inject.around("network", network.forward))
    decoder = world.vae.first_stage_model
    monkeypatch.setattr(decoder, "decode", inject.around("decoder", decoder.decode))
    monkeypatch.setattr(reward, "score", inject.around("reward", reward.score))
    monkeypatch.setattr(live, "store", inject.around("thumbnail", live.store))
    monkeypatch.setattr(prompt_server, "send_sync", inject.around("event", lambda *_: None))
    monkeypatch.setattr(on_disk.Unfinished, "_write", inject.around("disk", on_disk.Unfinished._write))
    monkeypatch.setattr(on_disk, "SHARE", 1e9)  # after every iterate
    monkeypatch.setattr(ending, "give_back", lambda: None)  # a fifth of a second each
    told = live.LiveRun.__call__

    def seen(self, k, rows, score):
        told(self, k, rows, score)
        inject.seen.append([row["reward"] for row in rows])

    monkeypatch.setattr(live.LiveRun, "__call__", seen)
    caplog.set_level(logging.CRITICAL, "mira")
    inject.asked = reward
    return inject


@torch.inference_mode()
def run(world, name: str, reward):
    kind, values = RUNS[name]
    node = getattr(nodes, kind)
    given = dict(
        model=world.model, positive=world.positive, negative=world.negative, vae=world.vae, reward=reward, seed=5,
        cfg=5.0, latent_image={"samples": torch.zeros(1, 4, 8, 8)}, steps=2, sampler_name="euler_ancestral",
        scheduler="normal",
    )  # fmt: skip
    inputs = node.GET_SCHEMA().inputs
    mine = {i.id: getattr(i, "default", None) for i in inputs}
    mine = {k: v for k, v in mine.items() if v is not None and k not in ("choices",)}
    mira("nodes.shared.memo")._runs.clear()  # what was run before is run again
    return as_node(node).execute(**(mine | given | values)).args


@pytest.mark.parametrize("name", RUNS if ALL else ["seeds and rounds", "search zero_order", "prefer dueling"])
def test_no_fault_loses_an_image(world, inject, name):
    whole = run(world, name, inject.asked)
    calls, reported, kinds = dict(inject.calls), len(inject.seen), itertools.cycle(FAULTS)
    injected = 0
    for place in FAILING:
        for at in sorted({1, (calls[place] + 1) // 2, calls[place]}):
            for kind in FAULTS if ALL else (next(kinds),):
                inject.arm(place, at, FAULTS[kind])
                injected += 1
                try:
                    latent, plain, trace = run(world, name, inject.asked)[:3]
                except (Cancelled, RuntimeError, KeyError) as problem:
                    where = f"{place} {at}, {kind}: {problem}"
                    assert inject.fired and not inject.seen, f"{len(inject.seen)} images were lost at {where}"
                    continue
                assert inject.fired
                assert torch.isfinite(latent["samples"]).all() and torch.equal(plain["samples"], whole[1]["samples"])
                record = Trace.from_dict(json.loads(trace.to_json()))
                if not any(part in name for part in ("prefer", "steering", "das", "ntrk")):
                    best = max(rewards[0] for rewards in inject.seen)
                    assert record.summary(0)[1]["reward"] == pytest.approx(best)
                if trace.reasons != whole[2].reasons:  # cut short, and said so
                    said = {"cancel": "interrupted", "memory": "out of memory"}.get(kind, "error (")
                    assert said in trace.reasons[0]
                    assert kind == "cancel" or any("this is the best so far" in n for n in trace.notices)
                else:
                    assert kind == "memory" or "seed" in name
    for place in REPORTING:
        for at in sorted({1, calls[place]}):
            inject.arm(place, at, lambda: OSError(28, "No space left on device"))
            injected += 1
            latent, _, trace = run(world, name, inject.asked)[:3]
            assert inject.fired and len(inject.seen) == reported
            assert torch.equal(latent["samples"], whole[0]["samples"])
            assert any("No space left" in notice for notice in trace.notices)
    inject.arm()
    again = run(world, name, inject.asked)
    assert torch.equal(again[0]["samples"], whole[0]["samples"]) and injected > 12
    print(f"{name}: {injected} faults")
