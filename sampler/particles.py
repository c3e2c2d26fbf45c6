"""Particles of one frozen model: sampled together, scored, and recorded as one row for the best of them.

Particles are stacked particle by particle: index p * B + b is particle p of image b.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .ending import within_memory
from .gradients import LossScale, finite
from .keep import Kept
from .optimize import Score
from .resampling import select
from .rollout import Denoiser, NoiseSource, Path, Record, Rollout, escapes, per_image
from .seeds import stream
from .surrogates import SURROGATES
from .trace import Trace, rows_of

WORST = -1e9  # the reward of what has none
UNSTEERED = "the reward's gradient was not finite at some steps, which steered nothing there"


class Chain(Protocol):
    """A model's sampling process that can be stopped at any noise level, and continued from there.

    start: z_T -> x_T. denoise: D(x, sigma). segment(x, i, j, source, wrap): the sampler from schedule[i] to
    schedule[j], as `rollout.Sample`. All take any number of particles of a whole batch. of: the chain of states that
    began with these z_T, by which a mask's surroundings are noised.
    """

    def of(self, z_T: Tensor) -> Chain: ...

    def start(self, z_T: Tensor) -> Tensor: ...

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor: ...

    def segment(
        self, x: Tensor, i: int, j: int, source: NoiseSource, wrap: Callable[[Denoiser], Denoiser]
    ) -> Tensor: ...


@dataclass
class Population:
    """x, z_T, x0 (P, B, C, ...): states, the noises that they began with, and the latest predictions of their results.
    The histories are per call.
    """

    x: Tensor
    z_T: Tensor
    x0: Tensor | None = None
    noises: list[Tensor] = field(default_factory=list)
    eps: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def take(self, index: Tensor) -> Population:
        """index (P', B): which particle of each image goes on."""
        return Population(
            select(self.x, index),
            select(self.z_T, index),
            None if self.x0 is None else select(self.x0, index),
            [select(z, index) for z in self.noises],
            [select(e, index) for e in self.eps],
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


class Particles:
    """A run's state: who draws which noise, what was seen, and what came out so far.

    count: how many there are at most, each with a generator of its own. steered: resampled while they are noisy, so
    that the last population replaces what its predictions promised. most: how many run at once. The others are as
    `search.search` takes them.
    """

    def __init__(
        self,
        chain: Chain,
        rollout: Rollout,
        score: Callable[[Tensor], Score],
        noises: Sequence[Tensor],
        *,
        count: int,
        steered: bool,
        seed: int,
        most: int,
        initial: Callable[[int], Tensor] | None,
        on_plain: Callable[[Tensor], None],
        on_iteration: Callable[[int, list[dict], Score], None],
        memory: Callable[[], float],
        loss_scale: float = 1.0,
    ) -> None:
        self.scale = loss_scale
        self.chain, self.rollout, self.evaluate = chain, rollout, score
        self.noises = [n.detach() for n in noises]
        self.count, self.steered, self.most = count, steered, most
        self.initial, self.on_plain, self.on_iteration, self.memory = initial, on_plain, on_iteration, memory
        self.steps = len(rollout.schedule) - 1
        self.batch = len(noises[0])
        self.generators = [stream(seed, p) for p in range(count)]
        self.choosing = stream(seed, -1)
        self.trace = Trace()
        self.iterates: list[Tensor] = []
        self.reference: Path  # of the plain sample
        self.kept = Kept()
        self.best_reward = self.plain_reward = torch.full((self.batch,), -math.inf)
        self.calls = self.backwards = 0  # of the denoiser, for each image
        self.started = time.perf_counter()

    def fresh(self, particles: Sequence[int], like: Tensor) -> Tensor:
        """Noise of every particle, (p, B, ...), each from its own generator: independent of how they are batched."""
        shape = (self.batch, *like.shape[1:])
        return torch.stack([torch.randn(shape, generator=self.generators[p]) for p in particles]).to(like)

    def chain_of(self, population: Population, some: Sequence[int]) -> Chain:
        return self.chain.of(population.z_T[list(some)].flatten(0, 1))

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
                self.trace.notices.append(f"{cut}: went on with {self.rollout.way}")
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
        return self._join(found)

    def predict(self, population: Population, step: int) -> Tensor:
        """The denoiser's prediction of every particle's result at a step, which its `x0` is then; `advance` takes it
        over as `known`.
        """
        found, sigma = [], self.rollout.schedule[step]

        def work(some: Sequence[int]) -> None:
            x = population.x[list(some)].flatten(0, 1)
            found.append(self.chain_of(population, some).denoise(x, sigma.to(x).expand(len(x))))

        with torch.no_grad():
            self.chunks(range(len(population.x)), work)
        population.x0 = torch.cat(found).unflatten(0, (-1, self.batch))
        self.calls += len(population.x)
        return population.x0

    def _join(self, found: Sequence[Score]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        def join(values: list[Tensor]) -> Tensor:
            return torch.cat(values).detach().float().cpu().unflatten(0, (-1, self.batch))

        # A particle whose reward is not finite dies, but a weight has to be a number.
        total = join([s.total for s in found]).nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)
        parts = {name: join([s.parts[name] for s in found]) for name in found[0].parts}
        return total, parts, torch.cat([s.images for s in found]).unflatten(0, (-1, self.batch))

    def advance(self, population: Population, i: int, j: int, noise: Callable, known: Tensor | None = None) -> None:
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
                def measure(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
                    nonlocal calls, ready
                    if ready is None or escapes(denoiser, kwargs):
                        out = denoiser(x, sigma, **kwargs)
                        calls += 1
                    else:
                        out = ready
                    ready = None
                    latest[:] = [record(x, sigma, out)]
                    return latest[0]

                return measure

            def source(draw: Callable[[], Tensor]) -> Tensor:
                z = noise(some, len(drawn), self.noises[0])
                drawn.append(z)
                return z.flatten(0, 1)

            with torch.no_grad():
                chain = self.chain_of(population, some)
                x = chain.segment(population.x[list(some)].flatten(0, 1), i, j, source, wrap)
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

    def whole(self, noises: Sequence[Tensor]) -> Population:
        """The complete paths of given noises, each (P, B, ...)."""
        population = Population(self.started_from(noises[0]), noises[0], noises=[noises[0]])
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
        self,
        k: int,
        population: Population,
        reward: Tensor,
        parts: dict,
        images: Tensor,
        complete: bool,
        more: dict | None = None,
        repainted: bool = False,
    ) -> Tensor:
        """A row per image for the best particle; the best image so far is kept. Returns the best particle, (B,).

        complete: it is an image, not a prediction. repainted: one that was noised again and sampled anew, whose path is
        no whole to be compared, and which is kept unless the plain sample is better.
        """
        best = reward.argmax(0)
        known = torch.where(reward > WORST, reward, math.nan)  # what has none is no number in the record
        columns = {"reward": select(known, best[None])[0]}
        if any(not torch.equal(part, reward) for part in parts.values()):
            columns |= {f"reward.{name}": select(part, best[None])[0] for name, part in parts.items()}
        columns["reward_mean"] = known.nanmean(0)
        blank = torch.full((self.batch,), math.nan)
        columns |= {name: blank for name in (*SURROGATES, "noise_norm")}
        path = population.path(best, self.rollout.mask)
        if complete and not repainted:
            columns |= {name: f(path, self.reference) for name, f in SURROGATES.items()}
        if complete:
            columns["noise_norm"] = torch.cat([z.flatten(1) for z in path.noises], 1).square().mean(1).sqrt()
        columns |= more or {}
        rows = rows_of(
            k, columns, evaluations=self.calls, backwards=self.backwards, seconds=time.perf_counter() - self.started,
            memory_mb=self.memory() / 1e6,
        )  # fmt: skip
        self.started = time.perf_counter()
        latent = path.x0
        if not complete:
            assert population.x0 is not None  # a prediction is reported once it is made
            latent = select(population.x0, best[None])[0]
        self.trace.rows += rows
        self.iterates.append(latent.cpu())
        self.keep(k, select(reward, best[None])[0], latent, path.noises, complete, repainted)
        self.on_iteration(k, rows, Score(columns["reward"], {}, select(images, best[None])[0]))
        return best

    def keep(
        self, k: int, reward: Tensor, latent: Tensor, noises: Sequence[Tensor], whole: bool, repainted: bool = False
    ) -> None:
        """The best image so far. Where particles are not steered, a prediction is none."""
        if not whole and not self.steered:
            return
        better = reward > (self.plain_reward if repainted else self.best_reward)
        if self.kept.empty:  # the plain sample
            better, self.plain_reward = torch.ones_like(better), reward
        elif self.steered and whole:
            better = reward > WORST
        self.best_reward = torch.where(better, reward, self.best_reward)
        missing = len(self.noises) - len(noises)  # not drawn yet
        self.kept.take(k, better, latent, [*noises, *[torch.zeros_like(noises[0])] * missing])

    def gradient(
        self, population: Population, sigma: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, dict[str, Tensor], Tensor]]:
        """D(x), the gradient of r(D(x)) with respect to x, and the score, all (P, B, ...), chunk by chunk."""
        x = population.x
        found: list[tuple[Tensor, Tensor, Score]] = []

        def evaluate_at(some: Sequence[int], scale: LossScale) -> tuple[Tensor, Tensor, Score]:
            with torch.enable_grad():
                state = x[list(some)].flatten(0, 1).detach().requires_grad_()
                try:
                    out = self.chain_of(population, some).denoise(state, sigma.to(state).expand(len(state)))
                    score = self.evaluate(out)
                    (gradient,) = scale.gradients(score.total, [state])
                finally:
                    self.rollout.let_go()
            self.calls += len(some)
            self.backwards += len(some)
            return out.detach(), gradient, replace(score, total=score.total.detach(), images=score.images.cpu())

        def work(some: Sequence[int]) -> None:
            scale = LossScale(self.scale, len(some) * self.batch)
            out, gradient, score = evaluate_at(some, scale)
            while scale.lower(torch.isfinite(score.total) & ~finite([gradient])):
                out, gradient, score = evaluate_at(some, scale)
            steered = finite([gradient])
            if steered[torch.isfinite(score.total)].all():
                self.scale = scale.value.min().item()
            elif UNSTEERED not in self.trace.notices:
                self.trace.notices.append(UNSTEERED)
            found.append((out, torch.where(per_image(steered, gradient), gradient, 0), score))

        self.chunks(range(len(x)), work)
        x0, gradients, scores = zip(*found, strict=True)
        shape = (-1, self.batch)
        return torch.cat(x0).unflatten(0, shape), torch.cat(gradients).unflatten(0, shape), self._join(scores)
