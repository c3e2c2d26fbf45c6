"""Prompts that nobody would think of, made from ComfyUI's own description of the nodes, and what became of them.

Every input of every node of the pack is drawn from what `/object_info` says of it, so that a new one is fuzzed from the
day on which it is added. A prompt is a graph that works, with up to two odd values in it.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from hypothesis import strategies as st
from mira.sampler.trace import Trace
from PIL import Image

from tools.comfy import Client, ServerError

PACK = "Mira"
# What a valid draw is at most, so that a prompt takes a second or two.
DEAREST = {
    "steps": 4, "iterations": 3, "rounds": 2, "restart_every": 2, "seeds": 3, "particles": 4, "candidates": 3,
    "crops": 3, "retries": 1, "batch_size": 2, "timeout": 0.4, "patience": 3, "iterate": 4, "strength": 20.0,
    "cfg": 9.0, "learning_rate": 0.2,
}  # fmt: skip
SIZES = [16, 48, 64, 72]
TEXTS = [
    "a fox", "", " ", "a (fox:1.3) <lora:a:1> embedding:b", "狐 🦊", "a " * 200, "a\nb", "\x00\x1b[0m", '{"a": 1}',
    "../../x",
]  # fmt: skip
ODD = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64 - 1, 2**64, -(2**63), 10**39, 0.5, -0.5, 1e-30, 1e30, math.inf,
    -math.inf, math.nan, "", "abc", "0", "nan", "None", "../../etc/passwd", "x" * 5000, [], [1], ["1"], ["nowhere", 0],
    {}, {"a": [1]}, [[[]]],
]  # fmt: skip
LINKED = (
    "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "MASK", "NOISE", "GUIDER", "SAMPLER", "SIGMAS",
    "MIRA_REWARD", "MIRA_TRACE",
)  # fmt: skip
SECONDS = 6  # a prompt that takes longer is cancelled
TO_END = 20  # seconds in which it has to end then, on a busy machine too


def spec_of(entry: list) -> tuple[str, dict]:
    """(kind, options) of an input in `/object_info`, whose combos have two spellings."""
    kind, options = entry[0], entry[1] if len(entry) > 1 else {}
    if isinstance(kind, list):
        return "COMBO", {**options, "options": kind}
    return kind, options


def valid(name: str, kind: str, options: dict) -> st.SearchStrategy:
    """A value that the input's own description allows, and that costs little."""
    if kind == "COMBO":
        return st.sampled_from(options["options"] or [""])
    if kind == "BOOLEAN":
        return st.booleans()
    if kind == "STRING":
        return st.sampled_from(TEXTS) if name != "url" else st.sampled_from(["http://127.0.0.1:9/", "http://[::1]:9/x"])
    low, high = options.get("min", 0), options.get("max", 10)
    if name in ("width", "height"):
        return st.sampled_from(SIZES)
    if name == "denoise":
        return st.floats(0.1, 1.0)  # a stock scheduler makes steps / denoise levels
    high = max(low, min(high, DEAREST.get(name, high)))
    if kind == "INT":
        return st.one_of(st.just(max(low, min(high, options.get("default", low)))), st.integers(low, high))
    return st.one_of(
        st.just(float(max(low, min(high, options.get("default", low))))),
        st.floats(low, high, allow_nan=False),
        st.sampled_from([low, high]),
    )


def odd(kind: str, options: dict) -> st.SearchStrategy:
    """A value just within, at or beyond the ends of what is allowed, or of another kind altogether."""
    ends = [v for end in ("min", "max") if (v := options.get(end)) is not None]
    beyond = [v + d for v in ends for d in (-1, 0, 1)]
    return st.sampled_from(beyond + ODD) if beyond else st.sampled_from(ODD)


@dataclass
class Graph:
    """A prompt that is being made. odds: what is odd in it, in words."""

    draw: object
    info: dict
    prompt: dict = field(default_factory=dict)
    odds: list[str] = field(default_factory=list)

    def add(self, kind: str, /, **inputs) -> str:
        key = str(len(self.prompt) + 1)
        self.prompt[key] = {"class_type": kind, "inputs": inputs}
        return key

    def node(self, kind: str, /, depth: int = 0, odd_ones: int = 0, **given) -> str:
        """A node with all its inputs drawn; links come from nodes that are added for them."""
        groups = self.info[kind]["input"]
        specs = {
            name: spec_of(entry) for group in ("required", "optional") for name, entry in groups.get(group, {}).items()
        }
        odd_ones = min(odd_ones, len(specs))
        names = st.lists(st.sampled_from(sorted(specs)), min_size=odd_ones, max_size=odd_ones, unique=True)
        strange = self.draw(names) if odd_ones else []
        inputs = {}
        for name, (type_, options) in specs.items():
            optional = name in groups.get("optional", {})
            link = type_.split(",")[0] not in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") or options.get(
                "forceInput"
            )
            if name in given:
                inputs[name] = given[name]
            elif link:
                if optional and (type_ not in SUPPLY or self.draw(st.integers(0, 3))):
                    continue
                inputs[name] = self.link(type_, depth)
            elif not (optional and self.draw(st.booleans())):
                inputs[name] = self.draw(valid(name, type_, options))
            if name in strange:
                self.make_odd(inputs, kind, name, type_, options, link)
        return self.add(kind, **inputs)

    def make_odd(self, inputs: dict, kind: str, name: str, type_: str, options: dict, link: bool) -> None:
        how = self.draw(st.sampled_from(("value", "value", "missing", "link")))
        if how == "missing":
            inputs.pop(name, None)
        elif how == "link" and link:
            inputs[name] = self.link(self.draw(st.sampled_from([t for t in LINKED if t != type_])), 9)
        else:
            inputs[name] = self.draw(odd(type_, options))
        self.odds.append(f"{kind}.{name}: {how} {str(inputs.get(name))[:40]}")

    def link(self, type_: str, depth: int) -> list:
        return SUPPLY[type_](self, depth)

    def checkpoint(self, slot: int) -> list:
        found = next((k for k, n in self.prompt.items() if n["class_type"] == "SmallModel"), None)
        return [found or self.add("SmallModel"), slot]

    def reward(self, depth: int) -> list:
        plain = ["MiraPixelReward"] * 4 + ["MiraJPEGReward", "MiraDemoCLIPScore", "MiraDemoAesthetic"]
        outer = ["MiraCombineRewards", "MiraAugmentReward", "MiraRewardFromHTTP"] if depth < 1 else []
        kind = self.draw(st.sampled_from(plain + outer))
        measures = [m for m in self.options("MiraPixelReward", "measure") if m != "match reference"]
        given = {"measure": self.draw(st.sampled_from(measures))} if kind == "MiraPixelReward" else {}
        return [self.node(kind, depth + 1, **given), 0]

    def options(self, kind: str, name: str) -> list:
        return spec_of(self.info[kind]["input"]["required"][name])[1]["options"]

    def latent(self, depth: int) -> list:
        made = [self.node("EmptyLatentImage"), 0]
        if self.draw(st.integers(0, 4)) == 0:
            value = self.draw(st.sampled_from([0.0, 0.5, 1.0]))
            mask = [self.add("SolidMask", value=value, width=64, height=64), 0]
            made = [self.add("SetLatentNoiseMask", samples=made, mask=mask), 0]
        return made

    def guider(self, depth: int) -> list:
        kind = self.draw(st.sampled_from(("CFGGuider", "CFGGuider", "BasicGuider", "MiraDyMOGuider")))
        return [self.node(kind, depth + 1), 0]

    def noise(self, depth: int) -> list:
        kind = self.draw(st.sampled_from(("RandomNoise", "RandomNoise", "DisableNoise", "MiraInitNONoise")))
        return [self.node(kind, depth + 1), 0]

    def model(self, depth: int) -> list:
        if depth < 2 and self.draw(st.integers(0, 5)) == 0:
            return [self.node("MiraRLGuidance", depth + 2), 0]
        return self.checkpoint(0)

    def trace(self, depth: int) -> list:
        return [self.node("MiraOptimizeKSampler", depth + 1, preset="custom"), 2]

    def score(self, depth: int) -> list:
        return [self.node("MiraScoreImages", depth + 1), 0]

    def image(self, depth: int) -> list:
        return [self.add("VAEDecode", samples=[self.node("EmptyLatentImage"), 0], vae=self.checkpoint(2)), 0]

    def finish(self, key: str) -> None:
        """Something that asks for every output."""
        for slot, type_ in enumerate(self.info[self.prompt[key]["class_type"]]["output"]):
            link = [key, slot]
            if type_ == "LATENT":
                self.add("PreviewImage", images=[self.add("VAEDecode", samples=link, vae=self.checkpoint(2)), 0])
            elif type_ == "IMAGE":
                self.add("PreviewImage", images=link)
            elif type_ == "MIRA_REWARD":
                self.add("MiraScoreImages", images=self.image(0), reward=link, prompt="a fox")
            elif type_ == "MIRA_TRACE":
                self.add("MiraDriftMonitor", trace_1=link, drift_metric="path_kl", filename_prefix="")
            elif type_ == "MODEL":
                self.finish(self.node("KSampler", 9, model=link))
            elif type_ in ("NOISE", "GUIDER"):
                given = {type_.lower(): link}
                self.finish(self.node("SamplerCustomAdvanced", 9, **given))


SUPPLY = {
    "MODEL": Graph.model,
    "CLIP": lambda g, _: g.checkpoint(1),
    "VAE": lambda g, _: g.checkpoint(2),
    "CONDITIONING": lambda g, _: [
        g.add("CLIPTextEncode", text=g.draw(st.sampled_from(TEXTS[:5])), clip=g.checkpoint(1)),
        0,
    ],
    "LATENT": Graph.latent,
    "IMAGE": Graph.image,
    "MASK": lambda g, _: [g.add("SolidMask", value=1.0, width=64, height=64), 0],
    "NOISE": Graph.noise,
    "GUIDER": Graph.guider,
    "SAMPLER": lambda g, _: [g.node("KSamplerSelect"), 0],
    "SIGMAS": lambda g, _: [g.node("BasicScheduler", 9), 0],
    "MIRA_REWARD": Graph.reward,
    "MIRA_TRACE": Graph.trace,
    "FLOAT": Graph.score,
}
SAMPLING = ("MiraOptimizeKSampler", "MiraSearchKSampler", "MiraTiltKSampler", "MiraDPOPreference")
KSAMPLER = (
    "model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image", "denoise",
)  # fmt: skip


def drawn(draw, info: dict) -> Graph:
    """A whole prompt, around one node of the pack. draw: as Hypothesis's `data.draw`."""
    mine = sorted(k for k in info if k.startswith(PACK))
    kind = draw(st.sampled_from(mine + [k for k in SAMPLING for _ in range(6)] + ["MiraOptimizeSamplerAdvanced"] * 4))
    graph = Graph(draw, info)
    graph.finish(graph.node(kind, odd_ones=draw(st.sampled_from((0, 0, 1, 1, 2)))))
    return graph


# A Python error that says nothing to whoever made the graph.
BARE = re.compile(r"object has no attribute|unexpected keyword|list index|unhashable|not subscriptable|KeyError")


@dataclass
class Outcome:
    """kind: fine, refused, cancelled, or failed, with the reason."""

    kind: str
    reason: str = ""
    outputs: dict = field(default_factory=dict)


class Fuzzer:
    """One client of a server. seen: how the prompts ended; failures: (reason, the prompt) of those that should not."""

    def __init__(self, client: Client, info: dict):
        self.client, self.info = client, info
        self.seen: Counter[str] = Counter()
        self.failures: list[tuple[str, dict]] = []
        self.compared = 0  # pictures that should be the same
        self.titles = {k: v["display_name"] for k, v in info.items()}

    async def run(self, prompt: dict) -> Outcome:
        """Queue, wait, and cancel what takes too long."""
        try:
            id_ = await self.submit(prompt)
        except ServerError as problem:
            return self.refused(None, str(problem))
        started, cancelled = time.monotonic(), False
        while True:
            try:
                message = await self.client.socket.receive(timeout=0.5)
            except asyncio.TimeoutError:
                message = None
            if message is not None and message.type is aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                data = event["data"]
                if data.get("prompt_id") == id_:
                    if event["type"] == "execution_error":
                        return self.refused(data["node_type"], f"{data['exception_type']}: {data['exception_message']}")
                    if event["type"] in ("execution_success", "execution_interrupted"):
                        outputs = await self.client.outputs(id_)
                        return Outcome("cancelled" if cancelled else "fine", outputs=outputs)
            elif message is not None and message.type is not aiohttp.WSMsgType.BINARY:
                return Outcome("failed", "the server closed the connection")
            if time.monotonic() - started > SECONDS + TO_END:
                return Outcome("failed", f"it did not end within {TO_END} s of being cancelled")
            if time.monotonic() - started > SECONDS:  # every node of ours ends with its best, and the next one begins
                cancelled = True
                await self.client.interrupt()

    async def submit(self, prompt: dict) -> str:
        body = json.dumps({"prompt": prompt, "client_id": self.client.id}).encode("utf-8", "surrogatepass")
        url, kind = f"{self.client.url}/prompt", {"Content-Type": "application/json"}
        async with self.client.session.post(url, data=body, headers=kind) as answer:
            text = await answer.text()
        if answer.status == 500:
            raise ServerError(f"500 {text[:200]}")
        told = json.loads(text)
        if answer.status != 200:
            errors = [
                (node["class_type"], f"{e['type']}: {e['message']}: {e.get('details')}: {e.get('extra_info')}")
                for node in (told.get("node_errors") or {}).values()
                for e in node["errors"]
            ]
            raise ServerError(json.dumps(errors or told.get("error")))
        return told["prompt_id"]

    def refused(self, kind: str | None, said: str) -> Outcome:
        """Cleanly, or not: by which node, and with a reason that is more than Python's own."""
        if said.startswith("500"):
            return Outcome("failed", f"the server broke: {said}")
        if kind is None:
            # ComfyUI calls what a node's own check stumbles over an exception during its validation.
            # (A link to a node that is not there is one of its own.)
            stumbled = "'nowhere'" not in said and re.search(r"exception_during_validation.{0,300}", said)
            return Outcome("failed", stumbled[0]) if stumbled else Outcome("refused", said)
        if not kind.startswith(PACK):
            return Outcome("refused", said)  # a stock node's own words
        text = said.split(": ", 1)[1]
        # A reward that fails where it is asked names itself.
        mine = [title for name, title in self.titles.items() if name.startswith(PACK)]
        if not text.startswith(tuple(mine)) or BARE.search(text):
            return Outcome("failed", f"{kind} said {said[:300]}")
        return Outcome("refused", said)

    async def pixels(self, outputs: dict, prompt: dict, source: list) -> np.ndarray | None:
        """The pictures of the latents at `source`, as a stock node showed them; None of one that said nothing again."""
        (decode,) = (k for k, n in prompt.items() if n["inputs"].get("samples") == source)
        (shown,) = (k for k, n in prompt.items() if n["inputs"].get("images") == [decode, 0])
        if shown not in outputs:
            return None
        files = [await self.client.image(entry) for entry in outputs[shown]["images"]]
        return np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files])

    async def differ(self, a: tuple, b: tuple) -> bool:
        """Whether two of `pixels`, given by their arguments, are other pictures."""
        one, other = await self.pixels(*a), await self.pixels(*b)
        if one is None or other is None:
            return False
        self.compared += 1
        return not np.array_equal(one, other)

    async def judge(self, graph: Graph, twice: bool) -> None:
        """Run a prompt and hold what came of it against what is promised."""
        outcome = await self.run(graph.prompt)
        if outcome.kind == "fine":
            outcome.reason = await self.broken_promise(graph.prompt, outcome.outputs, twice)
            outcome.kind = "failed" if outcome.reason else "fine"
        self.seen[outcome.kind] += 1
        if outcome.kind == "failed":
            self.failures.append((f"{outcome.reason} (odd: {'; '.join(graph.odds) or 'nothing'})", graph.prompt))

    async def broken_promise(self, prompt: dict, outputs: dict, twice: bool) -> str:
        for key, node in prompt.items():
            for record in outputs.get(key, {}).get("mira", []) if node["class_type"] != "MiraDriftMonitor" else ():
                taken = node["inputs"].get("iterate", -1)
                if taken == -1 and (why := wrong_record(record)):
                    return f"{node['class_type']}: {why}"
            if node["class_type"] in SAMPLING and key in outputs:
                stock = {
                    k: n for k, n in prompt.items() if not n["class_type"].startswith(PACK) or "Demo" in n["class_type"]
                }
                stock |= {k: n for k, n in prompt.items() if n["class_type"] == "MiraRLGuidance"}
                inputs = {"denoise": 1.0} | {k: v for k, v in node["inputs"].items() if k in KSAMPLER}
                stock[key] = {"class_type": "KSampler", "inputs": inputs}
                shows = [k for k, n in prompt.items() if n["inputs"].get("samples") == [key, 1]]
                if not shows:
                    continue
                stock = reachable(stock, shows[0], key)
                theirs = await self.run(stock)
                if theirs.kind != "fine":
                    return f"KSampler: {theirs.kind} {theirs.reason[:200]}"
                if await self.differ((outputs, prompt, [key, 1]), (theirs.outputs, stock, [key, 0])):
                    return f"{node['class_type']}: plain is not KSampler's picture"
                if twice:
                    again = await self.run(prompt)
                    mine = (outputs, prompt, [key, 0]), (again.outputs, prompt, [key, 0])
                    if again.kind == "fine" and await self.differ(*mine):
                        return f"{node['class_type']}: the same seed gave another picture"
        return ""


def reachable(prompt: dict, show: str, sampler: str) -> dict:
    """The decoder of the sampler's latents with a preview, and all that they need."""
    prompt = dict(prompt)
    prompt[show] = {"class_type": "VAEDecode", "inputs": prompt[show]["inputs"] | {"samples": [sampler, 0]}}
    end = str(1 + max(map(int, prompt)))
    prompt[end] = {"class_type": "PreviewImage", "inputs": {"images": [show, 0]}}
    wanted, found = [end], {}
    while wanted:
        key = wanted.pop()
        if key in found:
            continue
        found[key] = prompt[key]
        wanted += [v[0] for v in prompt[key]["inputs"].values() if isinstance(v, list) and v and v[0] in prompt]
    return found


def wrong_record(record: dict) -> str:
    """What in a record breaks a promise, or nothing."""
    try:
        trace = Trace.from_dict(record)
    except ValueError as problem:
        return f"its record is not whole: {problem}"
    settings, limit = trace.settings, trace.settings.get("drift_limit", 0.0)
    rows = [row for row in trace.rows if "reward" in row]
    held = settings.get("hold") == "projection" or (settings.get("hold") == "auto" and limit > 0)
    if held and settings.get("drift_metric", "path_kl") == "path_kl":
        over = [row["path_kl"] for row in rows if row["path_kl"] > limit * (1 + 1e-3)]
        if over:
            return f"a drift that is held at {limit} came to {max(over)}"
    if "choices" in settings:
        return ""
    for image, kept in enumerate(trace.kept):
        mine = [row for row in trace.of(image) if "reward" in row]
        reward = next(row["reward"] for row in mine if row["iteration"] == kept)
        finite = [row["reward"] for row in mine if math.isfinite(row["reward"])]
        if finite and not math.isfinite(reward):
            return f"image {image}: what was kept has no finite reward, and others had"
        metric = settings.get("drift_metric")
        if settings.get("keep") == "best_reward" or (settings.get("keep") == "best_within_drift" and metric):
            bound = limit if settings["keep"] == "best_within_drift" and limit > 0 else math.inf
            within = [
                row["reward"]
                for row in mine
                if math.isfinite(row["reward"]) and (metric is None or row[metric] <= bound)
            ]
            if within and reward < max(within) - 1e-9:
                return f"image {image}: kept {reward} where {max(within)} was within its limit"
    return ""
