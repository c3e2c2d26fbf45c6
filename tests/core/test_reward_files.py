"""Weight files of every layout that people have: read, told apart, and refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import small
import torch
from mira.rewards import files
from mira.rewards.aesthetic import head_of
from mira.rewards.files import WrongFile, kind_of, read, require
from mira.rewards.image_reward import image_reward_of
from mira.rewards.networks import clip_of, open_clip_layout, siglip_of, uses_quick_gelu
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def clip():
    return small.fill(small.open_clip_network().state_dict())


@pytest.fixture(scope="module")
def hf_clip():
    return small.fill(small.hf_clip_network().state_dict())


def whole(state):
    return {k: v.clone().contiguous() for k, v in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_formats_and_precisions(tmp_path, suffix, dtype):
    state, path = {k: v.to(dtype) for k, v in small.head_state(8).items()}, tmp_path / f"head{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    back = read(path)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    assert kind_of(back) is files.AESTHETIC_HEAD


def test_eight_bits(tmp_path):
    """Of which nothing can be asked but what they are in more."""
    state = {k: v.to(torch.float8_e4m3fn) for k, v in small.head_state(8).items()}
    save_file(state, tmp_path / "head.safetensors")
    assert kind_of(read(tmp_path / "head.safetensors")) is files.AESTHETIC_HEAD
    state["layers.0.bias"].view(torch.uint8).fill_(0x7F)  # NaN
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(files.WrongFile, match=r"holds NaN or infinite weights \(layers.0.bias\)"):
        read(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}, "optimizer": {"state": {}}},
    ],
)
def test_training_wrappers(tmp_path, wrap):
    state = small.head_state(8)
    torch.save(wrap(state), tmp_path / "head.pt")
    assert read(tmp_path / "head.pt").keys() == state.keys()


def test_shards(tmp_path):
    state = small.head_state(8)
    names = list(state)
    parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, keys in parts.items():
        save_file({k: state[k] for k in keys}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: f for f, keys in parts.items() for k in keys}}))
    back = read(index)
    assert all(torch.equal(back[k], state[k]) for k in state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WrongFile, match=r"names model-00002-of-00002.safetensors, which"):
        read(index)
    index.write_text("{}")
    with pytest.raises(WrongFile, match="needs a weight_map"):
        read(index)


def test_what_was_read_is_no_longer_the_file(tmp_path):
    """Written again in place, by a download, it would change under a scorer; cut short, it would end the process."""
    state, path = small.head_state(8), tmp_path / "head.safetensors"
    save_file(state, path)
    back = read(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    os.truncate(path, 8)
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(small.head_state(8), tmp_path / "secret.safetensors")
    index = inner / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.0.weight": "../secret.safetensors"}}))
    with pytest.raises(WrongFile, match="which inner lacks"):
        read(index)


def test_a_file_saved_on_a_gpu(tmp_path):
    """As the released head is: its storages say cuda:0, which is written into the pickle by hand here."""
    path = tmp_path / "head.pth"
    torch.save(small.head_state(8), path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert b"X\x03\x00\x00\x00cpu" in raw
    path.write_bytes(raw.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert read(path)["layers.0.weight"].device.type == "cpu"


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_a_pickle_that_needs_more_is_not_run(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": small.head_state(8), "config": Payload()}, path)
    with pytest.raises(
        WrongFile, match=r"(?s)needs more than weights.*could run a stranger's code.*weights_only=False"
    ):
        read(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(WrongFile):
        read(path)
    assert not Payload.ran


def test_a_torchscript_program_is_not_run(tmp_path):
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(WrongFile, match=r"TorchScript program.*clip-vit-large-patch14"):
        read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("keep", [0, 1, 40, 3000])
def test_truncated_files(tmp_path, suffix, keep):
    path = tmp_path / f"head{suffix}"
    save_file(small.head_state(8), path) if suffix == ".safetensors" else torch.save(small.head_state(8), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WrongFile, match="download it again"):
        read(path)


def test_nothing_there_and_nothing_in_it(tmp_path):
    with pytest.raises(WrongFile, match="is not there"):
        read(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WrongFile, match=r"holds no named weights .it is a list"):
        read(tmp_path / "list.pt")
    torch.save({0: torch.ones(2), 1: torch.ones(2)}, tmp_path / "numbers.pt")
    with pytest.raises(WrongFile, match=r"holds no named weights .it is a dict"):
        read(tmp_path / "numbers.pt")


def test_names_that_are_numbers_are_left_out(tmp_path):
    torch.save(small.head_state(8) | {7: torch.ones(2)}, tmp_path / "head.pt")
    assert read(tmp_path / "head.pt").keys() == small.head_state(8).keys()


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.ones(3, device="meta")])
def test_weights_that_are_not_stored_one_by_one(tmp_path, odd):
    torch.save(small.head_state(8) | {"layers.0.weight": odd}, tmp_path / "head.pt")
    with pytest.raises(WrongFile, match=r"head.pt holds weights that are sparse.*layers.0.weight|damaged"):
        read(tmp_path / "head.pt")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map": {"a": 5}}', '{"weight_map": [1]}', "[]"])
def test_an_index_that_is_none(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(WrongFile, match="is no index of shards"):
        read(index)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    state = small.head_state(8)
    state["layers.2.weight"][3, 4] = value
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(WrongFile, match=r"NaN or infinite weights \(layers.2.weight\)"):
        read(tmp_path / "head.safetensors")


def test_kinds_are_told_apart(clip, hf_clip):
    vision = {k: v for k, v in hf_clip.items() if k.startswith("vision") or k.startswith("visual")}
    text = {k: v for k, v in hf_clip.items() if k.startswith("text")}
    found = {
        "clip": clip, "hf": hf_clip, "vision": vision, "text": text, "head": small.head_state(8),
        "imagereward": small.image_reward_state(), "siglip": small.siglip_network().state_dict(),
        "checkpoint": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)},
        "vae": {"decoder.conv_in.weight": torch.zeros(1), "encoder.conv_in.weight": torch.zeros(1)},
        "nothing": {"x": torch.zeros(1)},
    }  # fmt: skip
    names = {k: kind_of(v) for k, v in found.items()}
    assert names["clip"] is files.OPEN_CLIP and names["hf"] is files.HF_CLIP
    assert names["vision"] is files.HF_CLIP_VISION and names["text"] is files.HF_CLIP_TEXT
    assert names["head"] is files.AESTHETIC_HEAD and names["imagereward"] is files.IMAGE_REWARD
    assert names["siglip"] is files.HF_SIGLIP and names["nothing"] is files.UNKNOWN
    assert names["checkpoint"].loader.startswith("Load Checkpoint") and names["vae"].loader.startswith("Load VAE")


def test_a_wrong_file_says_what_it_is_and_what_takes_it():
    with pytest.raises(WrongFile, match=r"x.pt is ImageReward, not a CLIP.*MIRA Load ImageReward takes it"):
        require(small.image_reward_state(), (files.OPEN_CLIP,), "x.pt", "MIRA Load HPS Reward")
    with pytest.raises(WrongFile, match=r"of an unknown kind \(it begins with x\)"):
        require({"x": torch.zeros(1)}, (files.OPEN_CLIP,), "x.pt", "MIRA Load HPS Reward")


def test_a_head_of_other_sizes():
    state = small.head_state(8)
    state["layers.4.weight"] = torch.zeros(64, 99)
    with pytest.raises(WrongFile, match="layers of sizes"):
        head_of(state, "x.pth")


@pytest.mark.parametrize("change", [{"layers.6.bias": None}, {"layers.0.weight": torch.ones(4)}])
def test_a_head_that_is_not_whole(change):
    state = {k: v for k, v in (small.head_state(8) | change).items() if v is not None}
    with pytest.raises(WrongFile, match=f"x.pth lacks {next(iter(change))}"):
        head_of(state, "x.pth")


def test_incomplete_networks(clip, hf_clip):
    path = Path("here/x.pt")
    without = {k: v for k, v in clip.items() if "resblocks.1.ln_1" not in k}
    with pytest.raises(WrongFile, match=r"ln_1.weight is missing"):
        clip_of(without, files.OPEN_CLIP, path)
    with pytest.raises(WrongFile, match="lacks text_projection"):
        clip_of({k: v for k, v in hf_clip.items() if k != "text_projection.weight"}, files.HF_CLIP, path)
    state = small.image_reward_state()
    state["blip.visual_encoder.norm.weight"] = torch.zeros(5)
    with pytest.raises(WrongFile, match=r"has shape \(5,\), where \(64,\) is needed"):
        image_reward_of(state, path)


def test_hugging_faces_layout_is_open_clips_under_other_names(hf_clip):
    laid = open_clip_layout(hf_clip)
    assert laid.keys() == small.open_clip_network().state_dict().keys()


def test_which_gelu(tmp_path, clip, hf_clip):
    path = tmp_path / "model.safetensors"
    assert not uses_quick_gelu(hf_clip, path, "ViT-H/14", 1280)
    assert uses_quick_gelu(hf_clip, path, "ViT-L/14", 1024)
    marked = {**clip, "input_resolution": torch.tensor(224)}
    assert uses_quick_gelu(marked, path, "ViT-B/32", 768)
    for of_it in ({}, {"hidden_size": 1024}):
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu"} | of_it}))
        assert not uses_quick_gelu(hf_clip, path, "ViT-L/14", 1024)
        assert uses_quick_gelu(marked, path, "ViT-L/14", 1024)
    for of_another in (
        {"model_type": "bert", "hidden_act": "gelu", "hidden_size": 1024},
        {"model_type": "clip", "vision_config": {"hidden_act": "gelu", "hidden_size": 1280}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(of_another))
        assert uses_quick_gelu(hf_clip, path, "ViT-L/14", 1024)
    for text, complaint in {
        "{": "is no JSON",
        "[" * 100_000: "is no JSON",
        "[1]": "is not a model's",
        '{"vision_config": 3}': "is not a model's",
    }.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WrongFile, match=complaint):
            uses_quick_gelu(hf_clip, path, "ViT-L/14", 1024)


def test_siglip_needs_its_tokenizer(tmp_path):
    state = small.siglip_network().state_dict()
    with pytest.raises(WrongFile, match="whose tokeniser is a file of its own"):
        siglip_of(state, files.HF_SIGLIP, tmp_path / "model.safetensors")
