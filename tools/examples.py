"""Writes example_workflows/*.json and the blueprint in subgraphs/ from short descriptions, by what the server says of
its nodes, and docs/gallery.md.

python -m tools.examples      (in ComfyUI's environment, $MIRA_COMFYUI set, as dev.py sets it)
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from dataclasses import dataclass, field
from urllib.parse import quote

from .comfy import ROOT, Client, Server
from .workflow import widgets

FOLDER = ROOT / "example_workflows"
REGISTRY_NAME = "mira-alignment"  # as pyproject.toml has it
COLUMN, GAP, TOP = 420, 40, 60
FOX = "generate an image of a fox"


@dataclass
class Node:
    """links: input name -> "key.output name". values: of widgets; the others have their defaults."""

    kind: str
    column: int
    title: str = ""
    links: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    height: int = 0


def demo(prompt: str = FOX, batch: int = 1) -> dict[str, Node]:
    """The demo model, two prompts and an empty latent."""
    return {
        "model": Node("MiraDemoModel", 0),
        "prompt": Node("PrimitiveStringMultiline", 0, "Prompt", values={"value": prompt}, height=120),
        "latent": Node("EmptyLatentImage", 0, values={"width": 128, "height": 128, "batch_size": batch}),
        "positive": Node("CLIPTextEncode", 1, "Positive", {"clip": "model.clip", "text": "prompt.STRING"}),
        "negative": Node("CLIPTextEncode", 1, "Negative", {"clip": "model.clip"}, {"text": ""}),
    }


SAMPLED = {
    "model": "model.model", "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING",
    "latent_image": "latent.LATENT",
}  # fmt: skip
OPTIMISED = {**SAMPLED, "vae": "model.vae", "prompt": "prompt.STRING"}


def saved(key: str, source: str, column: int, title: str, prefix: str) -> dict[str, Node]:
    return {
        f"{key}_decoded": Node("VAEDecode", column, links={"samples": source, "vae": "model.vae"}),
        key: Node(
            "SaveImage", column + 1, title, {"images": f"{key}_decoded.IMAGE"}, {"filename_prefix": prefix}, height=420
        ),
    }


def quickstart() -> dict[str, Node]:
    return {
        **demo(),
        "reward": Node("MiraPixelReward", 1, values={"measure": "brightness"}),
        "mira": Node(
            "MiraOptimizeKSampler", 2, links={**OPTIMISED, "reward": "reward.reward"},
            # A seed that is itself the best of the four that are compared: before and after are one picture.
            values={"seed": 34, "iterations": 8},
        ),
        **saved("optimized", "mira.optimized", 3, "Optimized", "mira/optimized"),
        **saved("plain", "mira.plain", 3, "Plain sample of the same seed", "mira/plain"),
    }  # fmt: skip


def against_dno() -> dict[str, Node]:
    shared = {"seed": 3, "steps": 12, "iterations": 12}
    return {
        **demo(),
        "many": Node("EmptyLatentImage", 0, "Six other seeds", values={"width": 128, "height": 128, "batch_size": 6}),
        "reward": Node("MiraPixelReward", 1, values={"measure": "brightness"}),
        "clip": Node("MiraDemoCLIPScore", 1),
        "mira": Node(
            "MiraOptimizeKSampler", 2, "MIRA: holds the drift", {**OPTIMISED, "reward": "reward.reward"}, shared
        ),
        "dno": Node(
            "MiraOptimizeKSampler", 3, "DNO: plain optimisation to the end", {**OPTIMISED, "reward": "reward.reward"},
            {**shared, "preset": "custom", "learning_rate": 0.03, "keep": "last", "hold": "no", "drift_limit": 0.0,
             "seeds": 1, "restart_every": 0, "gradient_steps": 0},
        ),
        "base": Node(
            "KSampler", 4, "The base model's own spread", {**SAMPLED, "latent_image": "many.LATENT"},
            {"seed": 100, "steps": 12, "cfg": 5.0, "sampler_name": "euler_ancestral"},
        ),
        **saved("mira_image", "mira.optimized", 4, "MIRA", "mira/against_mira"),
        **saved("dno_image", "dno.optimized", 4, "DNO", "mira/against_dno"),
        "base_decoded": Node("VAEDecode", 4, links={"samples": "base.LATENT", "vae": "model.vae"}),
        "monitor": Node(
            "MiraDriftMonitor", 6,
            links={
                "trace_1": "mira.trace", "trace_2": "dno.trace", "images_1": "mira_image_decoded.IMAGE",
                "images_2": "dno_image_decoded.IMAGE", "base_images": "base_decoded.IMAGE", "clip": "clip.reward",
                "prompt": "prompt.STRING",
            },
            height=520,
        ),
        "plot": Node("PreviewImage", 7, "Reward and drift", {"images": "monitor.plot"}, height=360),
    }  # fmt: skip


def preference(values: dict, reward: dict[str, Node]) -> dict[str, Node]:
    links = {**OPTIMISED, **({"reward": "reward.reward"} if reward else {})}
    return {
        **demo(),
        **reward,
        "dpo": Node("MiraDPOPreference", 2, links=links, values={"seed": 3, "steps": 12, **values}),
        **saved("optimized", "dpo.optimized", 3, "Preferred", "mira/preferred"),
        **saved("plain", "dpo.plain", 3, "Plain sample of the same seed", "mira/plain"),
    }


def combined() -> dict[str, Node]:
    return {
        **demo("a 3d fox on a blue background"),
        "clip": Node("MiraDemoCLIPScore", 1),
        "colour": Node("MiraPixelReward", 1, values={"measure": "colourfulness"}),
        "both": Node(
            "MiraCombineRewards", 1, links={"reward_1": "clip.reward", "reward_2": "colour.reward"},
            values={"weight_1": 1.0, "weight_2": 1.0},
        ),
        "mira": Node(
            "MiraOptimizeKSampler", 2, links={**OPTIMISED, "reward": "both.reward"},
            values={"seed": 5, "iterations": 12, "drift_limit": 0.1},
        ),
        **saved("optimized", "mira.optimized", 3, "Optimized", "mira/combined"),
        **saved("plain", "mira.plain", 3, "Plain sample of the same seed", "mira/plain"),
    }  # fmt: skip


def img2img() -> dict[str, Node]:
    first = {"seed": 2, "steps": 20, "cfg": 5.0, "sampler_name": "euler_ancestral"}
    return {
        **demo("a flat cat on a green background"),
        "start": Node("KSampler", 1, "The image to start from", SAMPLED, first),
        "reward": Node("MiraPixelReward", 1, values={"measure": "colourfulness"}),
        "mira": Node(
            "MiraOptimizeKSampler", 2, links={**OPTIMISED, "latent_image": "start.LATENT", "reward": "reward.reward"},
            values={"seed": 7, "denoise": 0.6, "iterations": 12, "drift_limit": 0.1},
        ),
        **saved("optimized", "mira.optimized", 3, "Optimized", "mira/img2img"),
        **saved("before", "start.LATENT", 3, "Before", "mira/before"),
    }  # fmt: skip


def best_of_n() -> dict[str, Node]:
    return {
        **demo(batch=8),
        "reward": Node("MiraDemoCLIPScore", 1),
        "sampler": Node(
            "KSampler", 2, links=SAMPLED,
            values={"seed": 1, "steps": 20, "cfg": 5.0, "sampler_name": "euler_ancestral"},
        ),
        "decoded": Node("VAEDecode", 3, links={"samples": "sampler.LATENT", "vae": "model.vae"}),
        "score": Node(
            "MiraScoreImages", 3,
            links={"images": "decoded.IMAGE", "reward": "reward.reward", "prompt": "prompt.STRING"}, height=330,
        ),
        "rank": Node(
            "MiraRankImages", 4, links={"images": "decoded.IMAGE", "scores": "score.scores"}, values={"top_k": 2}
        ),
        "best": Node("SaveImage", 4, "Best", {"images": "rank.images"}, {"filename_prefix": "mira/best"}, height=330),
    }  # fmt: skip


def search() -> dict[str, Node]:
    return {
        **demo(),
        "reward": Node("MiraJPEGReward", 1, values={"kind": "black box"}),
        "fk": Node(
            "MiraSearchKSampler", 2, "FK steering: 12 particles", {**OPTIMISED, "reward": "reward.reward"},
            {"seed": 3, "steps": 12, "method": "fk_steering", "particles": 12, "strength": 3.0},
        ),
        **saved("optimized", "fk.optimized", 3, "Found", "mira/search"),
        **saved("plain", "fk.plain", 3, "Plain sample of the same seed", "mira/plain"),
    }  # fmt: skip


def tilted() -> dict[str, Node]:
    return {
        **demo(),
        "reward": Node("MiraPixelReward", 1, values={"measure": "brightness"}),
        "tilt": Node(
            "MiraTiltKSampler", 2, "Brighter", {**OPTIMISED, "reward": "reward.reward"}, {"seed": 7, "steps": 20},
        ),
        **saved("optimized", "tilt.optimized", 3, "Tilted", "mira/tilted"),
        **saved("plain", "tilt.plain", 3, "Plain sample of the same seed", "mira/plain"),
    }  # fmt: skip


def guidance() -> dict[str, Node]:
    shared = {"sampler": "sampler.SAMPLER", "sigmas": "sigmas.SIGMAS", "latent_image": "latent.LATENT"}
    conds = {"model": "model.model", "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING"}
    return {
        **demo(),
        "reward": Node("MiraPixelReward", 1, values={"measure": "brightness"}),
        "sampler": Node("KSamplerSelect", 1, values={"sampler_name": "euler_ancestral"}),
        "sigmas": Node("BasicScheduler", 1, links={"model": "model.model"}, values={"steps": 20}),
        "noise": Node(
            "MiraInitNONoise", 2,
            links={
                "model": "model.model", "clip": "model.clip", "latent_image": "latent.LATENT",
                "sigmas": "sigmas.SIGMAS", "prompt": "prompt.STRING",
            },
            values={"words": "fox", "seed": 3, "iterations": 10},
        ),
        "dymo": Node(
            "MiraDyMOGuider", 2, "Leans towards the reward",
            {**conds, "vae": "model.vae", "reward": "reward.reward"}, {"scale": 1.5},
        ),
        "cfg": Node("CFGGuider", 2, "Plain guidance", conds, {"cfg": 5.0}),
        "guided": Node("SamplerCustomAdvanced", 3, links={**shared, "noise": "noise.noise", "guider": "dymo.guider"}),
        "unguided": Node("SamplerCustomAdvanced", 3, links={**shared, "noise": "noise.noise", "guider": "cfg.GUIDER"}),
        **saved("optimized", "guided.output", 4, "Guided", "mira/guided"),
        **saved("plain", "unguided.output", 4, "The same noise, plain guidance", "mira/plain"),
    }  # fmt: skip


def reuse() -> dict[str, Node]:
    """Noises that were found for one prompt, under another."""
    return {
        **demo(),
        "other": Node(
            "CLIPTextEncode", 1, "Another prompt", {"clip": "model.clip"}, {"text": "a 3d fox on a blue background"}
        ),
        "reward": Node("MiraPixelReward", 1, values={"measure": "brightness"}),
        "optimizer": Node(
            "MiraOptimizeKSampler", 2, links={**OPTIMISED, "reward": "reward.reward"},
            values={"seed": 7, "iterations": 8},
        ),
        "save": Node("MiraSaveNoise", 3, links={"noise": "optimizer.noise", "sampler": "optimizer.sampler"}),
        "sigmas": Node("BasicScheduler", 3, links={"model": "model.model"}, values={"steps": 20, "denoise": 1.0}),
        "guider": Node(
            "CFGGuider", 3, values={"cfg": 5.0}, links={
                "model": "model.model", "positive": "other.CONDITIONING", "negative": "negative.CONDITIONING",
            },
        ),
        "sampled": Node(
            "SamplerCustomAdvanced", 3, links={
                "noise": "optimizer.noise", "guider": "guider.GUIDER", "sampler": "optimizer.sampler",
                "sigmas": "sigmas.SIGMAS", "latent_image": "latent.LATENT",
            },
        ),
        **saved("image", "optimizer.optimized", 4, "Optimized", "mira/reuse_optimized"),
        **saved("again", "sampled.output", 4, "The same noises, another prompt", "mira/reuse_again"),
    }  # fmt: skip


def relative() -> dict[str, Node]:
    """Towards one word and away from another, by the demo's CLIP."""
    return {
        **demo(),
        "clip_score": Node("MiraDemoCLIPScore", 1),
        "reward": Node(
            "MiraRelativeReward", 1, links={"reward": "clip_score.reward"}, values={"wanted": "3d", "unwanted": "flat"}
        ),
        "optimizer": Node(
            "MiraOptimizeKSampler", 2, links={**OPTIMISED, "reward": "reward.reward"},
            values={"seed": 7, "iterations": 8},
        ),
        **saved("image", "optimizer.optimized", 3, "Optimized", "mira/relative"),
        **saved("plain", "optimizer.plain", 3, "Plain", "mira/relative_plain"),
    }  # fmt: skip


def hires_fix() -> dict[str, Node]:
    """Optimise small, enlarge, let the model paint the details."""
    nodes = demo()
    nodes["latent"].values |= {"width": 96, "height": 96}
    return {
        **nodes,
        "reward": Node("MiraPixelReward", 1, values={"measure": "colourfulness"}),
        "mira": Node(
            "MiraOptimizeKSampler", 2, "1. Optimise small", {**OPTIMISED, "reward": "reward.reward"},
            {"seed": 7, "iterations": 8},
        ),
        "larger": Node(
            "LatentUpscale", 3, "2. Enlarge", {"samples": "mira.optimized"},
            {"upscale_method": "bicubic", "width": 128, "height": 128, "crop": "disabled"},
        ),
        "refined": Node(
            "KSampler", 3, "3. Paint the details", {**SAMPLED, "latent_image": "larger.LATENT"},
            {"seed": 7, "steps": 20, "cfg": 5.0, "sampler_name": "euler_ancestral", "denoise": 0.5},
        ),
        **saved("large", "refined.LATENT", 4, "Large", "mira/hires"),
        **saved("small", "mira.optimized", 4, "Small", "mira/hires_small"),
    }  # fmt: skip


def refiner() -> dict[str, Node]:
    """The first eight of twenty steps by the stock sampler, the others optimised."""
    guided = {"model": "model.model", "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING"}
    half = {"guider": "guider.GUIDER", "sampler": "sampler.SAMPLER"}
    return {
        **demo(),
        "reward": Node("MiraPixelReward", 1, values={"measure": "colourfulness"}),
        "guider": Node("CFGGuider", 1, links=guided, values={"cfg": 5.0}),
        "sampler": Node("KSamplerSelect", 1, values={"sampler_name": "euler_ancestral"}),
        "sigmas": Node("BasicScheduler", 2, links={"model": "model.model"}, values={"steps": 20}),
        "split": Node("SplitSigmas", 2, links={"sigmas": "sigmas.SIGMAS"}, values={"step": 8}),
        "noise": Node("RandomNoise", 2, values={"noise_seed": 7}),
        "none": Node("DisableNoise", 2),
        "base": Node(
            "SamplerCustomAdvanced", 3, "Steps 1 to 8",
            {**half, "noise": "noise.NOISE", "sigmas": "split.high_sigmas", "latent_image": "latent.LATENT"},
        ),
        "mira": Node(
            "MiraOptimizeSamplerAdvanced", 3, "Steps 9 to 20, optimised",
            {
                **half, "noise": "none.NOISE", "sigmas": "split.low_sigmas", "latent_image": "base.output",
                "vae": "model.vae", "reward": "reward.reward", "prompt": "prompt.STRING",
            },
            {"preset": "custom", "iterations": 9, "restart_every": 0, "seeds": 1},
        ),
        **saved("optimized", "mira.optimized", 4, "Optimized", "mira/refined"),
        **saved("plain", "mira.plain", 4, "Plain", "mira/refined_plain"),
    }  # fmt: skip


def seed_sweep() -> dict[str, Node]:
    """Four seeds in columns, two drift limits in rows."""
    found = {**OPTIMISED, "reward": "reward.reward"}
    shared = {"seed": 11, "steps": 12, "iterations": 8, "seeds": 1, "preset": "custom"}
    return {
        **demo(batch=4),
        "reward": Node("MiraPixelReward", 1, values={"measure": "brightness"}),
        "near": Node("MiraOptimizeKSampler", 2, "drift_limit 0.02", found, {**shared, "drift_limit": 0.02}),
        "far": Node("MiraOptimizeKSampler", 3, "drift_limit 0.1", found, {**shared, "drift_limit": 0.1}),
        **saved("plain", "near.plain", 4, "Four seeds, plain", "mira/sweep_plain"),
        **saved("near_image", "near.optimized", 4, "drift_limit 0.02", "mira/sweep_near"),
        **saved("far_image", "far.optimized", 4, "drift_limit 0.1", "mira/sweep_far"),
    }


def stock_restart() -> dict[str, Node]:
    """What a restart does, by ComfyUI's own node on what was optimised too far."""
    return {
        **demo("generate an image of a cat"),
        "reward": Node("MiraPixelReward", 1, values={"measure": "brightness"}),
        "clip": Node("MiraDemoCLIPScore", 1),
        "mira": Node(
            "MiraOptimizeKSampler", 2, "1. Optimise too far", {**OPTIMISED, "reward": "reward.reward"},
            {"seed": 4, "steps": 16, "preset": "custom", "iterations": 6, "learning_rate": 0.03, "keep": "last",
             "hold": "no", "drift_limit": 0.0, "stop": "never", "seeds": 1, "restart_every": 0},
        ),
        "restart": Node(
            "KSampler", 3, "2. Noise it to 0.65, sample from there", {**SAMPLED, "latent_image": "mira.optimized"},
            {"seed": 104, "steps": 16, "cfg": 5.0, "sampler_name": "euler_ancestral", "denoise": 0.65},
        ),
        **saved("far", "mira.optimized", 4, "Too far", "mira/stock_far"),
        **saved("back", "restart.LATENT", 4, "Restarted", "mira/stock_restarted"),
        **saved("plain", "mira.plain", 4, "Plain", "mira/stock_plain"),
        **{
            f"{key}_{name}": Node(
                "MiraScoreImages", 6, f"{title}: {of}",
                {"images": f"{key}_decoded.IMAGE", "reward": f"{name}.reward", "prompt": "prompt.STRING"},
            )
            for key, title in (("far", "Too far"), ("back", "Restarted"))
            for name, of in (("reward", "brightness"), ("clip", "how well it fits the prompt"))
        },
    }  # fmt: skip


PAINTED = "a watercolour painting of a fox in the snow"


def checkpoint(file: str, size: int, loader: Node, values: dict) -> dict[str, Node]:
    base = demo(PAINTED)
    base["model"] = Node("CheckpointLoaderSimple", 0, values={"ckpt_name": file})
    base["latent"].values = {"width": size, "height": size, "batch_size": 1}
    nodes = {
        **base,
        "reward": loader,
        "mira": Node(
            "MiraOptimizeKSampler", 2, links={**OPTIMISED, "reward": "reward.reward"}, values={"seed": 3, **values}
        ),
        **saved("optimized", "mira.optimized", 3, "Optimized", "mira/optimized"),
        **saved("plain", "mira.plain", 3, "Plain sample of the same seed", "mira/plain"),
    }
    for node in nodes.values():  # a checkpoint's outputs are named in capitals
        node.links = {
            k: v.replace("model.model", "model.MODEL")
            .replace("model.clip", "model.CLIP")
            .replace("model.vae", "model.VAE")
            for k, v in node.links.items()
        }
    return nodes


def sd15() -> dict[str, Node]:
    files = {"head": "sac+logos+ava1-l14-linearMSE.pth", "clip": "clip-vit-large-patch14.safetensors"}
    return checkpoint("v1-5-pruned-emaonly.safetensors", 512, Node("MiraLoadAestheticReward", 1, values=files), {})


def sdxl() -> dict[str, Node]:
    loader = Node("MiraLoadHPSReward", 1, values={"file": "HPS_v2.1_compressed.pt", "version": "v2.1"})
    return checkpoint("sd_xl_base_1.0.safetensors", 1024, loader, {})


def lightning() -> dict[str, Node]:
    loader = Node("MiraLoadPickScoreReward", 1, values={"file": "PickScore_v1.safetensors"})
    few = {"steps": 4, "cfg": 1.0, "sampler_name": "euler_ancestral", "scheduler": "sgm_uniform"}
    return checkpoint("sdxl_lightning_4step.safetensors", 1024, loader, few)


def in_parts(unet: str, clip: str, kind: str, vae: str, size: int, latent: str = "EmptySD3LatentImage") -> dict:
    """A model whose parts are files of their own."""
    return {
        "model": Node("UNETLoader", 0, values={"unet_name": unet}),
        "clip": Node("CLIPLoader", 0, values={"clip_name": clip, "type": kind}),
        "vae": Node("VAELoader", 0, values={"vae_name": vae}),
        "prompt": Node("PrimitiveStringMultiline", 0, "Prompt", values={"value": PAINTED}, height=120),
        "latent": Node(latent, 0, values={"width": size, "height": size, "batch_size": 1}),
        "positive": Node("CLIPTextEncode", 1, "Positive", {"clip": "clip.CLIP", "text": "prompt.STRING"}),
        "negative": Node("CLIPTextEncode", 1, "Negative", {"clip": "clip.CLIP"}, {"text": ""}),
        "reward": Node("MiraLoadHPSReward", 1, values={"file": "HPS_v2.1_compressed.pt", "version": "v2.1"}),
    }


def both(optimizer: str) -> dict[str, Node]:
    """The optimised image and the plain one, by a VAE of its own."""
    nodes = {
        **saved("optimized", f"{optimizer}.optimized", 3, "Optimized", "mira/optimized"),
        **saved("plain", f"{optimizer}.plain", 3, "Plain sample of the same seed", "mira/plain"),
    }
    for node in nodes.values():
        node.links = {k: v.replace("model.vae", "vae.VAE") for k, v in node.links.items()}
    return nodes


def flow(parts: dict[str, Node], shift: float, values: dict) -> dict[str, Node]:
    links = {
        **OPTIMISED, "model": "shifted.MODEL", "vae": "vae.VAE", "reward": "reward.reward",
    }  # fmt: skip
    return {
        **parts,
        "shifted": Node("ModelSamplingAuraFlow", 1, links={"model": "model.MODEL"}, values={"shift": shift}),
        "mira": Node("MiraOptimizeKSampler", 2, links=links, values={"seed": 3, "scheduler": "simple", **values}),
        **both("mira"),
    }


def z_image() -> dict[str, Node]:
    parts = in_parts("z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "lumina2", "ae.safetensors", 1024)
    return flow(parts, 3.0, {"steps": 8, "cfg": 1.0, "sampler_name": "euler_ancestral"})


def qwen_image() -> dict[str, Node]:
    files = "qwen_image_fp8_e4m3fn.safetensors", "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    parts = in_parts(*files, "qwen_image", "qwen_image_vae.safetensors", 1024)
    return flow(parts, 3.1, {"steps": 20, "cfg": 4.0, "sampler_name": "euler"})


def flux2_klein() -> dict[str, Node]:
    files = "flux-2-klein-4b-fp8.safetensors", "qwen_3_4b.safetensors"
    size = {"width": 1024, "height": 1024}
    return {
        **in_parts(*files, "flux2", "flux2-vae.safetensors", 1024, "EmptyFlux2LatentImage"),
        "guider": Node(
            "CFGGuider", 2, values={"cfg": 1.0}, links={
                "model": "model.MODEL", "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING",
            },
        ),
        "sampler": Node("KSamplerSelect", 2, values={"sampler_name": "euler_ancestral"}),
        "sigmas": Node("Flux2Scheduler", 2, values={"steps": 4, **size}),
        "noise": Node("RandomNoise", 2, values={"noise_seed": 3}),
        "mira": Node(
            "MiraOptimizeSamplerAdvanced", 2, links={
                "noise": "noise.NOISE", "guider": "guider.GUIDER", "sampler": "sampler.SAMPLER",
                "sigmas": "sigmas.SIGMAS", "latent_image": "latent.LATENT", "vae": "vae.VAE",
                "reward": "reward.reward", "prompt": "prompt.STRING",
            },
        ),
        **both("mira"),
    }  # fmt: skip


HUB = "https://huggingface.co/"
SPLIT = HUB + "Comfy-Org/{}/resolve/main/split_files/{}/"
# What the editor may offer to fetch, where it is missing: file -> (folder below models, where it is published).
MODELS = {
    "v1-5-pruned-emaonly.safetensors": (
        "checkpoints", HUB + "stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/",
    ),
    "sd_xl_base_1.0.safetensors": ("checkpoints", HUB + "stabilityai/stable-diffusion-xl-base-1.0/resolve/main/"),
    "sdxl_lightning_4step.safetensors": ("checkpoints", HUB + "ByteDance/SDXL-Lightning/resolve/main/"),
    "z_image_turbo_bf16.safetensors": ("diffusion_models", SPLIT.format("z_image_turbo", "diffusion_models")),
    "qwen_3_4b.safetensors": ("text_encoders", SPLIT.format("z_image_turbo", "text_encoders")),
    "ae.safetensors": ("vae", SPLIT.format("z_image_turbo", "vae")),
    "flux-2-klein-4b-fp8.safetensors": (
        "diffusion_models", HUB + "black-forest-labs/FLUX.2-klein-4b-fp8/resolve/main/",
    ),
    "flux2-vae.safetensors": ("vae", SPLIT.format("flux2-dev", "vae")),
    "qwen_image_fp8_e4m3fn.safetensors": ("diffusion_models", SPLIT.format("Qwen-Image_ComfyUI", "diffusion_models")),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        "text_encoders", SPLIT.format("Qwen-Image_ComfyUI", "text_encoders"),
    ),
    "qwen_image_vae.safetensors": ("vae", SPLIT.format("Qwen-Image_ComfyUI", "vae")),
}  # fmt: skip


def published() -> dict[str, tuple[str, str]]:
    """file -> (folder below models, its whole address): those above, and the scorers of pyproject.toml."""
    entries = re.findall(r'location = "(.+)/(.+)"\nmodel_url = "(.+)"', (ROOT / "pyproject.toml").read_text())
    scorers = {file: (folder, url) for folder, file, url in entries}
    return {file: (folder, url + file) for file, (folder, url) in MODELS.items()} | scorers


def needs_files(name: str) -> bool:
    """Whether an example cannot run without a checkpoint."""
    return any(value in MODELS for node in EXAMPLES[name]().values() for value in node.values.values())


EXAMPLES = {
    "01 Quickstart": quickstart,
    "02 Held near the model": against_dno,
    "03 Preferences - small JPEG": lambda: preference(
        {"judge": "reward"}, {"reward": Node("MiraJPEGReward", 1, values={"kind": "black box"})}
    ),
    "04 Preferences - by eye": lambda: preference({"judge": "person", "iterations": 8}, {}),
    "05 Combine rewards": combined,
    "06 Image to image": img2img,
    "07 Best of eight": best_of_n,
    "08 Search - small JPEG": search,
    "09 Tilted noise": tilted,
    "10 Guidance": guidance,
    "11 More of this, less of that": relative,
    "12 Reuse noise": reuse,
    "13 Hires fix": hires_fix,
    "14 Base and refiner": refiner,
    "15 Seed sweep": seed_sweep,
    "16 Restart with stock nodes": stock_restart,
    "17 SD1.5 - aesthetic": sd15,
    "18 SDXL - HPS": sdxl,
    "19 SDXL Lightning - PickScore": lightning,
    "20 Z-Image-Turbo - HPS": z_image,
    "21 FLUX.2 klein - HPS": flux2_klein,
    "22 Qwen-Image - HPS": qwen_image,
}


NOTES = {
    "01 Quickstart": (
        "Press **Run**. The node tries four seeds, makes the best one brighter in two rounds, and draws reward and "
        "drift as it goes. *Optimized* and *Plain* are saved side by side. Move the slider to look at every step; "
        "**Take** hands back another one. `drift_limit` says how far the picture may go."
    ),
    "02 Held near the model": (
        "The same picture twice: held near the model, and optimised to the end. Look at the **MIRA Drift Monitor**: "
        "both are brighter, one is still a fox."
    ),
    "03 Preferences - small JPEG": (
        "The reward is the real size of the JPEG file, which no gradient goes through: it only says which of two "
        "pictures is smaller, and that is enough."
    ),
    "04 Preferences - by eye": (
        "Press **Run**, then click the better of two pictures on the node (or keys 1 and 2), eight times. Escape: good "
        "enough."
    ),
    "05 Combine rewards": "Two rewards with a weight each; the chart draws every part.",
    "06 Image to image": "An image is painted on with `denoise` 0.6 (an advanced input) and made more colourful.",
    "07 Best of eight": "Stock KSampler, eight pictures; the two that fit the prompt best are saved.",
    "08 Search - small JPEG": "Twelve candidates; those with smaller files survive while they are painted.",
    "09 Tilted noise": (
        "The quick way: a KSampler with one more dial. At every step the reward chooses `tilt` of the noise; the "
        "picture is then noised again and sampled anew, twice."
    ),
    "10 Guidance": (
        "Without optimising: a noise in which the model finds what you name, and a guider that leans towards a reward."
    ),
    "11 More of this, less of that": (
        "More *3d* and less *flat*, by the demo's CLIP: what it likes in any picture is in both scores and cancels."
    ),
    "12 Reuse noise": (
        "The noises that were found for one prompt, sampled with another by the stock sampler node, without optimising "
        "again. **MIRA Save Noise** keeps them as a file; MIRA Load Noise gives them back."
    ),
    "13 Hires fix": (
        "Optimised at 96 pixels, where an iteration is cheap; enlarged; and the details painted by the stock KSampler "
        "with `denoise` 0.5. Most of what the optimisation gained is still there."
    ),
    "14 Base and refiner": (
        "The stock sampler paints the first eight steps, and what they decided stays; **MIRA Optimize Sampler "
        "(Advanced)** goes on from there, without new noise at its start, and optimises what is injected later."
    ),
    "15 Seed sweep": (
        "One batch, four seeds: plain, held near (`drift_limit` 0.02), and let go further (0.1). Every image has its "
        "own line in the chart; `image` chooses."
    ),
    "16 Restart with stock nodes": (
        "What the default does between its rounds, by ComfyUI's own **KSampler**: a picture that was optimised too far "
        "is noised again and sampled from there (`denoise` 0.65). Most of the brightness stays, and the cat comes back."
    ),
    "17 SD1.5 - aesthetic": "Needs SD1.5, the aesthetic head and CLIP ViT-L/14; the loader says where each file goes.",
    "18 SDXL - HPS": "Needs SDXL and HPSv2.1's file. If a 12 GB card does not hold it beside HPS, take 768 px.",
    "19 SDXL Lightning - PickScore": (
        "Four steps and no negative prompt: a tenth of the network's work of SDXL in 20 steps. Needs SDXL Lightning (4 "
        "steps) and PickScore. Of so few steps the gradient goes through all."
    ),
    "20 Z-Image-Turbo - HPS": "Eight steps at CFG 1. Needs Z-Image-Turbo's three files and HPSv2.1.",
    "21 FLUX.2 klein - HPS": (
        "Four steps, by the custom sampling nodes that FLUX.2 is used with. Needs FLUX.2 klein 4B's three files and "
        "HPSv2.1."
    ),
    "22 Qwen-Image - HPS": "Needs Qwen-Image's three files, a large card, and HPSv2.1.",
}


def default(spec: list):
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list):
        return options.get("default", kind[0])
    if kind == "COMBO":
        return options.get("default", options["options"][0])
    return options.get("default", "")


def graph(title: str, nodes: dict[str, Node], info: dict, note: str) -> dict:
    """The editor's JSON; its id is the same every time it is made.

    Raises KeyError for an input or output that a node does not have.
    """
    ids = {key: number for number, key in enumerate(nodes, 1)}
    made, links, bottoms, known = [], [], {}, published()
    files = dict.fromkeys(v for node in nodes.values() for v in node.values.values() if v in known)
    if files:
        by_hand = "\n".join(fetched_by_hand(file, *known[file]) for file in files)
        note = f"{note}\n\nIts files, if the editor does not offer to fetch them:\n{by_hand}"
    note_height = 170 + 44 * len(files)
    if note:  # at the top, where a graph is looked at first
        bottoms[0] = TOP + note_height + GAP
    for key, node in nodes.items():
        of = info[node.kind]
        specs = {**of["input"].get("required", {}), **of["input"].get("optional", {})}
        names, given = widgets(of), {"scheduler": "normal", **node.values}  # as the demo model was measured
        unknown = (node.values.keys() | node.links.keys()) - specs.keys()
        if unknown:
            raise KeyError(f"{node.kind} has no input {', '.join(sorted(unknown))}")
        values = []
        for name in names:
            values.append(given[name] if name in given else default(specs[name]))
            if name in ("seed", "noise_seed"):
                values.append("fixed")
        slots = [n for n in specs if n not in names or n in node.links]
        mine = node.kind.startswith("Mira")  # the stock nodes' differ between cores
        wanted = [
            {"name": value, "url": known[value][1], "directory": known[value][0]}
            for value in node.values.values()
            if value in known
        ]
        shown = [n for n in names if not (mine and len(specs[n]) > 1 and specs[n][1].get("advanced"))]
        height = node.height or 60 + 26 * (len(shown) + 1 + max(len(slots), len(of["output"]))) + 40
        if node.kind.startswith(("MiraOptimize", "MiraDPO", "MiraSearch")):
            height += 270
        top = bottoms.get(node.column, TOP)
        bottoms[node.column] = top + height + GAP
        made.append(
            {
                "id": ids[key],
                "type": node.kind,
                "pos": [40 + node.column * COLUMN, top],
                "size": [380, height],
                "flags": {},
                "order": len(made),
                "mode": 0,
                "inputs": [
                    {"name": n, "type": specs[n][0] if isinstance(specs[n][0], str) else "COMBO", "link": None}
                    | ({"widget": {"name": n}} if n in names else {})
                    for n in slots
                ],
                "outputs": [
                    {"name": n, "type": t, "links": []} for n, t in zip(of["output_name"], of["output"], strict=True)
                ],
                "properties": {
                    "Node name for S&R": node.kind,
                    "cnr_id": REGISTRY_NAME if mine else "comfy-core",
                    **({"models": wanted} if wanted else {}),
                },
                "widgets_values": values,
                **({"title": node.title} if node.title else {}),
            }
        )
    by_id = {n["id"]: n for n in made}
    for key, node in nodes.items():
        target = by_id[ids[key]]
        for name, source in node.links.items():
            other, output = source.split(".")
            origin = by_id[ids[other]]
            slot = [o["name"] for o in origin["outputs"]].index(output)
            place = [i["name"] for i in target["inputs"]].index(name)
            links.append([len(links) + 1, origin["id"], slot, target["id"], place, origin["outputs"][slot]["type"]])
            origin["outputs"][slot]["links"].append(len(links))
            target["inputs"][place]["link"] = len(links)
    if note:
        made.append(
            {
                "id": len(made) + 1,
                "type": "MarkdownNote",
                "pos": [40, TOP],
                "size": [380, note_height],
                "flags": {},
                "order": len(made),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "title": "What to look at",
                "properties": {},
                "widgets_values": [note],
            }
        )
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{REGISTRY_NAME}/{title}")), "revision": 0,
        "last_node_id": len(made), "last_link_id": len(links), "nodes": made, "links": links, "groups": [],
        "config": {}, "extra": view(made), "version": 0.4,
    }  # fmt: skip


def fetched_by_hand(file: str, folder: str, url: str) -> str:
    """A line of a note: where a file is, and where it belongs."""
    there = url.rsplit("/", 1)[1]
    return f"- [{there}]({url}) into `models/{folder}`" + (f" as `{file}`" if there != file else "")


READABLE, LARGE = 0.62, 0.8  # the scale below which editors draw no text, and one that is large enough
SCREEN, MARGIN = (1600, 900), (70, 130)  # of a small screen; what the editor's bars take of it


def view(made: list[dict]) -> dict:
    """`extra` of a graph: it opens whole on a small screen where that is readable, and else at its beginning. By itself
    the editor shows all of it, as small as it may be.
    """
    left, top = (min(n["pos"][i] for n in made) for i in (0, 1))
    width, height = (max(n["pos"][i] + n["size"][i] for n in made) - (left, top)[i] for i in (0, 1))
    whole = min((SCREEN[0] - 2 * MARGIN[0]) / width, (SCREEN[1] - MARGIN[1]) / height)
    scale = round(max(READABLE, min(whole, LARGE)), 2)
    return {"ds": {"scale": scale, "offset": [round(MARGIN[0] / scale - left), round(MARGIN[1] / scale - top)]}}


BLUEPRINT = "MIRA Optimize to Image"
# What of the nodes inside is to be connected or set outside, in this order.
OUTSIDE = {
    "mira": (
        "model", "positive", "negative", "latent_image", "vae", "prompt", "seed", "steps", "cfg", "preset",
        "iterations", "drift_limit",
    ),
    "reward": ("measure",),
}  # fmt: skip


def blueprint(info: dict) -> dict:
    """The smallest useful graph as a node of the library: a subgraph of reward, optimiser and decoder.

    Cores that show blueprints (0.3.7x on) take it from the pack's `subgraphs` folder.
    """
    vae = {"optimized": "mira.optimized", "plain": "mira.plain"}
    nodes = {
        "reward": Node("MiraPixelReward", 0, values={"measure": "brightness"}),
        "mira": Node("MiraOptimizeKSampler", 1, links={"reward": "reward.reward"}),
        **{key: Node("VAEDecode", 2, links={"samples": source}) for key, source in vae.items()},
    }
    inner = graph("blueprint", nodes, info, "")
    made = dict(zip(nodes, inner["nodes"], strict=True))
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(names, link, strict=True)) for link in inner["links"]]
    inputs, outputs = [], []

    def uid(*parts: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join((REGISTRY_NAME, BLUEPRINT, *parts))))

    def link(origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        links.append(dict(zip(names, (len(links) + 1, *origin, *target, kind), strict=True)))
        return len(links)

    def with_widgets(node: dict) -> None:
        """A slot for every widget, in order, as the editor saves them: older ones read the values by these."""
        of = info[node["type"]]
        specs = {**of["input"].get("required", {}), **of["input"].get("optional", {})}
        for name in widgets(of):
            kind = specs[name][0] if isinstance(specs[name][0], str) else "COMBO"
            node["inputs"].append({"name": name, "type": kind, "widget": {"name": name}, "link": None})

    def expose(key: str, name: str) -> None:
        node = made[key]
        slot = next(s for s in node["inputs"] if s["name"] == name)
        known = next((i for i in inputs if i["name"] == name), None)
        if known is None:
            known = {"id": uid("in", name), "name": name, "type": slot["type"], "linkIds": []}
            known |= {"widget": slot["widget"]} if "widget" in slot else {}
            inputs.append(known)
        slot["link"] = link((-10, inputs.index(known)), (node["id"], node["inputs"].index(slot)), slot["type"])
        known["linkIds"].append(slot["link"])

    for node in made.values():
        with_widgets(node)
    for key, of in OUTSIDE.items():
        for name in of:
            expose(key, name)
    for place, key in enumerate(vae):
        expose(key, "vae")
        given = link((made[key]["id"], 0), (-20, place), "IMAGE")
        made[key]["outputs"][0]["links"].append(given)
        outputs.append({"id": uid("out", key), "name": key, "type": "IMAGE", "linkIds": [given]})
    outside = [{"name": i["name"], "type": i["type"], "link": None} for i in inputs]
    for slot, of in zip(outside, inputs, strict=True):
        if widget := of.pop("widget", None):
            slot["widget"] = widget
    subgraph = {
        "id": uid(), "version": 1, "revision": 0, "name": BLUEPRINT, "config": {}, "groups": [], "widgets": [],
        "state": {"lastGroupId": 0, "lastNodeId": len(made), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": -10, "bounding": [-240, 60, 140, 60 + 20 * len(inputs)]},
        "outputNode": {"id": -20, "bounding": [1360, 60, 120, 80]},
        "inputs": inputs, "outputs": outputs, "nodes": inner["nodes"], "links": links, "extra": {},
        "category": "MIRA Alignment",
        "description": "KSampler and VAE Decode in one, optimised towards a pixel reward.",
    }  # fmt: skip
    node = {
        "id": 1, "type": uid(), "pos": [40, 60], "size": [400, 420], "flags": {}, "order": 0, "mode": 0,
        "title": BLUEPRINT, "inputs": outside, "widgets_values": [],
        "outputs": [{"name": o["name"], "type": o["type"], "links": []} for o in outputs],
        "properties": {"cnr_id": REGISTRY_NAME},
    }  # fmt: skip
    return {
        "revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4,
        "definitions": {"subgraphs": [subgraph]}, "extra": {},
    }  # fmt: skip


def gallery() -> str:
    """docs/gallery.md: every example with its picture and what to look at."""
    lines = ["# Examples", "", "All of them are in ComfyUI's template browser; a PNG that one saves holds it, too.", ""]
    for name in EXAMPLES:
        lines += [f"## {name}", "", f"![{name}](../example_workflows/{quote(name)}.jpg)", "", NOTES[name], ""]
    return "\n".join(lines)


async def write() -> None:
    with Server() as server:
        async with Client(server.url) as client:
            info = await client.get("/object_info")
    for name, nodes in EXAMPLES.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(graph(name, nodes(), info, NOTES[name]), indent=1) + "\n")
        print(FOLDER / f"{name}.json")
    (ROOT / "docs" / "gallery.md").write_text(gallery())
    (ROOT / "subgraphs").mkdir(exist_ok=True)
    (ROOT / "subgraphs" / f"{BLUEPRINT}.json").write_text(json.dumps(blueprint(info), indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(write())
