"""Writes the shipped weights: `python -m demo.train.export` turns `<cache>/*.pt` into `demo/weights/*.safetensors`."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from demo.train.data import CACHE
from demo.train.unet import new_unet
from demo.weights import FOLDER


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.to(torch.bfloat16).contiguous() if v.is_floating_point() else v for k, v in state.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    saved = {name: torch.load(CACHE / f"{name}.pt", weights_only=True) for name in ("vae", "clip", "unet", "judge")}
    unet = new_unet()
    with torch.no_grad():
        for parameter, average in zip(unet.parameters(), saved["unet"]["ema"], strict=True):
            parameter.copy_(average)
    # The scale of the latents is one number that everything hangs on: it stays exact.
    vae = half(saved["vae"]["model"]) | {k: saved["vae"]["model"][k].float() for k in ("vae_scale", "vae_shift")}
    clip = half(saved["clip"]["model"]) | {"tokens": saved["clip"]["tokens"].to(torch.int32)}
    files = {"unet": half(unet.state_dict()), "vae": vae, "clip": clip, "judge": half(saved["judge"]["model"])}
    total = 0
    for name, state in files.items():
        path = FOLDER / f"{name}.safetensors"
        save_file(state, path, metadata={"steps": str(saved[name]["step"])})
        total += path.stat().st_size
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB after {saved[name]['step']} steps")
    print(f"{total / 1e6:.2f} MB in all")


if __name__ == "__main__":
    main()
