"""What restarts do to the front of reward against adherence: `python dev.py bench restart [--steps 16] [--report]`.

Every variant optimises the same animals; the held-out judge and CLIPScore look at every iterate, clamped as a saved
file is. A path is read at its last passage of a reward, so that a round counts with all that it cost. Rows are kept in
output/restart/ and not made again; docs/results/restart*.csv hold them and what is read off them (docs/restart.md).
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench.front import LR, host, judge_module, rewards
from bench.grid import Failure, Store
from bench.likeness import Likeness, base_of, beside, evaluator, load, save, stacked
from bench.likeness import against as likeness_against
from bench.methods import DEFAULT, GRADIENT_STEPS, STRENGTH
from bench.model import sheet
from bench.paths import COLUMNS, against, at_equal_passes, in_figures, path_of, pooled
from bench.rows import file_run, gather, write
from bench.spectral import register
from testing.pack import ROOT, mira
from testing.world import World, demo

presets, settings_of = mira("nodes.shared.presets"), mira("nodes.shared.inputs").settings_of
vocabulary, Settings = mira("demo.vocabulary"), mira("sampler.optimize").Settings
SearchSettings = mira("sampler.search").SearchSettings
Relative, Reward = mira("rewards.combine").Relative, mira("rewards.base").Reward
JPEG = mira("rewards.jpeg").JPEG
RAW, OUT = ROOT / "output" / "restart", ROOT / "docs" / "results"
COUNT = 15  # animals in a batch
BOUNDS = 41  # of the drift, at which every image's best is taken
HELD = {"hold": "projection", "drift_metric": "path_kl", "drift_limit": 0.05, "keep": "best_within_drift"}
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of an injected noise, that the reward chooses
MANY = (1, 4, 8, 16, 26)  # up to the passes of three rounds
PARTICLES = (3, 6, 12)
CANDIDATES, AGAIN = 4, 0.8  # of a search by restarts
BEST_OF_DRAWS = ("best_of_two", "best_of_three")  # of plain optimisation, at every iterate; made of what is there
RIVALS = ("best_of_4", *BEST_OF_DRAWS, "once_.65", "dno_exact")
LIMITS = (0.01, 0.02, 0.1, 0.2)
OWN = 4  # plain samples of every animal, which the likeness is to


@dataclass(frozen=True)
class Variant:
    """settings: over those of plain optimisation. then: every iterate restarted once from this share of the schedule.
    seed: added to the study's. weighting, gradient_steps: the job's. shares: a "path" of single trajectories instead,
    each with so much of its noise chosen by the reward, anew at every `interval` steps, noised again to `again` of the
    schedule and sampled anew in further `rounds`. every_round: what there is after each of them is an iterate. best_of:
    a "path" of plain samples instead, the best of so many; fk: of FK steering, with so many particles; searched: of the
    search by restarts, so many rounds of `CANDIDATES` each. first: not the plain sample is optimised, but the way back
    of its restart from this share."""

    settings: dict = field(default_factory=dict)
    then: float = 0.0
    seed: int = 0
    weighting: str = "marginal"
    gradient_steps: int = GRADIENT_STEPS
    shares: tuple[float, ...] = ()
    rounds: int = 1
    again: float = 0.6
    every_round: bool = False
    interval: int = 1
    best_of: tuple[int, ...] = ()
    fk: tuple[int, ...] = ()
    searched: int = 0
    first: float = 0.0


def default(**changes) -> Variant:
    """The nodes' default, but for `changes`."""
    return Variant({name: getattr(DEFAULT, name) for name in DEFAULT.__dataclass_fields__} | changes)


def preset(name: str) -> Variant:
    """A preset of the nodes', with the dials that the editor sets with it."""
    values = presets.PRESETS[name] | presets.SUGGESTED[name]
    chosen = {k: getattr(settings_of(values), k) for k in Settings.__dataclass_fields__}
    return Variant(chosen, gradient_steps=GRADIENT_STEPS if values["gradient_steps"] else 0)


VARIANTS = {
    "dno": Variant(),
    "dno_again": Variant(seed=71),
    "dno_slow": Variant({"iterations": 24, "lr": LR / 2}),  # half the step, twice as often
    "best_of_4": Variant({"seeds": 4}),
    "held": Variant(HELD | {"seeds": 4}),  # the default before there were restarts
    "once_.65": Variant(then=0.65),
    "rounds_.4": Variant({"iterations": 16, "restart_every": 4, "restart_denoise": 0.4, "lr": 0.04}),
    "default": default(),
    # What the node does below ten steps, and plain optimisation with as much of a gradient.
    "default_exact": replace(default(), gradient_steps=0),
    "dno_exact": Variant(gradient_steps=0),
    "three_rounds": default(iterations=12),
    "default_.6": default(restart_denoise=0.6),
    "default_.4": default(restart_denoise=0.4),
    **{f"three_rounds_{limit:g}": default(iterations=12, drift_limit=limit) for limit in LIMITS},
    # Three of three, nothing held.
    "short_rounds": default(iterations=9, restart_every=3, hold="no", drift_limit=0.0, stop="never"),
    "normalized": Variant({"optimizer": "normalized"}),
    "whitened": Variant({"optimizer": "whitened"}),
    "ntrk": Variant(shares=SHARES),
    "ntrk_twice": Variant(shares=(0.4, 0.6), rounds=2),
    "ntrk_second": Variant(shares=(0.4, 0.6), rounds=3, again=0.8, every_round=True, interval=2),
    "ntrk_fourth": Variant(shares=(0.4,), rounds=3, again=0.8, every_round=True, interval=4),
    "fast": preset("fast"),
    "strong": preset("strong"),
    "three_rounds_exact": replace(default(iterations=12), gradient_steps=0),
    "best_of_n": Variant(best_of=MANY),
    "best_of_n_.65": Variant(best_of=MANY, then=0.65),
    "fk": Variant(fk=PARTICLES),
    "fk_.65": Variant(fk=PARTICLES, then=0.65),
    "search_by_restarts": Variant(searched=8),
    "restarted_first": Variant(first=0.8),
}

# What runs of fewer rounds would have come to, read off the first ones of one of three: by how many, their names.
CUT = {"three_rounds": {2: "default", 1: "first_round"}}
CUT |= {f"three_rounds_{limit:g}": {2: f"default_{limit:g}"} for limit in LIMITS}


class Observer:
    """Rows of (iterate, image), with what it had cost by then, in plain samples: a backward pass counts twice."""

    def __init__(self, judge, clip, reward, animals, prompts, gradient: float):
        """gradient: the share of the steps that a backward pass goes through."""
        self.evaluate, self.reward, self.embeddings = evaluator(judge, clip), reward, []
        self.animals, self.prompts, self.gradient = list(animals), prompts, gradient
        self.passes, self.rows, self.shown, self.round = 0.0, [], [], None

    def __call__(self, k: int, new: list[dict], score) -> None:
        begins = k == 0 or new[0].get("round") != self.round
        self.round = new[0].get("round")
        # A round begins with its plain run, without a gradient; the last iterate of a round has no update either, but
        # which one that is depends on the plan: an iterate is counted with the update that led to it.
        self.passes += 2 if begins else 1 + 2 * self.gradient
        surrogates = {a: {c: row[c] for c in ("path_kl", "mira")} for a, row in zip(self.animals, new, strict=True)}
        self.look(k, score.images, self.passes, surrogates)

    @torch.no_grad()
    def look(self, k: int, images: torch.Tensor, passes: float, measured: dict[str, dict]) -> None:
        images = images.detach().float().clamp(0, 1)
        rewards = self.reward(images, self.prompts)[0].tolist()
        seen, embeddings = self.evaluate(images, self.animals, self.prompts)
        for animal, reward, found in zip(self.animals, rewards, seen, strict=True):
            row = {"iterate": k, "animal": animal, "passes": passes, "reward": reward, **measured[animal]}
            self.rows.append(row | {c: found[c] for c in ("adherence", "clip_score")})
        self.shown.append(images)
        self.embeddings.append(embeddings)


def optimised() -> dict[str, Reward]:
    """Those of `front`, and one of another kind: words that the prompt has not got."""
    return rewards() | {"blue": Relative(demo.demo_clip_score(), "on a blue background", "")}


def run(
    world, judge, clip, variant: Variant, reward: str, part: int, steps: int, seed: int, count: int = COUNT
) -> tuple[list[dict], Observer]:
    followed, animals = optimised()[reward], vocabulary.ANIMALS[part * count : (part + 1) * count]
    counted = JPEG() if reward == "JPEG" else followed  # what is optimised there is an estimate of what counts
    prompts = [vocabulary.caption(a, prefix=True) for a in animals]
    positive = world.encode_batch(prompts)
    through = min(variant.gradient_steps or steps, steps)
    observer = Observer(judge, clip, counted, animals, prompts, through / steps)
    seed = seed + 1000 * part + variant.seed
    settings = Settings(**{"iterations": 12, "lr": LR, "keep": "last"} | variant.settings)
    observer.passes = settings.seeds - 1.0 + bool(variant.first)
    latent = None
    if variant.first:
        latent = world.ksampler(positive=positive, steps=steps, batch=len(prompts), seed=seed + 7)
    job = world.job(
        positive=positive, steps=steps, batch=len(prompts), prompts=prompts, reward=followed, seed=seed,
        latent=latent, denoise=variant.first or 1.0,
        memory="none" if through == GRADIENT_STEPS else "per_step", gradient_steps=variant.gradient_steps,
        weighting=variant.weighting, on_iteration=observer,
        restart_sigmas=lambda share: world.sigmas(steps=steps, denoise=share),
    )  # fmt: skip
    if variant.shares:
        return steered(job, observer, variant), observer
    if variant.best_of:
        return best_of(world, job.latent, positive, observer, variant, steps, seed), observer
    if variant.fk:
        return fk(world, job, positive, observer, variant, steps, STRENGTH.get(reward, 1.0)), observer
    if variant.searched:
        return searched(job, observer, variant), observer
    job.settings = settings
    with torch.inference_mode():
        done = host.run(job)
    if variant.then:
        before = [r["passes"] for r in observer.rows[:: len(animals)]]
        observer.rows, observer.shown, observer.embeddings = [], [], []
        look_at(world, positive, observer, steps, zip(before, done.iterates, strict=True), variant.then)
    kept = done.result.trace.kept
    images = len(animals)
    for n, row in enumerate(observer.rows):
        row["kept"] = int(kept[n % images] == row["iterate"])
    return observer.rows, observer


def steered(job, observer: Observer, variant: Variant) -> list[dict]:
    """The plain sample, twice as the host takes it, and up to three passes for every particle, backward being two."""
    none, ends = {a: {} for a in observer.animals}, []

    def passes(rounds: int) -> float:
        return 2 + (1 + 2 / variant.interval) * (1 + variant.again * (rounds - 1))

    def on_iteration(k: int, rows: list[dict], score) -> None:
        if not k or math.isfinite(rows[0]["noise_norm"]):  # an image, not a prediction
            ends.append((torch.tensor([row["reward"] for row in rows]), score.images.clone()))

    job.on_iteration = on_iteration
    for k, share in enumerate(variant.shares):
        ends.clear()
        job.settings = SearchSettings(
            method="ntrk", particles=1, radius=share or 1e-6, rounds=variant.rounds,
            restart_denoise=variant.again, interval=variant.interval,
        )  # fmt: skip
        with torch.inference_mode():
            done = host.run(job, host.searching)
            images = host.decode(job.vae, done.latent).clone()
        if not variant.every_round:
            observer.look(k, images, passes(variant.rounds), none)
            continue
        for r in range(1, variant.rounds + 1):
            found = images if r == variant.rounds else kept_of(ends[: r + 1])
            observer.look(variant.rounds * k + r - 1, found, passes(r), none)
    return with_the_last_kept(observer.rows)


def kept_of(ends: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """ends: (reward, images) of the plain sample and of every round. The last one's, where the plain one's reward is
    lower, and of the earlier ones the best elsewhere, as the node hands them back."""
    rewards = torch.stack([reward for reward, _ in ends])
    chosen = torch.where(rewards[-1] > rewards[0], len(ends) - 1, rewards[:-1].argmax(0))
    return torch.stack([ends[int(k)][1][b] for b, k in enumerate(chosen)])


def best_of(world, empty, positive, observer: Observer, variant: Variant, steps: int, seed: int) -> list[dict]:
    """The best of the first n samples of every animal, by the reward."""
    best, most, path = empty, torch.full((len(empty),), -torch.inf), []
    for n in range(max(variant.best_of)):
        latents = world.ksampler(positive=positive, steps=steps, latent=empty, seed=seed + 10_000 * n)
        with torch.no_grad():
            found = observer.reward(decoded(world, latents), observer.prompts)[0]
        best = torch.where((found > most)[:, None, None, None], latents, best)
        most = torch.maximum(found, most)
        if n + 1 in variant.best_of:
            path.append((n + 1.0, best))
    look_at(world, positive, observer, steps, path, variant.then)
    return with_the_last_kept(observer.rows)


def fk(world, job, positive, observer: Observer, variant: Variant, steps: int, strength: float) -> list[dict]:
    """The plain sample, twice as for `steered`, and every particle."""
    job.on_iteration = lambda k, rows, score: None
    path = []
    for n in variant.fk:
        job.settings = SearchSettings(method="fk_steering", particles=n, strength=strength)
        with torch.inference_mode():
            path.append((n + 2.0, host.run(job, host.searching).latent))
    look_at(world, positive, observer, steps, path, variant.then)
    return with_the_last_kept(observer.rows)


def searched(job, observer: Observer, variant: Variant) -> list[dict]:
    """Rows of the plain sample, twice as for `steered`, of the best seed and of the best after every round."""

    def on_iteration(k: int, rows: list[dict], score) -> None:
        passes = 2 if k == 0 else 1 + CANDIDATES * (1 + AGAIN * (k - 1))
        observer.look(k, score.images, passes, {a: {} for a in observer.animals})

    job.on_iteration, job.reward = on_iteration, observer.reward
    job.settings = SearchSettings(
        method="restarts", particles=CANDIDATES, rounds=variant.searched, restart_denoise=AGAIN
    )
    with torch.inference_mode():
        host.run(job, host.searching)
    return with_the_last_kept(observer.rows)


def look_at(world, positive, observer: Observer, steps: int, path: Iterable[tuple], then: float) -> None:
    """path: (passes, latents) of every iterate, each restarted once from `then` of the schedule, unless that is 0."""
    for k, (passes, latents) in enumerate(path):
        if then:
            latents = world.ksampler(positive=positive, steps=steps, denoise=then, latent=latents, seed=5000 + k)
        observer.look(k, decoded(world, latents), passes + bool(then), {a: {} for a in observer.animals})


def own(world, judge, clip, steps: int) -> list[dict]:
    """Embeddings of plain samples of every animal, of seeds that no variant has."""
    evaluate, found = evaluator(judge, clip), []
    for seed in range(OWN):
        for at in range(0, len(vocabulary.ANIMALS), COUNT):
            animals = vocabulary.ANIMALS[at : at + COUNT]
            prompts = [vocabulary.caption(a, prefix=True) for a in animals]
            positive = world.encode_batch(prompts)
            latents = world.ksampler(positive=positive, steps=steps, batch=len(prompts), seed=900_000 + 100 * seed + at)
            with torch.no_grad():
                found.append(evaluate(decoded(world, latents).float().clamp(0, 1), list(animals), prompts)[1])
    return found


@torch.inference_mode()
def decoded(world, latents: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W), as VAE Decode makes them."""
    return world.vae.decode(latents).movedim(-1, 1).clone()


def with_the_last_kept(rows: list[dict]) -> list[dict]:
    for row in rows:
        row["kept"] = int(row["iterate"] == rows[-1]["iterate"])
    return rows


LEVELS = {
    "brightness": (0.4, 0.5, 0.6, 0.65, 0.72), "darkness": (0.45, 0.52, 0.55), "aesthetic": (5.7, 6.0, 6.2),
    "JPEG": (-5.4, -5.2, -5.05), "blue": (-10.0, -7.0, -4.0),
}  # fmt: skip


LIKENESS = ("reward", "steps", "variant")  # of a row, which stays until as many images are measured anew
NAMES = ("variant", "optimised", "steps", "part", "seed")  # of a run, as its file has them


def likenesses(runs: dict[tuple, list[dict]]) -> list[dict]:
    """Of what was kept, and of plain optimisation at the same reward: where the embeddings of both lie in RAW."""
    rows = []
    for (reward, steps, name), mine in runs.items():
        base, plain = RAW / f"own-{steps}.pt", runs.get((reward, steps, "dno"), [])
        both = {r["part"] for r in mine} & {r["part"] for r in plain}

        def file(part: tuple, variant: str, reward: str = reward, steps: int = steps) -> Path:
            return RAW / f"{variant}-{reward}-{steps}-{'-'.join(part)}.pt"

        parts = sorted(p for p in both if file(p, name).is_file() and file(p, "dno").is_file())
        if name == "dno" or not parts or not base.is_file():
            continue
        images = [(p, a) for p in parts for a in vocabulary.ANIMALS[int(p[0]) * COUNT : (int(p[0]) + 1) * COUNT]]
        kept = {(r["part"], r["animal"]): r for r in mine if r["kept"]}
        of, path = path_of([r for r in plain if r["part"] in parts])
        path = path[1][:, [of.index(i) for i in images]]
        looks, others = (beside([load(file(p, variant)) for p in parts]) for variant in (name, "dno"))
        first = min(r["iterate"] for r in mine)
        at = [int(kept[i]["iterate"] - first) for i in images]
        chosen = {n: torch.stack([found[k, b] for b, k in enumerate(at)]) for n, found in looks.items()}
        rewards = torch.tensor([kept[i]["reward"] for i in images])
        found = likeness_against(chosen, rewards, others, path, [a for _, a in images], Likeness(load(base)))
        if found:
            rows.append({"reward": reward, "steps": steps, "variant": name, "images": len(images)} | found)
    return rows


def best_of_draws(draws: list[list[dict]]) -> list[dict]:
    """At every iterate the best by the reward of several runs of the same animals, as a path that costs all of them."""
    of: dict[tuple, list[dict]] = {}
    for row in (row for draw in draws for row in draw):
        of.setdefault((row["part"][0], row["animal"], row["iterate"]), []).append(row)
    best = [max(found, key=lambda r: r["reward"]) for found in of.values() if len(found) == len(draws)]
    last = max((r["iterate"] for r in best), default=0)
    return [
        r | {"part": (r["part"][0], "0"), "passes": r["passes"] * len(draws), "kept": float(r["iterate"] == last)}
        for r in best
    ]


def first_rounds(rows: list[dict], rounds: int) -> list[dict]:
    """What a run of so many rounds would have come to: a longer one begins with the same bits. Of an image that was
    kept later, the best by the reward of the clamped image, which is not always what the node would have kept.
    """
    of: dict[tuple, dict[float, list[dict]]] = {}
    for row in rows:
        of.setdefault(row["part"], {}).setdefault(row["iterate"], []).append(row)
    found = []
    for iterates in of.values():
        begins = [k for k, some in sorted(iterates.items()) if not any(row["path_kl"] for row in some)]
        images: dict[str, list[dict]] = {}
        for row in (row for k, some in iterates.items() for row in some if k < [*begins, math.inf][rounds]):
            images.setdefault(row["animal"], []).append(row)
        for some in images.values():
            best = next((r for r in some if r["kept"]), None) or max(some, key=lambda r: r["reward"])
            found += [row | {"kept": float(row is best)} for row in some]
    return found


def chosen_within(rows: list[dict]) -> list[dict]:
    """Of every image the best iterate within a path KL, over growing ones: the choice that the default has, too."""
    rows = [r for r in rows if math.isfinite(r["path_kl"])]  # of the oldest runs it was not kept
    if not rows:
        return []
    bounds = torch.tensor([r["path_kl"] for r in rows]).quantile(torch.linspace(0, 1, BOUNDS)).unique().tolist()
    of: dict[tuple, list[dict]] = {}
    for row in rows:
        of.setdefault((row["part"], row["animal"]), []).append(row)
    return [
        max((r for r in some if r["path_kl"] <= bound), key=lambda r: r["reward"]) | {"iterate": float(k)}
        for some in of.values()
        for k, bound in enumerate(bounds)
    ]


def together_with(mine: list[dict], other: list[dict], every_draw: bool) -> tuple[torch.Tensor, torch.Tensor, list]:
    """(paths of the images of `mine` that `other` has too, its paths of the same ones, those images). every_draw:
    beside each draw of the same animal, not the same draw.
    """
    (images, a), (others, b) = path_of(mine), path_of(other)
    pairs = [
        (n, m)
        for n, ((part, seed), animal) in enumerate(images)
        for m, ((its_part, its_seed), its_animal) in enumerate(others)
        if (part, animal) == (its_part, its_animal) and (every_draw or seed == its_seed)
    ]
    return a[:, :, [n for n, _ in pairs]], b[:, :, [m for _, m in pairs]], [images[n] for n, _ in pairs]


def beside_rivals(runs: dict[tuple, list[dict]]) -> list[dict]:
    """What the nodes keep, beside stronger rivals than plain optimisation of one draw that is read at one iterate."""
    rows = []
    for steps, name, tilt in (
        (16, "default", 0),
        (16, "three_rounds", 0),
        (16, "ntrk_second", 0.4),
        (30, "default", 0),
        (8, "default_exact", 0),
    ):
        for rival in (*RIVALS, "chosen"):
            found: dict[frozenset, dict[str, dict]] = {}  # by the animals, of which all rewards are to be of the same
            for reward in LEVELS:
                mine, plain = runs.get((reward, steps, name)), runs.get((reward, steps, "dno"))
                other = plain and (chosen_within(plain) if rival == "chosen" else runs.get((reward, steps, rival)))
                if not mine or not other:
                    continue
                if tilt:
                    at = [(share, n) for share in VARIANTS[name].shares for n in range(VARIANTS[name].rounds)]
                    last = float(at.index((tilt, VARIANTS[name].rounds - 1)))
                    mine = [row for row in mine if row["iterate"] == last]
                else:
                    mine = [row | {"iterate": 0.0} for row in mine if row["kept"]]
                a, b, shared = together_with(mine, other, every_draw=bool(tilt) or rival in BEST_OF_DRAWS)
                if one := against(a, b, [animal for _, animal in shared], None):
                    animals = frozenset(animal for _, animal in shared)
                    found.setdefault(animals, {})[reward] = one
                    row = {"steps": steps, "variant": name, "beside": rival, "rewards": reward, "animals": len(animals)}
                    rows.append(row | in_figures(one))
            for animals, several in found.items():
                if len(several) > 1:
                    row = {"steps": steps, "variant": name, "beside": rival, "animals": len(animals)}
                    rows.append(row | pooled(several))
    return rows


def signs() -> list[dict]:
    """Where plain optimisation ends, S0 - S, the published penalty, with its standard error over animals."""
    ends: dict[tuple, dict[tuple, tuple[int, float]]] = {}
    for row in csv.DictReader((OUT / "restart_rows.csv").open()):
        if row["variant"] == "dno" and row["mira"]:
            of = ends.setdefault((row["optimised"], row["steps"]), {})
            image, k = (row["animal"], row["part"], row["seed"]), int(row["iterate"])
            of[image] = max(of.get(image, (0, 0.0)), (k, float(row["mira"])))
    found = []
    for (reward, steps), images in ends.items():
        of_animals: dict[str, list[float]] = {}
        for (animal, *_), (_, value) in images.items():
            of_animals.setdefault(animal, []).append(value)
        values = torch.tensor([sum(v) / len(v) for v in of_animals.values()])
        se = (values.std() / len(values) ** 0.5).item()
        found.append(
            {"optimised": reward, "steps": steps, "images": len(images), "mira": values.mean().item(), "se": se}
        )
    return found


def report() -> None:
    """From the rows that stand in docs/results."""
    gather(RAW, OUT / "restart_rows.csv", NAMES)
    runs: dict[tuple, list[dict]] = {}
    for row in csv.DictReader((OUT / "restart_rows.csv").open()):
        of = (row["optimised"], int(row["steps"]), row["variant"])
        numbers = {k: float(row[k] or math.nan) for k in ("iterate", "kept", "path_kl", *COLUMNS)}
        runs.setdefault(of, []).append(numbers | {"animal": row["animal"], "part": (row["part"], row["seed"])})
    for reward, steps, name in list(runs):
        for rounds, cut in CUT.get(name, {}).items():
            mine = runs.get((reward, steps, cut), [])
            there = {row["part"] for row in mine}
            others = [row for row in runs[reward, steps, name] if row["part"] not in there]
            runs[reward, steps, cut] = mine + first_rounds(others, rounds)
        if name == "dno":
            again = runs.get((reward, steps, "dno_again"), [])
            three = ((runs[reward, steps, name], "0"), (runs[reward, steps, name], "1"), (again, "0"))
            draws = [[r for r in of if r["part"][1] == seed] for of, seed in three]
            for variant, some in zip(BEST_OF_DRAWS, (draws[:2], draws), strict=True):
                if made := best_of_draws(some):
                    runs[reward, steps, variant] = made
    rows, ends, tilts, way = [], [], [], []
    together: dict[tuple, dict[str, dict]] = {}
    tilted: dict[tuple, dict[str, dict]] = {}
    for (reward, steps, name), mine in runs.items():
        if (reward, steps, "dno") not in runs:
            continue
        variant = VARIANTS.get(name, Variant())
        # A tilted image is the same way of no other: it is beside both draws of its animal.
        a, b, shared = together_with(mine, runs[reward, steps, "dno"], every_draw=bool(variant.shares))
        animals = [animal for _, animal in shared]
        of = {"reward": reward, "steps": steps, "variant": name, "images": len(shared)}
        kept = [r for r in mine if r["kept"]]
        mean = {c: sum(r[c] for r in kept) / len(kept) for c in COLUMNS}
        mean["kept"] = mean.pop("reward")
        first = a[:, 0].mean(1)
        end = of | {"start": first[1].item(), "start_adherence": first[2].item()} | mean
        end["passes"] = a[0].max().item()
        back = {(r["part"], r["animal"]): r for r in kept}
        chosen = torch.tensor([[back[i][c] for i in shared] for c in COLUMNS])
        if found := against(chosen[:, None], b, animals, None):
            names = ("plain_adherence", "plain_passes", "adherence_above", "se", "clip_above", "clip_se")
            end |= {k: found[k] for k in (*names, "resamples_reached")}
            together.setdefault((steps, name, tuple(sorted(set(animals)))), {})[reward] = found
        if name != "dno":
            end |= at_equal_passes(chosen, b, animals, end["passes"])
        ends.append(end)
        steps_of_tilt = [
            (share, n + 1)
            for share in variant.shares
            for n in (range(variant.rounds) if variant.every_round else [variant.rounds - 1])
        ]
        for k in range(a.shape[1] if steps_of_tilt or name == "three_rounds" else 0):
            reached = dict(zip(COLUMNS, a[:, k].mean(1).tolist(), strict=True))
            place = dict(zip(("tilt", "rounds"), steps_of_tilt[k], strict=True)) if steps_of_tilt else {"iterate": k}
            row = of | place | {"reached": reached.pop("reward")} | reached
            table = tilts if steps_of_tilt else way
            found = against(a[:, k : k + 1], b, animals, None)
            if found and steps_of_tilt:
                tilted.setdefault((steps, name, *place.values(), tuple(sorted(set(animals)))), {})[reward] = found
            table.append(row | in_figures(found))
        for level in LEVELS[reward]:
            if name != "dno" and (found := against(a, b, animals, level)):
                rows.append(of | {"level": level} | in_figures(found))
    together = {k: v for k, v in together.items() if k[1] != "dno" and len(v) > 1}
    joint = [
        {"steps": steps, "variant": name, "animals": len(animals)} | pooled(found)
        for (steps, name, animals), found in sorted(together.items())
    ]
    write(OUT / "restart_pooled.csv", joint)
    write(OUT / "restart_tilt_pooled.csv", [
        dict(zip(("steps", "variant", "tilt", "rounds"), of, strict=True)) | {"animals": len(animals)} | pooled(found)
        for (*of, animals), found in sorted(tilted.items()) if len(found) > 1
    ])  # fmt: skip
    write(OUT / "restart_beside.csv", beside_rivals(runs))
    write(OUT / "restart_sign.csv", signs())
    write(OUT / "restart.csv", rows)
    write(OUT / "restart_kept.csv", ends)
    write(OUT / "restart_tilt.csv", tilts)
    write(OUT / "restart_way.csv", way)
    file = OUT / "restart_likeness.csv"
    alike = {tuple(r[k] for k in LIKENESS): r for r in csv.DictReader(file.open())} if file.is_file() else {}
    for row in likenesses(runs):
        key = tuple(str(row[k]) for k in LIKENESS)
        if key not in alike or row["images"] >= int(alike[key]["images"]):
            alike[key] = row
    if alike:
        write(file, list(alike.values()))
    for row in rows:
        print(row["reward"], row["steps"], row["variant"], row["images"], f"at {row['level']:g}:",
              f"{row['adherence_above']:+.3f}±{row['se']:.3f} above {row['plain_adherence']:.3f},",
              f"{row['passes']:.0f} passes ({row['plain_passes']:.0f})")  # fmt: skip
    for row in ends:
        more = f"{row['adherence_above']:+.3f}±{row['se']:.3f}" if "se" in row else ""
        print("kept:", row["reward"], row["steps"], row["variant"], row["images"], f"{row['start']:.3f} -> ",
              f"{row['kept']:.3f}, passes {row['passes']:.0f}",
              f"adherence {row['start_adherence']:.3f} -> {row['adherence']:.3f}", more)  # fmt: skip
    for row in joint:
        print("together:", row)
    for row in alike.values():
        print("like the model's own:", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rewards", nargs="*", default=["brightness", "aesthetic"], choices=list(LEVELS))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--parts", type=int, nargs="*", default=[0], choices=range(3), help="which 15 animals")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--report", action="store_true", help="only make the tables of what is there")
    args = parser.parse_args()
    if args.report:
        return report()
    register()
    Store(RAW, {"animals": COUNT})
    world, judge, clip = World(), judge_module.load_judge(), demo.demo_clip_score()
    base_of(RAW / f"own-{args.steps}.pt", lambda: own(world, judge, clip, args.steps))
    for seed in args.seeds:
        for part in args.parts:
            for name in args.only:
                for reward in args.rewards:
                    path = RAW / f"{name}-{reward}-{args.steps}-{part}-{seed}.csv"
                    embeddings = path.with_suffix(".pt")
                    if path.is_file() and embeddings.is_file():
                        continue
                    start = time.perf_counter()
                    rows, observer = run(world, judge, clip, VARIANTS[name], reward, part, args.steps, seed)
                    shown = observer.shown
                    sheet(torch.cat(shown[:: max(1, len(shown) // 6)]), COUNT, path.with_suffix(".jpg"))
                    save(embeddings, stacked(observer.embeddings))
                    file_run(path, rows)
                    last = [r for r in rows if r["iterate"] == rows[-1]["iterate"]]
                    mean = {c: round(sum(r[c] for r in last) / len(last), 3) for c in COLUMNS}
                    print(path.stem, mean, f"{time.perf_counter() - start:.0f} s", flush=True)
    report()


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"bench restart: {failure}")
