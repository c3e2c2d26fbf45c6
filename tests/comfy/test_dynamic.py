"""What the pack makes of models in dynamic VRAM, ComfyUI's default on NVIDIA since 0.16."""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path

import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from mira.nodes import host
from mira.nodes.guidance import MiraRLGuidance
from mira.nodes.host import dynamic as vram
from mira.nodes.host import inference_mode, loading
from mira.sampler.search import SearchSettings

from testing.networks import SMALL, random_lora, random_unet, thin_vae, with_control

sys.path.insert(0, str(Path(__file__).parent))
from dynamic import KNOWN, Dynamic, dynamic

pytestmark = [
    pytest.mark.every_host,
    pytest.mark.skipif(not KNOWN, reason="this ComfyUI has no dynamic VRAM"),
]


def load_model():
    """As from a file: in a patcher that leaves it where it is."""
    loaded = random_unet(SMALL, torch.float32)
    return comfy.model_patcher.ModelPatcher(loaded.model, loaded.load_device, loaded.offload_device)


@pytest.fixture
def model():
    with torch.inference_mode():
        return dynamic(load_model())


@pytest.fixture
def vae():
    with torch.inference_mode():
        vae = thin_vae()
        vae.patcher = dynamic(vae.patcher)
        return vae


def weights(patcher):
    return {k: (id(p), inference_mode.made_in_inference_mode(p)) for k, p in patcher.model.named_parameters()}


def test_the_fake_does_what_dynamic_vram_does(world, model):
    assert torch.equal(world.ksampler(model=model), world.ksampler())
    assert isinstance(model.clone(), Dynamic)
    with pytest.raises(RuntimeError, match="cached_patcher_init is not initialized"):
        model.clone(disable_dynamic=True)
    with pytest.raises(TypeError):
        copy.deepcopy(model.model, {id(model.model.model_config): None})
    layer = model.model.diffusion_model.time_embed[0]
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, layer.in_features, requires_grad=True)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        assert torch.autograd.grad(layer(x).sum(), x)[0].isnan().all()


def test_a_run_is_that_of_plain_models_and_leaves_the_dynamic_ones_alone(world, model, vae):
    plain = world.optimize(iterations=2)
    for used in (False, True):
        if used:
            world.ksampler(model=model)  # its weights are where dynamic VRAM has them
            with torch.inference_mode():
                vae.decode(torch.zeros(1, 4, 8, 8))
        before = weights(model), weights(vae.patcher)
        done = world.optimize(model=model, vae=vae, iterations=2)
        assert torch.equal(done.latent, plain.latent) and torch.equal(done.plain, plain.plain)
        assert (weights(model), weights(vae.patcher)) == before
        assert torch.equal(world.ksampler(model=model), plain.plain)


def test_a_copy_is_made_once_and_goes_with_its_network(world, model):
    network = vram.static(model, "here").model
    assert vram.static(model.clone(), "here").model is network is not model.model
    assert vram.static(model, "here", own=True).model is not network
    assert vram.static(vram.static(model, "here"), "here") is not None and len(vram._STILL) >= 1
    before = len(vram._STILL)
    del model, network
    world.ksampler()
    gc.collect()
    assert len(vram._STILL) <= before


def test_a_file_is_read_again_where_it_is_known(world):
    calls = []

    def read_again(disable_dynamic):
        calls.append(disable_dynamic)
        return load_model()

    with torch.inference_mode():
        model = dynamic(load_model(), read_again)
    for _ in range(2):
        assert torch.equal(world.optimize(model=model, iterations=1).latent, world.optimize(iterations=1).latent)
    assert calls == [True]


class Louder(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        return self.block(x, *args, **kwargs) * 1.2


def test_what_another_pack_did_to_the_layers_is_in_the_copy(world):
    """Of which the file knows nothing."""

    def changed():
        model = load_model()
        blocks = model.model.diffusion_model.middle_block[1].transformer_blocks
        blocks[0] = Louder(blocks[0])
        return model

    with torch.inference_mode():
        still, moving = changed(), dynamic(changed(), lambda disable_dynamic: load_model())
    found, expected = (world.optimize(model=m, iterations=1).latent for m in (moving, still))
    assert torch.equal(found, expected)
    assert not torch.equal(found, world.optimize(iterations=1).latent)


@pytest.mark.skipif(not hasattr(comfy.ops, "mixed_precision_ops"), reason="this ComfyUI has no such layers")
def test_quantised_layers_are_the_same_ones_in_every_copy():
    """Their classes are not: each file that is read gets its own."""
    one, two = (
        torch.nn.Sequential(comfy.ops.mixed_precision_ops({}, torch.float32).Linear(2, 2, dtype=torch.float32))
        for _ in range(2)
    )
    assert type(one[0]) is not type(two[0]) and vram._layers(one) == vram._layers(two)


def with_lora(model):
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, random_lora(model, 0.3), 1.0, 0)[0]


def test_a_lora(world, model):
    moving, still = with_lora(model), with_lora(world.model)
    done, expected = (world.optimize(model=m, iterations=1) for m in (moving, still))
    assert torch.equal(done.latent, expected.latent)
    assert not torch.equal(done.plain, world.ksampler())
    assert torch.equal(world.optimize(model=model, iterations=1).plain, world.ksampler())  # the same copy, unpatched


def test_weights_in_the_files_precision(world, vae):
    """As dynamic VRAM assigns them: the file's float32, where the VAE runs in bfloat16."""
    network = vae.first_stage_model
    network.to(torch.bfloat16)
    comfy.model_management.archive_model_dtypes(network)
    network.load_state_dict({k: v.float() for k, v in network.state_dict().items()}, assign=True)
    vae.vae_dtype = torch.bfloat16
    done = world.optimize(vae=vae, iterations=1)
    assert {p.dtype for p in vram.static(vae.patcher, "here").model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(done.latent).all()


def test_a_controlnet(world, model):
    still, moving = with_control(world), with_control(world, dynamic)
    expected = world.optimize(positive=still, iterations=1)
    done = world.optimize(model=model, positive=moving, iterations=1)
    assert torch.equal(done.latent, expected.latent)
    assert not torch.equal(done.plain, world.ksampler())


class Patch:
    """Adds what a network of its own says, as ComfyUI's model patches do, and keeps something between two calls, which
    ComfyUI moves with the model that it patches.
    """

    def __init__(self, patcher):
        self.patcher, self.seen = patcher, []
        self.moved = None

    def models(self):
        return [self.patcher]

    def __call__(self, out, extra):
        assert self.moved == id(self)  # not of what it is a copy of
        self.seen.append(out)
        return out

    def to(self, *_):
        self.moved = id(self)
        return self


class Beside:
    """Of another layer: finds what the first one kept by holding it (Anima's LLLite)."""

    def __init__(self, patch):
        self.patch = patch

    def __call__(self, out, extra):
        seen = self.patch.seen.pop()
        return out + 0.3 * self.patch.patcher.model(seen.mean((1, 2), keepdim=True))

    def to(self, *_):
        return self


def patched(patcher, kind):
    torch.manual_seed(2)
    layer = comfy.ops.manual_cast.Linear(1, 1, dtype=torch.float32)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    device = patcher.load_device
    patch = Patch(kind(comfy.model_patcher.ModelPatcher(torch.nn.Sequential(layer), device, torch.device("cpu"))))
    patcher = patcher.clone()
    patcher.set_model_attn1_output_patch(patch)
    patcher.set_model_attn2_output_patch(Beside(patch))
    return patcher, patch


@pytest.mark.parametrize("moves", [False, True])
def test_a_model_patch(world, model, moves):
    """moves: the model itself is in dynamic VRAM too."""
    with torch.inference_mode():
        still, _ = patched(world.model, lambda p: p)
        moving, patch = patched(model if moves else world.model, dynamic)
    before = weights(patch.patcher)
    expected = world.optimize(model=still, iterations=1)
    done = world.optimize(model=moving, iterations=1)
    assert torch.equal(done.latent, expected.latent) and not torch.equal(done.plain, world.ksampler())
    assert weights(patch.patcher) == before and vram.is_dynamic(patch.patcher)
    with torch.inference_mode():
        patches = vram.static(moving, "here").model_options["transformer_options"]["patches"]
    (first,), (beside,) = patches["attn1_output_patch"], patches["attn2_output_patch"]
    assert beside.patch is first is not patch and not vram.is_dynamic(first.patcher)


def test_a_guiders_own_patches_are_refused_where_the_model_has_not_got_them(world, model):
    with torch.inference_mode():
        moving, _ = patched(world.model, dynamic)
        job = world.job(iterations=1)
        job.guider.model_options = moving.model_options
        with pytest.raises(ValueError, match="MIRA: the guider has model patches of its own in dynamic VRAM"):
            host.run(job)


def test_a_model_of_the_conditioning_is_refused(world, model):
    conds = [[world.positive[0][0], world.positive[0][1] | {"additional_models": [model]}]]
    with pytest.raises(ValueError, match=r"MIRA: the conditioning comes with a BaseModel in dynamic VRAM"):
        world.optimize(positive=conds, iterations=1)


def test_another_network_that_cannot_be_made_to_stay_is_refused_before_sampling(world, model):
    with torch.inference_mode():
        model.set_additional_models("with_it", [dynamic(load_model())])
    with pytest.raises(ValueError, match=r"MIRA: model comes with a BaseModel in dynamic VRAM.*--disable-dynamic-vram"):
        world.optimize(model=model, iterations=1)


def test_a_model_that_cannot_be_made_to_stay_is_refused_by_name(world, model):
    refused = pytest.raises(RuntimeError, match=r"BaseModel.*in dynamic VRAM.*--disable-dynamic-vram")
    with refused, loading.loaded([world.model, model], 0):
        pass


def test_rl_guidance_by_a_lora(world, model):
    tuned = with_lora(model)
    with torch.inference_mode():
        base, guided = (MiraRLGuidance.execute(model, tuned, w, "constant", 1.0).args[0] for w in (0.0, 1.0))
    assert torch.equal(world.ksampler(model=base), world.ksampler())
    # One has the LoRA in its weights, the other adds it as they come, which a GPU rounds otherwise.
    off = 1e-4 if world.model.load_device.type == "cpu" else 0.03
    torch.testing.assert_close(world.ksampler(model=guided), world.ksampler(model=tuned), atol=off, rtol=off)
    assert torch.isfinite(world.optimize(model=guided, iterations=1).latent).all()
    later = with_lora(guided)
    for run in (lambda: world.ksampler(model=later, steps=2), lambda: world.optimize(model=later, iterations=1)):
        with torch.inference_mode(), pytest.raises(ValueError, match="a LoRA or other weights is put on `guided`"):
            run()


@pytest.mark.parametrize("method", ["best_of_n", "restarts"])
def test_without_a_gradient_it_stays_where_it_is(world, model, vae, method):
    """And so does a network that comes with the model, such as a patch of its layers."""

    def searched(**parts):
        job = world.job(steps=2, gradient=False, **parts)
        job.settings = SearchSettings(method=method, particles=2, rounds=2)
        with torch.inference_mode():
            return host.run(job, host.searching).latent

    with torch.inference_mode():
        model.set_additional_models("with_it", [dynamic(load_model())])
    before, copies = (weights(model), weights(vae.patcher)), len(vram._STILL)
    assert torch.equal(searched(model=model, vae=vae), searched())
    assert (weights(model), weights(vae.patcher)) == before and len(vram._STILL) == copies


def test_what_cannot_be_copied_is_refused_with_its_place(world, model):
    model.model.driver = type(model.model.dynamic_vbars[model.load_device])()  # by a name that we do not know
    with pytest.raises(ValueError, match=r"MIRA: model is a BaseModel in dynamic VRAM.*--disable-dynamic-vram"):
        world.optimize(model=model, iterations=1)


def test_what_is_injected_into_layers_is_not_lost_silently(world, model):
    """A LoRA in bypass mode holds the layers of the very network that moves."""
    model.set_injections("bypass_lora", [])
    with pytest.raises(ValueError, match=r"MIRA: model.*has bypass_lora in its layers.*without bypass"):
        world.optimize(model=model, iterations=1)
