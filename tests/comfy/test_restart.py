"""Rounds of optimising and restarting on a real ComfyUI: a restart is what KSampler's denoise gives."""

from __future__ import annotations

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch

from testing.networks import SMALL, random_unet, thin_vae, with_control
from testing.pack import as_node, mira
from testing.world import World

nodes = mira("nodes")
PixelReward = mira("rewards.pixel").PixelReward

SETTINGS = dict(
    iterations=2, learning_rate=0.02, regularizer="none", beta=0.0, keep="last", drift_limit=0.0, stop="never",
    patience=3, memory="auto", drift_metric="path_kl", optimizer="adamw", clip_norm=1.0, weighting="marginal",
    measured="guided", prompt="",
)  # fmt: skip
TWO = dict(iterations=2, restart_every=1, restart_denoise=0.6, steps=3)


def execute(node, **inputs):
    with torch.inference_mode():
        return as_node(node).execute(**inputs)


def optimize(world, **changes):
    inputs = SETTINGS | dict(
        model=world.model, positive=world.positive, negative=world.negative, vae=world.vae, seed=1, cfg=5.0,
        sampler_name="euler_ancestral", scheduler="normal", denoise=1.0, reward=PixelReward("brightness"),
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
    )  # fmt: skip
    return execute(nodes.MiraOptimizeKSampler, **inputs | changes)


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


class Noise:
    """As RandomNoise's."""

    seed, scale = 1, 1.0

    def generate_noise(self, latent):
        return self.scale * comfy.sample.prepare_noise(latent["samples"], self.seed)


class Nothing(Noise):
    scale = 0.0


def advanced(world, noise, **changes):
    inputs = SETTINGS | dict(
        noise=noise, guider=world.guider(), sampler=comfy.samplers.sampler_object("euler_ancestral"),
        sigmas=world.sigmas(steps=4), latent_image={"samples": torch.randn(1, 4, 8, 8)}, vae=world.vae,
        reward=PixelReward("brightness"), restart_every=1,
    )  # fmt: skip
    return execute(nodes.MiraOptimizeSamplerAdvanced, **inputs | changes)


def rows_of(out):
    return out.args[2].of(0)


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("sampler", "cfg", "control"),
    [
        ("euler_ancestral", 5.0, False), ("euler", 5.0, False), ("dpmpp_2m_sde", 5.0, False),
        ("euler_ancestral", 1.0, False), ("euler_ancestral", 5.0, True),
    ],
)  # fmt: skip
def test_a_restart_is_what_a_stock_ksampler_gives(world, sampler, cfg, control):
    """The recipe: the image of iteration 1 into a KSampler with denoise 0.6 and the seed that the record names."""
    positive = with_control(world) if control else world.positive
    how = TWO | dict(sampler_name=sampler, cfg=cfg, positive=positive)
    last, again = (optimize(world, **how, iterate=k) for k in (1, 2))
    (seed,) = again.args[2].settings["restart_seeds"]
    latent = last.args[0]["samples"]
    with torch.inference_mode():
        stock = comfy.sample.sample(
            world.model, comfy.sample.prepare_noise(latent, seed), 3, cfg, sampler, "normal", positive,
            world.negative, latent, denoise=0.6, disable_pbar=True, seed=seed,
        )  # fmt: skip
    torch.testing.assert_close(again.args[0]["samples"], stock, atol=2e-3, rtol=1e-3)
    assert [(r["iteration"], r["round"]) for r in rows_of(again)] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    assert rows_of(again)[2]["path_kl"] == 0 and rows_of(again)[2]["level"] < rows_of(again)[0]["level"]


def test_an_inpainting_model_is_shown_the_image_that_is_restarted():
    """By Set Latent Noise Mask, with which the latent image itself is what the network sees beside the mask."""
    model = random_unet(SMALL | {"in_channels": 9})
    model.model.set_inpaint()
    world = World(side=8, model=model, vae=thin_vae())
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    given = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), "noise_mask": mask}
    how = TWO | dict(sampler_name="euler", scheduler="normal", latent_image=given, learning_rate=0.1)
    last, again = (optimize(world, **how, iterate=k) for k in (1, 2))
    (seed,) = again.args[2].settings["restart_seeds"]
    latent = last.args[0]["samples"]
    stock = world.ksampler(sampler="euler", steps=3, latent=latent, mask=mask, seed=seed, denoise=0.6)
    torch.testing.assert_close(again.args[0]["samples"], stock, atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_the_best_of_all_rounds(world):
    out = optimize(world, **TWO | {"iterations": 4, "restart_every": 2}, keep="best_reward", seed=5)
    again = optimize(
        world,
        **TWO | {"iterations": 4, "restart_every": 2},
        keep="best_reward",
        seed=5,
        iterate=-1,
        reward=PixelReward("brightness"),
    )
    assert torch.equal(out.args[0]["samples"], again.args[0]["samples"])
    rewards = [r["reward"] for r in rows_of(out)]
    assert len(rewards) == 6 and out.args[2].kept == [rewards.index(max(rewards))]
    other = optimize(world, **TWO | {"iterations": 4, "restart_every": 2}, keep="best_reward", seed=6)
    assert other.args[2].settings["restart_seeds"] != out.args[2].settings["restart_seeds"]


def test_a_batch_with_seeds_a_held_drift_and_the_gradient_of_the_last_steps(world):
    out = optimize(
        world, latent_image={"samples": torch.zeros(3, 4, 8, 8)}, seeds=2, hold="projection", drift_limit=0.01,
        drift_metric="path_kl", keep="best_within_drift", gradient_steps=2,
        **TWO | {"iterations": 6, "restart_every": 2},
    )  # fmt: skip
    trace = out.args[2]
    assert out.args[0]["samples"].shape == (3, 4, 8, 8)
    assert all(r["path_kl"] <= 0.01 for r in trace.rows)
    assert {r["round"] for r in trace.of(2)} == {1, 2, 3} and len(trace.settings["seeds_begun_from"]) == 3


def test_decoding_keeps_as_little_as_the_round_that_runs(world):
    """Memory that runs out in a later round is met by decoder and reward, too."""
    seen = []

    def rounds(process, noises):
        x0 = process.rollout(noises).x0
        for number in (1, 2):
            stretch = process.restart(number, x0)
            seen.append(process.scoring.policy is stretch.rollout)
        while stretch.rollout.shrink():
            pass
        seen.append(process.scoring.policy.score_offloaded)
        raise ValueError("seen")

    with torch.inference_mode(), pytest.raises(ValueError, match="seen"):
        mira("nodes.host").run(world.job(steps=3, iterations=1), rounds)
    assert seen == [True] * 3


def test_what_a_mask_does_not_cover_stays(world):
    given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    out = optimize(world, latent_image={"samples": given, "noise_mask": mask}, **TWO)
    found = out.args[0]["samples"]
    torch.testing.assert_close(found[..., 8:], given[..., 8:], atol=1e-5, rtol=1e-4)
    assert (found - given)[..., :8].abs().mean() > 0.05


def test_a_restart_goes_no_further_than_image_to_image_did(world):
    given = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5}
    rows = rows_of(optimize(world, latent_image=given, denoise=0.5, **TWO))
    whole = world.sigmas(steps=3, denoise=0.5)[0].item()
    assert rows[0]["level"] == pytest.approx(whole) and rows[2]["level"] < whole


@pytest.mark.parametrize("memory", ["per_step", "per_block", "offload"])
def test_every_memory_policy_gives_the_same(world, memory):
    plain, thrifty = (optimize(world, **TWO, memory=m).args[0]["samples"] for m in ("none", memory))
    torch.testing.assert_close(plain, thrifty, atol=5e-3, rtol=1e-2)  # Adam divides rounding by itself


def test_a_flow_model_restarts_too(world):
    model = world.model.clone()
    model.add_object_patch("model_sampling", Flow(model.model.model_config))
    rows = rows_of(optimize(world, model=model, sampler_name="euler", scheduler="simple", **TWO))
    assert rows[0]["level"] == pytest.approx(1.0) and 0.3 < rows[2]["level"] < 0.95
    assert all(torch.isfinite(torch.tensor(r["reward"])) for r in rows)


def test_where_a_restart_means_nothing_it_is_left_out_with_a_reason(world, monkeypatch):
    live = mira("nodes.editor.live")
    told, begin = [], live.LiveRun.__init__

    def begun(self, hidden, iterations, *more):
        told.append(iterations)
        begin(self, hidden, iterations, *more)

    monkeypatch.setattr(live.LiveRun, "__init__", begun)
    one = optimize(world, **TWO | {"steps": 1}, sampler_name="euler")
    assert told == [2]  # what is said to be to come, comes
    assert any("restart_every is 1, but was taken as 0: a schedule of one step" in n for n in one.args[2].notices)
    assert "round" not in rows_of(one)[0] and len(rows_of(one)) == 3
    out = advanced(world, Nothing())
    assert any("adds no noise of its own" in n for n in out.args[2].notices)


def test_the_advanced_node_restarts_on_the_tail_of_its_sigmas(world):
    rows = rows_of(advanced(world, Noise(), restart_denoise=0.5))
    assert rows[2]["level"] == pytest.approx(world.sigmas(steps=4)[2].item(), rel=1e-5)


@pytest.mark.parametrize("at", [2, 3])
def test_cancelled_in_the_second_round(world, monkeypatch, at):
    live = mira("nodes.editor.live").LiveRun

    def cancel(self, k, rows, score):
        if k == at:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(live, "__call__", cancel)
    out = optimize(world, **TWO, keep="best_reward")
    rewards = {r["iteration"]: r["reward"] for r in rows_of(out)}
    assert rewards[out.args[2].kept[0]] == max(rewards.values())
    assert any("interrupted" in r for r in out.args[2].reasons)


NODES = {
    "optimize": (nodes.MiraOptimizeKSampler, dict(preset="custom", seeds=1, restart_every=0)),
    "search": (
        nodes.MiraSearchKSampler,
        dict(method="best_of_n", particles=2, interval=1, strength=1.0, potential="max", radius=0.1, learning_rate=0.02,
             regularizer="none", beta=0.0),
    ),
    "tilt": (nodes.MiraTiltKSampler, dict(rounds=1, tilt=0.5)),
    "preference": (
        nodes.MiraDPOPreference,
        dict(judge="reward", method="best_of_n", candidates=2, energy="mira", explore=0.3, step=1.0, skip_ties=False,
             learning_rate=0.02, beta=1.0, kick=0.0, timeout=0.0, on_timeout="stop", keep="incumbent"),
    ),
}  # fmt: skip


@pytest.mark.every_host
@pytest.mark.parametrize("name", NODES)
def test_a_final_restart_is_a_stock_ksamplers_and_runs_nothing_else(world, monkeypatch, name):
    node, more = NODES[name]
    inputs = dict(
        model=world.model, positive=world.positive, negative=world.negative, vae=world.vae, seed=7, steps=3, cfg=5.0,
        sampler_name="euler_ancestral", scheduler="normal", reward=PixelReward("brightness"), iterations=1,
        latent_image={"samples": torch.zeros(2, 4, 8, 8)},
    )  # fmt: skip
    before = execute(node, **inputs, **more)
    monkeypatch.setattr(mira("nodes.host"), "run", None)  # it is not called again
    after = execute(node, **inputs, **more, final_restart=0.6)
    settings, latent = after.args[2].settings, before.args[0]["samples"]
    seed = settings["final_restart_seed"]
    with torch.inference_mode():
        stock = comfy.sample.sample(
            world.model, comfy.sample.prepare_noise(latent, seed), 3, 5.0, "euler_ancestral", "normal",
            world.positive, world.negative, latent, denoise=0.6, disable_pbar=True, seed=seed,
        )  # fmt: skip
    assert torch.equal(after.args[0]["samples"], stock) and not torch.equal(stock, latent)
    assert settings["final_restart"] == 0.6 and any("painted anew" in n for n in after.args[2].notices)
    with torch.inference_mode():
        anew = world.vae.decode(stock).mean((1, 2, 3)) * 2 - 1
    (said,) = (n for n in after.args[2].notices if n.startswith("its reward: "))
    for b, words in enumerate(said.removeprefix("its reward: ").split(", ")):
        was, became = map(float, words.split(" became "))
        assert abs(was - after.args[2].summary(b)[1]["reward"]) < 1e-3 and abs(became - anew[b].item()) < 1e-3
    assert "final_restart_seed" not in before.args[2].settings
    again = execute(node, **inputs, **more)
    assert torch.equal(again.args[0]["samples"], latent) and again.args[2].notices == before.args[2].notices


def test_a_final_restart_of_what_a_person_chose_has_no_reward(world):
    node, more = NODES["preference"]
    inputs = dict(
        model=world.model, positive=world.positive, negative=world.negative, vae=world.vae, seed=7, steps=3, cfg=5.0,
        sampler_name="euler_ancestral", scheduler="normal", iterations=1,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
    )  # fmt: skip
    chosen = execute(node, **inputs, **more, reward=PixelReward("brightness")).args[3]
    more = more | dict(judge="recorded choices", choices=chosen)
    before, after = (execute(node, **inputs, **more, final_restart=share).args for share in (0.0, 0.5))
    assert after[2].settings["final_restart"] == 0.5 and not torch.equal(after[0]["samples"], before[0]["samples"])
    assert not any(n.startswith("its reward: ") for n in after[2].notices)


def test_conditioning_that_ends_before_a_restart_does(world):
    """The schedule of a restart goes lower before its last step than the whole one."""
    early = [[tokens, more | {"start_percent": 0.0, "end_percent": 0.97}] for tokens, more in world.positive]
    how = dict(positive=early, cfg=1.0, steps=20, scheduler="simple", sampler_name="euler", iterations=2)
    words = "of a restart every conditioning but the negative one, unused at CFG 1, ends before the last step"
    done = optimize(world, **how, restart_every=1, restart_denoise=0.3)
    assert any(f"was taken as 0: {words}" in n for n in done.args[2].notices) and len(rows_of(done)) == 3
    left = optimize(world, **how, restart_every=0, final_restart=0.3)
    assert any("final_restart is 0.3, but was left out: of it every conditioning" in n for n in left.args[2].notices)
    assert left.args[0]["samples"].any()
    node, more = NODES["search"]
    inputs = dict(
        model=world.model, positive=early, negative=world.negative, vae=world.vae, seed=7, steps=20, cfg=1.0,
        sampler_name="euler", scheduler="simple", reward=PixelReward("brightness"),
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        **more | dict(method="restarts", particles=2, rounds=1, restart_denoise=0.3),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"nothing can restart here: {words}"):
        execute(node, **inputs)


def test_a_final_restart_that_cannot_be_or_is_cancelled_leaves_the_image_as_it_was(world, monkeypatch):
    one = optimize(world, steps=1, iterations=1, sampler_name="euler", final_restart=0.5)
    assert any("final_restart is 0.5, but was left out: a schedule of one step" in n for n in one.args[2].notices)
    out = advanced(world, Nothing(), final_restart=0.5)
    assert any("adds no noise of its own" in n and "final_restart" in n for n in out.args[2].notices)
    with pytest.raises(ValueError, match=r"final_restart is 1\.5: use 0 to 1"):
        optimize(world, final_restart=1.5)
    done = optimize(world, **TWO)

    def cancel(*_):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr("latent_preview.prepare_callback", lambda *_: cancel)
    cut = optimize(world, **TWO, final_restart=0.6)
    assert torch.equal(cut.args[0]["samples"], done.args[0]["samples"])
    assert any("interrupted in the final restart: this is the image before it" in n for n in cut.args[2].notices)
    assert "final_restart" not in cut.args[2].settings


def test_what_was_painted_anew_comes_back_where_it_cannot_be_scored(world, monkeypatch):
    scored = optimize(world, **TWO, seed=79, final_restart=0.6)

    def broken(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(mira("nodes.shared.scores"), "score_images", broken)
    out = optimize(world, **TWO, seed=79, final_restart=0.6)
    assert torch.equal(out.args[0]["samples"], scored.args[0]["samples"])
    assert any("out of memory" in n and "its reward is not known" in n for n in out.args[2].notices)


def test_a_final_restart_that_was_cut_is_asked_again_and_a_cancelled_run_has_none(world, monkeypatch):
    live, node = mira("nodes.editor.live").LiveRun, nodes.MiraOptimizeKSampler
    widgets = SETTINGS | TWO | dict(seed=77, cfg=5.0, sampler_name="euler_ancestral", scheduler="normal", denoise=1.0)
    before = node.fingerprint_inputs(**widgets, final_restart=0.6)

    def cancel(*_):
        raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr("latent_preview.prepare_callback", lambda *_: cancel)
        cut = optimize(world, **TWO, seed=77, final_restart=0.6)
    assert node.fingerprint_inputs(**widgets, final_restart=0.6) != before  # else ComfyUI would run nothing again
    done = optimize(world, **TWO, seed=77, final_restart=0.6)
    assert done.args[2].settings["final_restart"] == 0.6
    assert not torch.equal(done.args[0]["samples"], cut.args[0]["samples"])
    with monkeypatch.context() as patch:
        told = live.__call__
        patch.setattr(live, "__call__", lambda self, k, *rest: cancel() if k == 1 else told(self, k, *rest))
        out = optimize(world, **TWO, seed=78, final_restart=0.6)
    assert any("final_restart was left out, for the run was cut short" in n for n in out.args[2].notices)


def test_what_is_not_finite_after_a_final_restart_is_the_image_before(world, monkeypatch):
    real, spoiled = comfy.samplers.CFGGuider.sample, []

    def sample(self, noise, latent, sampler, *rest, **more):
        out = real(self, noise, latent, sampler, *rest, **more)
        if isinstance(sampler, comfy.samplers.KSAMPLER):  # the stock one of the restart
            out[1] = float("nan")
            spoiled.append(1)
        return out

    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    done = optimize(world, **TWO, latent_image=latent)
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", sample)
    out = optimize(world, **TWO, latent_image=latent, final_restart=0.6)
    assert spoiled and torch.equal(out.args[0]["samples"][1], done.args[0]["samples"][1])
    assert not torch.equal(out.args[0]["samples"][0], done.args[0]["samples"][0])
    assert any("image 1 was not finite after the final restart" in n for n in out.args[2].notices)


def test_a_final_restart_keeps_what_a_mask_does_not_cover_and_draws_where_the_noise_does_not_depend_on_a_seed(world):
    class Fixed(Noise):
        def generate_noise(self, latent):
            return comfy.sample.prepare_noise(latent["samples"], 3)

    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    latent = {"samples": given, "noise_mask": mask}
    before, after = (
        advanced(world, Fixed(), latent_image=latent, final_restart=f).args[0]["samples"] for f in (0, 0.5)
    )
    torch.testing.assert_close(after[..., 8:], given[..., 8:], atol=1e-5, rtol=1e-4)
    assert (after - before)[..., :8].abs().mean() > 0.02
