"""The scorers against their references' own numbers, on small networks of the same architectures and file layouts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from mira.demo import clip as demo_clip
from mira.demo.weights import load
from mira.rewards.aesthetic import Aesthetic, head_of
from mira.rewards.clip import Encoder, clip_score, hps, pick_score
from mira.rewards.files import HF_CLIP, OPEN_CLIP, OPEN_SIGLIP
from mira.rewards.image_reward import image_reward_of
from mira.rewards.networks import clip_image_half, clip_of, siglip_of
from mira.rewards.preprocess import Preprocessing, crop_transformers, pad_longest
from mira.rewards.text import ClipTokens

REFERENCE = json.loads((Path(__file__).parents[1] / "references" / "scores.json").read_text())
HERE = Path("here/weights.safetensors")  # nothing lies beside it
PROMPTS = [small.PROMPT, small.LONG]


def open_clip_encoder(quick_gelu=False):
    return clip_of(small.fill(small.open_clip_network().state_dict()), OPEN_CLIP, HERE, quick_gelu)


def hf_encoder():
    return clip_of(small.fill(small.hf_clip_network().state_dict()), HF_CLIP, HERE, False)


def aesthetic():
    state = small.fill(small.open_clip_network().state_dict())
    network, preprocessing, _ = clip_image_half(state, OPEN_CLIP, HERE, False)
    return Aesthetic(head_of(small.head_state(small.EMBED), "head"), network, network, preprocessing)


def pickscore():
    encoder = hf_encoder()
    cropped = replace(encoder, preprocessing=Preprocessing(224, crop_transformers))
    return pick_score(cropped, encoder.network.logit_scale.item())


def siglip(folder):
    small.siglip_tokenizer(folder)
    return clip_score(siglip_of(small.siglip_network().state_dict(), None, folder / "model.safetensors"))


def demo(_):
    network = demo_clip.new_clip()
    network.load_state_dict(demo_clip.expand(load("clip")))
    return clip_score(Encoder(network.eval(), ClipTokens(), Preprocessing(64)))


SCORERS = {
    "aesthetic": lambda folder: aesthetic(),
    "clipscore": lambda folder: clip_score(open_clip_encoder()),
    "clipscore_quick_gelu": lambda folder: clip_score(open_clip_encoder(True)),
    "hps": lambda folder: hps(replace(open_clip_encoder(), preprocessing=Preprocessing(224, pad_longest)), "v2"),
    "pickscore": lambda folder: pickscore(),
    "imagereward": lambda folder: image_reward_of(small.image_reward_state(), HERE),
    "siglip": siglip,
    "demo": demo,
}


@pytest.fixture(scope="module", params=SCORERS)
def scorer(request, tmp_path_factory):
    return request.param, SCORERS[request.param](tmp_path_factory.mktemp(request.param))


def ours(reward, name, prompts):
    image = small.tensor_of(small.images()[name])
    with torch.no_grad():
        return [reward.score(image, [p]).item() for p in prompts]


def test_scores_are_the_references(scorer):
    name, reward = scorer
    for picture, wanted in REFERENCE[name].items():
        prompts = PROMPTS if len(wanted) == 2 else [""]
        # Pillow breaks ties by its fixed-point weights: on the demo's 64 px, one level of a dozen pixels shows.
        assert ours(reward, picture, prompts) == pytest.approx(wanted, rel=3e-4 if name == "demo" else 1e-4), picture


def test_half_precision_is_near(scorer):
    name, reward = scorer
    try:
        for module in reward.modules[:1]:
            module.half()
        for picture, wanted in REFERENCE[name].items():
            prompts = PROMPTS if len(wanted) == 2 else [""]
            assert ours(reward, picture, prompts) == pytest.approx(wanted, rel=2e-2), picture
    finally:
        for module in reward.modules[:1]:
            module.float()


def test_gradcheck(scorer):
    """At the network's own size nothing is rounded, so a finite difference is exact: along a few directions."""
    name, reward = scorer
    size = {"siglip": 64, "demo": 64}.get(name, 224)
    for module in reward.modules:
        module.double()
    try:
        images = (torch.rand(2, 3, size, size, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
        prompts = [small.PROMPT, "a fox"]
        assert torch.autograd.gradcheck(
            lambda x: reward.score(x, prompts), images, fast_mode=True, eps=1e-5, atol=1e-5, rtol=1e-3
        )
    finally:
        for module in reward.modules:
            module.float()


def test_saturated_and_resized_images_keep_their_gradient(scorer):
    _, reward = scorer
    images = (torch.rand(1, 3, 150, 120) * 3 - 1).requires_grad_()  # two thirds of the pixels out of range
    score = reward.score(images, [small.PROMPT]).sum()
    (gradient,) = torch.autograd.grad(score, images)
    outside = (images < 0) | (images > 1)
    assert (gradient[outside] != 0).float().mean() > 0.7  # but for what is cropped away
    clamped = reward.score(images.detach().clamp(0, 1), [small.PROMPT])
    torch.testing.assert_close(score.detach(), clamped.sum())  # the score is the saved image's


def test_every_image_has_its_own_score(scorer):
    _, reward = scorer
    images, prompts = torch.rand(3, 3, 100, 130), [small.PROMPT, "a fox", small.LONG]
    together = reward.score(images, prompts)
    alone = torch.cat([reward.score(i[None], [p]) for i, p in zip(images, prompts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (3,)


def test_a_prompt_that_is_cut_is_told(scorer):
    name, reward = scorer
    if not reward.facts.needs_prompt:
        assert reward.notices([small.LONG]) == []
        return
    (notice,) = reward.notices([small.LONG, "a fox", small.LONG])
    assert notice.startswith("prompt of ") and "cut to" in notice
    context = {"imagereward": 35, "siglip": 16}.get(name, 77)
    assert f"cut to {context}" in notice


@pytest.mark.parametrize("weights", [(1e-9, 1e-4), (1.0, 1e3), (1e6, 0.0)])
def test_half_precision_keeps_gradients_of_any_size(weights):
    """Of a network in float16, whose own numbers go from 6e-8 to 65504: every image at a scale of its own."""
    reward, images = SCORERS["hps"](None), torch.rand(2, 3, 224, 224)

    def gradient():
        x = images.clone().requires_grad_()
        scores = reward.score(x, [small.PROMPT] * 2) * torch.tensor(weights)
        return torch.autograd.grad(scores.sum(), x)[0].flatten(1).double()

    exact = gradient()
    reward.modules[0].half()
    found = gradient()
    for weight, one, other in zip(weights, found, exact, strict=True):
        if not weight:
            assert not one.any()
            continue
        assert torch.nn.functional.cosine_similarity(one, other, dim=0, eps=1e-30) > 0.99
        assert one.norm() == pytest.approx(other.norm().item(), rel=0.05)


def test_the_image_half_alone_scores_like_the_whole(tmp_path):
    whole = small.fill(small.hf_clip_network().state_dict())
    half = {k: v for k, v in whole.items() if k.startswith(("vision_model.", "visual_projection."))}
    image = torch.rand(1, 3, 224, 224)
    a = clip_image_half(half, HF_CLIP, HERE, False)[0](image)
    torch.testing.assert_close(a, clip_of(whole, HF_CLIP, HERE, False).network.encode_image(image))


def test_siglip_in_open_clips_layout(tmp_path):
    """open_clip's own network and ours, from the same open_clip state dict."""
    import open_clip

    vision = dict(image_size=64, timm_model_name="vit_tiny_patch16_224", timm_pool="map", timm_proj="none")
    text = dict(
        context_length=16, vocab_size=100, width=64, heads=1, layers=2, no_causal_mask=True, proj_bias=True,
        pool_type="last", norm_kwargs={"eps": 1e-6}, act_kwargs={"approximate": "tanh"},
    )  # fmt: skip
    theirs = open_clip.CustomTextCLIP(192, vision, text, init_logit_bias=-10)
    extra = dict(global_pool="map", class_token=False, embed_dim=192, depth=2, num_heads=3, img_size=64, num_classes=0)
    import timm

    theirs.visual.trunk = timm.models.vision_transformer.VisionTransformer(
        patch_size=16, act_layer="gelu_tanh", **extra
    )
    theirs.load_state_dict(small.fill(theirs.state_dict()))
    theirs.eval()
    small.siglip_tokenizer(tmp_path)
    encoder = siglip_of(theirs.state_dict(), OPEN_SIGLIP, tmp_path / "open_clip_model.safetensors")
    image, ids = torch.rand(2, 3, 64, 64), encoder.tokens([small.PROMPT, "a fox"])
    torch.testing.assert_close(encoder.network.encode_image(image), theirs.encode_image(image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.network.encode_text(ids), theirs.encode_text(ids), rtol=1e-4, atol=1e-5)


def test_a_missing_open_clip_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=f"{sys.executable} -m pip install open_clip_torch"):
        ClipTokens()
