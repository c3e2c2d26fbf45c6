"""Before anything is optimised: one step's gradient against a finite difference, and every backward pass once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...sampler.ending import Cut, within_memory
from ...sampler.memory import offloaded, out_of_memory
from ...sampler.selftest import Checked, check
from .blocks import both
from .job import INTERRUPTS
from .patches import controls, named
from .places import written_over
from .process import Process, in_brief, remembers
from .repeating import has_no_repeatable_way

log = logging.getLogger("mira")
# How far off, relative, something may be where nothing is wrong: in full precision, in half precision.
CALL_APART = (0.02, 0.1)  # a prediction where a gradient is wanted
GRADIENT_APART = (0.1, 0.5)  # a gradient, from a finite difference
LACKS = 0.2  # and from where on it is worth a word, in half precision
BLOCKS_APART = 0.05  # a gradient, from the same with the blocks computed again: in any precision the same arithmetic


def is_quantised(weight: Tensor) -> bool:
    """In eight bits or fewer. Newer hosts have a backward for such layers, older ones none."""
    return is_traceable_wrapper_subclass(weight) or (weight.element_size() == 1 and weight.dtype != torch.bool)


def check_gradient(process: Process, noise: Tensor) -> None:
    """One denoising step, its gradient against a finite difference, before anything is optimised."""
    job, name = process.job, type(process.inner.diffusion_model).__name__
    patches = named(process.extra_args["model_options"])
    quantised = any(map(is_quantised, process.inner.diffusion_model.parameters()))

    def remedy(said: str = "") -> str:
        weights = ""  # newer hosts have a backward for most of them, so that a patch is as likely
        if quantised or "scaled_mm" in said:
            weights = "; where that does not help, its weights are quantised: use fp16, bf16 or fp32 ones"
        return (
            "This model cannot be optimised through as it is: bypass nodes that patch it or its attention"
            f"{patches}{weights}. MIRA Search KSampler needs no gradient."
        )

    blocks = process.blocks()
    ways = [nullcontext, *([blocks] if blocks else []), lambda: both(offloaded(), (blocks or nullcontext)())]
    twice = blocks and job.memory not in ("none", "per_step")  # what a checkpoint breaks shows with it only
    apart = CALL_APART[process.half]
    found: list[Checked] = []
    known: dict[int, Checked] = {}
    cut = None
    while ways and len(found) < (2 if twice else 1):
        overwritten = False
        try:
            checked, cut = within_memory(_self_test, process, noise, ways.pop(0), known)
        except RuntimeError as problem:
            said = str(problem).splitlines()[0]
            if has_no_repeatable_way(problem):
                raise
            if "inference tensor" in said.lower():
                raise RuntimeError(
                    f"{job.node}: something in the graph holds tensors of inference mode, which no gradient goes "
                    f"through{patches}. Bypass it. ({said})"
                ) from problem
            overwritten = written_over(problem)
            if not overwritten or process.place.is_last:
                raise RuntimeError(f"{job.node}: {name} has no gradient: {said}. {remedy(said)}") from problem
        except (TypeError, AttributeError, KeyError) as problem:
            why = ": perhaps something in the graph remembers earlier steps" if patches else ""
            raise RuntimeError(
                f"{job.node}: {name} fails where a gradient is wanted ({in_brief(problem)}){why}. {remedy()}"
            ) from problem
        # One of the places loses what a model writes into a slice.
        lost = not overwritten and cut is None and checked.moved > apart
        if overwritten or (lost and not process.place.is_last):
            process.place.go_on()
            return check_gradient(process, noise)  # from the start: what was found in a place says nothing of the next
        if cut is None:
            found.append(checked)
    if cut and not found:
        raise cut.problem
    if max(c.apart for c in found) > BLOCKS_APART:
        # What a block hands to a later one beside what it returns has no gradient when it is computed again.
        process.without_blocks()
        process.tell(
            f"parts of {name} depend on one another in a way that a checkpoint of one breaks{patches}: where memory "
            "asks for it, a step is computed again as a whole"
        )
        found = [c for c in found if not c.apart]
    wrong, moved = max(c.wrong for c in found), max(c.moved for c in found)
    lacks = max(c.lacks for c in found)
    wrong = max(wrong, lacks)
    if not wrong < GRADIENT_APART[process.half]:
        raise RuntimeError(
            f"{job.node}: {name} gives no usable gradient: it is off by {wrong:.2g} (relative) against a finite "
            f"difference of one denoising step. {remedy()}"
        )
    if moved > apart:
        raise RuntimeError(
            f"{job.node}: {name} predicts something else when a gradient is wanted: its noise is off by "
            f"{moved:.2g} (relative). {remedy()}"
        )
    if lacks > LACKS:
        process.tell(
            f"the gradient of {name} is off by {lacks:.2g} (relative) against finite differences, more than its "
            f"precision tells: something in it may have none{patches}"
        )
    process.watch()
    log.debug("gradient self-test of %s: relative error %.2g, prediction off by %.2g", name, wrong, moved)


def check_backward(process: Process) -> None:
    """The reward's backward on the plain image, before any seed is sampled: not every device has every one.

    And the decoder's, where every operation has to repeat: a search shows its first images before it meets that.
    """
    scoring, rollout = process.scoring, process.rollout
    before, scoring.redraw = (scoring.redraw, rollout.memory), False
    try:
        for part in (_reward_gradient, _decoder_gradient):
            if cut := _tried(process, part):
                log.debug("%s: the reward's gradient could not be tried: %s", process.job.node, cut)
            rollout.memory = before[1]
    finally:
        scoring.redraw, rollout.memory = before


def _tried(process: Process, part: Callable[[Process], None]) -> Cut | None:
    """Where it is not known yet what there is room for, with little; but what fails so alone is no fault, as the run
    may keep everything.
    """
    rollout = process.rollout
    if rollout.memory != "auto":
        return within_memory(part, process)[1]
    cut, failed = None, False
    for rollout.memory in ("per_step", "offload"):
        try:
            _, cut = within_memory(part, process)
        except INTERRUPTS:
            raise
        except Exception as problem:
            if has_no_repeatable_way(problem):
                raise
            failed = True
        if failed or cut is None:
            break
    if failed:  # not within the block above, whose exception holds what that has kept
        rollout.memory = "none"
        return within_memory(part, process)[1]
    return cut


def _decoder_gradient(process: Process) -> None:
    if torch.are_deterministic_algorithms_enabled():
        with torch.enable_grad():
            x0 = process.given[0].detach().requires_grad_()
            torch.autograd.grad(process.scoring.render(x0).sum(), x0, allow_unused=True)


def _reward_gradient(process: Process) -> None:
    with torch.no_grad():
        images = process.scoring.render(process.given[0])
    with torch.enable_grad():
        total, _ = process.scoring.reward(images.requires_grad_())
    if not total.requires_grad:
        return  # said where it is optimised
    try:
        torch.autograd.grad(total.sum(), images, allow_unused=True)
    except RuntimeError as problem:
        if out_of_memory(problem) or has_no_repeatable_way(problem):
            raise
        job, said = process.job, str(problem).splitlines()[0]
        assert job.reward is not None  # it was this one
        raise RuntimeError(
            f"{job.node}: reward {job.reward.facts.name!r} has no backward on this device "
            f"({comfy.model_management.get_torch_device().type}): {said} Use another reward or another precision, "
            "MIRA Search KSampler, which needs no gradient, or start ComfyUI with --cpu; on a Mac also with "
            "PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment."
        ) from problem


def _good(checked: Checked, half: bool) -> bool:
    return max(checked.wrong, checked.lacks) < GRADIENT_APART[half] and checked.moved <= CALL_APART[half]


def _self_test(process: Process, noise: Tensor, within: Callable, known: dict[int, Checked]) -> Checked:
    """The gradient of a step, and what noise it predicts. known, by step: what was found in other ways so far.

    Patches and ControlNets may be there in a part of the schedule alone: with them, the first way looks at the first,
    the middle and the last step that a gradient goes through, too, and the worst counts.
    """
    found: list[Checked] = []
    patched = bool(named(process.extra_args["model_options"]))
    in_parts = not known and (patched or controls(getattr(process.model_wrap, "conds", {})))

    def function(model_k: Any, x: Tensor, sigmas: Tensor, extra_args: dict, **options: Any) -> Tensor:
        extra_args, call = process.network(model_k.inner_model, extra_args)
        extra_args.pop("denoise_mask", None)  # a mask is no business of the network's
        steps, looked = _Steps(process, call, extra_args, x, sigmas, within), dict[int, Checked]()
        if patched and not known:
            process.keeps = steps.remember()
        for step in known or dict.fromkeys((steps.middle, 0, steps.last)):  # conditioning may begin or end in between
            looked[step] = steps.look(step, known.get(step))
            if math.isfinite(looked[step].wrong):
                break
        step, checked = steps.in_parts(step, looked) if in_parts else (step, looked[step])
        if math.isfinite(checked.wrong):
            known.setdefault(step, checked)
        found[:] = [checked]
        steps.begin_anew()
        return x

    # Some guiders add what counts as a constant here, and not in a finite difference.
    with getattr(process.model_wrap, "without_constants", nullcontext)():
        process.through_sampler(noise, function, {})
    return found[0]


@dataclass
class _Steps:
    """Single calls of a network along a schedule. x: at its first sigma. within: of forward and backward."""

    process: Process
    call: Callable
    extra_args: dict
    x: Tensor
    sigmas: Tensor
    within: Callable

    @property
    def last(self) -> int:
        return len(self.sigmas) - 2

    @property
    def middle(self) -> int:
        return self.last // 2

    @property
    def begins(self) -> int:
        """The first step that a gradient goes through."""
        steps = self.process.job.gradient_steps
        return max(0, self.last + 1 - steps) if steps else 0

    def at(self, step: int) -> Tensor:
        return self.x * (self.sigmas[step] ** 2 + 1).sqrt() / (self.sigmas[0] ** 2 + 1).sqrt()

    def ask(self, step: int, y: Tensor, share: float = 1.0) -> Tensor:
        with self.process.random(step):
            out = self.call(y, share * self.sigmas[step] * y.new_ones(len(y)), **self.extra_args)
        return out[0] if isinstance(out, tuple) else out

    def remember(self) -> bool:
        """Whether what was asked before changes what the network answers."""
        start = self.at(self.middle)
        return remembers(partial(self.ask, self.middle), start, start.flip(-1), self.process.half)

    def begin_anew(self, step: int | None = None, y: Tensor | None = None) -> None:
        """What keeps the last step does so where sigma rises."""
        if self.process.keeps:
            step = self.last if step is None else step
            with torch.no_grad():
                self.ask(step, self.at(step) if y is None else y.detach(), 0.5)

    def look(self, step: int, known: Checked | None = None, of_noise: bool = False) -> Checked:
        """The gradient of the image that is predicted at a step, or of its noise."""

        def predict(y: Tensor) -> Tensor:
            self.begin_anew(step, y)
            return self.ask(step, y)

        def noise_of(out: Tensor, y: Tensor) -> Tensor:
            return y - self.process.signal(self.sigmas[step]) * out

        start = self.at(step)
        if of_noise:
            return check(lambda y: noise_of(predict(y), y), start, within=self.within)
        return check(predict, start, within=self.within, looked_at=partial(noise_of, y=start), known=known)

    def depends(self, step: int) -> bool:
        """Whether what is predicted does so on x."""
        with torch.no_grad():
            return not torch.equal(self.ask(step, self.at(step)), self.ask(step, self.at(step).flip(-1)))

    def in_parts(self, step: int, looked: dict[int, Checked]) -> tuple[int, Checked]:
        """The worst of that step and of others where a gradient goes, and which step that speaks of."""
        half, begins, main = self.process.half, self.begins, looked[step]
        there = {
            s: looked.get(s) or self.look(s) for s in dict.fromkeys((begins, (begins + self.last) // 2, self.last))
        }
        # Where conditioning has ended, what is predicted may not depend on x at all, and has no gradient to lose.
        others = [c for s, c in there.items() if math.isfinite(c.wrong) or self.depends(s)]
        if half:  # at the first step, of which little is left, its own gradient is mostly rounding
            others = [c if math.isinf(c.wrong) else replace(c, wrong=c.lacks) for c in others]
        if step < begins and not _good(main, half):
            # What a patch does where no gradient goes is no matter, if where one goes it is right: of the noise,
            # too, since little is wrong with a prediction of the image when there is little noise.
            step, main = begins, there[begins]
            others.append(self.look(begins, of_noise=True))
        worst = {name: max(getattr(c, name) for c in (main, *others)) for name in ("wrong", "lacks", "moved")}
        return step, replace(main, **worst)
