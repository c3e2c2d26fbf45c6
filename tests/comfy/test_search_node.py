"""MIRA Search KSampler on the demo model, called as ComfyUI's executor calls it."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from testing.pack import as_node, mira
from testing.world import LARGEST_SEED

host = mira("nodes.host")
within_chain = mira("nodes.host.chain").within_chain
decode = host.decode
Node = mira("nodes").MiraSearchKSampler
PixelReward, JPEG = mira("rewards.pixel").PixelReward, mira("rewards.jpeg").JPEG
METHODS, SearchSettings = mira("sampler.search").METHODS, mira("sampler.search").SearchSettings
Particles = mira("sampler.particles").Particles
another = mira("sampler.seeds").another
STEERING = [name for name, method in METHODS.items() if method.steers]

INPUTS = dict(
    seed=1, steps=3, cfg=5.0, sampler_name="euler_ancestral", scheduler="normal", denoise=1.0, method="best_of_n",
    particles=2, rounds=2, interval=0, strength=20.0, potential="max", radius=0.4, iterations=1, learning_rate=0.02,
    regularizer="mira", beta=0.1, memory="auto", prompt="",
)  # fmt: skip


def run(world, **changes):
    inputs = INPUTS | {
        "model": world.model,
        "positive": world.positive,
        "negative": world.negative,
        "vae": world.vae,
        "latent_image": {"samples": torch.zeros(1, 4, 8, 8)},
        "reward": PixelReward("brightness"),
    }
    clone = as_node(Node)
    with torch.inference_mode():
        return clone.execute(**(inputs | changes))


@pytest.mark.parametrize("where", ["search", "final restart"])
@pytest.mark.parametrize("kind", ["MiraSearchKSampler", "MiraTiltKSampler"])
def test_what_was_cancelled_is_asked_again_whatever_is_painted_anew_after_it(world, monkeypatch, kind, where):
    node, asked = getattr(mira("nodes"), kind), []
    widgets = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
    widgets |= dict(steps=3, cfg=5.0, sampler_name="euler_ancestral", scheduler="normal", denoise=1.0)
    widgets |= dict(final_restart=0.6, seed=8 if where == "search" else 9)
    widgets |= {"rounds": 1, "particles": 2} if kind == "MiraSearchKSampler" else {"rounds": 1, "restart_denoise": 0.6}
    links = dict(model=world.model, positive=world.positive, negative=world.negative, vae=world.vae)
    links |= dict(latent_image={"samples": torch.zeros(1, 4, 8, 8)}, reward=PixelReward("brightness"))
    before = node.fingerprint_inputs(**widgets)

    def cancel(*_):
        raise comfy.model_management.InterruptProcessingException

    live = mira("nodes.editor.live").LiveRun
    with monkeypatch.context() as patch, torch.inference_mode():
        if where == "search":
            patch.setattr(live, "__call__", lambda *_: asked.append(1) or cancel())
        else:
            patch.setattr("latent_preview.prepare_callback", lambda *_: asked.append(1) or cancel)
        as_node(node).execute(**widgets, **links)
    assert asked and node.fingerprint_inputs(**widgets) != before


@pytest.mark.parametrize("prompts, batch", [(3, 1), (2, 3), (2, 2)])
def test_candidates_take_of_several_prompts_what_ksampler_takes(world, prompts, batch):
    """It repeats them, and cuts what is left over, in every batch anew."""
    words = ["a fox", "a blue cat", "a red bird"][:prompts]
    latent = {"samples": torch.zeros(batch, 4, 8, 8)}
    with torch.inference_mode():
        positive = [[torch.cat([world.encode(word)[0][0] for word in words]), {}]]
    how = dict(positive=positive, particles=3, sampler_name="euler")
    trace = run(world, latent_image=latent, prompt="\n".join(words), **how).args[2]
    seeds = (mira("sampler.seeds").another(1, n) if n else 1 for n in range(3))
    stock = [
        brightness(world, {"samples": world.ksampler(
            positive=positive, latent=latent["samples"], steps=3, seed=seed, sampler="euler"
        )})
        for seed in seeds
    ]  # fmt: skip
    found = [[row["reward"] for row in trace.of(b)] for b in range(batch)]
    assert found == [pytest.approx(image, abs=1e-4) for image in zip(*stock, strict=True)]


def brightness(world, latent):
    with torch.inference_mode():
        return PixelReward("brightness").score(decode(world.vae, latent["samples"]), []).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_what_its_record_says(world, method):
    out, plain, trace = run(world, method=method, latent_image={"samples": torch.zeros(2, 4, 8, 8)}).args[:3]
    reference = world.ksampler(steps=3, seed=1, batch=2)
    assert torch.equal(plain["samples"], reference)
    for image, value in enumerate(brightness(world, out)):
        _, kept = trace.summary(image)
        assert value == pytest.approx(kept["reward"], abs=1e-3)
    assert trace.settings["evaluations"] > 3 and trace.settings["method"] == method


def test_around_a_mask_every_candidate_has_its_own_noise(world):
    """As KSampler noises what is not painted: each is the image of its seed."""
    latent, mask = world.ksampler(steps=4, seed=3), torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    given = {"samples": latent, "noise_mask": mask}
    out = run(world, sampler_name="euler", particles=3, latent_image=given).args[2]
    for seed, row in zip([1, another(1, 1), another(1, 2)], out.of(0), strict=True):
        stock = world.ksampler(sampler="euler", steps=3, latent=latent, mask=mask, seed=seed)
        assert brightness(world, {"samples": stock})[0] == pytest.approx(row["reward"], abs=1e-5)


@pytest.mark.parametrize("method", ["zero_order", "das", "ntrk"])
def test_the_same_seed_gives_the_same_bits(world, method):
    one, two = (run(world, method=method).args[0]["samples"] for _ in range(2))
    assert torch.equal(one, two)


def test_best_of_n_includes_the_plain_sample_to_the_bit(world):
    out, plain, trace = run(world, particles=1).args[:3]
    assert torch.equal(out["samples"], plain["samples"]) and trace.kept == [0]


def test_the_plain_path_in_pieces_is_the_plain_sample(world):
    # CoDe with one particle and no choice: only the noise differs, so compare the first state's path instead.
    host, SearchSettings = mira("nodes.host"), mira("sampler.search").SearchSettings
    job = world.job(steps=6, seed=3)
    job.settings = SearchSettings("best_of_n", particles=1)
    found = {}

    def work(process, noises):
        def pieces(chain):
            rest = list(noises[1:])
            x = chain.start(noises[0])
            with torch.no_grad():
                for i, j in ((0, 2), (2, 3), (3, 6)):
                    x = chain.segment(x, i, j, lambda make: rest.pop(0), lambda d: d)
                found["x"], found["whole"] = x, process.rollout(noises).x0
            return mira("sampler.search").search(chain, process.rollout, process.scoring.score, noises, job.settings)

        return within_chain(process, noises[0], pieces)

    with torch.inference_mode():
        host.run(job, work)
    assert torch.equal(found["x"], found["whole"])


def test_a_black_box_reward_is_searched(world):
    trace = run(world, method="fk_steering", reward=JPEG(), strength=5.0).args[2]
    assert trace.rows[-1]["reward"] < 0
    with pytest.raises(ValueError, match="das, such as fk_steering"):
        run(world, method="das", reward=JPEG())


TILT = dict(
    seed=1, steps=4, cfg=5.0, sampler_name="euler_ancestral", scheduler="normal", tilt=0.4, restart_denoise=0.5,
    rounds=2, interval=1,
)  # fmt: skip


@torch.inference_mode()
def tilted(world, **changes):
    given = dict(model=world.model, positive=world.positive, negative=world.negative, vae=world.vae)
    given |= {"latent_image": {"samples": torch.zeros(2, 4, 8, 8)}, "reward": PixelReward("brightness")}
    given = {name: value for name, value in (given | TILT | changes).items() if value is not None}
    return as_node(mira("nodes").MiraTiltKSampler).execute(**given)


def test_tilt_is_searchs_ntrk_with_a_dial(world):
    out, plain, trace = tilted(world).args[:3]
    same = run(
        world, method="ntrk", particles=1, rounds=2, radius=0.4, restart_denoise=0.5, steps=4,
        latent_image={"samples": torch.zeros(2, 4, 8, 8)},
    ).args  # fmt: skip
    assert torch.equal(out["samples"], same[0]["samples"]) and torch.equal(plain["samples"], same[1]["samples"])
    assert torch.equal(tilted(world).args[0]["samples"], out["samples"])
    assert trace.settings["method"] == "ntrk" and trace.settings["tilt"] == 0.4
    assert trace.settings["node"] == "MIRA Tilt KSampler"
    assert [r["iteration"] for r in trace.of(0)] == list(range(1 + 4 + 2))
    assert all(trace.summary(b)[1]["reward"] > trace.summary(b)[0]["reward"] for b in range(2))
    once = tilted(world, rounds=1).args[2]
    assert [r["reward"] for r in once.rows] == [r["reward"] for r in trace.rows][: len(once.rows)]


def test_tilt_looks_at_every_second_step_by_default(world):
    evaluations = {}
    for interval in (1, 2, None):
        trace = tilted(world, interval=interval).args[2]
        evaluations[interval] = trace.settings["evaluations"], trace.settings["backwards"], len(trace.of(0))
    assert evaluations[1] == (4 + 4 + 2, 3 + 1, 1 + 4 + 2)
    assert evaluations[2] == evaluations[None] == (4 + 4 + 2, 2 + 1, 1 + 2 + 1)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("sampler", ["dpmpp_2s_ancestral", "dpmpp_sde"])
def test_every_row_of_tilt_is_the_iterate_that_it_speaks_of(world, sampler, interval):
    """Also where a step is two calls of the network."""
    for k in range(7 if interval == 1 else 4):
        latent, _, trace = tilted(world, sampler_name=sampler, iterate=k, interval=interval).args[:3]
        for image, value in enumerate(brightness(world, latent)):
            assert value == pytest.approx(trace.of(image)[k]["reward"], abs=1e-4)


def test_tilt_under_a_mask_paints_with_noise_of_its_size(world):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32, :32] = 1
    host, search = mira("nodes.host"), mira("sampler.search")
    job = world.job(steps=6, latent=world.ksampler(steps=3, seed=9), denoise=0.9, mask=mask)
    job.settings = search.SearchSettings("ntrk", particles=1, rounds=1, radius=0.9)
    with torch.inference_mode():
        noises = host.run(job, host.searching).result.best_noises[1:]
    inside = torch.stack(list(noises))[..., :4, :4]
    assert 0.6 < inside.square().mean() < 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler_name": "euler"},
            "which is what it chooses, but euler injects none: use euler_ancestral, or another",
        ),
        ({"steps": 1}, "MIRA Tilt KSampler: steps is 1, but the tilt looks at the image .* use 2 or more$"),
        (
            {"reward": JPEG()},
            "has no gradient: use a differentiable reward here, or MIRA Search KSampler, of which most",
        ),
        ({"tilt": 0.0}, "tilt is 0"),
        ({"tilt": 1.0}, "tilt is 1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"restart_denoise": 0.0}, "restart_denoise is 0"),
        ({"latent_image": {"samples": torch.zeros(0, 4, 8, 8)}}, "the batch is empty"),
    ],
)
def test_what_tilt_refuses(world, changes, message):
    with pytest.raises(ValueError, match=message):
        tilted(world, **changes)


@pytest.mark.parametrize("method", ["fk_steering", "das", "ntrk"])
def test_masked_and_half_denoised(world, method):
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    start = world.ksampler(steps=3, seed=9, batch=2)
    latent = {"samples": start, "noise_mask": mask}
    out = run(world, method=method, latent_image=latent, denoise=0.5, steps=4).args[0]["samples"]
    assert torch.allclose(out[..., 9:], start[..., 9:], atol=1e-4)
    assert not torch.allclose(out[..., :7], start[..., :7], atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_fewest_steps_no_guidance_and_the_largest_seed(world, method):
    # euler_ancestral injects no noise in its last step, so that steering begins at two, where a middle level is too.
    steps = 2 if method in (*STEERING, "restarts") else 1
    plain, trace = run(world, method=method, steps=steps, cfg=1.0, seed=LARGEST_SEED).args[1:3]
    assert torch.equal(plain["samples"], world.ksampler(steps=steps, cfg=1.0, seed=LARGEST_SEED))
    assert trace.rows[-1]["evaluations"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler_name": "euler", "method": "code"}, "injects none: use euler_ancestral, or method best_of_n"),
        ({"sampler_name": "res_multistep", "method": "code"}, "injects none: use euler_ancestral"),
        ({"sampler_name": "sa_solver", "method": "das"}, "would sample otherwise in pieces: use euler_ancestral"),
        (
            {"sampler_name": "euler", "method": "ntrk"},
            "that injects noise, which is what it chooses, but euler injects",
        ),
        ({"steps": 1, "method": "das"}, "between two steps: use 2 or more"),
        ({"steps": 1, "method": "restarts"}, "a level in between: use 2 or more"),
        ({"steps": 0}, "steps is 0"),
        ({"latent_image": {"samples": torch.zeros(0, 4, 16, 16)}}, "the batch is empty"),
        ({"reward": "x"}, "connect a MIRA reward node"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"sampler_name": "dpm_adaptive", "method": "mira_fk"}, "dpm_adaptive cannot be optimised"),
        ({"iterate": "1"}, "iterate is a str: give it a number"),
        ({"iterate": 1.5}, "iterate is 1.5: use a whole number"),
        ({"iterate": None}, "iterate is empty"),
        ({"final_restart": "0.4"}, "final_restart is a str: give it a number"),
        ({"seed": "abc"}, "seed is a str"),
        ({"seed": 2**70}, "seed is 118059162071741130342.*: use 0 to"),
        ({"prompt": 1.0}, "prompt is a float: give it a text"),
        ({"steps": "abc"}, "steps is a str"),
    ],
)
def test_bad_input(world, changes, message):
    with pytest.raises(ValueError, match=message):
        run(world, **changes)


@pytest.mark.parametrize("method", STEERING)
def test_a_sampler_that_takes_more_than_the_prediction_is_steered(world, method):
    trace = run(world, method=method, sampler_name="euler_ancestral_cfg_pp", cfg=1.5).args[2]
    assert len(trace.rows) > 1 and trace.rows[-1]["evaluations"] > 0


PIECES = [
    "euler_ancestral", "euler_ancestral_cfg_pp", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "ddpm", "lcm",
]  # fmt: skip
WHOLE = ["sa_solver", "dpmpp_2m_sde", "dpmpp_3m_sde", "res_multistep_ancestral", "er_sde"]


@pytest.mark.parametrize("name", [*PIECES, *WHOLE])
def test_which_samplers_go_in_pieces(world, name):
    probe = mira("nodes.host.probe")
    sampler, sampling = comfy.samplers.sampler_object(name), world.model.get_model_object("model_sampling")
    assert probe.injects_noise(sampler, sampling) and probe.goes_in_pieces(sampler, sampling) == (name in PIECES)


@pytest.mark.parametrize(("name", "injects"), [("res_multistep", False), ("euler", False), ("dpmpp_2m_sde", True)])
def test_noise_that_is_drawn_and_not_taken_does_not_count(world, name, injects):
    probe = mira("nodes.host.probe")
    sampling = world.model.get_model_object("model_sampling")
    assert probe.injects_noise(comfy.samplers.sampler_object(name), sampling) == injects


def test_deterministic_samplers_search_seeds(world):
    trace = run(world, sampler_name="dpmpp_2m", method="zero_order").args[2]
    assert trace.rows[-1]["reward"] >= trace.rows[0]["reward"]


def test_cancelled_in_the_middle_hands_back_the_best(world, monkeypatch):
    live = mira("nodes.editor.live").LiveRun
    original = live.__call__

    def cancelling(self, k, rows, score):
        original(self, k, rows, score)
        if k == 2:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(live, "__call__", cancelling)
    for method in ("zero_order", "fk_steering", "das"):
        out, _, trace = run(world, method=method, rounds=5, interval=1, steps=6).args[:3]
        assert "interrupted" in trace.reasons[0] and torch.isfinite(out["samples"]).all()
        assert max(r["reward"] for r in trace.rows) == pytest.approx(trace.summary()[1]["reward"])
        assert brightness(world, out)[0] == pytest.approx(trace.summary()[1]["reward"], abs=1e-3)


@pytest.mark.parametrize("method", ["best_of_n", "fk_steering", "ntrk"])
def test_no_candidate_injects_its_initial_noise_again(world, monkeypatch, method):
    began, drawn = [], []
    begin, fresh = Particles.begin, Particles.fresh
    monkeypatch.setattr(Particles, "begin", lambda self, of: began.extend(z := begin(self, of)) or z)
    monkeypatch.setattr(Particles, "fresh", lambda self, of, like: drawn.extend(z := fresh(self, of, like)) or z)
    others = []

    def work(process, noises):
        others.extend(process.noises_of(n, noises) for n in (1, 2))
        return host.searching(process, noises)

    with torch.inference_mode():
        job = world.job(steps=3)
        job.settings = SearchSettings(method=method, particles=3)
        host.run(job, work)
    assert len(began) >= 2 and len(drawn) >= 2
    assert not any(torch.equal(z.cpu(), w.cpu()) for z in began for w in drawn)
    assert not any(torch.equal(z, w) for z, *injected in others for w in injected)


def test_an_image_that_is_not_finite_has_no_reward(world):
    """JPEG would make it the smallest file of all."""
    found = []

    def work(process, noises):
        images = torch.rand(2, 3, 16, 16)
        images[1, 0, 0, 0] = torch.nan
        found.append(process.scoring.reward(images)[0])
        return host.searching(process, noises)

    with torch.inference_mode():
        job = world.job(steps=1, reward=JPEG())
        job.settings, job.gradient = SearchSettings(method="best_of_n", particles=1), False
        host.run(job, work)
    assert found[0].isfinite().tolist() == [True, False]
