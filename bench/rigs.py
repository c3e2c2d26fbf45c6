"""The models that the benchmark runs on: the demo's, and full-size ones from a checkpoint or with random weights.

Weights that nobody can download here are no reason not to run the code: "random" makes them, at full size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.grid import Failure
from testing.pack import mira, weights_at_once
from testing.world import World, demo

combine, Reward = mira("rewards.combine"), mira("rewards.base").Reward
RANDOM = "random"


@dataclass(frozen=True)
class Paper:
    """The paper's settings of a model: sampling steps, CFG, iterations and learning rate, and the image's side.

    begins_at: the timestep from which it was distilled into one step; the others' schedules are whole.
    """

    steps: int
    cfg: float
    iterations: int
    lr: float
    pixels: int
    sampler: str = "euler_ancestral"
    begins_at: int | None = None


PAPER = {
    "demo": Paper(8, 5.0, 6, 0.04, 128),
    "sd15": Paper(100, 5.0, 50, 0.01, 512),
    "sdxl": Paper(100, 5.0, 50, 0.01, 1024),
    "sdxl-turbo": Paper(1, 1.0, 50, 0.01, 512),
    "pixart": Paper(100, 5.0, 50, 0.01, 512),
    "pixart-dmd": Paper(1, 1.0, 50, 0.01, 512, begins_at=400),  # PixArt-alpha-DMD, as ReNO samples it
}
KINDS = {"sd15": "SD15", "sdxl": "SDXL", "sdxl-turbo": "SDXL", "pixart": "PixArt", "pixart-dmd": "PixArtAlpha"}


@dataclass
class Rig:
    """world: runs jobs. model, vae: None for the demo's. encode: prompts -> conditioning of as many images."""

    world: World
    paper: Paper
    model: object = None
    vae: object = None
    encode: object = None
    channels: int = 4
    aesthetic: object = None
    clip_score: object = None
    judge: object = None
    others: dict = field(default_factory=dict)  # rewards by name

    def use_scorers(
        self, *, aesthetic_head: str | None, clip: str | None, hps: str | None, pickscore: str | None,
        image_reward: str | None,
    ) -> None:  # fmt: skip
        """The published scorers, by their files' names in models/mira_rewards. Raises ValueError for a wrong one."""
        loaders = mira("nodes.loaders")
        mira("nodes.shared.files").register()
        if aesthetic_head:
            self.aesthetic = loaders.MiraLoadAestheticReward.execute(aesthetic_head, clip, "auto").args[0]
        if clip:
            self.clip_score = loaders.MiraLoadCLIPScore.execute(clip, loaders.SAME_FILE, "auto", "auto").args[0]
        if hps:
            version = loaders.MiraLoadHPSReward.VERSIONS[0]
            self.others["hps"] = loaders.MiraLoadHPSReward.execute(hps, version, "auto").args[0]
        if pickscore:
            self.others["pickscore"] = loaders.MiraLoadPickScoreReward.execute(pickscore, "auto").args[0]
        if image_reward:
            self.others["image_reward"] = loaders.MiraLoadImageReward.execute(image_reward, "auto").args[0]

    def composite(self) -> Reward:
        """ReNO's, of all four scorers. Raises ValueError for an HPS that is not v2.1."""
        parts = [*(self.others[name] for name in ("hps", "image_reward", "pickscore")), self.clip_score]
        return combine.WeightedSum(parts, combine.scaled(parts, [1.0] * len(parts), "ReNO"))

    def inputs(self, prompts: list[str], pixels: int) -> dict:
        """Keyword arguments of `World.job`."""
        side = pixels // 8
        options = {
            "positive": self.encode(prompts),
            "latent": torch.zeros(len(prompts), self.channels, side, side),
            "cfg": self.paper.cfg,
            "sampler": self.paper.sampler,
        }
        if self.model is not None:
            options |= {"model": self.model, "vae": self.vae, "negative": self.encode([""] * len(prompts))}
        return options


def load(name: str, checkpoint: str | None, text_encoder: str | None = None, vae: str | None = None) -> Rig:
    """name: one of `PAPER`. checkpoint: a file, or "random"; the demo needs none. Raises Failure for a missing one."""
    world, paper = World(), PAPER[name]
    if name == "demo":
        return Rig(
            world, paper, encode=world.encode_batch, aesthetic=demo.demo_aesthetic(),
            clip_score=demo.demo_clip_score(), judge=mira("demo.judge").load_judge(),
        )  # fmt: skip
    if checkpoint is None:
        raise Failure(f"--model {name} needs --checkpoint FILE (or --checkpoint {RANDOM}, to see that it runs)")
    with torch.inference_mode():
        if checkpoint == RANDOM:
            rig = random_rig(name, world, paper)
        else:
            rig = real_rig(name, world, paper, checkpoint, text_encoder, vae)
        if paper.begins_at is not None:
            rig.model = begun_at(rig.model, paper.begins_at)
    return rig


def begun_at(model, timestep: int):
    """A clone whose noise schedule ends at a timestep. What was distilled from there takes plain noise for its input:
    in the middle of a whole schedule ComfyUI would hand it less, noise of the deviation sigma / sqrt(1 + sigma^2).
    """
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    sampling.set_sigmas(sampling.sigmas[: timestep + 1])
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched


def real_rig(name: str, world: World, paper: Paper, checkpoint: str, text_encoder, vae) -> Rig:
    import comfy.sd
    import comfy.utils

    for path, option in ((checkpoint, "--checkpoint"), (text_encoder, "--text-encoder"), (vae, "--vae")):
        if path and not Path(path).is_file():
            raise Failure(f"{option} {path}: there is no such file")
    if name.startswith("pixart"):
        if not text_encoder or not vae:
            raise Failure(f"--model {name} needs --text-encoder FILE (T5-XXL) and --vae FILE beside --checkpoint")
        model = comfy.sd.load_diffusion_model(checkpoint)
        clip = comfy.sd.load_clip([text_encoder], clip_type=comfy.sd.CLIPType.PIXART)
        decoder = comfy.sd.VAE(sd=comfy.utils.load_torch_file(vae))
    else:
        model, clip, decoder, _ = comfy.sd.load_checkpoint_guess_config(checkpoint)
    wanted = KINDS[name]
    found = type(model.model.model_config).__name__
    if not found.startswith(wanted):
        raise Failure(f"--checkpoint {checkpoint} is a {found}, not what --model {name} says")

    def encode(prompts: list[str]) -> list:
        with torch.inference_mode():
            parts = [clip.encode_from_tokens_scheduled(clip.tokenize(p))[0] for p in prompts]
            merged = {k: torch.cat([p[1][k] for p in parts]) for k in parts[0][1] if torch.is_tensor(parts[0][1][k])}
            return [[torch.cat([p[0] for p in parts]), merged]]

    return Rig(world, paper, model, decoder, encode, decoder.latent_channels)


def random_rig(name: str, world: World, paper: Paper) -> Rig:
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models as models

    from testing.networks import SD15

    sdxl = dict(
        in_channels=4, out_channels=4, model_channels=320, channel_mult=[1, 2, 4], num_res_blocks=[2, 2, 2],
        transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        transformer_depth_middle=10, context_dim=2048, num_head_channels=64, num_heads=-1, num_classes="sequential",
        adm_in_channels=2816, image_size=32, use_spatial_transformer=True, use_linear_in_transformer=True,
        use_temporal_attention=False, legacy=False,
    )  # fmt: skip
    pixart = dict(
        image_model="pixart_alpha" if name == "pixart-dmd" else "pixart_sigma",
        num_heads=16, hidden_size=1152, depth=28, input_size=64, pe_interpolation=1,
        patch_size=2, in_channels=4, micro_condition=False,
    )  # fmt: skip
    kind, options, width = {
        "sd15": (demo.DemoSD15, SD15, 768),
        "sdxl": (models.SDXL, sdxl, 2048),
        "sdxl-turbo": (models.SDXL, sdxl, 2048),
        "pixart": (models.PixArtSigma, pixart, 4096),
        "pixart-dmd": (models.PixArtAlpha, pixart, 4096),
    }[name]
    device = management.get_torch_device()
    config = kind(options)
    # Half of float32's memory; on a CPU bfloat16, which it can add and multiply.
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    config.set_inference_dtype(torch.float32 if name == "sd15" and device.type == "cpu" else half, None)
    torch.manual_seed(0)
    with weights_at_once():
        model = config.get_model({}, "", device=device)
    for p in model.diffusion_model.parameters():
        p.fill_(1) if p.ndim == 1 else p.normal_(0, 0.5 / p[0].numel() ** 0.5)
    patcher = comfy.model_patcher.ModelPatcher(model, device, management.unet_offload_device())

    def encode(prompts: list[str]) -> list:
        out = []
        for prompt in prompts:
            g = torch.Generator().manual_seed(sum(map(ord, prompt)) + 1)
            out.append((torch.randn(1, 77, width, generator=g), torch.randn(1, 1280, generator=g)))
        return [[torch.cat([o[0] for o in out]), {"pooled_output": torch.cat([o[1] for o in out])}]]

    return Rig(world, paper, patcher, world.vae, encode)
