"""Noises that were optimised, as ComfyUI's own NOISE and SAMPLER: any sampler node samples the image again."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ...sampler.keep import chosen
from ...sampler.replay import Segment
from ...sampler.restart import tail
from .conditioning import prepared
from .generators import seed_generators
from .kernels import attention_of, pytorch_kernels, training
from .repeating import Repeating
from .samplers import twin_of

log = logging.getLogger("mira")


def family_of(model: Any) -> str:
    """The kind of a diffusion model, by ComfyUI's name for it: of another kind noises mean nothing."""
    return type(getattr(model, "model_config", model)).__name__


def tell_node(text: str) -> None:
    """Log it, and show it on the node that runs, which may be a stock one with no room for notices."""
    log.warning("%s", text)
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context and server:  # some frontends take it for HTML, others escape it, and a file may be a stranger's
        server.send_progress_text(re.sub(r"[<>&\[\]]", " ", text), context.node_id, server.client_id)


class ReplayNoise:
    """z_T. facts: of the run, for whoever saves it."""

    def __init__(self, segments: Sequence[Segment], facts: dict) -> None:
        self.segments, self.facts = segments, facts
        self.seed = facts.get("seed", 0)

    def generate_noise(self, latent: dict) -> Tensor:
        z, samples = self.segments[0].noises[0], latent["samples"]
        if z.shape != samples.shape:
            raise ValueError(
                f"MIRA noise: it was made for latents of shape {tuple(z.shape)}, but latent_image has "
                f"{tuple(samples.shape)}: use the same size and batch"
            )
        seed_generators(samples, self.seed, latent.get("batch_index"))
        return z.clone()


class ReplaySampler(comfy.samplers.Sampler):
    """`sampler`, whose injected noises are those of `segments`, restarts included.

    optimized: as an optimisation samples, with PyTorch's attention, so that the same bits come out. repeatable: by
    algorithms that repeat to the bit on a GPU, as that run did; where it could not, there may be none. family: of the
    model that the noises were made for, as `family_of` has it; empty where that is not known.
    """

    def __init__(
        self,
        sampler: Any,
        segments: Sequence[Segment],
        optimized: bool = True,
        repeatable: bool = True,
        family: str = "",
    ) -> None:
        self.sampler, self.segments = sampler, segments
        self.optimized, self.repeatable, self.family = optimized, repeatable, family

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        if len(noise) != len(self.segments[0].part):
            raise ValueError(
                f"MIRA noise: sampler has the noises of {len(self.segments[0].part)} images, but there are "
                f"{len(noise)}: use the same batch"
            )
        recorded = self.segments[0].noises[0].shape[1:]
        if noise.shape[1:] != recorded:
            raise ValueError(
                f"MIRA noise: sampler has noises of shape {tuple(recorded)}, but the latent is "
                f"{tuple(noise.shape[1:])}: use a latent of the same size, or the stock sampler for another"
            )
        here = family_of(model_wrap.inner_model)
        if self.family and self.family != here:
            tell_node(f"MIRA noise: it was made for {self.family}, and this model is {here}: it may mean nothing")
        if self.optimized:
            options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
            options.setdefault("transformer_options", {})["optimized_attention_override"] = attention_of(options)
            extra_args = extra_args | {"model_options": options}
        # Else there is no image yet, or nothing that it could have been restarted on.
        whole = sigmas[-1] == 0 and (len(sigmas) > 2 or self.segments[0].place(sigmas) is not None)
        segments = self.segments if whole else self.segments[:1]

        def sample() -> Tensor:
            x = noise
            for n, segment in enumerate(segments):
                now, z, begun, args = sigmas, noise, latent_image, extra_args
                if n:
                    args = extra_args | {"seed": segment.seed}  # what lies outside a mask may be noised by it
                    same = self.segments[0].place(sigmas) is not None
                    now = segment.schedule.to(sigmas) if same else tail(sigmas, segment.denoise)
                    z, begun = segment.noises[0].to(noise), x.to(latent_image)
                    seed_generators(segment.noises[0], segment.seed)
                    if denoise_mask is not None:  # what is not painted stays as it was given
                        begun = torch.where(denoise_mask > 0, x, latent_image)
                wrap = prepared(model_wrap, begun, denoise_mask, segment.seed, sigmas.device) if n else model_wrap
                sampled = self._run(wrap, now, args, callback, z, begun, denoise_mask, disable_pbar, segment)
                x = chosen(segment.part, sampled, x)
            return x

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.optimized:  # the kernels of that run
                stack.enter_context(training(False))
                stack.enter_context(pytorch_kernels())
            return Repeating("MIRA noise")(noise.device, sample) if self.repeatable else sample()

    def _run(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Callable | None, noise: Tensor,
        latent_image: Tensor, mask: Tensor | None, disable: bool, segment: Segment,
    ) -> Tensor:  # fmt: skip
        given = segment.source(sigmas)

        def source(draw: Callable[[], Tensor]) -> Tensor:
            return given(draw).to(noise)

        sampler = copy.copy(self.sampler)
        options = extra_args["model_options"]
        options = options | {"transformer_options": options.get("transformer_options", {}) | {"sample_sigmas": sigmas}}
        extra_args = extra_args | {"model_options": options}
        with twin_of(self.sampler, source) as (sampler.sampler_function, sampler.extra_options):
            return sampler.sample(model_wrap, sigmas, extra_args, callback, noise, latent_image, mask, disable)


def described(sampler: Any) -> dict | None:
    """What a SAMPLER is made again from, or None for one that no name of ComfyUI's makes."""
    function, found = getattr(sampler, "sampler_function", None), None
    for name in comfy.samplers.SAMPLER_NAMES:
        if getattr(comfy.samplers.sampler_object(name), "sampler_function", None) is function:
            found = name
            break
    said = {"name": found, "options": sampler.extra_options, "inpaint": sampler.inpaint_options} if found else None
    try:
        return said if said and json.dumps(said) else None
    except TypeError:
        return None


def made(said: dict) -> Any:
    """The SAMPLER of what `described` said. Raises ValueError for a name that this ComfyUI does not have."""
    name = said.get("name")
    if name not in comfy.samplers.SAMPLER_NAMES:
        raise ValueError(f"its sampler is {name!r}, which this ComfyUI does not have: connect `sampler`")
    sampler = comfy.samplers.sampler_object(name)
    sampler.extra_options, sampler.inpaint_options = dict(said.get("options") or {}), dict(said.get("inpaint") or {})
    return sampler
