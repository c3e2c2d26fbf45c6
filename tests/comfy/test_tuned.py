"""Which layouts of reward-tuned networks ComfyUI's own loaders take: docs/tuned.md, row by row."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

from testing.families import make
from testing.networks import SD15
from testing.pack import ROOT, mira, weights_at_once

nodes = mira("nodes")
PAGE = (ROOT / "docs" / "tuned.md").read_text()


def attention(model) -> tuple[str, str]:
    """(Diffusers' name, ComfyUI's) of a layer that all of these tune."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    module = next(n for n in names if n.endswith("attn1.to_q.weight")).removesuffix(".weight")
    return module, f"diffusion_model.{names[module + '.weight']}"


def lora(weight: torch.Tensor, down: str, up: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        down: torch.randn(2, weight.shape[1], generator=g) * 0.1,
        up: torch.randn(weight.shape[0], 2, generator=g) * 0.1,
    }


KOHYA = ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight")
PROCESSOR = ("{processor}_lora.down.weight", "{processor}_lora.up.weight")
FIT = {"kohya": KOHYA, "processor": PROCESSOR, "unet processor": tuple(f"unet.{n}" for n in PROCESSOR)}
PEFT = ("lora_A.weight", "lora_B.weight")
UNFIT = {
    "unet. PEFT": tuple(f"unet.{{module}}.{n}" for n in PEFT),
    "PEFT": tuple(f"base_model.model.{{module}}.{n}" for n in PEFT),
    "unet. Diffusers": ("unet.{module}.lora.down.weight", "unet.{module}.lora.up.weight"),
}


def named(model, layout: tuple[str, str]) -> tuple[str, dict[str, torch.Tensor]]:
    module, name = attention(model)
    forms = dict(module=module, flat=module.replace(".", "_"), processor=module.replace(".to_", ".processor.to_"))
    return name, lora(model.model.state_dict()[name], *(n.format(**forms) for n in layout))


@torch.inference_mode()
def with_lora(model, tensors):
    """As Load LoRA gives it, from a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lora.safetensors")
        save_file(tensors, file)
        read = comfy.utils.load_torch_file(str(file), safe_load=True)
        return comfy.sd.load_lora_for_models(model, None, {k: t.clone() for k, t in read.items()}, 1.0, 0)[0]


def blend(model, tuned, weight=1.5):
    with torch.inference_mode():
        return nodes.MiraRLGuidance.execute(model, tuned, weight, "constant", 1.0).args[0]


@pytest.mark.parametrize("layout", FIT.values(), ids=list(FIT))
def test_a_lora_that_fits_is_blended(world, layout):
    name, tensors = named(world.model, layout)
    tuned = with_lora(world.model, tensors)
    assert list(tuned.patches) == [name]
    base, one = (world.ksampler(model=m, steps=3, seed=5) for m in (world.model, tuned))
    beyond = world.ksampler(model=blend(world.model, tuned), steps=3, seed=5)
    assert (one - base).abs().max() > 0 and (beyond - one).abs().max() > 0


@pytest.mark.parametrize("layout", UNFIT.values(), ids=list(UNFIT))
def test_one_that_does_not_fit_is_refused_and_fits_once_renamed(world, layout, tmp_path):
    name, tensors = named(world.model, layout)
    tuned = with_lora(world.model, tensors)
    assert not tuned.patches
    with pytest.raises(ValueError, match=r"tuned has the same weights as model.*docs/tuned\.md"):
        blend(world.model, tuned)
    save_file(tensors, tmp_path / "old.safetensors")
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
    subprocess.run([sys.executable, "-c", code, "old.safetensors", "new.safetensors"], cwd=tmp_path, check=True)
    renamed = load_file(tmp_path / "new.safetensors")
    assert list(with_lora(world.model, renamed).patches) == [name]
    expected = named(world.model, KOHYA)[1]
    assert all(torch.equal(renamed[n], expected[n]) for n in expected)
    blend(world.model, with_lora(world.model, renamed))


def test_patches_of_tuned_alone_would_be_ignored(world):
    """Only its weights are used: what is on both holds for both."""
    patched = world.model.clone()
    patched.set_model_sampler_cfg_function(lambda args: args["cond"])
    with pytest.raises(ValueError, match=r"tuned has patches that model has not .*put them on model"):
        blend(world.model, patched)
    with pytest.raises(ValueError, match=r"\(blending \(rl_guidance\)\)"):
        blend(world.model, blend(world.model, world.model))
    with pytest.raises(ValueError, match="tuned has the same weights"):
        blend(patched, patched.clone())
    with_it = with_lora(patched, named(world.model, next(iter(FIT.values())))[1])
    blend(patched, with_it)


def test_a_patch_that_both_have_is_no_patch_of_tuned_alone(world):
    """Older cores copy what a clone's options hold, and two loaded models have patches of their own from one node."""

    class Patch:
        def __call__(self, args):
            return args["denoised"]

    patched = world.model.clone()
    patched.set_model_sampler_post_cfg_function(Patch())
    blend(patched, with_lora(patched.clone(), named(world.model, next(iter(FIT.values())))[1]))


def test_the_same_weights_with_another_attachment_are_another_model(world):
    attached = world.model.clone()
    attached.set_attachments("adapter", object())
    blend(world.model, attached)
    same = blend(world.model, world.model)  # Load LoRA at strength 0, or bypassed
    torch.testing.assert_close(world.ksampler(model=same), world.ksampler())


@pytest.mark.every_host
def test_a_lora_on_quantised_weights_is_blended_too(world):
    """In fp8 with a factor each, as distributed: newer cores keep the two in one tensor, which has no storage."""
    model, _, conds, latent = make("SDXL", "scaled fp8")
    name = next(n for n in model.model.state_dict() if n.endswith("attn1.to_v.weight"))
    with torch.inference_mode():
        tuned = model.clone()
        shape = model.model.get_submodule(name.removesuffix(".weight")).weight.shape
        tuned.add_patches({name: (torch.randn(shape, generator=torch.manual_seed(0)) * 0.05,)}, 1.0)
    base, one = (world.ksampler(model=m, latent=latent, **conds, steps=2) for m in (model, tuned))
    with torch.inference_mode():
        whole = nodes.MiraRLGuidance.execute(model, tuned, 1.0, "constant", 1.0).args[0]
    found = world.ksampler(model=whole, latent=latent, **conds, steps=2)
    assert not torch.equal(one, base) and torch.allclose(found, one, atol=1e-2 * (one - base).abs().max())
    assert torch.equal(world.ksampler(model=model, latent=latent, **conds, steps=2), base)


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model."])
def test_peft_names_fit_sd3(prefix):
    model = make("SD 3")[0]
    names = comfy.utils.mmdit_to_diffusers(model.model.model_config.unet_config, output_prefix="diffusion_model.")
    module = next(n for n in names if n.endswith("attn.to_out.0.weight")).removesuffix(".weight")
    weight = model.model.state_dict()[names[f"{module}.weight"]]
    tensors = lora(weight, *(f"{prefix}{module}.{n}" for n in PEFT))
    assert list(with_lora(model, tensors).patches) == [names[f"{module}.weight"]]


def weights(name: str, shape: torch.Size, g: torch.Generator) -> torch.Tensor:
    if len(shape) > 1:
        return torch.randn(shape, generator=g) / shape[1:].numel() ** 0.5
    return torch.full(shape, float(name.endswith("weight")))


@pytest.mark.every_host
def test_a_whole_checkpoint_is_blended(world, tmp_path):
    """A base and a tuned one, as Load Checkpoint reads them: SD1.5's names and widths, of two levels."""
    config = SD15 | dict(
        channel_mult=[1, 1], num_res_blocks=[1, 1], transformer_depth=[0, 1], transformer_depth_output=[0, 0, 0, 1]
    )
    with torch.device("meta"), weights_at_once():
        shapes = openaimodel.UNetModel(**config, operations=comfy.ops.manual_cast).state_dict()
    models = []
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        state = {f"model.diffusion_model.{name}": weights(name, v.shape, g).half() for name, v in shapes.items()}
        save_file(state, tmp_path / f"{seed}.safetensors")
        with torch.inference_mode():
            file = str(tmp_path / f"{seed}.safetensors")
            models.append(comfy.sd.load_checkpoint_guess_config(file, output_vae=False, output_clip=False)[0])
    assert isinstance(models[0].model.model_config, comfy.supported_models.SD15)
    text = [[torch.randn(1, 77, 768), {}]]
    options = dict(positive=text, negative=text, latent=torch.zeros(1, 4, 8, 8), steps=2, seed=5)
    base, one = (world.ksampler(model=m, **options) for m in models)
    whole = blend(*models, weight=1.0)
    assert (one - base).abs().max() > 0.1 and torch.allclose(world.ksampler(model=whole, **options), one, atol=1e-2)


def test_a_unet_as_diffusers_saves_it_is_recognised_to_its_last_tensor():
    """Of SD1.5's full size, without its bytes."""
    with torch.device("meta"), weights_at_once():
        network = openaimodel.UNetModel(**SD15, operations=comfy.ops.manual_cast)
    mine = network.state_dict()
    names = comfy.utils.unet_to_diffusers(SD15)
    theirs = {name: mine[own] for name, own in names.items() if own in mine}
    found = comfy.model_detection.model_config_from_diffusers_unet(theirs)
    assert isinstance(found, comfy.supported_models.SD15)
    back = comfy.utils.unet_to_diffusers(found.unet_config)
    assert {back[name] for name in theirs} == set(mine)
