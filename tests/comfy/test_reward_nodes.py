"""Reward and score nodes, on files of the published formats, inside ComfyUI's memory management."""

from __future__ import annotations

import asyncio
import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import folder_paths
import numpy as np
import pytest
import small
import torch
from safetensors.torch import save_file

from testing.pack import ROOT, as_node, mira

host, Settings = mira("nodes.host"), mira("sampler.optimize").Settings
nodes, score = mira("nodes"), mira("nodes.score")
PixelReward, JPEG = mira("rewards.pixel").PixelReward, mira("rewards.jpeg").JPEG
IMAGE = small.tensor_of(small.images()["512x512"])
BATCH = torch.rand(3, 40, 56, 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder with a small file of every kind."""
    asyncio.run(nodes.comfy_entrypoint())
    folder = tmp_path_factory.mktemp("mira_rewards")
    paths, extensions = folder_paths.folder_names_and_paths["mira_rewards"]
    folder_paths.folder_names_and_paths["mira_rewards"] = ([str(folder)], extensions)
    clip = {k: v.clone() for k, v in small.fill(small.open_clip_network().state_dict()).items()}
    hf = {k: v.clone().contiguous() for k, v in small.fill(small.hf_clip_network().state_dict()).items()}
    save_file(hf, folder / "PickScore_v1.safetensors")
    half = {k: v for k, v in hf.items() if k.startswith("vis")}
    save_file(half, folder / "clip_vision.safetensors")
    save_file({k: v for k, v in hf.items() if k.startswith(("text", "logit"))}, folder / "clip_text.safetensors")
    torch.save({"epoch": 1, "state_dict": clip}, folder / "HPS_v2.1_compressed.pt")
    torch.save({"epoch": 1, "state_dict": clip}, folder / "mine.pt")
    save_file(clip, folder / "clip.safetensors")
    torch.save(small.image_reward_state(), folder / "ImageReward.pt")
    torch.save(small.head_state(small.EMBED), folder / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(small.head_state(768), folder / "head768.pth")
    (folder / "warmth.py").write_text((ROOT / "docs/examples/warmth.py").read_text())
    (folder / "clip.safetensors").rename(folder / "clip-00001-of-00001.safetensors")
    names = {k: "clip-00001-of-00001.safetensors" for k in clip}
    (folder / "clip.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    folder_paths.filename_list_cache.clear()
    yield folder
    folder_paths.folder_names_and_paths["mira_rewards"] = (paths, extensions)
    folder_paths.filename_list_cache.clear()


@torch.inference_mode()
def execute(node, **inputs):
    return as_node(node).execute(**inputs)


def reward_of(node, **inputs):
    return execute(node, **inputs).args[0]


LOADERS = {
    "aesthetic": (
        "MiraLoadAestheticReward",
        dict(head="sac+logos+ava1-l14-linearMSE.pth", clip="clip_vision.safetensors", precision="fp32"),
    ),
    "hps": ("MiraLoadHPSReward", dict(file="HPS_v2.1_compressed.pt", version="from the file's name", precision="fp32")),
    "pickscore": ("MiraLoadPickScoreReward", dict(file="PickScore_v1.safetensors", precision="fp32")),
    "imagereward": ("MiraLoadImageReward", dict(file="ImageReward.pt", precision="fp32")),
    "clipscore": (
        "MiraLoadCLIPScore",
        dict(file="clip.safetensors.index.json", text_file="in the same file", activation="auto", precision="fp32"),
    ),
    "halves": (
        "MiraLoadCLIPScore",
        dict(file="clip_vision.safetensors", text_file="clip_text.safetensors", activation="gelu", precision="fp32"),
    ),
}
NAMES = {
    "aesthetic": "Aesthetic", "hps": "HPSv2.1", "pickscore": "PickScore", "imagereward": "ImageReward",
    "clipscore": "CLIPScore", "halves": "CLIPScore",
}  # fmt: skip


@pytest.fixture(params=LOADERS)
def loaded(request, models):
    node, inputs = LOADERS[request.param]
    return request.param, reward_of(getattr(nodes, node), **inputs)


def test_loaders_give_rewards_by_name(loaded):
    name, reward = loaded
    assert reward.facts.name == NAMES[name]
    out = execute(nodes.MiraScoreImages, images=[BATCH], reward=[reward], prompt=[small.PROMPT])
    assert len(out.args[0]) == 3 and len(set(out.args[0])) == 3
    assert f"typical {reward.facts.typical[0]:g} to {reward.facts.typical[1]:g}" in out.args[1]
    assert out.ui["mira_scores"] == out.args[0] and out.ui["mira_text"] == [out.args[1]]


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_that_has_changed_is_another_one(models, name):
    node, inputs = LOADERS[name]
    node = getattr(nodes, node)
    whole = {k: v for k, v in inputs.items() if k in ("file", "text_file", "head", "clip")}
    files = [v for v in whole.values() if "same file" not in v]
    files += ["clip-00001-of-00001.safetensors"] * ("clip.safetensors.index.json" in files)

    def stamp(**other):
        return node.fingerprint_inputs(**inputs | other)

    assert stamp() == stamp() != ""
    for file in files:
        before = stamp()
        os.utime(models / file)
        assert stamp() != before, file
    linked = stamp(**dict.fromkeys(whole))  # ComfyUI does not tell yet what comes from other nodes
    assert linked == "" == stamp(**dict.fromkeys(whole, "nothing.pt"))


def test_loaded_scores_are_the_references(loaded):
    name, reward = loaded
    reference = json.loads((ROOT / "tests/references/scores.json").read_text())
    image = IMAGE.movedim(1, 3)
    (got,) = execute(nodes.MiraScoreImages, images=[image], reward=[reward], prompt=[small.PROMPT]).args[0]
    wanted = {"aesthetic": None, "halves": None}.get(name, reference.get(name, {}).get("512x512"))
    if wanted:  # the others are made of halves that no reference has
        assert got == pytest.approx(wanted[0], rel=1e-4)


def test_networks_are_in_comfyuis_memory_management(loaded):
    _, reward = loaded
    execute(nodes.MiraScoreImages, images=[BATCH[:1]], reward=[reward], prompt=["a fox"])
    # An entry without a model is of a test before, whose error held clones that were collected all at once.
    known = [m.model.model for m in comfy.model_management.current_loaded_models if m.model]
    assert all(any(module is k for k in known) for module in reward.modules)
    comfy.model_management.unload_all_models()
    assert not any(m.model for m in comfy.model_management.current_loaded_models)


def test_optimising_after_scoring(world, loaded):
    """Scored under inference mode first, as a graph may: its weights and texts must still carry a gradient."""
    _, reward = loaded
    execute(nodes.MiraScoreImages, images=[BATCH[:1]], reward=[reward], prompt=["generate an image of a fox"])
    runs = [world.optimize(reward=reward, steps=2, iterations=2, memory=m) for m in ("none", "per_step")]
    rows = [[r["reward"] for r in run.result.trace.rows] for run in runs]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4) and rows[0][0] != rows[0][-1]
    assert all(r["gradient_norm"] > 0 for r in runs[0].result.trace.rows[:2])


def test_layers_of_the_scorer_are_checkpointed(models):
    memory = mira("sampler.memory")
    node, inputs = LOADERS["clipscore"]
    reward = reward_of(getattr(nodes, node), **inputs)
    mira("nodes.host.inference_mode").leave_inference_mode(reward.modules[0])
    blocks = mira("nodes.host.blocks").blocks_checkpointed(reward.modules[0], mira("nodes.host.places").OutOfPlace)

    def kept(within):
        with within:
            return memory.saved_bytes(lambda x: reward.score(x, ["a fox"]), IMAGE)

    whole, layers = kept(nullcontext()), kept(blocks())
    # Two layers of 50 tokens: what they keep goes (their weights never counted), the image and its resizing stay.
    assert whole - layers > 200_000


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_is_the_networks(models, precision):
    node, inputs = LOADERS["imagereward"]
    exact = reward_of(getattr(nodes, node), **inputs)
    half = reward_of(getattr(nodes, node), **(inputs | {"precision": precision}))
    assert next(half.modules[0].parameters()).dtype.itemsize == 2
    a, b = (execute(nodes.MiraScoreImages, images=[BATCH], reward=[r], prompt=["x"]).args[0] for r in (exact, half))
    assert b == pytest.approx(a, rel={"fp16": 2e-2, "bf16": 5e-2}[precision])


def test_the_head_on_comfyuis_own_clip_vision(world, models):
    """Its ViT-L, shrunk: the scores of the file's image half are those of the loaded one."""
    config = dict(
        hidden_act="gelu", hidden_size=64, image_size=224, intermediate_size=256, num_attention_heads=1,
        num_hidden_layers=2, patch_size=32, projection_dim=small.EMBED, model_type="clip_vision_model", num_channels=3,
    )  # fmt: skip
    path = models / "vision_config.json"
    path.write_text(json.dumps(config))
    with torch.inference_mode():
        vision = comfy.clip_vision.ClipVisionModel(str(path))
        missing, _ = vision.load_sd(mira("rewards.files").read(models / "clip_vision.safetensors"))
        vision.model.float()
    path.unlink()
    assert not missing
    inputs = dict(head="sac+logos+ava1-l14-linearMSE.pth", precision="fp32")
    node = nodes.MiraLoadAestheticReward
    connected = reward_of(node, **inputs, clip="the connected clip_vision", clip_vision=vision)
    alone = reward_of(node, **inputs, clip="clip_vision.safetensors")
    a, b = (execute(nodes.MiraScoreImages, images=[BATCH], reward=[r]).args[0] for r in (connected, alone))
    assert a == pytest.approx(b, rel=1e-4)
    runs = [
        world.optimize(reward=r, steps=2, iterations=2, memory=m)
        for r in (connected, alone)
        for m in ("none", "per_step")
    ]
    rows = [[r["reward"] for r in run.result.trace.rows] for run in runs]
    for other in rows[1:]:
        assert other == pytest.approx(rows[0], rel=1e-3)


def test_a_file_that_is_offered_though_it_is_not_there(monkeypatch, tmp_path):
    """A new node says what it wants; to the editor the name that a workflow has is not among what there is."""
    files, PICKSCORE = mira("nodes.shared.files"), mira("rewards.known").PICKSCORE
    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.FOLDER, ([str(tmp_path)], {".safetensors"}))
    offered = files.offered(files.weights(), PICKSCORE)
    assert offered == {"options": [offered["default"]], "default": "PickScore_v1.safetensors (not there yet)"}
    why = files.missing(offered["default"], PICKSCORE)
    assert re.match(r"PickScore_v1.safetensors is not in .*where it is model.safetensors: download it into", why)
    (tmp_path / PICKSCORE.file).touch()
    assert files.offered(files.weights(), PICKSCORE)["options"] == [PICKSCORE.file]
    assert files.missing(offered["default"], PICKSCORE) is None and files.find(offered["default"]).is_file()


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        (
            "MiraLoadHPSReward",
            dict(file="ImageReward.pt", version="v2"),
            "Load HPS Reward: ImageReward.pt is ImageReward.*MIRA Load ImageReward takes it",
        ),
        (
            "MiraLoadHPSReward",
            dict(file="none.pt", version="v2"),
            "none.pt is not in models/mira_rewards.*HPS_v2.1_compressed.pt .about 1.97 GB. of xswu/HPSv2",
        ),
        (
            "MiraLoadHPSReward",
            dict(file="mine.pt", version="from the file's name"),
            "mine.pt tells no version: set version",
        ),
        (
            "MiraLoadImageReward",
            dict(file="PickScore_v1.safetensors"),
            "is a CLIP in Hugging Face's layout, not ImageReward; MIRA Load CLIPScore",
        ),
        (
            "MiraLoadPickScoreReward",
            dict(file="sac+logos+ava1-l14-linearMSE.pth"),
            "is an aesthetic head.*Load Aesthetic Reward takes it",
        ),
        (
            "MiraLoadCLIPScore",
            dict(file="clip_vision.safetensors", text_file="in the same file", activation="auto"),
            "is the image half of a CLIP",
        ),
        (
            "MiraLoadAestheticReward",
            dict(head="head768.pth", clip="clip_vision.safetensors"),
            "makes embeddings of 32 numbers, but this head reads 768",
        ),
        (
            "MiraLoadAestheticReward",
            dict(head="head768.pth", clip="the connected clip_vision"),
            "connect Load CLIP Vision, or choose a file",
        ),
    ],
)
def test_wrong_and_missing_files(models, node, inputs, message):
    with pytest.raises(ValueError, match=message):
        execute(getattr(nodes, node), **inputs, precision="fp32")


@pytest.mark.parametrize(
    ("node", "values", "wrong"),
    [
        ("MiraLoadAestheticReward", {"head": "", "clip": "", "precision": "fp64"}, "precision"),
        ("MiraLoadHPSReward", {"file": "", "version": "v2", "precision": "fp64"}, "precision"),
        ("MiraLoadHPSReward", {"file": "", "version": "v3", "precision": "auto"}, "version"),
        ("MiraLoadPickScoreReward", {"file": "", "precision": "fp64"}, "precision"),
        ("MiraLoadImageReward", {"file": "", "precision": "fp64"}, "precision"),
        ("MiraLoadCLIPScore", {"file": "", "text_file": "", "activation": "auto", "precision": None}, "precision"),
        ("MiraLoadCLIPScore", {"file": "", "text_file": "", "activation": "relu", "precision": "auto"}, "activation"),
    ],
)
def test_a_linked_choice_that_there_is_not_is_refused_by_name(node, values, wrong):
    loader = getattr(nodes, node)
    with pytest.raises(ValueError, match=f"{loader.NAME}: {wrong} is "):
        loader.execute(**values)


@pytest.mark.parametrize("name", LOADERS)
def test_mangled_files_are_refused_by_the_loader_that_opened_them(models, name):
    """A tensor missing, of another shape, of no element, or sparse: the loader says so, whichever tensor it is."""
    node, inputs = LOADERS[name]
    file = models / (inputs.get("head") or inputs["file"])
    if file.name.endswith(".index.json"):
        file = models / next(iter(json.loads(file.read_text())["weight_map"].values()))
    whole, read = file.read_bytes(), mira("rewards.files").read
    state, random = read(file), np.random.default_rng(0)
    mangles = (
        lambda t: None, lambda t: t.flatten()[:1], lambda t: t[None], lambda t: t.flatten()[:0], lambda t: t.to_sparse()
    )  # fmt: skip
    refused = 0
    try:
        for key in random.permutation(sorted(state))[:6]:
            for mangle in mangles:
                odd = mangle(state[key].float())
                if odd is not None and odd.layout is not torch.strided and file.suffix == ".safetensors":
                    continue  # which cannot hold one
                changed = {k: v for k, v in (state | {key: odd}).items() if v is not None}
                (save_file if file.suffix == ".safetensors" else torch.save)(changed, file)
                try:
                    reward_of(getattr(nodes, node), **inputs)
                except ValueError as problem:
                    refused += 1
                    assert getattr(nodes, node).NAME in str(problem), (key, problem)
        assert refused > 12
    finally:
        file.write_bytes(whole)


def test_a_clip_of_a_known_other_size_is_refused(models):
    loaders = mira("nodes.loaders")
    state = {
        "visual.conv1.weight": torch.empty(1024, 3, 14, 14, device="meta"),
        "visual.positional_embedding": torch.empty(257, 1024, device="meta"),
        "visual.transformer.resblocks.23.ln_1.weight": torch.empty(1, device="meta"),
        "visual.transformer.resblocks.0.mlp.c_fc.bias": torch.empty(4096, device="meta"),
    }
    with pytest.raises(ValueError, match="is a CLIP ViT-L/14, but this scorer is a ViT-H/14"):
        loaders.expect("Load HPS Reward", "x.pt", state, "ViT-H/14")


def test_missing_files_are_told_before_the_queue_runs(models):
    validate = nodes.MiraLoadImageReward.validate_inputs
    assert validate(file="ImageReward.pt") is True
    assert "zai-org/ImageReward" in validate(file="nothing.pt")
    assert "is not in models" in nodes.MiraRewardFromPython.validate_inputs(file="../evil.py")
    assert "another machine" in nodes.MiraRewardFromHTTP.validate_inputs(url="http://example.org/")
    assert nodes.MiraRewardFromHTTP.validate_inputs(url="http://localhost:1/") is True


def test_a_python_file_is_read_again_when_it_changes(models):
    node = nodes.MiraRewardFromPython
    before = node.fingerprint_inputs(file="warmth.py")
    assert reward_of(node, file="warmth.py").facts.name == "warmth"
    path = models / "warmth.py"
    path.write_text(path.read_text().replace('"warmth"', '"colder"'))
    assert node.fingerprint_inputs(file="warmth.py") != before
    assert reward_of(node, file="warmth.py").facts.name == "colder"


def test_a_python_file_can_be_optimised(world, models):
    reward = reward_of(nodes.MiraRewardFromPython, file="warmth.py")
    rows = world.optimize(reward=reward, steps=2, iterations=3).result.trace.rows
    assert rows[-1]["reward"] > rows[0]["reward"]


def test_a_linked_file_is_read_every_time():
    assert np.isnan(nodes.MiraRewardFromPython.fingerprint_inputs(file=None))


def test_only_files_of_the_folder_are_run(models, tmp_path):
    (models.parent / "outside.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="is not in models/mira_rewards"):
        execute(nodes.MiraRewardFromPython, file="../outside.py")


def test_ranking_is_by_score_and_stable():
    images = torch.rand(4, 8, 8, 3)
    out = execute(nodes.MiraRankImages, images=[images], scores=[0.1, 0.9, 0.1, 0.5], top_k=[3])
    assert out.args[2] == [1, 3, 0] and out.args[1] == [0.9, 0.5, 0.1]
    assert torch.equal(out.args[0], images[[1, 3, 0]])
    assert len(execute(nodes.MiraRankImages, images=[images], scores=[1.0] * 4, top_k=[99]).args[0]) == 4
    with pytest.raises(ValueError, match="MIRA Score Images: images is an empty list"):
        execute(nodes.MiraScoreImages, images=[], reward=[PixelReward("brightness")])
    with pytest.raises(ValueError, match="3 scores for 4 images"):
        execute(nodes.MiraRankImages, images=[images], scores=[1.0] * 3, top_k=[1])
    with pytest.raises(ValueError, match="which make no batch"):
        execute(nodes.MiraRankImages, images=[images, torch.rand(1, 4, 4, 3)], scores=[1.0] * 5, top_k=[1])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scores": [0.1, float("nan"), 0.5]}, r"scores \[1\] are no numbers"),
        ({"top_k": [-1]}, "top_k"),
        ({"top_k": [0]}, "top_k"),
        ({"top_k": [1, 2]}, "top_k has 2 values"),
        ({"latents": [{"samples": torch.zeros(3, 4, 2, 2), "batch_index": [0]}]}, "place of 1 only"),
        ({"images": []}, "connect an IMAGE"),
        ({"masks": []}, "masks has 0 of them, for 3 images"),
    ],
)
def test_what_cannot_be_ranked_is_refused(changed, words):
    given = dict(images=[torch.rand(3, 8, 8, 3)], scores=[0.1, 0.2, 0.3], top_k=[1])
    with pytest.raises(ValueError, match=f"MIRA Rank Images: .*{words}"):
        execute(nodes.MiraRankImages, **given | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"typical_low": 1.0, "typical_high": 0.0}, "give the lower one first"),
        ({"typical_low": float("nan")}, "typical_low"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0.0}, "timeout"),
        ({"url": None}, "url is empty"),
    ],
)
def test_linked_values_of_an_http_reward_are_checked_too(changed, words):
    given = dict(url="http://127.0.0.1:1/", name="mine", needs_prompt=False, timeout=1.0, retries=0)
    with pytest.raises(ValueError, match=f"MIRA Reward from HTTP: .*{words}"):
        execute(nodes.MiraRewardFromHTTP, **given | dict(typical_low=0.0, typical_high=1.0) | changed)


def test_latents_and_masks_are_ranked_with_their_images():
    images, masks = torch.rand(3, 8, 8, 3), torch.rand(3, 8, 8)
    latents = [
        {"samples": torch.rand(1, 4, 2, 2), "noise_mask": torch.rand(1, 1, 16, 16), "batch_index": [7]},
        {"samples": torch.rand(2, 4, 2, 2), "noise_mask": torch.rand(1, 1, 16, 16), "batch_index": [8, 9]},
    ]
    given = dict(images=[images], scores=[0.1, 0.3, 0.2], top_k=[2], latents=latents, masks=[masks])
    *_, ranked, ranked_masks = execute(nodes.MiraRankImages, **given).args
    assert torch.equal(ranked["samples"], latents[1]["samples"]) and ranked["batch_index"] == [8, 9]
    assert torch.equal(ranked["noise_mask"], latents[1]["noise_mask"].expand(2, 1, 16, 16))
    assert torch.equal(ranked_masks, masks[[1, 2]])
    with pytest.raises(ValueError, match="latents has 2 of them, for 3 images"):
        execute(nodes.MiraRankImages, **given | {"latents": latents[1:]})
    with pytest.raises(ValueError, match="masks has 1 of them, for 3 images"):
        execute(nodes.MiraRankImages, **given | {"masks": [masks[:1]]})
    for name, what, value in (("masks", "a MASK", 1e30), ("latents", "a LATENT", 1e30), ("latents", "a LATENT", {})):
        with pytest.raises(ValueError, match=f"MIRA Rank Images: {name} is a {type(value).__name__}: connect {what}"):
            execute(nodes.MiraRankImages, **given | {name: [value]})


def test_a_relative_reward_encodes_an_image_once(monkeypatch):
    reward = reward_of(nodes.MiraDemoCLIPScore)
    relative = reward_of(nodes.MiraRelativeReward, reward=reward, wanted="3d", unwanted="flat")
    images = torch.rand(2, 3, 64, 64)
    wanted, unwanted = (reward.score(images, [f"a fox, {words}"] * 2) for words in ("3d", "flat"))
    network, calls = reward.encoder.network, []
    encode = network.encode_image
    monkeypatch.setattr(network, "encode_image", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    total, parts = relative(images, ["a fox"] * 2)
    assert calls == [2]
    torch.testing.assert_close(total, wanted - unwanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts["CLIPScore wanted"], wanted, atol=1e-4, rtol=1e-4)
    for wrong, words in ((PixelReward("brightness"), "does not read the prompt"), (None, "reward")):
        with pytest.raises(ValueError, match=f"MIRA Relative Reward: .*{words}"):
            execute(nodes.MiraRelativeReward, reward=wrong, wanted="a", unwanted="b")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 8, 8, 1), "has 1 channel.* .greyscale."),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "is of torch.uint8: ComfyUI's images are floats"),
        (torch.full((1, 8, 8, 3), 255.0), "has values from 255 to 255, where ComfyUI's images go from 0 to 1"),
        (torch.rand(1, 8, 8, 4), "has 4 channel.* .RGB with transparency."),
        (torch.rand(0, 8, 8, 3), "there is no image in it"),
        (torch.rand(8, 8, 3), "connect an IMAGE"),
    ],
)
def test_images_that_are_none(images, message):
    with pytest.raises(ValueError, match=f"Score Images: images.*{message}"):
        execute(nodes.MiraScoreImages, images=[images], reward=[PixelReward("brightness")])


def test_prompts_of_scored_images():
    reward = reward_of(nodes.MiraDemoCLIPScore)
    with pytest.raises(ValueError, match="prompt is empty"):
        execute(nodes.MiraScoreImages, images=[BATCH], reward=[reward], prompt=[" "])
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        execute(nodes.MiraScoreImages, images=[BATCH], reward=[reward], prompt=["a", "b"])
    own = execute(nodes.MiraScoreImages, images=[BATCH], reward=[reward], prompt=["a fox", "a dog", "a cat"]).args[0]
    dog = execute(nodes.MiraScoreImages, images=[BATCH], reward=[reward], prompt=["a dog"]).args[0]
    assert own[1] == pytest.approx(dog[1], rel=1e-5) and own[0] != pytest.approx(dog[0], rel=1e-3)
    long = execute(nodes.MiraScoreImages, images=[BATCH], reward=[reward], prompt=[small.LONG]).args[1]
    assert "cut to 77" in long


@pytest.mark.parametrize("reward", [PixelReward("brightness"), JPEG()])  # as JPEG it is black, and small
def test_no_score_is_made_up(reward):
    with pytest.raises(RuntimeError, match=r"gave no finite score for image\(s\) \[1\]"):
        images = BATCH.clone()
        images[1] = float("nan")
        execute(nodes.MiraScoreImages, images=[images], reward=[reward])


def test_one_reward_scores():
    with pytest.raises(ValueError, match="MIRA Score Images: reward is a list of 2"):
        execute(nodes.MiraScoreImages, images=[BATCH], reward=[PixelReward("brightness")] * 2)


def test_a_prompt_is_read_as_the_samplers_read_it():
    score = partial(execute, nodes.MiraScoreImages, images=[BATCH], reward=[reward_of(nodes.MiraDemoCLIPScore)])
    assert score(prompt=["(a fox:1.3) <lora:x:1>"]).args[0] == score(prompt=["a fox"]).args[0]


def test_pickscore_counts_by_the_scale_that_its_file_has(models):
    """bfloat16 rounds it by a per cent."""
    node, inputs = LOADERS["pickscore"]
    whole, half = (reward_of(getattr(nodes, node), **inputs | {"precision": p}) for p in ("fp32", "bf16"))
    assert half.scale == whole.scale


def test_black_boxes_are_refused_where_a_gradient_is_needed(world):
    reward = reward_of(nodes.MiraJPEGReward, kind="black box", quality=95)
    assert not reward.facts.differentiable
    estimate = reward_of(nodes.MiraJPEGReward, kind="differentiable estimate", quality=95)
    rows = world.optimize(reward=estimate, steps=2, iterations=3).result.trace.rows
    assert rows[-1]["reward"] > rows[0]["reward"]


def test_match_reference(world):
    reward = reward_of(nodes.MiraPixelReward, measure="match reference", reference=torch.full((1, 64, 64, 3), 0.5))
    rows = world.optimize(reward=reward, steps=2, iterations=3).result.trace.rows
    assert rows[-1]["reward"] > rows[0]["reward"]
    with pytest.raises(ValueError, match="reference is not connected"):
        execute(nodes.MiraPixelReward, measure="match reference")


def test_augmented_runs_repeat_bit_for_bit(world):
    reward = reward_of(
        nodes.MiraAugmentReward, reward=reward_of(nodes.MiraDemoCLIPScore), crops=2, smallest=0.7, flip=True, seed=3
    )
    runs = [world.optimize(reward=reward, steps=2, iterations=3, memory=m) for m in ("none", "none", "per_step")]
    rows = [[r["reward"] for r in run.result.trace.rows] for run in runs]
    assert rows[0] == rows[1] and rows[2] == pytest.approx(rows[0], rel=1e-2)


def test_a_reward_that_draws_goes_on_with_the_draws_it_would_have_had(world):
    """Over seeds and rounds, in a batch: cancelled within a call of the network, and gone on with."""
    base = PixelReward("brightness")
    settings = Settings(iterations=4, lr=0.02, seeds=2, restart_every=2, keep="best_reward", drift_metric="path_kl")
    reward = reward_of(nodes.MiraAugmentReward, reward=base, crops=2, smallest=0.7, flip=True, seed=3)
    model, calls = world.model.clone(), []

    def counted(apply, args):
        calls.append(1)
        if len(calls) == at:
            comfy.model_management.interrupt_current_processing()
        return apply(args["input"], args["timestep"], **args["c"])

    counted.only_watches = True
    model.set_model_unet_function_wrapper(counted)

    def run(resume=None):
        with torch.inference_mode():
            job = world.job(model=model, reward=reward, steps=2, batch=2)
            return host.run(replace(job, settings=settings, resume=resume))

    at = 0
    whole = run()
    count = len(calls)
    for share in (0.75, 0.9):
        calls.clear()
        at = round(count * share)
        cut = run()
        assert cut.result.cut_short and cut.result.left
        at = 0
        again = run(cut.result.left)
        assert torch.equal(again.latent, whole.latent) and again.result.trace.kept == whole.result.trace.kept
        rows = [[r["reward"] for r in done.result.trace.rows] for done in (whole, again)]
        assert rows[0] == rows[1]
    comfy.model_management.interrupt_current_processing(False)
