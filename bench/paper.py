"""The paper's comparison, on a model that everyone can run: `python dev.py bench paper`.

Animals x seeds x rewards x methods at one budget of network evaluations. Every finished unit (a method, a reward, a
seed, a block of animals) is a file in --out and is not run again; `--report` makes tables and plots of what is there.
The whole grid is 45 animals x 5 seeds; `--animals 10 --seeds 2` is a smaller one, from which a larger one goes on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.grid import Failure, Store, code_version, ray_map, serial_map
from bench.methods import ALL, METHODS, Method, PreferenceSettings, SearchSettings, Settings
from bench.rigs import PAPER, Rig, load
from testing.pack import ROOT, mira
from testing.world import PixelReward, host

place_of, through = mira("rewards.half").place_of, mira("rewards.half").through
judge_module, vocabulary = mira("demo.judge"), mira("demo.vocabulary")
preference, judges = mira("nodes.preference"), mira("nodes.editor.judges")
JPEG, JPEGSurrogate = mira("rewards.jpeg").JPEG, mira("rewards.jpeg").JPEGSurrogate
statistics = mira("sampler.statistics")
OUT = ROOT / "output" / "paper"
REWARDS = ("aesthetic", "brightness", "darkness", "JPEG")
SCORERS = ("hps", "pickscore", "image_reward")  # rewards and columns, where their files are given
FILES = ("aesthetic_head", "clip", *SCORERS)
COMPOSED = ("clip", *SCORERS)  # of ReNO's composite
BLOCK = {"demo": 5}  # animals that are sampled in one batch; 1 for larger models
BASE = 20  # images of the frozen model per prompt, which CMMD compares with


def rewards_of(name: str, rig: Rig) -> tuple:
    """(what is measured, what is optimised where a gradient is needed)."""
    if name == "JPEG":
        return JPEG(), JPEGSurrogate()
    if name == "composite":
        reward = rig.composite()
    elif name in SCORERS:
        reward = rig.others[name]
    else:
        reward = rig.aesthetic if name == "aesthetic" else PixelReward(name)
    return reward, reward


def read_prompts(path: Path, wanted: str | None) -> list[str]:
    """A prompt a line; of a JSON file the set of that name, {name: [{"prompt": ...}, ...]}; of lines of JSON and of
    tables the "prompt" of each (PartiPrompts', GenEval's). Raises Failure.
    """
    try:
        text = path.read_text()
        if path.suffix in (".tsv", ".csv"):
            how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            rows = [{str(k).lower(): v for k, v in row.items()} for row in csv.DictReader(io.StringIO(text), **how)]
            found = [row["prompt"].strip() for row in rows if row["prompt"] and row["prompt"].strip()]
        elif path.suffix == ".jsonl":
            found = [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            sets = json.loads(text)
            if wanted not in sets:
                raise Failure(f"--prompts {path} has the sets {', '.join(sets)}: choose one with --set")
            found = [item["prompt"] for item in sets[wanted]]
        else:
            found = [line.strip() for line in text.splitlines() if line.strip()]
        return list(dict.fromkeys(found))
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise Failure(f"--prompts {path} cannot be read: {problem!r}") from problem


class Evaluator:
    """What the images are, by models that no reward uses (but for CLIPScore's, which the aesthetic head reads)."""

    def __init__(self, rig: Rig, animals: bool = True):
        """animals: whether the prompts are what the judge knows."""
        self.clip, self.judge, self.others = rig.clip_score, rig.judge if animals else None, rig.others

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, animals: list[str], prompts: list[str]) -> tuple[list[dict], dict]:
        """(columns per image, embeddings by name (B, D))."""
        found = {name: reward.score(images, prompts).tolist() for name, reward in self.others.items()}
        rows, embeddings = self._seen(images, animals, prompts)
        return [row | {name: of[b] for name, of in found.items()} for b, row in enumerate(rows)], embeddings

    def _seen(self, images: torch.Tensor, animals: list[str], prompts: list[str]) -> tuple[list[dict], dict]:
        if self.clip is None:
            return [{} for _ in prompts], {}
        images, encoder = images.to(place_of(self.clip.encoder.network).device), self.clip.encoder
        embedding = through(encoder.network.encode_image, encoder.preprocessing(images.float()), encoder.network)
        embedding = F.normalize(embedding, dim=1).cpu()
        scores = self.clip.score(images, prompts).tolist()
        if self.judge is None:
            return [{"clip_score": c} for c in scores], {"clip": embedding.half()}
        features = self.judge.features(images.cpu())
        subjects = self.judge.subject(features).softmax(1)
        wanted = [judge_module.SUBJECTS.index(a) for a in animals]
        rows = [
            {"clip_score": c, "adherence": p[w].item(), "top1": float(p.argmax().item() == w)}
            for c, p, w in zip(scores, subjects, wanted, strict=True)
        ]
        return rows, {"clip": embedding.half(), "judge": features.half()}


def software() -> dict[str, str]:
    """What a result depends on beside the settings. Noise differs between devices."""
    import comfy.model_management
    from comfyui_version import __version__

    device = comfy.model_management.get_torch_device().type
    return {"code": code_version(), "comfyui": __version__, "torch": torch.__version__, "device": device}


class Counter:
    """Counts what the network does for one image: forward passes, and backward ones when their gradient arrives."""

    def __init__(self, model, batch: int, guided: bool):
        self.forward = self.backward = 0.0
        self.model = model.clone()
        share = 1 / (batch * (2 if guided else 1))

        def counting(apply, args):
            out = apply(args["input"], args["timestep"], **args["c"])
            passes = len(args["input"]) * share
            self.forward += passes
            if out.requires_grad:
                out.register_hook(lambda _: setattr(self, "backward", self.backward + passes))
            return out

        counting.only_watches = True
        self.model.set_model_unet_function_wrapper(counting)


def unit_names(options: dict) -> list[str]:
    blocks = range(options["animals"] // options["block"])
    base = [f"base__{n:02d}__{b:02d}" for n in range(BASE) for b in blocks] if options["model"] == "demo" else []
    runs = [
        f"{method}__{reward}__{seed}__{b:02d}"
        for seed in range(options["seeds"])
        for b in blocks
        for method in options["methods"]
        for reward in options["rewards"]
        if applies(ALL[method], reward, options)
    ]
    return base + runs


def applies(method: Method, reward: str, options: dict) -> bool:
    """Not without a tuned model, and not where there is no step between which to steer."""
    steps = method.steps or options["steps"]
    return (not method.only or (options["model"], reward) == ("demo", method.only)) and steps >= method.fewest_steps


def worker(options: dict) -> Callable[[str], None]:
    """A function that runs one unit and files it; every process makes its own."""
    store = Store(Path(options["out"]), options["config"])
    for name, here in software().items():
        if here != (wanted := options["config"][name]):
            raise Failure(f"this worker's {name} is {here}, not {wanted}: make all workers the same")
    rig = load(options["model"], options["checkpoint"], options["text_encoder"], options["vae"])
    rig.use_scorers(**{name: options[name] for name in FILES})
    evaluator = Evaluator(rig, options["prompts"] is None)

    def run(unit: str) -> None:
        if store.has(unit):
            return
        if unit.startswith("base__"):
            rows, tensors = base_unit(rig, evaluator, unit, options)
        else:
            rows, tensors = run_unit(rig, evaluator, unit, options)
        store.write(unit, rows, tensors)

    return run


def block_of(index: int, options: dict) -> list[str]:
    """What the images of a block are of: animals, or prompts where those are given."""
    size = options["block"]
    return list((options["prompts"] or vocabulary.ANIMALS)[index * size : (index + 1) * size])


def prompts_of(animals: list[str], options: dict) -> list[str]:
    return animals if options["prompts"] else [vocabulary.caption(a, prefix=True) for a in animals]


def base_unit(rig: Rig, evaluator: Evaluator, unit: str, options: dict):
    """One image of the frozen model for every prompt of a block."""
    _, number, block = unit.split("__")
    animals = block_of(int(block), options)
    prompts = prompts_of(animals, options)
    inputs = rig.inputs(prompts, options["pixels"])
    latent = rig.world.ksampler(**inputs, steps=options["steps"], seed=500_000 + 1000 * int(number) + int(block))
    with torch.inference_mode():
        images = rig.world.vae.decode(latent).movedim(-1, 1).clone()
    rows, embeddings = evaluator(images, animals, prompts)
    rows = [{"method": "base", "seed": int(number), "animal": a} | r for a, r in zip(animals, rows, strict=True)]
    return rows, {f"final_{k}": v for k, v in embeddings.items()}


def run_unit(rig: Rig, evaluator: Evaluator, unit: str, options: dict):
    method, reward, seed, block = unit.split("__")
    animals = block_of(int(block), options)
    prompts = prompts_of(animals, options)
    chosen = ALL[method]
    steps = chosen.steps or options["steps"]
    settings = chosen.settings(options["budget"], reward, options["lr"], steps)
    measured, optimised = rewards_of(reward, rig)
    along, path = isinstance(settings, Settings), {}
    rows: list[dict] = []

    def observe(k: int, new: list[dict], score) -> None:
        if not along:
            return
        found, embeddings = evaluator(score.images, animals, prompts)
        with torch.no_grad():
            values = measured.score(score.images.clamp(0, 1) if reward == "JPEG" else score.images, prompts).tolist()
        for row, extra, value in zip(new, found, values, strict=True):
            rows.append(kept_columns(row) | extra | {"reward": value, "k": k})
        for name, tensor in embeddings.items():
            path.setdefault(name, []).append(tensor)

    inputs = rig.inputs(prompts, options["pixels"])
    counter = Counter(inputs.get("model") or rig.world.model, len(animals), inputs["cfg"] != 1)
    job = rig.world.job(
        **(inputs | {"model": counter.model}), steps=steps,
        seed=10_000 * int(seed) + 100 * int(block),
        reward=optimised if chosen.gradient else measured, prompts=prompts, on_iteration=observe,
        memory=options["memory"], gradient_steps=chosen.gradient_steps,
    )  # fmt: skip
    job.settings = settings
    if chosen.guider:
        conds = inputs["positive"], inputs.get("negative") or rig.world.negative
        with torch.inference_mode():
            job.guider = chosen.guider(counter.model, *conds, inputs["cfg"], job.vae, optimised)
    if isinstance(settings, PreferenceSettings):
        job.gradient = preference.METHODS[settings.method].gradient
        # Only ranks, or for Hybrid-2 numbers, are asked for: the reward itself, not its estimate.
        job.reward = measured
        by_reward = lambda process: judges.RewardJudge(lambda images: process.scoring.reward(images)[0])  # noqa: E731
        work = preference.preferring(by_reward, job.seed, 0)
    else:
        job.gradient = chosen.gradient
        work = host.searching if isinstance(settings, SearchSettings) else host.optimizing

    def counted(process, noises):
        counter.forward = counter.backward = 0.0
        return work(process, noises)

    started = time.perf_counter()
    with torch.inference_mode():
        done = host.run(job, counted)
        images = host.decode(job.vae, done.latent).clone()
    seconds = time.perf_counter() - started
    final, embeddings = evaluator(images, animals, prompts)
    with torch.no_grad():
        values = measured.score(images.clamp(0, 1) if reward == "JPEG" else images, prompts).tolist()
    trace = done.result.trace
    for b, (extra, value) in enumerate(zip(final, values, strict=True)):
        cost = {
            "forward": counter.forward,
            "backward": counter.backward,
            "seconds": seconds / len(animals),
            "memory_mb": max(r["memory_mb"] for r in trace.of(b)),
        }
        kept = kept_columns(trace.summary(b)[1] | {"image": b})
        if chosen.guider:  # its record begins at the guided sample, which is not the frozen model's
            kept = {"image": b}
        rows.append(kept | extra | cost | {"reward": value, "k": -1})
    who = {"method": method, "target": reward, "seed": int(seed)}
    rows = [who | {"animal": animals[int(r.pop("image"))]} | r for r in rows]
    tensors = {f"path_{k}": torch.stack(v) for k, v in path.items()} | {f"final_{k}": v for k, v in embeddings.items()}
    return rows, tensors | {"images": (images.clamp(0, 1) * 255).round().byte().cpu()}


def kept_columns(row: dict) -> dict:
    names = (*mira("sampler.surrogates").SURROGATES, "noise_norm", "image")
    return {n: row[n] for n in names if n in row}


def about(args: argparse.Namespace, prompts: list[str] | None) -> dict:
    """What else a result depends on, as the configuration has it."""
    files = [args.text_encoder, args.vae, *(getattr(args, name) for name in FILES)]
    if prompts is None:
        return {"scorers": files}
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]
    return {"scorers": files, "prompts": [args.prompts.name, args.set, digest]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--animals", type=int, help="the first so many of the 45 (or of --prompts); default: all")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="these, one a line, in place of the animals")
    parser.add_argument("--set", metavar="NAME", help="of a JSON file of prompts in named sets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rewards", nargs="*", default=list(REWARDS), choices=(*REWARDS, *SCORERS, "composite"))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(ALL))
    parser.add_argument("--model", default="demo", choices=list(PAPER))
    parser.add_argument("--checkpoint", help='a file, or "random" for weights of full size that mean nothing')
    parser.add_argument("--text-encoder", help="pixart's T5")
    parser.add_argument("--vae", help="pixart's VAE")
    parser.add_argument("--aesthetic-head", metavar="NAME", help="the LAION head, a file in models/mira_rewards")
    parser.add_argument("--clip", metavar="NAME", help="CLIP ViT-L/14 for it and for CLIPScore, in the same folder")
    parser.add_argument("--hps", metavar="NAME", help="HPS v2 or v2.1, in the same folder: a column, and a reward")
    parser.add_argument("--pickscore", metavar="NAME", help="PickScore, likewise")
    parser.add_argument(
        "--image-reward", metavar="NAME", help="ImageReward, likewise; composite: ReNO's, of these and CLIP"
    )
    parser.add_argument("--pixels", type=int, help="the image's side (default: the paper's)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the paper's; the demo's are 8)")
    parser.add_argument("--iterations", type=int, help="of noise optimisation; sets the budget of all methods")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--ray", metavar="ADDRESS", help='spread the grid over a Ray cluster, or "local"')
    parser.add_argument("--workers", type=int, help="with --ray local: how many")
    parser.add_argument("--report", type=Path, nargs="?", const=ROOT / "docs" / "results" / "rivals", metavar="FOLDER",
                        help="only make tables and plots of what is in --out")  # fmt: skip
    args = parser.parse_args()
    if args.report:
        from bench.tables import report

        report(args.out, args.report)
        return 0
    paper = PAPER[args.model]
    prompts = read_prompts(args.prompts, args.set) if args.prompts else None
    most, what = (len(prompts), "prompts") if args.prompts else (45, "animals")
    count = most if args.animals is None else args.animals
    if not 1 <= count <= most or args.seeds < 1:
        raise Failure(f"--animals {count} --seeds {args.seeds}: there are {most} {what}; use 1 or more of each")
    block = BLOCK.get(args.model, 1)
    if count % block:
        raise Failure(f"--animals {count}: they are sampled {block} at a time; use a multiple of that")
    rewards = args.rewards
    if args.aesthetic_head and not args.clip:
        raise Failure("--aesthetic-head needs --clip, a CLIP ViT-L/14 in models/mira_rewards")
    if missing := [name for name in SCORERS if name in rewards and not getattr(args, name)]:
        raise Failure(f"--rewards {missing[0]} needs --{missing[0].replace('_', '-')}, a file in models/mira_rewards")
    if "composite" in rewards and (missing := [name for name in COMPOSED if not getattr(args, name)]):
        raise Failure(f"--rewards composite needs --{missing[0].replace('_', '-')} too, a file in models/mira_rewards")
    if args.model != "demo" and not args.aesthetic_head and "aesthetic" in rewards:
        print("aesthetic is left out: it needs --aesthetic-head and --clip, files in models/mira_rewards", flush=True)
        rewards = [r for r in rewards if r != "aesthetic"]
    iterations = args.iterations or paper.iterations
    settings = {
        "model": args.model,
        "checkpoint": Path(args.checkpoint).name if args.checkpoint else None,
        "pixels": args.pixels or paper.pixels,
        "steps": args.steps or paper.steps,
        "budget": 3 * iterations + 1,
        "lr": paper.lr,
        "cfg": paper.cfg,
        "sampler": paper.sampler,
    }
    options = settings | {
        "checkpoint": args.checkpoint,
        "text_encoder": args.text_encoder,
        "vae": args.vae,
        **{name: getattr(args, name) for name in FILES},
        "prompts": prompts,
        "animals": count,
        "block": block,
        "seeds": args.seeds,
        "rewards": rewards,
        "methods": args.methods,
        "memory": "none" if args.model == "demo" else "auto",
        "out": str(args.out.resolve()),
        "config": settings | software() | about(args, prompts),
        "workers": args.workers,
    }
    store = Store(args.out, options["config"])
    wanted = unit_names(options)
    units = [u for u in wanted if not store.has(u)]
    print(
        f"{len(wanted)} units, {len(wanted) - len(units)} done; budget {settings['budget']} plain samples", flush=True
    )
    if not units:
        return 0
    if args.ray:
        ray_map(args.ray, "bench.paper", options, units)
        if missing := [u for u in units if not store.has(u)]:
            raise Failure(
                f"{len(missing)} units were run, but their files are not in {args.out}: the workers wrote to disks of "
                "their own; give --out a folder that all machines share"
            )
        return 0
    work, started = worker(options), time.perf_counter()

    def told(unit: str) -> None:
        work(unit)
        n = units.index(unit) + 1
        left = (time.perf_counter() - started) / n * (len(units) - n)
        print(f"{unit} ({n}/{len(units)}, about {left / 60:.0f} min left)", flush=True)

    serial_map(told, units)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"bench paper: {failure}")
