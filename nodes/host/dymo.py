"""A CFG guider that leans towards a reward at every step: DyMO's preference term."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...rewards.base import Reward
from ...sampler.ending import within_memory
from ...sampler.guidance import lean, within
from ...sampler.memory import offloaded, unlock
from .blocks import block_place, blocks_checkpointed
from .dynamic import static, with_static_networks
from .inference_mode import leave_inference_mode_with, normal
from .kernels import attention_of, pytorch_kernels, training, without_tf32
from .loading import loaded, patcher_of
from .places import Place, gaps_of, written_over
from .repeating import Repeating
from .scoring import decode, fit_for, still

log = logging.getLogger("mira")
T = TypeVar("T")
THRIFTIEST = 2
LOSS_SCALES = (2.0**10, 2.0**5, 1.0)  # of a reward in float16: the first at which its gradient is finite


def share_of_noise(sampling: Any, sigma: Tensor) -> Tensor:
    """(B,) sigmas -> (B,) on the CPU: how much of the noise schedule is to come, 1 at its start and 0 at its end."""

    def time(value: Any) -> Tensor:
        return torch.as_tensor(sampling.timestep(torch.as_tensor(value).float())).float().cpu()

    low, high = time(sampling.sigma_min), time(sampling.sigma_max)
    return ((time(sigma) - low) / (high - low)).clamp(0, 1)


class DyMOGuider(comfy.samplers.CFGGuider):
    """CFG with a step along the reward's gradient in every prediction between `start` and `end`."""

    original_conds: dict
    conds: dict
    model_options: dict

    def __init__(
        self,
        node: str,
        model: ModelPatcher,
        vae: VAE,
        reward: Reward,
        texts: Callable[[Any, int], tuple[list[str], list[str]]],
        scale: float,
        start: float,
        end: float,
    ) -> None:
        """texts(guider, count): what each of so many images is scored against, and notices."""
        self.node, self.texts = node, texts
        patcher = static(model.clone(), f"{self.node}: model")
        self.vae = copy.copy(vae)
        self.vae.patcher = static(vae.patcher, f"{self.node}: vae")
        self.vae.first_stage_model = self.vae.patcher.model
        self.networks = [self.vae.patcher, *(patcher_of(m) for m in reward.modules)]
        super().__init__(patcher)
        self.reward, self.prompts = reward, list[str]()
        self.scale, self.start, self.end = scale, start, end
        self.thrift = 0  # up to THRIFTIEST
        self.place = Place()
        self.repeating = Repeating(self.node)

    def set_conds(self, positive: list, negative: list) -> None:
        super().set_conds(positive, negative)
        self.original_conds = with_static_networks(self.original_conds, self.node)

    def inner_sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        device: torch.device,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if why := self.reward.unfit(len(noise)):
            raise ValueError(f"{self.node}: reward {self.reward.facts.name!r}: {why}")
        if noise.ndim > 5 or (noise.ndim == 5 and noise.shape[2] != 1):
            raise ValueError(f"{self.node}: the latent has shape {tuple(noise.shape)}: it leans to still images only")
        self.prompts, notices = self.texts(self, len(noise))
        for notice in notices:
            log.warning("%s: %s", self.node, notice)
        # ComfyUI has loaded the model in inference mode, where nothing has a gradient; from here on it would want one.
        need = self.inner_model.memory_required([2 * noise.shape[0], *noise.shape[1:]])
        patchers = [self.model_patcher, *self.loaded_models, *self.networks]
        options, wanted = self.model_options, torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with loaded(patchers, 3 * need), training(), torch.set_grad_enabled(wanted):
            leave_inference_mode_with(self, options)
            self.model_options = normal(options)
            try:
                return super().inner_sample(
                    normal(noise), normal(latent_image), device, sampler, normal(sigmas), normal(denoise_mask),
                    *args, **kwargs,
                )  # fmt: skip
            finally:
                self.model_options = options
                unlock()

    @contextmanager
    def _thrifty(self) -> Iterator[None]:
        """After running out of memory: layers are computed again, and at last what is kept waits in the CPU's."""
        with ExitStack() as stack:
            if self.thrift == THRIFTIEST:
                stack.enter_context(offloaded())
            if self.thrift:
                networks = [(n, False) for n in (self.inner_model.diffusion_model, self.vae.first_stage_model)]
                for network, exact in [*networks, *((m, True) for m in self.reward.modules)]:
                    where = partial(block_place, self.thrift == THRIFTIEST, exact)
                    if blocks := blocks_checkpointed(network, where):
                        stack.enter_context(blocks())
            yield

    @contextmanager
    def without_constants(self) -> Iterator[None]:
        """Without what counts as a constant under an optimisation of the noises, so that a gradient can be tested."""
        scale, self.scale = self.scale, 0.0
        try:
            yield
        finally:
            self.scale = scale

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        noise = share_of_noise(self.inner_model.model_sampling, timestep)
        if not within(noise, self.start, self.end).all() or not self.scale:
            return super().predict_noise(x, timestep, model_options or {}, seed)
        options = comfy.model_patcher.create_model_options_clone(model_options or {})
        options["disable_cfg1_optimization"] = True  # the strength is measured by the unconditional prediction
        options.setdefault("transformer_options", {})["optimized_attention_override"] = attention_of(options)
        found: list[Tensor] = []

        def capture(args: dict) -> Tensor:
            found[:] = [args["cond_denoised"] - args["uncond_denoised"]]
            return args["denoised"]

        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", ()), capture]
        denoised, gradient, lengths = self._with_less_and_less(lambda: self._look(x, timestep, options, seed), x.device)
        if not x.requires_grad:
            denoised = denoised.detach()
        name, sigma = self.reward.facts.name, timestep[0].item()
        if not (torch.isfinite(lengths).all() and (lengths > 0).any()):
            raise RuntimeError(f"{self.node}: the gradient of {name} is zero or not finite at sigma {sigma:.3g}")
        if not (lengths > 0).all():
            log.warning(
                "%s: the gradient of %s is zero for some images at sigma %.3g: not guided there",
                self.node,
                name,
                sigma,
            )
        return lean(denoised, gradient, found[0].detach(), self.scale)

    def _look(self, x: Tensor, timestep: Tensor, options: dict, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """(the prediction, the gradient of its reward, its length (B,))."""
        with torch.enable_grad(), pytorch_kernels(), gaps_of(self)(), self.place():
            state = x if x.requires_grad else x.detach().requires_grad_()
            with self._thrifty():
                denoised = super().predict_noise(state, timestep, options, seed)
                latent = self.inner_model.process_latent_out(denoised.float())
                images = still(decode(self.vae, fit_for(self.vae, latent)), self.node)
                self.reward.evaluation(0)  # whatever was scored before
                with without_tf32():
                    # Several particles of the batch may be there at once.
                    total, _ = self.reward(images, self.prompts * (len(images) // len(self.prompts)))
            # Under an optimisation of the noises this term counts as a constant. Its length does not count, but in
            # float16 it would fall below the smallest number, or rise above the largest.
            for scale in LOSS_SCALES:
                again = scale != LOSS_SCALES[-1]
                (gradient,) = torch.autograd.grad(total.sum() * scale, state, retain_graph=again)
                lengths = gradient.float().flatten(1).norm(dim=1)
                if torch.isfinite(lengths).all():
                    break
        return denoised, gradient, lengths

    def _with_less_and_less(self, look: Callable[[], T], device: torch.device) -> T:
        """What `look` finds, in the first place that it can, keeping less whenever the memory is full."""
        while True:
            try:
                result, cut = self.repeating(device, lambda: within_memory(look))
            except RuntimeError as problem:
                if not written_over(problem):
                    raise
                if self.place.is_last:
                    name = type(self.inner_model.diffusion_model).__name__
                    raise RuntimeError(
                        f"{self.node}: {name} has no gradient ({str(problem).splitlines()[0]}): use another "
                        "guider, or bypass what patches the model"
                    ) from problem
                self.place.go_on()
                continue
            if cut is None:
                return result
            if self.thrift == THRIFTIEST:
                if not self.repeating.gives_up(cut.problem):
                    raise cut.problem
                continue
            self.thrift += 1
            log.warning("%s: %s: goes on keeping less for the gradient", self.node, cut)
