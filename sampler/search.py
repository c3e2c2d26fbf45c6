"""Search and steering: several particles of one frozen model, of which the better ones survive.

Best-of-N, zero-order search (arXiv 2501.09732), FK steering (arXiv 2501.06848), CoDe (arXiv 2502.00968) and DAS
(arXiv 2501.05803); the hybrid of MIRA and FK has a file of its own. All of them sample from, or climb within, the
model's distribution tilted by exp(strength * reward); none of these needs a gradient but DAS.

Particles are stacked particle by particle: index p * B + b is particle p of image b.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from .candidates import towards
from .ending import Interrupts, attempt, within_memory
from .keep import Kept
from .optimize import Result, Score, Settings
from .rollout import Denoiser, NoiseSource, Path, Record, Rollout, escapes, per_image
from .seeds import stream
from .surrogates import SURROGATES
from .trace import Trace, rows_of


@dataclass(frozen=True)
class Method:
    """What is to be known of a method. gradient: it needs the reward's. steers: it looks at particles that are still
    noisy, which part by the noise that the sampler injects. looks: so many times per run, if nothing else is said (0:
    at every step). optimizes: whole trajectories, by `hybrid.hybrid`, restarts: whole images, by
    `restart.search_by_restarts`, and not by `search`.
    """

    gradient: bool = False
    steers: bool = False
    looks: int = 0
    optimizes: bool = False
    restarts: bool = False


METHODS = {
    "best_of_n": Method(),
    "zero_order": Method(),
    "fk_steering": Method(steers=True, looks=5),
    "code": Method(steers=True, looks=20),
    "das": Method(gradient=True, steers=True),
    "mira_fk": Method(gradient=True, optimizes=True),
    "restarts": Method(restarts=True),
}
POTENTIALS = ("max", "difference")
WORST = -1e9


class Chain(Protocol):
    """A model's sampling process that can be stopped at any noise level, and continued from there.

    start: z_T -> x_T. denoise: D(x, sigma). segment(x, i, j, source, wrap): the sampler from schedule[i] to
    schedule[j], as `rollout.Sample`. All take any number of particles of a whole batch.
    """

    def start(self, z_T: Tensor) -> Tensor: ...

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor: ...

    def segment(
        self, x: Tensor, i: int, j: int, source: NoiseSource, wrap: Callable[[Denoiser], Denoiser]
    ) -> Tensor: ...


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    particles: N, how many are alive at once (best_of_n: in all). rounds: of zero_order, each of N candidates.
    interval: sampling steps between two looks at the particles; 0: a fifth of the steps for FK steering, a twentieth
        for CoDe (their papers' 20 and 5 of 100). DAS looks at every step.
    strength: lambda of FK steering, 1 / alpha of DAS: the target is p(x) exp(strength r(x)).
    potential: FK's, "max" over the lineage so far or "difference" of successive rewards.
    ess: resample when the effective sample size falls below this share of the particles.
    restart_denoise: of restarts, to which share of the schedule an image is noised again.
    radius: how different zero_order's candidates are from their pivot; 1: other seeds.
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

    def __post_init__(self):
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
        """The steps, of 1 to `steps`, after which FK steering and CoDe look at their particles."""
        looks = METHODS[self.method].looks
        if not looks:
            return list(range(1, steps + 1))
        every = self.interval or max(1, round(steps / looks))
        return [*range(every, steps, every), steps]

    def rows(self, steps: int) -> int:
        """How many rows a run has beyond the plain sample's."""
        if self.method == "best_of_n":
            return self.particles - 1
        if METHODS[self.method].restarts:
            return self.rounds + 1
        return len(self.looks(steps)) if METHODS[self.method].steers else self.rounds


@dataclass
class SearchResult(Result):
    """particles (P, B, C, ...) and log_weights (P, B): the last population, and how much each counts."""

    particles: Tensor = None
    log_weights: Tensor = None


@dataclass
class _Population:
    """x, x0 (P, B, C, ...): states, and the latest predictions of their results. The histories are per call."""

    x: Tensor
    x0: Tensor | None = None
    noises: list[Tensor] = field(default_factory=list)
    eps: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def take(self, index: Tensor) -> _Population:
        """index (P', B): which particle of each image goes on."""
        return _Population(
            taken(self.x, index),
            None if self.x0 is None else taken(self.x0, index),
            [taken(z, index) for z in self.noises],
            [taken(e, index) for e in self.eps],
            self.sigmas,
            self.weights,
        )

    def path(self, particle: Tensor, mask: Tensor | None) -> Path:
        """The whole path of one particle of every image, (B,)."""
        one = self.take(particle[None])
        return Path(
            one.x[0],
            tuple(z[0] for z in one.noises),
            tuple(e[0] for e in one.eps),
            tuple(self.sigmas),
            tuple(self.weights),
            mask,
        )


def taken(values: Tensor, index: Tensor) -> Tensor:
    """values (P, B, ...), index (P', B) -> (P', B, ...)."""
    index = index.to(values.device)
    return values[index, torch.arange(index.shape[1], device=values.device)]


def multinomial(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """(P, B) -> (P, B): P independent draws of each image's particles, in proportion to their weights."""
    return torch.multinomial(log_weights.softmax(0).T, len(log_weights), True, generator=generator).T


def ssp(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """(P, B) -> (P, B): Srinivasan sampling: every particle gets floor or ceiling of its expected number of copies.

    Two fractional parts at a time trade what makes one of them whole, by a coin that keeps both expectations.
    """
    columns = []
    for weights in log_weights.double().softmax(0).T:
        count = len(weights)
        expected = (weights * count).tolist()
        copies = [math.floor(e + 1e-9) for e in expected]
        coins = torch.rand(count, generator=generator).tolist()
        left, share = 0, expected[0] - copies[0]
        for other in range(1, count):
            second = expected[other] - copies[other]
            both = share + second
            if both < 1:
                # One of them takes all, the other is settled.
                if both > 0 and coins[other] >= share / both:
                    left = other
                share = both
            elif coins[other] < (1 - second) / max(2 - both, 1e-12):
                copies[left] += 1
                left, share = other, both - 1
            else:
                copies[other] += 1
                share = both - 1
        if sum(copies) < count:
            copies[left] += 1  # what is left is whole, but for rounding
        columns.append(torch.repeat_interleave(torch.arange(count), torch.tensor(copies)))
    return torch.stack(columns, 1)


def effective(log_weights: Tensor) -> Tensor:
    """(P, B) -> (B,): the effective sample size, 1 / sum of the squared weights."""
    return 1 / log_weights.softmax(0).square().sum(0)


def best_of_n_kl(n: int) -> float:
    """KL of the best of n draws from the base distribution: log n - (n - 1) / n, for a reward without ties."""
    return math.log(n) - (n - 1) / n


class _Search:
    """One run's state: who draws which noise, what was seen, and what came out so far."""

    def __init__(self, chain, rollout, score, noises, settings, seed, most, initial, on_plain, on_iteration, memory):
        self.initial, self.on_plain = initial, on_plain
        self.chain, self.rollout, self.evaluate, self.settings = chain, rollout, score, settings
        self.noises = [n.detach() for n in noises]
        self.most = most
        self.on_iteration, self.memory = on_iteration, memory
        self.steps = len(rollout.schedule) - 1
        self.batch = len(noises[0])
        self.generators = [stream(seed, p) for p in range(settings.particles)]
        self.choosing = stream(seed, -1)
        self.trace, self.iterates = Trace(), []
        self.reference: Path | None = None
        self.kept = Kept()
        self.best_reward = torch.full((self.batch,), -math.inf)
        self.calls = self.backwards = 0  # of the denoiser, for each image
        self.started = time.perf_counter()

    def fresh(self, particles: Sequence[int], like: Tensor) -> Tensor:
        """Noise of every particle, (p, B, ...), each from its own generator: independent of how they are batched."""
        shape = (self.batch, *like.shape[1:])
        return torch.stack([torch.randn(shape, generator=self.generators[p]) for p in particles]).to(like)

    def begin(self, particles: Sequence[int]) -> Tensor:
        """z_T of every particle, (p, B, ...)."""
        if self.initial is None:
            return self.fresh(particles, self.noises[0])
        return torch.stack([self.initial(p) for p in particles]).to(self.noises[0])

    def chunks(self, particles: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
        """`work` on as many particles at once as fit; after running out of memory, on half as many."""
        done = 0
        while done < len(particles):
            some = particles[done : done + self.most]
            states = [g.get_state() for g in self.generators]
            _, cut = within_memory(work, some)
            if cut is None:
                done += len(some)
                continue
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
            if len(some) > 1:
                self.most = len(some) // 2
                self.trace.notices.append(f"{cut} with {len(some)} particles at once: went on with {self.most}")
            elif self.rollout.shrink():
                self.trace.notices.append(f"{cut}: went on with {self.rollout.memory} checkpointing")
            else:
                raise cut.problem

    def score(self, x0: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(P, B, C, ...) -> reward (P, B), parts, images (P, B, 3, H, W), chunk by chunk."""
        found: list[Score] = []

        def work(some: Sequence[int]) -> None:
            score = self.evaluate(x0[list(some)].flatten(0, 1))
            found.append(replace(score, images=score.images.cpu()))  # of all particles they may fill a GPU

        with torch.no_grad():
            self.chunks(range(len(x0)), work)
        return self._joined(found)

    def predict(self, population: _Population, step: int) -> None:
        """The denoiser's prediction of every particle's result at a step; `advance` takes it over as `known`."""
        found, sigma = [], self.rollout.schedule[step]

        def work(some: Sequence[int]) -> None:
            x = population.x[list(some)].flatten(0, 1)
            found.append(self.chain.denoise(x, sigma.to(x).expand(len(x))))

        with torch.no_grad():
            self.chunks(range(len(population.x)), work)
        population.x0 = torch.cat(found).unflatten(0, (-1, self.batch))
        self.calls += len(population.x)

    def _joined(self, found: list[Score]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        def join(values: list[Tensor]) -> Tensor:
            return torch.cat(values).detach().float().cpu().unflatten(0, (-1, self.batch))

        # A particle whose reward is not finite dies, but a weight has to be a number.
        total = join([s.total for s in found]).nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)
        parts = {name: join([s.parts[name] for s in found]) for name in found[0].parts}
        return total, parts, torch.cat([s.images for s in found]).unflatten(0, (-1, self.batch))

    def advance(self, population: _Population, i: int, j: int, noise: Callable, known: Tensor | None = None):
        """All particles from step i to step j, in place. noise(some, call, like): the noises (p, B, ...) of a call.

        known (P, B, C, ...): the prediction at step i, where it was made already.
        """
        pieces = []

        def work(some: Sequence[int]) -> None:
            calls = 0
            record = Record(self.rollout)
            drawn: list[Tensor] = []
            latest: list[Tensor] = []
            ready = None if known is None else known[list(some)].flatten(0, 1)

            def wrap(denoiser: Denoiser) -> Denoiser:
                def measured(x: Tensor, sigma: Tensor, **kwargs) -> Tensor:
                    nonlocal calls, ready
                    if ready is None or escapes(denoiser, kwargs):
                        out = denoiser(x, sigma, **kwargs)
                        calls += 1
                    else:
                        out = ready
                    ready = None
                    latest[:] = [record(x, sigma, out)]
                    return latest[0]

                return measured

            def source(draw: Callable[[], Tensor]) -> Tensor:
                z = noise(some, len(drawn), self.noises[0])
                drawn.append(z)
                return z.flatten(0, 1)

            with torch.no_grad():
                x = self.chain.segment(population.x[list(some)].flatten(0, 1), i, j, source, wrap)
            pieces.append((some, x, latest[0], drawn, record))
            self.calls += calls * len(some)

        self.chunks(range(len(population.x)), work)
        shape = (-1, self.batch)
        population.x = torch.cat([p[1] for p in pieces]).unflatten(0, shape)
        population.x0 = torch.cat([p[2] for p in pieces]).unflatten(0, shape)
        population.noises += [torch.cat(z) for z in zip(*(p[3] for p in pieces), strict=True)]
        records = [p[4] for p in pieces]
        population.eps += [torch.cat(e).unflatten(0, shape) for e in zip(*(r.eps for r in records), strict=True)]
        population.sigmas += [s[: self.batch] for s in records[0].sigmas]
        population.weights += [w[: self.batch] for w in records[0].weights]

    def whole(self, noises: Sequence[Tensor]) -> _Population:
        """The complete paths of given noises, each (P, B, ...)."""
        population = _Population(self.started_from(noises[0]), noises=[noises[0]])
        rest = list(noises[1:])

        def given(some: Sequence[int], call: int, like: Tensor) -> Tensor:
            if call >= len(rest):
                raise RuntimeError(
                    f"the sampler asked for more noises than the {len(noises)} of its plain run: its number of steps "
                    "depends on the image, so its particles cannot be compared; use euler_ancestral"
                )
            return rest[call][list(some)]

        self.advance(population, 0, self.steps, given)
        return population

    def started_from(self, z_T: Tensor) -> Tensor:
        """(P, B, ...) noises -> states at the first noise level."""
        return torch.stack([self.chain.start(z) for z in z_T])

    def plain(self) -> None:
        """Row 0: the unchanged noises, whose path is the reference of every surrogate."""
        population = self.whole([z[None] for z in self.noises])
        self.on_plain(population.x[0])
        reward, parts, images = self.score(population.x)
        self.reference = population.path(torch.zeros(self.batch, dtype=torch.long), self.rollout.mask).detach()
        self.report(0, population, reward, parts, images, complete=True)

    def report(
        self, k: int, population: _Population, reward: Tensor, parts: dict, images: Tensor, complete: bool, more=None
    ) -> Tensor:
        """A row per image for the best particle; the best image so far is kept. Returns the best particle, (B,)."""
        best = reward.argmax(0)
        columns = {"reward": taken(reward, best[None])[0]}
        if any(not torch.equal(part, reward) for part in parts.values()):
            columns |= {f"reward.{name}": taken(part, best[None])[0] for name, part in parts.items()}
        columns["reward_mean"] = reward.mean(0)
        blank = torch.full((self.batch,), math.nan)
        columns |= {name: blank for name in (*SURROGATES, "noise_norm")}
        path = population.path(best, self.rollout.mask)
        if complete:
            columns |= {name: f(path, self.reference) for name, f in SURROGATES.items()}
            columns["noise_norm"] = torch.cat([z.flatten(1) for z in path.noises], 1).square().mean(1).sqrt()
        columns |= more or {}
        rows = rows_of(
            k, columns, evaluations=self.calls, backwards=self.backwards, seconds=time.perf_counter() - self.started,
            memory_mb=self.memory() / 1e6,
        )  # fmt: skip
        self.started = time.perf_counter()
        latent = path.x0 if complete else taken(population.x0, best[None])[0]
        self.trace.rows += rows
        self.iterates.append(latent.cpu())
        self.keep(k, columns["reward"], latent, path.noises, complete)
        self.on_iteration(k, rows, Score(columns["reward"], {}, taken(images, best[None])[0]))
        return best

    def keep(self, k: int, reward: Tensor, latent: Tensor, noises: Sequence[Tensor], whole: bool) -> None:
        """The best image so far. The last population of a steered run replaces what its predictions promised."""
        better = reward > self.best_reward
        if self.kept.latent is None:
            better = torch.ones_like(better)
        elif METHODS[self.settings.method].steers and whole:
            better = reward > WORST
        self.best_reward = torch.where(better, reward, self.best_reward)
        missing = len(self.noises) - len(noises)  # not drawn yet
        self.kept.take(k, better, latent, [*noises, *[torch.zeros_like(noises[0])] * missing])

    # -- the methods

    def best_of_n(self) -> tuple[Tensor, Tensor]:
        rewards = [self.best_reward[None]]
        latents = [self.kept.latent[None]]
        k = 1
        while k < self.settings.particles:
            some = range(k, min(k + self.most, self.settings.particles))
            noises = [self.begin(some), *(self.fresh(some, z) for z in self.noises[1:])]
            population = self.whole(noises)
            reward, parts, images = self.score(population.x)
            for p in range(len(some)):
                one = population.take(torch.full((1, self.batch), p))
                self.report(
                    k + p, one, reward[p : p + 1], {n: v[p : p + 1] for n, v in parts.items()}, images[p : p + 1], True
                )
            rewards.append(reward)
            latents.append(population.x)
            k += len(some)
        return torch.cat(latents), torch.cat(rewards) * 0

    def zero_order(self) -> tuple[Tensor, Tensor]:
        pivot, latents = [z[None] for z in self.noises], self.kept.latent[None]
        for k in range(1, self.settings.rounds + 1):
            around = [self.fresh(range(self.settings.particles), z[0]) for z in pivot]
            noises = towards([z.expand_as(a) for z, a in zip(pivot, around, strict=True)], around, self.settings.radius)
            population = self.whole(noises)
            before = self.best_reward
            reward, parts, images = self.score(population.x)
            best = self.report(k, population, reward, parts, images, True)
            rose = (self.best_reward > before).to(pivot[0].device)
            found = [taken(z, best[None]) for z in population.noises]
            pivot = [torch.where(per_image(rose, z[0])[None], f, z) for z, f in zip(pivot, found, strict=True)]
            latents = population.x
        return latents, torch.zeros(latents.shape[:2])

    def _first(self) -> _Population:
        """All particles at the first noise level; the first one is the plain sample's."""
        count = self.settings.particles
        z = self.begin(range(count))
        if self.settings.method == "code":
            z = self.noises[0][None].expand_as(z).clone()  # one state, many continuations
        z[0] = self.noises[0]
        return _Population(self.started_from(z), noises=[z])

    def _injected(self, some: Sequence[int], call: int, like: Tensor) -> Tensor:
        return self.fresh(some, like)

    def _promised(self, n: int, population: _Population, found: tuple, log_weights: Tensor) -> None:
        reward, parts, images = found
        self.report(n, population, reward, parts, images, False, {"ess": effective(log_weights)})

    def fk_steering(self) -> tuple[Tensor, Tensor]:
        settings, population, at = self.settings, self._first(), 0
        shape = (settings.particles, self.batch)
        log_weights, spent = torch.zeros(shape), torch.zeros(shape)  # spent: log of the potentials of the lineage
        highest = torch.full(shape, -math.inf)
        before = torch.zeros(shape)
        for n, step in enumerate(settings.looks(self.steps), 1):
            at, last, (reward, parts, images) = self._next(population, at, step)
            if last:
                log_weights = log_weights + settings.strength * reward - spent
                self.report(n, population, reward, parts, images, True, {"ess": effective(log_weights)})
                break
            highest = torch.maximum(highest, reward)
            potential = settings.strength * (highest if settings.potential == "max" else reward - before)
            log_weights, spent, before = log_weights + potential, spent + potential, reward
            self._promised(n, population, (reward, parts, images), log_weights)
            index, log_weights = self._survivors(log_weights, multinomial)
            population = population.take(index)
            spent, highest, before = (taken(v, index) for v in (spent, highest, before))
        return population.x, log_weights

    def _survivors(self, log_weights: Tensor, resample: Callable) -> tuple[Tensor, Tensor]:
        """Who goes on, and with which weights, (P, B). Where the effective size is large enough: all as they are."""
        few = effective(log_weights) < self.settings.ess * len(log_weights)
        everyone = torch.arange(len(log_weights))[:, None].expand_as(log_weights)
        index = torch.where(few[None], resample(log_weights, self.choosing), everyone)
        return index, torch.where(few[None], 0, log_weights)

    def _next(self, population: _Population, at: int, step: int):
        """Go on to the next look: (the step, whether it is the end, the score of what every particle will become).

        The prediction is made at the new state: the one that the sampler made before its last noise does not know it.
        """
        self.advance(population, at, step, self._injected, known=population.x0 if at else None)
        last = step == self.steps
        if not last:
            self.predict(population, step)
        return step, last, self.score(population.x if last else population.x0)

    def code(self) -> tuple[Tensor, Tensor]:
        population, at = self._first(), 0
        for n, step in enumerate(self.settings.looks(self.steps), 1):
            at, last, (reward, parts, images) = self._next(population, at, step)
            best = self.report(n, population, reward, parts, images, last)
            if not last:
                population = population.take(best[None].expand(self.settings.particles, -1))
        return population.x, torch.zeros(self.settings.particles, self.batch)

    def das(self) -> tuple[Tensor, Tensor]:
        settings, population = self.settings, self._first()
        schedule, signal = self.rollout.schedule, self.rollout.signal
        log_weights = torch.zeros(settings.particles, self.batch)
        before = torch.zeros_like(log_weights)  # strength_i * r(x0_hat(x_i)), which the weights hold already
        for i in range(self.steps):
            population.x0, gradient, (reward, parts, images) = self._looked(population.x, schedule[i])
            strength = settings.strength * self._tempered(i)
            log_weights, before = log_weights + strength * reward - before, strength * reward
            if i:
                self._promised(i, population, (reward, parts, images), log_weights)
            index, log_weights = self._survivors(log_weights, ssp)
            population, gradient, before = population.take(index), taken(gradient, index), taken(before, index)
            # x' = mean + up z: a mean moved by up^2 strength gradient is a noise moved by up strength gradient.
            nsr, after = (s / signal(s) for s in (schedule[i], schedule[i + 1]))
            up = (after**2 * (1 - (after / nsr) ** 2)).sqrt() * signal(schedule[i])
            shift = settings.strength * self._tempered(i + 1) * up.to(gradient) * gradient
            drawn = len(population.noises)
            self.advance(
                population,
                i,
                i + 1,
                lambda some, call, like, mu=shift: self.fresh(some, like) + mu[list(some)],
                known=population.x0,
            )
            for z in population.noises[drawn:]:  # log N(z; 0, I) - log N(z; mu, I)
                moved = ((z - shift / 2) * shift).float().flatten(2).sum(2).cpu()
                log_weights = (log_weights - moved).nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)
        reward, parts, images = self.score(population.x)
        log_weights = log_weights + settings.strength * reward - before
        self.report(self.steps, population, reward, parts, images, True, {"ess": effective(log_weights)})
        return population.x, log_weights

    def _tempered(self, i: int) -> float:
        """The share of the strength at step i: DAS's schedule over 100 steps, stretched to ours; at the end, all."""
        if i == self.steps:
            return 1.0
        return min(1.0, (1 + self.settings.tempering) ** (100 * i / self.steps) - 1)

    def _looked(self, x: Tensor, sigma: Tensor):
        """D(x), the gradient of r(D(x)) with respect to x, and the score, all (P, B, ...), chunk by chunk."""
        found, scale = [], self.settings.loss_scale

        def work(some: Sequence[int]) -> None:
            with torch.enable_grad():
                state = x[list(some)].flatten(0, 1).detach().requires_grad_()
                out = self.chain.denoise(state, sigma.to(state).expand(len(state)))
                score = self.evaluate(out)
                (gradient,) = torch.autograd.grad(score.total.sum() * scale, state)
            # A particle whose gradient is not finite is not steered this time.
            finite = torch.isfinite(gradient).flatten(1).all(1)
            gradient = torch.where(per_image(finite, gradient), gradient / scale, 0)
            found.append((out.detach(), gradient, replace(score, images=score.images.cpu())))

        self.chunks(range(len(x)), work)
        self.calls += len(x)
        self.backwards += len(x)
        x0, gradient = (torch.cat([f[n] for f in found]).unflatten(0, (-1, self.batch)) for n in (0, 1))
        return x0, gradient, self._joined([f[2] for f in found])


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
    if method.optimizes:
        raise ValueError(f"method is {settings.method}, which optimises whole trajectories: call `hybrid`")
    if method.restarts:
        raise ValueError(f"method is {settings.method}, which noises whole images: call `search_by_restarts`")
    if method.steers and len(noises) < 2:
        raise ValueError(
            f"method is {settings.method}, whose particles part by the noise that the sampler injects, but here it "
            "injects none: use an ancestral or SDE sampler and more than one step, or best_of_n or zero_order"
        )
    run = _Search(chain, rollout, score, noises, settings, seed, most, initial, on_plain, on_iteration, memory)

    def whole() -> tuple[Tensor, Tensor]:
        run.plain()
        return getattr(run, settings.method)()

    found, cut = attempt(interrupts, whole)
    if cut and run.kept.latent is None:
        raise cut.problem
    particles, log_weights = found or (None, None)
    reason = f"{cut} after row {run.trace.rows[-1]['iteration']}" if cut else "all particles done"
    trace = run.trace
    trace.kept, trace.reasons = run.kept.iteration.tolist(), [reason] * run.batch
    trace.settings |= {"evaluations": run.calls, "backwards": run.backwards}
    return SearchResult(
        run.kept.latent, run.iterates[-1].to(run.kept.latent), tuple(run.kept.noises), trace, reason, run.iterates,
        cut is not None, particles, log_weights,
    )  # fmt: skip
