"""An initial noise to which the prompt's subjects answer: InitNO as a node that makes NOISE."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..sampler.initno import Found, Settings
from ..sampler.seeds import stream
from .host import samples_of
from .host.attention import Attending, Words
from .host.dynamic import static
from .host.generators import seed_generators
from .shared import memo
from .shared.checks import check_links, check_places, check_values
from .shared.inputs import seed_input
from .shared.job import ksampler_noise
from .shared.types import aliases

DEFAULT = Settings()
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
        seed_generators(samples, self.seed, input_latent.get("batch_index"))
        return self.noise.clone()  # a patch may write into it


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

            attending = Attending(cls.NAME, where, settings, stream(seed, int(places[b])), report)
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
