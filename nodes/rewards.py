"""Rewards that need no published file: formulas, the user's own, and rewards made of rewards."""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..rewards.base import Reward
from ..rewards.combine import SCALINGS, Augmented, Relative, WeightedSum, scaled
from ..rewards.http import NODE as HTTP
from ..rewards.http import HTTPReward, host_of
from ..rewards.jpeg import JPEG, QUALITY, JPEGSurrogate
from ..rewards.pixel import MEASURES, REFERENCE, MatchReference, PixelReward
from ..rewards.python_file import PythonReward
from ..sampler.seeds import stream
from . import host
from .shared import files
from .shared.checks import check_reward, check_values
from .shared.images import to_core
from .shared.types import MiraReward, aliases, reward_output

SLOTS = 4
NO_SCRIPT = "put a .py file into models/mira_rewards"


class MiraPixelReward(io.ComfyNode):
    NAME = "MIRA Pixel Reward"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraPixelReward",
            **aliases("brightness", "darkness", "contrast", "colour", "color", "sharpness"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description="A reward that is a formula of the pixels.",
            inputs=[
                io.Combo.Input(
                    "measure",
                    options=[*MEASURES, REFERENCE],
                    tooltip=(
                        "brightness: the mean pixel, -1 is black and 1 is white; darkness: its negative; contrast: the "
                        "deviation of the luma; colourfulness: Hasler and Suesstrunk's; sharpness: the size of the "
                        "Laplacian; symmetry: 0 for an image that is its own mirror; match reference: 0 for the "
                        "reference image itself."
                    ),
                ),
                io.Image.Input("reference", optional=True, tooltip="The image to match, for match reference."),
            ],
            outputs=[reward_output()],
        )

    @classmethod
    def execute(cls, measure: str, reference: Tensor | None = None) -> io.NodeOutput:
        check_values(cls.NAME, cls.define_schema().inputs, {"measure": measure})
        if measure != REFERENCE:
            return io.NodeOutput(PixelReward(measure))
        if reference is None:
            raise ValueError(
                f"{cls.NAME}: measure is match reference, but reference is not connected; connect an image"
            )
        return io.NodeOutput(MatchReference(to_core(reference, f"{cls.NAME}: reference")))


class MiraJPEGReward(io.ComfyNode):
    NAME = "MIRA JPEG Reward"

    KINDS = {"black box": JPEG, "differentiable estimate": JPEGSurrogate}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraJPEGReward",
            **aliases("file size", "compressibility", "reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description="Minus the kilobytes of the image as a JPEG: small files score high.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(cls.KINDS),
                    tooltip=(
                        "black box: the real file's size, without a gradient. differentiable estimate: a smooth "
                        "stand-in for it, which a gradient can follow."
                    ),
                ),
                io.Int.Input("quality", default=QUALITY, min=1, max=100, tooltip="The JPEG's; the paper uses 95."),
            ],
            outputs=[reward_output()],
        )

    @classmethod
    def execute(cls, kind: str, quality: int) -> io.NodeOutput:
        check_values(cls.NAME, cls.define_schema().inputs, {"kind": kind, "quality": quality})
        return io.NodeOutput(cls.KINDS[kind](quality))


class MiraCombineRewards(io.ComfyNode):
    NAME = "MIRA Combine Rewards"

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for i in range(1, SLOTS + 1):
            inputs += [
                MiraReward.Input(f"reward_{i}", optional=i > 1, tooltip="One of the rewards to combine."),
                io.Float.Input(
                    f"weight_{i}",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.01,
                    optional=i > 1,
                    tooltip=f"What reward_{i} counts, see `scaling`. Negative: less of it. 0: it is recorded only.",
                ),
            ]
        inputs.append(
            io.Combo.Input(
                "scaling",
                options=list(SCALINGS),
                default="by typical range",
                optional=True,
                tooltip=(
                    "by typical range: each score is divided by the width of its typical range, so that equal weights "
                    "count about equally. raw: scores as they are. ReNO: its composite of HPSv2.1 (5), ImageReward "
                    "(1), CLIPScore (0.01) and PickScore (0.05), times your weights."
                ),
            )
        )
        return io.Schema(
            node_id="MiraCombineRewards",
            **aliases("weighted sum", "several rewards", "composite reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description="A weighted sum of rewards; each part stays in the record, in its own units.",
            inputs=inputs,
            outputs=[reward_output()],
        )

    @classmethod
    def execute(cls, scaling: str = "by typical range", **inputs: Any) -> io.NodeOutput:
        given = {k: v for k, v in inputs.items() if k.startswith("weight")} | {"scaling": scaling}
        check_values(cls.NAME, cls.define_schema().inputs, given)
        # The first has to be one; of the others a switch before them may give nothing.
        used = [1, *(i for i in range(2, SLOTS + 1) if inputs.get(f"reward_{i}") is not None)]
        weights = [inputs.get(f"weight_{i}", 1.0) for i in used]
        if not any(weights):
            raise ValueError(f"{cls.NAME}: every weight is 0, so there is nothing to optimise; set one")
        for i in used:
            check_reward(cls.NAME, inputs.get(f"reward_{i}"), f"reward_{i}")
        rewards = [inputs[f"reward_{i}"] for i in used]
        try:
            factors = scaled(rewards, weights, scaling)
        except ValueError as problem:
            raise ValueError(f"{cls.NAME}: {problem}") from problem
        return io.NodeOutput(WeightedSum(rewards, factors))


class MiraAugmentReward(io.ComfyNode):
    NAME = "MIRA Augment Reward"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraAugmentReward",
            **aliases("random crops", "robust reward", "less hacking"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description=(
                "Scores the mean of random crops and mirror images, so that patterns of pixels that fool a scorer at "
                "one alignment only stop paying. Costs as many scores as crops."
            ),
            inputs=[
                MiraReward.Input("reward", tooltip="The one that looks at several changed copies of an image."),
                io.Int.Input("crops", default=4, min=1, max=64, tooltip="Views for every score."),
                io.Float.Input(
                    "smallest",
                    default=0.8,
                    min=0.1,
                    max=1.0,
                    step=0.01,
                    tooltip="The least side of a crop, as a share of the image's. 1: the whole image.",
                ),
                io.Boolean.Input("flip", default=True, tooltip="Mirror half of the views, left and right."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of the crops."),
            ],
            outputs=[reward_output("augmented")],
        )

    @classmethod
    def execute(cls, reward: Reward, crops: int, smallest: float, flip: bool, seed: int) -> io.NodeOutput:
        check_reward(cls.NAME, reward)
        check_values(cls.NAME, cls.define_schema().inputs, {"crops": crops, "smallest": smallest})
        # Stream -2 is the first.
        return io.NodeOutput(Augmented(reward, crops, smallest, flip, lambda number: stream(seed, number - 2)))


class MiraRelativeReward(io.ComfyNode):
    NAME = "MIRA Relative Reward"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraRelativeReward",
            **aliases("relative preference", "style reward", "wanted unwanted"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description=(
                "How much better an image fits the prompt with the words you want than with those you do not want: "
                "what the scorer likes in any image cancels. For rewards that read the prompt."
            ),
            inputs=[
                MiraReward.Input("reward", tooltip="One that compares image and prompt: CLIPScore, HPS, PickScore ..."),
                io.String.Input(
                    "wanted", default="photograph, natural light", tooltip="Put behind the prompt, after a comma."
                ),
                io.String.Input(
                    "unwanted", default="plastic, oversaturated", tooltip="Likewise; what it scores is taken off."
                ),
            ],
            outputs=[reward_output("relative")],
        )

    @classmethod
    def execute(cls, reward: Reward, wanted: str, unwanted: str) -> io.NodeOutput:
        check_reward(cls.NAME, reward)
        check_values(cls.NAME, cls.define_schema().inputs, {"wanted": wanted, "unwanted": unwanted})
        try:
            return io.NodeOutput(Relative(reward, wanted, unwanted))
        except ValueError as problem:
            raise ValueError(f"{cls.NAME}: {problem}") from problem


class MiraRewardFromPython(io.ComfyNode):
    NAME = "MIRA Reward from Python File"

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = files.scripts() or [NO_SCRIPT]
        return io.Schema(
            node_id="MiraRewardFromPython",
            **aliases("custom reward", "own reward", "script"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description=(
                "A reward of your own: a Python file in models/mira_rewards with FACTS and score(images, prompts). "
                "It runs as any Python on your machine does: use files that you trust."
            ),
            inputs=[io.Combo.Input("file", options=names, tooltip="Read again whenever it changes.")],
            outputs=[reward_output()],
        )

    @classmethod
    def missing(cls, file: str | None) -> str | None:
        # Only a name that the folder lists is ever run, whatever a workflow says.
        if file is None or (file in files.scripts() and files.find(file)):
            return None
        return f"{file} is not in models/mira_rewards: put the reward's .py file there and refresh the nodes (key R)"

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return cls.missing(file) or True

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> Any:
        if file is None:  # of another node, whose file may have changed under its name
            return math.nan
        path = files.find(file)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        if message := cls.missing(file or "an empty name"):
            raise ValueError(f"{cls.NAME}: {message}")
        try:
            return io.NodeOutput(PythonReward(files.find(file), host.INTERRUPTS))
        except ValueError as problem:
            raise ValueError(f"{cls.NAME}: {problem}") from problem


def allowed_hosts() -> list[str]:
    """Machines that the user lets workflows send images to: not a workflow's to say."""
    return [h.strip() for h in os.environ.get("MIRA_HTTP_HOSTS", "").split(",") if h.strip()]


class MiraRewardFromHTTP(io.ComfyNode):
    NAME = HTTP

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraRewardFromHTTP",
            **aliases("custom reward", "remote reward", "api"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description=(
                "A reward that a server of yours computes, as a black box: it gets PNGs and prompts, and answers "
                "scores. Another machine than this one has to be allowed by the environment variable MIRA_HTTP_HOSTS."
            ),
            inputs=[
                io.String.Input(
                    "url", default="http://127.0.0.1:8000/score", tooltip="Where the server listens for the POST."
                ),
                io.String.Input("name", default="my reward", tooltip="What the record calls it."),
                io.Boolean.Input("needs_prompt", default=True, tooltip="Refuse to score without a prompt."),
                io.Float.Input("timeout", default=60.0, min=0.1, max=3600.0, step=0.1, tooltip="Seconds, per attempt."),
                io.Int.Input("retries", default=2, min=0, max=20, tooltip="Further attempts, after a growing pause."),
                io.Float.Input(
                    "typical_low",
                    default=0.0,
                    min=-1e6,
                    max=1e6,
                    step=0.01,
                    tooltip="Where scores of ordinary images begin.",
                ),
                io.Float.Input("typical_high", default=1.0, min=-1e6, max=1e6, step=0.01, tooltip="Where they end."),
            ],
            outputs=[reward_output()],
        )

    @classmethod
    def validate_inputs(cls, url: str | None = None) -> bool | str:
        try:
            if url is not None:
                host_of(url, allowed_hosts())
        except ValueError as problem:
            return str(problem)
        return True

    @classmethod
    def execute(
        cls,
        url: str,
        name: str,
        needs_prompt: bool,
        timeout: float,
        retries: int,
        typical_low: float,
        typical_high: float,
    ) -> io.NodeOutput:
        given = dict(url=url, name=name, timeout=timeout, retries=retries, typical_low=typical_low)
        check_values(cls.NAME, cls.define_schema().inputs, given | {"typical_high": typical_high})
        try:
            reward = HTTPReward(
                url,
                name,
                timeout,
                retries,
                needs_prompt,
                (typical_low, typical_high),
                allowed_hosts(),
                comfy.model_management.throw_exception_if_processing_interrupted,
            )
        except ValueError as problem:
            raise ValueError(f"{cls.NAME}: {problem}") from problem
        return io.NodeOutput(reward)
