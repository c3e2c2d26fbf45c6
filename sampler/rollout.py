"""One sampling run of a frozen model as a differentiable function of its noises.

The whole trajectory z = (z_T, z_{T-1}, ..., z_1) is the variable: the initial noise and every noise that the
sampler injects, in the order in which it asks for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .memory import offloaded, out_of_memory, saved_bytes

# D(x, sigma): x (B, C, ...), sigma (B,) -> the denoised prediction, or (guided, conditional) predictions. It may have
# `escapes(kwargs)`: whether anything but its return value carries a gradient out of a call.
Denoiser = Callable[..., Tensor | tuple[Tensor, Tensor]]
USABLE = 0.7  # of the free memory, so that what was not measured has the rest
BLOCKS_ALONE = 0.3  # of the free memory, so that decoding has the rest
SAME = 0.02  # relative: how far a prediction may be off when it is computed again
# Returns the next noise; `draw` makes the host's own, which only a first run uses.
NoiseSource = Callable[[Callable[[], Tensor]], Tensor]
# sample(z_T, noise_source, wrap) -> x0. The host's sampler: it asks `noise_source` for every injected noise and
# calls `wrap(denoiser)` in place of its denoiser.
Sample = Callable[[Tensor, NoiseSource, Callable[[Denoiser], Denoiser]], Tensor]


def per_image(t: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to broadcast against (B, ...)."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def noised(x0: Tensor, sigma: Tensor, z: Tensor, signal: Callable[[Tensor], Tensor] = torch.ones_like) -> Tensor:
    """x0, z (B, C, ...) at noise level sigma, () or (B,): signal(sigma) x0 + sigma z, the forward process."""
    sigma = sigma.to(x0).expand(len(x0))
    return per_image(signal(sigma), x0) * x0 + per_image(sigma, x0) * z


def mean_square(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, ...) -> (B,): the mean over elements of x^2, in float32 at least; over the masked part where one is given."""
    square = (x if x.dtype == torch.float64 else x.float()).square()
    if mask is None:
        return square.flatten(1).mean(1)
    mask = mask.to(square).expand_as(square)
    return (square * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-12)


def total(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, one after the other; at least one."""
    return functools.reduce(torch.add, terms)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """(B,): the root mean square of a - b, relative to b's."""
    return (mean_square(a - b) / mean_square(b).clamp(min=1e-12)).sqrt()


@dataclass(frozen=True)
class Path:
    """What one run left behind.

    x0 (B, C, ...): the sample. noises: z, each (B, C, ...). eps: eps_hat at every denoiser call, each (B, C, ...).
    sigmas: the noise-to-signal ratio of every call, (B,). weights: w_t / (1 - abar_t) of every call, (B,).
    mask: the part of the latent that is sampled at all (inpainting), or None.
    """

    x0: Tensor
    noises: tuple[Tensor, ...]
    eps: tuple[Tensor, ...]
    sigmas: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    mask: Tensor | None = None

    def detach(self) -> Path:
        return replace(
            self,
            x0=self.x0.detach(),
            noises=tuple(z.detach().clone() for z in self.noises),
            eps=tuple(e.detach() for e in self.eps),
        )


def escapes(denoiser: Denoiser, kwargs: dict) -> bool:
    """Whether more goes out of this call of the denoiser than its return value (CFG++ samplers take it)."""
    return getattr(denoiser, "escapes", lambda kwargs: False)(kwargs)


def weight_marginal(nsr: Tensor, nsr_next: Tensor) -> Tensor:
    """w_t = 1 - abar_t, the marginal variance: a term is ||eps_hat||^2. (The paper leaves w_t open.)"""
    return torch.ones_like(nsr)


def weight_transition(nsr: Tensor, nsr_next: Tensor) -> Tensor:
    """w_t = the variance of a DDIM transition (eta = 1), over 1 - abar_t.

    With s the noise-to-signal ratio: sigma_up^2 = s'^2 (1 - s'^2 / s^2) in variance-exploding coordinates, times
    abar' = 1 / (1 + s'^2) in variance-preserving ones.
    """
    up = nsr_next**2 * (1 - (nsr_next / nsr) ** 2) / (1 + nsr_next**2)
    return up * (1 + nsr**-2)


WEIGHTINGS = {"marginal": weight_marginal, "transition": weight_transition}


def pulled_back(
    outputs: Iterable[Tensor], gradients: Iterable[Tensor | None], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The inputs' gradients through outputs that were computed again. None where none comes back: what is predicted
    without an active conditioning does not depend on x.
    """
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)


class _Recomputed(torch.autograd.Function):
    """run(x), of which only x is kept; the rest is computed again in backward.

    torch's own checkpoint keeps a record for every tensor that it does not keep, megabytes a step. It is still what a
    step needs whose gradient comes in or leaves by another way than x and its return value.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable) -> Any:
        ctx.run = run
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return run(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.run(x)
            (gradient,) = pulled_back(out if isinstance(out, tuple) else (out,), gradients, [x])
        return gradient, None


@torch.no_grad()
def draw(sample: Sample, z_T: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The plain sample from z_T and all the noises that went into it, z_T first: nothing is wrapped or measured."""
    noises = [z_T]

    def source(make: Callable[[], Tensor]) -> Tensor:
        noises.append(make())
        return noises[-1]

    x0 = sample(z_T, source, lambda denoiser: denoiser)
    return x0, tuple(z.detach().clone() for z in noises)


def _source(noises: Sequence[Tensor]) -> NoiseSource:
    """The injected ones of these noises, one after the other, in place of what a sampler draws."""
    rest = iter(noises[1:])

    def source(make: Callable[[], Tensor]) -> Tensor:
        noise = next(rest, None)
        if noise is None:
            raise RuntimeError(
                f"the sampler asked for more noises than the {len(noises)} of its plain run: "
                "its number of steps depends on the image, so its trajectory cannot be optimised"
            )
        return noise

    return source


class _Settled(BaseException):
    """What was to be measured is. No Exception: a sampler of another pack may catch those."""


class NotTheSame(RuntimeError):
    """The model gave another prediction for the same input: it remembers what it was asked before."""


@dataclass
class _Call:
    """One call of the denoiser, to be done again in backward; `let_go` ends what it holds.

    watched: the first prediction is kept, and the second compared with it, which may be off by `same`, relative.

    A sampler may keep a prediction in the very arguments that it calls with. A checkpoint of such a call is a cycle
    through C++ that no collector sees, unless its backward runs, which an aborted run never comes to.
    """

    denoiser: Denoiser
    sigma: Tensor
    kwargs: dict = field(default_factory=dict)
    same: float = SAME
    watched: bool = False
    first: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = self.denoiser(x, self.sigma, **self.kwargs)
        if self.watched:
            self._watch((out[0] if isinstance(out, tuple) else out).detach())
        return out

    def _watch(self, out: Tensor) -> None:
        if self.first is None:
            self.first = out
            return
        off = difference(out, self.first).max().item()
        self.first, self.watched = None, False
        if off > self.same:
            sigma = self.sigma.max().item()
            raise NotTheSame(f"computed again for its gradient, a prediction at sigma {sigma:.3g} is off by {off:.2g}")

    def let_go(self) -> None:
        del self.denoiser, self.sigma  # nobody calls it any more
        self.kwargs, self.first = {}, None


@dataclass(frozen=True)
class Estimate:
    """Bytes, measured before a policy was chosen: what one step and the score keep for backward, and what was free.

    Infinity: more than was free.
    """

    step: float
    score: float
    free: float


class Rollout:
    """Runs the frozen model on given noises and records eps_hat at every denoiser call.

    sample: the host's sampler, see `Sample`.
    schedule: (T + 1,) sigmas, from large to small.
    signal: sigma -> the factor of x0 in x_t: 1 in k-diffusion (variance-exploding) coordinates, 1 - t for
        rectified flow; eps_hat = (x - signal * D) / (sigma * noise_scale).
    noise_scale: what noise of unit variance is multiplied by besides sigma; 1 for nearly every model.
    gradient_steps: through the network of how many of the last steps a gradient flows; in the earlier ones the network
        counts as a constant, and only the sampler's own arithmetic carries one. They cost as much as a plain sample's,
        in time and in memory. 0: through all.
    memory: what is kept for backward, one of `POLICIES` from fast to thrifty, or "auto": the fastest that fits.
        "none": everything. "per_step": only the latents. "per_block": what goes into the model's blocks, of every step
        where that fits, else of one at a time. "offload": of one, and what is kept waits in the CPU's memory. What the
        score keeps may do so alone (`score_offloaded`), for want of memory (`shrink`): its layers are the larger.
    free_bytes: how much memory is left, for "auto".
    score_bytes: x -> how much the score of a latent like x keeps for backward, at most `most`, for "auto".
    blocks: a context inside which the model checkpoints its own blocks, for "per_block" and "offload"; None when it
        has none, and then "per_block" is "per_step".
    random: n -> a context in which call n of a trajectory draws the random numbers that it drew in every other one.

    One Euler step of a model of N(0, 1) data, whose denoiser is exact; its score is that of the noisy image:

    >>> def sample(z_T, source, wrap):
    ...     D = wrap(lambda x, sigma: x / (1 + sigma.view(-1, 1) ** 2))
    ...     return D(z_T * 5**0.5, torch.full((len(z_T),), 2.0))
    >>> rollout = Rollout(sample, torch.tensor([2.0, 0.0]), memory="none")
    >>> path = rollout([torch.ones(1, 3)])
    >>> [round(v, 3) for v in (path.x0[0, 0].item(), path.eps[0][0, 0].item())]
    [0.447, 0.894]
    """

    POLICIES = ("none", "per_step", "per_block", "offload")

    def __init__(
        self,
        sample: Sample,
        schedule: Tensor,
        *,
        signal: Callable[[Tensor], Tensor] = torch.ones_like,
        noise_scale: float = 1.0,
        weighting: str = "marginal",
        measured: str = "guided",
        gradient_steps: int = 0,
        memory: str = "auto",
        mask: Tensor | None = None,
        free_bytes: Callable[[], float] = lambda: float("inf"),
        score_bytes: Callable[[Tensor, float], float] = lambda x, most: 0.0,
        blocks: Callable[[], AbstractContextManager] | None = None,
        random: Callable[[int], AbstractContextManager] = lambda n: nullcontext(),
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting {weighting!r} is not one of {', '.join(WEIGHTINGS)}")
        if memory not in (*self.POLICIES, "auto"):
            raise ValueError(f"memory policy {memory!r} is not one of {', '.join((*self.POLICIES, 'auto'))}")
        self.sample = sample
        self.schedule = schedule
        self.signal, self.noise_scale = signal, noise_scale
        self.weighting = WEIGHTINGS[weighting]
        self.conditional = measured == "conditional"
        self.gradient_steps = gradient_steps
        self.memory = memory
        self.mask = mask
        self.free_bytes = free_bytes
        self.score_bytes = score_bytes
        self.blocks = blocks
        self.random = random
        self.same = SAME  # how far off a prediction may be when it is computed again; the host may know less
        self.estimate: Estimate | None = None
        self._blocks_alone: bool | None = None  # not known before the first call
        self._score_apart = False
        self._watching = self._watched = False  # the first trajectory's predictions, when they are computed again
        self._calls: list[_Call] = []
        if not blocks:
            self.without_blocks()

    def without_blocks(self) -> None:
        """The model has none that may be computed again alone: "per_block" is "per_step"."""
        self.blocks = None
        if self.memory == "per_block":
            self.memory = "per_step"

    def __call__(self, noises: Sequence[Tensor]) -> Path:
        """The run with these noises; differentiable where grad mode is on.

        Raises RuntimeError when the sampler asks for another number of noises than it is given.
        """
        self.let_go()
        if torch.is_grad_enabled():
            self._settle(noises)
        record = Record(self)

        def wrap(denoiser: Denoiser) -> Denoiser:
            def measure(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
                n = len(record.eps)
                if self._constant(sigma):
                    with torch.no_grad(), self.random(n):
                        out = denoiser(x, sigma, **kwargs)
                    # Where the network counts as a constant, so does its score: a part of its gradient would mislead.
                    return record(x.detach(), sigma, out)
                return record(x, sigma, self.predict(denoiser, x, sigma, kwargs, self.random(n)))

            return measure

        x0 = self.sample(noises[0], _source(noises), wrap)
        return record.path(x0, noises)

    def _settle(self, noises: Sequence[Tensor]) -> None:
        """Decide what is still open about the memory before the trajectory begins: a call more within it would be seen
        by whatever remembers the last one (guidance with momentum), which begins anew where sigma rises.
        """
        if not self._open:
            return
        steps = len(self.schedule) - 1
        step = max(min(1, steps - 1), steps - (self.gradient_steps or steps))  # below the first, if there is another

        def wrap(denoiser: Denoiser) -> Denoiser:
            def measure(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
                call = _Call(denoiser, torch.full_like(sigma, self.schedule[step].item()), kwargs)
                self._decide(call, x, self.random(step))
                raise _Settled

            return measure

        with suppress(_Settled):
            self.sample(noises[0], _source(noises), wrap)

    def _constant(self, sigma: Tensor) -> bool:
        """By the noise level, as a step may call its denoiser more than once."""
        if not self.gradient_steps:
            return False  # without asking the device
        left = len(self.schedule) - 1 - int((self.schedule[:-1] > sigma.max()).sum())
        return self.gradient_steps < left

    def let_go(self) -> None:
        """End what the last trajectory's checkpoints hold: after its backward, or where it will have none."""
        self._watched = self._watching
        for call in self._calls:
            call.let_go()
        self._calls.clear()

    def predict(
        self, denoiser: Denoiser, x: Tensor, sigma: Tensor, kwargs: dict, within: AbstractContextManager | None = None
    ) -> Any:
        """One call of the denoiser, checkpointed as the policy says. within: its context, to be entered again."""
        call, within = _Call(denoiser, sigma, kwargs, self.same), within or nullcontext()
        if not torch.is_grad_enabled():
            with within:
                return call(x)
        if self._open:
            self._decide(call, x, within)
        if self.memory == "none":
            with within:
                return call(x)

        if self.memory == "per_block" and self.blocks and self._blocks_alone:
            with within, self.blocks():
                return call(x)

        call.watched = not self._watched
        self._watching = True

        def run(x: Tensor) -> Any:
            with within, self.thrifty():
                return call(x)

        if self.mask is None and not escapes(denoiser, kwargs):
            return _Recomputed.apply(x, run)
        # The masked part of x is made anew from z_T in every call. No random state to keep: `within` has it.
        self._calls.append(call)
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)

    def thrifty(self) -> AbstractContextManager:
        """What the policy asks for inside a step: block checkpoints, and the CPU's memory for what is still kept."""
        stack = ExitStack()
        if self.memory == "offload":
            stack.enter_context(offloaded())
        if self.blocks and self.memory in ("per_block", "offload"):
            stack.enter_context(self.blocks())
        return stack

    @property
    def _open(self) -> bool:
        """Whether something about the memory is still to be measured."""
        return self.memory == "auto" or (self.memory == "per_block" and self._blocks_alone is None)

    def _decide(self, call: _Call, x: Tensor, within: AbstractContextManager) -> None:
        """Measure what is open, by one call of the denoiser. within: its context."""
        if self.memory == "auto":
            with within:
                self.memory = self._choose(call, x)
        if self.memory == "per_block":
            with within:
                self._blocks_alone = self._blocks_do(call, x)

    def _blocks_do(self, call: _Call, x: Tensor) -> bool:
        """Whether what its blocks keep of every step fits, so that no step need be computed again as a whole."""
        steps = len(self.schedule) - 1
        room = BLOCKS_ALONE * self.free_bytes() / min(steps, self.gradient_steps or steps)
        try:
            with self.thrifty():
                return saved_bytes(call, x, room) < room
        except RuntimeError as problem:
            if not out_of_memory(problem):
                raise
            return False

    def _choose(self, denoise: Denoiser, x: Tensor) -> str:
        """Measure what a step and the score keep for their backward: the fastest policy that fits in `USABLE`."""
        free = self.free_bytes()
        room = USABLE * free
        step = score = float("inf")
        try:
            step = saved_bytes(denoise, x, room)
            score = self.score_bytes(x, room)
        except RuntimeError as problem:
            if not out_of_memory(problem):
                raise
        self.estimate = Estimate(step, score, free)
        steps = len(self.schedule) - 1
        if step * min(steps, self.gradient_steps or steps) + score < room:
            return "none"
        return "per_step" if step < room else "per_block" if self.blocks else "offload"

    @property
    def way(self) -> str:
        """The policy in words, for a notice."""
        apart = self.score_offloaded and self.memory != "offload"
        more = ", with what decoding and reward keep in the CPU's memory" if apart else ""
        return f"{self.memory} checkpointing{more}"

    @property
    def score_offloaded(self) -> bool:
        """Whether what the score keeps for its backward is to wait in the CPU's memory."""
        return self._score_apart or self.memory == "offload"

    def go_on_as(self, other: Rollout) -> None:
        """With what another one of the same model had to learn about the memory: a restart is a shorter stretch."""
        self.memory, self._score_apart, self.estimate = other.memory, other._score_apart, other.estimate
        self._blocks_alone = False if other._blocks_alone is False else None

    def shrink(self) -> bool:
        """After running out of memory: go to the next thriftier policy. False when there is none."""
        alone, self._blocks_alone = self._blocks_alone, False  # from here on, a step at a time
        if self.memory == "per_block" and alone:
            return True
        if self.memory in ("per_step", "per_block") and not self._score_apart:
            self._score_apart = True
            return True
        left = self.POLICIES[self.POLICIES.index(self.memory) + 1 :] if self.memory != "auto" else self.POLICIES[-1:]
        rest = [p for p in left if p != "per_block" or self.blocks]
        self.memory = rest[0] if rest else self.memory
        return bool(rest)


class Record:
    """What a run's denoiser calls leave behind, in the units of `rollout`."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.eps: list[Tensor] = []
        self.sigmas: list[Tensor] = []
        self.weights: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Takes one call's input and output, and gives the prediction that samples."""
        rollout = self.rollout
        guided, judged = out if isinstance(out, tuple) else (out, out)
        alpha, schedule, scale = rollout.signal(sigma), rollout.schedule, rollout.noise_scale
        nsr = scale * sigma / alpha
        judged = judged if rollout.conditional else guided
        self.eps.append((x - per_image(alpha, x) * judged) / per_image(scale * sigma, x))
        after = schedule[schedule < sigma.min()]
        after = (after.max() if len(after) else schedule.new_zeros(())).to(sigma).expand_as(sigma)
        self.sigmas.append(nsr)
        self.weights.append(rollout.weighting(nsr, scale * after / rollout.signal(after)))
        return guided

    def path(self, x0: Tensor, noises: Sequence[Tensor]) -> Path:
        return Path(x0, tuple(noises), tuple(self.eps), tuple(self.sigmas), tuple(self.weights), self.rollout.mask)
