"""Which of ComfyUI's image families are optimised rightly, as small networks with random weights.

`python dev.py bench families` looks at every family that this ComfyUI knows, `--host 0.33` at those of another one;
docs/results/families.json keeps what each found, and docs/models.md is the table of it. Of a network of each:

- *plain*: the output that is not optimised is KSampler's, bit for bit;
- *gradient*: the relative error of its gradient against central differences, both in float64;
- *memory*: how far per_step and per_block are from the largest latent of none, which computes nothing again;
- *precisions*: whether a reward rises with the weights in each of them;
- *moved*: how far a prediction is from itself where a gradient is wanted, relative.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

import torch

from testing.families import FAMILIES, known, make
from testing.pack import ROOT, mira
from testing.world import World, host

kernels, selftest = mira("nodes.host.kernels"), mira("nodes.host.selftest")
check = mira("sampler.selftest").check

POLICIES = ("none", "per_step", "per_block")
PRECISIONS = ("fp16", "bf16", "fp8", "scaled fp8")
EXACT = 1e-4  # the bound on `gradient`: rounding in float64, and ComfyUI's own in float32 of what a network gives
SAME = 1e-3  # the bound on `memory` and `moved`
RESULTS = ROOT / "docs" / "results" / "families.json"
PAGE = ROOT / "docs" / "models.md"


@contextmanager
def self_tests(how: Callable = check) -> Iterator[list]:
    """What the optimiser's own tests of a gradient find within, tested as `how` does."""
    found: list = []
    before = selftest.check
    selftest.check = lambda *args, **options: found.append(how(*args, **options)) or found[-1]
    try:
        yield found
    finally:
        selftest.check = before


def in_float64(f, x, **options):
    return check(f, x.double(), (1e-3, 1e-4, 1e-5), enough=0.0, far=(1e-3, 1e-4), **options)


def optimize(world: World, parts: tuple, **options):
    """Two iterations of three steps."""
    model, vae, conds, latent = parts
    with torch.inference_mode():
        return host.run(
            world.job(
                model=model, vae=vae, latent=latent, sampler="euler", steps=3, cfg=3.0, iterations=2, beta=0, **conds,
                **options,
            )
        )  # fmt: skip


def rises(done) -> bool:
    rewards = [r["reward"] for r in done.result.trace.of(0)]
    return bool(torch.isfinite(done.latent).all()) and max(rewards) > rewards[0]


def exactness(world: World, name: str) -> float:
    """The relative error of a step's gradient in float64, which ComfyUI's fused kernels do not know."""
    with self_tests(in_float64) as found, kernels.training(gradient=False), kernels.pytorch_kernels():
        optimize(world, make(name, "float64"), memory="none")
    return max(max(c.wrong, c.lacks) for c in found)


def examine(world: World, name: str) -> dict:
    """All but the gradient and the precisions, and whether the reward rises."""
    parts = model, _, conds, latent = make(name)
    with self_tests() as found:
        done = {memory: optimize(world, parts, memory=memory) for memory in POLICIES}
    stock = world.ksampler(model=model, latent=latent, steps=3, cfg=3.0, sampler="euler", **conds)
    one = done["none"]
    far = max((done[memory].latent - one.latent).abs().max().item() for memory in POLICIES)
    return {
        "plain": torch.equal(one.plain, stock), "rises": rises(one), "moved": max(c.moved for c in found),
        "memory": far / one.latent.abs().max().item(),
    }  # fmt: skip


def in_precision(world: World, name: str, precision: str) -> bool | str:
    """Whether the reward rises; or why it is not optimised, which may be that ComfyUI itself does not sample it."""
    model, vae, conds, latent = make(name, precision)
    try:
        return rises(optimize(world, (model, vae, conds, latent)))
    except RuntimeError as refused:
        said = str(refused).splitlines()[0]
    try:
        world.ksampler(model=model, latent=latent, steps=3, sampler="euler", **conds)
    except RuntimeError as problem:
        return f"ComfyUI's KSampler fails, too: {problem}".splitlines()[0]
    return said


def look_at(world: World, name: str) -> dict:
    found = examine(world, name)
    found["gradient"] = exactness(world, name)
    found["precisions"] = {precision: in_precision(world, name, precision) for precision in PRECISIONS}
    return found


def works(found: dict) -> bool:
    exact = found["moved"] < SAME and found["memory"] < SAME and found["gradient"] < EXACT
    return found["plain"] and found["rises"] and exact


def page(results: dict) -> str:
    """The newest ComfyUI's row of each family."""
    said = ", ".join(f"{version} on {at['date']}" for version, at in results.items())
    lines = [
        "# Which models", "",
        f"`python dev.py bench families` on a CPU, with ComfyUI {said}",
        "([raw](results/families.json)). Of each family a network as ComfyUI builds it, a few layers deep and with",
        "random weights, by the newest of these that knows it:", "",
        "- what is not optimised is KSampler's picture bit for bit (in float32);",
        "- of a step in the middle, the gradient of the prediction agrees with central differences, in float64",
        "  but for ComfyUI's own float32 of what a network gives (*gradient*: how far off, relative), and the",
        "  prediction is the same as without a gradient;",
        "- computing again instead of keeping (`memory`) changes nothing (*memory*: how far per_step and per_block are",
        "  off, relative);",
        "- a reward rises, with the weights in float32 and in each of the formats on the right.", "",
        "It says that the pack takes the family as it should, not what its real weights do to a picture.", "",
        "| family | ComfyUI | works | gradient | memory | " + " | ".join(PRECISIONS) + " |",
        "|---|---|---|---|---|" + "---|" * len(PRECISIONS),
    ]  # fmt: skip
    notes: list[str] = []
    for name in FAMILIES:
        versions = [version for version, at in results.items() if name in at["families"]]
        if not versions:
            continue
        found, cells = results[versions[-1]]["families"][name], []
        for precision in PRECISIONS:
            got = found["precisions"][precision]
            if isinstance(got, str) and got not in notes:
                notes.append(got)
            cells.append({True: "yes", False: "no gain"}.get(got) or f"no ({notes.index(got) + 1})")
        yes = "yes" if works(found) else "**no**"
        figures = f"{found['gradient']:.0e} | {found['memory']:.0e}"
        lines.append(f"| {name} | {', '.join(versions)} | {yes} | {figures} | {' | '.join(cells)} |")
    lines += ["", *(f"({n}) {note}\n" for n, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def read() -> dict:
    """By ComfyUI's version, the oldest first."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES))
    parser.add_argument("--report", action="store_true", help="only make the page of what is there")
    arguments = parser.parse_args()
    results = read()
    if not arguments.report:
        from comfyui_version import __version__

        logging.getLogger().setLevel(logging.ERROR)
        at = results.setdefault(__version__, {"families": {}})
        at["date"] = date.today().isoformat()
        world = World(apart=False)
        for name in arguments.only or known():
            found = at["families"][name] = look_at(world, name)
            print(name, json.dumps(found), flush=True)
            order = sorted(results, key=lambda version: [int(n) for n in version.split(".")])
            results = {version: results[version] for version in order}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
