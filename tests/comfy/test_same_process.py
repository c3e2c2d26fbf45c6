"""What a graph holds is optimised rightly or refused by name: one process samples, is scored and is differentiated."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager, nullcontext
from types import FunctionType, ModuleType, SimpleNamespace

import comfy.hooks
import comfy.k_diffusion.sampling
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from comfy_extras.nodes_torch_compile import TorchCompileModel
from mira.nodes import demo, host
from mira.nodes.guidance import MiraDyMOGuider
from mira.nodes.host import blocks, kernels, patches, places, probe, runs
from mira.nodes.initno import MadeNoise
from mira.nodes.shared.checks import prompts_of
from mira.nodes.shared.job import cfg_guider
from mira.rewards.pixel import PixelReward
from mira.rewards.python_file import PythonReward
from mira.sampler.optimize import Settings
from mira.sampler.search import SearchSettings
from mira.sampler.seeds import another

from bench.families import self_tests
from testing.networks import SMALL, random_lora, random_unet, thin_vae
from testing.pack import mira
from testing.world import World

nodes = mira("nodes")


def as_node(node, **inputs):
    with torch.inference_mode():
        return node.execute(**inputs)


def rows(done, name="reward", image=0):
    return [r[name] for r in done.result.trace.of(image)]


def run(world, settings=None, work=None, **options):
    with torch.inference_mode():
        job = world.job(**options)
        job.settings = settings or job.settings
        return host.run(job, work)


# -- seeds


class RandomNoise:
    def __init__(self, seed):
        self.seed = seed

    def generate_noise(self, latent):
        return comfy.sample.prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))


class DisableNoise:
    seed = 0

    def generate_noise(self, latent):
        return torch.zeros_like(latent["samples"])


def advanced(world, noise, sampler="euler", sigmas=None, latent=None, **changes):
    node = nodes.MiraOptimizeSamplerAdvanced
    defaults = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    clone = node.PREPARE_CLASS_CLONE({})
    inputs = defaults | dict(
        guider=world.guider(), sampler=comfy.samplers.sampler_object(sampler), sigmas=sigmas, noise=noise,
        vae=world.vae,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)} if latent is None else latent, iterations=1,
        reward=PixelReward("brightness"), preset="custom",
    )  # fmt: skip
    with torch.inference_mode():
        return clone.execute(**(inputs | changes)).args


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_leftover_noise_gets_no_more_noise(world, sampler):
    """A base and refiner split: the second half begins from what the first one left."""
    sigmas = world.sigmas(steps=6, sampler="euler", scheduler="karras")
    stock, empty = comfy.samplers.sampler_object("euler"), torch.zeros(1, 4, 8, 8)
    noise = RandomNoise(5).generate_noise({"samples": empty})
    with torch.inference_mode():
        first = world.guider().sample(noise, empty, stock, sigmas[:4], seed=5)
    trace = advanced(world, DisableNoise(), sampler=sampler, sigmas=sigmas[3:], latent={"samples": first}, seeds=3)[2]
    # A half-finished fox does not change much with what is injected, but for an initial noise on top of it.
    rewards = trace.settings.get("seed_rewards", [[r["reward"] for r in trace.of(0)]])[0]
    assert max(rewards) - min(rewards) < 0.1
    if sampler == "euler":
        assert "seed_rewards" not in trace.settings
        assert "neither the noise nor the sampler depends on a seed" in trace.notices[0]
    else:
        assert len(set(rewards)) == 3


def test_a_noise_that_was_made_is_the_noise_that_is_used(world):
    made = MadeNoise(7, torch.randn(1, 4, 8, 8))
    trace = advanced(world, made, sigmas=world.sigmas(steps=3), seeds=4)[2]
    assert "seed_rewards" not in trace.settings and "the given one was used" in trace.notices[0]


def test_a_noise_whose_seed_cannot_be_set_is_kept(world):
    """As a node pack's mixture of two noises has it."""

    class Mixed(RandomNoise):
        seed = property(lambda self: 5)

        def __init__(self):
            pass

    trace = advanced(world, Mixed(), sigmas=world.sigmas(steps=3), seeds=4)[2]
    assert "seed_rewards" not in trace.settings and "the given one was used" in trace.notices[0]


def test_another_seed_is_the_hosts_own_sample_of_it(world):
    """What an image began from can be had from a stock KSampler with the seed that the record names."""
    for sampler in ("euler", "euler_ancestral", "dpmpp_sde"):
        trace = advanced(world, RandomNoise(3), sampler=sampler, sigmas=world.sigmas(steps=3), seeds=4)[2]
        rewards = trace.settings["seed_rewards"][0]
        for n in range(4):
            seed = another(3, n) if n else 3
            with torch.inference_mode():
                sample = world.guider().sample(
                    RandomNoise(seed).generate_noise({"samples": torch.zeros(1, 4, 8, 8)}),
                    torch.zeros(1, 4, 8, 8), comfy.samplers.sampler_object(sampler), world.sigmas(steps=3), seed=seed,
                )  # fmt: skip
                stock = PixelReward("brightness").score(host.decode(world.vae, sample), [""]).item()
            assert rewards[n] == pytest.approx(stock, abs=1e-4)
        best = max(range(4), key=rewards.__getitem__)
        assert trace.settings["seeds_begun_from"] == [another(3, best) if best else 3]


def test_an_image_out_of_a_batch_is_what_it_was_there(world):
    sigmas = world.sigmas(steps=3)
    four = {"samples": torch.zeros(4, 4, 8, 8)}
    one = {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [2]}
    a, b = (advanced(world, RandomNoise(1), sigmas=sigmas, latent=latent, seeds=3) for latent in (four, one))
    assert a[2].settings["seed_rewards"][2] == pytest.approx(b[2].settings["seed_rewards"][0], abs=1e-4)
    torch.testing.assert_close(a[0]["samples"][2], b[0]["samples"][0], atol=1e-2, rtol=0)
    fixed = {"samples": torch.zeros(3, 4, 8, 8), "batch_index": [0, 0, 0]}
    rewards = torch.tensor(
        advanced(world, RandomNoise(1), sigmas=sigmas, latent=fixed, seeds=3)[2].settings["seed_rewards"]
    )
    torch.testing.assert_close(rewards, rewards[:1].expand(3, -1), atol=1e-4, rtol=0)


def test_a_search_makes_its_seeds_as_the_host_does(world):
    done = run(world, SearchSettings(method="best_of_n", particles=3), host.searching, steps=3, sampler="euler")
    assert len(set(rows(done))) == 3
    with torch.inference_mode():
        job = world.job(steps=3, sampler="euler")
        job.settings, job.initial = SearchSettings(method="best_of_n", particles=3), lambda seed: job.noise
        same = host.run(job, host.searching)
    assert len({round(r, 5) for r in rows(same)}) == 1


# -- what remembers earlier steps


def hooked(world, keyframes=(), both=True):
    """Conditioning with a LoRA as a hook, whose strength may change over the steps."""
    lora = random_lora(world.model, 0.4, ("to_v", "to_out.0"))
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=1.0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        for n, (strength, start) in enumerate(keyframes):
            group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start, guarantee_steps=int(n == 0)))
        hooks = hooks.clone()
        hooks.set_keyframes_on_hooks(hook_kf=group)
    positive = [[world.positive[0][0], {**world.positive[0][1], "hooks": hooks}]]
    negative = [[world.negative[0][0], {**world.negative[0][1], "hooks": hooks}]] if both else world.negative
    return {"positive": positive, "negative": negative}


FALLING = ((1.0, 0.0), (0.0, 0.5))


def test_a_lora_hook_on_both_sides_is_the_same_in_every_trajectory(world):
    conds = hooked(world)
    stock = world.ksampler(sampler="euler", steps=4, **conds)
    assert not torch.equal(stock, world.ksampler(sampler="euler", steps=4))
    done = run(world, Settings(iterations=3, lr=0.02), steps=4, sampler="euler", **conds)
    assert torch.equal(done.plain, stock)
    reward = PixelReward("brightness").score(host.decode(world.vae, stock.clone()), [""]).item()
    assert rows(done)[0] == pytest.approx(reward, abs=1e-3) and rows(done)[-1] > rows(done)[0]
    assert torch.equal(world.ksampler(sampler="euler", steps=4), world.ksampler(sampler="euler", steps=4))


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(keyframes=FALLING), "changes by keyframes"), (dict(both=False), "different LoRA hooks")],
)
@pytest.mark.parametrize("before", [False, True])
def test_weights_that_change_under_a_gradient_are_refused(world, options, words, before):
    """before: a stock node has sampled with them, and has left the hooks where it ended."""
    conds = hooked(world, **options)
    if before:
        world.ksampler(model=world.model.clone(), steps=3, **conds)
    with pytest.raises(ValueError, match=words):
        run(world, steps=3, **conds)


def test_without_a_gradient_keyframes_begin_anew_in_every_trajectory(world):
    conds = hooked(world, keyframes=FALLING)
    with torch.inference_mode():
        model = world.model.clone()
    stock = world.ksampler(model=model, sampler="euler", steps=4, **conds)
    with torch.inference_mode():
        job = world.job(model=model, steps=4, sampler="euler", **conds)
        job.gradient, job.settings = False, SearchSettings(method="best_of_n", particles=3)
        job.initial = lambda seed: job.noise
        done = host.run(job, host.searching)
        reward = PixelReward("brightness").score(host.decode(world.vae, stock.clone()), [""]).item()
    assert torch.equal(done.plain, stock)
    assert rows(done) == pytest.approx([reward] * 3, abs=1e-3)


@pytest.mark.parametrize("threshold", [0.2, 1.0])
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_a_cache_of_steps_is_refused_by_name(world, node, threshold):
    """Before seeds are tried: the plain sample once, and once more."""
    calls, apply = [], type(world.model.model).apply_model
    how = {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    model = as_node(node, model=world.model, **how).args[0]
    model.add_object_patch("apply_model", lambda *a, **k: calls.append(1) or apply(model.model, *a, **k))
    with pytest.raises(RuntimeError, match=r"remembers.*easycache"):
        run(world, model=model, steps=10, sampler="euler", settings=Settings(iterations=1, seeds=4))
    assert 0 < len(calls) <= 20


def test_keyframes_that_follow_the_steps_are_refused_by_what_goes_on_from_the_middle(world):
    conds = hooked(world, keyframes=FALLING)
    with torch.inference_mode():
        job = world.job(steps=4, **conds)
        job.gradient, job.settings = False, SearchSettings(method="halving", particles=2, rounds=1)
        with pytest.raises(ValueError, match="hooks whose keyframes follow the steps, and the method halving goes on"):
            host.run(job, host.searching)
        job = world.job(steps=4, **hooked(world, keyframes=((1.0, 0.0), (1.0, 0.5))))  # which change nothing
        job.gradient, job.settings = False, SearchSettings(method="halving", particles=2, rounds=1)
        assert host.run(job, host.searching).result.trace.rows


def test_what_follows_the_steps_is_named():
    """ComfyUI's windows of a large image keep to the last whole step in a sampler's steps between."""
    assert patches.named({"context_handler": object()}) == ", probably Context Windows" and not patches.named({})


@pytest.mark.parametrize("method", ["best_of_n", "halving", "restarts"])
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_a_cache_of_steps_is_refused_by_a_search(world, node, method):
    model = as_node(node, model=world.model, reuse_threshold=1.0, start_percent=0.15, end_percent=0.95, verbose=False)
    with torch.inference_mode():
        job = world.job(model=model.args[0], steps=10, iterations=1)
        job.gradient, job.settings = False, SearchSettings(method=method, particles=2, rounds=1)
        with pytest.raises(RuntimeError, match=r"remembers earlier steps.*easycache.*Bypass"):
            host.run(job, host.searching)


def test_a_compiled_model_is_optimised_as_it_is():
    """What is traced of it, by the compiler's own reading of Python, without the machine code."""
    model = random_unet(SMALL)
    here, options = World(side=8, model=model, vae=thin_vae()), dict(steps=3, memory="per_step")
    compiled = as_node(TorchCompileModel, model=model, backend="eager").args[0]
    mine, stock = run(here, model=compiled, **options), run(here, model=model, **options)
    assert torch.equal(mine.plain, stock.plain) and torch.equal(mine.latent, stock.latent)
    assert rows(mine)[-1] != rows(mine)[0]


def test_arithmetic_that_moves_the_image_is_told(monkeypatch):
    """As a GPU's other kernels do over many steps of a network that magnifies their last bits."""
    ours, other = runs.pytorch_kernels, []

    @contextmanager
    def kernels():
        with ours():
            other.append(True)
            yield
            other.pop()

    def predict(apply, given):
        return apply(given["input"], given["timestep"], **given["c"]) * (3 if other else 1)

    monkeypatch.setattr(runs, "pytorch_kernels", kernels)
    model = random_unet(SMALL)
    here, patched = World(side=8, model=model, vae=thin_vae()), model.clone()
    patched.set_model_unet_function_wrapper(predict)
    done = run(here, model=patched, steps=4)
    assert [n for n in done.result.trace.notices if "the arithmetic that a gradient needs" in n]
    assert torch.equal(done.plain, here.ksampler(model=patched, steps=4))


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_a_cache_of_steps_is_refused_in_half_precision_too(node):
    model = random_unet(SMALL, torch.bfloat16)
    here = World(side=8, model=model, vae=thin_vae())
    patched = as_node(node, model=model, reuse_threshold=1.0, start_percent=0.15, end_percent=0.95, verbose=False)
    with pytest.raises(RuntimeError, match=r"remembers.*easycache"):
        run(here, model=patched.args[0], steps=10, sampler="euler")


class FirstKeys:
    """A patch that gives every later step the first one's keys and values beside its own, as Flux KV Cache does."""

    def __init__(self):
        self.kept = None

    def __call__(self, q, k, v, extra_options):
        if self.kept is None:
            self.kept = k.clone(), v.clone()
        return q, torch.cat((k, self.kept[0]), 1), torch.cat((v, self.kept[1]), 1)

    def cleanup(self):
        self.kept = None


def keeping(world):
    model = world.model.clone()
    model.set_model_attn1_patch(FirstKeys())
    return model


def test_what_a_patch_calls_cleanup_is_its_own_affair_where_comfyui_never_calls_it(monkeypatch):
    options = {"transformer_options": {"patches": {"attn1_patch": [FirstKeys()]}}}
    for clears in (True, False):
        monkeypatch.setattr(patches, "CLEARS_PATCHES", clears)
        assert bool(patches.names_of_keeping(options)) == bool(patches.keeping(options)) == clears


@pytest.fixture
def as_if_cleared(monkeypatch):
    """A refusal needs nothing of ComfyUI."""
    monkeypatch.setattr(patches, "CLEARS_PATCHES", True)


@pytest.mark.usefixtures("as_if_cleared")
def test_what_a_step_leaves_to_the_later_ones_is_refused_by_name(world):
    with pytest.raises(ValueError, match=r"\(FirstKeys\) keeps what one step.*bypass"):
        run(world, model=keeping(world), steps=3)


@pytest.mark.usefixtures("as_if_cleared")
@pytest.mark.parametrize("method", ["halving", "fk_steering", "code"])
def test_a_search_from_the_middle_refuses_what_a_step_leaves(world, method):
    settings = SearchSettings(method=method, particles=2)
    with pytest.raises(ValueError, match=rf"\(FirstKeys\) keeps what one step.*{method} goes on from the middle"):
        run(world, settings, host.searching, model=keeping(world), steps=3, gradient=False)


@pytest.mark.every_host
@pytest.mark.skipif(not patches.CLEARS_PATCHES, reason="this ComfyUI clears no patch")
def test_without_a_gradient_what_a_step_leaves_is_each_trajectorys_own(world):
    stock = world.ksampler(model=keeping(world), sampler="euler", steps=4)
    assert not torch.equal(stock, world.ksampler(sampler="euler", steps=4))
    settings = SearchSettings(method="best_of_n", particles=3)
    done = run(world, settings, host.searching, model=keeping(world), sampler="euler", steps=4, gradient=False)
    assert torch.equal(done.plain, stock)
    # On their own, in an order of their own: the same images.
    seeds = [another(7, n) if n else 7 for n in range(3)]
    alone = [world.ksampler(model=keeping(world), sampler="euler", steps=4, seed=s) for s in reversed(seeds)][::-1]
    reward = PixelReward("brightness")
    with torch.inference_mode():
        expected = [reward.score(host.decode(world.vae, x), [""]).item() for x in alone]
    assert rows(done) == pytest.approx(expected, abs=1e-5) and len(set(rows(done))) == 3


def test_guidance_with_momentum(world):
    model = as_node(APG, model=world.model, eta=1.0, norm_threshold=5.0, momentum=-0.5).args[0]
    for memory, way in (("auto", "none"), ("per_block", "per_block")):  # the one is measured and becomes none
        done = run(world, model=model, steps=4, sampler="euler", memory=memory, beta=0)
        assert done.result.trace.settings["checkpointing"] == way
        assert rows(done)[-1] > rows(done)[0], memory
        # Nothing that is measured, or tested, is a step more of it.
        assert rows(done)[0] == pytest.approx(reward_of(world, done.plain), abs=1e-5), memory
    with pytest.raises(RuntimeError, match=r"computed again.*remembers.*nodes_apg.*memory to none"):
        run(world, model=model, steps=4, sampler="euler", memory="per_step")
    for method in ("fk_steering", "code", "halving"):
        with pytest.raises(
            RuntimeError, match=rf"remembers earlier steps.*nodes_apg.*{method} goes on from the middle"
        ):
            settings = SearchSettings(method=method, particles=4)
            run(world, settings, host.searching, model=model, steps=4, sampler="euler_ancestral", gradient=False)


def test_guidance_with_little_momentum_is_no_less_strange(world):
    """As little as a step that is computed again may be off by, and in two steps, of which the self-test has one."""
    model = as_node(APG, model=world.model, eta=1.0, norm_threshold=0.0, momentum=-0.03).args[0]
    with pytest.raises(RuntimeError, match=r"computed again.*remembers.*nodes_apg.*memory to none"):
        run(world, model=model, steps=3, sampler="euler", memory="per_step")
    model = as_node(APG, model=world.model, eta=1.0, norm_threshold=0.0, momentum=0.15).args[0]
    done = run(world, model=model, steps=2, sampler="euler", memory="none", beta=0)
    assert rows(done)[0] == pytest.approx(reward_of(world, done.plain), abs=1e-5)


def in_a_part(world, begins, ends, change):
    """A patch that is there in a part of the schedule alone, as those with a start and an end."""
    model = world.model.clone()
    sampling = model.get_model_object("model_sampling")
    first, last = float(sampling.percent_to_sigma(begins)), float(sampling.percent_to_sigma(ends))

    def patched(args):
        there = last <= args["sigma"].max().item() <= first
        return change(args["denoised"]) if there else args["denoised"]

    model.set_model_sampler_post_cfg_function(patched)
    return model


def cut(x):
    with torch.no_grad():
        return x - 0.3 * (x - x.mean((2, 3), keepdim=True))


def in_place(x):
    y = x.sigmoid()
    y *= 2
    return x * y


@pytest.mark.parametrize("part", [(0.0, 0.3), (0.7, 1.0), (0.4, 0.55)])
def test_a_patch_in_a_part_of_the_schedule_is_seen(world, part):
    how = dict(steps=8, sampler="euler", iterations=1, beta=0, memory="none")
    with pytest.raises(RuntimeError, match=r"gives no usable gradient.*test_same_process \(in_a_part\)"):
        run(world, model=in_a_part(world, *part, cut), **how)
    done = run(world, model=in_a_part(world, *part, in_place), **how)
    assert rows(done)[1] > rows(done)[0]
    # Where no gradient goes through it, it does no harm, be it where the self-test begins.
    if part[1] < 0.7:
        done = run(world, model=in_a_part(world, *part, cut), gradient_steps=3, **how)
        assert rows(done)[1] > rows(done)[0]


def test_a_patch_whose_gradient_is_not_finite_where_none_looked_is_named(world):
    def no_slope(args):
        x = args["denoised"]
        return x + 0 * (0 * x).abs().sqrt() if 2 < args["sigma"].max() < 6 else x

    model = world.model.clone()
    model.set_model_sampler_post_cfg_function(no_slope)
    notices = run(world, model=model, sampler="euler", steps=9, iterations=1, beta=0).result.trace.notices
    assert any("not finite at iteration 0" in n for n in notices)
    assert any(n.startswith("what is not finite may come from a patch") and "test_same_process" in n for n in notices)


@pytest.mark.parametrize("measured", ["guided", "conditional"])
def test_a_step_without_a_conditioning_has_its_gradient_under_every_policy(world, measured):
    """In the gap ComfyUI predicts an empty image, which does not depend on x."""

    def within(start, end, conditioning):
        return [[tokens, {**more, "start_percent": start, "end_percent": end}] for tokens, more in conditioning]

    positive = within(0.0, 0.3, world.positive)
    if measured == "guided":
        positive += within(0.7, 1.0, world.positive)
    negative = within(0.0, 0.3, world.negative) + within(0.7, 1.0, world.negative)
    conds = {"positive": positive, "negative": negative if measured == "guided" else world.negative}
    found = [
        rows(run(world, **conds, measured=measured, memory=memory, sampler="euler", steps=8, iterations=1))
        for memory in ("none", "per_step", "per_block", "offload")
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize("method", [None, "best_of_n", "restarts"])
def test_an_image_that_is_not_finite_costs_the_others_nothing(world, method):
    """As in half precision, whose range one of a batch may leave."""
    model = random_unet(SMALL)
    network = model.model.diffusion_model
    sampled = network.forward

    def forward(x, timesteps=None, *args, broken=slice(1, None, 2), **kwargs):
        out = sampled(x, timesteps, *args, **kwargs)
        if timesteps.max() < 300:
            out = out.clone()
            out[broken] = torch.nan
        return out

    network.forward = forward
    here = World(side=8, model=model, vae=thin_vae())
    latent = torch.zeros(2, 4, 8, 8)
    settings = SearchSettings(method=method, particles=2, rounds=1) if method else None
    done = run(here, settings, host.searching if method else None, latent=latent, steps=4, cfg=1.0, gradient=not method)
    assert torch.isfinite(done.result.best[0]).all() and math.isfinite(rows(done)[-1])
    assert all(math.isnan(r) for r in rows(done, image=1))
    network.forward = lambda *args, **kwargs: forward(*args, broken=slice(None), **kwargs)
    with pytest.raises(RuntimeError, match=r"what the model samples is not finite.*--bf16-unet"):
        run(here, settings, host.searching if method else None, latent=latent, steps=4, cfg=1.0, gradient=not method)


@pytest.mark.parametrize("method", ["best_of_n", "restarts"])
def test_a_cache_in_the_place_of_the_models_own_forward_is_found_out(world, method):
    model = random_unet(SMALL)
    sampled, calls, last = model.model.diffusion_model.forward, [], []

    def cached(x, *args, **kwargs):
        calls.append(len(x))
        if len(calls) % 2 or not last or last[0].shape != x.shape:
            last[:] = [sampled(x, *args, **kwargs)]
        return last[0]

    here, patched = World(side=8, model=model, vae=thin_vae()), model.clone()
    patched.add_object_patch("diffusion_model.forward", cached)
    settings = SearchSettings(method=method, particles=2, rounds=1)
    with pytest.raises(RuntimeError, match="something in the graph remembers earlier steps"):
        run(here, settings, host.searching, model=patched, steps=5, cfg=1.0, gradient=False)


def test_a_schedule_that_outlasts_every_conditioning_is_refused(world, monkeypatch):
    def until(percent, conditioning):
        return [[tokens, {**more, "start_percent": 0.0, "end_percent": percent}] for tokens, more in conditioning]

    early, negative = until(0.5, world.positive), until(0.5, world.negative)
    with pytest.raises(ValueError, match=r"every conditioning ends before the last step.*let one last to the end"):
        run(world, positive=early, negative=negative, steps=4)
    with pytest.raises(ValueError, match="every conditioning but the negative one, unused at CFG 1, ends before"):
        run(world, positive=early, steps=4, cfg=1.0)
    assert run(world, positive=early, steps=4).result.trace.rows
    for nothing in (dict(negative=[]), dict(cfg=1.0)):
        job = world.job(steps=4, **nothing)
        job.guider.set_conds([], nothing.get("negative", world.negative))
        with pytest.raises(ValueError, match="no conditioning at all"), torch.inference_mode():
            host.run(job)
    assert run(world, negative=negative, steps=4, cfg=1.0).result.trace.rows


@pytest.mark.parametrize("sampler", ["uni_pc", "uni_pc_bh2"])
def test_a_sampler_that_writes_into_the_sigmas_leaves_them_alone(world, sampler):
    """Else they would end above 0, where nothing can restart, and in the graph for whoever comes after."""
    with torch.inference_mode():
        job = world.job(model=world.model, sampler=sampler, steps=4, iterations=2)
        job.settings = Settings(iterations=2, lr=0.02, restart_every=1, restart_denoise=0.5)
        job.restart_sigmas = lambda share: world.sigmas(steps=4, denoise=share)
        before = job.sigmas.clone()
        done = host.run(job)
    assert torch.equal(job.sigmas, before) and before[-1] == 0
    assert {row["round"] for row in done.result.trace.of(0)} == {1, 2}
    assert torch.equal(done.plain, world.ksampler(sampler=sampler, steps=4, seed=7))


def wrapped(world, kind, change):
    model = world.model.clone()
    model.add_wrapper(kind, change)
    return model


def test_a_patch_that_changes_the_noise_is_refused_and_one_of_the_image_is_said(world):
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE

    def shuffles(executor, noise, *more, **kwargs):
        noise.copy_(noise.flip(-1))  # as FreeNoise does, in place
        return executor(noise, *more, **kwargs)

    with pytest.raises(ValueError, match=r"changes the noise.*test_same_process \(test_a_patch_that.*freenoise off"):
        run(world, model=wrapped(world, kind, shuffles), steps=3)
    done = run(world, model=wrapped(world, kind, lambda executor, *a, **k: executor(*a, **k) * 1.1), steps=3)
    assert any("changes the image after the sampler" in n for n in done.result.trace.notices)
    assert not any("changes the image" in n for n in run(world, steps=3).result.trace.notices)
    done = run(world, model=wrapped(world, kind, lambda executor, *a, **k: executor(*a, **k)[..., :-2]), steps=3)
    assert done.latent.shape[-1] == 6 and any("changes the image" in n for n in done.result.trace.notices)


def test_a_guider_with_a_second_model_is_refused_before_it_samples(world):
    class Two(comfy.samplers.CFGGuider):
        def __init__(self, model, other):
            super().__init__(model)
            self.other = other

        def sample(self, *args, **kwargs):
            raise AssertionError("it sampled")

    with torch.inference_mode():
        job = world.job()
        job.guider = Two(world.model, random_unet(SMALL))
        job.guider.set_conds(world.positive, world.negative)
        with pytest.raises(ValueError, match="Two holds a second model"):
            host.run(job)


def reward_of(world, latent):
    with torch.inference_mode():
        return PixelReward("brightness").score(host.decode(world.vae, latent), [""]).item()


@pytest.mark.parametrize("method", ["best_of_n", "fk_steering"])
def test_guidance_that_averages_over_its_batch_meets_one_particle_at_a_time(world, method):
    model = as_node(Mahiro, model=world.model).args[0]
    for seed in (7, 8):
        how = dict(model=model, sampler="euler_ancestral", steps=4, seed=seed)
        done = run(
            world, SearchSettings(method=method, particles=4, strength=100.0), host.searching, gradient=False, **how
        )
        latent = torch.zeros(1, 4, world.side, world.side)
        with torch.inference_mode():
            again = world.guider(model).sample(
                done.noise.generate_noise({"samples": latent}), latent, done.sampler, world.sigmas(steps=4),
                disable_pbar=True, seed=seed,
            )  # fmt: skip
        torch.testing.assert_close(again, done.latent, atol=1e-5, rtol=0)


def attended(world, attend):
    model = world.model.clone()
    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = attend
    return model


def test_an_attention_of_the_graphs_own_stays_in_place(world):
    def sharper(func, q, *args, **kwargs):
        return func(1.5 * q, *args, **kwargs)

    model = attended(world, sharper)
    stock = world.ksampler(model=model, sampler="euler")
    assert not torch.equal(stock, world.ksampler(sampler="euler"))
    done = run(world, model=model, sampler="euler", beta=0)
    assert torch.equal(done.plain, stock) and not done.result.trace.notices and rows(done)[-1] > rows(done)[0]
    assert rows(done)[0] == pytest.approx(reward_of(world, stock), abs=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_a_kernel_of_the_graphs_own_gives_way_to_pytorchs_and_it_is_said(world, fails):
    def kernel(func, *args, **kwargs):
        if fails and torch.is_grad_enabled():
            raise RuntimeError("this kernel has no backward")
        return kernels.sdpa(None, *args, **kwargs).detach()

    done = run(world, model=attended(world, kernel), sampler="euler", beta=0)
    assert any("graph's own attention" in n for n in done.result.trace.notices) and rows(done)[-1] > rows(done)[0]
    assert rows(done)[0] == pytest.approx(reward_of(world, done.plain), abs=1e-4)


def test_a_kernel_for_some_of_the_steps_gives_way_in_these_alone(world):
    def sparse_at_the_end(func, *args, **kwargs):
        if kwargs["transformer_options"]["sigmas"].max() < 2:
            return kernels.sdpa(None, *args, **kwargs).detach()
        return func(1.3 * args[0], *args[1:], **kwargs)

    how = dict(model=attended(world, sparse_at_the_end), sampler="euler", beta=0)
    kept, again = (run(world, memory=m, **how) for m in ("none", "per_step"))
    assert any("graph's own attention" in n for n in kept.result.trace.notices)
    assert rows(kept)[0] == pytest.approx(reward_of(world, kept.plain), abs=1e-4)
    assert rows(again) == pytest.approx(rows(kept), abs=1e-4) and rows(kept)[-1] > rows(kept)[0]


def test_a_guider_with_a_gradient_of_its_own_keeps_the_graphs_attention_too(world):
    def sharper(func, q, *args, **kwargs):
        return func(1.5 * q, *args, **kwargs)

    found = []
    for model in (attended(world, sharper), world.model):
        with torch.inference_mode():
            guider = MiraDyMOGuider.execute(
                model, world.positive, world.negative, world.vae, PixelReward("brightness"), 5.0, 0.3, 0.0, 1.0
            ).args[0]
            job = world.job(sampler="euler", beta=0, iterations=1)
            job.guider = guider
            found.append(host.run(job))
    assert rows(found[0])[0] == pytest.approx(reward_of(world, found[0].plain), abs=1e-4)
    assert abs(rows(found[0])[0] - rows(found[1])[0]) > 1e-4 and not found[0].result.trace.notices


def test_what_a_block_hands_to_a_later_one_is_not_lost(world):
    """Beside what it returns: to a checkpoint of the later one it is a constant."""

    def handing_on():
        model, kept = world.model.clone(), {}

        def patch(out, extra_options):
            shape = tuple(out.shape)
            out = out + kept[shape] if shape in kept else out
            kept[shape] = out
            return out

        def wrapper(apply, args):
            kept.clear()
            return apply(args["input"], args["timestep"], **args["c"])

        model.set_model_attn1_output_patch(patch)
        model.set_model_unet_function_wrapper(wrapper)
        return model

    whole, by_block = (run(world, model=handing_on(), sampler="euler", memory=m, beta=0) for m in ("none", "per_block"))
    assert any("parts of UNetModel depend on one another" in n for n in by_block.result.trace.notices)
    assert by_block.result.trace.settings["checkpointing"] == "per_step" and not whole.result.trace.notices
    torch.testing.assert_close(by_block.latent, whole.latent, atol=1e-4, rtol=1e-3)


def forgetful(world, kind=torch.rand):
    """A model that draws random numbers where nobody asked for any, as token merging and tiling do."""
    model = world.model.clone()

    def wrapper(apply, args):
        out = apply(args["input"], args["timestep"], **args["c"])
        return out * (1 + 0.3 * kind(out.shape[-1], device=out.device))

    model.set_model_unet_function_wrapper(wrapper)
    return model


def test_random_choices_of_a_model_are_the_plain_samples(world):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    done = run(world, model=forgetful(world), steps=3, memory="none", iterations=2)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert torch.equal(done.plain, world.ksampler(model=forgetful(world), steps=3))
    assert torch.equal(torch.get_rng_state(), after)  # only the plain sample drew
    for memory in ("per_step", "per_block"):
        torch.set_rng_state(before)
        again = run(world, model=forgetful(world), steps=3, memory=memory, iterations=2)
        torch.testing.assert_close(again.latent, done.latent, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("memory", ["per_block", "offload"])
@pytest.mark.parametrize(
    ("node", "options"),
    [
        (TomePatchModel, dict(ratio=0.5)),
        (HyperTile, dict(tile_size=32, swap_size=3, max_depth=0, scale_depth=False)),
    ],
)
def test_what_is_drawn_inside_of_blocks_is_the_same_again(world, node, options, memory):
    """By ComfyUI's own nodes: which tokens are merged, which tiles are made."""
    at_full_size = SMALL | {"num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4}
    unpatched, vae, latent = random_unet(at_full_size, torch.float32), thin_vae(), torch.zeros(1, 4, 16, 16)
    model = as_node(node, model=unpatched, **options)
    model = (model.args if hasattr(model, "args") else model)[0]
    before, done = torch.get_rng_state(), {}
    for way in ("none", memory):
        torch.set_rng_state(before)
        done[way] = run(world, model=model, vae=vae, latent=latent, steps=3, memory=way, iterations=1, beta=0)
    assert done[memory].result.trace.settings["checkpointing"] == memory
    assert rows(done[memory])[0] == pytest.approx(rows(done["none"])[0], abs=1e-5)
    a, b = (done[way].result.trace.of(0)[0]["gradient_norm"] for way in ("none", memory))
    assert b == pytest.approx(a, rel=1e-3)
    if node is TomePatchModel:  # of the other's latents AdamW makes another step where a gradient is next to nothing
        torch.testing.assert_close(done[memory].latent, done["none"].latent, atol=1e-3, rtol=1e-3)
    assert not torch.equal(done["none"].plain, world.ksampler(model=unpatched, latent=latent, steps=3))


def test_random_choices_inside_a_block_are_drawn_once():
    class Merging(Steered):
        def forward(self, x):
            return self.layers[0](x) * torch.rand(x.shape[-1], device=x.device)

    network = torch.nn.Sequential(Merging(), Merging()).requires_grad_(False)
    x = torch.randn(1, 3, 4, 4)

    def gradient(within):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        with within:
            out = network(leaf)
        torch.manual_seed(4)  # what is drawn between
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    again = blocks.blocks_checkpointed(network, nullcontext, random=True)
    torch.testing.assert_close(gradient(again()), gradient(nullcontext()))


# -- gradients


@pytest.mark.parametrize(
    "name", ["deis", "ipndm_v", "ipndm", "dpmpp_2m", "lcm", "res_multistep", "gradient_estimation"]
)
def test_no_sampler_detaches_its_history(name):
    class Discrete(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    sampler = comfy.samplers.sampler_object(name)
    with probe._toy(sampler, Discrete(), gradient=True) as (sample, x, _):
        leaf, noises = x.clone().requires_grad_(), []
        (gradient,) = torch.autograd.grad(sample(leaf, noises).sum(), leaf)
        assert probe._gradient_error(sample, x, noises, gradient) < 5e-3


def test_a_sampler_with_a_wrong_gradient_is_refused():
    from mira.nodes.host.samplers import Twins

    def sample_wrong(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            x = x + 0.3 * (x.data - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args))
        return x

    sample_wrong.__module__ = "elsewhere"
    assert Twins(lambda draw: draw())(sample_wrong) is not sample_wrong
    why = probe.why_not_differentiable(
        comfy.samplers.KSAMPLER(sample_wrong), comfy.model_sampling.ModelSamplingDiscrete()
    )
    assert "off by" in why


def test_regions_are_added_in_place_all_the_same(world, in_place_model):
    """ComfyUI adds the regions of an image into one tensor through views of it."""
    left = [[world.positive[0][0], {**world.positive[0][1], "area": (16, 8, 0, 0), "strength": 1.0}]]
    positive = [*left, *world.encode("a cat on a blue background")]
    done = run(world, model=in_place_model, positive=positive, steps=3, iterations=1)
    stock = PixelReward("brightness").score(host.decode(world.vae, done.plain.clone()), [""]).item()
    assert rows(done)[0] == pytest.approx(stock, abs=1e-3)


@pytest.mark.parametrize("memory", ["per_step", "per_block", "offload"])
def test_inpainting_has_one_gradient(world, memory):
    """The part outside the mask is made anew from the initial noise at every step: a gradient of its own."""
    latent = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    everything, thrifty = (
        run(world, latent=latent, mask=mask, steps=4, iterations=1, memory=m) for m in ("none", memory)
    )
    a, b = (d.result.trace.of(0)[0]["gradient_norm"] for d in (everything, thrifty))
    assert b == pytest.approx(a, rel=1e-3)
    torch.testing.assert_close(thrifty.latent, everything.latent, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("larger")
@pytest.mark.parametrize(
    ("node", "options"),
    [(PerturbedAttentionGuidance, dict(scale=3.0)), (SelfAttentionGuidance, dict(scale=1.0, blur_sigma=2.0))],
)
def test_guidance_by_attention_is_recomputed_as_it_was(world, node, options):
    """The UNet writes into its options where it is, which the guidance reads: also when a block is recomputed. And what
    one call of the network keeps for the next is of the same step.
    """
    model = as_node(node, model=world.model, **options).args[0]
    stock, unguided = (world.ksampler(model=m, steps=3) for m in (model, world.model))
    everything, blocks = (run(world, model=model, steps=3, iterations=1, memory=m) for m in ("none", "per_block"))
    assert torch.equal(everything.plain, stock) and not torch.equal(stock, unguided)
    a, b = (d.result.trace.of(0)[0]["gradient_norm"] for d in (everything, blocks))
    assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.usefixtures("larger")
def test_an_adapter_of_images_is_recomputed_as_it_was(world):
    """As IP-Adapter's packs add their attention: of tensors that the model does not know, by the conditioning, the
    place in the network and the noise level, all of which it reads from the options.
    """
    g = torch.Generator().manual_seed(8)
    shown = torch.randn(2, 4, 32, generator=g)  # of the conditional and the unconditional part
    model, adapters, asked = world.model.clone(), {}, set()

    def adapter(place, number):
        def attend(q, k, v, extra_options):
            out = optimized_attention(q, k, v, extra_options["n_heads"])
            asked.add((*extra_options["block"], extra_options["block_index"]))
            if extra_options["sigmas"][0] < 0.5:
                return out
            if (place, number) not in adapters:
                adapters[place, number] = torch.randn(2, 32, q.shape[-1], generator=g) * 0.2
            to_k, to_v = adapters[place, number]
            images = shown[extra_options["cond_or_uncond"]].repeat_interleave(
                len(q) // len(extra_options["cond_or_uncond"]), 0
            )
            return out + 0.8 * optimized_attention(q, images @ to_k, images @ to_v, extra_options["n_heads"])

        return attend

    for place in ("input", "middle", "output"):
        for number in range(4):
            model.set_model_attn2_replace(adapter(place, number), place, number)
    stock, without = (world.ksampler(model=m, steps=3) for m in (model, world.model))
    assert len(asked) > 1 and not torch.equal(stock, without)
    found = {m: run(world, model=model, steps=3, iterations=1, memory=m) for m in ("none", "per_step", "per_block")}
    for memory, done in found.items():
        assert torch.equal(done.plain, stock), memory
        norm = done.result.trace.of(0)[0]["gradient_norm"]
        assert norm == pytest.approx(found["none"].result.trace.of(0)[0]["gradient_norm"], rel=1e-3), memory
    assert found["per_block"].result.trace.settings["checkpointing"] == "per_block"


@pytest.mark.parametrize("memory", ["none", "per_block"])
def test_patches_that_write_into_slices(world, memory):
    model = world.model
    with torch.inference_mode():
        node = FreeU_V2.execute if hasattr(FreeU_V2, "execute") else FreeU_V2().patch
        model = node(model=world.model, b1=1.1, b2=1.2, s1=0.9, s2=0.2)
        model = (model.args if hasattr(model, "args") else model)[0]
    done = run(world, Settings(iterations=2, lr=0.02), model=model, steps=3)
    assert torch.equal(done.plain, world.ksampler(model=model, steps=3))
    assert rows(done)[-1] > rows(done)[0]


@pytest.mark.parametrize("memory", ["none", "per_block"])
def test_a_norm_whose_input_is_written_over_through_a_slice(world, memory):
    """Arithmetic out of place would lose what is written, and a slice that is a copy, too; a norm has saved it."""
    model = world.model.clone()

    def wrapper(apply, args):
        out = apply(args["input"], args["timestep"], **args["c"])
        norm = torch.nn.functional.layer_norm(out, out.shape[-1:])
        part = out[:, :2]
        part += 0.3 * norm[:, 2:]
        return out

    model.set_model_unet_function_wrapper(wrapper)
    with self_tests() as seen:
        done = run(world, Settings(iterations=2, lr=0.02), model=model, steps=3, memory=memory)
    assert torch.equal(done.plain, world.ksampler(model=model, steps=3))
    assert not torch.equal(done.plain, world.ksampler(steps=3))
    assert rows(done)[-1] > rows(done)[0] and seen[-1].moved < 1e-3 and seen[-1].wrong < 0.02


def test_attention_without_a_backward_is_not_used(world, monkeypatch):
    """Some models call the function that they imported, whatever the options say."""

    def sage(*args, **kwargs):
        raise AssertionError("a kernel without a backward")

    pytorch = comfy.ldm.modules.attention.attention_pytorch
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", sage)
    with kernels.pytorch_kernels():
        assert comfy.ldm.modules.attention.optimized_attention is pytorch
    assert comfy.ldm.modules.attention.optimized_attention is sage


def test_a_block_that_changes_its_input_is_mended(world):
    with torch.inference_mode():
        model = demo.load_model()
    block = model.model.diffusion_model.middle_block[1].transformer_blocks[0]
    inner = block.forward
    block.forward = lambda x, *args, **kwargs: inner(x.add_(0.1 * x), *args, **kwargs)
    everything, blocks = (run(world, model=model, steps=3, iterations=1, memory=m) for m in ("none", "per_block"))
    torch.testing.assert_close(blocks.latent, everything.latent, atol=1e-3, rtol=1e-3)


def test_plain_is_drawn_as_the_host_draws(world, monkeypatch):
    """Before the switch that turns kernels without a backward off: KSampler has them too."""
    monkeypatch.setattr(comfy.model_management, "in_training", False, raising=False)
    model, seen = world.model.clone(), []

    def wrapper(apply, args):
        seen.append((comfy.model_management.in_training, torch.is_inference_mode_enabled()))
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    run(world, model=model, steps=3, iterations=1)
    assert seen[:3] == [(False, True)] * 3 and set(seen[3:]) == {(True, False)}
    assert comfy.model_management.in_training is False


# -- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_any_precision(world, dtype):
    latent = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8).to(dtype)
    done = run(world, Settings(iterations=4, lr=0.02), latent=latent, denoise=0.7)
    stock = world.ksampler(latent=latent, denoise=0.7)
    assert torch.equal(done.plain, stock.to(done.plain)) and torch.isfinite(done.latent).all()
    assert rows(done)[-1] > rows(done)[0] and not done.result.trace.notices


def test_nor_do_patches_and_seeds_change_it(world):
    """Newer hosts sample latents of half precision in float32: what samples again does, too."""
    latent, calls = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8).half(), []
    model = world.model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, a: apply(a["input"], calls.append(1) or a["timestep"], **a["c"])
    )
    done = run(world, Settings(iterations=1, seeds=2), model=model, latent=latent, denoise=0.7, steps=4)
    assert len(calls) > 8 and not any("another image" in notice for notice in done.result.trace.notices)
    assert done.result.trace.settings["seed_rewards"][0][1] == pytest.approx(
        reward_of(world, world.ksampler(latent=latent, denoise=0.7, steps=4, seed=another(7, 1))), abs=1e-6
    )


def test_a_replaced_noise_sampler_is_looked_up(world, monkeypatch):
    """Another pack puts its own in the place of ComfyUI's: its noises are optimised like the others'."""
    original = comfy.k_diffusion.sampling.default_noise_sampler

    def theirs(x, seed=None):
        inner = original(x, seed=seed)
        return lambda sigma, sigma_next: 0.9 * inner(sigma, sigma_next)

    monkeypatch.setattr(comfy.k_diffusion.sampling, "default_noise_sampler", theirs)
    done = run(world, steps=4, iterations=1)
    assert len(done.result.best_noises) == 4
    assert torch.equal(done.plain, world.ksampler(steps=4))


# -- prompts and rewards


def test_every_image_is_scored_against_its_own_prompt(world):
    a, b = world.encode("a fox"), world.encode("a cat on a blue background")
    positive = [[torch.cat([a[0][0], b[0][0]]), {**a[0][1]}]]
    guider = cfg_guider(world.model, positive, world.negative, 5.0)
    assert prompts_of("a fox\n\n a cat \n", guider, 2) == (["a fox", "a cat"], [])
    assert prompts_of("a fox\na cat", guider, 4) == (["a fox", "a cat"] * 2, [])
    prompts, (notice,) = prompts_of("a fox", guider, 2)
    assert prompts == ["a fox"] * 2 and "2 prompts" in notice
    one = cfg_guider(world.model, world.positive, world.negative, 5.0)
    assert prompts_of("a fox\nand a cat", one, 2) == (["a fox\nand a cat"] * 2, [])


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a fox", "a fox"),
        ("a (red:1.3) fox, ((old))", "a red fox, old"),
        (r"a fox \(red\)", "a fox (red)"),
        ("a fox <lora:sketch:0.8> embedding:easy, in snow", "a fox in snow"),
        ("(embedding:bad:1.2) a fox\nand a cat", "a fox\nand a cat"),
        ("", ""),
    ],
)
def test_a_scorer_reads_what_the_prompt_says(world, prompt, read):
    guider = cfg_guider(world.model, world.positive, world.negative, 5.0)
    prompts, notices = prompts_of(prompt, guider, 2)
    assert prompts == [read] * 2
    assert (notices == []) == (prompt == read) and all(read in n for n in notices)


CONSTANT = """import torch
FACTS = {"name": "weighted", "typical": (0.0, 1.0)}
WEIGHTS = torch.tensor([0.2, 0.7, 0.1]).view(1, 3, 1, 1)
def score(images, prompts):
    return ((images - 0.1).square() * WEIGHTS.to(images)).flatten(1).mean(1)
"""
NETWORK = """import torch
FACTS = {"name": "net", "typical": (0.0, 1.0)}
torch.manual_seed(0)
NET = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Conv2d(8, 1, 3)).eval()
MEAN = torch.tensor([0.48, 0.45, 0.40]).view(1, 3, 1, 1)
def score(images, prompts):
    mean = MEAN.to(images)
    return NET.to(images)((images - mean) / mean).flatten(1).mean(1)
"""
LATER = """import torch
FACTS = {"name": "text", "typical": (0.0, 1.0)}
KNOWN = {}
def score(images, prompts):
    for p in prompts:
        KNOWN.setdefault(p, torch.randn(3, generator=torch.Generator().manual_seed(len(p))))
    known = torch.stack([KNOWN[p] for p in prompts]).to(images)
    return torch.nn.functional.cosine_similarity(images.mean((2, 3)), known)
"""


@pytest.mark.parametrize("text", [CONSTANT, NETWORK, NETWORK + "MODULES = [NET]\n", LATER])
def test_a_reward_file_may_hold_tensors_and_networks(world, tmp_path, text):
    """Made where the file begins, or while Score Images runs it: both in inference mode."""
    from mira.nodes.shared.scores import score_images

    (tmp_path / "mine.py").write_text(text)
    with torch.inference_mode():
        reward = PythonReward(tmp_path / "mine.py")
        score_images(reward, torch.rand(1, 3, 64, 64), ["a fox"])
    done = run(world, reward=reward, steps=2, iterations=1, prompt="a fox", beta=0)
    assert rows(done)[-1] > rows(done)[0]


@pytest.mark.parametrize("memory", ["per_step", "per_block", "offload"])
@pytest.mark.parametrize("text", [CONSTANT, NETWORK, NETWORK + "MODULES = [NET]\n"])
def test_a_reward_file_is_computed_again_where_memory_asks_for_it(world, tmp_path, text, memory):
    (tmp_path / "mine.py").write_text(text)
    found = []
    for policy in ("none", memory):
        torch.manual_seed(0)  # of the file's network
        done = run(world, reward=PythonReward(tmp_path / "mine.py"), steps=2, iterations=1, beta=0, memory=policy)
        found.append(rows(done))
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[0][1] > found[0][0]


DRAWS = """
import random

import numpy as np
import torch

FACTS = {"name": "draws", "typical": (0.0, 1.0)}

def score(images, prompts):
    drawn = torch.randn(()) + random.random() + np.random.rand()
    return images.sub_(0).mul_(drawn).mean((1, 2, 3))
"""


def test_what_a_reward_draws_is_drawn_once(world, tmp_path):
    """It is linear: its gradient tells its value, if what is computed again draws the same. It may write, too."""
    (tmp_path / "mine.py").write_text(DRAWS)
    scoring = host.scoring.Scoring("here", world.vae, PythonReward(tmp_path / "mine.py"), [""], lambda x: x)
    scoring.policy = SimpleNamespace(memory="per_step")
    images, drawn = torch.rand(1, 3, 8, 8, requires_grad=True), []
    before = images.detach().clone()
    for _ in range(3):
        total, _ = scoring.reward(images)
        (gradient,) = torch.autograd.grad(total.sum(), images)
        assert (gradient * images).sum().item() == pytest.approx(total.item(), abs=1e-5)
        drawn.append(total.item())
    assert len(set(drawn)) == 3 and torch.equal(images, before)


COUNTS = """
FACTS = {"name": "counts", "typical": (0.0, 1.0)}
calls = 0

def score(images, prompts):
    global calls
    calls += 1
    x = images.square() if calls % 3 else images.sigmoid().square()
    return x.mean((1, 2, 3))
"""


def test_a_reward_that_counts_is_no_lack_of_memory(world, tmp_path):
    """Computed again it takes another path, of which autograd kept something else."""
    (tmp_path / "mine.py").write_text(COUNTS)
    said = []
    for policy in ("none", "per_step"):
        trace = run(world, reward=PythonReward(tmp_path / "mine.py"), steps=2, iterations=3, memory=policy).result.trace
        said.append(f"{trace.settings['ended']} {trace.notices}")
    assert "all iterations done" in said[0]
    assert "a recomputation that differs" in said[1] and "memory to none" in said[1]
    assert "out of memory" not in said[1]


@pytest.mark.parametrize(
    "text", [CONSTANT + "raise SystemExit('enough')\n", CONSTANT.replace("return", "exit(); return")]
)
def test_a_reward_file_cannot_end_the_server(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises((ValueError, RuntimeError), match=r"mine.py, line \d+.*SystemExit"):
        PythonReward(tmp_path / "mine.py").score(torch.rand(1, 3, 4, 4), [""])


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(1, 128, 128), "black everywhere"),
        (torch.eye(128)[0].expand(1, 128, 128) * torch.eye(128)[0][:, None], "nothing is left at 8 x 8"),
        (torch.full((1, 128, 128), float("nan")), "NaN"),
        (torch.zeros(0, 128, 128), "empty"),
        (torch.ones(1, 128, 128, dtype=torch.bool), "no MASK but torch.bool"),
        (torch.ones(128), "no MASK but torch.float32"),
        ([1], "no MASK but list"),
    ],
)
def test_masks_that_cannot_be(world, mask, words):
    latent = {"samples": torch.zeros(1, 4, 8, 8), "noise_mask": mask}
    with pytest.raises(ValueError, match=f"MIRA Optimize Sampler.*noise_mask.*{words}|{words} noise_mask"):
        advanced(world, RandomNoise(1), sigmas=world.sigmas(steps=2), latent=latent)


RIGHT_HALF = torch.cat([torch.zeros(1, 64, 32), torch.ones(1, 64, 32)], 2)
MASKS = {
    "without a batch": RIGHT_HALF[0],
    "of another size": torch.nn.functional.interpolate(RIGHT_HALF[None], (150, 100))[0],
    "more than images": RIGHT_HALF.expand(3, -1, -1),
    "soft": 0.5 * RIGHT_HALF,
    "beyond 0 and 1": 3 * RIGHT_HALF - 1,
    "one image's is black": torch.cat([RIGHT_HALF, torch.zeros(1, 64, 64)]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_as_people_make_them(world, kind):
    """Two images: `plain` is KSampler's, what gains is within, and what a mask leaves out is as it was."""
    latent = torch.linspace(-1, 1, 512).reshape(2, 4, 8, 8)
    given = {"samples": latent, "noise_mask": MASKS[kind]}
    sigmas = world.sigmas(steps=3)
    noise, ancestral = RandomNoise(1), comfy.samplers.sampler_object("euler_ancestral")
    done, plain, trace = advanced(world, noise, "euler_ancestral", sigmas, given, seeds=1, learning_rate=0.1)[:3]
    with torch.inference_mode():  # as SamplerCustomAdvanced does
        stock = world.guider().sample(
            noise.generate_noise(given), latent, ancestral, sigmas, denoise_mask=given["noise_mask"], seed=noise.seed
        )
    assert torch.equal(plain["samples"], stock)
    if kind not in ("soft", "beyond 0 and 1"):  # where it is 0 to ComfyUI
        assert torch.allclose(done["samples"][..., :3], latent[..., :3], atol=1e-5)
    black = [n for n in trace.notices if "black" in n]
    assert black == ["image 1 has a mask that is black at the latent's size: it stays as it was"] * (
        kind == "one image's is black"
    )
    for b, gains in enumerate((True, kind != "one image's is black")):
        first, last = (row["reward"] for row in (trace.of(b)[0], trace.of(b)[-1]))
        assert (last > first) if gains else (last == first and torch.equal(done["samples"][b], plain["samples"][b]))


class Hypernetwork:
    """A patch with weights of its own, as ComfyUI's hypernetwork node makes one."""

    def __init__(self):
        self.layers = [torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))]

    def __call__(self, q, k, v, extra_options):
        return q, k + 0.1 * self.layers[0](k), v

    def to(self, device):
        self.layers = [layer.to(device) for layer in self.layers]
        return self


class Scaled:
    """A patch that holds a plain tensor."""

    def __init__(self):
        self.by = torch.linspace(0.5, 1.5, 32)

    def __call__(self, q, k, v, extra_options):
        return q * self.by, k, v


def scaled():
    by = torch.linspace(0.5, 1.5, 32)
    return lambda q, k, v, extra_options: (q * by, k, v)


@pytest.mark.parametrize("patch", [Hypernetwork, Scaled, scaled])
def test_patches_may_bring_networks_and_tensors(world, patch):
    """Made in inference mode like everything else."""
    with torch.inference_mode():
        model = world.model.clone()
        model.set_model_attn2_patch(patch())
    done = run(world, Settings(iterations=2, lr=0.02), model=model, steps=3, sampler="euler")
    stock = world.ksampler(model=model, steps=3, sampler="euler")
    assert torch.equal(done.plain, stock) and not torch.equal(stock, world.ksampler(steps=3, sampler="euler"))
    assert rows(done)[-1] > rows(done)[0]


def test_what_two_patches_hold_in_common_stays_common(world):
    """One writes into a dict, the other reads it: a copy for each would part them, for ever."""

    def writing(held):
        def write(q, k, v, extra_options):
            held["keys"] = [q.mean((1, 2), keepdim=True)]
            return q, k, v

        return write

    def reading(held):
        return lambda q, k, v, extra_options: (q + 5 * held["keys"][0], k, v)

    with torch.inference_mode():
        model, held = world.model.clone(), {}
        model.set_model_attn1_patch(writing(held))
        model.set_model_attn2_patch(reading(held))
    how = dict(model=model, steps=3, sampler="euler")
    before = world.ksampler(**how)
    done = run(world, Settings(iterations=1), **how)
    assert torch.allclose(done.iterates[0], done.plain, atol=1e-2)
    assert torch.equal(world.ksampler(**how), before)


@pytest.mark.every_host
@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this ComfyUI has no such LoRAs")
def test_adapters_beside_the_weights(world):
    """Load LoRA (Bypass), from a file in half precision."""
    with torch.inference_mode():
        lora = {k: v.half() for k, v in random_lora(world.model, 0.3, ("to_q", "to_out.0")).items()}
        model = comfy.sd.load_bypass_lora_for_models(world.model, None, lora, 1.0, 0)[0]
    done = run(world, Settings(iterations=2, lr=0.02), model=model, steps=3, sampler="euler")
    stock = world.ksampler(model=model, steps=3, sampler="euler")
    assert torch.equal(done.plain, stock) and not torch.equal(stock, world.ksampler(steps=3, sampler="euler"))
    assert rows(done)[-1] > rows(done)[0]


class ControlPatch:
    """A network that ComfyUI loaded, in a patch whose methods are what the model is given (SUPIR)."""

    def __init__(self, network):
        device = torch.device("cpu")
        self.network = comfy.model_patcher.ModelPatcher(network, device, device)

    def queries(self, q, k, v, extra_options):
        return q + 0.1 * self.network.model(q.reshape(-1, 1, q.shape[-1])).reshape(q.shape), k, v


def test_a_patch_may_be_a_method_of_what_brings_a_network(world):
    with torch.inference_mode():
        model = world.model.clone()
        model.set_model_attn2_patch(ControlPatch(torch.nn.Conv1d(1, 1, 3, padding=1)).queries)
    done = run(world, Settings(iterations=2, lr=0.02), model=model, steps=3, sampler="euler")
    stock = world.ksampler(model=model, steps=3, sampler="euler")
    assert torch.equal(done.plain, stock) and not torch.equal(stock, world.ksampler(steps=3, sampler="euler"))
    assert rows(done)[-1] > rows(done)[0]


@pytest.mark.parametrize(
    "said",
    [
        "grid_sampler_2d_backward does not have a deterministic implementation, but you set",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_where_there_is_no_repeatable_way_the_run_goes_on_and_says_so(world, said):
    """Some operations of a GPU have none: they are met in the first backward pass."""

    class Unrepeatable(PixelReward):
        def score(self, images, prompts):
            if torch.backends.cudnn.deterministic:
                raise RuntimeError(said)
            return super().score(images, prompts)

    done = run(world, reward=Unrepeatable("brightness"), steps=2, iterations=1)
    assert done.result.trace.settings["repeatable"] is False
    assert "does not repeat to the bit" in done.result.trace.notices[-1] and len(rows(done)) == 2
    assert run(world, steps=2, iterations=1).result.trace.settings["repeatable"] is True


def test_a_decoder_without_a_repeatable_way_is_met_before_anything_is_shown(world, monkeypatch):
    """As one that pads by replication: tilted noise scores its first predictions before it asks for a gradient."""

    class Padded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if torch.are_deterministic_algorithms_enabled():
                raise RuntimeError("replication_pad2d_backward_cuda does not have a deterministic implementation")
            return gradient

    network = world.vae.first_stage_model
    decode = network.decode
    monkeypatch.setattr(network, "decode", lambda z: Padded.apply(decode(z)))
    with torch.inference_mode():
        job = world.job(steps=3)
        job.settings = SearchSettings(method="ntrk", particles=1, rounds=1)
        torch.use_deterministic_algorithms(True)
        try:
            done = host.run(job, host.searching)
        finally:
            torch.use_deterministic_algorithms(False)
    assert not done.result.cut_short and "does not repeat to the bit" in done.result.trace.notices[-1]


def test_what_a_network_cached_in_the_plain_sample_is_no_obstacle(world):
    """Positions that a model computes once and keeps, in lists and dicts of its own."""
    with torch.inference_mode():
        model = demo.load_model()
    block = model.model.diffusion_model.middle_block[1]
    inner, block.kept = block.forward, {}

    def forward(x, *args, **kwargs):
        scale = block.kept.setdefault("scale", [torch.full((1, x.shape[1], 1, 1), 1.1, device=x.device)])[0]
        return inner(x * scale, *args, **kwargs)

    block.forward = forward
    done = run(world, Settings(iterations=2, lr=0.02), model=model, steps=3)
    assert rows(done)[-1] > rows(done)[0]


def test_fused_positions_give_way(monkeypatch):
    """ComfyUI 0.8 to 0.13 imports kernels without a backward by name; newer ones look them up where they are made."""
    eager = ModuleType("comfy_kitchen.backends.eager")
    eager.apply_rope1 = eager.rms_rope_split_half = lambda x, freqs: "differentiable"
    kitchen, backends = ModuleType("comfy_kitchen"), ModuleType("comfy_kitchen.backends")
    backends.eager = eager
    for module in (kitchen, backends, eager):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def fused(x, freqs):
        return "fused"

    fused.__module__ = "comfy_kitchen"
    kitchen.rms_rope_split_half = kitchen.rms_rope_split_half_ = kitchen.quantize = fused
    host_math = sys.modules["comfy.ldm.flux.math"]
    monkeypatch.setattr(host_math, "apply_rope1", fused)
    with kernels.pytorch_kernels():
        assert host_math.apply_rope1(None, None) == kitchen.rms_rope_split_half(None, None) == "differentiable"
        assert kitchen.rms_rope_split_half_ is kitchen.quantize is fused  # another one's business
    assert host_math.apply_rope1 is kitchen.rms_rope_split_half is fused


def guided_by_brightness(world, scale=1.0):
    with torch.inference_mode():
        inputs = (world.positive, world.negative, world.vae, PixelReward("brightness"), 5.0, scale, 0.0, 1.0)
        return nodes.MiraDyMOGuider.execute(world.model, *inputs).args[0]


@pytest.mark.parametrize("memory", ["auto", "per_step"])
def test_guidance_that_takes_a_gradient_of_its_own(world, memory):
    """Also while it is measured what a step keeps."""
    with torch.inference_mode():
        job = world.job(steps=3, iterations=1, memory=memory)
        job.guider = guided_by_brightness(world)
        assert len(rows(host.run(job))) == 2


def test_a_search_with_random_choices_of_a_model_is_the_plain_samples(world):
    settings = SearchSettings(method="best_of_n", particles=2)
    done = run(world, settings, host.searching, model=forgetful(world), steps=3)
    assert len(rows(done)) == 2


def test_regions_are_kept_under_every_way_of_writing_nothing_over():
    def add(base):
        out = base.narrow(0, 0, 2)
        out += 1

    of_the_host = FunctionType(add.__code__, {"__name__": "comfy.samplers"})
    for place in places.PLACES[1:]:
        base = torch.zeros(4, requires_grad=True) * 1
        with place():
            of_the_host(base)
        assert base.tolist() == [1, 1, 0, 0]


def test_a_slice_that_is_written_inside_a_block_has_its_gradient(world):
    """A checkpoint does not see what is written over inside it: blocks take the same care as the rest."""
    with torch.inference_mode():
        model = world.model.clone()

        def patch(q, k, v, extra_options):
            q[..., :64] = (q[..., :64] * 2).sigmoid() * q[..., :64].square()
            return q, k, v

        model.set_model_attn1_patch(patch)
    norms = [
        run(world, model=model, steps=3, iterations=1, memory=m, beta=0).result.trace.of(0)[0]["gradient_norm"]
        for m in ("none", "per_block")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=2e-4)


class Handing(torch.nn.Module):
    """A block that counts on a list which it hands on, as those of Wan's decoder do."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x, at):
        at[0] += 1
        return x * (1 + 0.1 * at[0]) + self.layers[0](x)


def test_blocks_that_write_into_a_list_begin_as_they_were():
    network = torch.nn.Sequential(Handing(), Handing())
    x = torch.randn(1, 3, 4, 4)

    def gradient(within):
        leaf, at = x.clone().requires_grad_(), [0]
        with within:
            out = network[1](network[0](leaf, at), at)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    for p in network.parameters():
        p.requires_grad_(False)
    expected = gradient(nullcontext())
    assert torch.equal(gradient(blocks.blocks_checkpointed(network, nullcontext)()), expected)


class Steered(torch.nn.Module):
    """A block that takes in more than its arguments, as one that a patch feeds from elsewhere does."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 1) for _ in range(3))
        self.beside = None

    def forward(self, x, *, scale=None):
        x = self.layers[0](x) * scale
        return (x if self.beside is None else x * self.beside), scale * 2


def test_a_gradient_that_comes_by_another_way_is_not_lost():
    network = torch.nn.Sequential(Steered(), Steered()).requires_grad_(False)
    x, scale, beside = torch.randn(1, 3, 4, 4), torch.tensor(1.5), torch.tensor(0.7)

    def gradients(within):
        leaves = [t.clone().requires_grad_() for t in (x, scale, beside)]
        network[1].beside = leaves[2]
        with within:
            out, more = network[1](*network[0](leaves[0], scale=leaves[1])[:1], scale=leaves[1])
        return torch.autograd.grad((out * more).square().sum(), leaves)

    expected = gradients(nullcontext())
    for a, b in zip(gradients(blocks.blocks_checkpointed(network, nullcontext)()), expected, strict=True):
        torch.testing.assert_close(a, b)


class WritesOverItsInput(Steered):
    def forward(self, x):
        x += self.layers[0](x)
        return x


def test_a_block_that_writes_over_its_input_is_noticed():
    network = torch.nn.Sequential(WritesOverItsInput(), WritesOverItsInput()).requires_grad_(False)
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace operation"), blocks.blocks_checkpointed(network, nullcontext)():
        network(x * 1)
    with blocks.blocks_checkpointed(network, places.OutOfPlace)():
        out = network(x * 1)
    (found,) = torch.autograd.grad(out.sum(), x)
    reference = x.detach().clone().requires_grad_()
    y = reference + network[0].layers[0](reference)
    (expected,) = torch.autograd.grad((y + network[1].layers[0](y)).sum(), reference)
    torch.testing.assert_close(found, expected)
