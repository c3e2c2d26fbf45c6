"""Steering: particles are looked at while they are still noisy, and the promising ones go on.

FK steering (arXiv 2501.06848), CoDe (arXiv 2502.00968), DAS (arXiv 2501.05803), successive halving (arXiv 1502.07943)
of seeds, and NTRK (arXiv 2606.18066), whose particles do not meet at all. Each takes the particles, after their plain
sample, to the end and returns the last population and its log weights, (P, B, C, ...) and (P, B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .candidates import towards
from .particles import WORST, Particles, Population
from .resampling import effective, multinomial, select, ssp
from .rollout import noised
from .whitening import whiten

if TYPE_CHECKING:
    from .search import SearchSettings

DAS_STEPS = 100  # of the schedule in its paper


def fk_steering(run: Particles, settings: SearchSettings) -> tuple[Tensor, Tensor]:
    """Resampled in proportion to exp(strength * the reward of the prediction), by one of two potentials."""
    population, at = start(run), 0
    shape = (run.count, run.batch)
    log_weights, spent = torch.zeros(shape), torch.zeros(shape)  # spent: log of the potentials of the lineage
    highest = torch.full(shape, -math.inf)
    before = torch.zeros(shape)
    for n, step in enumerate(settings.looks(run.steps), 1):
        reward, parts, images = look(run, population, at, step)
        at = step
        if step == run.steps:
            log_weights = log_weights + settings.strength * reward - spent
            run.report(n, population, reward, parts, images, True, {"ess": effective(log_weights)})
            break
        highest = torch.maximum(highest, reward)
        potential = settings.strength * (highest if settings.potential == "max" else reward - before)
        log_weights, spent, before = log_weights + potential, spent + potential, reward
        run.report(n, population, reward, parts, images, False, {"ess": effective(log_weights)})
        index, log_weights = survivors(run, log_weights, multinomial, settings.ess)
        population = population.take(index)
        spent, highest, before = (select(v, index) for v in (spent, highest, before))
    return population.x, log_weights


def code(run: Particles, settings: SearchSettings) -> tuple[Tensor, Tensor]:
    """All go on from the one whose prediction is best."""
    population, at = start(run, from_one=True), 0
    for n, step in enumerate(settings.looks(run.steps), 1):
        reward, parts, images = look(run, population, at, step)
        at, last = step, step == run.steps
        best = run.report(n, population, reward, parts, images, last)
        if not last:
            population = population.take(best[None].expand(run.count, -1))
    return population.x, torch.zeros(run.count, run.batch)


def halving(run: Particles, settings: SearchSettings) -> tuple[Tensor, Tensor]:
    """Successive halving: at every look the half with the better predictions goes on. The plain sample competes too."""
    population, at = start(run), 0
    for n, step in enumerate(settings.looks(run.steps), 1):
        reward, parts, images = look(run, population, at, step)
        at, last = step, step == run.steps
        run.report(n, population, reward, parts, images, last)
        if not last:
            population = population.take(reward.topk(math.ceil(len(reward) / 2), 0).indices)
    return population.x, torch.zeros(len(population.x), run.batch)


def das(run: Particles, settings: SearchSettings) -> tuple[Tensor, Tensor]:
    """Sequential Monte Carlo whose proposals follow the reward's gradient, at a strength that grows over the steps."""
    population = start(run)
    schedule, signal = run.rollout.schedule, run.rollout.signal
    log_weights = torch.zeros(run.count, run.batch)
    before = torch.zeros_like(log_weights)  # strength_i * r(x0_hat(x_i)), which the weights hold already
    for i in range(run.steps):
        population.x0, gradient, (reward, parts, images) = run.gradient(population, schedule[i])
        strength = settings.strength * share_of_strength(i, run.steps, settings.tempering)
        log_weights, before = log_weights + strength * reward - before, strength * reward
        if i:
            run.report(i, population, reward, parts, images, False, {"ess": effective(log_weights)})
        index, log_weights = survivors(run, log_weights, ssp, settings.ess)
        population, gradient, before = population.take(index), select(gradient, index), select(before, index)
        share = shift(schedule[i], schedule[i + 1], signal, run.rollout.noise_scale)
        strength = settings.strength * share_of_strength(i + 1, run.steps, settings.tempering)
        mu = strength * share.to(gradient) * gradient
        for odds in propose(run, population, i, mu):
            log_weights = (log_weights - odds).nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)
    reward, parts, images = run.score(population.x)
    log_weights = log_weights + settings.strength * reward - before
    run.report(run.steps, population, reward, parts, images, True, {"ess": effective(log_weights)})
    return population.x, log_weights


def ntrk(run: Particles, settings: SearchSettings) -> tuple[Tensor, Tensor]:
    """Noise-tilted reverse kernels: `radius` of every injected noise is the whitened gradient of what is predicted.

    The sampler's mean stays what it is, and its noise as large and as white. Each particle goes its own way to the end;
    in further `rounds` its image is noised again and sampled from there, tilted as before: a restart takes away what no
    image has, and the tilt brings back what the reward asked for. So the last round is kept, not the highest reward.
    """
    population, first, row = start(run), 0, 0
    for number in range(settings.rounds):
        before = population.noises
        if number:
            first = settings.restart_step(run.steps)
            population = restart(run, population, first)
        looks = [0, *settings.looks(run.steps - first)]
        for i in range(first, run.steps):
            if i - first in looks:
                direction, found = uphill(run, population, i)
                if i > first:
                    row += 1
                    run.report(row, population, *found, False)
            else:  # the same direction once more, of what is predicted here
                run.predict(population, i)
            tilt(run, population, i, direction, settings.radius)
        # A path of more than one stretch has no likelihood to measure; of its noises, as many as a whole one has.
        population.noises = [*before[: len(before) - len(population.noises)], *population.noises] if number else before
        row += 1
        run.report(row, population, *run.score(population.x), True, repainted=number > 0)
    return population.x, torch.zeros(run.count, run.batch)


def uphill(run: Particles, population: Population, i: int) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor], Tensor]]:
    """Of what is predicted at step i: where its reward rises, as noise would be, and its score."""
    sigma, after = run.rollout.schedule[i : i + 2]
    if after > 0:
        population.x0, gradient, found = run.gradient(population, sigma)
        return torch.stack([whiten(g, run.rollout.mask) for g in gradient]), found
    # The step to no noise at all injects none.
    return torch.zeros_like(population.x), run.score(run.predict(population, i))


def tilt(run: Particles, population: Population, i: int, direction: Tensor, share: float) -> None:
    """Step i with noises of which the direction has a share, in place."""

    def drawn(some: Sequence[int], call: int, like: Tensor) -> Tensor:
        fresh, along = run.fresh(some, like), direction[list(some)].to(like)
        (tilted,) = towards([fresh], [along], share)
        any_gradient = along.flatten(2).any(2)[(..., *[None] * (along.ndim - 2))]
        return torch.where(any_gradient, tilted, fresh)  # all of it, where the reward has none

    run.advance(population, i, i + 1, drawn, population.x0)


def restart(run: Particles, population: Population, step: int) -> Population:
    """Every particle's image at the noise level of a step, with fresh noise."""
    z, sigma = run.fresh(range(len(population.x)), run.noises[0]), run.rollout.schedule[step]
    pairs = zip(population.x, run.rollout.noise_scale * z, strict=True)
    return Population(torch.stack([noised(x0, sigma, n, run.rollout.signal) for x0, n in pairs]), z)


def start(run: Particles, from_one: bool = False) -> Population:
    """All particles at the first noise level; the first one is the plain sample's. from_one: all of them are."""
    z = run.begin(range(run.count))
    if from_one:
        z = run.noises[0][None].expand_as(z).clone()  # one state, many continuations
    z[0] = run.noises[0]
    return Population(run.started_from(z), z, noises=[z])


def look(run: Particles, population: Population, at: int, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Go on from step `at` to `step`, and score what every particle will become.

    The prediction is made at the new state: the one that the sampler made before its last noise does not know it.
    """
    run.advance(population, at, step, lambda some, call, like: run.fresh(some, like), population.x0 if at else None)
    if step == run.steps:
        return run.score(population.x)
    return run.score(run.predict(population, step))


def survivors(run: Particles, log_weights: Tensor, resample: Callable, ess: float) -> tuple[Tensor, Tensor]:
    """Who goes on, and with which weights, (P, B). ess: the share of effective particles that lets all of them."""
    few = effective(log_weights) < ess * len(log_weights)
    everyone = torch.arange(len(log_weights))[:, None].expand_as(log_weights)
    index = torch.where(few[None], resample(log_weights, run.choosing), everyone)
    return index, torch.where(few[None], 0, log_weights)


def propose(run: Particles, population: Population, i: int, mu: Tensor) -> list[Tensor]:
    """A step whose noises are of mean mu, (P, B, C, ...); of each, log N(z; mu, I) - log N(z; 0, I), (P, B)."""

    def drawn(some: Sequence[int], call: int, like: Tensor) -> Tensor:
        return run.fresh(some, like) + mu[list(some)]

    before = len(population.noises)
    run.advance(population, i, i + 1, drawn, population.x0)
    return [((z - mu / 2) * mu).float().flatten(2).sum(2).cpu() for z in population.noises[before:]]


def shift(sigma: Tensor, after: Tensor, signal: Callable[[Tensor], Tensor], noise_scale: float = 1.0) -> Tensor:
    """Of DAS's proposal: how far the noise of a step's mean moves along grad r(x0_hat(x)), x in the host's coordinates.

    A mean moved by up^2 grad r, up the deviation of a DDIM transition (eta = 1), is a noise moved by up grad r. That
    holds in variance-preserving coordinates, which are the host's over sqrt(signal^2 + sigma^2).
    """
    sigma, signal_now, next_nsr = noise_scale * sigma, signal(sigma), noise_scale * after / signal(after)
    nsr = sigma / signal_now
    up = (next_nsr**2 / (1 + next_nsr**2) * (1 - (next_nsr / nsr) ** 2)).sqrt()
    return up * (signal_now**2 + sigma**2).sqrt()


def share_of_strength(i: int, steps: int, gamma: float) -> float:
    """The share of the strength at step i: DAS's schedule, stretched to ours; at the end, all."""
    if i == steps:
        return 1.0
    return min(1.0, (1 + gamma) ** (DAS_STEPS * i / steps) - 1)
