"""What a UNet's attention gives to the words of a prompt, and a noise made better by it (InitNO), inside a sample."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from ...sampler.ending import within_memory
from ...sampler.initno import Found, Maps, Settings, improve
from ...sampler.memory import offloaded, unlock
from .blocks import blocks_checkpointed
from .inference_mode import leave_inference_mode_with, normal
from .job import INTERRUPTS
from .kernels import pytorch_kernels, sdpa, training
from .loading import loaded
from .places import Place, written_over
from .repeating import Repeating, has_no_repeatable_way

log = logging.getLogger("mira")
SIDE = 16  # of the attention maps that are looked at: the nearest that a model has


@dataclass(frozen=True)
class Words:
    """Where a text's tokens are in its encoding. subjects: of each, as indices of `kept`. kept: all of the `tokens` but
    those that begin and end a chunk of the text."""

    subjects: list[list[int]]
    kept: list[int]
    tokens: int


def grid(positions: int, height: int, width: int) -> tuple[int, int]:
    """The sides of the level of a UNet that has so many positions; it halves a latent's sides and rounds up. Raises
    ValueError where none has.
    """
    while height * width > positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != positions:
        raise ValueError(f"attention over {positions} positions is no level of the model's: unpatch the model")
    return height, width


class Listener:
    """Hears the queries and keys of a UNet's attention: its probabilities at one resolution, or which there are.

    By hooks on the projections, which every version of ComfyUI has, and which run whatever patches the attention.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.positions = tokens, 0
        self.seen: set[tuple[str, int]] = set()
        self.listen()

    def listen(self) -> None:
        """Anew, until `heard`: what a checkpoint recomputes afterwards would be kept alive for nothing."""
        self.maps: dict[str, list[Tensor]] = {"cross": [], "own": []}
        self.listening = True

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Must last until after backward: blocks that are recomputed there are heard again."""
        handles = []
        for module in network.modules():
            if all(hasattr(module, name) for name in ("to_q", "to_k", "heads")):
                attention: Any = module
                of_this: list[Tensor] = []
                handles.append(attention.to_q.register_forward_hook(partial(self._query, of_this)))
                handles.append(attention.to_k.register_forward_hook(partial(self._key, of_this, attention.heads)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _query(self, of_this: list, module: torch.nn.Module, inputs: tuple, q: Tensor) -> None:
        of_this[:] = [q]

    def _key(self, of_this: list, heads: int, module: torch.nn.Module, inputs: tuple, k: Tensor) -> None:
        q = of_this.pop()
        kind = {self.tokens: "cross", q.shape[1]: "own"}.get(k.shape[1])
        if kind:
            self.seen.add((kind, q.shape[1]))
            if q.shape[1] == self.positions:
                found = probabilities(q, k, heads)  # also in a recompute, which must do what was done
                if self.listening:
                    self.maps[kind].append(found)

    def heard(self) -> tuple[Tensor, Tensor]:
        """(cross (positions, tokens), own (positions, positions)), the mean over layers."""
        self.listening = False
        return torch.stack(self.maps["cross"]).mean(0), torch.stack(self.maps["own"]).mean(0)


def probabilities(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """(positions, keys): the mean over heads of the only image."""
    q, k = (t[0].float().unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k))
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)


class Attending(comfy.samplers.Sampler):
    """Where ComfyUI samples one image, makes its noise better instead. Afterwards: `found`."""

    def __init__(
        self, node: str, words: Words, settings: Settings, generator: torch.Generator, report: Callable
    ) -> None:
        self.node = node
        self.words, self.settings, self.generator, self.report = words, settings, generator, report
        self.found: Found

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        _: Any = False,
    ) -> Tensor:
        inner = model_wrap.inner_model
        patchers = [model_wrap.model_patcher, *model_wrap.loaded_models]
        need = 3 * inner.memory_required([2, *noise.shape[1:]])
        with loaded(patchers, need), training(), pytorch_kernels():
            leave_inference_mode_with(model_wrap, extra_args["model_options"])
            try:
                self.found = self._improve(
                    model_wrap, normal(sigmas), normal(extra_args), normal(noise), normal(latent_image)
                )
            finally:
                unlock()
        return noise

    def _improve(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, noise: Tensor, latent_image: Tensor) -> Found:
        inner = model_wrap.inner_model
        full, sigma = self.max_denoise(model_wrap, sigmas), sigmas[:1].to(noise)

        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        options.setdefault("transformer_options", {})["optimized_attention_override"] = sdpa
        for name in ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"):
            options.pop(name, None)  # guidance by more passes, which would be heard too; it is the prompt's that counts
        listener = Listener(self.words.tokens)

        def attend(z: Tensor) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            listener.listen()
            x = inner.model_sampling.noise_scaling(sigma[0], z, latent_image, full)
            model_wrap(x, sigma, **{**extra_args, "model_options": options})

        with listener.on(inner.diffusion_model):
            with torch.no_grad():
                attend(noise)
            both = [p for kind, p in listener.seen if kind == "cross" and ("own", p) in listener.seen]
            name = type(inner.diffusion_model).__name__
            if not both and not listener.seen and isinstance(inner.diffusion_model, UNetModel):
                raise ValueError(
                    f"{self.node}: a patch of model runs another network than its {name}: connect it unpatched"
                )
            if not both:
                raise ValueError(
                    f"{self.node}: {name} has no cross-attention on the prompt's {self.words.tokens} "
                    "tokens: use a model with a UNet, such as SD1.5 or SDXL"
                )
            listener.positions = min(both, key=lambda p: abs(p - SIDE**2))
            try:
                height, width = grid(listener.positions, *noise.shape[-2:])
            except ValueError as problem:
                raise ValueError(f"{self.node}: {problem}") from None
            thrifty = blocks_checkpointed(inner.diffusion_model, nullcontext, overheard=True) or nullcontext

            place, offloading = Place(), False

            def maps(z: Tensor) -> Maps:
                with place(), offloaded() if offloading else nullcontext(), thrifty():
                    attend(z)
                cross, own = listener.heard()
                cross = cross[:, self.words.kept]
                return Maps(cross.unflatten(0, (height, width)), own.unflatten(1, (height, width)))

            def better() -> Found:
                before = self.generator.get_state()
                while True:
                    try:
                        return improve(
                            maps, noise, self.words.subjects, self.settings, self.generator, on_iteration=self.report,
                            interrupts=INTERRUPTS, mends=mends,
                        )  # fmt: skip
                    except RuntimeError as problem:
                        if place.is_last or not written_over(problem):
                            raise
                    self.generator.set_state(before)
                    place.go_on()

            def mends(problem: BaseException) -> bool:
                return has_no_repeatable_way(problem) or (not place.is_last and written_over(problem))

            repeating = Repeating(self.node)
            found, cut = repeating(noise.device, lambda: within_memory(better))
            if cut:  # before the first update: nothing is lost, and once more with less
                log.warning("%s: %s: what is kept for the gradient waits in the CPU's memory", self.node, cut)
                offloading = True
                found = repeating(noise.device, better)
            return found
