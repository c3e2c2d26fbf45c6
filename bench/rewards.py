"""What the scorers cost: `python dev.py bench rewards [--json FILE]`.

Every scorer on its full-size network with random weights, one 512 px image: time of score and gradient over time of the
score alone, medians of five alternating runs, with and without checkpointed layers; parameters; the peak memory of a
forward pass alone, and what autograd keeps for the backward pass; and, in fresh processes, the first import of each
library over that of PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from testing.pack import mira, with_comfyui

with_comfyui(sdpa=True)
blocks, memory = mira("nodes.host.blocks"), mira("sampler.memory")
aesthetic, clip, networks = mira("rewards.aesthetic"), mira("rewards.clip"), mira("rewards.networks")
files, image_reward, jpeg, pixel = (mira(f"rewards.{m}") for m in ("files", "image_reward", "jpeg", "pixel"))

RUNS = 5
PROMPT = ["a watercolour fox under a red umbrella"]
HERE = Path("random")


def drawn(shapes: dict) -> dict:
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=g).mul_(0.02) for k, v in shapes.items() if v.is_floating_point()}


def random_clip(name: str):
    import open_clip

    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        shapes = open_clip.CLIP(**config).state_dict()
    return networks.clip_of(drawn(shapes), files.OPEN_CLIP, HERE, quick_gelu=False)


def head(width: int):
    sizes, shapes = [width, 1024, 128, 64, 16, 1], {}
    for number, (a, b) in zip(aesthetic.LAYERS, itertools.pairwise(sizes), strict=True):
        shapes |= {f"layers.{number}.weight": torch.empty(b, a), f"layers.{number}.bias": torch.empty(b)}
    return aesthetic.LinearHead(drawn(shapes))


def random_aesthetic():
    encoder = random_clip("ViT-L-14")
    visual = encoder.network.visual
    return aesthetic.Aesthetic(head(768), visual, visual, encoder.preprocessing)


def random_image_reward():
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {
        f"{v}pos_embed": (1, 197, 1024), f"{v}patch_embed.proj.weight": (1024, 3, 16, 16),
        f"{t}embeddings.word_embeddings.weight": (30524, 768), f"{t}embeddings.position_embeddings.weight": (512, 768),
        **{f"{v}blocks.{i}.mlp.fc1.bias": (4096,) for i in range(24)},
        **{f"{t}encoder.layer.{i}.intermediate.dense.bias": (3072,) for i in range(12)},
    }  # fmt: skip
    network = image_reward.Network({k: torch.empty(s, device="meta") for k, s in shapes.items()})
    return image_reward.ImageReward(networks.adopt(network, drawn(network.state_dict()), "random"), head(768))


SCORERS = {
    "Aesthetic (ViT-L/14)": random_aesthetic,
    "CLIPScore (ViT-L/14)": lambda: clip.clip_score(random_clip("ViT-L-14")),
    "HPSv2, PickScore (ViT-H/14)": lambda: clip.hps(random_clip("ViT-H-14"), "v2"),
    "ImageReward (BLIP-L)": random_image_reward,
    "JPEG estimate": jpeg.JPEGSurrogate,
    "colourfulness": lambda: pixel.PixelReward("colourfulness"),
}


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._made(tensor.untyped_storage(), inputs)
        return out

    def _made(self, storage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self.known or key in inputs:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def measure(reward, device: torch.device) -> dict:
    image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    for module in reward.modules:
        module.to(device)
    checkpointed = [within for m in reward.modules if (within := blocks.blocks_checkpointed(m, nullcontext))]

    def score(x):
        return reward.score(x, PROMPT).sum()

    def gradient(within):
        x = image.clone().requires_grad_()
        with within():
            value = score(x)
        return torch.autograd.grad(value, x)

    def timed(call) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def alone():
        with torch.no_grad():
            score(image)

    calls = {"score": alone, "gradient": lambda: gradient(nullcontext)}
    if checkpointed:
        calls["gradient_checkpointed"] = lambda: gradient(checkpointed[0])
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(RUNS):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    median = {name: statistics.median(s) for name, s in seconds.items()}
    result = {
        "parameters": sum(p.numel() for m in reward.modules for p in m.parameters()),
        "gradient_over_score": median["gradient"] / median["score"],
        "forward_peak_bytes": peak_of(alone),
        "kept_bytes": memory.saved_bytes(score, image),
    }
    if checkpointed:
        result["gradient_over_score_checkpointed"] = median["gradient_checkpointed"] / median["score"]
        with checkpointed[0]():
            result["kept_bytes_checkpointed"] = memory.saved_bytes(score, image)
    if device.type == "cuda":
        result["score_seconds"] = median["score"]
    return result


def peak_of(call) -> int:
    with PeakBytes() as watched:
        call()
    return watched.peak


def import_seconds(module: str, after: str = "import torch") -> float:
    code = f"import time\n{after}\nt = time.perf_counter()\nimport {module}\nprint(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(float(r.stdout.splitlines()[-1]) for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    result = {"scorers": {}, "import_over_torch": {}}
    for name, make in SCORERS.items():
        found = result["scorers"][name] = measure(make(), device)
        print(name, {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    base = import_seconds("torch", "")
    for module in ("open_clip", "transformers.models.blip.modeling_blip"):
        result["import_over_torch"][module] = import_seconds(module) / base
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
