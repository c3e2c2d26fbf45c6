"""Trains the demo's autoencoder: TAESD's shape (8x down, 4 channels), L1 + edges + pooled L1 on 64 px crops.

`python -m demo.train.vae --minutes 25` writes `<cache>/vae.pt` every minute and resumes from it.
Needs ComfyUI on PYTHONPATH for the network's definition.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from demo.train.data import CACHE, EmojiWorld
from demo.train.host import TAESD

# ComfyUI's SD1.5 latent format multiplies by this before the UNet.
SD15_SCALE = 0.18215


def new_vae() -> TAESD:
    """TAESD with PyTorch's usual initialisation (ComfyUI's layers leave their weights empty)."""
    torch.manual_seed(0)
    vae = TAESD()
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return vae


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Reconstruction y of x (B, 3, H, W) in [0, 1], with a mild pull of latents z to unit variance."""
    sharp = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
    pooled = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
    prior = 1e-3 * (z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean())
    return F.l1_loss(y, x) + sharp + 2 * pooled + prior + 2 * F.mse_loss(y, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    world = EmojiWorld(seed=1, animal_share=0.5)
    vae = new_vae().to(memory_format=torch.channels_last)
    encoder, decoder = vae.taesd_encoder, vae.taesd_decoder
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    path, step, spent = CACHE / "vae.pt", 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    average, last_save, start = None, time.time(), time.time() - spent
    while (elapsed := time.time() - start) < args.minutes * 60:
        progress = elapsed / (args.minutes * 60)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 100) * max(0.02, 1 - progress)
        images, _ = world.batch(args.batch)
        top, left = torch.randint(0, 65, (2,), generator=world.generator).tolist()
        x = images[..., top : top + 64, left : left + 64].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = encoder(x)
            y = decoder(z)
        loss = loss_of(x, y.float(), z.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 20 == 0:
            print(f"step {step} {elapsed / 60:.1f} min loss {average:.4f} z std {z.float().std():.2f}", flush=True)
        if time.time() - last_save > 60:
            save(path, vae, optimizer, step, time.time() - start)
            last_save = time.time()
    with torch.no_grad():
        images, _ = world.batch(64)
        z = encoder(images)
        print(f"PSNR {-10 * F.mse_loss(decoder(z).clamp(0, 1), images).log10():.2f} dB, latent std {z.std():.3f}")
        # ComfyUI's raw latents are z / vae_scale + vae_shift; the UNet sees them times 0.18215.
        vae.vae_scale.copy_(SD15_SCALE * z.std())
        vae.vae_shift.copy_(-z.mean() / vae.vae_scale)
    save(path, vae, optimizer, step, time.time() - start)


def save(path, vae, optimizer, step: int, spent: float) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}, temporary
    )
    temporary.replace(path)


if __name__ == "__main__":
    main()
