"""The demo model in ComfyUI's own classes, made and run under inference mode as ComfyUI runs its nodes."""

from __future__ import annotations

from testing.pack import mira, with_comfyui

with_comfyui()

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

demo, host = mira("nodes.demo"), mira("nodes.host")
schedule = mira("nodes.shared.inputs").schedule
PixelReward = mira("rewards.pixel").PixelReward
Settings = mira("sampler.optimize").Settings

PROMPT = "generate an image of a fox"
LARGEST_SEED = 2**64 - 2  # of KSampler on every ComfyUI: on a CPU newer ones add 1, and that is PyTorch's largest


class World:
    """apart: the sampler's own noises have another seed than the initial one. With the same, as KSampler gives it,
    ComfyUI 0.3.75 draws on a CPU (not on a GPU) the initial noise once more at the first step, and the two add up to
    more noise than the model knows there. side: of a latent, if none is given; the demo model was trained at 16.
    model, vae: others than the demo's own.
    """

    def __init__(self, apart: bool = True, side: int = 16, model=None, vae=None):
        self.apart, self.side = 1_000_003 if apart else 0, side
        with torch.inference_mode():
            self.model, self.vae = model or demo.load_model(), vae or demo.load_vae()
            self.clip = demo.load_clip()
            self.positive, self.negative = self.encode(PROMPT), self.encode("")

    @torch.inference_mode()
    def encode(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    @torch.inference_mode()
    def encode_batch(self, prompts):
        """A conditioning whose batch is as large as the latent's: a prompt for every image."""
        return [[torch.cat([self.encode(p)[0][0] for p in prompts]), {}]]

    def paint(self, prompts: list[str], seed: int, steps: int = 25) -> torch.Tensor:
        """One image per prompt, (N, 3, 128, 128) in [0, 1], as KSampler and VAEDecode give them."""
        images = []
        for start in range(0, len(prompts), 15):
            some = prompts[start : start + 15]
            latent = self.ksampler(positive=self.encode_batch(some), steps=steps, batch=len(some), seed=seed + start)
            with torch.inference_mode():
                images.append(self.vae.decode(latent).movedim(-1, 1))
        return torch.cat(images).clone()

    def guider(self, model=None, positive=None, negative=None, cfg=5.0):
        guider = comfy.samplers.CFGGuider(model or self.model)
        guider.set_conds(positive or self.positive, negative or self.negative)
        guider.set_cfg(cfg)
        return guider

    def sigmas(self, model=None, steps=4, sampler="euler_ancestral", scheduler="normal", denoise=1.0):
        values = {"steps": steps, "sampler_name": sampler, "scheduler": scheduler, "denoise": denoise}
        return schedule(model or self.model, values)

    @torch.inference_mode()
    def job(
        self,
        *,
        model=None,
        vae=None,
        positive=None,
        negative=None,
        cfg=5.0,
        steps=4,
        sampler="euler_ancestral",
        scheduler="normal",
        denoise=1.0,
        latent=None,
        seed=7,
        reward=None,
        iterations=2,
        batch=1,
        prompt=PROMPT,
        regularizer="mira_two_sided",
        beta=1.0,
        keep="last",
        lr=0.02,
        prompts=None,
        **kwargs,
    ):
        """A `host.Job`; what is not said is a small, quick run."""
        latent = torch.zeros(batch, 4, self.side, self.side) if latent is None else latent
        return host.Job(
            guider=self.guider(model, positive, negative, cfg),
            sampler=comfy.samplers.sampler_object(sampler),
            sigmas=self.sigmas(model, steps, sampler, scheduler, denoise),
            noise=comfy.sample.prepare_noise(latent, seed),
            latent=latent,
            vae=vae or self.vae,
            reward=reward or PixelReward("brightness"),
            settings=Settings(iterations=iterations, lr=lr, regularizer=regularizer, beta=beta, keep=keep),
            seed=seed + self.apart,
            initial=lambda seed: comfy.sample.prepare_noise(latent, seed),
            prompts=prompts or [prompt] * len(latent),
            **kwargs,
        )

    def optimize(self, **kwargs):
        """`host.run` under inference mode, as ComfyUI's executor calls a node."""
        with torch.inference_mode():
            return host.run(self.job(**kwargs))

    @torch.inference_mode()
    def ksampler(
        self,
        model=None,
        positive=None,
        negative=None,
        cfg=5.0,
        steps=4,
        sampler="euler_ancestral",
        scheduler="normal",
        denoise=1.0,
        latent=None,
        seed=7,
        batch=1,
        mask=None,
        **_,
    ):
        """What the stock KSampler node gives where the model is loaded: its sigmas come from the model's own table, and
        a GPU makes them otherwise in their last bits than a CPU does.
        """
        comfy.model_management.load_models_gpu([model or self.model])
        latent = torch.zeros(batch, 4, self.side, self.side) if latent is None else latent
        return comfy.sample.sample(
            model or self.model,
            comfy.sample.prepare_noise(latent, seed),
            steps,
            cfg,
            sampler,
            scheduler,
            positive or self.positive,
            negative or self.negative,
            latent,
            denoise=denoise,
            noise_mask=mask,
            disable_pbar=True,
            seed=seed + self.apart,
        )
