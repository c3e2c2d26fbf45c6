"""An initial noise to which the prompt's subjects answer: InitNO as a node that makes NOISE."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..sampler.initno import Found, Maps, Settings, improve
from ..sampler.seeds import stream
from .grad import blocks_checkpointed, frozen, leave_inference_mode, normal, sdpa, static, training
from .host import INTERRUPTS

NODE = "MIRA InitNO Noise"
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
                f"{NODE}: its noise is of shape {tuple(self.noise.shape)}, but latent_image is of "
                f"{tuple(samples.shape)}: give the same latent_image to both nodes"
            )
        return self.noise


def places(clip, prompt: str, words: Sequence[str]) -> tuple[list[list[int]], int]:
    """(where the tokens of each word are in the encoded prompt, how many tokens it has). Raises ValueError."""

    def numbers(text: str) -> list[int]:
        chunks = next(iter(clip.tokenize(text).values()))
        return [token[0] if isinstance(token[0], int) else -1 for chunk in chunks for token in chunk]

    ids, empty = numbers(prompt), Counter(numbers(""))
    found = []
    for word in words:
        wanted = [t for t in numbers(word) if t not in empty]
        starts = [n for n in range(len(ids)) if wanted and ids[n : n + len(wanted)] == wanted]
        if not starts:
            raise ValueError(f"{NODE}: words has {word!r}, which is not in the prompt {prompt!r}: write it as there")
        found.append(list(range(starts[0], starts[0] + len(wanted))))
    return found, len(ids)


def grid(positions: int, height: int, width: int) -> tuple[int, int]:
    """The sides of the level of a UNet that has so many positions; it halves a latent's sides and rounds up."""
    while height * width > positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != positions:
        raise ValueError(f"{NODE}: attention over {positions} positions is no level of the model's: unpatch the model")
    return height, width


class _Listener:
    """Hears the queries and keys of a UNet's attention: its probabilities at one resolution, or which there are.

    By hooks on the projections, which every version of ComfyUI has, and which run whatever patches the attention.
    """

    def __init__(self, tokens: int):
        self.tokens, self.positions = tokens, 0
        self.seen: set[tuple[str, int]] = set()
        self.forget()

    def forget(self) -> None:
        self.maps: dict[str, list[Tensor]] = {"cross": [], "own": []}

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Must last until after backward: blocks that are recomputed there are heard again."""
        handles = []
        for module in network.modules():
            if all(hasattr(module, name) for name in ("to_q", "to_k", "heads")):
                of_this = []
                handles.append(module.to_q.register_forward_hook(partial(self._query, of_this)))
                handles.append(module.to_k.register_forward_hook(partial(self._key, of_this, module.heads)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _query(self, of_this: list, module, inputs, q: Tensor) -> None:
        of_this[:] = [q]

    def _key(self, of_this: list, heads: int, module, inputs, k: Tensor) -> None:
        q = of_this.pop()
        kind = {self.tokens: "cross", q.shape[1]: "own"}.get(k.shape[1])
        if kind:
            self.seen.add((kind, q.shape[1]))
            if q.shape[1] == self.positions:
                self.maps[kind].append(probabilities(q, k, heads))

    def heard(self) -> tuple[Tensor, Tensor]:
        """(cross (positions, tokens), own (positions, positions)), the mean over layers."""
        return tuple(torch.stack(self.maps[kind]).mean(0) for kind in ("cross", "own"))


def probabilities(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """(positions, keys): the mean over heads of the only image."""
    q, k = (t[0].float().unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k))
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)


class _Attending(comfy.samplers.Sampler):
    """Where ComfyUI samples one image, makes its noise better instead. Afterwards: `found`."""

    def __init__(self, subjects, tokens: int, settings: Settings, seed: int, report):
        self.subjects, self.tokens, self.settings = subjects, tokens, settings
        self.seed, self.report = seed, report
        self.found: Found | None = None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, _=False):
        inner = model_wrap.inner_model
        patchers = [model_wrap.model_patcher, *model_wrap.loaded_models]
        need = 3 * inner.memory_required([2, *noise.shape[1:]])
        comfy.model_management.load_models_gpu(patchers, memory_required=need, force_full_load=True)
        for patcher in patchers:
            leave_inference_mode(patcher.model)
        full, sigma = self.max_denoise(model_wrap, sigmas), sigmas[:1].to(noise)

        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        options.setdefault("transformer_options", {})["optimized_attention_override"] = sdpa
        listener = _Listener(self.tokens)

        def attend(z: Tensor) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            listener.forget()  # also what the last backward recomputed
            x = inner.model_sampling.noise_scaling(sigma[0], z, latent_image, full)
            model_wrap(x, sigma, **{**extra_args, "model_options": options})

        with frozen([p.model for p in patchers]), listener.on(inner.diffusion_model):
            with torch.no_grad():
                attend(noise)
            both = [p for kind, p in listener.seen if kind == "cross" and ("own", p) in listener.seen]
            if not both:
                raise ValueError(
                    f"{NODE}: {type(inner.diffusion_model).__name__} has no cross-attention on the prompt's "
                    f"{self.tokens} tokens: use a model with a UNet, such as SD1.5 or SDXL"
                )
            listener.positions = min(both, key=lambda p: abs(p - SIDE**2))
            height, width = grid(listener.positions, *noise.shape[-2:])
            thrifty = blocks_checkpointed(inner.diffusion_model, nullcontext) or nullcontext

            def maps(z: Tensor) -> Maps:
                with thrifty():
                    attend(z)
                cross, own = listener.heard()
                return Maps(cross.unflatten(0, (height, width)), own.unflatten(1, (height, width)))

            self.found = improve(
                maps, noise, self.subjects, self.settings, stream(self.seed, 0), on_iteration=self.report,
                interrupts=INTERRUPTS,
            )  # fmt: skip
        return noise


class MiraInitNONoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MiraInitNONoise",
            display_name=NODE,
            category="MIRA/sampling",
            description=(
                "A seed's noise, made better before anything is sampled: to the model's attention every named subject "
                "of the prompt is there, and in a place of its own (InitNO). For SamplerCustomAdvanced, or to "
                "optimise from. Models with a UNet."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip", tooltip="The model's own: it encodes the prompt, and tells where its words are."),
                io.Latent.Input("latent_image", tooltip="As the sampler gets it: the noise is made for its shape."),
                io.Sigmas.Input("sigmas", tooltip="As the sampler gets them: the first one tells how noisy it begins."),
                io.String.Input("prompt", multiline=True, default="", tooltip="As the sampler's positive prompt."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="The subjects, as the prompt writes them, with commas between: cat, red car.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise to begin with (RandomNoise's), and of what the sampler injects.",
                ),
                io.Int.Input(
                    "rounds",
                    default=DEFAULT.rounds,
                    min=1,
                    max=100,
                    tooltip="How many noises to try: one that does not become good is followed by another.",
                ),
                io.Int.Input(
                    "iterations",
                    default=DEFAULT.iterations,
                    min=0,
                    max=1000,
                    tooltip="Updates of each; one costs one to two steps of a sample. 0 only chooses among the noises.",
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
                io.Noise.Output("noise", display_name="noise"),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, latent_image, sigmas, prompt, words, seed, rounds, iterations, response, conflict
    ) -> io.NodeOutput:
        names = [w.strip() for w in words.split(",") if w.strip()]
        if not names:
            raise ValueError(f"{NODE}: words is empty: name the subjects of the prompt, such as: cat, red car")
        if not len(sigmas) or not sigmas[0] > 0:
            raise ValueError(f"{NODE}: sigmas has no step that begins with noise: connect the sampler's own")
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        if samples.numel() == 0 or samples.ndim != 4:
            raise ValueError(f"{NODE}: latent_image is of shape {tuple(samples.shape)}: give (B, C, H, W), and B not 0")
        subjects, tokens = places(clip, prompt, names)
        settings = Settings(rounds, iterations, response, conflict)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        bar = comfy.utils.ProgressBar(len(noise) * rounds * (iterations + 1))
        made, lines = [], []
        with torch.inference_mode(False), torch.enable_grad(), training():
            guider = comfy.samplers.CFGGuider(static(model))
            guider.set_conds(normal(clip.encode_from_tokens_scheduled(clip.tokenize(prompt))), [])
            guider.set_cfg(1.0)  # the authors look at the conditional prediction
            guider.model_options = normal(guider.model_options)
            for b in range(len(noise)):
                before = b * rounds * (iterations + 1)

                def report(number: int, k: int, *_, before=before) -> None:
                    bar.update_absolute(before + number * (iterations + 1) + k + 1)

                attending = _Attending(subjects, tokens, settings, seed + b, report)
                given, latent = normal(noise[b : b + 1]), normal(samples[b : b + 1])
                guider.sample(given, latent, attending, normal(sigmas), disable_pbar=True, seed=seed)
                found = attending.found
                made.append(found.noise.cpu())
                lines.append(described(b, found))
                if found.cut_short:
                    made += list(normal(noise[b + 1 :]).split(1))
                    break
        log.info("%s: %s", NODE, " ".join(lines))
        return io.NodeOutput(MadeNoise(seed, torch.cat(made)), "\n".join(lines))


def described(image: int, found: Found) -> str:
    _, _, *before = found.rows[0]
    number, k, *after = found.rows[found.best]
    return (
        f"image {image}: response {before[0]:.3f} to {after[0]:.3f}, conflict {before[1]:.3f} to {after[1]:.3f} "
        f"(noise {number + 1}, iteration {k}, of {len(found.rows)} evaluations; {found.reason})"
    )
