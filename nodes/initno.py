"""An initial noise to which the prompt's subjects answer: InitNO as a node that makes NOISE."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor, nn

from ..sampler.ending import within_memory
from ..sampler.initno import Found, Maps, Settings, improve
from ..sampler.memory import offloaded, unlock
from ..sampler.seeds import stream
from .host import INTERRUPTS, samples_of
from .host.dynamic import static
from .host.grad import (
    PLACES,
    Repeating,
    blocks_checkpointed,
    has_no_repeatable_way,
    leave_inference_mode_with,
    loaded,
    normal,
    pytorch_kernels,
    sdpa,
    training,
    written_over,
)
from .shared import memo
from .shared.checks import check_links, check_places, check_values
from .shared.inputs import seed_input
from .shared.job import ksampler_noise
from .shared.types import aliases

DEFAULT = Settings()
SIDE = 16  # of the attention maps that are looked at: the nearest that a model has
log = logging.getLogger("mira")


@dataclass
class MadeNoise:
    """ComfyUI's NOISE: noise that was made for one latent."""

    seed: int
    noise: Tensor

    def generate_noise(self, input_latent: dict) -> Tensor:
        samples = input_latent["samples"]
        if samples.shape != self.noise.shape:
            raise ValueError(
                f"{MiraInitNONoise.NAME}: its noise is of shape {tuple(self.noise.shape)}, but latent_image is of "
                f"{tuple(samples.shape)}: give the same latent_image to both nodes"
            )
        return self.noise


@dataclass(frozen=True)
class Words:
    """Where a text's tokens are in its encoding. subjects: of each, as indices of `kept`. kept: all of the `tokens` but
    those that begin and end a chunk of the text."""

    subjects: list[list[int]]
    kept: list[int]
    tokens: int


def locate(clip: Any, prompt: str, words: Sequence[str]) -> Words:
    """Raises ValueError for a word that the prompt does not have."""

    def chunks(text: str) -> list[list]:
        tokens = next(iter(clip.tokenize(text).values()))
        return [[token[0] if isinstance(token[0], int) else None for token in chunk] for chunk in tokens]

    encoded, empty = chunks(prompt), Counter(chunks("")[0])
    ids = [token for chunk in encoded for token in chunk[1:-1]]
    starts = [sum(map(len, encoded[:n])) for n in range(len(encoded))]
    kept = [start + n for start, chunk in zip(starts, encoded, strict=True) for n in range(1, len(chunk) - 1)]
    subjects = []
    for word in words:
        wanted = [token for chunk in chunks(word) for token in chunk if token not in empty]
        where = [n for n in range(len(ids)) if wanted and ids[n : n + len(wanted)] == wanted]
        if not where or None in wanted:
            raise ValueError(
                f"{MiraInitNONoise.NAME}: words has {word!r}, which is not in the prompt {prompt!r}: write it as there"
            )
        subjects.append(list(range(where[0], where[0] + len(wanted))))
    return Words(subjects, kept, sum(map(len, encoded)))


def grid(positions: int, height: int, width: int) -> tuple[int, int]:
    """The sides of the level of a UNet that has so many positions; it halves a latent's sides and rounds up."""
    while height * width > positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != positions:
        raise ValueError(
            f"{MiraInitNONoise.NAME}: attention over {positions} positions is no level of the model's: unpatch the "
            "model"
        )
    return height, width


class _Listener:
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


class _Attending(comfy.samplers.Sampler):
    """Where ComfyUI samples one image, makes its noise better instead. Afterwards: `found`."""

    def __init__(self, words: Words, settings: Settings, generator: torch.Generator, report: Callable) -> None:
        self.words, self.settings, self.generator, self.report = words, settings, generator, report
        self.found: Found | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor = None,
        denoise_mask: Tensor = None,
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
        listener = _Listener(self.words.tokens)

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
                    f"{MiraInitNONoise.NAME}: a patch of model runs another network than its {name}: connect it "
                    "unpatched"
                )
            if not both:
                raise ValueError(
                    f"{MiraInitNONoise.NAME}: {name} has no cross-attention on the prompt's {self.words.tokens} "
                    "tokens: use a model with a UNet, such as SD1.5 or SDXL"
                )
            listener.positions = min(both, key=lambda p: abs(p - SIDE**2))
            height, width = grid(listener.positions, *noise.shape[-2:])
            thrifty = blocks_checkpointed(inner.diffusion_model, nullcontext, overheard=True) or nullcontext

            place, offloading = 0, False

            def maps(z: Tensor) -> Maps:
                with PLACES[place](), offloaded() if offloading else nullcontext(), thrifty():
                    attend(z)
                cross, own = listener.heard()
                cross = cross[:, self.words.kept]
                return Maps(cross.unflatten(0, (height, width)), own.unflatten(1, (height, width)))

            def better() -> Found:
                nonlocal place
                before = self.generator.get_state()
                while True:
                    try:
                        return improve(
                            maps, noise, self.words.subjects, self.settings, self.generator, on_iteration=self.report,
                            interrupts=INTERRUPTS, mends=mends,
                        )  # fmt: skip
                    except RuntimeError as problem:
                        if place == len(PLACES) - 1 or not written_over(problem):
                            raise
                    self.generator.set_state(before)
                    place += 1

            def mends(problem: BaseException) -> bool:
                return has_no_repeatable_way(problem) or (place < len(PLACES) - 1 and written_over(problem))

            repeating = Repeating(MiraInitNONoise.NAME)
            found, cut = repeating(noise.device, lambda: within_memory(better))
            if cut:  # before the first update: nothing is lost, and once more with less
                log.warning(
                    "%s: %s: what is kept for the gradient waits in the CPU's memory", MiraInitNONoise.NAME, cut
                )
                offloading = True
                found = repeating(noise.device, better)
            return found


class MiraInitNONoise(io.ComfyNode):
    NAME = "MIRA InitNO Noise"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraInitNONoise",
            **aliases("noise", "attend and excite", "missing subject"),
            display_name=cls.NAME,
            category="MIRA Alignment/sampling",
            description=(
                "A seed's noise, made better before anything is sampled: to the model's attention every named subject "
                "of the prompt is there, and in a place of its own (InitNO). For SamplerCustomAdvanced, or to "
                "optimise from. Models with a UNet."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The one that will sample, unpatched: its attention is looked at."),
                io.Clip.Input("clip", tooltip="The model's own: it encodes the prompt, and tells where its words are."),
                io.Latent.Input("latent_image", tooltip="As the sampler gets it: the noise is made for its shape."),
                io.Sigmas.Input("sigmas", tooltip="As the sampler gets them: the first one tells how noisy it begins."),
                io.String.Input("prompt", multiline=True, default="", tooltip="As the sampler's positive prompt."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="The subjects, as the prompt writes them, with commas between: cat, red car.",
                ),
                seed_input("Of the noise to begin with (RandomNoise's), and of what the sampler injects."),
                io.Int.Input(
                    "rounds",
                    default=DEFAULT.rounds,
                    min=1,
                    max=100,
                    tooltip="How many noises to try, ten updates each; the best one gets the iterations.",
                ),
                io.Int.Input(
                    "iterations",
                    default=DEFAULT.iterations,
                    min=0,
                    max=1000,
                    tooltip="Updates of the best noise; each costs about two steps of a sample. 0 only chooses.",
                ),
                io.Float.Input(
                    "response",
                    default=DEFAULT.response,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Good is below: 1 less the attention to the subject that is answered least.",
                ),
                io.Float.Input(
                    "conflict",
                    default=DEFAULT.conflict,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Good is below: how much the subjects' places attend to the same. Of several subjects.",
                ),
            ],
            outputs=[
                io.Noise.Output(
                    "noise", display_name="noise", tooltip="For SamplerCustomAdvanced, or an optimising node."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="How well every word was seen, before and after."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return memo.cuts(inputs)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: Any,
        latent_image: dict,
        sigmas: Tensor,
        prompt: str,
        words: str,
        seed: int,
        rounds: int,
        iterations: int,
        response: float,
        conflict: float,
    ) -> io.NodeOutput:
        check_links(cls.NAME, model=model, clip=clip, latent_image=latent_image, sigmas=sigmas)
        numbers = dict(seed=seed, rounds=rounds, iterations=iterations, response=response, conflict=conflict)
        check_values(cls.NAME, cls.define_schema().inputs, dict(prompt=prompt, words=words) | numbers)
        check_places(cls.NAME, "latent_image", latent_image)
        names = [w.strip() for w in words.split(",") if w.strip()]
        if not names:
            raise ValueError(f"{cls.NAME}: words is empty: name the subjects of the prompt, such as: cat, red car")
        if not len(sigmas) or not sigmas[0] > 0:
            raise ValueError(f"{cls.NAME}: sigmas has no step that begins with noise: connect the sampler's own")
        samples = samples_of(model, latent_image)
        if samples.numel() == 0 or samples.ndim != 4:
            raise ValueError(
                f"{cls.NAME}: latent_image is of shape {tuple(samples.shape)}: give (B, C, H, W), and B not 0"
            )
        if "noise_mask" in latent_image:
            raise ValueError(
                f"{cls.NAME}: latent_image has a mask, and a subject would be looked for outside of it too: "
                "connect the latent without it here, and with it to the sampler"
            )
        where = locate(clip, prompt, names)
        settings = Settings(rounds, iterations, response, conflict)
        noise = ksampler_noise(samples, latent_image)(seed)
        places = latent_image.get("batch_index", range(len(noise)))
        evaluations = settings.evaluations
        bar = comfy.utils.ProgressBar(len(noise) * evaluations)
        made, lines = [], []
        guider = comfy.samplers.CFGGuider(static(model, f"{cls.NAME}: model"))
        guider.set_conds(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)), [])
        guider.set_cfg(1.0)  # the authors look at the conditional prediction
        for b in range(len(noise)):
            done = iter(range(b * evaluations + 1, (b + 1) * evaluations + 1))

            def report(*_: Any, done: Iterator[int] = done) -> None:
                bar.update_absolute(next(done, bar.current))

            attending = _Attending(where, settings, stream(seed, int(places[b])), report)
            guider.sample(noise[b : b + 1], samples[b : b + 1], attending, sigmas, disable_pbar=True, seed=seed)
            found = attending.found
            made.append(found.noise.cpu())
            lines.append(described(b, found))
            if found.cut_short:
                asked = {"prompt": prompt, "words": words, "seed": seed, "rounds": rounds, "iterations": iterations}
                memo.ask_again(asked | {"response": response, "conflict": conflict})
                made += list(noise[b + 1 :].split(1))
                log.warning("%s: %s", cls.NAME, found.reason)
                break
        return io.NodeOutput(MadeNoise(seed, torch.cat(made)), "\n".join(lines))


def described(image: int, found: Found) -> str:
    _, _, *before = found.rows[0]
    number, k, *after = found.rows[found.best]
    return (
        f"image {image}: response {before[0]:.3f} to {after[0]:.3f}, conflict {before[1]:.3f} to {after[1]:.3f} "
        f"(noise {number + 1}, iteration {k}, of {len(found.rows)} evaluations; {found.reason})"
    )
