"""RLG, AIG and DyMO on the demo model and a LoRA that was tuned towards brightness."""

from __future__ import annotations

import copy
import types

import comfy.hooks
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_easycache
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors.torch import load_file

from testing.networks import random_lora
from testing.pack import ROOT, mira

nodes = mira("nodes")
blending = mira("nodes.host.blending")
decode = mira("nodes.host").decode
PixelReward, JPEG = mira("rewards.pixel").PixelReward, mira("rewards.jpeg").JPEG
STEPS = 6


@pytest.fixture(autouse=True)
def tunable(world, demo_model, demo_vae, monkeypatch):
    """What the LoRA was made for, at half the side."""
    monkeypatch.setattr(world, "model", demo_model)
    monkeypatch.setattr(world, "vae", demo_vae)


@pytest.fixture(scope="module")
def bright(demo_model):
    """The demo model with the LoRA, as Load LoRA gives it."""
    with torch.inference_mode():
        lora = load_file(ROOT / "demo" / "weights" / "bright_lora.safetensors")
        return comfy.sd.load_lora_for_models(demo_model, None, lora, 1.0, 0)[0]


def brightness(world, latent):
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([world.vae.patcher])
        return decode(world.vae, latent).mean().item() * 2 - 1


def sample(world, model, batch=4):
    return world.ksampler(model=model, steps=STEPS, batch=batch, seed=11)


def rlg(model, tuned, weight, schedule="constant", power=1.0):
    with torch.inference_mode():
        return nodes.MiraRLGuidance.execute(model, tuned, weight, schedule, power).args[0]


def test_the_lora_is_bright(world, bright):
    plain, tuned = (
        brightness(world, world.ksampler(model=m, steps=STEPS, latent=torch.zeros(4, 4, 16, 16), seed=11))
        for m in (world.model, bright)
    )
    assert tuned > plain + 0.1


def test_a_lora_on_the_conditioning_is_refused(world, bright):
    """ComfyUI puts it on the sampled model alone."""
    lora = random_lora(world.model, 0.4)
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=1.0)
    positive = comfy.hooks.set_hooks_for_conditioning(world.positive, hooks)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"MIRA RL Guidance.*hooks.*load them on both models"):
        world.ksampler(model=rlg(world.model, bright, 1.5), positive=positive, steps=2)
    with torch.inference_mode():
        as_base = world.ksampler(model=rlg(world.model, bright, 0.0), positive=positive, steps=2)
        assert torch.equal(as_base, world.ksampler(positive=positive, steps=2))
        world.ksampler(model=rlg(world.model, bright, 1.5), steps=2)  # and nothing stays behind


def test_what_is_put_on_after_the_node_changes_both_or_is_refused(world, bright):
    """A LoRA, or another reading of the network; but a shift of a flow's noise levels is no matter of either."""

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flows = Flow(), Flow()
    flows[1].set_parameters(shift=7.0)
    assert flows[0].sigmas[500] != flows[1].sigmas[500] and blending.alike_at(torch.tensor([0.2, 0.9]), *flows)

    def sampled_as(model, kind):
        model = model.clone()
        sampling = copy.deepcopy(model.get_model_object("model_sampling"))
        sampling.calculate_denoised = types.MethodType(kind.calculate_denoised, sampling)
        model.add_object_patch("model_sampling", sampling)
        return model

    v = comfy.model_sampling.V_PREDICTION
    with torch.inference_mode():
        lora = random_lora(world.model, 0.4)
        on_both = [comfy.sd.load_lora_for_models(m, None, lora, 1.0, 0)[0] for m in (world.model, bright)]
        after = comfy.sd.load_lora_for_models(rlg(world.model, bright, 1.0), None, lora, 1.0, 0)[0]
        before = world.ksampler(model=rlg(*on_both, 1.0), steps=2)
        assert torch.equal(before, world.ksampler(model=on_both[1], steps=2))
        with pytest.raises(ValueError, match=r"MIRA RL Guidance: a LoRA or other weights is put on `guided`.*on both"):
            world.ksampler(model=after, steps=2)
        with pytest.raises(ValueError, match="another model sampling is put on `guided`"):
            world.ksampler(model=sampled_as(rlg(world.model, bright, 1.0), v), steps=2)
        with pytest.raises(ValueError, match="read what their networks say in different ways"):
            rlg(sampled_as(world.model, v), bright, 1.0)
        both = rlg(sampled_as(world.model, v), sampled_as(bright, v), 1.0)
        assert torch.equal(world.ksampler(model=both, steps=2), world.ksampler(model=sampled_as(bright, v), steps=2))


def compiled(model):
    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    return model


def cached(model):
    return comfy_extras.nodes_easycache.EasyCacheNode.execute(
        model, reuse_threshold=1e-3, start_percent=0.0, end_percent=1.0, verbose=False
    ).args[0]


@pytest.mark.parametrize("change", [compiled, cached])
def test_what_is_made_for_one_network_does_not_serve_the_other(world, bright, change):
    """ComfyUI puts a compiled network into the place of whatever is called, and a cache knows a call by its prompt."""
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # who is called is what counts here
        base, wanted = change(world.model), world.ksampler(model=rlg(world.model, bright, 3.0), steps=STEPS)
        alone = world.ksampler(model=base, steps=STEPS)
        kinds = {"base": rlg(base, bright, 3.0), "both": rlg(base, change(bright), 3.0)}
        kinds["after"] = change(rlg(world.model, bright, 3.0))
        found = {kind: world.ksampler(model=model, steps=STEPS) for kind, model in kinds.items()}
    assert (wanted - alone).norm() > 0.1 * alone.norm()
    for kind, latent in found.items():
        torch.testing.assert_close(latent, wanted, atol=1e-4, rtol=1e-4, msg=kind)


def test_weight_0_is_the_base_and_1_the_tuned_model(world, bright):
    base, tuned = sample(world, world.model), sample(world, bright)
    assert torch.equal(sample(world, rlg(world.model, bright, 0.0)), base)
    torch.testing.assert_close(sample(world, rlg(world.model, bright, 1.0)), tuned, atol=1e-4, rtol=1e-4)
    # Neither the model nor the LoRA's clone is changed by having been used.
    assert torch.equal(sample(world, world.model), base)
    assert torch.equal(sample(world, bright), tuned)


@pytest.mark.usefixtures("trained")
def test_a_larger_weight_is_brighter(world, bright):
    found = [brightness(world, sample(world, rlg(world.model, bright, w))) for w in (0.0, 0.5, 1.0, 1.6)]
    assert found == sorted(found) and found[3] > found[2] + 0.02


def test_annealed_lies_between(world, bright):
    base, constant = (brightness(world, sample(world, rlg(world.model, bright, w))) for w in (0.0, 1.5))
    annealed = brightness(world, sample(world, rlg(world.model, bright, 1.5, "annealed")))
    late = brightness(world, sample(world, rlg(world.model, bright, 1.5, "annealed", power=4.0)))
    assert base - 0.02 <= late <= annealed < constant


def test_a_wrapper_that_was_there_is_kept(world, bright):
    seen = []

    def wrapper(apply, args):
        seen.append(1)
        return apply(args["input"], args["timestep"], **args["c"])

    model = world.model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    sample(world, rlg(model, bright, 1.5), batch=1)
    assert len(seen) >= STEPS


def test_the_noise_is_optimised_through_a_blend(world, bright):
    done = world.optimize(model=rlg(world.model, bright, 1.5), iterations=2, steps=3)
    rows = done.result.trace.rows
    assert rows[-1]["reward"] > rows[0]["reward"]


def test_other_models_are_refused(world):
    other = world.model.clone()
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    with torch.inference_mode():
        flow = ModelSamplingDiscrete().patch(world.model, "eps", True)[0]  # zero terminal SNR: another schedule
    with pytest.raises(ValueError, match="different noise schedules"):
        rlg(world.model, flow, 1.5)
    other.model = type("Other", (), {})()
    other.object_patches = dict(other.object_patches, latent_format=world.model.get_model_object("latent_format"))
    with pytest.raises(ValueError, match="is a BaseModel and tuned a Other"):
        rlg(world.model, other, 1.5)


def guider(world, cfg=5.0, reward=None, scale=1.0, start=0.2, end=1.0, model=None, positive=None, **more):
    with torch.inference_mode():
        return nodes.MiraDyMOGuider.execute(
            model or world.model, positive or world.positive, world.negative, world.vae,
            reward or PixelReward("brightness"), cfg, scale, start, end, **more,
        ).args[0]  # fmt: skip


def guided(world, which, batch=1, sampler="euler_ancestral", mask=None, noise=None, steps=STEPS):
    """As SamplerCustomAdvanced samples."""
    latent = torch.zeros(batch, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 11) if noise is None else noise
    with torch.inference_mode():
        return which.sample(
            noise, latent, comfy.samplers.sampler_object(sampler),
            world.sigmas(steps=steps), denoise_mask=mask, seed=11, disable_pbar=True,
        )  # fmt: skip


@pytest.mark.every_host
@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this ComfyUI has no such LoRAs")
def test_a_bypass_lora_is_refused(world):
    """It is in the layers of both."""
    with torch.inference_mode():
        lora = load_file(ROOT / "demo" / "weights" / "bright_lora.safetensors")
        tuned = comfy.sd.load_bypass_lora_for_models(world.model, None, lora, 1.0, 0)[0]
    with pytest.raises(ValueError, match=r"MIRA RL Guidance: .*bypass.* load that LoRA without bypass"):
        rlg(world.model, tuned, 0.5)


def test_dymo_follows_the_reward_by_its_scale(world):
    found = [brightness(world, guided(world, guider(world, scale=s), batch=2)) for s in (0.0, 0.5, 1.5)]
    assert found[0] < found[1] < found[2] and found[2] > found[0] + 0.05


def test_dymo_at_scale_0_and_outside_its_range_is_cfg(world):
    plain = guided(world, world.guider())
    assert torch.equal(guided(world, guider(world, scale=0.0)), plain)
    assert torch.equal(guided(world, guider(world, start=0.0, end=0.0, scale=0.0)), plain)
    whole, late = (guided(world, guider(world, start=start)) - plain for start in (0.0, 0.95))
    assert late.abs().max() < whole.abs().max() / 5


def test_dymo_repeats_and_leaves_the_model_as_it_was(world):
    before = sample(world, world.model, batch=1)
    one = guided(world, guider(world))
    assert torch.equal(one, guided(world, guider(world)))
    assert torch.equal(sample(world, world.model, batch=1), before)


def test_dymo_measures_its_step_without_cfg_too(world):
    assert not torch.equal(guided(world, guider(world, cfg=1.0)), guided(world, world.guider(cfg=1.0)))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_noise_is_optimised_under_dymo(world, scale):
    """Though at a large scale the finite difference sees what the gradient, by design, does not."""
    job = world.job(iterations=2, steps=3)
    job.guider = guider(world, scale=scale)
    with torch.inference_mode():
        done = mira("nodes.host").run(job)
    rows = done.result.trace.rows
    assert rows[-1]["reward"] > rows[0]["reward"]


def test_every_image_is_guided_by_its_own_prompt(world):
    """A batch is what its images are alone, but for last bits, which two guided steps enlarge."""
    prompts = ["a fox", "a zebra"]
    reward = mira("nodes.demo").demo_clip_score()

    def sampled(prompt, positive, noise):
        which = guider(world, reward=reward, prompt=prompt, positive=positive, start=0.0)
        return guided(world, which, sampler="euler", noise=noise, steps=2)

    noise = comfy.sample.prepare_noise(torch.zeros(2, 4, 8, 8), 11)
    found = sampled("\n".join(prompts), world.encode_batch(prompts), noise)
    for n, prompt in enumerate(prompts):
        own, others = (
            sampled(text, world.encode(prompt), noise[n : n + 1]) - found[n : n + 1]
            for text in (prompt, prompts[1 - n])
        )
        assert own.abs().max() < 0.03 and others.abs().max() > 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": JPEG()}, "no gradient: use a differentiable reward here, or MIRA Search"),
        ({"reward": "x"}, "connect a MIRA reward node"),
        ({"start": 0.9, "end": 0.1}, "swap them"),
        ({"reward": mira("nodes.demo").demo_clip_score()}, "prompt is empty"),
    ],
)
def test_bad_input(world, changes, message):
    with pytest.raises(ValueError, match=message):
        guider(world, **changes)


def test_a_vae_with_alpha_is_refused(world, monkeypatch):
    monkeypatch.setattr(world.vae, "conv_out_channels", 4, raising=False)
    with pytest.raises(ValueError, match="MIRA DyMO Guider: vae decodes to 4 channels"):
        guider(world)
