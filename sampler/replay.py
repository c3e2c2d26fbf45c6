"""What images were sampled from, noise by noise, so that they can be sampled again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "1"


@dataclass(frozen=True)
class Segment:
    """A stretch of the sampling process as it was run.

    schedule: (T + 1,) sigmas. noises: z of the first level and every injected one, each (B, C, ...), on the CPU.
    part: (B,) bool, of which images it is a part; a restart that was not kept is none. denoise: the share of the whole
    schedule that it begins at, 1 for the first. seed: of what a host makes for a restart beside its noises.
    """

    schedule: Tensor
    noises: tuple[Tensor, ...]
    part: Tensor
    denoise: float = 1.0
    seed: int = 0

    def place(self, sigmas: Tensor) -> int | None:
        """The step of the schedule at which `sigmas`, (t + 1,), are a part of it, such as one that was split off."""
        recorded, count = self.schedule.to(sigmas), len(sigmas)
        starts = range(len(recorded) - count + 1)
        return next((i for i in starts if torch.equal(recorded[i : i + count], sigmas)), None)

    def source(self, sigmas: Tensor) -> Callable[[Callable[[], Tensor]], Tensor]:
        """A `rollout.NoiseSource` of the injected noises, for a run over these sigmas, (t + 1,).

        A part of the schedule goes on with the noises of its own steps. With another number of steps than recorded a
        noise goes to the step at its place in the process, and steps that have none of their own draw one: noise that
        is used twice would be seen in the image.
        """
        recorded, left = len(self.schedule) - 1, dict(enumerate(self.noises[1:], 1))
        place, share, calls = self.place(sigmas), 1.0, 0
        if place is None:
            share = recorded / max(len(sigmas) - 1, 1)
        else:  # samplers draw as often at every step, but for the last, which seldom draws
            calls = place * round(len(left) / max(recorded - 1, 1))

        def source(draw: Callable[[], Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            z = left.pop(math.floor(calls * share + 0.5), None)  # no two halves to one side
            return draw() if z is None else z

        return source


def save(path: Path, segments: Sequence[Segment], facts: dict) -> None:
    """A safetensors file. facts: what JSON holds, such as the sampler and the settings of the run."""
    tensors: dict[str, Tensor] = {}
    for i, segment in enumerate(segments):
        tensors |= {f"{i}.schedule": segment.schedule, f"{i}.part": segment.part}
        tensors |= {f"{i}.noise.{n}": z for n, z in enumerate(segment.noises)}
    more = {"denoise": [segment.denoise for segment in segments], "seeds": [segment.seed for segment in segments]}
    about = {"format": FORMAT, "facts": facts} | more
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, {"mira_noise": json.dumps(about)})


def load(path: Path) -> tuple[list[Segment], dict]:
    """(segments, facts) of a file that `save` wrote. Raises ValueError for any other, a damaged or an altered one."""
    try:
        with safe_open(path, "pt") as file:  # copies: the file may change while they are used
            said = (file.metadata() or {}).get("mira_noise")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()} if said else {}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"{path.name} cannot be read: {problem}") from None
    if said is None:
        raise ValueError(f"{path.name} holds no MIRA noise: use a file that MIRA Save Noise wrote")
    try:
        about = json.loads(said)
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']}, and this version of MIRA reads {FORMAT}")
        segments = []
        seeds = about.get("seeds", [0] * len(about["denoise"]))  # the first files had none
        for i, (denoise, seed) in enumerate(zip(about["denoise"], seeds, strict=True)):
            count = sum(name.startswith(f"{i}.noise.") for name in tensors)
            noises = tuple(tensors[f"{i}.noise.{n}"] for n in range(count))
            schedule, part = tensors[f"{i}.schedule"], tensors[f"{i}.part"].bool()
            segments.append(Segment(schedule, noises, part, float(denoise), int(seed)))
        check(segments)
        return segments, dict(about["facts"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
        raise ValueError(f"{path.name} is damaged: {problem}") from None


def check(segments: Sequence[Segment]) -> None:
    """Raise ValueError for what cannot have been recorded."""
    if not segments:
        raise ValueError("it has no noises")
    for segment in segments:
        if not 0 <= segment.seed < 2**64:
            raise ValueError(f"a seed of {segment.seed}")
        if segment.schedule.ndim != 1 or len(segment.schedule) < 2 or not segment.noises:
            raise ValueError(f"a schedule of shape {tuple(segment.schedule.shape)}, and {len(segment.noises)} noises")
        for z in segment.noises:
            if z.shape != segments[0].noises[0].shape or not z.is_floating_point() or not torch.isfinite(z).all():
                raise ValueError("noises of several shapes, or with values that are no numbers")
        if segment.part.shape != segment.noises[0].shape[:1]:
            raise ValueError(f"{tuple(segment.part.shape)} images, and noises of {len(segment.noises[0])}")
