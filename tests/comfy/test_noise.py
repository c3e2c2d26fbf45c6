"""Optimised noises, used again: the same image from ComfyUI's own sampler node, from a file, in other graphs."""

from __future__ import annotations

import json

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_tomesd as tomesd
import folder_paths
import pytest
import server
import torch
from comfy_execution.utils import CurrentNodeContext
from mira.rewards.pixel import PixelReward
from mira.sampler import replay
from safetensors.torch import load_file, save_file

from testing.networks import SMALL, random_unet, thin_vae
from testing.pack import as_node, mira
from testing.world import World

nodes, host = mira("nodes"), mira("nodes.host")
QUICK = dict(iterations=3, seeds=1, restart_every=0, stop="never", keep="last", drift_limit=0.0, learning_rate=0.05)


LATENT = torch.zeros(1, 4, 8, 8)
GIVEN = {
    "masked": {
        "samples": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8),
        "noise_mask": torch.nn.functional.pad(torch.ones(1, 1, 64, 32), (16, 16)),
    },
    "half": {"samples": torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)},
}


def stock(node, *inputs):
    """The outputs of one of ComfyUI's own nodes, of the older kind or the newer."""
    if hasattr(node, "PREPARE_CLASS_CLONE"):
        return as_node(node).execute(*inputs).args
    return getattr(node(), node.FUNCTION)(*inputs)


def optimized(world, latent=None, sampler="euler_ancestral", **values):
    """(optimized, plain, trace, noise, sampler), as the advanced node gives them."""
    latent = latent or {"samples": torch.zeros(1, 4, 8, 8)}
    noise = stock(custom.RandomNoise, 5)[0]
    return as_node(nodes.MiraOptimizeSamplerAdvanced).execute(
        noise=noise, guider=world.guider(), sampler=comfy.samplers.sampler_object(sampler),
        sigmas=world.sigmas(steps=4), latent_image=latent, vae=world.vae, reward=PixelReward("brightness"),
        **(QUICK | values),
    ).args  # fmt: skip


@torch.inference_mode()
def sampled(world, noise, sampler, latent=None, steps=4, guider=None):
    latent = latent or {"samples": torch.zeros(1, 4, 8, 8)}
    given = (noise, guider or world.guider(), sampler, world.sigmas(steps=steps), latent)
    return stock(custom.SamplerCustomAdvanced, *given)[0]["samples"]


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


@pytest.mark.every_host
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"restart_every": 2, "iterations": 6, "keep": "best_reward"},
        {"seeds": 3},
        {"learning_rate": 10.0, "keep": "best_within_drift", "drift_limit": 0.001, "hold": "no"},
        {"gradient_steps": 2, "sampler": "dpmpp_2m_sde"},
        {"sampler": "euler"},
        {"sampler": "ddim", "seeds": 3, "restart_every": 2, "iterations": 4, "latent": "masked"},
        {"restart_every": 2, "iterations": 4, "latent": "half"},
    ],
    ids=["once", "rounds", "seeds", "plain", "sde", "deterministic", "masked", "half"],
)
def test_the_stock_sampler_node_gives_the_same_bits(world, values):
    """Under a mask ddim noises what it leaves out by the sampler's seed."""
    values = dict(values)
    given = GIVEN.get(values.pop("latent", None))
    latent, plain, trace, noise, sampler = optimized(world, given, **values)
    assert torch.equal(sampled(world, noise, sampler, given), latent["samples"])
    assert torch.equal(latent["samples"], plain["samples"]) == (values.get("learning_rate") == 10.0)
    if "seeds" in values:
        settings = trace.settings
        assert trace.of(0)[0]["reward"] == pytest.approx(
            settings["seed_rewards"][0][settings["seed_chosen"][0]], abs=1e-4
        )
    assert any("the mask leaves out is noised by the given seed" in n for n in trace.notices) == (
        given is GIVEN["masked"]
    )


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heunpp2"])
def test_what_a_patch_draws_at_random_is_drawn_again(monkeypatch, sampler):
    """By the seed that the noise was made of, as behind RandomNoise; and by a restart's own in that."""
    at_full_size = SMALL | {"num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4}
    merged = stock(tomesd.TomePatchModel, random_unet(at_full_size, torch.float32), 0.5)[0]
    noise, stocks = stock(custom.RandomNoise, 5)[0], comfy.samplers.sampler_object(sampler)
    world = World(side=8, model=merged, vae=thin_vae())
    latent, plain, trace, *again = optimized(world, sampler=sampler, seeds=2, restart_every=2, iterations=4)
    assert torch.equal(sampled(world, noise, stocks), plain["samples"])
    assert any("draws at random" in notice for notice in trace.notices)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert torch.equal(sampled(world, *again), latent["samples"])
    monkeypatch.setattr(host.replay, "seed_generators", lambda *_: torch.manual_seed(1))
    assert not torch.equal(sampled(world, *again), latent["samples"])  # the patch does draw


def test_as_ksampler_a_run_gives_latents_in_the_hosts_precision(world, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "intermediate_dtype", lambda: torch.float16, raising=False)
    given = dict(
        seed=3,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        steps=2,
        reward=PixelReward("brightness"),
    )
    given |= dict(model=world.model, positive=world.positive, negative=world.negative, vae=world.vae)
    given |= dict(preset="custom")
    out = as_node(nodes.MiraOptimizeKSampler).execute(latent_image={"samples": LATENT}, **(QUICK | given)).args
    assert out[0]["samples"].dtype == out[1]["samples"].dtype == torch.float16
    assert optimized(world)[0]["samples"].dtype == torch.float32  # as SamplerCustomAdvanced


def test_every_image_of_a_batch_by_its_own_way_and_within_a_mask(world):
    given = {"samples": torch.linspace(-1, 1, 512).reshape(2, 4, 8, 8), "noise_mask": torch.zeros(1, 1, 64, 64)}
    given["noise_mask"][..., 32:] = 1
    latent, _, trace, noise, sampler = optimized(world, given, restart_every=2, iterations=4, keep="best_reward")
    assert len(trace.kept) == 2
    assert torch.equal(sampled(world, noise, sampler, given), latent["samples"])


def test_an_inpainting_model_is_shown_what_was_restarted_here_too():
    model = random_unet(SMALL | {"in_channels": 9})
    model.model.set_inpaint()
    world = World(side=8, model=model, vae=thin_vae())
    given = {"samples": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), "noise_mask": torch.ones(1, 1, 64, 64)}
    given["noise_mask"][..., 32:] = 0
    latent, plain, _, noise, sampler = optimized(world, given, restart_every=1, iterations=2, restart_denoise=0.6)
    assert len(noise.segments) == 2 and not torch.equal(latent["samples"], plain["samples"])
    assert torch.equal(sampled(world, noise, sampler, given), latent["samples"])


def test_kernels_that_heed_no_option_are_those_of_the_run(world, monkeypatch):
    """Some models call the attention function that they imported, without the options."""
    attention = comfy.ldm.modules.attention

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        return self.to_out(attention.optimized_attention(q, k, v, self.heads))

    exact = attention.attention_pytorch
    monkeypatch.setattr(attention.CrossAttention, "forward", forward)
    monkeypatch.setattr(
        attention, "optimized_attention", lambda q, k, v, *more, **kw: exact(q, k, 1.001 * v, *more, **kw)
    )
    latent, _, _, noise, sampler = optimized(world)
    assert torch.equal(sampled(world, noise, sampler), latent["samples"])


def test_a_round_that_is_not_kept_is_left_out(world):
    """What a restart gave away comes back from before it."""
    latent, _, trace, noise, sampler = optimized(
        world, restart_every=2, iterations=4, keep="best_reward", restart_denoise=1.0, learning_rate=0.2
    )
    first = [row["iteration"] for row in trace.rows if row["round"] == 1]
    assert (trace.kept[0] in first) == (len(noise.segments) == 1)
    assert torch.equal(sampled(world, noise, sampler), latent["samples"])


def test_saved_and_loaded_it_is_the_same(world, output, caplog, sent):
    latent, _, trace, noise, sampler = optimized(world, restart_every=2, iterations=4)
    ui = as_node(nodes.MiraSaveNoise).execute(noise, sampler, "mira_noise/fox").ui
    assert ui["mira_text"] == ["saved mira_noise/fox_00001_.safetensors in the output folder"]
    assert [p.name for p in (output / "mira_noise").iterdir()] == ["fox_00001_.safetensors"]
    file = "mira_noise/fox_00001_.safetensors [output]"
    assert file in nodes.MiraLoadNoise.GET_SCHEMA().inputs[0].options
    again, with_noises, settings = nodes.MiraLoadNoise.execute(file).args
    assert torch.equal(sampled(world, again, with_noises), latent["samples"])
    assert json.loads(settings)["settings"]["reward"] == trace.settings["reward"]
    # One that the list has no more, by its name.
    named = dict(file=mira("nodes.noise").NO_FILE, path=file.removesuffix(" [output]"))
    assert nodes.MiraLoadNoise.validate_inputs(**named) is True and nodes.MiraLoadNoise.fingerprint_inputs(**named)
    assert json.loads(nodes.MiraLoadNoise.execute(**named).args[2]) == json.loads(settings)
    assert not caplog.text
    # The same shape is no proof of the same model.
    assert json.loads(settings)["family"] == "DemoSD15"
    with_noises.family = "SDXL"
    with CurrentNodeContext("a prompt", "7"):
        sampled(world, again, with_noises)
    assert "it was made for SDXL, and this model is DemoSD15" in caplog.text
    texts = [what for kind, what, _ in sent() if kind == server.BinaryEventTypes.TEXT]
    assert len(texts) == 1 and b"7MIRA noise: it was made for SDXL" in texts[0]
    # Another sampler in its place, by the hand of whoever loads it.
    other = nodes.MiraLoadNoise.execute(file, comfy.samplers.sampler_object("euler_ancestral")).args[1]
    assert torch.equal(sampled(world, again, other), latent["samples"])


@pytest.mark.parametrize("steps", [3, 8])
def test_another_number_of_steps_and_another_prompt(world, steps):
    latent, _, _, noise, sampler = optimized(world, restart_every=2, iterations=4)
    found = sampled(world, noise, sampler, steps=steps)
    assert torch.isfinite(found).all() and found.shape == latent["samples"].shape
    other = world.guider(positive=world.encode("a car"))
    assert not torch.equal(sampled(world, noise, sampler, guider=other), latent["samples"])


def test_optimised_on_from_there(world):
    _, _, trace, noise, sampler = optimized(world)
    given = dict(
        guider=world.guider(), sigmas=world.sigmas(steps=4), latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        vae=world.vae, reward=PixelReward("brightness"), **QUICK,
    )  # fmt: skip
    node, stock_sampler = as_node(nodes.MiraOptimizeSamplerAdvanced), comfy.samplers.sampler_object("euler_ancestral")
    again = node.execute(noise=noise, sampler=stock_sampler, **given).args[2]
    assert again.rows[0]["reward"] > trace.rows[0]["reward"]
    with pytest.raises(ValueError, match="it gives noises that were found before: connect the stock sampler"):
        node.execute(noise=noise, sampler=sampler, **given)


@pytest.mark.parametrize(("sampler", "at"), [("euler_ancestral", 1), ("euler_ancestral", 3), ("dpmpp_sde", 2)])
def test_split_sigmas_give_the_whole(world, sampler, at):
    """The first half ends in no image and is not restarted; the second goes on with its own noises and is."""
    latent, _, _, noise, replayed = optimized(world, sampler=sampler, restart_every=2, iterations=4)
    assert len(noise.segments) == 2
    sigmas, given = world.sigmas(steps=4), {"samples": torch.zeros(1, 4, 8, 8)}
    with torch.inference_mode():
        half = stock(custom.SamplerCustomAdvanced, noise, world.guider(), replayed, sigmas[: at + 1], given)[0]
        none = stock(custom.DisableNoise)[0]
        whole = stock(custom.SamplerCustomAdvanced, none, world.guider(), replayed, sigmas[at:], half)[0]
    torch.testing.assert_close(whole["samples"], latent["samples"], rtol=1e-3, atol=1e-4)  # scaled between the two
    assert not torch.allclose(half["samples"], latent["samples"], atol=0.1)


def test_bad_input(world, output, monkeypatch):
    _, _, _, noise, sampler = optimized(world)
    _, _, _, other, _ = optimized(world, learning_rate=0.01)
    with pytest.raises(ValueError, match=r"for latents of shape .1, 4, 8, 8., but latent_image has .1, 4, 16, 16."):
        sampled(world, noise, sampler, {"samples": torch.zeros(1, 4, 16, 16)})
    with pytest.raises(ValueError, match="noises of 1 images, but there are 2"):
        two = stock(custom.RandomNoise, 1)[0]
        sampled(world, two, sampler, {"samples": torch.zeros(2, 4, 8, 8)})
    with pytest.raises(ValueError, match=r"noises of shape .4, 8, 8., but the latent is .4, 12, 8."):
        sampled(world, two, sampler, {"samples": torch.zeros(1, 4, 12, 8)})
    with pytest.raises(ValueError, match="MIRA Save Noise: noise and sampler are of two runs"):
        as_node(nodes.MiraSaveNoise).execute(other, sampler, "x")
    with pytest.raises(ValueError, match="MIRA Save Noise: noise is no optimised one"):
        as_node(nodes.MiraSaveNoise).execute(stock(custom.RandomNoise, 1)[0], sampler, "x")
    with pytest.raises(ValueError, match=r"MIRA Load Noise: \.\./x.safetensors .output. lies outside"):
        nodes.MiraLoadNoise.execute("../x.safetensors [output]")
    with pytest.raises(OSError, match=r"MIRA Save Noise: filename_prefix '\.\./x' cannot be written"):
        as_node(nodes.MiraSaveNoise).execute(noise, sampler, "../x")

    with pytest.raises(OSError, match=r"MIRA Save Noise: filename_prefix 'xxx.*cannot be written"):
        as_node(nodes.MiraSaveNoise).execute(noise, sampler, "x" * 300)
    with pytest.raises(OSError, match=r"MIRA Save Noise: filename_prefix 'x.x00y' cannot be written"):
        as_node(nodes.MiraSaveNoise).execute(noise, sampler, "x\0y")

    def full(half, *_):
        half.write_bytes(b"a part")
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"MIRA Save Noise: .*no space left"):
        patch.setattr(replay, "save", full)
        as_node(nodes.MiraSaveNoise).execute(noise, sampler, "x")
    assert not list(output.glob("x*"))
    as_node(nodes.MiraSaveNoise).execute(noise, sampler, "x")
    file, path = "x_00001_.safetensors [output]", output / "x_00001_.safetensors"
    tensors, whole = {k: v.clone() for k, v in load_file(path).items()}, path.read_bytes()
    segments, facts = replay.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"MIRA Load Noise: x_00001_.safetensors cannot be read"):
        nodes.MiraLoadNoise.execute(file)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="holds no MIRA noise"):
        nodes.MiraLoadNoise.execute(file)
    replay.save(path, segments, facts | {"sampler": {"name": "of_another_pack"}})
    with pytest.raises(ValueError, match="its sampler is 'of_another_pack', which this ComfyUI does not have"):
        nodes.MiraLoadNoise.execute(file)
    replay.save(path, segments, facts | {"seed": "many"})
    with pytest.raises(ValueError, match="is damaged: it names no seed"):
        nodes.MiraLoadNoise.execute(file)
    about = {"format": "1", "denoise": [1.0, 0.5], "facts": {}}
    save_file(tensors, path, {"mira_noise": json.dumps(about)})
    with pytest.raises(ValueError, match="is damaged"):
        nodes.MiraLoadNoise.execute(file)


GOLDEN = mira("sampler.golden")


@pytest.fixture
def npnet(tmp_path, monkeypatch):
    """The name of a small file in models/npnets, in the published layout."""
    torch.manual_seed(0)
    net = GOLDEN.GoldenNoise(8, 77 * 64, hidden=16, width=32, depths=(1, 1, 1, 1), classes=2).eval()
    state = net.state_dict()
    parts = {p: {k.removeprefix(f"{p}."): v for k, v in state.items() if k.startswith(f"{p}.")}
             for p in ("unet_svd", "unet_embedding", "text")}  # fmt: skip
    parts["embeeding"] = parts.pop("text")
    torch.save(parts | {"alpha": torch.tensor(1.0), "beta": torch.tensor(0.1)}, tmp_path / "sdxl.pth")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "npnets", ([str(tmp_path)], {".pth"}))
    return "sdxl.pth"


@torch.inference_mode()
def golden(file, prompt, seed=5):
    return as_node(nodes.MiraGoldenNoise).execute(file, [[prompt, {}]], seed).args[0]


def test_golden_noise_is_a_noise_of_a_seed_and_a_prompt(world, npnet):
    prompt = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0))
    noise, latent = golden(npnet, prompt), {"samples": torch.zeros(2, 4, 8, 8)}
    plain = stock(custom.RandomNoise, 5)[0].generate_noise(latent)
    with torch.inference_mode():
        first = noise.generate_noise(latent)
    again, other = golden(npnet, prompt).generate_noise(latent), golden(npnet, -prompt).generate_noise(latent)
    assert first.shape == plain.shape and first.device == plain.device and torch.equal(first, again)
    assert not torch.equal(first, plain) and not torch.equal(first, other)
    picked = noise.generate_noise(latent | {"batch_index": [1, 0]})
    torch.testing.assert_close(picked, first.flip(0), atol=1e-4, rtol=1e-3)
    image = sampled(world, noise, comfy.samplers.sampler_object("euler_ancestral"))
    assert torch.isfinite(image).all()


def test_an_optimisation_begins_from_golden_noises_of_its_seeds(world, npnet):
    noise = golden(npnet, torch.randn(1, 77, 64))
    out = as_node(nodes.MiraOptimizeSamplerAdvanced).execute(
        noise=noise, guider=world.guider(), sampler=comfy.samplers.sampler_object("euler_ancestral"),
        sigmas=world.sigmas(steps=3), latent_image={"samples": torch.zeros(1, 4, 8, 8)}, vae=world.vae,
        reward=PixelReward("brightness"), **QUICK | {"seeds": 2, "iterations": 1},
    ).args  # fmt: skip
    assert len(out[2].settings["seed_rewards"][0]) == 2 and out[2].rows[-1]["reward"] > out[2].rows[0]["reward"]


def test_golden_noise_refuses_what_it_was_not_trained_for(npnet):
    small = golden(npnet, torch.randn(1, 77, 64))
    with pytest.raises(ValueError, match=r"MIRA Golden Noise: golden noise was trained for latents of 4 x 8 x 8"):
        small.generate_noise({"samples": torch.zeros(1, 4, 8, 16)})
    with pytest.raises(ValueError, match=r"MIRA Golden Noise: golden noise was trained for prompts of"):
        golden(npnet, torch.randn(1, 154, 64)).generate_noise({"samples": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(ValueError, match=r"MIRA Golden Noise: none\.pth is not in .*models/npnets.*into models/npnets"):
        golden("none.pth", torch.randn(1, 77, 64))
    with pytest.raises(ValueError, match="MIRA Golden Noise: positive is empty"):
        as_node(nodes.MiraGoldenNoise).execute(npnet, [], 5)
    said = nodes.MiraGoldenNoise.validate_inputs("none.pth")
    assert "Klayand/GoldenNoiseModel" in said and nodes.MiraGoldenNoise.validate_inputs(npnet) is True
