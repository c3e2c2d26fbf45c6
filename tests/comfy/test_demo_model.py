"""The demo model: what it promises, measured on the shipped weights."""

from __future__ import annotations

import pytest
import torch

from testing.pack import ROOT, mira

vocabulary, weights, judge_module = mira("demo.vocabulary"), mira("demo.weights"), mira("demo.judge")
demo = mira("nodes.demo")
ANIMALS = vocabulary.ANIMALS
pytestmark = pytest.mark.usefixtures("trained")


def test_the_files_are_small_enough_to_ship():
    files = list((ROOT / "demo" / "weights").glob("*.safetensors"))
    assert {f.stem for f in files} == {"unet", "vae", "clip", "judge", "taste", "bright_lora"}
    assert sum(f.stat().st_size for f in files) <= 32_000_000


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"unet.safetensors is missing: reinstall the pack"):
        weights.load("unet")


def test_comfyuis_text_encoder_is_the_open_clip_model(world):
    import open_clip

    clip = demo._clip_network()
    ids = open_clip.SimpleTokenizer(context_length=77)(["a 3d fox on a blue background"])
    ids = torch.where(ids == 0, 49407, ids).to(clip.positional_embedding.device)  # SD1.5 pads with end tokens
    with torch.no_grad():
        x = clip.token_embedding(ids) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
    torch.testing.assert_close(world.encode("a 3d fox on a blue background")[0][0].cpu(), x.cpu(), atol=1e-4, rtol=1e-4)


def test_unknown_words_share_a_row(world):
    table = demo._clip_network().token_embedding.weight
    known = weights.load("clip")["tokens"].long()
    unknown = torch.ones(len(table), dtype=torch.bool)
    unknown[known] = False
    assert (table[unknown] == table[unknown][0]).all()
    assert len(table[known].unique(dim=0)) == len(known)


def test_vae_round_trip(world):
    images = world.paint(["a fox"], 0, steps=8)
    with torch.inference_mode():
        again = world.vae.decode(world.vae.encode(images.movedim(1, -1))).movedim(-1, 1)
    assert (again - images).square().mean() < 0.01


def test_it_paints_what_the_prompt_asks_for(world):
    """The bar: the held-out judge names the animal in 70 % of all 45, and the background in 80 % of every third."""
    judge = judge_module.load_judge()
    names = list(vocabulary.BACKGROUNDS)
    images = world.paint([vocabulary.caption(a, prefix=True) for a in ANIMALS], 42, steps=10)
    assert (judge(images)[0].argmax(1) == torch.arange(45)).float().mean() >= 0.7
    some, wanted = ANIMALS[::3], torch.arange(15) * 5 % 12
    prompts = [vocabulary.caption(a, None, names[b]) for a, b in zip(some, wanted, strict=True)]
    images = world.paint(prompts, 43, steps=10)
    assert (judge(images)[2].argmax(1) == wanted).float().mean() >= 0.8
