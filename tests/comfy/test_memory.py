"""What stays in memory: nothing, whatever was run and however it ended; and less while it runs, where less is there."""

from __future__ import annotations

import copy
import gc
import os
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import comfy.sd
import psutil
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from mira.nodes import demo, host
from mira.nodes.guidance import MiraDyMOGuider, MiraRLGuidance
from mira.nodes.host import blocks, kernels, loading
from mira.nodes.host.process import Process
from mira.nodes.host.repeating import Repeating
from mira.nodes.host.scoring import Scoring
from mira.nodes.initno import MiraInitNONoise
from mira.nodes.preference import preferring
from mira.nodes.score import MiraScoreImages
from mira.rewards.pixel import PixelReward
from mira.sampler.memory import saved_bytes
from mira.sampler.optimize import Settings
from mira.sampler.preference import PreferenceSettings, by_score
from mira.sampler.rollout import Rollout
from mira.sampler.search import METHODS as SEARCHES
from mira.sampler.search import SearchSettings

from testing.networks import SMALL, random_unet, thin_vae


def alive() -> dict[int, type]:
    """Tensors, models, and guiders that hold one."""
    kinds = torch.Tensor, comfy.model_patcher.ModelPatcher, comfy.samplers.CFGGuider
    return {id(x): type(x) for x in gc.get_objects() if isinstance(x, kinds)}


RUNS = int(os.environ.get("MIRA_LEAK_RUNS", "2"))
LATENT = torch.zeros(1, 4, 8, 8)


def flat(run) -> None:
    """As much is alive after every run; and what a run held went with it, not with the next collection of garbage: on a
    card that is memory, and ComfyUI keeps dead entries of clones that are collected with what they were cloned from.
    """
    counts = []
    for k in range(RUNS):
        gc.disable()
        try:
            run()
            held = alive()
            gc.collect()
        finally:
            gc.enable()
        left = alive()
        counts.append(len(left))
        if k >= 1:  # the first one makes what is kept for good
            assert not {n: kind for n, kind in held.items() if n not in left}
    assert len(set(counts)) == 1, counts


@pytest.mark.parametrize("memory", ["auto", *Rollout.POLICIES])
@pytest.mark.parametrize("sampler", ["euler_ancestral", "euler_ancestral_cfg_pp"])
def test_an_optimisation_leaves_nothing_behind(world, sampler, memory):
    flat(lambda: world.optimize(sampler=sampler, memory=memory, steps=2, iterations=1, latent=LATENT))


class Cancelled(comfy.model_management.InterruptProcessingException):
    pass


@pytest.mark.parametrize("problem", [Cancelled, torch.OutOfMemoryError])
@pytest.mark.parametrize("memory", ["auto", "per_step", "per_block"])
@pytest.mark.parametrize("sampler", ["euler_ancestral", "euler_ancestral_cfg_pp"])
def test_nor_does_an_aborted_one(world, sampler, memory, problem):
    """In the middle of a trajectory, where a checkpoint holds the denoiser's arguments and they a prediction."""

    def run():
        model, calls, reported = world.model.clone(), [], []

        def wrapper(apply, args):
            if reported and torch.is_grad_enabled():
                calls.append(1)
                if len(calls) == 2:  # the second step of the second iteration, or of its backward
                    raise problem("here")
            return apply(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(wrapper)
        done = world.optimize(
            model=model, sampler=sampler, memory=memory, steps=3, iterations=2, latent=LATENT,
            on_iteration=lambda *row: reported.append(row[0]),
        )  # fmt: skip
        assert len(calls) >= 2 and (done.result.cut_short or done.result.trace.notices)

    flat(run)


METHODS = {
    "seeds": Settings(iterations=1, seeds=3),
    "hold": Settings(iterations=2, hold="projection", drift_limit=0.01, drift_metric="path_kl"),
    "initno": Settings(iterations=1, variables="initno", beta=0.1),
    "prno": Settings(iterations=1, regularizer="prno", beta=0.1),
    "rounds": Settings(iterations=2, restart_every=1),
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_nor_any_way_of_optimising(world, settings):
    def run():
        with torch.inference_mode():
            job = world.job(steps=2, latent=LATENT)
            job.settings = settings
            host.run(job)

    flat(run)


@pytest.mark.parametrize(
    "method", ["best_of_n", "zero_order", "fk_steering", "code", "das", "ntrk", "mira_fk", "restarts"]
)
def test_nor_any_search(world, method):
    def run():
        with torch.inference_mode():
            job = world.job(steps=3, latent=LATENT)
            job.settings = SearchSettings(method=method, particles=2, rounds=1, iterations=1)
            host.run(job, host.searching)

    flat(run)


def failing(world, problem, reported: list):
    """A model that raises `problem` in the second call after a row was reported, and in every later one."""
    model, calls = world.model.clone(), []

    def wrapper(apply, args):
        calls.extend([1] * bool(reported))
        if len(calls) >= 2:
            raise problem("here")
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("problem", [Cancelled, torch.OutOfMemoryError])
@pytest.mark.parametrize("method", ["best_of_n", "das", "mira_fk", "restarts"])
def test_nor_an_aborted_search(world, method, problem):
    def run():
        reported: list = []
        with torch.inference_mode():
            job = world.job(
                model=failing(world, problem, reported), steps=3, latent=LATENT, gradient=SEARCHES[method].gradient,
                on_iteration=lambda *row: reported.append(row[0]),
            )  # fmt: skip
            job.settings = SearchSettings(method=method, particles=3, rounds=2, iterations=2)
            result = host.run(job, host.searching).result
        assert result.cut_short and len(reported) <= 2

    flat(run)


class ByBrightness:
    def __call__(self, k, images):
        return by_score(torch.stack([i.mean((1, 2, 3)) for i in images], 1))


@pytest.mark.parametrize("method", ["dpo", "dueling", "best_of_n", "hybrid2"])
def test_nor_any_preference(world, method):
    def run():
        with torch.inference_mode():
            job = world.job(steps=2, latent=LATENT)
            job.settings = PreferenceSettings(method=method, iterations=2)
            host.run(job, preferring(lambda process: ByBrightness(), 0, 0))

    flat(run)


@pytest.mark.parametrize("problem", [Cancelled, torch.OutOfMemoryError])
@pytest.mark.parametrize("method", ["dpo", "dueling"])
def test_nor_an_aborted_preference(world, method, problem):
    def run():
        reported: list = []
        with torch.inference_mode():
            job = world.job(
                model=failing(world, problem, reported), steps=2, latent=LATENT,
                on_iteration=lambda *row: reported.append(row[0]),
            )  # fmt: skip
            job.settings = PreferenceSettings(method=method, iterations=8)
            done = host.run(job, preferring(lambda process: ByBrightness(), 0, 0))
        assert done.result.cut_short and len(reported) <= 2

    flat(run)


def test_nor_guidance(world):
    def run():
        with torch.inference_mode():
            guider = MiraDyMOGuider.execute(
                world.model, world.positive, world.negative, world.vae, PixelReward("brightness"), 5.0, 1.0, 0.0, 1.0
            ).args[0]
            sampler = comfy.samplers.sampler_object("euler")
            guider.sample(torch.randn_like(LATENT), LATENT, sampler, world.sigmas(steps=2), seed=0)

    flat(run)


def test_nor_a_better_noise(world):
    def run():
        with torch.inference_mode():
            MiraInitNONoise.execute(
                world.model, world.clip, {"samples": torch.zeros(1, 4, 8, 8)}, world.sigmas(steps=2),
                "a fox and a cat", "fox, cat", 1, 1, 1, 0.2, 0.3,
            )  # fmt: skip

    flat(run)


def test_nor_a_blend_of_models(world):
    with torch.inference_mode():
        guided = MiraRLGuidance.execute(world.model, random_unet(SMALL, torch.float32), 1.5, "constant", 1.0).args[0]
    flat(lambda: world.optimize(model=guided, steps=2, iterations=1, latent=LATENT))


def test_resident_memory_is_flat(world):
    process = psutil.Process()
    for k in range(7):
        world.optimize(steps=3, iterations=1, batch=2)
        if k == 2:
            gc.collect()
            before = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss - before < 30e6


@pytest.fixture(scope="module")
def kl_vae():
    """SD's own decoder, small: residual blocks at four resolutions, and attention in the middle."""
    shape = dict(
        double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 4, 4],
        num_res_blocks=2, attn_resolutions=[], dropout=0.0,
    )  # fmt: skip
    with torch.inference_mode():
        torch.manual_seed(0)
        network = AutoencoderKL(ddconfig=shape, embed_dim=4)
        for p in network.parameters():
            p.fill_(1) if p.ndim == 1 else p.normal_(0, 0.5 / p[0].numel() ** 0.5)
        yield Vae(network)


class Vae:
    """What `host` asks of ComfyUI's VAE, which knows the published size of this decoder only."""

    latent_channels, vae_dtype, device = 4, torch.float32, torch.device("cpu")

    def __init__(self, network):
        self.first_stage_model = network
        self.patcher = comfy.model_patcher.ModelPatcher(network, self.device, self.device)

    def process_output(self, image):
        return image.add(1).div(2).clamp(0, 1)

    def memory_used_decode(self, shape, dtype):
        return 0


def test_what_the_decoder_keeps_for_backward(world, kl_vae):
    """Its residual blocks are the peak of a run at 512 px and above."""
    kept = {}

    def saved(process, noises):
        scoring, before = process.scoring, process.scoring.policy
        for policy in Rollout.POLICIES:
            scoring.policy = Rollout(process.differentiable, process.sigmas, memory=policy, blocks=process.blocks())
            kept[policy] = saved_bytes(lambda x: scoring.score(x).total, torch.zeros(1, 4, 32, 32))
        scoring.policy, process.expected = before, None
        return host.optimizing(process, noises)

    with torch.inference_mode():
        host.run(world.job(vae=kl_vae, steps=1, iterations=0), saved)
    assert kept["per_step"] < kept["none"] / 3 and kept["offload"] <= kept["per_block"] <= kept["per_step"]


@pytest.mark.parametrize("memory", ["per_step", "per_block", "offload"])
def test_every_policy_has_the_same_gradient(world, kl_vae, memory):
    everything, thrifty = (
        world.optimize(vae=kl_vae, steps=3, iterations=2, memory=m, sampler="euler_ancestral") for m in ("none", memory)
    )
    torch.testing.assert_close(thrifty.latent, everything.latent, atol=1e-2, rtol=1e-3)
    assert not torch.equal(thrifty.latent, thrifty.plain)


class Layer(torch.nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.one, self.norm, self.two = torch.nn.Linear(3, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)
        self.seen = seen

    def forward(self, x):
        self.seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return x + self.two(self.norm(self.one(x)).tanh())


class Layered(PixelReward):
    """Brightness of what a network of layers makes of an image."""

    def __init__(self):
        super().__init__("brightness")
        self.seen = []
        with torch.inference_mode():
            self.layers = torch.nn.Sequential(Layer(self.seen), Layer(self.seen))
        self.modules = (self.layers,)

    def score(self, images, prompts):
        return super().score(self.layers(images.movedim(1, -1)).movedim(-1, 1), prompts)


@pytest.mark.parametrize("memory", ["none", "per_step", "offload"])
def test_a_rewards_layers_have_no_tf32_where_they_are_computed_again_either(world, memory, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    reward = Layered()
    world.optimize(reward=reward, steps=2, iterations=1, memory=memory)
    assert set(reward.seen) == {(False, False)}


def test_dymos_reward_has_no_tf32_where_it_is_computed_again_either(world, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    reward, failed = Layered(), []

    def score(self, images, prompts):
        total = Layered.score(self, images, prompts)
        if len(failed) < 2:
            failed.append(1)
            raise torch.OutOfMemoryError("full")
        return total

    monkeypatch.setattr(reward, "score", score.__get__(reward))
    with torch.inference_mode():
        guider = MiraDyMOGuider.execute(
            world.model, world.positive, world.negative, world.vae, reward, 5.0, 0.3, 0.0, 1.0
        ).args[0]
        guider.sample(
            torch.randn(1, 4, world.side, world.side), torch.zeros(1, 4, world.side, world.side),
            comfy.samplers.sampler_object("euler"), world.sigmas(steps=2), seed=0,
        )  # fmt: skip
    assert guider.thrift == len(failed) == 2 and set(seen[0] for seen in reward.seen) == {False}


def search(world, **job):
    with torch.inference_mode():
        job = world.job(steps=2, **job)
        job.settings, job.gradient = SearchSettings(method="best_of_n", particles=2), False
        return host.run(job, host.searching)


def test_without_a_gradient_models_need_not_be_whole(world, monkeypatch):
    """As where ComfyUI leaves a part of the weights in the CPU's memory."""
    whole = search(world)
    load = comfy.model_management.load_models_gpu

    def full(models, *args, force_full_load=False, **kwargs):
        if force_full_load:
            raise torch.OutOfMemoryError("full")
        return load(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", full)
    assert torch.equal(search(world).latent, whole.latent)
    with pytest.raises(torch.OutOfMemoryError, match=r"while its models were loaded \(BaseModel.*as a gradient needs"):
        world.optimize(steps=2)


def test_the_checks_before_a_run_keep_little(world, monkeypatch):
    """What there is room for is not known by then, and a card that spills into the CPU's memory would take minutes."""
    ways, score = [], Scoring._reward_whole

    def full(scoring, *args):
        if torch.is_grad_enabled():
            ways.append(scoring.policy.memory)
            if len(ways) == 1:
                raise torch.OutOfMemoryError("full")
        return score(scoring, *args)

    monkeypatch.setattr(Scoring, "_reward_whole", full)
    done = world.optimize(steps=2, iterations=1)
    assert ways[:3] == ["per_step", "offload", "auto"] and ways[-1] == "none"  # then what is measured and chosen
    assert done.result.trace.settings["checkpointing"] == "none"


def network_and_patcher(monkeypatch):
    """Of a reward, for a card whose tensors are on "meta"."""
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("meta"))
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    return network, host.patcher_of(network)


def where(network):
    return {p.device.type for p in network.parameters()}


def test_a_rewards_network_is_on_the_card_whole_or_not_at_all(monkeypatch):
    """Its layers are PyTorch's own: one that is left behind would meet images that are on the card."""
    network, patcher = network_and_patcher(monkeypatch)
    assert patcher.partially_unload(torch.device("cpu"), 1) == 0 and where(network) == {"cpu"}
    patcher.partially_load(torch.device("meta"), 0.1)  # what ComfyUI says where no weight has room
    assert where(network) == {"meta"}
    assert patcher.partially_unload(torch.device("cpu"), 1) == 0 and where(network) == {"meta"}


def test_weights_that_are_left_behind_are_told_before_a_gradient_is_taken(monkeypatch):
    """As with --novram."""
    network, patcher = network_and_patcher(monkeypatch)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: None)
    with loading.loaded([patcher], 0):  # another pack's way, which brings them when they are used
        assert where(network) == {"cpu"}
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 1e18)  # not known of such a device
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    with pytest.raises(RuntimeError, match=r"Sequential: .* without --novram"), loading.loaded([patcher], 0):
        pass
    with loading.loaded([patcher], 0, least=0):
        assert where(network) == {"cpu"}


def test_a_search_sends_nothing_away_but_for_what_looks_at_the_images(world, monkeypatch):
    """ComfyUI takes weights off the card for the room that is asked for, decoding's too, though a full one does; and
    leaves none where it puts a model that is larger than the card, for a scorer that is to be there whole.
    """
    load, asked = comfy.model_management.load_models_gpu, []

    def seen(models, **how):
        if "minimum_memory_required" in how:
            there = [m.model.model for m in comfy.model_management.current_loaded_models]
            asked.append((models, how["minimum_memory_required"], bool(asked) and world.model.model not in there))
        assert not how.get("force_full_load")
        return load(models, **how)

    reward = PixelReward("brightness")
    reward.modules = (torch.nn.Linear(1000, 1000, bias=False),)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", seen)
    search(world, reward=reward)
    (_, sampler, _), (models, room, _), (looking, own, hidden) = asked
    assert models[0].model is world.model.model
    least = max(sampler, comfy.model_management.minimum_inference_memory())
    assert least + 4e6 <= room <= least + 4e6 + world.vae.patcher.model_size()  # of which some may be there
    assert hidden and not asked[0][2] and not asked[1][2]  # as a model is that ComfyUI is asked for in the same call
    assert any(m.model.model is world.model.model for m in comfy.model_management.current_loaded_models)
    assert {p.model for p in looking} == {world.vae.first_stage_model, *reward.modules} and own == 0


def test_a_host_that_shrinks_no_model_is_asked_for_the_room(monkeypatch):
    """0.3.64 leaves a model on the card as it is where that is asked for again, and dynamic VRAM does."""
    management, did = comfy.model_management, []
    card = torch.device("meta")

    def patcher(size):
        return SimpleNamespace(
            load_device=card, model_size=lambda: size, loaded_size=lambda: 0, model_patches_models=list, size=size
        )

    model, scorer = patcher(40e9), patcher(12e9)
    entries = [SimpleNamespace(model=model)]
    monkeypatch.setattr(management, "current_loaded_models", entries)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 1e9)
    monkeypatch.setattr(management, "get_free_memory", lambda device: 10e9)
    monkeypatch.setattr(
        management, "free_memory", lambda size, device: did.append(("free", size, [e.model for e in entries]))
    )
    monkeypatch.setattr(
        management, "load_models_gpu", lambda models, **how: did.append((*models, [e.model for e in entries]))
    )
    loading.load([model], 2e9, 0.5e9, beside=[scorer])
    assert did == [(model, [model]), ("free", 13e9, [model]), (scorer, [])] and entries[0].model is model


def test_what_a_patch_brings_along_stays_with_its_model(monkeypatch):
    """The network of a model patch has an entry of its own in ComfyUI's list."""
    patch = SimpleNamespace(model_patches_models=list)
    model, other = SimpleNamespace(model_patches_models=lambda: [patch]), SimpleNamespace(model_patches_models=list)
    entries = [SimpleNamespace(model=m) for m in (other, patch, model)]
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", entries)
    assert loading.loaded_of([model]) == entries[1:]


def test_without_a_gradient_images_are_decoded_as_they_fit(world, monkeypatch):
    whole, network = search(world, batch=3), world.vae.first_stage_model
    decode, most, failed = network.decode, [], []

    def full(z):
        if z[0, 0].numel() * len(z) > most[-1]:
            failed.append(len(z))
            raise torch.OutOfMemoryError("full")
        return decode(z)

    monkeypatch.setattr(network, "decode", full)
    most.append(world.side**2)
    assert torch.equal(search(world, batch=3).latent, whole.latent)
    assert failed == [3, 2]  # what did not fit once is not tried again
    most.append(64**2)
    large = torch.zeros(1, 4, 72, 72)
    kept = []

    def tiled(process, noises):
        with torch.no_grad():
            kept.append(process.scoring.render(large).shape)
        return host.searching(process, noises)

    with torch.inference_mode():
        job = world.job(steps=1)
        job.settings, job.gradient = SearchSettings(method="best_of_n", particles=1), False
        host.run(job, tiled)
    assert kept == [(1, 3, 576, 576)]


def test_without_a_gradient_images_are_scored_as_they_fit(world):
    class Full(PixelReward):
        def score(self, images, prompts):
            assert len(images) == len(prompts)
            if len(images) > most:
                raise torch.OutOfMemoryError("full")
            return super().score(images, prompts)

    prompts = ["a fox", "a cat", "a dog"]
    most = 3
    whole = search(world, reward=Full("brightness"), prompts=prompts, batch=3)
    most = 1
    parts = search(world, reward=Full("brightness"), prompts=prompts, batch=3)
    assert torch.equal(parts.latent, whole.latent)
    rewards = [[r["reward"] for r in done.result.trace.rows] for done in (parts, whole)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)
    most = 0
    with pytest.raises(torch.OutOfMemoryError, match="one particle at a time: take a smaller image or batch"):
        search(world, reward=Full("brightness"), prompts=prompts, batch=3)


def test_a_decoder_in_half_precision_has_its_loss_scaled(world):
    scales = []

    def seen(self, noises):
        scales.append(self.settings.loss_scale)
        return host.optimizing(self, noises)

    for dtype in (torch.float16, torch.bfloat16):
        vae = copy.copy(world.vae)
        vae.first_stage_model = thin_vae().first_stage_model.to(dtype)
        vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, vae.device, vae.device)
        vae.vae_dtype = dtype
        with torch.inference_mode():
            host.run(world.job(vae=vae, steps=1, iterations=1, latent=torch.zeros(1, 4, 4, 4)), seen)
    assert scales == [1024, 1]


def test_rewards_are_computed_in_whole_float32(world):
    """Under a gradient and without, in an optimisation and where a node only scores."""
    switches, seen = (torch.backends.cudnn, torch.backends.cuda.matmul), []

    class Watching(PixelReward):
        def __call__(self, images, prompts):
            seen.append([switch.allow_tf32 for switch in switches])
            return super().__call__(images, prompts)

    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        for memory in ("none", "per_step"):
            world.optimize(steps=1, iterations=1, reward=Watching("brightness"), memory=memory)
        MiraScoreImages.execute([torch.zeros(1, 8, 8, 3)], [Watching("brightness")])
        assert len(seen) >= 5 and not any(any(one) for one in seen)
        assert all(switch.allow_tf32 for switch in switches)
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def test_comfyuis_switches_of_training_are_as_a_gradient_needs_them(monkeypatch):
    """Its own training nodes may have left a backward in fp8 on."""
    management = comfy.model_management
    for name, value in (("in_training", False), ("training_fp8_bwd", True)):
        monkeypatch.setattr(management, name, value, raising=False)
    with kernels.training():
        assert management.in_training and not management.training_fp8_bwd
    assert not management.in_training and management.training_fp8_bwd


def test_the_newer_switch_of_tf32_is_put_back(world):
    """Once it was used, PyTorch refuses to read the older one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        world.optimize(steps=1, iterations=1)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("memory", ["auto", "none", "per_step", "per_block"])
def test_out_of_memory_anywhere_goes_on_with_less(world, memory):
    """In the plain sample, the self-test, while seeds are compared, at iteration 0 and later."""
    for number in (0, 4, 8, 13):
        model, calls, raised = world.model.clone(), [], []

        def full(apply, args, number=number, calls=calls, raised=raised):
            calls.append(1)
            if len(calls) == number + 3:  # three of the plain sample
                raised.append(torch.is_grad_enabled())
                raise torch.OutOfMemoryError("full")
            return apply(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(full)
        with torch.inference_mode():
            job = world.job(model=model, steps=3, memory=memory)
            job.settings = Settings(iterations=2, seeds=2, lr=0.02)
            done = host.run(job)
        assert raised and not done.result.cut_short
        assert torch.isfinite(done.latent).all() and len(done.result.trace.of(0)) == 3


SAMPLED_AGAIN = {
    "seeds": ("sample_of", Settings(iterations=1, seeds=3, lr=0.02)),
    "rounds": ("from_image", Settings(iterations=2, restart_every=1, lr=0.02)),
    "search of seeds": ("sample_of", SearchSettings(method="restarts", particles=2, rounds=1)),
    "search of restarts": ("from_image", SearchSettings(method="restarts", particles=2, rounds=1)),
}


@pytest.mark.parametrize("name, settings", SAMPLED_AGAIN.values(), ids=SAMPLED_AGAIN)
def test_so_does_what_is_sampled_once_more(world, monkeypatch, name, settings):
    """With everything unloaded that the run does not need, as the plain sample is; nothing of the run is lost."""

    def run(full):
        model, failed, inside = world.model.clone(), [], []
        sample = getattr(Process, name)

        def seen(process, number, *args):
            inside[:] = [number]
            try:
                return sample(process, number, *args)
            finally:
                inside.clear()

        def wrapper(apply, args):
            if full and inside != [0] and inside and not failed:
                failed.append(1)
                raise torch.OutOfMemoryError("full")
            return apply(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(wrapper)
        with torch.inference_mode(), monkeypatch.context() as patched:
            patched.setattr(Process, name, seen)
            job = world.job(model=model, steps=4)
            search = isinstance(settings, SearchSettings)
            job.settings, job.gradient = settings, not search
            done = host.run(job, host.searching if search else None)
        assert not done.result.cut_short and len(failed) == full
        return done

    torch.testing.assert_close(run(True).latent, run(False).latent)


def failing_once(world, at):
    """The demo model, whose call number `at` finds no memory."""
    model, calls = world.model.clone(), []

    def full(apply, args):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("full")
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(full)
    return model, calls


def test_guidance_and_better_noises_go_on_with_less_too(world):
    model, calls = failing_once(world, 2)
    with torch.inference_mode():
        inputs = (world.positive, world.negative, world.vae, PixelReward("brightness"), 5.0, 1.0, 0.0, 1.0)
        noise, sampler = torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(0)), world.sigmas(steps=3)
        samples = []
        for m in (world.model, model):
            guider = MiraDyMOGuider.execute(m, *inputs).args[0]
            samples.append(guider.sample(noise, LATENT, comfy.samplers.sampler_object("euler"), sampler, seed=0))
        assert len(calls) > 3
        torch.testing.assert_close(samples[1], samples[0], atol=1e-2, rtol=1e-3)
        model, calls = failing_once(world, 2)
        made = MiraInitNONoise.execute(
            model, world.clip, {"samples": torch.zeros(1, 4, 8, 8)}, world.sigmas(steps=2), "a fox and a cat",
            "fox, cat", 1, 1, 1, 0.2, 0.3,
        )  # fmt: skip
    assert len(calls) > 2 and made.args[0].noise.shape == (1, 4, 8, 8)


def test_guidance_for_which_no_engine_repeats_goes_on_without(world, caplog):
    """cuDNN says so in the words that it has for a full card, too: first with less, then not repeating."""
    model, guiders = world.model.clone(), []

    def no_engine(apply, args):
        if torch.is_grad_enabled() and guiders and guiders[0].repeating.possible:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(no_engine)
    with torch.inference_mode():
        inputs = (world.positive, world.negative, world.vae, PixelReward("brightness"), 5.0, 1.0, 0.0, 1.0)
        guiders.append(MiraDyMOGuider.execute(model, *inputs).args[0])
        noise = torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(0))
        euler = comfy.samplers.sampler_object("euler")
        found = guiders[0].sample(noise, LATENT, euler, world.sigmas(steps=3), seed=0)
    assert torch.isfinite(found).all() and caplog.text.count("does not repeat to the bit") == 1

    def work():
        if not torch.is_deterministic_algorithms_warn_only_enabled():  # as it is outside, in the tests
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return 7

    repeating = Repeating("a node")
    assert [repeating(torch.device("cuda"), work) for _ in range(2)] == [7, 7]

    def another():
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        Repeating("a node")(torch.device("cuda"), another)


def test_a_run_says_what_it_would_take(world):
    settings = world.optimize(steps=3, iterations=1).result.trace.settings
    assert settings["checkpointing"] == "none"
    assert 0 < settings["memory_mb"]["step"] < settings["memory_mb"]["free"]
    assert settings["memory_mb"]["decoding_and_reward"] > 0


@pytest.mark.parametrize(
    ("memory", "gradient_steps", "remedies"),
    [
        ("auto", 0, "a smaller image or batch, gradient_steps 3 or a smaller reward model"),
        ("none", 3, "a smaller image or batch, gradient_steps 1 or a smaller reward model"),
        ("auto", 1, "a smaller image or batch or a smaller reward model"),
    ],
)
def test_a_remedy_is_one_that_is_left(world, memory, gradient_steps, remedies):
    """Where nothing thriftier fits either."""

    class Full(PixelReward):
        def __call__(self, images, prompts):
            if images.requires_grad:
                raise torch.OutOfMemoryError("full")
            return super().__call__(images, prompts)

    with pytest.raises(torch.OutOfMemoryError, match=f"^MIRA: out of memory with .*: take {remedies}$"):
        world.optimize(steps=4, iterations=1, reward=Full("brightness"), memory=memory, gradient_steps=gradient_steps)


def test_layers_are_found_by_their_structure(world, kl_vae):
    def kinds(module):
        return {type(b).__name__ for b in blocks.blocks_of(module)}

    assert kinds(world.model.model.diffusion_model) == {"ResBlock", "BasicTransformerBlock"}
    assert kinds(kl_vae.first_stage_model) == {"ResnetBlock", "AttnBlock"}
    assert kinds(world.vae.first_stage_model) == {"Block"}
    assert kinds(torch.nn.Linear(3, 3)) == set()


def test_a_forward_of_another_pack_is_left_where_it_was(world):
    network = demo.load_model().model.diffusion_model
    block = blocks.blocks_of(network)[0]
    block.forward = theirs = block.forward
    with blocks.blocks_checkpointed(network, torch.no_grad)():
        assert block.forward is not theirs
    assert block.forward is theirs
