"""InitNO's noise on the demo model's own attention."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_freelunch import FreeU_V2

from testing.pack import mira

node, attention = mira("nodes.initno"), mira("nodes.host.attention")
demo = mira("nodes.demo")
PROMPT = "a 3d fox on a blue background"


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        return demo.load_clip()


@pytest.fixture(scope="module")
def make(world, clip):
    def make(**values):
        batch = values.pop("batch", 1)
        asked = {
            "model": world.model, "clip": clip, "latent_image": {"samples": torch.zeros(batch, 4, 16, 16)},
            "sigmas": world.sigmas(steps=6), "prompt": PROMPT, "words": "blue", "seed": 5, "rounds": 1,
            "iterations": 4, "response": 0.0, "conflict": 0.3,
        }  # fmt: skip
        with torch.inference_mode():
            noise, report = node.MiraInitNONoise.execute(**asked | values).args
            return noise.generate_noise(asked["latent_image"]), report

    return make


def given(seed: int = 5, batch: int = 1) -> torch.Tensor:
    return comfy.sample.prepare_noise(torch.zeros(batch, 4, 16, 16), seed)


def listened(world, clip, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of z, read off a plain forward pass of the UNet."""
    with torch.inference_mode():
        words = node.locate(clip, PROMPT, ["blue"])
        listener = attention.Listener(words.tokens)
        listener.positions = 64
        sigma = world.sigmas(steps=6)[:1]
        x = (z.to(sigma) * (1 + sigma**2).sqrt()).to(world.model.load_device)
        guider = comfy.samplers.CFGGuider(world.model)
        guider.set_conds(clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT)), [])
        guider.set_cfg(1.0)

        class Once(comfy.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, callback, noise, *_):
                with listener.on(model_wrap.inner_model.diffusion_model):
                    model_wrap(x, sigma.to(x), **extra_args)
                return noise

        guider.sample(z, torch.zeros_like(z), Once(), world.sigmas(steps=6), disable_pbar=True, seed=0)
        cross, own = listener.heard()
        return mira("sampler.initno").scores(
            mira("sampler.initno").Maps(cross[:, words.kept].unflatten(0, (8, 8)), own.unflatten(1, (8, 8))),
            words.subjects,
        )


def test_the_models_attention_answers_more(world, clip, make):
    z, report = make(iterations=8)
    before, after = (listened(world, clip, n)[0].item() for n in (given(), z))
    assert after < before and f"response {before:.3f} to {after:.3f}" in report
    moved = (z - given()).square().mean().item()
    assert 0 < moved < 0.01  # within a KL of 0.001 an element
    assert torch.equal(z, make(iterations=8)[0])


def test_a_model_that_writes_over_what_a_gradient_needs(world, make):
    """FreeU scales its hidden states where they are."""
    with torch.inference_mode():
        patch = FreeU_V2.execute if hasattr(FreeU_V2, "execute") else FreeU_V2().patch
        patched = patch(model=world.model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
        model = (patched.args if hasattr(patched, "args") else patched)[0]
    z, report = make(model=model, iterations=3)
    assert not torch.equal(z, given()) and "error" not in report and "iteration 0, of 1" not in report


def test_nothing_to_improve_is_the_seeds_own_noise(make):
    z, report = make(response=1.0, iterations=8)
    assert torch.equal(z, given()) and "1 evaluations; every subject is answered" in report


def test_choosing_among_noises_alone(world, clip, make):
    z, report = make(iterations=0, rounds=4)
    found = listened(world, clip, z)[0].item()
    assert "of 4 evaluations" in report and found <= listened(world, clip, given())[0].item()


def test_every_image_of_a_batch_has_its_own(make):
    both, report = make(batch=2, iterations=2)
    alone, _ = make(iterations=2)
    assert len(both) == 2 and report.count("image") == 2
    assert not torch.equal(both, given(batch=2))
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=0)


def test_samplers_take_the_noise(world, make):
    latent = torch.zeros(1, 4, 16, 16)
    z, _ = make(iterations=2)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(world.model)
        guider.set_conds(world.positive, world.negative)
        euler = comfy.samplers.sampler_object("euler")
        out = guider.sample(z, latent, euler, world.sigmas(steps=2), disable_pbar=True, seed=5)
    assert torch.isfinite(out).all()


def test_the_model_is_as_it_was(world, make):
    before = world.ksampler(steps=2, seed=3)
    make(iterations=2)
    assert torch.equal(world.ksampler(steps=2, seed=3), before)
    assert not any(p.requires_grad for p in world.model.model.parameters())


def test_words_of_several_tokens_and_of_long_prompts_are_found(clip):
    with torch.inference_mode():
        few = node.locate(clip, "two hedgehogs, (one red car:1.2)", ["hedgehogs", "red car"])
        long = node.locate(clip, "blue " * 74 + "red car", ["red car", "blue"])
    assert few.tokens == 77 and few.kept == list(range(1, 76)) and few.subjects[0][0] == 1
    assert len(few.subjects[0]) == 2 and len(few.subjects[1]) == 2
    # Two chunks, with a start and an end each; the phrase lies across both.
    assert long.tokens == 154 and long.kept == [*range(1, 76), *range(78, 153)]
    assert long.subjects == [[74, 75], [0]] and [long.kept[n] for n in long.subjects[0]] == [75, 78]


def test_what_a_recompute_hears_is_not_kept():
    listener = attention.Listener(77)
    listener.positions = 4
    q, k = torch.ones(1, 4, 8), torch.ones(1, 77, 8)
    listener._key([q], 2, None, (), k)
    listener._key([q], 2, None, (), q)
    cross, own = listener.heard()
    listener._key([q], 2, None, (), k)  # in backward
    assert cross.shape == (4, 77) and own.shape == (4, 4) and len(listener.maps["cross"]) == 1


def test_guidance_by_more_passes_is_not_heard(world, make):
    """As perturbed-attention guidance: a function after CFG that runs the model once more, for a part of the prompt."""
    patched, calls = world.model.clone(), []

    def after(args):
        calls.append(1)
        return args["denoised"]

    patched.set_model_sampler_post_cfg_function(after)
    assert torch.equal(make(model=patched, iterations=2)[0], make(iterations=2)[0]) and not calls


def test_a_cancelled_one_hands_back_the_best_so_far(make, monkeypatch):
    def cancel(bar, value, *_):
        if value == 3:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", cancel)
    asked = {"seed": 5, "iterations": 50}  # what ComfyUI's cache goes by is another once it was cut short
    before = node.MiraInitNONoise.fingerprint_inputs(**asked)
    z, report = make(batch=2, iterations=50)
    assert node.MiraInitNONoise.fingerprint_inputs(**asked) > before
    assert len(z) == 2 and torch.equal(z[1:], given(batch=2)[1:])
    assert "interrupted after 3 evaluations" in report and report.count("image") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"words": " , "}, "words is empty"),
        ({"words": "wolf"}, "words has 'wolf', which is not in the prompt"),
        ({"sigmas": torch.tensor([])}, "no step that begins with noise"),
        ({"latent_image": {"samples": torch.zeros(0, 4, 16, 16)}}, r"shape \(0, 4, 16, 16\): give"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 16, 16), "noise_mask": torch.ones(1, 1, 128, 128)}}, "a mask"),
        ({"clip": None}, "clip is empty"),
        ({"latent_image": {"samples": torch.zeros(2, 4, 16, 16), "batch_index": [0]}}, "place of 1 only"),
        ({"rounds": 0}, "rounds is 0: "),
        ({"words": None}, "words is empty: give it a value"),
    ],
)
def test_bad_input_is_said(make, values, message):
    with pytest.raises(ValueError, match=f"MIRA InitNO Noise: .*{message}"):
        make(**values)


def test_a_latent_of_another_shape_is_refused(make):
    with pytest.raises(ValueError, match=r"noise is of shape \(1, 4, .* latent_image is of \(2, 4"):
        node.MadeNoise(0, given()).generate_noise({"samples": torch.zeros(2, 4, 16, 16)})


@pytest.mark.parametrize(("sides", "positions", "expected"), [((64, 64), 256, (16, 16)), ((45, 80), 920, (23, 40))])
def test_levels_of_a_unet(sides, positions, expected):
    assert attention.grid(positions, *sides) == expected
    with pytest.raises(ValueError, match="no level"):
        attention.grid(positions + 1, *sides)


def test_half_precision(make, half_model):
    z, report = make(model=half_model, iterations=2, rounds=1)
    assert torch.isfinite(z).all() and not torch.equal(z, given()) and "of 3 evaluations" in report


def test_a_model_without_cross_attention_is_refused(world, make, monkeypatch):
    """Transformers attend to text and image as one: as the demo model would, had its text another length."""
    with monkeypatch.context() as patch:
        patch.setattr(node, "locate", lambda *_: node.Words([[3]], list(range(1, 77)), 78))
        with pytest.raises(ValueError, match="UNetModel has no cross-attention on the prompt's 78 tokens"):
            make()
    other = world.model.clone()
    other.set_model_unet_function_wrapper(lambda apply, args: args["input"])
    with pytest.raises(ValueError, match="a patch of model runs another network than its UNetModel"):
        make(model=other)
