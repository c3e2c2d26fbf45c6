"""Scores of finished images, and their order: Best-of-N is a batch, these two nodes, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..rewards.base import Reward
from .editor.live import text_output
from .shared.checks import check_links, check_places, check_reward, check_values, spoken
from .shared.images import to_core
from .shared.scores import score_images
from .shared.types import MiraReward, aliases


def table(reward: Reward, total: Tensor, parts: dict[str, Tensor], notices: list[str]) -> str:
    """The scores as text, a line per image, with where ordinary images lie."""
    lines = [f"{reward.facts.name} ({reward.facts.describe()})"]
    for i, score in enumerate(total.tolist()):
        inner = "" if len(parts) < 2 else "   " + ", ".join(f"{n} {p[i].item():.4g}" for n, p in parts.items())
        lines.append(f"{i}: {score:.5g}{inner}")
    return "\n".join([*lines, *notices])


class MiraScoreImages(io.ComfyNode):
    NAME = "MIRA Score Images"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraScoreImages",
            **aliases("score", "rate", "aesthetic score", "evaluate"),
            display_name=cls.NAME,
            category="MIRA Alignment/scores",
            description="The absolute score of every image, with the range that is typical of the reward.",
            inputs=[
                io.Image.Input("images", tooltip="A batch, or a list of batches."),
                MiraReward.Input("reward", tooltip="By which the images are scored."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For rewards that compare image and prompt: one for all, or a list with one per image.",
                ),
            ],
            outputs=[
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="One per image."),
                io.String.Output("text", display_name="text", tooltip="The same for people."),
            ],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: list[Tensor], reward: Any, prompt: Sequence[str] = ("",)) -> io.NodeOutput:
        if len(reward) != 1:
            raise ValueError(f"{cls.NAME}: reward is a list of {len(reward)}: connect one, or a node for each")
        (reward,) = reward
        check_reward(cls.NAME, reward)
        if not images:
            raise ValueError(f"{cls.NAME}: images is an empty list: connect some")
        batches = [to_core(batch, f"{cls.NAME}: images") for batch in images]
        count = sum(len(batch) for batch in batches)
        if wrong := [p for p in prompt if not isinstance(p, str)]:
            raise ValueError(f"{cls.NAME}: prompt is a {type(wrong[0]).__name__}: give it a text")
        prompts = [spoken(p) for p in (list(prompt) * count if len(prompt) == 1 else prompt)]  # as the samplers do
        if len(prompts) != count:
            raise ValueError(f"{cls.NAME}: {len(prompts)} prompts for {count} images: give one, or one per image")
        if reward.facts.needs_prompt and not all(p.strip() for p in prompts):
            raise ValueError(
                f"{cls.NAME}: reward {reward.facts.name!r} compares image and prompt, but prompt is empty: give it"
            )
        for batch in batches:
            if why := reward.unfit(len(batch)):
                raise ValueError(f"{cls.NAME}: reward {reward.facts.name!r}: {why}")
        reward.evaluation(0)
        scored, start = [], 0
        for batch in batches:  # images of one batch have one size, batches need not
            scored.append(score_images(reward, batch, prompts[start : start + len(batch)]))
            start += len(batch)
        total = torch.cat([t for t, _ in scored])
        parts = {name: torch.cat([p[name] for _, p in scored]) for name in scored[0][1]}
        text = table(reward, total, parts, reward.notices(prompts))
        return io.NodeOutput(total.tolist(), text, ui=text_output(text, mira_scores=total.tolist()))


class MiraRankImages(io.ComfyNode):
    NAME = "MIRA Rank Images"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraRankImages",
            **aliases("best of n", "sort images", "pick best"),
            display_name=cls.NAME,
            category="MIRA Alignment/scores",
            description="The batch in the order of its scores, the best first, and only the best few if you like.",
            inputs=[
                io.Image.Input("images", tooltip="The batch that was scored."),
                io.Float.Input("scores", force_input=True, tooltip="From MIRA Score Images, one per image."),
                io.Int.Input("top_k", default=1, min=1, max=4096, tooltip="How many to keep."),
                io.Latent.Input("latents", optional=True, tooltip="The images' own, to be sorted and kept with them."),
                io.Mask.Input("masks", optional=True, tooltip="Likewise, one for each image."),
            ],
            outputs=[
                io.Image.Output("ranked", display_name="images", tooltip="The best first."),
                io.Float.Output("ranked_scores", display_name="scores", is_output_list=True, tooltip="Theirs."),
                io.Int.Output(
                    "indices", display_name="indices", is_output_list=True, tooltip="Where they were, from 0 on."
                ),
                io.Latent.Output("ranked_latents", display_name="latents", tooltip="If latents are connected."),
                io.Mask.Output("ranked_masks", display_name="masks", tooltip="If masks are connected."),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, images: list, scores: list, top_k: list, latents: list | None = None, masks: list | None = None
    ) -> io.NodeOutput:
        if (
            not images
            or not all(torch.is_tensor(batch) for batch in images)
            or not all(isinstance(s, (int, float)) for s in scores)
        ):
            raise ValueError(f"{cls.NAME}: connect an IMAGE, and the scores that MIRA Score Images gave of it")
        if unknown := [i for i, s in enumerate(scores) if not math.isfinite(s)]:
            raise ValueError(f"{cls.NAME}: scores {unknown} are no numbers: look at the reward that gave them")
        if len(top_k) != 1:
            raise ValueError(f"{cls.NAME}: top_k has {len(top_k)} values: all images are ranked together, so give one")
        check_values(cls.NAME, [i for i in cls.define_schema().inputs if i.id == "top_k"], {"top_k": top_k[0]})
        for mask in masks or ():
            check_links(cls.NAME, masks=mask)
        for latent in latents or ():
            check_links(cls.NAME, latents=latent)
        sizes = {tuple(batch.shape[1:]) for batch in images}
        if len(sizes) != 1:
            raise ValueError(f"{cls.NAME}: images have sizes {sorted(sizes)}, which make no batch; resize them first")
        batch = torch.cat(list(images))
        if len(scores) != len(batch):
            raise ValueError(
                f"{cls.NAME}: {len(scores)} scores for {len(batch)} images: connect the scores of the same"
            )
        order = sorted(range(len(batch)), key=lambda i: -scores[i])[: top_k[0]]  # equal scores keep their order
        return io.NodeOutput(
            batch[order],
            [scores[i] for i in order],
            order,
            ExecutionBlocker(f"{cls.NAME}: connect latents, to have them sorted")
            if latents is None
            else sorted_latents(latents, order, len(batch)),
            ExecutionBlocker(f"{cls.NAME}: connect masks, to have them sorted")
            if masks is None
            else of_all(masks, len(batch), "masks")[order],
        )


def of_all(batches: list, count: int, what: str) -> torch.Tensor:
    """One tensor of what belongs to `count` images. Raises ValueError where it does not."""
    shapes = {tuple(batch.shape[1:]) for batch in batches}
    found = sum(len(batch) for batch in batches)
    if len(shapes) != 1 or found != count:
        said = f"sizes {sorted(shapes)}" if len(shapes) > 1 else f"{found} of them"
        raise ValueError(f"{MiraRankImages.NAME}: {what} has {said}, for {count} images: connect those of the same")
    return torch.cat(list(batches))


def sorted_latents(latents: list, order: list[int], count: int) -> dict:
    """A LATENT of those at `order`, with their masks and places in a batch."""
    out: dict = {"samples": of_all([latent["samples"] for latent in latents], count, "latents")[order]}
    masks, places = [], []
    for latent in latents:
        size, mask = len(latent["samples"]), latent.get("noise_mask")
        masks += [] if mask is None else [mask.expand(size, *mask.shape[1:]) if len(mask) == 1 else mask]
        check_places(MiraRankImages.NAME, "latents", latent)
        places += list(latent.get("batch_index", range(size)))[:size]
    if masks:
        out["noise_mask"] = of_all(masks, count, "the latents' noise_mask")[order]
    if any("batch_index" in latent for latent in latents):
        out["batch_index"] = [places[i] for i in order]
    return out
