"""ComfyUI's image families, small and with random weights: whatever the network is, its gradient is right.

`MIRA_FAMILIES=all` runs every one of them; otherwise a few that differ most.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import comfy.samplers
import comfy.sd
import comfy_extras.nodes_flux
import pytest
import torch
from mira import nodes
from mira.nodes import host
from mira.nodes.host.conditioning import noised_by_seed
from mira.nodes.host.places import PLACES, written_over
from mira.nodes.host.scoring import Scoring, decode
from mira.nodes.shared import checks
from mira.rewards.pixel import PixelReward
from mira.sampler.search import SearchSettings
from mira.sampler.seeds import another

from bench import families
from bench.families import exactness, examine, in_precision, optimize
from testing.families import FAMILIES, known, make
from testing.pack import as_node

EVERY = os.environ.get("MIRA_FAMILIES") == "all"
HERE = [name for name in known() if FAMILIES[name].quick or EVERY]


@pytest.mark.every_host
@pytest.mark.parametrize("name", HERE)
def test_a_family_is_optimised_rightly(world, name):
    found = examine(world, name)
    assert found["plain"] and found["rises"]
    assert found["moved"] < 1e-3 and found["memory"] < families.SAME
    assert exactness(world, name) < families.EXACT


@pytest.mark.parametrize("precision", families.PRECISIONS)
@pytest.mark.parametrize("name", [n for n in HERE if n in ("SDXL", "FLUX.1") or EVERY])
def test_in_a_precision(world, name, precision):
    found = in_precision(world, name, precision)
    if (name, precision) == ("Z-Image (pixels)", "fp8"):  # makes a table in the precision of its weights
        assert found.startswith("ComfyUI's KSampler fails, too")
    else:
        assert found is True


@pytest.fixture
def computed_once():
    """() -> FLUX.2 whose reference image is computed by the first step alone; and the rest of a job."""
    if not hasattr(comfy_extras.nodes_flux, "FluxKVCache"):
        pytest.skip("this ComfyUI has no such node")
    model, vae, conds, latent = make("FLUX.2")
    reference = {"reference_latents": [torch.randn(latent.shape, generator=torch.manual_seed(3))]}
    conds = {name: [[c, extra | reference] for c, extra in cond] for name, cond in conds.items()}

    def patched():
        with torch.inference_mode():
            return comfy_extras.nodes_flux.FluxKVCache.execute(model=model).args[0]

    return patched, {"vae": vae, "latent": latent, **conds}


@pytest.mark.every_host
def test_reference_images_that_are_computed_once_are_refused_by_name(world, computed_once):
    patched, rest = computed_once
    with torch.inference_mode(), pytest.raises(ValueError, match=r"nodes_flux \(KV_Attn_Input\) keeps.*bypass"):
        host.run(world.job(model=patched(), **rest))


@pytest.mark.every_host
def test_two_models_do_not_share_reference_images_that_one_computes_once(computed_once):
    model, tuned = computed_once[0](), make("FLUX.2")[0]
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"RL Guidance: nodes_flux \(KV_Attn_Input\) keeps.*two"),
    ):
        nodes.MiraRLGuidance.execute(model, tuned, 1.0, "constant", 1.0)


@pytest.mark.every_host
def test_a_search_computes_reference_images_once_for_every_seed(world, computed_once):
    patched, rest = computed_once
    vae, how = rest.pop("vae"), {"sampler": "euler", "steps": 3} | rest
    with torch.inference_mode():
        alone = [world.ksampler(model=patched(), seed=s, **how) for s in (another(7, 1), 7)][::-1]
        rewards = [PixelReward("brightness").score(host.decode(vae, x), [""]).item() for x in alone]
        # The one that is sampled second has to win, or what it was given would not be seen.
        measure = "brightness" if rewards[1] > rewards[0] else "darkness"
        job = world.job(model=patched(), vae=vae, gradient=False, seed=7, reward=PixelReward(measure), **how)
        job.settings = SearchSettings(method="best_of_n", particles=2)
        done = host.run(job, host.searching)
        without = world.ksampler(model=make("FLUX.2")[0], seed=another(7, 1), **how)
    # With the first one's keys and values it is off by 3e-4, and by 6e-6 because both are sampled at once.
    torch.testing.assert_close(done.latent, alone[1], atol=5e-5, rtol=0)
    assert not torch.equal(without, alone[1])


@pytest.mark.parametrize("name", ["FLUX.1", "SDXL", "Qwen-Image"])
def test_dymo_goes_through_what_a_family_writes_over(world, name):
    """The Flux family adds in place; Qwen-Image's images are of one frame."""
    model, vae, conds, latent = make(name)
    reward, sampler = PixelReward("brightness"), comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        noise = torch.randn(latent.shape, generator=torch.manual_seed(0))

        def sample(scale):
            guider = nodes.MiraDyMOGuider.execute(model, **conds, vae=vae, reward=reward, cfg=3.0, scale=scale,
                                                  start_percent=0.0, end_percent=1.0).args[0]  # fmt: skip
            return guider.sample(noise, latent, sampler, world.sigmas(model=model, steps=3), disable_pbar=True, seed=0)

        images = [host.scoring.still(host.decode(vae, sample(scale)), "here") for scale in (0.0, 1.0)]
        rewards = [reward.score(image, [""]).item() for image in images]
        if latent.ndim == 5:
            noise, latent = (x.expand(-1, -1, 5, -1, -1) for x in (noise, latent))
            with pytest.raises(ValueError, match=r"MIRA DyMO Guider: the latent has shape.*still images only"):
                sample(1.0)
    assert rewards[1] > rewards[0]


@pytest.mark.parametrize("place", PLACES[1:])
def test_a_buffer_is_written_or_refused(place):
    """Who gave it may look into it, and not at what comes back."""
    buffer, x = torch.zeros(2), torch.ones(2, requires_grad=True)
    with place():
        torch.add(torch.ones(2), 1, out=buffer)
        with pytest.raises(RuntimeError, match="out=") as refused:
            torch.add(x, 1, out=torch.zeros(2))
    assert buffer.tolist() == [2, 2] and written_over(refused.value)


def test_the_page_is_of_the_results():
    results = families.read()
    assert families.PAGE.read_text() == families.page(results)
    newest = list(results.values())[-1]["families"]
    assert len(newest) >= 30 and all(families.works(found) for found in newest.values())


def test_a_frame_is_an_image_and_a_video_is_refused(world):
    model, vae, _, latent = make("Qwen-Image")
    sampler = comfy.samplers.sampler_object("euler")
    checks.check_latent("here", model, {"samples": latent}, vae, sampler, {})
    checks.check_latent("here", model, {"samples": torch.zeros(1, 16, 16, 16)}, vae, sampler, {})
    with pytest.raises(ValueError, match="only images"):
        checks.check_latent("here", model, {"samples": torch.zeros(1, 16, 5, 16, 16)}, vae, sampler, {})


@pytest.mark.parametrize(
    ("family", "of", "words"),
    [
        ("SD 1.5", {"latent_dim": 3}, "vae is one of video"),
        ("SD 1.5", {"extra_1d_channel": 16}, "vae is one of images, whose latents have another shape"),
        ("Qwen-Image", {"latent_dim": 1}, "vae is one of sound"),
        ("Qwen-Image", {"conv_out_channels": 4}, "vae decodes to 4 channels"),
        ("SD 1.5", {"latent_channels": 16}, "vae decodes latents of 16 channels"),
    ],
)
def test_another_models_vae_is_refused_by_name(world, family, of, words):
    model, vae, _, latent = make(family)
    vars(vae).update(of)
    with pytest.raises(ValueError, match=f"here: {words}"):
        checks.check_latent("here", model, {"samples": latent}, vae, comfy.samplers.sampler_object("euler"), {})


@torch.no_grad()
def test_a_decoder_of_images_does_for_one_frame(world):
    """A preview decoder, as newer hosts take it."""
    model, vae, _, latent = make("Qwen-Image")
    vae.latent_dim = 2
    checks.check_latent("here", model, {"samples": latent}, vae, comfy.samplers.sampler_object("euler"), {})
    asked, decode_all = [], vae.first_stage_model.decode
    vae.first_stage_model.decode = lambda z: asked.append(z.ndim) or decode_all(z)
    vae.decode_tiled_ = lambda z: asked.append(("tiles", z.ndim)) or decode(vae, z)
    scoring = Scoring("here", vae, PixelReward("brightness"), [""], lambda x: x)
    scoring.policy = SimpleNamespace(memory="none")
    whole = decode(make("Qwen-Image")[1], torch.ones_like(latent))[:, :, 0]
    assert torch.equal(scoring.render(torch.ones_like(latent)), whole) and asked == [4]

    def full(z):
        vae.first_stage_model.decode = decode_all
        raise torch.cuda.OutOfMemoryError("full")

    vae.first_stage_model.decode = full
    assert torch.equal(scoring.render(torch.ones_like(latent)), whole) and asked == [4, ("tiles", 4)]


@pytest.mark.parametrize("colours", [1, 4])
def test_what_decodes_to_other_colours_is_refused(world, colours):
    vae = make("SD 1.5")[1]
    vae.first_stage_model.layers[-1] = torch.nn.Conv2d(16, colours, 1)
    scoring = Scoring("here", vae, PixelReward("brightness"), [""], lambda x: x)
    scoring.policy = SimpleNamespace(memory="none")
    with torch.no_grad(), pytest.raises(ValueError, match=f"here: the VAE decodes to {colours} channels"):
        scoring.render(torch.zeros(1, 4, 8, 8))


def test_a_frame_that_does_not_fit_is_decoded_in_tiles(world, monkeypatch, caplog):
    """By ComfyUI's own VAE of video, as VAE Decode does."""
    monkeypatch.setattr(comfy.sd.VAE, "__init__", lambda self: None)
    vae, small = comfy.sd.VAE(), make("Qwen-Image")[1]
    vars(vae).update(vars(small) | {"vae_dtype": small.vae_dtype, "output_device": torch.device("cpu")})
    vae.process_output, vae.output_channels = small.process_output, 3
    vae.upscale_ratio, vae.upscale_index_formula = (lambda a: a, 2, 2), (1, 2, 2)
    vae.downscale_ratio, vae.handles_tiling = (lambda a: a, 2, 2), False
    decode_all, sizes = vae.first_stage_model.decode, []

    def tight(z):
        sizes.append(z.shape[-1])
        if z.shape[-1] > 140:
            raise torch.cuda.OutOfMemoryError("full")
        return decode_all(z)

    vae.first_stage_model.decode = tight
    scoring = Scoring("here", vae, PixelReward("brightness"), [""], lambda x: x)
    scoring.policy = SimpleNamespace(memory="none")
    x0 = torch.randn(1, 16, 1, 8, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = scoring.render(x0)
        whole = small.process_output(decode_all(x0))[:, :, 0]
    assert sizes[0] == 160 and len(sizes) > 2 and scoring.tiled
    torch.testing.assert_close(found, whole, atol=0.05, rtol=0)


@pytest.mark.parametrize("shows", [True, False])
def test_other_seeds_of_what_unclip_shows_are_told(world, shows):
    """SDXL takes such images, and most people give it none."""
    model, vae, conds, latent = make("SDXL")
    if shows:
        image = SimpleNamespace(image_embeds=torch.randn(1, 1280, generator=torch.Generator().manual_seed(0)))
        more = {"clip_vision_output": image, "strength": 1.0, "noise_augmentation": 0.5}
        ((text, extra),) = conds["positive"]
        conds["positive"] = [[text, extra | {"unclip_conditioning": [more]}]]
    with torch.inference_mode():
        trace = as_node(nodes.MiraOptimizeKSampler).execute(
            model=model, **conds, vae=vae, latent_image={"samples": latent}, reward=PixelReward("brightness"), seed=1,
            steps=2, cfg=2.0, sampler_name="euler", scheduler="normal", preset="custom", iterations=1, seeds=2,
        ).args[2]  # fmt: skip
    assert any("the conditioning shows is noised by the given seed" in n for n in trace.notices) == shows


@pytest.mark.parametrize(("cond", "noised"), [({}, False), ({"noise_augmentation": 0.0}, False), ({}, True)])
def test_images_that_a_model_noises_by_itself_are_told_too(cond, noised):
    """HunyuanImage's refiner has no augmentor of unCLIP's."""
    model = SimpleNamespace()
    shown = cond | {"concat_latent_image": torch.zeros(1)} | ({"noise_augmentation": 0.3} if noised else {})
    assert noised_by_seed(SimpleNamespace(inner_model=model, conds={"positive": [shown]})) == noised


@pytest.mark.parametrize("memory", ["none", "per_block"])
def test_guidance_that_rescales_in_place(world, memory):
    """Skip layer guidance multiplies its result where it is."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT as Node

    model, *rest = make("SD 3")
    options = dict(
        model=model, double_layers="0", single_layers="", scale=3.0, start_percent=0.0, end_percent=1.0,
        rescaling_scale=0.5,
    )  # fmt: skip
    with torch.inference_mode():
        patched = Node.execute(**options) if hasattr(Node, "execute") else Node().skip_guidance(**options)
        patched = (patched.args if hasattr(patched, "args") else patched)[0]
    rewards = [r["reward"] for r in optimize(world, (patched, *rest), memory=memory).result.trace.of(0)]
    assert rewards[-1] > rewards[0]
