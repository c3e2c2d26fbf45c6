"""From a sampled latent to its reward: the decoder and the scorer, which keep as little for backward as a run asks."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy
import torch
from comfy.sd import VAE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ...rewards.base import Reward, of_whole_images
from ...sampler.ending import within_memory
from ...sampler.memory import offloaded, saved_bytes
from ...sampler.optimize import Score
from ...sampler.rollout import Rollout
from .backwards import OwnBackwards
from .blocks import block_place, blocks_checkpointed
from .kernels import without_tf32

T = TypeVar("T")


def decode(vae: VAE, latent: Tensor) -> Tensor:
    """VAE latents (B, C, h, w) -> images (B, 3, H, W), nominally in [0, 1]: not clamped, so that gradients live."""
    # The VAE's own last step is affine but for its clamp: read it off inside the clamp's range.
    zero, half = (vae.process_output(torch.tensor([v])).item() for v in (0.0, 0.5))
    with OwnBackwards() if torch.is_grad_enabled() else nullcontext():
        images = vae.first_stage_model.decode(latent.to(vae.device, vae.vae_dtype)).float()
    return images * (2 * (half - zero)) + zero


def fit_for(vae: Any, latent: Tensor) -> Tensor:
    """Without its frame for a preview decoder of images, as newer hosts take it."""
    return latent[:, :, 0] if latent.ndim == 5 and getattr(vae, "latent_dim", 3) == 2 else latent


def still(images: Tensor, node: str) -> Tensor:
    """What a VAE decodes, (B, 3, H, W) or of one frame, as images (B, 3, H, W). Raises ValueError for anything else."""
    if images.ndim == 5 and images.shape[2] == 1:
        images = images[:, :, 0]
    if images.ndim != 4:
        raise ValueError(f"{node}: the VAE decodes to shape {tuple(images.shape)}: MIRA optimises still images only")
    if images.shape[1] != 3:
        raise ValueError(
            f"{node}: the VAE decodes to {images.shape[1]} channels, but rewards look at red, green and blue: "
            "use a VAE without alpha"
        )
    return images


class Scoring:
    """Decodes and scores for one run.

    node: who asks, for messages. scorer: the run's reward; None where a judge looks at the images. prompts: of every
    image of the batch. latent_out: a sampled latent -> the VAE's. policy: the rollout whose way of keeping less is
    followed.
    """

    def __init__(
        self, node: str, vae: VAE, scorer: Reward | None, prompts: Sequence[str], latent_out: Callable[[Tensor], Tensor]
    ) -> None:
        self.node, self.vae, self.scorer, self.prompts, self.latent_out = node, vae, scorer, prompts, latent_out
        self.policy: Rollout  # once there is one
        self.evaluations = 0
        self.layers: dict[nn.Module, Callable | None] = {}  # of the VAE and the reward: how they checkpoint their own
        self._decode_as_fits, self._score_as_fits = AsFits(), AsFits()
        self.tiled = False  # whether an image was decoded so, for want of memory
        self.redraw = True  # a reward that draws random numbers draws new ones at every evaluation

    def end(self) -> None:
        """Let go of what holds the run in turn."""
        vars(self).pop("policy", None)
        self.layers.clear()

    @property
    def _keep(self) -> bool:
        return self.policy.memory in ("none", "auto") or not torch.is_grad_enabled()

    def _thrifty(self, module: nn.Module, exact: bool = False) -> AbstractContextManager | None:
        """Where `module` keeps less for its backward, layer by layer; None where it has no layers, or all is kept.

        exact: see `block_place`.
        """
        if self._keep:
            return None
        if module not in self.layers:
            self.layers[module] = blocks_checkpointed(module, lambda: block_place(self.policy.score_offloaded, exact))
        if not (blocks := self.layers[module]):
            return None
        stack = ExitStack()
        if self.policy.score_offloaded:
            stack.enter_context(offloaded())
        stack.enter_context(blocks())
        return stack

    def render(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) as sampled, or of one frame, -> images (B, 3, H, W), nominally in [0, 1]."""
        latent = fit_for(self.vae, self.latent_out(x0.float()))
        thrifty = self._thrifty(self.vae.first_stage_model)
        if not torch.is_grad_enabled():
            images = self._decode(latent)
        elif self._keep or thrifty:
            with thrifty or nullcontext():
                images = decode(self.vae, latent)
        else:
            images = checkpoint(lambda z: decode(self.vae, z), latent, use_reentrant=False, preserve_rng_state=False)
        return still(images, self.node).to(x0.device)

    def _decode(self, latent: Tensor) -> Tensor:
        """Without a gradient: all at once, or as many as fit, and at last one in tiles, as VAE Decode does."""

        def in_tiles(one: Tensor) -> Tensor:
            self.tiled = True
            if one.ndim == 4:
                return self.vae.decode_tiled_(one)
            tile = 256 // self.vae.spacial_compression_decode()
            if getattr(self.vae, "handles_tiling", False):
                return self.vae._decode_tiled_owned(one, tile_x=tile, tile_y=tile, overlap=tile // 4)
            return self.vae.decode_tiled_3d(one, tile_x=tile, tile_y=tile, overlap=(1, tile // 4, tile // 4))

        found = self._decode_as_fits(functools.partial(decode, self.vae), latent, alone=in_tiles)
        return found[0] if len(found) == 1 else torch.cat(found)

    def score_bytes(self, x: Tensor, most: float) -> float:
        """What decoding and reward of such a latent keep for their backward pass."""
        if self.scorer is None:
            return 0.0  # a judge that nothing flows through
        before, self.redraw = self.redraw, False
        try:
            return saved_bytes(lambda x0: self.score(x0), x, most)
        finally:
            self.redraw = before

    def score(self, x0: Tensor) -> Score:
        images = self.render(x0)
        total, parts = self.reward(images)
        total = total.to(x0.device, torch.float32)
        return Score(total, {k: p.detach().float() for k, p in parts.items()}, images.detach())

    def reward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the rewards (B,), their parts)."""
        total, parts = self._reward(images)
        return of_whole_images(total, images), parts

    def _reward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.scorer is not None  # where a judge looks at the images nobody asks
        self.scorer.evaluation(self.evaluations)
        self.evaluations += self.redraw
        prompts = list(self.prompts) * (len(images) // max(1, len(self.prompts)))  # one round for every particle
        if torch.is_grad_enabled():
            return self._reward_whole(self.scorer, images, prompts)
        found = self._score_as_fits(functools.partial(self._reward_whole, self.scorer), images, prompts)
        if len(found) == 1:
            return found[0]
        totals, parts = zip(*found, strict=True)
        return torch.cat(totals), {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _reward_whole(self, scorer: Reward, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        keep = self._keep
        # Layer by layer where a network has layers: less is kept, and recomputed once only.
        layers = [] if keep else [self._thrifty(m, exact=True) for m in scorer.modules]
        with without_tf32():
            if keep or any(layers):
                with ExitStack() as stack:
                    for thrifty in filter(None, layers):
                        stack.enter_context(thrifty)
                    return scorer(images, prompts)

            drawing = as_drawn_before()

            def evaluate(images: Tensor) -> tuple:
                with without_tf32(), drawing():
                    return scorer(images, prompts)

            # Computed again to its end, too: PyTorch would break off by an exception, in somebody's own code.
            with set_checkpoint_early_stop(False):
                return checkpoint(evaluate, images, use_reentrant=False)


def as_drawn_before() -> Callable[[], AbstractContextManager]:
    """A context in which Python and NumPy draw, from the second time on, what they drew in the first: PyTorch keeps its
    own state for what is computed again.
    """
    before: list[tuple] = []

    @contextmanager
    def drawing() -> Iterator[None]:
        now = random.getstate(), numpy.random.get_state()
        if not before:
            before.append(now)
            yield
            return
        random.setstate(before[0][0])
        numpy.random.set_state(before[0][1])
        try:
            yield
        finally:
            random.setstate(now[0])
            numpy.random.set_state(now[1])

    return drawing


class AsFits:
    """Work on a batch of tensors, in parts as small as memory asks for; what did not fit once is not tried again."""

    def __init__(self) -> None:
        self.most: dict[torch.Size, int] = {}  # that fit, by the size of one

    def __call__(self, work: Callable[..., T], *batch: Any, alone: Callable[..., T] | None = None) -> list[T]:
        """[work(*batch)], or what it gives of halves of the batch; where one of it does not fit either, `alone` of
        that, or the error.
        """
        count, size = len(batch[0]), batch[0].shape[1:]
        if count <= self.most.get(size, count):
            found, cut = within_memory(work, *batch)
            if cut is None:
                return [found]
            if count == 1 and alone is None:
                raise cut.problem
            self.most[size] = (count + 1) // 2 if count > 1 else 0
        if count == 1 and alone is not None:
            return [alone(*batch)]
        half = (count + 1) // 2
        halves = [b[:half] for b in batch], [b[half:] for b in batch]
        return [value for some in halves for value in self(work, *some, alone=alone)]
