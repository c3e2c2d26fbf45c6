"""The Drift Monitor and the record's travels."""

from __future__ import annotations

import json
import math
import os

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from testing.pack import as_node, mira

nodes, monitor, record = mira("nodes"), mira("nodes.monitor"), mira("nodes.record")
host = mira("nodes.host")
MOST_LISTED = mira("nodes.shared.made").MOST_LISTED
on_disk = mira("nodes.editor.on_disk")
Trace = mira("sampler.trace").Trace
PixelReward = mira("rewards.pixel").PixelReward
PROMPT = "generate an image of a fox"


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    before = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    folder_paths.set_input_directory(str(tmp_path_factory.mktemp("input")))
    yield
    folder_paths.set_output_directory(before[0])
    folder_paths.set_input_directory(before[1])


@torch.inference_mode()
def execute(node, **inputs):
    return as_node(node).execute(**inputs)


def watch(**inputs):
    return execute(nodes.MiraDriftMonitor, **({"drift_metric": "path_kl", "filename_prefix": "mira/test"} | inputs))


@pytest.fixture(scope="module")
def decode(demo_vae):
    def images(latent):
        with torch.inference_mode():
            return demo_vae.decode(latent)

    return images


@pytest.fixture(scope="module")
def runs(world, demo_model, demo_vae):
    """One that stays near, and one that is driven to white: of a picture, as the verdict is about prompts."""
    options = dict(
        steps=6, reward=PixelReward("brightness"), regularizer="none", beta=0.0, memory="none", gradient_steps=3,
        model=demo_model, vae=demo_vae, latent=torch.zeros(1, 4, 16, 16),
    )  # fmt: skip
    return {
        "near": world.optimize(**options, iterations=2, lr=0.005),
        "white": world.optimize(**options, iterations=4, lr=0.3),
    }


@pytest.fixture(scope="module")
def base(world, demo_model, decode):
    latent = torch.zeros(8, 4, 16, 16)
    return decode(world.ksampler(model=demo_model, steps=6, seed=123, latent=latent))


def test_every_image_is_compared_with_its_own_prompt(world):
    """As it was scored: read without what only a tokenizer reads, one line for each image of a batch of prompts."""
    clip = execute(nodes.MiraDemoCLIPScore).args[0]
    positive = world.encode_batch(["a fox", "a whale"])
    with torch.inference_mode():
        job = world.job(
            positive=positive, batch=2, steps=2, iterations=1, reward=clip, prompts=["a fox", "a whale"], keep="last"
        )
        done = host.run(job)
        images = host.decode(world.vae, done.latent).movedim(1, 3)
    shown = watch(trace_1=done.result.trace, images_1=images, clip=clip)
    kept = [done.result.trace.of(b)[-1]["reward"] for b in range(2)]
    assert shown.args[5] == pytest.approx([sum(kept) / 2], abs=0.05)
    given = [
        watch(trace_1=done.result.trace, images_1=images, clip=clip, prompt=p).args[5] for p in ("a fox", "(a fox:1.2)")
    ]
    assert given[0] == given[1] != shown.args[5]


def test_a_verdict_by_the_base_models_own_spread(runs, decode, base):
    clip = execute(nodes.MiraDemoCLIPScore).args[0]
    out = watch(
        trace_1=runs["near"].result.trace, trace_2=runs["white"].result.trace, images_1=decode(runs["near"].latent),
        images_2=decode(runs["white"].latent), base_images=base, clip=clip, prompt=PROMPT,
    )  # fmt: skip
    near, white = out.args[2].splitlines()
    assert "drift within the base model's own seed-to-seed spread" in near and "hacked" not in near
    assert "hacked: reward +" in white
    gain, drift, scores = out.args[3:6]
    assert gain[1] > gain[0] > 0 and drift[1] > drift[0] and scores[1] < scores[0]
    assert "at equal drift" in out.args[1]


def test_a_batch_whose_images_are_alike_is_told_from_one_that_varies(base):
    rows = [{"iteration": 0, "image": b, "reward": 0.5, "path_kl": 0.0} for b in range(4)]
    trace = Trace({}, rows, [0] * 4, ["done"] * 4)
    clip = execute(nodes.MiraDemoCLIPScore).args[0]
    table = watch(
        trace_1=trace, trace_2=trace, images_1=base[:4], images_2=base[:1].expand(4, -1, -1, -1), base_images=base,
        clip=clip,
    ).args[1]  # fmt: skip
    values = next(line.split() for line in table.splitlines() if "spectral_distance" in line)[1:]
    assert [float(v) for v in values] == [0, 1]


def test_the_plot_is_an_image(runs):
    (plot,) = watch(trace_1=runs["white"].result.trace).args[:1]
    assert plot.shape == (1, 400, 1680, 3) and plot.min() >= 0 and plot.max() <= 1
    assert plot.std() > 0.05
    os.makedirs("output/screenshots", exist_ok=True)
    Image.fromarray((plot[0].numpy() * 255).astype(np.uint8)).save("output/screenshots/monitor.png")


def test_only_the_newest_files_are_listed_and_any_can_be_named(tmp_path, monkeypatch):
    """`/object_info` is asked for whenever a page is loaded."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    (tmp_path / "day").mkdir()
    for n in range(MOST_LISTED + 20):
        (tmp_path / "day" / f"{n:04}.png").touch()
        os.utime(tmp_path / "day" / f"{n:04}.png", (n, n))
    listed = [f for f in record.trace_files() if f.endswith("[output]")]
    assert len(listed) == MOST_LISTED and listed[0] == f"day/{MOST_LISTED + 19:04}.png [output]"
    assert record.trace_path("day/0000.png [output]") == str(tmp_path / "day" / "0000.png")


def test_folders_that_have_not_changed_are_not_looked_into_again(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    walks, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda *args: walks.append(1) or walk(*args))

    def listed():
        return [f for f in record.trace_files() if f.endswith("[output]")]

    def settle():
        for folder in (tmp_path / "day", tmp_path):
            os.utime(folder, (1, 1))

    (tmp_path / "day").mkdir()
    (tmp_path / "day" / "1.png").touch()
    assert listed() == listed() == ["day/1.png [output]"] and len(walks) == 2  # it is new, and may change unseen
    settle()
    assert listed() == listed() == ["day/1.png [output]"] and len(walks) == 3
    (tmp_path / "day" / "2.png").touch()
    assert len(listed()) == 2 and len(walks) == 4
    settle()
    assert len(listed()) == 2
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "3.png").touch()
    assert len(listed()) == 3
    settle()
    os.utime(tmp_path / "night", (1, 1))
    assert len(listed()) == 3
    (tmp_path / "night" / "3.png").unlink()
    assert len(listed()) == 2


def test_files_are_written_and_read_back(runs):
    trace = runs["near"].result.trace
    watch(trace_1=trace, filename_prefix="mira/back")
    listed = [f for f in record.trace_files() if "back" in f]
    assert {f.split(".")[-1] for f in listed} == {"csv [output]", "json [output]"}
    for file in listed:
        back = execute(nodes.MiraLoadTrace, file=file, index=0).args[0]
        assert [r["reward"] for r in back.rows] == pytest.approx([r["reward"] for r in trace.rows])
        watch(trace_1=back)


def test_an_output_folder_that_cannot_be_written_costs_no_verdict(runs, tmp_path, monkeypatch):
    (tmp_path / "mira").touch()  # a file in the way
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    out = watch(trace_1=runs["near"].result.trace, filename_prefix="mira/x")
    assert "not written: " in out.ui["mira_text"][0] and out.args[0].ndim == 4


def test_nor_does_a_name_that_is_too_long(runs):
    out = watch(trace_1=runs["near"].result.trace, filename_prefix="mira/" + "x" * 400)
    assert "not written: " in out.ui["mira_text"][0] and out.args[0].ndim == 4


def test_a_png_carries_the_record(world, tmp_path):
    extra = {}
    on_disk.travel(extra, "7", world.optimize(steps=2, iterations=2).result.trace)
    info = PngImagePlugin.PngInfo()
    for key, value in extra.items():  # as ComfyUI's Save Image does
        info.add_text(key, json.dumps(value))
    path = os.path.join(folder_paths.get_input_directory(), "kept.png")
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    trace = execute(nodes.MiraLoadTrace, file="kept.png", index=0).args[0]
    assert len(trace.rows) == 3
    with pytest.raises(ValueError, match="it carries 1 record"):
        execute(nodes.MiraLoadTrace, file="kept.png", index=1)


def put(name, content):
    path = os.path.join(folder_paths.get_input_directory(), name)
    with open(path, "wb") as file:
        file.write(content)
    return name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "a.json cannot be read"),
        ("b.json", b'{"version": 99, "rows": []}', "not a MIRA trace of version 1 .found 99."),
        ("c.csv", b"iteration,image,reward\n0,0", "cannot be read"),
        ("d.csv", b"x,y\n1,2\n", "needs the columns iteration and image"),
        ("e.png", b"\x89PNG\r\n\x1a\n", "cannot be read"),
        ("f.json", b"3", "where its record should be is a int"),
        ("g.json", b'\xef\xbb\xbf{"version": 99, "rows": []}', "not a MIRA trace of version 1"),
    ],
)
def test_damaged_files(name, content, message):
    with pytest.raises(ValueError, match=f"MIRA Load Trace: .*{message}"):
        execute(nodes.MiraLoadTrace, file=put(name, content), index=0)


def test_a_png_without_a_record():
    path = os.path.join(folder_paths.get_input_directory(), "plain.png")
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match="it carries no MIRA record"):
        execute(nodes.MiraLoadTrace, file="plain.png", index=0)
    assert "is not there" in nodes.MiraLoadTrace.validate_inputs(file="nothing.png")


def test_a_picture_that_is_too_large_to_open(monkeypatch):
    Image.new("RGB", (8, 8)).save(os.path.join(folder_paths.get_input_directory(), "huge.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"MIRA Load Trace: huge.png cannot be read: it is too large a picture"):
        execute(nodes.MiraLoadTrace, file="huge.png", index=0)


def test_a_path_counts_instead_of_the_list(tmp_path, monkeypatch):
    """The list has no more than the newest ones."""
    folders = {name: tmp_path / name for name in ("input", "output")}
    for reward, (name, folder) in enumerate(folders.items()):
        (folder / "mira").mkdir(parents=True)
        (folder / "mira" / "old.csv").write_text(f"iteration,image,reward\n0,0,{reward}\n")
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=folder: str(folder))
    load = nodes.MiraLoadTrace
    inside = str(folders["output"] / "mira" / "old.csv")
    for path, reward in {
        "mira/old.csv": 1,
        " mira/old.csv [output]\n": 1,
        "mira/old.csv [input]": 0,
        inside: 1,
        f'"{inside}"': 1,
        "": 0,
    }.items():
        file = record.NO_FILE if path else "mira/old.csv"
        assert load.validate_inputs(file=file, path=path) is True
        assert execute(load, file=file, index=0, path=path).args[0].rows[0]["reward"] == reward
        assert load.fingerprint_inputs(file, 0, path) != ""
    # By a link, it is not known before it runs.
    assert load.validate_inputs(file=record.NO_FILE, path=None) is True
    assert math.isnan(load.fingerprint_inputs(record.NO_FILE, 0, None))
    assert math.isnan(load.fingerprint_inputs(None, 0, "")) and math.isnan(load.fingerprint_inputs(None, 0))
    for path in ("mira/older.csv", "../secret.csv", "/etc/passwd"):
        assert isinstance(load.validate_inputs(file="mira/old.csv", path=path), str)
        assert load.fingerprint_inputs("mira/old.csv", 0, path) == ""
        with pytest.raises(ValueError, match=r"MIRA Load Trace: .*(is not there|lies outside)"):
            execute(load, file="mira/old.csv", index=0, path=path)


def test_nothing_outside_comfyuis_folders_is_opened(tmp_path, monkeypatch):
    folder = tmp_path / "input"
    (folder / "deep").mkdir(parents=True)
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(folder))
    outside = tmp_path / "outside.csv"
    outside.write_text("iteration,image,reward\n0,0,TOPSECRET\n")
    (folder / "link.csv").symlink_to(outside)
    os.mkfifo(folder / "pipe.csv")
    (folder / "large.json").touch()
    os.truncate(folder / "large.json", record.MOST_BYTES + 1)
    (folder / "inside.csv").write_text(outside.read_text())
    (folder / "notes.txt").write_text("TOPSECRET")
    for file, message in {
        "../outside.csv": "lies outside",
        str(outside): "lies outside",
        f"../../{outside.name} [output]": "lies outside",
        "/dev/zero": "lies outside",
        "link.csv": "lies outside",
        "pipe.csv": "no regular file",
        "deep/../pipe.csv": "no regular file",
        "large.json": "larger than 100 MiB",
        "notes.txt": "is none of .png",
        "inside.csv": "is no number",
    }.items():
        if file != "inside.csv":
            assert message in nodes.MiraLoadTrace.validate_inputs(file=file)
            assert nodes.MiraLoadTrace.fingerprint_inputs(file, 0) == ""
        with pytest.raises(ValueError, match=f"MIRA Load Trace: .*{message}") as told:
            execute(nodes.MiraLoadTrace, file=file, index=0)
        assert "TOPSECRET" not in str(told.value)


def test_bad_input(runs, decode, base):
    trace, clip = runs["near"].result.trace, execute(nodes.MiraDemoCLIPScore).args[0]
    for inputs, message in [
        (dict(trace_1="x"), "trace_1 is a str"),
        (dict(trace_1=Trace()), "trace_1 is an empty trace"),
        (dict(trace_1=trace, images_1=torch.rand(3, 8, 8, 3)), "images_1 has 3 image.s., but trace_1 is of 1"),
        (dict(trace_1=trace, images_2=torch.rand(1, 8, 8, 3)), "images_2 is connected without trace_2"),
        (dict(trace_1=trace, base_images=base), "base_images needs a clip"),
        (dict(trace_1=trace, base_images=base[:1], clip=clip), "base_images: the spread of 1 image.s. says nothing"),
        (dict(trace_1=trace, clip=PixelReward("brightness")), "clip is brightness, which has no CLIP"),
    ]:
        with pytest.raises(ValueError, match=f"Drift Monitor: {message}"):
            watch(**inputs)


def test_without_a_base_there_is_no_verdict(runs):
    out = watch(trace_1=runs["near"].result.trace)
    assert "no verdict without base_images" in out.args[2] and math.isnan(out.args[6][0])
    assert out.ui["mira_text"][0].startswith(out.args[2])


def test_noise_that_is_no_longer_typical_is_told(runs):
    rows = monitor.noise_warnings(runs["white"].result.trace)
    assert any("norm" in r or "mean" in r or "whiteness" in r for r in rows)
    plain = runs["near"].result.trace.settings["noise_statistics"]
    assert all(plain["expected"][n][0] <= v[0] <= plain["expected"][n][1] for n, v in plain["plain"].items())
