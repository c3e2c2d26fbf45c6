"""Optimises the noises of a frozen model against a reward: MIRA's Algorithm 1 and its relatives in one loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .ending import Interrupts, attempt
from .gradients import LossScale, clipping, norm, scaled, step
from .keep import Keeper
from .replay import Segment
from .resume import Left
from .rollout import Path, Rollout, mean_square, per_image, total
from .surrogates import REGULARIZERS, SLOPED, SURROGATES
from .trace import Trace, rows_of
from .variables import VARIABLES, Variables


class SphericalAdam(torch.optim.Adam):
    """Adam that leaves the norm of every image's every noise as it was.

    Noise of d elements has norm sqrt(d) almost surely: a step along that sphere stays where the model was trained.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no user has one
        leaves = [z for group in self.param_groups for z in group["params"]]
        norms = [z.flatten(1).norm(dim=1) for z in leaves]
        super().step()
        for z, radius in zip(leaves, norms, strict=True):
            z.mul_(per_image(radius / z.flatten(1).norm(dim=1).clamp(min=1e-12), z))


OPTIMIZERS: dict[str, Callable] = {
    "adamw": lambda z, lr: torch.optim.AdamW(z, lr=lr),
    "adam": lambda z, lr: torch.optim.Adam(z, lr=lr),
    "sgd": lambda z, lr: torch.optim.SGD(z, lr=lr, momentum=0.9, nesterov=True),
    "sphere": lambda z, lr: SphericalAdam(z, lr=lr),
    "normalized": lambda z, lr: torch.optim.SGD(z, lr=lr, momentum=0.9, dampening=0.9),
}
# Their gradients are scaled to a root mean square of 1 over each image's free noises, so that lr is in units of the
# noise's deviation for every reward. Adam is so by itself, but moves every element alike.
NORMALIZED = ("normalized",)
HOLD = ("no", "projection", "dual_ascent")
# Of dual ascent: beta grows or shrinks by at most this factor per iteration, and starts from at least this.
DUAL_STEP, DUAL_FLOOR = 2.0, 1e-3
KEEP = ("best_within_drift", "best_reward", "last")
STOP = ("never", "plateau", "drift", "plateau_or_drift", "plateau_at_limit")
HELD_GAIN = 0.02  # of its gain so far: what an image that stands at its limit gains at least, or it is left alone
AT_LIMIT = 0.98  # the share of its limit from which a drift stands at it
INSIDE = 1 - 1e-4  # the share that a projection goes to: within the limit after rounding too
MAX_HALVINGS = 3
NOT_FINITE = "reward or gradient not finite"
FLAT = "the gradient of its reward is zero, so that it cannot be optimised from here"


def stops_at_no_limit(stop: str, drift_limit: float) -> str | None:
    """What is wrong with a `stop` that looks at the drift where that has no limit; None: nothing."""
    wrong = "drift" in stop and not drift_limit > 0
    return f"stop is {stop}, which needs a drift_limit above 0" if wrong else None


@dataclass(frozen=True)
class Settings:
    """How to optimise. The defaults here are plain noise optimisation; the nodes have the measured ones.

    iterations: K, updates of the noises. lr: the optimiser's step, in units of the noise's standard deviation.
    regularizer, beta: the penalty beta * R(z) of the loss, one of `REGULARIZERS`.
    relative_beta: beta counts in units of |grad r| / |grad R| of each image's unchanged noises, so that 1 makes both
        pull alike there, whatever the reward's scale is. For a regulariser of `SLOPED`.
    clip_norm: the largest gradient norm of one image, over its whole trajectory; 0 does not clip.
    drift_metric, drift_limit: what "drift" means to `keep` and `stop`, and its bound; 0 is no bound.
    keep: which iterate comes back: "last" (Algorithm 1), "best_reward", or "best_within_drift".
    stop: when an image is left alone: when its best reward has not risen by 0.1 % of its gain for `patience`
        iterations ("plateau"), when its drift has passed the limit ("drift"), or either; on a plateau, or when its
        drift is held at the limit and an iteration gains less than `HELD_GAIN` of what it gained so far
        ("plateau_at_limit").
    variables: what is optimised, one of `VARIABLES`: the whole trajectory (MIRA, DNO), the initial noise (ReNO), ...
    seeds: how many seeds are sampled to begin from the best one of each image (`seeds.best_of`, which the host calls);
        1: the given noises.
    hold: keeps the drift at `drift_limit` while the optimisation goes on. "projection": noises that have gone too far
        are drawn back along the straight line to where they began (drift_metric path_kl, whose bound is a ball
        around z0). "dual_ascent": beta rises while the drift is above the limit and falls while it is below.
    restart_every, restart_denoise: after so many iterations a round ends, and the next one begins from a restart of
        what it kept (`restart.in_rounds`, which the host calls), noised to this share of the schedule; 0: one round.
    loss_scale: multiplies the loss in backward and divides the gradients, for networks in float16; it is lowered for
        an image whose gradients overflow.
    """

    iterations: int = 30
    lr: float = 0.01
    regularizer: str = "none"
    beta: float = 0.0
    relative_beta: bool = False
    optimizer: str = "adamw"
    clip_norm: float = 1.0
    drift_metric: str = "score_distance"
    drift_limit: float = 0.0
    keep: str = "best_within_drift"
    stop: str = "never"
    patience: int = 10
    variables: str = "trajectory"
    hold: str = "no"
    seeds: int = 1
    restart_every: int = 0
    restart_denoise: float = 0.8
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        tables = {
            "regularizer": REGULARIZERS,
            "optimizer": OPTIMIZERS,
            "drift_metric": SURROGATES,
            "keep": KEEP,
            "stop": STOP,
            "variables": VARIABLES,
            "hold": HOLD,
        }
        for name, table in tables.items():
            if getattr(self, name) not in table:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(table)}")
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}: it cannot be negative")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}: use 1 for the given noises, or more")
        if self.restart_every < 0:
            raise ValueError(f"restart_every is {self.restart_every}: use 0 for no restart, or more")
        if not 0 < self.restart_denoise <= 1:
            raise ValueError(f"restart_denoise is {self.restart_denoise}: use a value above 0 and up to 1")
        for name, value in {"lr": self.lr, "loss_scale": self.loss_scale}.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
        for name in ("beta", "clip_norm", "drift_limit"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if "plateau" in self.stop and self.patience < 1:
            raise ValueError(f"patience is {self.patience}: stopping on a plateau needs at least 1 iteration")
        if why := stops_at_no_limit(self.stop, self.drift_limit):
            raise ValueError(why)
        if self.hold != "no" and not self.drift_limit > 0:
            raise ValueError(f"hold is {self.hold}, which needs a drift_limit above 0")
        if self.hold == "projection" and (self.drift_metric != "path_kl" or self.variables == "initno"):
            raise ValueError(
                "hold is projection, which needs drift_metric path_kl and noises that are optimised as they are "
                f"(got {self.drift_metric} and variables {self.variables}): use those, or dual_ascent"
            )
        if self.hold == "dual_ascent" and self.regularizer == "none":
            raise ValueError("hold is dual_ascent, which weighs a regularizer, but regularizer is none: choose one")
        if self.relative_beta and self.beta and self.regularizer not in SLOPED:
            raise ValueError(
                f"relative_beta measures the gradient of the regularizer at the unchanged noises, and that of "
                f"{self.regularizer} is zero or chance there: turn it off, or use {' or '.join(SLOPED)}"
            )
        if self.variables == "initno" and self.optimizer == "sphere":
            raise ValueError("optimizer sphere moves noises, but variables initno optimises a mean and a deviation")


@dataclass(frozen=True)
class Score:
    """Rewards (B,) to be maximised, their named parts, each (B,), and the images (B, 3, H, W), detached."""

    total: Tensor
    parts: dict[str, Tensor]
    images: Tensor


@dataclass
class Result:
    """best, last: latents (B, C, ...). best_noises: the trajectory of the best iterate. reason: why it ended.

    iterates: the latents of every iteration, on the CPU. cut_short: by an interrupt, an error, or for want of memory.
    segments: what the best images are sampled from, where that is more than best_noises: restarts.
    left: where it stood, to go on from there; None where it cannot, or every image has ended by itself
        and no further round can follow.
    """

    best: Tensor
    last: Tensor
    best_noises: tuple[Tensor, ...]
    trace: Trace
    reason: str
    iterates: list[Tensor]
    cut_short: bool = False
    segments: Sequence[Segment] = ()
    left: Left | None = None


@dataclass
class _State:
    """z: what is optimised. good: the last of it with a finite gradient, None before the first. Flags, beta: (B,)."""

    variables: Variables
    optimizer: torch.optim.Optimizer
    keeper: Keeper
    scale: LossScale
    active: Tensor
    halvings: Tensor
    beta: Tensor
    floor: Tensor  # of beta, under dual ascent
    reasons: list[str | None]
    relative: bool  # beta is still in units of the first gradients
    reference: Path | None
    check_reward: bool
    good: list[Tensor] | None = None
    first: Tensor | None = None  # the rewards of the first iterate and of the last one, for `stop`
    last: Tensor | None = None

    @property
    def z(self) -> list[Tensor]:
        return self.variables.leaves

    def end(self, where: Tensor, reason: str) -> None:
        for b in torch.nonzero(where & self.active).flatten().tolist():
            self.reasons[b] = reason
        self.active = self.active & ~where


@dataclass(frozen=True)
class _Evaluation:
    """One iterate. drift, loss: (B,). gradients, and their norm (B,): none, and None, where it was not asked for."""

    path: Path
    score: Score
    surrogates: dict[str, Tensor]
    drift: Tensor
    loss: Tensor
    gradients: list[Tensor] = field(default_factory=list)
    norms: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """(B,), on the CPU."""
        finite = torch.isfinite(self.loss)
        return (finite if self.norms is None else finite & torch.isfinite(self.norms)).cpu()


def optimize(
    rollout: Rollout,
    score: Callable[[Tensor], Score],
    noises: Sequence[Tensor],
    settings: Settings,
    *,
    reference: Path | None = None,
    check_reward: bool = True,
    on_iteration: Callable[[int, list[dict], Score], None] = lambda k, rows, score: None,
    interrupts: Interrupts = (),
    memory: Callable[[], float] = lambda: 0.0,
    resume: Left | None = None,
) -> Result:
    """Optimise `noises` (z_T, ..., z_1), each (B, C, ...), so that score(x0) rises.

    Every image of the batch is on its own: loss, clipping, stopping and the kept iterate. Iteration 0 is the
    unchanged noise, and drift is measured from there unless a `reference` is given. check_reward: look first whether
    the reward has a gradient by itself.
    `on_iteration(k, rows, score)` is the only side channel. An exception of `interrupts`, running out of memory,
    any other error and values that are not finite end the run after iteration 0 with the best so far.

    resume: `Result.left` of a run of the same noises, reward and settings, `iterations` apart. It goes on there, with
    the optimiser's state: the result is that of a run that never ended. Its last iterate is made once more, with a
    gradient.

    Raises NoGradient when the reward has no gradient with respect to the noises.

    One step of a model of N(0, 1) data, and a reward whose optimum is at 1; the noise of the plain sample is 1:

    >>> def sample(z_T, source, wrap):
    ...     D = wrap(lambda x, sigma: x / (1 + sigma.view(-1, 1) ** 2))
    ...     return D(z_T * 5**0.5, torch.full((len(z_T),), 2.0))
    >>> def score(x0):
    ...     return Score(-(x0 - 1).square().mean(1), {}, x0)
    >>> rollout = Rollout(sample, torch.tensor([2.0, 0.0]), memory="none")
    >>> run = optimize(rollout, score, [torch.ones(1, 3)], Settings(iterations=20, lr=0.1, keep="best_reward"))
    >>> [round(row["reward"], 2) for row in run.trace.summary()], round(run.best.mean().item(), 1)
    ([-0.31, -0.0], 1.0)
    """
    _check_noises(noises, settings)
    variables = Variables(settings.variables, noises, rollout.mask)
    batch = len(noises[0])
    state = _State(
        variables,
        OPTIMIZERS[settings.optimizer](variables.leaves, settings.lr),
        Keeper(settings.keep, settings.drift_limit),
        LossScale(settings.loss_scale, batch),
        active=torch.ones(batch, dtype=torch.bool),
        halvings=torch.zeros(batch, dtype=torch.long),
        beta=torch.full((batch,), max(settings.beta, DUAL_FLOOR * (settings.hold == "dual_ascent"))),
        floor=torch.full((batch,), DUAL_FLOOR),
        reasons=[None] * batch,
        relative=settings.relative_beta and settings.beta > 0,
        reference=reference,
        check_reward=check_reward,
    )
    trace, iterates = Trace(), []
    k, reason, cut_short, whole = 0, "", False, True
    latest: Tensor  # x0 of the newest iterate
    keeper, made = state.keeper, -1  # before the newest iterate; which iterate that is, of this call
    if resume:
        state, keeper, trace, iterates, latest = resume.value
        k = resume.done

    def iteration(k: int) -> _Evaluation:
        """Evaluate, keep and report."""
        nonlocal latest, keeper, made
        started = time.perf_counter()
        evaluation = _evaluate(rollout, score, state, settings, gradient=k < settings.iterations)
        latest = evaluation.path.x0.detach()
        rows = _rows(k, state, evaluation, settings, time.perf_counter() - started, memory())
        on_cpu = latest.cpu()
        if k < len(iterates):  # of the run that is gone on with, whose last iterate may have had no gradient
            state.keeper = keeper
        keeper = copy.copy(state.keeper)  # which changes nothing in place
        state.keeper.update(k, evaluation.score.total, evaluation.drift, latest, evaluation.path.noises, state.active)
        trace.rows[k * batch :], iterates[k:], made = rows, [on_cpu], k
        if k == 0:
            trace.notices.extend(f"image {b}: {why}" for b, why in enumerate(state.reasons) if why)
        trace.notices.extend(_not_finite(k, evaluation, state.active))
        on_iteration(k, rows, evaluation.score)  # a host's progress bar raises its interrupts too
        return evaluation

    def update(k: int, evaluation: _Evaluation) -> None:
        _stop(state, settings, k, evaluation.drift.cpu(), evaluation.score.total.detach().cpu().double())
        _step(state, evaluation, settings)
        _hold(state, settings, evaluation)

    while k <= settings.iterations:
        evaluation, cut = attempt(interrupts, iteration, k)
        if not cut and k < settings.iterations:
            _, cut = attempt(interrupts, update, k, evaluation)
            whole = cut is None  # half of an update is no state to go on from
        if cut:
            if cut.memory and made != k and rollout.shrink():
                trace.notices.append(f"{cut} at iteration {k}: went on with {rollout.way}")
                continue
            if state.keeper.empty:
                raise cut.problem
            reason, cut_short = f"{cut} at iteration {k}", True
            break
        if not state.active.any() and k < settings.iterations:
            reason = "; ".join(dict.fromkeys(r for r in state.reasons if r))
            break
        k += 1
        del evaluation  # nothing of it is alive while the next one is made
    reason = reason or "all iterations done"
    goes_on = whole and state.active.any()
    left = Left((state, keeper, trace, iterates, latest), min(k, settings.iterations)) if goes_on else None
    trace.kept = state.keeper.iteration.tolist()
    trace.reasons = [r or reason for r in state.reasons]
    return Result(
        state.keeper.latent, latest, tuple(state.keeper.noises), trace, reason, iterates, cut_short, left=left
    )


def _evaluate(rollout: Rollout, score: Callable, state: _State, settings: Settings, gradient: bool) -> _Evaluation:
    """With a gradient that is finite, where there is a loss scale at which it is."""
    try:
        while True:
            evaluation = _evaluate_once(rollout, score, state, settings, gradient)
            if not gradient or not state.scale.lower(_overflowed(evaluation) & state.active):
                return evaluation
            del evaluation  # nothing of it is alive while the next one is made
    finally:
        rollout.let_go()


def _evaluate_once(rollout: Rollout, score: Callable, state: _State, settings: Settings, gradient: bool) -> _Evaluation:
    with torch.set_grad_enabled(gradient):
        path = rollout(state.variables.noises())
        result = score(path.x0)
        if state.reference is None:
            if gradient and state.check_reward:
                state.end(_flat(result.total, path.x0, state.scale), FLAT)
            state.reference = path.detach()
        # The regulariser alone carries a gradient, where it has a weight; the others are for the record.
        weighed = bool(state.beta.any())
        with torch.set_grad_enabled(gradient and weighed):
            penalties = {settings.regularizer: REGULARIZERS[settings.regularizer](path, state.reference)}
            if (own := state.variables.penalty()) is not None:
                penalties[settings.variables] = own
        if gradient and state.relative:
            _make_absolute(result.total, penalties[settings.regularizer], state, settings)
        loss = -result.total
        if weighed:
            for penalty in penalties.values():
                loss = loss + state.beta.to(penalty) * penalty
        with torch.no_grad():
            surrogates = {name: f(path, state.reference) for name, f in SURROGATES.items()}
            surrogates |= {name: p.detach() for name, p in penalties.items() if name not in (*surrogates, "none")}
        drift = surrogates[settings.drift_metric]
        if not gradient:
            return _Evaluation(path, result, surrogates, drift, loss)
        grads = state.scale.gradients(loss, state.z)
    result = replace(result, total=result.total.detach())
    return _Evaluation(path.detach(), result, surrogates, drift, loss.detach(), grads, norm(grads))


def _make_absolute(reward: Tensor, penalty: Tensor, state: _State, settings: Settings) -> None:
    """beta, so far in units of |grad r| / |grad R| with respect to the noises, as the loss takes it."""
    norms = [norm(state.scale.gradients(values, state.z, retain_graph=True)).cpu() for values in (reward, penalty)]
    ratio, known = norms[0] / norms[1], torch.isfinite(reward.detach()).cpu()
    if images := torch.nonzero(known & (norms[1] == 0)).flatten().tolist():
        raise NoGradient(
            f"relative_beta: {settings.regularizer} has no gradient at the unchanged noises of image(s) {images}, so "
            "that its weight cannot be measured there: turn relative_beta off, or use more steps or gradient_steps 0"
        )
    if (known & ~torch.isfinite(ratio) & (state.scale.value > 1)).any():
        return  # its scale is lowered, and this comes again
    ratio = torch.where(torch.isfinite(ratio), ratio, 1)
    state.beta, state.floor, state.relative = state.beta * ratio, state.floor * ratio, False


def _overflowed(evaluation: _Evaluation) -> Tensor:
    """(B,), on the CPU: a gradient that is not finite under a finite loss."""
    return torch.isfinite(evaluation.loss).cpu() & ~evaluation.finite


def _not_finite(k: int, evaluation: _Evaluation, active: Tensor) -> list[str]:
    """What the user should know of it, if anything."""
    images = torch.nonzero(~evaluation.finite & active).flatten().tolist()
    return [f"image {b}: {NOT_FINITE} at iteration {k}" for b in images]


def _check_noises(noises: Sequence[Tensor], settings: Settings) -> None:
    """Raise ValueError for what has no meaning where the initial noise is zero (leftover noise in the latent)."""
    if (noises[0].flatten(1) != 0).any(1).all():
        return
    if settings.optimizer == "sphere" and settings.variables != "injected":
        raise ValueError(
            "optimizer is sphere, which keeps the norm of every noise, but the initial one is zero: use adamw"
        )
    if settings.regularizer == "chi" and settings.beta:
        raise ValueError("regularizer is chi, the density of the initial noise's norm, but that is zero: use another")


class NoGradient(RuntimeError):
    """The reward cannot be optimised from here: nothing failed, it was asked for what there is not."""


def _flat(reward: Tensor, x0: Tensor, scale: LossScale) -> Tensor:
    """(B,): whose reward has no slope. A penalty has a gradient of its own, so it would be lost silently: it is looked
    at alone. Raises NoGradient where none has one.
    """
    if not x0.requires_grad:
        raise NoGradient("the image does not depend on the noise that is optimised: what samples it ignores that")
    if not reward.requires_grad:
        raise NoGradient(
            "the reward has no gradient with respect to the image: use a differentiable reward, "
            "or a method that only ranks images"
        )
    flat = norm(scale.gradients(reward, [x0], retain_graph=True)).cpu() == 0
    if flat.all():
        raise NoGradient(
            "the gradient of the reward is zero for every image: it cannot be optimised from here; "
            "check that the reward is differentiable and not saturated"
        )
    return flat


def _rows(
    k: int, state: _State, evaluation: _Evaluation, settings: Settings, seconds: float, memory: float
) -> list[dict[str, float]]:
    columns = {"reward": evaluation.score.total}
    if any(not torch.equal(part, evaluation.score.total) for part in evaluation.score.parts.values()):
        columns |= {f"reward.{name}": part for name, part in evaluation.score.parts.items()}
    columns |= evaluation.surrogates
    noises = evaluation.path.noises
    columns["noise_norm"] = norm(noises) / sum(z[0].numel() for z in noises) ** 0.5
    if settings.hold == "dual_ascent" or settings.relative_beta:
        columns["beta"] = state.beta
    if evaluation.norms is not None:
        columns["gradient_norm"] = evaluation.norms
    columns["lr"] = settings.lr * 0.5 ** state.halvings.double()
    return rows_of(k, columns, seconds=seconds, memory_mb=memory / 1e6)


def _stop(state: _State, settings: Settings, k: int, drift: Tensor, reward: Tensor) -> None:
    if "plateau" in settings.stop:
        state.end(
            state.keeper.since_progress(k) >= settings.patience, f"no progress for {settings.patience} iterations"
        )
    if settings.stop == "plateau_at_limit" and settings.hold != "no":
        first = reward if state.first is None else state.first
        gained, gain = reward - (first if state.last is None else state.last), reward - first
        at_limit = drift >= AT_LIMIT * settings.drift_limit
        state.end(at_limit & (gained < HELD_GAIN * gain.clamp(min=0)), "held at its limit, where it gains no more")
        state.first, state.last = first, reward
    if "drift" in settings.stop:
        state.end(drift > settings.drift_limit, f"{settings.drift_metric} passed {settings.drift_limit:g}")


def _step(state: _State, evaluation: _Evaluation, settings: Settings) -> None:
    """One update of every active image. Where something was not finite: back half-way to the last good noises."""
    assert evaluation.norms is not None  # an iterate that is to be moved has gradients
    finite, norms = evaluation.finite, evaluation.norms.cpu()
    bad = ~finite & state.active
    state.halvings = torch.where(finite, 0, state.halvings + bad)
    state.end(bad & (state.halvings > MAX_HALVINGS), f"{NOT_FINITE} {MAX_HALVINGS + 1} times in a row")
    if state.good is None:
        state.end(bad, f"{NOT_FINITE} on the plain sample")
    stepping, halving = finite & state.active, bad & state.active
    if settings.optimizer in NORMALIZED:
        scale = state.variables.count.cpu() ** 0.5 / norms.clamp(min=1e-20)
    else:
        scale = clipping(norms, settings.clip_norm)
    before = step(state.optimizer, state.z, scaled(evaluation.gradients, scale), stepping)
    good = before if state.good is None else state.good
    with torch.no_grad():
        for z, b, g in zip(state.z, before, good, strict=True):
            back = torch.where(torch.isfinite(b), (b + g) / 2, g)
            z.copy_(torch.where(per_image(halving.to(z.device), z), back, z))
    moved = stepping.to(before[0].device)
    state.good = [torch.where(per_image(moved, b), b, g) for b, g in zip(before, good, strict=True)]


@torch.no_grad()
def _hold(state: _State, settings: Settings, evaluation: _Evaluation) -> None:
    """Keep the drift at its limit. evaluation: of the iterate that the last update started from."""
    if settings.hold == "projection":
        starts = state.variables.begun
        moved = [z - start for z, start in zip(state.z, starts, strict=True)]
        shares = total(mean_square(m, evaluation.path.mask) for m in moved) / 2
        inside = settings.drift_limit * INSIDE
        scale = (inside / shares.clamp(min=1e-12)).sqrt().clamp(max=1)
        for z, start, m in zip(state.z, starts, moved, strict=True):
            z.copy_(start + m * per_image(scale.to(m), m))
    elif settings.hold == "dual_ascent":
        factor = (evaluation.drift.cpu().float() / settings.drift_limit).clamp(1 / DUAL_STEP, DUAL_STEP)
        state.beta = torch.where(torch.isfinite(factor), state.beta * factor, state.beta).maximum(state.floor)
