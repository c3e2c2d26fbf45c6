"""Trains the demo's UNet: eps-prediction, SD's schedule, min-SNR weighting, EMA; text from the frozen CLIP.

`python -m demo.train.unet --minutes 90` writes `<cache>/unet.pt` every two minutes and resumes from it, on a GPU where
there is one. Needs ComfyUI on PYTHONPATH for the network's definition. VAE and CLIP are those of `<cache>`, else the
shipped ones, so that the UNet can be trained alone.
"""

from __future__ import annotations

import argparse
import time

import torch

from demo.clip import new_clip
from demo.train.clip import ShortTokenizer
from demo.train.data import CACHE, EmojiWorld
from demo.train.host import UNetModel
from demo.train.vae import new_vae
from demo.unet import CONFIG
from demo.weights import load

# SD's scaled-linear schedule.
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS_BAR = torch.cumprod(1 - BETAS, 0).float()


def new_unet() -> UNetModel:
    """ComfyUI's layers leave their weights empty: PyTorch's usual initialisation, last layers zero."""
    torch.manual_seed(0)
    unet = UNetModel(**CONFIG, dtype=torch.float32, device="cpu")
    for module in unet.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for name, parameter in unet.named_parameters():
        if "out_layers.3" in name or "proj_out" in name or name.startswith("out.2"):
            torch.nn.init.zeros_(parameter)
    return unet


def finished(name: str) -> dict[str, torch.Tensor]:
    """The weights of an earlier stage: of this training, or the shipped ones."""
    path = CACHE / f"{name}.pt"
    return torch.load(path, weights_only=True)["model"] if path.exists() else load(name)


class Text:
    """Captions to (B, 77, 128): the frozen CLIP's last hidden states, padded with end tokens as SD1.5 does."""

    def __init__(self, saved: dict[str, torch.Tensor], device: torch.device):
        self.tokenize = ShortTokenizer()
        self.clip = new_clip(len(self.tokenize.tokens) + 1).eval().requires_grad_(False)
        self.clip.load_state_dict({k: v for k, v in saved.items() if k != "tokens"})
        self.device, self.known = device, {}

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        new = [c for c in dict.fromkeys(captions) if c not in self.known]
        if new:
            ids = self.tokenize.tokenize(new)
            ids = torch.where(ids == 0, ids.max(), ids)
            x = self.clip.token_embedding(self.tokenize.row[ids]) + self.clip.positional_embedding
            x = self.clip.ln_final(self.clip.transformer(x, attn_mask=self.clip.attn_mask))
            self.known.update(zip(new, x.half().to(self.device), strict=True))
        return torch.stack([self.known[c] for c in captions]).float()


class LatentPool:
    """Encoded images with their labels, a few replaced at every draw."""

    def __init__(self, world: EmojiWorld, vae, size: int, device: torch.device):
        self.world, self.vae, self.device = world, vae.to(device), device
        self.path = CACHE / f"latents{size}.pt"
        if self.path.exists():
            self.z, self.labels = torch.load(self.path, weights_only=True, map_location="cpu")
            self.z = self.z.to(device)
            return
        parts = []
        while sum(len(z) for z, _ in parts) < size:
            parts.append(self.encode(64))
            print(f"encoding {sum(len(z) for z, _ in parts)} / {size}", end="\r", flush=True)
        self.z, self.labels = (torch.cat(p) for p in zip(*parts, strict=True))
        torch.save((self.z, self.labels), self.path)

    @torch.no_grad()
    def encode(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.world.batch(n, jitter=0.6)
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16):
            z = self.vae.taesd_encoder(images).float()
        # What ComfyUI's UNet sees: raw latents z / vae_scale + vae_shift, times the latent format's 0.18215.
        return (z / self.vae.vae_scale + self.vae.vae_shift) * 0.18215, labels

    def draw(self, n: int, refresh: int) -> tuple[torch.Tensor, torch.Tensor]:
        if refresh:
            slots = torch.randint(len(self.z), (refresh,), generator=self.world.generator)
            encoded, self.labels[slots] = self.encode(refresh)
            self.z[slots.to(self.device)] = encoded
        index = torch.randint(len(self.z), (n,), generator=self.world.generator)
        return self.z[index.to(self.device)], self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=9984)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--refresh", type=int, default=2, help="images of the pool that every step makes anew")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    world = EmojiWorld(seed=3, animal_share=0.65)
    text = Text(finished("clip"), device)
    vae = new_vae().requires_grad_(False).to(memory_format=torch.channels_last)
    vae.load_state_dict(finished("vae"))
    pool = LatentPool(world, vae, args.pool, device)
    print(f"latents: std {pool.z.std():.3f} mean {pool.z.mean():.3f}", flush=True)

    unet, alphas_bar = new_unet().to(device), ALPHAS_BAR.to(device)
    ema = [p.detach().clone() for p in unet.parameters()]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    path, step, spent = CACHE / "unet.pt", 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=device)
        unet.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, step, spent = saved["ema"], saved["step"], saved["spent"]
    forward = unet if args.eager else torch.compile(unet)
    average, last_save, start = None, time.time(), None

    def save():
        torch.save(
            {
                "model": unet.state_dict(),
                "ema": ema,
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent": time.time() - start,
            },
            path.with_suffix(".tmp"),
        )
        path.with_suffix(".tmp").replace(path)

    elapsed = spent
    while elapsed < args.minutes * 60:
        progress = elapsed / (args.minutes * 60)
        lr = args.lr * min(1, (step + 1) / 200) * min(1, max(0.02, 2 * (1 - progress)))
        optimizer.param_groups[0]["lr"] = lr
        x0, labels = pool.draw(args.batch, args.refresh)
        captions = world.captions(labels)
        drop = torch.rand(len(captions), generator=world.generator) < 0.1
        context = text.encode(["" if d else c for c, d in zip(captions, drop.tolist(), strict=True)])
        t = torch.randint(1000, (args.batch,), generator=world.generator).to(device)
        noise = torch.randn(x0.shape, generator=world.generator).to(device)
        abar = alphas_bar[t].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            prediction = forward(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t.float(), context)
        # min-SNR-5 (arXiv 2303.09556) for eps-prediction.
        snr = (abar / (1 - abar)).flatten()
        error = (prediction.float() - noise).square().mean((1, 2, 3))
        loss = (error * snr.clamp(max=5) / snr).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        if start is None:  # after the compilation
            start = time.time() - spent
        step += 1
        decay = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [p.detach() for p in unet.parameters()], 1 - decay)
        average = error.detach().mean() if average is None else average.lerp(error.detach().mean(), 0.01)
        elapsed = time.time() - start
        if step % 20 == 0:
            print(f"step {step} {elapsed / 60:.1f} min mse {average:.4f} lr {lr:.1e}", flush=True)
        if time.time() - last_save > 120:
            save()
            last_save = time.time()
    save()


if __name__ == "__main__":
    main()
