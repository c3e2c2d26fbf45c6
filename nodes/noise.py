"""Optimised noises as files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from safetensors import SafetensorError
from torch import Tensor

from ..rewards import known
from ..sampler import golden, replay
from .editor.live import text_output
from .host.replay import ReplayNoise, ReplaySampler, made
from .shared import files
from .shared.checks import check_links, check_values
from .shared.inputs import seed_input
from .shared.made import chosen, found, listed, path_input, stamp, why_not
from .shared.types import aliases

SUFFIXES = (".safetensors",)
NO_FILE = "put a .safetensors of MIRA Save Noise into the input or output folder"


def noise_path(file: str) -> str:
    return found(file, SUFFIXES, NO_FILE)


class MiraSaveNoise(io.ComfyNode):
    NAME = "MIRA Save Noise"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraSaveNoise",
            **aliases("save noise", "export noise", "share noise"),
            display_name=cls.NAME,
            category="MIRA Alignment/sampling",
            description=(
                "Saves the noises that an optimising node found, with its settings, so that the image can be sampled "
                "again without optimising: by you, later, or by somebody else."
            ),
            inputs=[
                io.Noise.Input("noise", tooltip="From an optimising node of MIRA."),
                io.Sampler.Input("sampler", tooltip="From the same node."),
                io.String.Input(
                    "filename_prefix", default="mira_noise/noise", tooltip="Below the output folder, as Save Image's."
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, noise: Any, sampler: Any, filename_prefix: str) -> io.NodeOutput:
        check_links(cls.NAME, noise=noise, sampler=sampler)
        check_values(cls.NAME, cls.define_schema().inputs, {"filename_prefix": filename_prefix})
        if not isinstance(noise, ReplayNoise) or not isinstance(sampler, ReplaySampler):
            wrong = "sampler" if isinstance(noise, ReplayNoise) else "noise"
            raise ValueError(
                f"{cls.NAME}: {wrong} is no optimised one: connect noise and sampler of one optimising node"
            )
        if noise.segments is not sampler.segments:
            raise ValueError(f"{cls.NAME}: noise and sampler are of two runs: connect both outputs of one node")
        wrong = f"{cls.NAME}: filename_prefix {filename_prefix!r} cannot be written"
        try:
            folder, name, counter, _, _ = folder_paths.get_save_image_path(
                filename_prefix, folder_paths.get_output_directory()
            )
        except Exception as problem:  # ComfyUI's for one outside of the output folder is bare
            raise OSError(f"{wrong} ({problem})") from problem
        path = Path(folder, f"{name}_{counter:05}_.safetensors")
        half = path.with_suffix(".part")
        try:
            replay.save(half, noise.segments, noise.facts | {"optimized": sampler.optimized})
            os.replace(half, path)
        except (OSError, SafetensorError, ValueError) as problem:  # a name with a character of number 0
            raise OSError(f"{wrong} ({problem})") from problem
        finally:
            with contextlib.suppress(OSError, ValueError):
                half.unlink()
        shown = os.path.relpath(path, folder_paths.get_output_directory())
        return io.NodeOutput(ui=text_output(f"saved {shown} in the output folder"))


def is_seed(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**64


class MiraLoadNoise(io.ComfyNode):
    NAME = "MIRA Load Noise"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraLoadNoise",
            **aliases("load noise", "import noise", "reuse noise"),
            display_name=cls.NAME,
            category="MIRA Alignment/loaders",
            description=(
                "The noise and the sampler that MIRA Save Noise saved, for SamplerCustomAdvanced: with the same model, "
                "prompt, guider and sigmas the image comes back; with others, what these noises become there."
            ),
            inputs=[
                io.Combo.Input(
                    "file", options=listed(SUFFIXES) or [NO_FILE], tooltip="From the input or output folder."
                ),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="Instead of the sampler that the file names; needed where it is of another pack.",
                ),
                path_input("mira_noise/fox_00001_.safetensors"),
            ],
            outputs=[
                io.Noise.Output("noise", display_name="noise", tooltip="The initial noise that was found."),
                io.Sampler.Output(
                    "sampler_with_noises", display_name="sampler", tooltip="Injects the others; connect it with noise."
                ),
                io.String.Output("settings", display_name="settings", tooltip="Of the run that found it, as JSON."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None, path: str | None = "") -> bool | str:
        return why_not(noise_path, file, path)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, sampler: Any = None, path: str | None = "") -> Any:
        return stamp(noise_path, file, path)

    @classmethod
    def execute(cls, file: str, sampler: Any = None, path: str = "") -> io.NodeOutput:
        try:
            file = chosen(file, path) or ""
            segments, facts = replay.load(Path(noise_path(file)))
            if not is_seed(facts.get("seed")) or not isinstance(facts.get("sampler", {}), dict | None):
                raise ValueError(f"{file} is damaged: it names no seed or no sampler")
            if sampler is None:
                if not facts.get("sampler"):
                    raise ValueError(
                        "the file cannot name its sampler, which is of another pack or has options that no file holds: "
                        "connect `sampler`"
                    )
                sampler = made(facts["sampler"])
        except ValueError as problem:
            raise ValueError(f"{cls.NAME}: {problem}") from None
        if not isinstance(sampler, comfy.samplers.KSAMPLER):
            raise ValueError(f"{cls.NAME}: sampler is a {type(sampler).__name__}: connect one of ComfyUI's own kind")
        settings = facts.get("settings")
        repeatable = settings.get("repeatable", True) if isinstance(settings, dict) else True
        family = facts.get("family")
        replayed = ReplaySampler(
            sampler,
            segments,
            bool(facts.get("optimized", True)),
            bool(repeatable),
            family if isinstance(family, str) else "",
        )
        return io.NodeOutput(ReplayNoise(segments, facts), replayed, json.dumps(facts, indent=1))


class GoldenNoise:
    """ComfyUI's NOISE: that of a seed, through a network that knows the prompt. prompt: (B or 1, tokens, width).

    On the CPU, where noise is made: the network is small, every device gets the same bits, and a run that asks for the
    noises of other seeds keeps its own networks where they are.
    """

    def __init__(self, network: golden.GoldenNoise, prompt: Tensor, seed: int) -> None:
        self.network, self.prompt, self.seed = network, prompt, seed

    def generate_noise(self, latent: dict) -> Tensor:
        noise = comfy.sample.prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))
        prompt = comfy.utils.repeat_to_batch_size(self.prompt, len(noise)).to("cpu", torch.float32)
        try:
            with torch.no_grad():
                return self.network(noise.float().cpu(), prompt).to(noise)
        except ValueError as problem:
            raise ValueError(f"{MiraGoldenNoise.NAME}: {problem}") from None


class MiraGoldenNoise(io.ComfyNode):
    NAME = "MIRA Golden Noise"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraGoldenNoise",
            **aliases("golden noise", "npnet", "better noise"),
            display_name=cls.NAME,
            category="MIRA Alignment/sampling",
            description=(
                "A noise that a small published network has fitted to the prompt, for SamplerCustomAdvanced or MIRA "
                "Optimize Sampler (Advanced): where a search or an optimisation begins, at hardly any cost."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    **files.offered(files.npnets(), known.GOLDEN_NOISE),
                    tooltip="An NPNet of Golden Noise, in models/npnets: sdxl.pth for SDXL at 1024 px.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt by SDXL's text encoders, 75 tokens at most."),
                seed_input("Of the noise that the network changes."),
            ],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return files.missing(file, known.GOLDEN_NOISE, files.NPNETS, into=files.NPNETS) or True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: Any) -> str:
        return files.stamp(file, stock=(files.NPNETS,))

    @classmethod
    def execute(cls, file: str, positive: list, seed: int) -> io.NodeOutput:
        check_links(cls.NAME, positive=positive)
        if not positive:
            raise ValueError(f"{cls.NAME}: positive is empty: connect a CLIP Text Encode")
        check_values(cls.NAME, cls.define_schema().inputs, {"seed": seed})
        if message := files.missing(file, known.GOLDEN_NOISE, files.NPNETS, into=files.NPNETS):
            raise ValueError(f"{cls.NAME}: {message}")
        try:
            network = golden.load(files.find(file, files.NPNETS))
        except ValueError as problem:
            raise ValueError(f"{cls.NAME}: {problem}") from None
        return io.NodeOutput(GoldenNoise(network, positive[0][0], seed))
