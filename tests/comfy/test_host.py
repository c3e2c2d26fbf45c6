"""The adapter on real ComfyUI code: equality with KSampler, gradients, memory, and what can go wrong."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import comfy.controlnet
import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import pytest
import torch
from mira.nodes import demo, host
from mira.nodes.host import inference_mode, probe, runs
from mira.nodes.shared.inputs import schedule
from mira.rewards.combine import WeightedSum
from mira.rewards.pixel import PixelReward
from mira.sampler.rollout import Rollout

from testing.networks import random_lora, with_control

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
# Found by running their twins: both are called through a module, decorated, and adapt their steps to the image.
NOT_DIFFERENTIABLE = {"dpm_fast": "cuts the gradient", "dpm_adaptive": "cuts the gradient"}


class Discrete(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    pass


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


LARGER = pytest.mark.usefixtures("larger")


@pytest.mark.parametrize("name", SAMPLERS)
def test_which_samplers_can_be_optimised(name):
    for model_sampling in (Discrete(), Flow()):
        why = probe.why_not_differentiable(comfy.samplers.sampler_object(name), model_sampling)
        assert (why is None) == (name not in NOT_DIFFERENTIABLE), why
        assert why is None or NOT_DIFFERENTIABLE[name] in why


@pytest.mark.parametrize("name", [s for s in SAMPLERS if s not in NOT_DIFFERENTIABLE])
def test_zero_iterations_are_ksampler_bit_for_bit(world, name):
    """Brownian-tree samplers (dpmpp_sde and its kin) too: their tree is asked, and its answers are kept."""
    done = world.optimize(sampler=name, iterations=0, steps=3)
    expected = world.ksampler(sampler=name, steps=3)
    assert torch.equal(done.plain, expected) and torch.equal(done.latent, expected)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_sde", "euler_ancestral", "seeds_2", "sa_solver", "lcm"])
def test_the_recorded_noises_give_the_sample_again(world, name):
    row = world.optimize(sampler=name, iterations=1, steps=3).result.trace.of(0)[0]
    with torch.no_grad():
        stock = PixelReward("brightness").score(host.decode(world.vae, world.ksampler(sampler=name, steps=3)), [""])
    assert row["path_kl"] == 0
    assert row["reward"] == pytest.approx(stock.item(), abs=1e-3)


def test_noise_of_its_own_is_refused():
    sampler = comfy.samplers.ksampler("euler", {"s_churn": 10.0})
    assert "draws noise of its own" in probe.why_not_differentiable(sampler, Discrete())
    assert probe.why_not_differentiable(comfy.samplers.ksampler("euler_ancestral", {"eta": 0.5}), Discrete()) is None


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_plain_output_for_every_scheduler(world, scheduler):
    assert torch.equal(
        world.optimize(scheduler=scheduler, iterations=0, steps=3).plain, world.ksampler(scheduler=scheduler, steps=3)
    )


@pytest.mark.parametrize(
    "name", ["euler", "dpmpp_2m_sde", "dpmpp_sde", "heun", "lcm", "euler_cfg_pp", "uni_pc", "ddim"]
)
def test_samplers_raise_the_reward(world, name):
    values = rewards(world.optimize(sampler=name, iterations=3, steps=3, beta=0))
    assert values[-1] > values[0]


def rewards(done, image=0):
    return [row["reward"] for row in done.result.trace.of(image)]


@pytest.mark.parametrize(
    "options",
    [
        {"cfg": 1.0},
        {"steps": 1},
        {"denoise": 0.5, "latent": torch.linspace(-1, 1, 1024).reshape(1, 4, 16, 16)},
        {"batch": 3},
        {"latent": torch.zeros(1, 4, 13, 9)},
        {"weighting": "transition"},
        {"measured": "conditional"},
        {"memory": "per_block"},
        {"memory": "none"},
    ],
    ids=lambda o: next(iter(o)),
)
@LARGER
def test_ways_of_sampling(world, options):
    done = world.optimize(iterations=3, **options)
    kept = {k: v for k, v in options.items() if k not in ("weighting", "measured", "memory")}
    assert torch.equal(done.plain, world.ksampler(**kept))
    for image in range(len(done.latent)):
        values = rewards(done, image)
        assert values[-1] > values[0]
    assert torch.isfinite(done.latent).all() and done.latent.shape == done.plain.shape


@LARGER
def test_inpainting_changes_nothing_outside_the_mask(world):
    latent = torch.linspace(-1, 1, 1024).reshape(1, 4, 16, 16)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    done = world.optimize(latent=latent, mask=mask, iterations=3)
    assert torch.equal(done.plain, world.ksampler(latent=latent, mask=mask))
    torch.testing.assert_close(done.latent[..., :7], latent[..., :7], atol=1e-4, rtol=0)
    assert rewards(done)[-1] > rewards(done)[0]
    row = done.result.trace.of(0)[-1]
    assert row["latent_distance"] > 0 and row["path_kl"] > 0
    # What is given is noised with z_T too: it stays the one that KSampler draws.
    z, z0 = (
        r.best_noises[0][..., :7] for r in (done.result, world.optimize(latent=latent, mask=mask, iterations=0).result)
    )
    assert torch.equal(z, z0)


@pytest.mark.every_host
def test_a_schedule_leaves_the_memory_alone_that_a_model_has_locked(world, monkeypatch):
    """A clone that goes away would unlock it, and ComfyUI locks it again only where it loads the model anew."""
    model, unlocked = world.model, []
    if not hasattr(model, "unpin_all_weights"):
        pytest.skip("this ComfyUI locks no memory")
    monkeypatch.setattr(type(model), "unpin_all_weights", lambda self: unlocked.append(self))
    values = {"steps": 4, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.5}
    assert len(schedule(model, values)) == 5
    gc.collect()
    assert not [m for m in unlocked if m.model is model.model]


@pytest.mark.every_host
def test_two_runs_are_the_same_bits(world):
    a, b = (world.optimize(iterations=3, batch=2) for _ in range(2))
    assert torch.equal(a.latent, b.latent) and torch.equal(a.plain, b.plain)
    assert rewards(a) == rewards(b)


@pytest.mark.parametrize("memory", ["per_step", "per_block"])
def test_checkpointed_runs_equal_the_unchecked_one(world, memory):
    """Steps along the gradient: AdamW's are as long where an element of it is nothing but rounding."""

    def run(memory):
        job = world.job(iterations=2, memory=memory)
        with torch.inference_mode():
            return host.run(replace(job, settings=replace(job.settings, optimizer="normalized")))

    unchecked, checked = run("none"), run(memory)
    assert (unchecked.latent - unchecked.plain).abs().max() > 1
    torch.testing.assert_close(checked.latent, unchecked.latent, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "prompted"), [("euler_ancestral", 1.0), ("euler_ancestral_cfg_pp", 1.0), ("euler_ancestral", 0.5)]
)
def test_gradient_of_every_noise_against_finite_differences(world, sampler, prompted, monkeypatch):
    """Through CFG, UNet, VAE and reward: d reward / d z_t along its own gradient. prompted: the part of the picture
    that the mask of its prompt covers; the rest has none, which ComfyUI divides by almost nothing.
    """
    checked = []
    mask = (torch.arange(64) < prompted * 64).float().expand(1, 64, 64)
    positive = [[world.positive[0][0], {**world.positive[0][1], "mask": mask, "mask_strength": 1.0}]]
    original = runs.check_gradient

    def check(process, noise):
        original(process, noise)
        rollout, process.expected = Rollout(process.differentiable, process.sigmas, memory="per_step"), None
        process.scoring.policy = rollout
        torch.manual_seed(3)
        z = [noise, *(torch.randn_like(noise) for _ in range(len(process.sigmas) - 2))]

        def reward(z):
            return process.scoring.score(rollout(z).x0).total.sum()

        leaves = [n.clone().requires_grad_() for n in z]
        with torch.enable_grad():
            gradients = torch.autograd.grad(reward(leaves), leaves)
        for i, g in enumerate(gradients):
            step = g / g.norm() * z[i].norm() * 2e-3
            with torch.no_grad():
                up = reward([n + step if j == i else n for j, n in enumerate(z)])
                down = reward([n - step if j == i else n for j, n in enumerate(z)])
            slope = (g * step).sum()
            assert ((up - down) / 2 - slope).abs() < 0.1 * slope.abs()
        checked.append(len(gradients))

    monkeypatch.setattr(runs, "check_gradient", check)
    world.optimize(steps=4, iterations=1, sampler=sampler, cfg=12.0, positive=positive)
    assert checked == [4]


def test_weights_made_in_inference_mode_are_replaced_once(world):
    with torch.inference_mode():
        model = demo.load_model()
        assert inference_mode.made_in_inference_mode(next(model.model.parameters()))
    world.optimize(model=model, iterations=1)
    assert not any(inference_mode.made_in_inference_mode(p) for p in model.model.parameters())


def test_weights_that_ask_for_gradients_get_none_and_ask_again(world):
    model = demo.load_model()
    p = next(model.model.diffusion_model.parameters())
    p.requires_grad_(True)
    world.optimize(model=model, iterations=1)
    assert p.requires_grad and p.grad is None


def test_conditioning_and_model_options_are_left_as_they_were(world):
    before = copy.deepcopy(world.model.model_options)
    tensor = world.positive[0][0]
    world.optimize(iterations=1)
    assert world.model.model_options == before and world.positive[0][0] is tensor


def test_lora_on_the_model(world):
    """Loaded by ComfyUI's own code from a LoRA in the usual key format."""
    with torch.inference_mode():
        model, _ = comfy.sd.load_lora_for_models(world.model, world.clip, random_lora(world.model, 0.3), 1.0, 1.0)
    done = world.optimize(model=model, iterations=2)
    assert torch.equal(done.plain, world.ksampler(model=model))
    assert not torch.equal(done.plain, world.ksampler())
    assert rewards(done)[-1] > rewards(done)[0]


def test_area_conditioning(world):
    area = [[world.positive[0][0], {**world.positive[0][1], "area": (8, 16, 0, 0), "strength": 0.8}]]
    positive = [*area, *world.encode("a cat")]
    done = world.optimize(positive=positive, iterations=2)
    assert torch.equal(done.plain, world.ksampler(positive=positive))
    assert rewards(done)[-1] > rewards(done)[0]


@pytest.mark.every_host
def test_a_model_on_several_gpus_is_optimised_on_its_own(world, caplog):
    """As MultiGPU Work Units leave it: a clone for every other device."""
    model, other = world.model.clone(), world.model.clone()
    other.is_multigpu_base_clone = True
    model.set_additional_models("multigpu", [other])
    one, many = world.optimize(), world.optimize(model=model)
    assert torch.equal(one.latent, many.latent)
    assert "MIRA: model is split over several GPUs: it runs on" in caplog.text
    assert "split over several GPUs" in many.result.trace.notices[-1] and not one.result.trace.notices
    assert model.get_additional_models_with_key("multigpu") == [other]


def failing_under_a_gradient(world, problem):
    model = world.model.clone()

    def wrapper(apply, args):
        if torch.is_grad_enabled():
            raise problem
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.every_host
def test_a_patch_that_fails_under_a_gradient_is_told_with_its_error(world):
    model = failing_under_a_gradient(world, TypeError("unsupported operand"))
    with pytest.raises(
        RuntimeError, match=r"MIRA: \w+ fails where a gradient is wanted \(TypeError: unsupported operand"
    ):
        world.optimize(model=model, iterations=1)


@pytest.mark.every_host
def test_controlnet(world):
    positive = with_control(world)
    done = world.optimize(positive=positive, iterations=2)
    assert torch.equal(done.plain, world.ksampler(positive=positive))
    assert not torch.equal(done.plain, world.ksampler())
    assert rewards(done)[-1] > rewards(done)[0]


def test_half_precision_weights(world, half_model):
    done = world.optimize(model=half_model, iterations=1, steps=3, beta=0)
    assert torch.isfinite(done.latent).all()
    assert rewards(done)[-1] > rewards(done)[0]


@pytest.mark.parametrize(("steps", "count"), [(0, 4), (1, 1), (3, 3), (9, 4)])
@LARGER
def test_gradient_steps_go_through_so_many_calls(world, steps, count):
    model, looked = world.model.clone(), []

    def wrapper(apply, args):
        out = apply(args["input"], args["timestep"], **args["c"])
        looked.append(out.requires_grad)
        return out

    model.set_model_unet_function_wrapper(wrapper)
    done = world.optimize(model=model, steps=4, iterations=3, beta=0, memory="none", gradient_steps=steps)
    assert [sum(looked[-4 * n - 4 : -4 * n or None]) for n in (1, 2)] == [count, count]
    assert rewards(done)[1] > rewards(done)[0]  # a part of a gradient ascends for a step, not for ever


def test_demo_clip_score_and_combined_rewards(world):
    reward = WeightedSum([demo.demo_clip_score(), PixelReward("brightness")], [0.01, 0.5])
    done = world.optimize(reward=reward, iterations=3, beta=0)
    rows = done.result.trace.of(0)
    assert rows[-1]["reward"] > rows[0]["reward"]
    for row in rows:
        total = 0.01 * row["reward.CLIPScore"] + 0.5 * row["reward.brightness"]
        assert row["reward"] == pytest.approx(total, rel=1e-4)


def test_decode_is_comfyuis_without_the_clamp(world):
    latent = torch.randn(1, 4, 16, 16) * 3
    with torch.inference_mode():
        expected = world.vae.decode(latent).movedim(-1, 1)
    with torch.no_grad():
        images = host.decode(world.vae, latent)
    torch.testing.assert_close(images.clamp(0, 1).to(expected), expected, atol=1e-4, rtol=1e-4)


def test_interrupt_stops_within_a_step_and_keeps_the_best(world):
    steps = 6
    calls = []
    wrapper = world.model.clone()

    def count(apply, args):
        calls.append(1)
        if len(calls) == 40:
            comfy.model_management.interrupt_current_processing()
        return apply(args["input"], args["timestep"], **args["c"])

    count.only_watches = True
    wrapper.set_model_unet_function_wrapper(count)
    done = world.optimize(model=wrapper, steps=steps, iterations=50)
    assert done.result.reason.startswith("interrupted at iteration")
    assert len(calls) == 40  # not one more network evaluation
    assert torch.isfinite(done.latent).all() and len(rewards(done)) >= 2
    comfy.model_management.interrupt_current_processing(False)


def test_out_of_memory_becomes_thriftier(world):
    model, calls = world.model.clone(), []

    def full(apply, args):
        calls.append(torch.is_grad_enabled())
        if torch.is_grad_enabled() and sum(calls) == 8:
            raise torch.OutOfMemoryError("full")
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(full)
    done = world.optimize(model=model, iterations=2, memory="none")
    assert done.result.trace.settings["checkpointing"] == "per_step"
    assert "went on with per_step" in done.result.trace.notices[0]


def test_a_model_without_a_gradient_is_refused_by_name(world):
    model = world.model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"].detach(), args["timestep"], **args["c"]).detach()
    )
    # D = x - sigma * eps: its gradient exists, and is wrong.
    with pytest.raises(RuntimeError, match="UNetModel gives no usable gradient"):
        world.optimize(model=model, iterations=1)


def test_in_place_residuals_are_mended(world, in_place_model):
    unchecked, *checked = (
        world.optimize(model=in_place_model, iterations=2, memory=m).latent for m in ("none", "per_step", "per_block")
    )
    for latent in checked:
        torch.testing.assert_close(latent, unchecked, atol=1e-3, rtol=1e-3)


def test_a_step_that_fits_only_with_block_checkpoints_is_tested_with_them(world):
    model, calls = world.model.clone(), []

    def full(apply, args):
        calls.append(1)
        if len(calls) == 5:  # the self-test's first call, after four plain steps
            raise torch.OutOfMemoryError("full")
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(full)
    assert len(rewards(world.optimize(model=model, iterations=1, memory="per_step"))) == 2


def test_a_network_without_a_backward_is_refused_with_a_remedy(world):
    model = failing_under_a_gradient(world, RuntimeError("derivative for aten::_scaled_mm is not implemented"))
    with pytest.raises(RuntimeError, match=r"UNetModel has no gradient: derivative for aten::_scaled_mm.*quantised"):
        world.optimize(model=model, iterations=1)


def test_quantised_weights_are_named_where_there_are_some(world):
    problem = RuntimeError("derivative for aten::mm_of_a_kind is not implemented")
    with pytest.raises(RuntimeError, match=r"has no gradient: derivative for aten::mm_of_a_kind") as found:
        world.optimize(model=failing_under_a_gradient(world, problem), iterations=1)
    assert "quantised" not in str(found.value)
    problem = RuntimeError("derivative for aten::mm_of_a_kind is not implemented")
    model = failing_under_a_gradient(world, problem)
    kept = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)  # as some files keep them
    model.model.diffusion_model.register_parameter("kept", kept)
    try:
        with pytest.raises(RuntimeError, match="its weights are quantised: use fp16"):
            world.optimize(model=model, iterations=1)
    finally:
        del model.model.diffusion_model.kept
    is_quantised = host.selftest.is_quantised
    assert is_quantised(torch.zeros(2, dtype=torch.float8_e4m3fn)) and not is_quantised(
        torch.zeros(2, dtype=torch.half)
    )


def test_an_unwilling_sampler_object_is_named():
    why = probe.why_not_differentiable(object(), Discrete())
    assert why == "object is not a k-diffusion sampler"
