"""Optimised noises as files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
from comfy_api.latest import io

from ..sampler import replay
from .host.replay import ReplayNoise, ReplaySampler, made
from .shared.checks import check_links, check_values
from .shared.made import found, listed, stamp, why_not
from .shared.types import aliases

SUFFIXES = (".safetensors",)
NO_FILE = "put a .safetensors of MIRA Save Noise into the input or output folder"
SAVE, LOAD = "MIRA Save Noise", "MIRA Load Noise"


def noise_path(file: str) -> str:
    return found(file, SUFFIXES, NO_FILE)


class MiraSaveNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraSaveNoise",
            **aliases("save noise", "export noise", "share noise"),
            display_name=SAVE,
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
        check_links(SAVE, noise=noise, sampler=sampler)
        check_values(SAVE, cls.define_schema().inputs, {"filename_prefix": filename_prefix})
        if not isinstance(noise, ReplayNoise) or not isinstance(sampler, ReplaySampler):
            wrong = "sampler" if isinstance(noise, ReplayNoise) else "noise"
            raise ValueError(f"{SAVE}: {wrong} is no optimised one: connect noise and sampler of one optimising node")
        if noise.segments is not sampler.segments:
            raise ValueError(f"{SAVE}: noise and sampler are of two runs: connect both outputs of one node")
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = Path(folder, f"{name}_{counter:05}_.safetensors")
        half = path.with_suffix(".part")
        replay.save(half, noise.segments, noise.facts | {"optimized": sampler.optimized})
        os.replace(half, path)
        shown = os.path.relpath(path, folder_paths.get_output_directory())
        return io.NodeOutput(ui={"mira_text": [f"saved {shown} in the output folder"]})


class MiraLoadNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraLoadNoise",
            **aliases("load noise", "import noise", "reuse noise"),
            display_name=LOAD,
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
            ],
            outputs=[
                io.Noise.Output("noise", display_name="noise"),
                io.Sampler.Output("sampler_with_noises", display_name="sampler"),
                io.String.Output("settings", display_name="settings", tooltip="Of the run that found it, as JSON."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return why_not(noise_path, file)

    @classmethod
    def fingerprint_inputs(cls, file: str, sampler: Any = None) -> Any:
        return stamp(noise_path, file)

    @classmethod
    def execute(cls, file: str, sampler: Any = None) -> io.NodeOutput:
        try:
            segments, facts = replay.load(Path(noise_path(file)))
            if not isinstance(facts.get("seed"), int) or not isinstance(facts.get("sampler", {}), dict | None):
                raise ValueError(f"{file} is damaged: it names no seed or no sampler")
            if sampler is None:
                if not facts.get("sampler"):
                    raise ValueError("the file cannot name its sampler, which is of another pack: connect `sampler`")
                sampler = made(facts["sampler"])
        except ValueError as problem:
            raise ValueError(f"{LOAD}: {problem}") from None
        if not isinstance(sampler, comfy.samplers.KSAMPLER):
            raise ValueError(f"{LOAD}: sampler is a {type(sampler).__name__}: connect one of ComfyUI's own kind")
        replayed = ReplaySampler(sampler, segments, bool(facts.get("optimized", True)))
        return io.NodeOutput(ReplayNoise(segments, facts), replayed, json.dumps(facts, indent=1))
