"""What moves the front of reward against adherence: `python dev.py bench front [--only NAME ...] [--report]`.

Every variant optimises the same 15 animals from the same noises for three rewards of different kinds; the held-out
judge and CLIPScore look at every iterate. Every run is kept in output/front/ and not repeated; its rows are gathered in
docs/results/front_rows.csv, from which the tables and plots beside it are made. docs/findings.md reads them.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from bench.front_tables import COLUMNS, DRIFTS, report
from bench.grid import Failure, Store
from bench.model import sheet
from bench.rows import file_run
from testing.pack import ROOT, mira
from testing.world import World, demo, host

import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip

judge_module, vocabulary = mira("demo.judge"), mira("demo.vocabulary")
Reward = mira("rewards.base").Reward
JPEGSurrogate, PixelReward = mira("rewards.jpeg").JPEGSurrogate, mira("rewards.pixel").PixelReward
guidance = mira("nodes.guidance")
Settings = mira("sampler.optimize").Settings
RAW, OUT = ROOT / "output" / "front", ROOT / "docs" / "results"
COUNT = 15  # animals in a batch; --part 1 and 2 are the next ones
STEPS, ITERATIONS, LR, SEED = 8, 10, 0.03, 0
REWARDS = ("brightness", "darkness", "aesthetic")


def rewards() -> dict[str, Reward]:
    pixels = {name: PixelReward(name) for name in ("brightness", "darkness")}
    return pixels | {"aesthetic": demo.demo_aesthetic(), "JPEG": JPEGSurrogate()}


class Held(Reward):
    """A reward whose gradient is kept from lowering an anchor. how: "project", or "penalty" times what was lost."""

    def __init__(self, reward: Reward, anchor: Callable, how: str, weight: float = 1.0):
        self.reward, self.anchor, self.how, self.weight = reward, anchor, how, weight
        self.facts, self.modules = replace(reward.facts, needs_prompt=True), reward.modules
        self.first = None

    def score(self, images, prompts):
        if not torch.is_grad_enabled():
            return self.reward.score(images, prompts)
        if self.how == "penalty":
            held = self.anchor(images, prompts)
            if self.first is None:
                self.first = held.detach()
            return self.reward.score(images, prompts) - self.weight * (self.first - held).clamp(min=0)
        free = images.detach().requires_grad_()
        reward, held = self.reward.score(free, prompts), self.anchor(free, prompts)
        (wanted,) = torch.autograd.grad(reward.sum(), free, retain_graph=True)
        (kept,) = torch.autograd.grad(held.sum(), free)
        dot, square = ((wanted * kept).flatten(1).sum(1), kept.square().flatten(1).sum(1).clamp(min=1e-20))
        wanted = wanted - (dot.clamp(max=0) / square).view(-1, 1, 1, 1) * kept
        return reward.detach() + ((images - images.detach()) * wanted).flatten(1).sum(1)


class FeatureDistance(Reward):
    """A reward less the distance to the plain image in the features of a network that the reward does not use."""

    def __init__(self, reward: Reward, features: Callable, weight: float):
        self.reward, self.features, self.weight = reward, features, weight
        self.facts, self.modules, self.first = reward.facts, reward.modules, None

    def score(self, images, prompts):
        found = self.features(images)
        if self.first is None:
            self.first = found.detach()
        return self.reward.score(images, prompts) - self.weight * (found - self.first).square().sum(1)


def predictor(process, noise) -> Callable:
    """(x, sigma) -> the conditional and the unconditional prediction, differentiable."""
    held = []

    def function(model_k, x, sigmas, extra_args, callback, disable, **options):
        held[:] = [model_k, extra_args]
        return x

    process.through_sampler(noise, function, {})
    model_k, extra = held
    import comfy.model_patcher

    options = comfy.model_patcher.create_model_options_clone(extra["model_options"])
    options.setdefault("transformer_options", {})["optimized_attention_override"] = process.attention
    found = []

    def capture(args):
        found[:] = [args["cond_denoised"], args["uncond_denoised"]]
        return args["denoised"]

    options["sampler_post_cfg_function"] = [capture]

    def predict(x, sigma):
        model_k(x, sigma, **{**extra, "model_options": options})
        return tuple(found)

    return predict


def denoising(kind: str, levels=(0.8, 2.0, 4.0)) -> Callable:
    """process -> a function of x0, (B,): "classifier", how much better the conditional prediction denoises x0 than the
    unconditional one; "typicality", minus the departure of the conditional denoising loss from the plain sample's."""

    def make(process, noise):
        predict = predictor(process, noise)
        g = torch.Generator().manual_seed(5)
        drawn = [torch.randn(noise.shape, generator=g).to(noise) for _ in levels]
        first = []

        def anchor(x0):
            losses = []
            for level, eps in zip(levels, drawn, strict=True):
                sigma = x0.new_full((len(x0),), level)
                cond, uncond = predict(x0 + level * eps, sigma)
                weight = (1 + level**2) / level**2  # the loss of v-prediction, flat over levels
                of = [weight * (p - x0).square().flatten(1).mean(1) for p in (cond, uncond)]
                losses.append(of[1] - of[0] if kind == "classifier" else of[0])
            total = sum(losses) / len(levels)
            if kind == "classifier":
                return total
            if not first:
                first.append(total.detach())
            return -(total - first[0]).abs()

        return anchor

    return make


def latent_held(make: Callable, how: str, weight: float) -> Callable:
    """The work of `host.run`: as `Held`, for an anchor of the latent that the model itself gives."""

    def work(process, noises):
        anchor, first = make(process, noises[0]), []

        def score(x0):
            if not torch.is_grad_enabled():
                return process.scoring.score(x0)
            if how == "penalty":
                out, held = process.scoring.score(x0), anchor(x0)
                if not first:
                    first.append(held.detach())
                return replace(out, total=out.total - weight * (first[0] - held).clamp(min=0))
            free = x0.detach().requires_grad_()
            out, held = process.scoring.score(free), anchor(free)
            (wanted,) = torch.autograd.grad(out.total.sum(), free)
            (kept,) = torch.autograd.grad(held.sum(), free)
            dot, square = (wanted * kept).flatten(1).sum(1), kept.square().flatten(1).sum(1).clamp(min=1e-20)
            wanted = wanted - (dot.clamp(max=0) / square).view(-1, 1, 1, 1) * kept
            return replace(out, total=out.total.detach() + ((x0 - x0.detach()) * wanted).flatten(1).sum(1))

        return mira("sampler.optimize").optimize(
            process.rollout,
            score,
            noises,
            process.settings,
            on_iteration=process.job.on_iteration,
            memory=host.used_bytes,
        )

    return work


def from_best_of(count: int) -> Callable:
    """The work of `host.run`: plain optimisation from the best of `count` seeds, chosen for each image."""

    def work(process, noises):
        g = torch.Generator().manual_seed(4242)
        found = [noises] + [tuple(torch.randn(z.shape, generator=g).to(z) for z in noises) for _ in range(count - 1)]
        with torch.no_grad():
            scores = torch.stack([process.scoring.score(process.rollout(z).x0).total for z in found])
        best = scores.argmax(0).tolist()
        chosen = [torch.stack([found[n][t][b] for b, n in enumerate(best)]) for t in range(len(noises))]
        return host.optimizing(process, chosen)

    return work


@dataclass(frozen=True)
class Variant:
    """settings: over those of plain optimisation. reward(reward, clip) -> the optimised one. work: of `host.run`."""

    settings: dict = field(default_factory=dict)
    reward: Callable = lambda reward, clip: reward
    work: Callable | None = None
    gradient_steps: int = 0
    seed: int = 0  # added to the study's


def clip_features(clip):
    encoder = clip.encoder
    return lambda images: F.normalize(encoder.network.encode_image(encoder.preprocessing(images)), dim=1)


def scaled_clip(clip):
    return lambda images, prompts: clip.score(images, prompts) / 20


HELD = {"drift_limit": 0.05, "drift_metric": "path_kl"}
VARIANTS = {
    "dno": Variant(),
    "dno_again_1": Variant(seed=71),
    "dno_again_2": Variant(seed=72),
    "last_3": Variant(gradient_steps=3),
    "best_of_4": Variant(work=from_best_of(4)),
    "score_distance": Variant({"regularizer": "score_distance", "beta": 0.1}),
    "two_sided": Variant({"regularizer": "mira_two_sided", "beta": 0.3}),
    "typicality": Variant(work=latent_held(denoising("typicality"), "penalty", 5.0)),
    "clip_features": Variant(reward=lambda r, c: FeatureDistance(r, clip_features(c), 1.0)),
    "clip_project": Variant(reward=lambda r, c: Held(r, scaled_clip(c), "project")),
    "clip_penalty": Variant(reward=lambda r, c: Held(r, scaled_clip(c), "penalty", 1.0)),
    "clip_penalty_.3": Variant(reward=lambda r, c: Held(r, scaled_clip(c), "penalty", 0.3)),
    "classifier_project": Variant(work=latent_held(denoising("classifier"), "project", 0)),
    "sphere": Variant({"optimizer": "sphere"}),
    "normalized": Variant({"optimizer": "normalized"}),
    "sgd": Variant({"optimizer": "sgd", "lr": 3.0}),
    "initial": Variant({"variables": "initial"}),
    "early": Variant({"variables": "early"}),
    "late": Variant({"variables": "late"}),
    "injected": Variant({"variables": "injected"}),
    "projection": Variant(HELD | {"hold": "projection"}),
    "dual_ascent": Variant(HELD | {"hold": "dual_ascent", "regularizer": "path_kl", "beta": 1.0}),
}
SCALES = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of DyMO's guidance, the variant "dymo"


def file_of(name: str, reward: str, part: int = 0):
    return RAW / f"{name}-{reward}-{part}.csv"


class Observer:
    """Gathers rows of (iteration, image) as the images pass, and files them at the end."""

    def __init__(self, judge, clip, reward: str, part: int):
        self.judge, self.clip, self.real = judge, clip, rewards()[reward]
        self.animals = vocabulary.ANIMALS[part * COUNT : (part + 1) * COUNT]
        self.prompts = [vocabulary.caption(a, prefix=True) for a in self.animals]
        self.rows, self.shown = [], []

    @torch.no_grad()
    def look(self, images: torch.Tensor) -> list[dict]:
        values = self.real.score(images, self.prompts).tolist()
        clips = self.clip.score(images, self.prompts).tolist()
        kept = judge_module.adherence(self.judge, images, list(self.animals)).tolist()
        looked = zip(self.animals, values, kept, clips, strict=True)
        return [{"animal": animal, "reward": r, "adherence": a, "clip_score": c} for animal, r, a, c in looked]

    def __call__(self, k: int, new: list[dict], images: torch.Tensor) -> None:
        drifts = [{c: row[c] for c in DRIFTS if c in row} for row in new]
        seen = self.look(images)
        self.rows += [{"iteration": k} | looked | drift for looked, drift in zip(seen, drifts, strict=True)]
        if k in (0, 3, 6, ITERATIONS):
            self.shown.append(images)

    def write(self, path) -> None:
        sheet(torch.cat(self.shown), len(self.animals), path.with_suffix(".jpg"))
        file_run(path, self.rows)


def run(world, judge, clip, name: str, reward: str, part: int) -> None:
    variant, observer = VARIANTS[name], Observer(judge, clip, reward, part)
    prompts = observer.prompts
    job = world.job(
        positive=world.encode_batch(prompts), steps=STEPS, batch=len(prompts), prompts=prompts,
        reward=variant.reward(observer.real, clip), seed=SEED + 1000 * part + variant.seed,
        on_iteration=lambda k, new, score: observer(k, new, score.images), memory="none",
        gradient_steps=variant.gradient_steps,
    )  # fmt: skip
    job.settings = Settings(**{"iterations": ITERATIONS, "lr": LR, "keep": "last"} | variant.settings)

    with torch.inference_mode():
        host.run(job, variant.work)
    observer.write(file_of(name, reward, part))


def run_guided(world, judge, clip, reward: str, part: int) -> None:
    """DyMO's guidance from scale 0 on: one scale is one "iteration" of the rows."""
    observer = Observer(judge, clip, reward, part)
    positive = world.encode_batch(observer.prompts)
    latent, seed = torch.zeros(len(observer.prompts), 4, world.side, world.side), SEED + 1000 * part
    noise, sigmas = comfy.sample.prepare_noise(latent, seed), world.sigmas(steps=STEPS)
    sampler = comfy.samplers.sampler_object("euler_ancestral")
    for k, scale in enumerate(SCALES):
        with torch.inference_mode():
            guider = guidance.MiraDyMOGuider.execute(
                world.model, positive, world.negative, world.vae, observer.real, 5.0, scale, 0.2, 1.0
            ).args[0]
            x0 = guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed + world.apart)
            images = host.decode(world.vae, x0).clone()
        observer(k, [{} for _ in observer.prompts], images)
    observer.write(file_of("dymo", reward, part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*VARIANTS, "dymo"], choices=[*VARIANTS, "dymo"])
    parser.add_argument("--rewards", nargs="*", default=list(REWARDS), choices=list(rewards()))
    parser.add_argument("--part", type=int, default=0, choices=range(3), help="which 15 animals")
    parser.add_argument("--report", action="store_true", help="only make tables and plots of what is there")
    args = parser.parse_args()
    if args.report:
        return report(RAW, OUT)
    Store(RAW, {"animals": COUNT, "steps": STEPS, "iterations": ITERATIONS, "lr": LR})
    world, judge, clip = World(), judge_module.load_judge(), demo.demo_clip_score()
    for name in args.only:
        for reward in args.rewards:
            path = file_of(name, reward, args.part)
            if path.is_file():
                continue
            start = time.perf_counter()
            if name == "dymo":
                run_guided(world, judge, clip, reward, args.part)
            else:
                run(world, judge, clip, name, reward, args.part)
            rows = list(csv.DictReader(path.open()))
            for k in ("0", "5", rows[-1]["iteration"]):
                at = [r for r in rows if r["iteration"] == k]
                mean = {c: round(sum(float(r[c]) for r in at) / len(at), 3) for c in COLUMNS}
                print(path.stem, k, mean)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"bench front: {failure}")
