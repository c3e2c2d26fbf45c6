"""What an optimisation iteration costs against a plain sampling run of the same steps, and in memory.

`python dev.py bench speed [--json FILE] [--models demo sd15]` prints medians over five alternating runs in one process.
`sd15` is SD1.5's full-size UNet with random weights, at 128 and 256 px on a CPU and at 512 px on a GPU; both models
decode with a VAE of TAESD's size, so that the ratio is the network's. Memory is measured in fresh processes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time

import torch

from testing.pack import with_comfyui

with_comfyui(sdpa=True)
from testing.networks import sd15
from testing.world import World, host

RUNS = 5


def setting(world: World, name: str, pixels: int, steps: int) -> dict:
    """Keyword arguments of `World.job` for this model and size."""
    side = pixels // 8
    options = {"steps": steps, "latent": torch.zeros(1, 4, side, side), "keep": "last"}
    if name == "sd15":
        g = torch.Generator().manual_seed(0)
        options["model"] = world.sd15
        options |= {k: [[torch.randn(1, 77, 768, generator=g), {}]] for k in ("positive", "negative")}
    return options


class Stopwatch:
    """Seconds spent inside wrapped functions; a function that another one calls counts once."""

    def __init__(self):
        self.seconds, self.depth = 0.0, 0

    def __call__(self, function):
        def timed(*args, **kwargs):
            self.depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - start

        return timed


# What an iteration is timed with.
WAYS = {
    "no_checkpoint": {"memory": "none"},
    "checkpoint": {"memory": "per_step"},
    "last_3_steps": {"memory": "none", "gradient_steps": 3},
}


def iteration(world: World, options: dict) -> tuple[float, float, float]:
    """Seconds of one iteration, of the plain sample of the same run, and the share of an iteration that is neither
    network, VAE, reward nor autograd."""
    watch, calls = Stopwatch(), []
    model = (options.get("model") or world.model).clone()
    model.set_model_unet_function_wrapper(
        watch(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    )
    grad, score = torch.autograd.grad, host.Scoring.score
    torch.autograd.grad, host.Scoring.score = watch(grad), watch(score)

    def tick(k, rows, score):
        calls.append((rows[0]["seconds"], watch.seconds))

    try:
        done = world.optimize(**(options | {"model": model}), iterations=2, on_iteration=tick)
    finally:
        torch.autograd.grad, host.Scoring.score = grad, score
    # The second iteration: the first one warms up and chooses.
    seconds = calls[1][0]
    overhead = 1 - (calls[1][1] - calls[0][1]) / seconds
    return seconds, done.result.trace.settings["sampling_seconds"], overhead


def measure(world: World, name: str, pixels: int, steps: int) -> dict:
    options = setting(world, name, pixels, steps)
    table = {name: [] for name in WAYS}
    plain, overhead = [], []
    for _ in range(RUNS):
        for way, seconds in table.items():
            iterated, sampled, other = iteration(world, options | WAYS[way])
            seconds.append(iterated)
            plain.append(sampled)
            overhead.append(other)
    base = statistics.median(plain)
    result = {
        "pixels": pixels,
        "steps": steps,
        **{f"ratio_{way}": statistics.median(seconds) / base for way, seconds in table.items()},
        "adapter_and_record": statistics.median(overhead),
    }
    if torch.cuda.is_available():
        result |= {"sampling_seconds": base, "device": torch.cuda.get_device_name()}
    print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
    return result


def keep_heap() -> None:
    """Let the allocator keep what is freed: else every iteration pays for mapping its activations anew.

    That would measure the system's page faults, and differently at every run; a GPU's allocator keeps its memory too.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def release() -> None:
    """Hand what the allocator holds in reserve back to the system: only what is in use is to be counted."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def probe(name: str, memory: str, steps: int) -> None:
    """In a process of its own: the growth of the peak memory from a plain sample to two iterations, in MB.

    On a CPU the resident memory is read at every call of the network, forward and recomputed.
    """
    world = World()
    if name == "sd15":
        world.sd15 = sd15()
    options = setting(world, name, 128, steps)
    model, seen = (options.get("model") or world.model).clone(), []

    def watched(apply, args):
        out = apply(args["input"], args["timestep"], **args["c"])
        release()
        seen.append(host.used_bytes())
        return out

    model.set_model_unet_function_wrapper(watched)
    options["model"] = model
    world.optimize(**options, iterations=0)
    before = max(seen)
    seen.clear()
    world.optimize(**options, iterations=2, memory=memory)
    print(json.dumps((max(seen) - before) / 1e6))


def memory_against_steps(name: str) -> dict:
    table = {}
    for memory in ("none", "per_step"):
        for steps in (5, 20, 80):
            if name == "sd15" and memory == "none" and steps == 80:
                continue  # tens of GB
            command = [sys.executable, "-m", "bench.speed", "--probe", name, memory, str(steps)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            table.setdefault(memory, {})[steps] = json.loads(out.splitlines()[-1])
            print(name, memory, steps, "steps:", round(table[memory][steps]), "MB", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--models", nargs="*", default=["demo", "sd15"], choices=["demo", "sd15"])
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe(args.probe[0], args.probe[1], int(args.probe[2]))
        return
    keep_heap()
    world, result = World(), {"models": {}, "memory": {}}
    if "demo" in args.models:
        result["models"]["demo"] = measure(world, "demo", 128, 20)
        result["memory"]["demo"] = memory_against_steps("demo")
    if "sd15" in args.models:
        world.sd15 = sd15()
        sizes = [(512, 20)] if torch.cuda.is_available() else [(128, 2), (256, 1)]
        at = {str(pixels): measure(world, "sd15", pixels, steps) for pixels, steps in sizes}
        result["models"]["sd15"] = next(iter(at.values())) | {"at": at}
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        with open(args.json, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
