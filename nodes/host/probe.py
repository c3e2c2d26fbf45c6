"""Can a sampler's trajectory be optimised? Found by running it on a toy, not by its name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from .inference_mode import leave_inference_mode
from .replay import ReplaySampler
from .samplers import StandIn, Twins

LENGTHS = (1e-2, 1e-3)  # of a finite difference, in lengths of the state
SLOPE_APART = 1e-2  # how far, relative, a gradient may be off from the best of them


def why_not_differentiable(sampler: Any, model_sampling: Any) -> str | None:
    """Run the sampler's twin on a toy model for three steps: None, or why its trajectory cannot be optimised."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        if isinstance(sampler, ReplaySampler):
            return "it gives noises that were found before: connect the stock sampler, and keep `noise`"
        return f"{type(sampler).__name__} is not a k-diffusion sampler"
    with _toy(sampler, model_sampling, gradient=True) as (run, x, _):
        return _try_on_a_toy(run, x)


def injects_noise(sampler: Any, model_sampling: Any) -> bool:
    """Whether noise beyond the initial one changes what the sampler gives. (Some draw it, and take none of it.)"""
    with _toy(sampler, model_sampling) as (run, x, _):
        noises: list = []
        out = run(x, noises)
        return not torch.equal(run(x, [z + 1 for z in noises], replay=True), out)


def begins_anew(sampler: Any, model_sampling: Any) -> bool:
    """Whether a step of the sampler takes nothing of the noise before it but by way of the network (lcm).

    Where the network counts as a constant (`gradient_steps`), no gradient comes to the noises before it then.
    """
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        return False
    with _toy(sampler, model_sampling, gradient=True, constant=True) as (run, x, sigmas):
        leaf = x.clone().requires_grad_()
        try:
            out = run(leaf, [], sigmas=sigmas[:2])
        except (AttributeError, IndexError, RuntimeError):
            return False  # it needs more than two noise levels, or more of ComfyUI than the toy has
        if not out.requires_grad:
            return True
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        return not gradient.abs().sum() > 0


def goes_in_pieces(sampler: Any, model_sampling: Any) -> bool:
    """Whether the sampler's steps one by one give what it gives at once: not where it remembers earlier ones."""
    with _toy(sampler, model_sampling) as (run, x, sigmas):
        noises: list = []
        whole = run(x, noises)
        rest = iter(noises)
        try:
            for step in sigmas.unfold(0, 2, 1):
                x = run(x, rest, replay=True, sigmas=step)
        except StopIteration:
            return False
        return next(rest, None) is None and torch.allclose(x, whole, rtol=1e-4, atol=1e-5)


@contextmanager
def _toy(
    sampler: Any, model_sampling: Any, gradient: bool = False, constant: bool = False
) -> Iterator[tuple[Callable, Tensor, Tensor]]:
    """(run(x, noises, replay, sigmas), a state to begin from, all sigmas): the sampler's twin on a model of one line,
    outside ComfyUI's inference mode. constant: the model has no gradient.
    """
    # Some samplers draw from PyTorch's own generators, which are seeded by then for the sample that is to come.
    with torch.inference_mode(False), torch.set_grad_enabled(gradient), torch.random.fork_rng(devices=[]):
        model_sampling = copy.deepcopy(model_sampling)
        leave_inference_mode(model_sampling)
        low, high = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
        schedule = torch.tensor([high, math.sqrt(high * low), low, 0.0])
        start = torch.linspace(-1, 1, 16).reshape(1, 4, 2, 2) * high
        yield _runner(sampler, model_sampling, schedule, constant), start, schedule


def _runner(sampler: Any, model_sampling: Any, schedule: Tensor, constant: bool) -> Callable:
    def toy(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        # Any function that depends on x at every noise level will do.
        x = x.detach() if constant else x
        denoised = x / (1 + sigma.reshape(-1, 1, 1, 1))
        for post in kwargs.get("model_options", {}).get("sampler_post_cfg_function", ()):
            post({"denoised": denoised, "uncond_denoised": denoised, "cond_denoised": denoised, "model": None})
        return denoised

    toy.inner_model = SimpleNamespace(  # type: ignore[attr-defined]
        inner_model=SimpleNamespace(model_sampling=model_sampling),
        model_patcher=SimpleNamespace(get_model_object=lambda name: model_sampling),
    )
    model = StandIn(toy, toy)
    options = {k: v for k, v in sampler.extra_options.items() if k != "noise_sampler"}

    def run(x: Tensor, noises: Any, replay: bool = False, sigmas: Tensor = schedule) -> Tensor:
        """noises: a list, to be filled with what the sampler draws; with `replay` any iterable of noises."""
        rest = iter(noises)

        def source(draw: Callable) -> Tensor:
            if replay:
                return next(rest)
            noises.append(draw())
            return noises[-1]

        twins = Twins(source)
        try:
            return twins(sampler.sampler_function)(
                model, x, sigmas, extra_args={"seed": 0, "model_options": {}}, callback=None, disable=True, **options
            )
        finally:
            twins.end()

    return run


def _gradient_error(run: Callable, x: Tensor, noises: list, gradient: Tensor) -> float:
    """Relative, of the slope along the gradient, at the length of a difference that agrees best."""
    errors = []
    for length in LENGTHS:
        step = gradient * (x.norm() * length / gradient.norm())
        with torch.no_grad():
            up, down = (run(x + sign * step, noises, replay=True).double().sum() for sign in (1, -1))
        slope = (gradient * step).double().sum()
        errors.append(((up - down) / 2 - slope).abs() / slope.abs())
    return min(errors).item()


def _try_on_a_toy(run: Callable, start: Tensor) -> str | None:
    counts = []
    for scale in (1.0, 3.0):
        x = (start * scale).requires_grad_()
        noises: list = []
        try:
            out = run(x, noises)
            if not out.requires_grad:
                return "it cuts the gradient"
            (gradient,) = torch.autograd.grad(out.sum(), x)
            with torch.no_grad():
                again = run(x, noises, replay=True)
        except AttributeError:
            return None  # it asks for more of ComfyUI than the toy has; the first iteration will tell
        except RuntimeError as problem:
            return f"backward fails: {str(problem).splitlines()[0]}"
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as problem:  # its own demands, or a bug: it is another's code
            return f"on a small image it fails ({type(problem).__name__}: {' '.join(str(problem).split())[:200]})"
        if not torch.isfinite(gradient).all() or not gradient.abs().sum() > 0:
            return "its gradient is zero or not finite"
        if not torch.equal(again, out):
            return "it draws noise of its own that cannot be held fixed (is s_churn above 0?)"
        if (wrong := _gradient_error(run, x.detach(), noises, gradient)) > SLOPE_APART:
            return f"its gradient is off by {wrong:.2g} (relative) against a finite difference"
        counts.append(len(noises))
    return None if counts[0] == counts[1] else "its number of steps depends on the image"
