"""Search and steering: several particles of one frozen model, of which the better ones survive.

Best-of-N, zero-order search (arXiv 2501.09732), FK steering (arXiv 2501.06848), CoDe (arXiv 2502.00968), DAS (arXiv
2501.05803), successive halving and NTRK (arXiv 2606.18066); the hybrid of MIRA and FK has a file of its own. They
sample from, or climb within, the model's distribution tilted towards the reward; none of these needs a gradient but
DAS and NTRK.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import towards
from .ending import Interrupts, attempt
from .optimize import Result, Score, Settings
from .particles import Chain, Particles
from .resampling import select
from .rollout import Rollout, per_image
from .steering import code, das, fk_steering, halving, ntrk

POTENTIALS = ("max", "difference")


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    particles: N, how many are alive at once (best_of_n: in all). rounds: of zero_order, each of N candidates; of ntrk,
        how often an image is sampled.
    interval: sampling steps between two looks at the particles; 0: a fifth of the steps for FK steering, a twentieth
        for CoDe (their papers' 20 and 5 of 100), and for halving as often as it takes to leave one. DAS looks at every
        step.
    strength: lambda of FK steering, 1 / alpha of DAS: the target is p(x) exp(strength r(x)).
    potential: FK's, "max" over the lineage so far or "difference" of successive rewards.
    ess: resample when the effective sample size falls below this share of the particles.
    restart_denoise: of restarts and ntrk, to which share of the schedule an image is noised again.
    radius: how different zero_order's candidates are from their pivot; 1: other seeds. Of ntrk, the share of an
        injected noise that the reward chooses.
    tempering: gamma of DAS, whose strength grows as (1 + gamma)^i - 1 over 100 steps, up to 1.
    mira_fk (see `hybrid.py`): `rounds` times `iterations` updates of every particle, with lr, regularizer and beta.
    """

    method: str = "best_of_n"
    particles: int = 4
    rounds: int = 4
    interval: int = 0
    strength: float = 10.0
    potential: str = "max"
    ess: float = 0.5
    radius: float = 0.4
    tempering: float = 0.008
    iterations: int = 5
    lr: float = 0.02
    regularizer: str = "mira"
    beta: float = 0.1
    restart_denoise: float = 0.8
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, table in {"method": METHODS, "potential": POTENTIALS}.items():
            if getattr(self, name) not in table:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(table)}")
        for name, least in {"particles": 1, "rounds": 1, "interval": 0, "iterations": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: use {least} or more")
        for name in ("strength", "ess", "tempering"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: use 0 or more")
        Settings(lr=self.lr, regularizer=self.regularizer, beta=self.beta)  # says what is wrong with them
        for name in ("radius", "restart_denoise"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use a value above 0 and up to 1")

    def looks(self, steps: int) -> list[int]:
        """The steps, of 1 to `steps`, after which a steering method looks at its particles."""
        method = METHODS[self.method]
        every = self.interval if "interval" in method.reads else 0
        if not every and method.looks:
            often = method.looks(self.particles) if callable(method.looks) else method.looks
            every = steps // often if callable(method.looks) else round(steps / often)
        every = max(1, every)
        return [*range(every, steps, every), steps]

    def restart_step(self, steps: int) -> int:
        """The step, from 0, at which a restart of ntrk begins: two before the end at most, as the last has no noise."""
        return max(0, steps - max(2, round(steps * self.restart_denoise)))

    def rows(self, steps: int) -> int:
        """How many rows a run has beyond the plain sample's."""
        if self.method == "best_of_n":
            return self.particles - 1
        if METHODS[self.method].restarts:
            return self.rounds + 1
        stretch = steps - self.restart_step(steps)
        again = (self.rounds - 1) * len(self.looks(stretch)) if METHODS[self.method].repaints else 0
        return len(self.looks(steps)) + again if METHODS[self.method].steers else self.rounds


@dataclass
class SearchResult(Result):
    """particles (P, B, C, ...) and log_weights (P, B): the last population, and how much each counts."""

    particles: Tensor | None = None
    log_weights: Tensor | None = None


def best_of_n(run: Particles, settings: SearchSettings) -> tuple[Tensor, Tensor]:
    """Other seeds beside the plain sample's, a row for each."""
    latents = [run.kept.latent[None]]
    k = 1
    while k < run.count:
        some = range(k, min(k + run.most, run.count))
        population = run.whole([run.begin(some), *(run.fresh(some, z) for z in run.noises[1:])])
        reward, parts, images = run.score(population.x)
        for p in range(len(some)):
            one, row = population.take(torch.full((1, run.batch), p)), slice(p, p + 1)
            run.report(k + p, one, reward[row], {n: v[row] for n, v in parts.items()}, images[row], True)
        latents.append(population.x)
        k += len(some)
    return torch.cat(latents), torch.zeros(run.count, run.batch)


def zero_order(run: Particles, settings: SearchSettings) -> tuple[Tensor, Tensor]:
    """`rounds` times: the best of the candidates at `radius` around the best so far, if one is better."""
    pivot, latents = [z[None] for z in run.noises], run.kept.latent[None]
    for k in range(1, settings.rounds + 1):
        around = [run.fresh(range(run.count), z[0]) for z in pivot]
        noises = towards([z.expand_as(a) for z, a in zip(pivot, around, strict=True)], around, settings.radius)
        population = run.whole(noises)
        before = run.best_reward
        reward, parts, images = run.score(population.x)
        best = run.report(k, population, reward, parts, images, True)
        rose = (run.best_reward > before).to(pivot[0].device)
        found = [select(z, best[None]) for z in population.noises]
        pivot = [torch.where(per_image(rose, z[0])[None], f, z) for z, f in zip(pivot, found, strict=True)]
        latents = population.x
    return latents, torch.zeros(latents.shape[:2])


@dataclass(frozen=True)
class Method:
    """What is to be known of a method.

    run: what goes on from the plain sample, (particles, settings) -> (latents, log weights). None: another loop has it,
        `hybrid.hybrid` (optimizes: whole trajectories) or `restart.search_by_restarts` (restarts: whole images).
    gradient: it needs the reward's. steers: it looks at particles that are still noisy. looks: so many times a run, of
        so many particles, if nothing else is said; 0: at every step. injects: it needs noises that the sampler injects.
        copies: one particle may go on as several, which part by those. repaints: `rounds` times, each image anew.
    reads: the settings that mean something to it, beside `particles` and `loss_scale`.
    """

    run: Callable[[Particles, SearchSettings], tuple[Tensor, Tensor]] | None = None
    gradient: bool = False
    steers: bool = False
    looks: int | Callable[[int], int] = 0
    injects: bool = False
    copies: bool = True
    repaints: bool = False
    optimizes: bool = False
    restarts: bool = False
    reads: tuple[str, ...] = ()


METHODS = {
    "best_of_n": Method(best_of_n),
    "zero_order": Method(zero_order, reads=("rounds", "radius")),
    "fk_steering": Method(
        fk_steering, steers=True, injects=True, looks=5, reads=("interval", "strength", "potential", "ess")
    ),
    "code": Method(code, steers=True, injects=True, looks=20, reads=("interval",)),
    "halving": Method(
        halving, steers=True, copies=False, looks=lambda n: math.ceil(math.log2(n)) + 1, reads=("interval",)
    ),
    "das": Method(das, gradient=True, steers=True, injects=True, reads=("strength", "ess", "tempering")),
    "mira_fk": Method(
        gradient=True, optimizes=True, reads=("rounds", "radius", "iterations", "lr", "regularizer", "beta")
    ),
    "restarts": Method(restarts=True, reads=("rounds", "restart_denoise")),
    "ntrk": Method(
        ntrk, gradient=True, steers=True, injects=True, copies=False, repaints=True,
        reads=("rounds", "radius", "restart_denoise", "interval"),
    ),
}  # fmt: skip


def search(
    chain: Chain,
    rollout: Rollout,
    score: Callable[[Tensor], Score],
    noises: Sequence[Tensor],
    settings: SearchSettings,
    *,
    seed: int = 0,
    most: int = 1,
    initial: Callable[[int], Tensor] | None = None,
    on_plain: Callable[[Tensor], None] = lambda x0: None,
    on_iteration: Callable[[int, list[dict], Score], None] = lambda k, rows, score: None,
    interrupts: Interrupts = (),
    memory: Callable[[], float] = lambda: 0.0,
) -> SearchResult:
    """Search from the plain sample's `noises` (z_T, ..., z_1), each (B, C, ...), for images of a higher reward.

    Every image of the batch has particles of its own. Iteration 0 is the plain sample, and the first particle begins
    from its z_T; all other noises come from `seed`, the same however many particles run at once (`most`), but for z_T
    of particle p where `initial(p)` makes it. on_plain: is shown the plain sample before anything is scored. rollout:
    the schedule and the units of the record. score: latents of any number of particles -> `Score`. An exception of
    `interrupts`, running out of memory with one particle and any other error end the run after iteration 0 with the
    best so far: a steered run then hands back the best prediction of its result.

    Raises ValueError for a steering method when the sampler injects no noise, and for one that optimises.
    """
    method = METHODS[settings.method]
    go_on = method.run
    if go_on is None:
        other = "optimises whole trajectories: call `hybrid`"
        raise ValueError(
            f"method is {settings.method}, which "
            f"{other if method.optimizes else 'noises whole images: call `search_by_restarts`'}"
        )
    if method.steers and method.injects and len(noises) < 2:
        raise ValueError(
            f"method is {settings.method}, which works by the noise that the sampler injects, but here it injects "
            "none: use an ancestral or SDE sampler and more than one step, or best_of_n or zero_order"
        )
    run = Particles(
        chain, rollout, score, noises, count=settings.particles, seed=seed, most=most,
        steered=method.steers and method.copies,
        initial=initial, on_plain=on_plain, on_iteration=on_iteration, memory=memory,
        loss_scale=settings.loss_scale,
    )  # fmt: skip

    def whole() -> tuple[Tensor, Tensor]:
        run.plain()
        return go_on(run, settings)

    found, cut = attempt(interrupts, whole)
    if cut and run.kept.empty:
        raise cut.problem
    particles, log_weights = (None, None) if cut else found
    ended = "all particles done" if settings.particles > 1 else "sampled"
    reason = f"{cut} after row {run.trace.rows[-1]['iteration']}" if cut else ended
    trace = run.trace
    trace.kept, trace.reasons = run.kept.iteration.tolist(), [reason] * run.batch
    trace.settings |= {"evaluations": run.calls, "backwards": run.backwards}
    return SearchResult(
        run.kept.latent, run.iterates[-1].to(run.kept.latent), tuple(run.kept.noises), trace, reason, run.iterates,
        cut is not None, particles=particles, log_weights=log_weights,
    )  # fmt: skip
