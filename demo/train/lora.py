"""Fine-tunes the demo model towards bright images as a LoRA: `python dev.py train lora` writes
`demo/weights/bright_lora.safetensors`.

Reward-weighted fine-tuning at its simplest: the model's own images on white, with captions that do not ask for white.
What comes out is a reward-tuned model to try guidance with, in the layout of every LoRA that ComfyUI loads.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file
from torch import nn

from demo import vocabulary
from demo.weights import FOLDER
from testing.world import World

RANK, LR = 4, 1e-2
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def latents(world: World, seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images on white, in the model's own scale; the conditioning of captions that name no background)."""
    found, conditions = [], []
    for seed in range(seeds):
        for start in range(0, 45, 15):
            animals = vocabulary.ANIMALS[start : start + 15]
            white = world.encode_batch([vocabulary.caption(a, background="white", prefix=True) for a in animals])
            plain = world.encode_batch([vocabulary.caption(a, prefix=True) for a in animals])
            sampled = world.ksampler(positive=white, steps=10, batch=len(animals), seed=90_000 + 100 * seed + start)
            found.append(world.model.model.process_latent_in(sampled).clone())
            conditions.append(plain[0][0].clone())
    return torch.cat(found), torch.cat(conditions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    world = World()
    x0, condition = latents(world, args.seeds)
    model = world.model.model
    unet, sampling = model.diffusion_model, model.model_sampling
    for module in unet.modules():  # weights that were made in inference mode have no backward
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)
    pairs: dict[str, tuple[nn.Linear, nn.Linear]] = {}
    for name, module in unet.named_modules():
        if name.endswith(LAYERS):
            down, up = nn.Linear(module.in_features, RANK, bias=False), nn.Linear(RANK, module.out_features, bias=False)
            nn.init.zeros_(up.weight)
            pairs[name] = down, up
            module.register_forward_hook(lambda m, x, out, down=down, up=up: out + up(down(x[0])))
    optimizer = torch.optim.AdamW([p for pair in pairs.values() for m in pair for p in m.parameters()], lr=LR)
    average = None
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / args.steps)
        index = torch.randint(len(x0), (16,))
        # The background is decided at high noise, so most of the training is there.
        level = (1 - torch.rand(16).square()) * (len(sampling.sigmas) - 1)
        sigma = sampling.sigmas[level.long()].clone()
        noise = torch.randn(16, *x0.shape[1:])
        noisy = x0[index] + sigma.view(-1, 1, 1, 1) * noise
        denoised = model.apply_model(noisy, sigma, c_crossattn=condition[index])
        loss = ((noisy - denoised) / sigma.view(-1, 1, 1, 1) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 50 == 49:
            print(f"step {step + 1} loss {average:.4f}", flush=True)
    state = {}
    for name, (down, up) in pairs.items():
        state[f"diffusion_model.{name}.lora_down.weight"] = down.weight
        state[f"diffusion_model.{name}.lora_up.weight"] = up.weight
        state[f"diffusion_model.{name}.alpha"] = torch.tensor(float(RANK))
    path = FOLDER / "bright_lora.safetensors"
    save_file({k: v.detach().to(torch.bfloat16).contiguous() for k, v in state.items()}, path)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
