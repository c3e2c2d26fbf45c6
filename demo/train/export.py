"""Writes the shipped weights: `python -m demo.train.export` turns `<cache>/*.pt` into `demo/weights/*.safetensors`.

What was not trained stays as it is.
"""

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
    names = [name for name in ("vae", "clip", "unet", "judge") if (CACHE / f"{name}.pt").exists()]
    for name in names:
        saved = torch.load(CACHE / f"{name}.pt", weights_only=True, map_location="cpu")
        state = saved["model"]
        if name == "unet":
            unet = new_unet()
            with torch.no_grad():
                for parameter, average in zip(unet.parameters(), saved["ema"], strict=True):
                    parameter.copy_(average)
            state = unet.state_dict()
        shipped = half(state)
        if name == "vae":  # the scale of the latents is one number that everything hangs on: it stays exact
            shipped |= {k: state[k].float() for k in ("vae_scale", "vae_shift")}
        if name == "clip":
            shipped |= {"tokens": saved["tokens"].to(torch.int32)}
        path = FOLDER / f"{name}.safetensors"
        save_file(shipped, path, metadata={"steps": str(saved["step"])})
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB after {saved['step']} steps")
    print(f"written: {', '.join(names) or 'nothing, as nothing was trained'}")


if __name__ == "__main__":
    main()
