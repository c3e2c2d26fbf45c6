"""What the pack does on a GPU: `python dev.py bench gpu --gpu --out DIR`, piece by piece, and again where it stopped.

Every piece runs in a process of its own for less than nine minutes and leaves DIR/PIECE.json; what is there is not run
again, and of a piece that was cut off, DIR/PIECE.part has the rows that were there: it goes on after them. DIR/gpu.json
has them all, and DIR/gpu.md is the page. `--pieces` chooses, `--small` rehearses it with small networks (on a CPU too,
where no card can be made smaller). Nothing needs a network connection: `python dev.py bench gpu --pack FOLDER` gathers
what a machine without one lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
CARDS = (6, 8, 12, 16, 24)  # GB
RESERVED = 0.6  # GB of a card that others have: the desktop, CUDA itself
POLICIES = ("none", "per_step", "per_block", "offload")
MODELS = {"sd15": 512, "sdxl": 1024, "flow": 1024}  # pixels
SIDES = {"sd15": (512, 768, 1024), "sdxl": (768, 1024, 1280), "flow": (768, 1024)}
STOCK = {"sd15": (2, 6), "sdxl": (4, 12), "flow": (8,)}  # GB: of 2, 4 and 8 the model is larger than the card
DTYPES = {"sd15": ("fp16", "bf16"), "sdxl": ("fp16",), "flow": ("bf16", "fp8")}
BALLAST: list = []  # what makes a card smaller for whoever asks the driver
LIMIT = int(os.environ.get("MIRA_LIMIT", 500))  # seconds, after which a piece begins no row
KILLED = 30  # seconds after that
BEGINS = 2  # of a row that ends its process: by taking too long, as the second time it has all of the time, or worse
LATER = 75  # the exit status of a piece that has rows left for the next time

PIECES = (
    *(f"tests-{folder}" for folder in ("core", "comfy", "server")),
    *(f"speed-{model}-{dtype}" for model in MODELS for dtype in DTYPES[model]),
    *(f"card-{model}-{gb}-{pixels}" for model in MODELS for gb in CARDS for pixels in SIDES[model]),
    *(f"stock-{model}-{gb}" for model in MODELS for gb in STOCK[model]), "leaks", "repeat", "scorers",
)  # fmt: skip

# Of a machine that has PyTorch, transformers and the like already; wheels without their dependencies.
WHEELS = (
    "torchsde trampoline alembic mako SQLAlchemy greenlet pydantic pydantic-settings annotated-types typing-inspection "
    "python-dotenv open_clip_torch ftfy wcwidth timm spandrel simpleeval blake3 comfy-aimdo==0.4.13"
).split()
PURE_WHEELS = ("comfy-kitchen==0.2.31",)  # its own kernels are 58 MB

# PyAV is 40 MB and nothing here reads a film; the frontend's pages nobody opens.
STAND_INS = {
    "av/__init__.py": """
import importlib.abc, importlib.machinery, sys, types

class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

class Anything(metaclass=_Anything):
    def __init__(self, *args, **kwargs):
        pass

class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("av.") else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = __getattr__
        return module

    def exec_module(self, module):
        pass

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything

__version__ = "16.0.0"
sys.meta_path.append(_Finder())
""",
    "comfyui_frontend_package/__init__.py": '__version__ = "1.58.1"\n',
    "comfyui_frontend_package/static/index.html": "<html></html>\n",
    "comfyui_frontend_package-1.58.1.dist-info/METADATA": (
        "Metadata-Version: 2.1\nName: comfyui-frontend-package\nVersion: 1.58.1\n"
    ),
}


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if os.environ.get("MIRA_GPU") and torch.cuda.is_available() else "CPU"


class Table:
    """The rows of a piece, each kept as soon as it is there; what was there before is not measured again."""

    def __init__(self, file: Path) -> None:
        self.file = file.with_suffix(".part")
        self.rows: dict[str, dict] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.began, self.longest = time.monotonic(), 0.0

    def row(self, name: str, measure: Callable[[], dict]) -> None:
        """Measure it, where it is not there. Raises SystemExit where there is probably too little time left for it."""
        known = self.rows.get(name, {"begun": 0})
        if "begun" not in known:
            return
        begun = known["begun"]
        if begun == BEGINS:
            self._keep(name, {"failed": "its process ended, or took longer than a piece may"})
            return
        start = time.monotonic()
        if self.longest and start - self.began + self.longest > LIMIT:
            raise SystemExit(LATER)
        self._keep(name, {"begun": begun + 1})
        try:
            found = measure()
        except KeyboardInterrupt:
            self._keep(name, {"begun": begun})
            raise
        except Exception as problem:  # of one row; the others are measured all the same
            found = {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0]}
        self.longest = max(self.longest, time.monotonic() - start)
        self._keep(name, found)
        print(self.file.stem, name, found, flush=True)

    def _keep(self, name: str, row: dict) -> None:
        self.rows[name] = row
        written = self.file.with_suffix(".writing")
        written.write_text(json.dumps(self.rows, indent=1) + "\n")
        written.replace(self.file)


# -- the models


def new_world(small: bool):
    """The demo model's; or of networks that take a small part of its time."""
    from testing.networks import small_world
    from testing.world import World

    return small_world() if small else World()


def full_vae(channels: int):
    """ComfyUI's KL autoencoder at its published size with random weights, in the precision that ComfyUI chooses."""
    import comfy.sd
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    shape = dict(
        double_z=True, z_channels=channels, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
        num_res_blocks=2, attn_resolutions=[], dropout=0.0,
    )  # fmt: skip

    with torch.inference_mode():
        network = AutoencoderKL(ddconfig=shape, embed_dim=channels)
        for p in network.parameters():
            p.fill_(1) if p.ndim == 1 else p.normal_(0, 0.5 / p[0].numel() ** 0.5)
        weights = dict(network.state_dict())
        if channels == 16:  # such autoencoders have no quantisation layers
            weights = {k: v for k, v in weights.items() if "quant_conv" not in k}
        return comfy.sd.VAE(sd=weights)


def flow_transformer(dtype: str, small: bool):
    """A flow transformer of Z-Image's size: 6 B parameters."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models as models
    import torch

    from testing.pack import weights_at_once

    size = dict(dim=256, n_layers=2, n_heads=8, n_kv_heads=8, axes_dims=[8, 12, 12]) if small else dict(
        dim=3840, n_layers=30, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48]
    )  # fmt: skip
    options = size | dict(
        image_model="lumina2", patch_size=2, in_channels=16, n_refiner_layers=2, axes_lens=[1536, 512, 512],
        cap_feat_dim=2560, qk_norm=True, ffn_dim_multiplier=8.0 / 3.0, rope_theta=256.0, z_image_modulation=True,
        time_scale=1000.0, pad_tokens_multiple=32,
    )  # fmt: skip
    config, device = models.ZImage(options), management.get_torch_device()
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    stored = torch.float8_e4m3fn if dtype == "fp8" else compute
    config.set_inference_dtype(stored, compute if dtype == "fp8" else None)
    with torch.inference_mode(), weights_at_once():
        model = config.get_model({}, "", device=device)
        for p in model.diffusion_model.parameters():
            p.copy_(
                torch.ones(()) if p.ndim == 1 else torch.randn(p.shape, device=p.device) * 0.5 / p[0].numel() ** 0.5
            )
        return comfy.model_patcher.ModelPatcher(model, device, management.unet_offload_device())


def as_loaded(model):
    """As ComfyUI's loaders leave it: off the card, or in dynamic VRAM, where the weights come when they are used."""
    return from_file(model) if os.environ.get("MIRA_DYNAMIC") else off_card(model)


def from_file(model):
    """The same network as ComfyUI's own loader makes it."""
    import comfy.sd
    import comfy.utils
    import torch

    file = Path(os.environ["MIRA_PIECE"]).with_suffix(".safetensors")
    with torch.inference_mode():
        network = model.model.diffusion_model
        comfy.utils.save_torch_file({k: v.contiguous().cpu() for k, v in network.state_dict().items()}, str(file))
        return comfy.sd.load_diffusion_model(str(file))


def off_card(model):
    """A part that is on the card already would stay there when it becomes smaller."""
    import torch

    model.model.to(model.offload_device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def options_of(world, name: str, dtype: str, pixels: int, small: bool) -> dict:
    """Keyword arguments of `World.optimize`: a model with random weights, its VAE, conditioning, an empty latent."""
    import torch

    from bench import rigs
    from testing.networks import sd15

    side = (128 if small else pixels) // 8
    g = torch.Generator().manual_seed(0)
    steps = 2 if small else 20
    shared = {"steps": steps, "cfg": 5.0, "lr": 0.01, "regularizer": "none", "keep": "last"}

    def text(width: int, length: int = 77) -> list:
        return [[torch.randn(1, length, width, generator=g), {"pooled_output": torch.randn(1, 1280, generator=g)}]]

    if name == "flow":
        return shared | {
            "model": as_loaded(flow_transformer(dtype, small)), "vae": full_vae(16), "sampler": "euler",
            "steps": 2 if small else 8, "cfg": 1.0,  # as Z-Image Turbo is used
            "latent": torch.zeros(1, 16, side, side), "positive": text(2560), "negative": text(2560),
        }  # fmt: skip
    latent = torch.zeros(1, 4, side, side)
    if small:
        return shared | {"latent": latent}
    with torch.inference_mode():
        if name == "sd15":
            model, width = sd15(torch.bfloat16 if dtype == "bf16" else None), 768
        else:
            model, width = rigs.random_rig("sdxl", world, rigs.PAPER["sdxl"]).model, 2048
    vae = full_vae(4)
    return shared | {
        "model": as_loaded(model),
        "vae": vae,
        "latent": latent,
        "positive": text(width),
        "negative": text(width),
    }


# -- the pieces; each returns what goes into its file


def tests(folder: str) -> dict:
    report = Path(os.environ["MIRA_PIECE"]).with_suffix(".xml")
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"tests/{folder}",
        "-q",
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
    ]
    workers = str(min(12, os.cpu_count()))
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--numprocesses", workers, "--dist", "loadgroup"], cwd=ROOT, timeout=LIMIT, env=alone)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failed = {
        f"{c.get('classname')}::{c.get('name')}": problem.get("message", "")[:300]
        for c in suite.iter("testcase")
        for problem in (c.find("failure"), c.find("error"))
        if problem is not None
    }
    report.unlink()
    return {k: int(suite.get(k)) for k in ("tests", "skipped")} | {"failed": failed}


def timed(world, options: dict, iterations: int = 3, **more) -> dict:
    """Median seconds of an iteration over the plain sample's, and the peak memory of the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    done = world.optimize(**(options | more), iterations=iterations)
    settings, rows = done.result.trace.settings, done.result.trace.rows
    seconds = statistics.median(r["seconds"] for r in rows[1:iterations])
    out = {
        "iteration_over_sample": seconds / settings["sampling_seconds"],
        "checkpointing": settings["checkpointing"],
        "repeatable": settings["repeatable"],
        "notices": done.result.trace.notices,
        "ended": settings["ended"],
        "estimate_mb": settings.get("memory_mb"),
    }
    if torch.cuda.is_available():  # elsewhere an absolute figure says nothing
        out |= {"seconds": seconds, "peak_gb": torch.cuda.max_memory_allocated() / GIB}
    return out


def speed(table: Table, name: str, dtype: str, small: bool) -> None:
    world = new_world(small)
    options = options_of(world, name, dtype, MODELS[name], small)
    ways = {
        **{policy: {"memory": policy, "repeatable": False} for policy in ("per_step", "per_block")},
        "auto": {}, "auto, last 3": {"gradient_steps": 3}, "per_step, repeatable": {"memory": "per_step"},
        **{f"last 3, {policy}": {"memory": policy, "gradient_steps": 3} for policy in ("none", "per_step")},
        **{policy: {"memory": policy, "repeatable": False} for policy in ("none", "offload")},
        "none, repeatable": {"memory": "none"},
    }  # fmt: skip
    with contextlib.suppress(RuntimeError):  # which is said in the rows
        timed(world, options, 2, memory="per_step")  # warm
    for way, choice in ways.items():
        table.row(way, lambda choice=choice: timed(world, options, **choice))
    table.row("DNO's own loop", lambda: dno(world, options))
    for way, settings in whole_runs().items():
        if (name, way) != ("flow", "tilt"):  # its sampler injects no noise
            table.row(f"{way}, whole run", lambda settings=settings: whole(world, options, settings))


def whole_runs() -> dict:
    """The settings of the two nodes that most people use, as they come."""
    from bench.methods import DEFAULT, SearchSettings, mira

    inputs = {i.id: i.default for i in mira("nodes").MiraTiltKSampler.define_schema().inputs if hasattr(i, "default")}
    tilted = {name: inputs[name] for name in ("rounds", "restart_denoise", "interval")}
    return {
        "tilt": SearchSettings("ntrk", particles=1, radius=inputs["tilt"], **tilted),
        "balanced": DEFAULT,
    }


def whole(world, options: dict, settings) -> dict:
    """Seconds of a run from its self-test on over the plain sample's, and the peak memory of the device."""
    import torch

    from bench.methods import GRADIENT_STEPS
    from testing.world import host

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps, sampler = options["steps"], options.get("sampler", "euler_ancestral")
    job = world.job(
        **options,
        gradient_steps=GRADIENT_STEPS if steps >= 10 else 0,
        restart_sigmas=lambda share: world.sigmas(options.get("model"), steps, sampler, "normal", share),
    )
    job.settings = settings
    host.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        done = host.run(job, host.searching if hasattr(settings, "particles") else None)
    host.synchronize()
    seconds, told = time.perf_counter() - start, done.result.trace.settings
    out = {"run_over_sample": seconds / told["sampling_seconds"], "checkpointing": told.get("checkpointing")}
    if torch.cuda.is_available():
        out |= {"seconds": seconds, "peak_gb": torch.cuda.max_memory_allocated() / GIB}
    return out


def dno(world, options: dict) -> dict:
    """Noise optimisation as its authors run it, every step checkpointed, beside ours in one process."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from testing.world import PixelReward, host

    seconds, reward = [], PixelReward("brightness")

    def work(process, noises):
        z = [n.clone().requires_grad_() for n in noises]
        optimizer = torch.optim.AdamW(z, lr=0.01)
        for _ in range(3):
            host.synchronize()
            start = time.perf_counter()
            process.expected = None

            def wrap(denoiser):
                return lambda x, sigma, **kw: checkpoint(lambda x: denoiser(x, sigma, **kw), x, use_reentrant=False)

            rest = iter(z[1:])
            x0 = process.differentiable(z[0], lambda draw, rest=rest: next(rest), wrap)
            images = checkpoint(process.scoring.render, x0, use_reentrant=False)
            (-reward.score(images, [""]).sum()).backward()
            torch.nn.utils.clip_grad_norm_(z, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            host.synchronize()
            seconds.append(time.perf_counter() - start)
        return host.optimizing(process, noises)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        job = world.job(**(options | {"iterations": 0}), memory="none")
        sampled = host.run(job, work).result.trace.settings["sampling_seconds"]
    peak = {"peak_gb": torch.cuda.max_memory_allocated() / GIB} if torch.cuda.is_available() else {}
    return {"iteration_over_sample": statistics.median(seconds[1:]) / sampled} | peak


def make_smaller(gb: float) -> float:
    """A card of so many GB out of a larger one: for PyTorch's allocator, and for what ComfyUI believes is free. With
    dynamic VRAM, which asks the driver, the rest is taken. Returns the GB that are, which the peaks contain.
    """
    import comfy.model_management as management
    import torch

    cap = (gb - RESERVED) * GIB
    if os.environ.get("MIRA_DYNAMIC"):
        taken = max(0, torch.cuda.mem_get_info()[0] - cap)
        BALLAST.append(torch.empty(int(taken), dtype=torch.uint8, device="cuda"))
        return taken / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.get_device_properties(0).total_memory))
    original = management.get_free_memory

    def free(dev=None, torch_free_too=False):
        if dev is not None and getattr(dev, "type", "") == "cpu":
            return original(dev, torch_free_too)
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        left = cap - torch.cuda.memory_allocated()
        return (left, unused) if torch_free_too else left

    management.get_free_memory = free
    return 0.0


def card(table: Table, name: str, gb: int, pixels: int, small: bool) -> None:
    """Whether a square image is optimised to its end on a card of `gb` GB, with the last three steps and with all."""
    import torch

    world = new_world(small)
    options = options_of(world, name, DTYPES[name][0], pixels, small)
    taken = make_smaller(gb) if torch.cuda.is_available() else 0.0

    def optimised(steps: int) -> dict:
        found = timed(world, options, 2, gradient_steps=steps)
        if "peak_gb" in found:
            found["peak_gb"] -= taken
        return found

    for gradient, steps in (("last 3", 3), ("all steps", 0)):
        table.row(gradient, lambda steps=steps: optimised(steps))


def stock(table: Table, name: str, gb: int, small: bool) -> None:
    """KSampler, a search without a gradient, KSampler, an optimisation, KSampler, twice, on a card of `gb` GB: whether
    KSampler's latent is the same bits after each, and what is allocated. A model that is larger than the card has no
    gradient there.
    """
    import torch

    from testing.pack import mira
    from testing.world import host

    world = new_world(small)
    options = options_of(world, name, DTYPES[name][0], 512 if name == "sd15" else 768, small)
    if torch.cuda.is_available():
        make_smaller(gb)
    inputs = {k: v for k, v in options.items() if k not in ("vae", "lr", "regularizer", "keep")}

    def search() -> None:
        with torch.inference_mode():
            job = world.job(**options)
            job.settings, job.gradient = mira("sampler.search").SearchSettings(method="best_of_n", particles=2), False
            rewards = host.run(job, host.searching).result.trace.rows
        if not all(math.isfinite(r["reward"]) for r in rewards):
            raise RuntimeError("a reward is not finite")

    def after(work) -> dict:
        problem = None
        try:
            work()
        except RuntimeError as e:
            problem = str(e).splitlines()[0]
        try:
            latent = world.ksampler(**inputs)
        except RuntimeError as e:
            latent, problem = None, f"KSampler: {e}"
        return {
            "problem": problem or "",
            "same bits as KSampler's second": latent is not None and torch.equal(latent, second),
            "furthest": math.nan if latent is None else (latent - second).abs().max().item(),
            "allocated_gb": torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0,
        }

    world.ksampler(**inputs)  # the first KSampler of a process reads a table that lies in the CPU's memory
    second = world.ksampler(**inputs)
    table.row("KSampler", lambda: after(lambda: None))
    for again in ("", " again"):
        table.row(f"search{again}", lambda: after(search))
        table.row(
            f"optimisation{again}",
            lambda: after(lambda: world.optimize(**options, iterations=1, gradient_steps=3)),
        )


def leaks(small: bool) -> dict:
    import gc

    import torch

    world = new_world(small)
    options = options_of(world, "sd15", "fp16", 512, small)
    alive, memory, began = [], [], time.time()
    for _ in range(3 if small else 20):
        if time.time() - began > 0.8 * LIMIT:
            break
        world.optimize(**options, iterations=2)
        gc.collect()
        alive.append(sum(torch.is_tensor(x) for x in gc.get_objects()))
        memory.append(torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0)
    flat = len(alive) > 2 and len(set(alive[1:])) == 1 and max(memory[1:]) - min(memory[1:]) < 1e-3
    return {"live_tensors": alive, "allocated_gb": memory, "flat": flat}


def repeat(table: Table, small: bool) -> None:
    import torch

    world = new_world(small)

    def twice(options: dict) -> dict:
        runs, seconds = [], []
        for _ in range(3):  # the first one is warmer for the second than that for itself
            start = time.perf_counter()
            runs.append(world.optimize(**options))
            seconds.append(time.perf_counter() - start)
        a, b = (r.latent for r in runs[1:])
        same = {"same_bits": torch.equal(a, b), "furthest": (a - b).abs().max().item()}
        return same | {"seconds": min(seconds[1:])}

    for name in ("demo",) if small else ("demo", "sd15"):
        options = (
            {"steps": 2 if small else 8, "batch": 2}
            if name == "demo"
            else options_of(world, "sd15", "fp16", 512, small)
        )
        for policy in POLICIES[:1] if small else POLICIES:
            for wanted, how in ((False, "as fast as can be"), (True, "repeatable")):
                options |= {"iterations": 2 if small else 4, "memory": policy, "repeatable": wanted}
                table.row(f"{name}, {policy}, {how}", lambda options=options: twice(options))


def scorers(small: bool) -> dict:
    if small:
        return {"not run": "full-size networks only"}
    out = Path(os.environ["MIRA_PIECE"]).with_suffix(".scorers")
    subprocess.run([sys.executable, "-m", "bench.rewards", "--json", str(out)], cwd=ROOT, check=True, timeout=LIMIT)
    found = json.loads(out.read_text())
    out.unlink()
    return found


def piece(name: str, small: bool, file: Path) -> dict:
    """What it measured, which is also in `file`."""
    kind, *rest = name.split("-")
    if kind == "tests":
        found = tests(*rest)
    else:
        from testing.pack import with_comfyui

        with_comfyui(sdpa=True)
        if kind in ("leaks", "scorers"):
            found = {"leaks": leaks, "scorers": scorers}[kind](small)
        else:
            table = Table(file)
            numbers = [int(r) if r.isdecimal() else r for r in rest]
            {"speed": speed, "card": card, "stock": stock, "repeat": repeat}[kind](table, *numbers, small)
            found = table.rows
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".part").unlink(missing_ok=True)
    return found


# -- all of them


def run_all(out: Path, pieces: list[str], small: bool) -> int:
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in pieces:
        file = out / f"{name}.json"
        if file.is_file():
            print(f"{name}: there already", flush=True)
            continue
        print(f"{name} ...", flush=True)
        command = [sys.executable, "-m", "bench.gpu", "--piece", name, *(["--small"] if small else [])]
        began, where = time.time(), os.environ | {"MIRA_PIECE": str(file)}
        try:
            code = subprocess.run(command, cwd=ROOT, env=where, timeout=LIMIT + KILLED).returncode
        except subprocess.TimeoutExpired:
            code = -1
        failed += code != 0
        how = {0: "done", LATER: "to be gone on with", -1: "killed"}.get(code, f"FAILED ({code})")
        print(f"{name}: {how} in {time.time() - began:.0f} s", flush=True)
        gather(out, small)
    gather(out, small)
    return min(failed, 1)


def gather(out: Path, small: bool) -> None:
    """What there is so far, as one file and as a page."""
    found, parts = (
        {p: json.loads((out / f"{p}{end}").read_text()) for p in PIECES if (out / f"{p}{end}").is_file()}
        for end in (".json", ".part")
    )
    result = {"device": device_name(), "small": small, "pieces": found, "unfinished": parts}
    (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "gpu.md").write_text(page(result))


def page(result: dict) -> str:
    """The tables as Markdown."""
    pieces, lines = (
        result["pieces"],
        ["# On a GPU", "", f"`python dev.py bench gpu --gpu --out DIR` on {result['device']}."],
    )
    if result["small"]:
        lines += [
            "",
            "A rehearsal with networks of the demo's size: it shows that the pieces run, and measures nothing.",
        ]
    for name, table in (pieces | result["unfinished"]).items():
        lines += ["", f"## {name}{' (unfinished)' if name in result['unfinished'] else ''}", ""]
        if all(isinstance(row, dict) for row in table.values()):
            columns = list(
                dict.fromkeys(k for row in table.values() for k in row if k not in ("notices", "estimate_mb"))
            )
            lines += [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
            for way, row in table.items():
                cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)]
                lines.append(f"| {way} | {' | '.join(cells)} |")
        else:
            lines += [f"- {k}: {v}" for k, v in table.items()]
    if missing := [p for p in PIECES if p not in pieces and p not in result["unfinished"]]:
        lines += ["", "Not measured yet: " + ", ".join(missing) + "."]
    return "\n".join(lines) + "\n"


def pack(folder: Path, trees: list[Path]) -> None:
    """The trees of ComfyUI without their pictures, and the wheels that a machine with PyTorch lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = shutil.ignore_patterns("*.png", "*.jpg", "*.webp", "*.gif", "__pycache__", "tests*", ".git")
    empty = ("models", "output", "user", "custom_nodes")
    for tree in trees:
        copy = folder / "comfyui"
        shutil.rmtree(copy, ignore_errors=True)
        root = str(tree)
        shutil.copytree(
            tree, copy, ignore=lambda at, names, root=root: {*pictures(at, names), *(empty if at == root else ())}
        )
        for name in empty:
            (copy / name).mkdir()
        shutil.make_archive(str(folder / tree.name), "xztar", copy)
        shutil.rmtree(copy)
    wheels = folder / "wheels"
    download = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"),
        *(str(wheels), "--python-version", "3.12", "--implementation", "cp"),
    ]
    platforms = [f"--platform=manylinux{p}_x86_64" for p in ("_2_28", "_2_17", "2014", "1")]
    subprocess.run([*download, *platforms, *WHEELS], check=True)
    pydantic = zipfile.ZipFile(next(wheels.glob("pydantic-*.whl")))
    metadata = pydantic.read(next(n for n in pydantic.namelist() if n.endswith("METADATA"))).decode()
    core = re.search(r"^Requires-Dist: (pydantic-core==[\w.]+)", metadata, re.MULTILINE).group(1)
    subprocess.run([*download, *platforms, core], check=True)
    subprocess.run([*download, "--platform=any", *PURE_WHEELS], check=True)
    with tarfile.open(folder / "stand-ins.tar.xz", "w:xz") as archive:
        for name, text in STAND_INS.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    (folder / "run.sh").write_text(RUN.replace("DEFAULT_HOST", trees[0].name))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20
    print(f"{folder}: {size:.0f} MiB. There, in the pack's folder: sh {folder.name}/run.sh OUT [PIECE ...]")


RUN = """#!/bin/sh
# On the machine with the GPU, in the pack's folder: sh FOLDER/run.sh OUT [PIECE ...]
# HOST=comfyui-0.33 takes another of the trees that were packed; MIRA_DYNAMIC=1 has dynamic VRAM there.
set -e
here=$(cd "$(dirname "$0")" && pwd); out=$1; shift
place=${PLACE:-/tmp/mira-gpu}
if [ ! -f "$place/ready" ]; then
    for tree in "$here"/comfyui-*.tar.xz; do
        name=$(basename "$tree" .tar.xz); mkdir -p "$place/$name"; tar -xJf "$tree" -C "$place/$name"
    done
    python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$place/site" "$here"/wheels/*.whl
    tar -xJf "$here/stand-ins.tar.xz" -C "$place/site"
    # A server drops PYTHONPATH.
    echo "$place/site" > "$(python3 -c 'import site; print(site.getsitepackages()[0])')/mira_gpu.pth"
    touch "$place/ready"
fi
export MIRA_COMFYUI="$place/${HOST:-DEFAULT_HOST}" MIRA_GPU=1 PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
if [ "$out" = --shell ]; then exec sh -c "$1"; fi  # any other command there
python3 -m bench.gpu --piece smoke
exec python3 -m bench.gpu --out "$out" ${1:+--pieces "$@"}
"""


def smoke() -> None:
    """In a minute: everything imports, the device answers, and one small run goes up."""
    from testing.pack import with_comfyui

    with_comfyui(sdpa=True)
    from testing.world import World

    rewards = [r["reward"] for r in World().optimize(steps=3, iterations=2, beta=0).result.trace.of(0)]
    print(f"{device_name()}: reward {rewards[0]:.3f} to {rewards[-1]:.3f}", flush=True)
    if not rewards[-1] > rewards[0]:
        raise SystemExit("the smallest run does not raise its reward: nothing else is worth measuring")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--pieces", nargs="*", default=list(PIECES), choices=PIECES, metavar="PIECE")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pack", type=Path, metavar="FOLDER")
    parser.add_argument("--tree", type=Path, nargs="*", default=[], help="other ComfyUI trees to pack")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.pack:
        if "MIRA_COMFYUI" not in os.environ:
            parser.error("--pack packs the ComfyUI of $MIRA_COMFYUI, which is not set")
        pack(args.pack, [Path(os.environ["MIRA_COMFYUI"]), *args.tree])
        return 0
    if args.piece == "smoke":
        smoke()
        return 0
    if args.piece:
        piece(args.piece, args.small, Path(os.environ["MIRA_PIECE"]))
        return 0
    if not args.out:
        parser.error("say where to: --out DIR, or --pack FOLDER")
    if not (args.small or os.environ.get("MIRA_GPU")):
        parser.error("on a CPU the whole networks take days: add --gpu for a card, or --small to rehearse")
    return run_all(args.out, args.pieces, args.small)


if __name__ == "__main__":
    sys.exit(main())
