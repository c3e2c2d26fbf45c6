"""Loaders of published scorers, one node per family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..rewards import files as weight_files
from ..rewards import known
from ..rewards.aesthetic import Aesthetic, LinearHead, head_of
from ..rewards.clip import Encoder, clip_score, hps, pick_score
from ..rewards.image_reward import image_reward_of
from ..rewards.networks import ENCODERS, NAMES, clip_image_half, clip_of, name_of, open_clip_layout
from ..rewards.preprocess import Preprocessing, crop_torchvision, crop_transformers, pad_longest
from ..sampler.memory import out_of_memory
from .host.dynamic import static
from .host.places import OutOfPlace
from .shared import files
from .shared.checks import check_values
from .shared.types import aliases, reward_output

CONNECTED = "the connected clip_vision"
SAME_FILE = "in the same file"
CLIP_FOLDERS = ("clip_vision", "text_encoders")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GELU = {"auto": None, "quick_gelu": True, "gelu": False}


def precision_input():
    return io.Combo.Input(
        "precision",
        options=["auto", *DTYPES],
        default="auto",
        tooltip="Of the network. auto: fp16 on a GPU that is fast at it, else fp32. Scores differ by less than 2 %.",
    )


def dtype_of(precision: str) -> torch.dtype:
    if precision != "auto":
        return DTYPES[precision]
    management = comfy.model_management
    return torch.float16 if management.should_use_fp16(management.get_torch_device()) else torch.float32


@contextmanager
def opening(node: str, path: Path) -> Iterator[None]:
    """Whatever a file's tensors make a network's builder stumble over is a WrongFile, which names node and file."""
    try:
        yield
    except weight_files.WrongFile as problem:
        if str(problem).startswith(node):
            raise
        raise weight_files.WrongFile(f"{node}: {problem}") from problem
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as problem:
        if out_of_memory(problem):
            raise
        raise weight_files.WrongFile(
            f"{node}: {path.name} lacks weights of the network that it is said to hold, or has them in other shapes "
            f"({type(problem).__name__}: {str(problem)[:120]}): download it again, or use another file"
        ) from problem


def path_of(node: str, name: str, published: known.Published, *stock: str) -> Path:
    message, path = files.missing(name or "an empty name", published, *stock), files.find(name, *stock)
    if message or path is None:
        raise ValueError(f"{node}: {message}")
    return path


def expect(node: str, name: str, state: dict, wanted: str) -> None:
    """Refuse a CLIP of another known size than the one that the scorer was made of."""
    size = name_of(state)
    if size != wanted and size in NAMES.values():
        raise weight_files.WrongFile(
            f"{node}: {name} is a CLIP {size}, but this scorer is a {wanted}; MIRA Load CLIPScore Reward takes it"
        )


def whole_clip(node: str, path: Path, precision: str, size: str, fit: Callable) -> tuple[Encoder, float]:
    """A whole CLIP of a file, and its logit scale as the file has it."""
    with opening(node, path):
        state = weight_files.read(path)
        kind = weight_files.require(state, (weight_files.OPEN_CLIP, weight_files.HF_CLIP), path.name, node)
        if kind is not weight_files.OPEN_CLIP:
            state = open_clip_layout(state)
        expect(node, path.name, state, size)
        encoder = clip_of(state, weight_files.OPEN_CLIP, path, quick_gelu=False)
    scale = encoder.network.logit_scale.float().item()  # which bfloat16 rounds by a per cent
    encoder.network.to(dtype_of(precision))
    return replace(encoder, preprocessing=Preprocessing(encoder.preprocessing.size, fit)), scale


class MiraLoadAestheticReward(io.ComfyNode):
    NAME = "MIRA Load Aesthetic Reward"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraLoadAestheticReward",
            **aliases("aesthetic score", "laion", "beauty", "reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description=(
                "The LAION aesthetic predictor v2: from 1 to 10, ordinary images score 4.5 to 6.5. It needs its small "
                "head and a CLIP ViT-L/14, from a file or from Load CLIP Vision."
            ),
            inputs=[
                io.Combo.Input(
                    "head",
                    **files.offered(files.weights(), known.AESTHETIC_HEAD, "linearMSE"),
                    tooltip="sac+logos+ava1-l14-linearMSE.pth, in models/mira_rewards.",
                ),
                io.Combo.Input(
                    "clip",
                    options=[CONNECTED, *files.weights(*CLIP_FOLDERS)],
                    default=CONNECTED,
                    tooltip="CLIP ViT-L/14 with its projection, whole or the image half.",
                ),
                precision_input(),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="A CLIP ViT-L/14 that is loaded already."),
            ],
            outputs=[reward_output()],
        )

    @classmethod
    def validate_inputs(cls, head: str | None = None, clip: Any = None) -> bool | str:
        return (
            files.missing(head, known.AESTHETIC_HEAD)
            or (clip != CONNECTED and files.missing(clip, known.CLIP_L, *CLIP_FOLDERS))
            or True
        )

    @classmethod
    def fingerprint_inputs(cls, head: str | None = None, clip: Any = None, **others: Any) -> str:
        return files.stamp(head, clip, stock=CLIP_FOLDERS)

    @classmethod
    def execute(cls, head: str, clip: Any, precision: str, clip_vision: Any = None) -> io.NodeOutput:
        check_values(cls.NAME, cls.define_schema().inputs, {"precision": precision})
        path = path_of(cls.NAME, head, known.AESTHETIC_HEAD)
        with opening(cls.NAME, path):
            linear = head_of(weight_files.read(path), path.name)
        if clip == CONNECTED:
            return io.NodeOutput(cls.connected(linear, clip_vision))
        path = path_of(cls.NAME, clip, known.CLIP_L, *CLIP_FOLDERS)
        with opening(cls.NAME, path):
            state = weight_files.read(path)
            wanted = (weight_files.OPEN_CLIP, weight_files.HF_CLIP, weight_files.HF_CLIP_VISION)
            kind = weight_files.require(state, wanted, path.name, cls.NAME)
            network, preprocessing, name = clip_image_half(state, kind, path)
        cls.check_width(linear, network.proj.shape[1], f"{path.name} ({name})")
        network.to(dtype_of(precision))
        return io.NodeOutput(Aesthetic(linear, network, network, preprocessing))

    @classmethod
    def check_width(cls, head: LinearHead, width: int, what: str) -> None:
        if width != head.width:
            raise ValueError(
                f"{cls.NAME}: {what} makes embeddings of {width} numbers, but this head reads {head.width}: use CLIP "
                f"ViT-L/14 ({known.CLIP_L.model})"
            )

    @classmethod
    def connected(cls, head: LinearHead, clip_vision: Any) -> Aesthetic:
        if clip_vision is None:
            raise ValueError(
                f"{cls.NAME}: clip says {CONNECTED}, but none is: connect Load CLIP Vision, or choose a file"
            )
        patcher = static(clip_vision.patcher, f"{cls.NAME}: clip_vision")
        network = patcher.model
        if not hasattr(network, "visual_projection") or not hasattr(network.visual_projection, "weight"):
            raise ValueError(f"{cls.NAME}: clip_vision is no CLIP (or lacks its projection): load CLIP ViT-L/14")
        cls.check_width(head, network.visual_projection.weight.shape[0], "clip_vision")
        network.mira_patcher = patcher  # it is in ComfyUI's memory management already

        def encode(pixels: Tensor) -> Tensor:
            with OutOfPlace():  # its residuals are in place
                return network(pixel_values=pixels.float(), intermediate_output=-2)[2]

        preprocessing = Preprocessing(
            clip_vision.image_size, crop_torchvision, clip_vision.image_mean, clip_vision.image_std
        )
        return Aesthetic(head, network, encode, preprocessing)


class MiraLoadHPSReward(io.ComfyNode):
    NAME = "MIRA Load HPS Reward"
    VERSIONS = ("from the file's name", "v2", "v2.1")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraLoadHPSReward",
            **aliases("hpsv2", "human preference", "reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description="Human Preference Score v2 or v2.1: how much people like an image for its prompt, .2 to .35.",
            inputs=[
                io.Combo.Input(
                    "file",
                    **files.offered(files.weights(), known.HPS_21, "hps"),
                    tooltip=f"{known.HPS_21.file} or {known.HPS_2.file}, in models/mira_rewards.",
                ),
                io.Combo.Input(
                    "version",
                    options=list(cls.VERSIONS),
                    tooltip="The two releases have the same architecture, and their scores do not compare.",
                ),
                precision_input(),
            ],
            outputs=[reward_output()],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return files.missing(file, known.HPS_21) or True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: Any) -> str:
        return files.stamp(file)

    @classmethod
    def execute(cls, file: str, version: str, precision: str) -> io.NodeOutput:
        check_values(cls.NAME, cls.define_schema().inputs, {"version": version, "precision": precision})
        path = path_of(cls.NAME, file, known.HPS_21)
        if version == cls.VERSIONS[0]:
            found = [v for sign, v in (("v2.1", "v2.1"), ("v21", "v2.1"), ("v2", "v2")) if sign in file.lower()]
            if not found:
                raise ValueError(f"{cls.NAME}: the name {file} tells no version: set version to v2 or v2.1")
            version = found[0]
        return io.NodeOutput(hps(whole_clip(cls.NAME, path, precision, "ViT-H/14", pad_longest)[0], version))


class MiraLoadPickScoreReward(io.ComfyNode):
    NAME = "MIRA Load PickScore Reward"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraLoadPickScoreReward",
            **aliases("pickapic", "human preference", "reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description="PickScore v1: which of two images people pick for a prompt; ordinary images score 18 to 24.",
            inputs=[
                io.Combo.Input(
                    "file",
                    **files.offered(files.weights(), known.PICKSCORE, "pick"),
                    tooltip="The whole model of PickScore_v1, in models/mira_rewards; name it as you like.",
                ),
                precision_input(),
            ],
            outputs=[reward_output()],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return files.missing(file, known.PICKSCORE) or True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: Any) -> str:
        return files.stamp(file)

    @classmethod
    def execute(cls, file: str, precision: str) -> io.NodeOutput:
        check_values(cls.NAME, cls.define_schema().inputs, {"precision": precision})
        path = path_of(cls.NAME, file, known.PICKSCORE)
        return io.NodeOutput(pick_score(*whole_clip(cls.NAME, path, precision, "ViT-H/14", crop_transformers)))


class MiraLoadImageReward(io.ComfyNode):
    NAME = "MIRA Load ImageReward"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraLoadImageReward",
            **aliases("image reward", "human preference", "reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description="ImageReward v1.0: human preference, standardised; ordinary images score -1 to 1.5.",
            inputs=[
                io.Combo.Input(
                    "file",
                    **files.offered(files.weights(), known.IMAGE_REWARD, "imagereward"),
                    tooltip=f"{known.IMAGE_REWARD.file}, in models/mira_rewards.",
                ),
                precision_input(),
            ],
            outputs=[reward_output()],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return files.missing(file, known.IMAGE_REWARD) or True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: Any) -> str:
        return files.stamp(file)

    @classmethod
    def execute(cls, file: str, precision: str) -> io.NodeOutput:
        check_values(cls.NAME, cls.define_schema().inputs, {"precision": precision})
        path = path_of(cls.NAME, file, known.IMAGE_REWARD)
        with opening(cls.NAME, path):
            state = weight_files.read(path)
            weight_files.require(state, (weight_files.IMAGE_REWARD,), path.name, cls.NAME)
            reward = image_reward_of(state, path)
        reward.network.to(dtype_of(precision))
        return io.NodeOutput(reward)


class MiraLoadCLIPScore(io.ComfyNode):
    NAME = "MIRA Load CLIPScore Reward"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraLoadCLIPScore",
            **aliases("clip score", "siglip", "prompt alignment", "reward"),
            display_name=cls.NAME,
            category="MIRA Alignment/rewards",
            description="100 times the cosine between image and prompt, by any CLIP or SigLIP.",
            inputs=[
                io.Combo.Input(
                    "file",
                    **files.offered(files.weights(*CLIP_FOLDERS), known.CLIP_L, "clip"),
                    tooltip="A whole CLIP or SigLIP, or the image half of a CLIP.",
                ),
                io.Combo.Input(
                    "text_file",
                    options=[SAME_FILE, *files.weights(*CLIP_FOLDERS)],
                    default=SAME_FILE,
                    tooltip="Where the text half is, if `file` holds the image half only. It must have its projection.",
                ),
                io.Combo.Input(
                    "activation",
                    options=list(GELU),
                    default="auto",
                    tooltip=(
                        "auto: by the config.json beside the file, else QuickGELU for OpenAI's networks and for "
                        "ViT-L/14, GELU for the rest. The weights do not tell; the wrong one spoils the scores."
                    ),
                ),
                precision_input(),
            ],
            outputs=[reward_output()],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None, text_file: str | None = None) -> bool | str:
        return (
            files.missing(file, known.CLIP_L, *CLIP_FOLDERS)
            or (text_file != SAME_FILE and files.missing(text_file, known.CLIP_L, *CLIP_FOLDERS))
            or True
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, text_file: str | None = None, **others: Any) -> str:
        return files.stamp(file, text_file, stock=CLIP_FOLDERS)

    @classmethod
    def execute(cls, file: str, text_file: str, activation: str, precision: str) -> io.NodeOutput:
        check_values(cls.NAME, cls.define_schema().inputs, {"activation": activation, "precision": precision})
        path = path_of(cls.NAME, file, known.CLIP_L, *CLIP_FOLDERS)
        with opening(cls.NAME, path):
            state = weight_files.read(path)
            if text_file != SAME_FILE:
                weight_files.require(state, (weight_files.HF_CLIP_VISION, weight_files.HF_CLIP), path.name, cls.NAME)
        if text_file != SAME_FILE:
            other = path_of(cls.NAME, text_file, known.CLIP_L, *CLIP_FOLDERS)
            with opening(cls.NAME, other):
                text = weight_files.read(other)
                weight_files.require(text, (weight_files.HF_CLIP_TEXT, weight_files.HF_CLIP), other.name, cls.NAME)
            half = {k: v for k, v in text.items() if k.startswith("text_") or k == "logit_scale"}
            state = {k: v for k, v in state.items() if not k.startswith("text_")} | half
        with opening(cls.NAME, path):
            kind = weight_files.require(state, tuple(ENCODERS), path.name, cls.NAME)
            quick = {} if ENCODERS[kind] is not clip_of else {"quick_gelu": GELU[activation]}
            encoder = ENCODERS[kind](state, kind, path, **quick)
        encoder.network.to(dtype_of(precision))
        # SigLIP was trained on a sigmoid: even its matching pairs are nearly orthogonal.
        return io.NodeOutput(clip_score(encoder, **({} if quick else {"typical": (0.0, 20.0)})))
