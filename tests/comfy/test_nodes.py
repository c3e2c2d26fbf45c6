"""The nodes' own code, called as ComfyUI's executor calls it, with a real PromptServer."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_api.latest import io

from testing.networks import sd15
from testing.pack import as_node, mira
from testing.world import LARGEST_SEED
from tools.comfy import ROOT
from tools.help import line

nodes, checks = mira("nodes"), mira("nodes.shared.checks")
Trace = mira("sampler.trace").Trace
PixelReward = mira("rewards.pixel").PixelReward

INPUTS = dict(
    seed=1, steps=2, cfg=5.0, sampler_name="euler_ancestral", scheduler="normal", denoise=1.0, iterations=2,
    learning_rate=0.02, regularizer="mira_two_sided", beta=1.0, keep="last", drift_limit=0.0, stop="never", patience=3,
    memory="auto", drift_metric="score_distance", optimizer="adamw", clip_norm=1.0, weighting="marginal",
    measured="guided", prompt="",
)  # fmt: skip


REWARDS = {
    "MiraPixelReward": ["measure", "reference"],
    "MiraJPEGReward": ["kind", "quality"],
    "MiraLoadAestheticReward": ["head", "clip", "precision", "clip_vision"],
    "MiraLoadHPSReward": ["file", "version", "precision"],
    "MiraLoadPickScoreReward": ["file", "precision"],
    "MiraLoadImageReward": ["file", "precision"],
    "MiraLoadCLIPScore": ["file", "text_file", "activation", "precision"],
    "MiraDemoCLIPScore": [],
    "MiraDemoAesthetic": [],
    "MiraRewardFromPython": ["file"],
    "MiraRewardFromHTTP": [
        "url", "name", "needs_prompt", "timeout", "retries", "typical_low", "typical_high"
    ],
    "MiraCombineRewards": [*(f"{k}_{i}" for i in range(1, 5) for k in ("reward", "weight")), "scaling"],
    "MiraRelativeReward": ["reward", "wanted", "unwanted"],
    "MiraAugmentReward": ["reward", "crops", "smallest", "flip", "seed"],
}  # fmt: skip


def execute(node, **inputs):
    clone = as_node(node)
    with torch.inference_mode():
        return clone.execute(**inputs)


def sampler_inputs(world, **changes):
    return (
        INPUTS
        | {
            "model": world.model,
            "positive": world.positive,
            "negative": world.negative,
            "vae": world.vae,
            "latent_image": {"samples": torch.zeros(1, 4, 8, 8)},
            "reward": PixelReward("brightness"),
        }
        | changes
    )


def optimize(world, **changes):
    return execute(nodes.MiraOptimizeKSampler, **sampler_inputs(world, **changes))


@pytest.mark.every_host
def test_registration():
    """What workflows hold for ever: ids, inputs and outputs, in this order."""
    extension = asyncio.run(nodes.comfy_entrypoint())
    listed = {n.GET_SCHEMA().node_id: n.GET_SCHEMA() for n in asyncio.run(extension.get_node_list())}
    assert {k: [o.display_name for o in v.outputs] for k, v in listed.items()} == {
        "MiraOptimizeKSampler": ["optimized", "plain", "trace", "noise", "sampler"],
        "MiraOptimizeSamplerAdvanced": ["optimized", "plain", "trace", "noise", "sampler"],
        "MiraDPOPreference": ["optimized", "plain", "trace", "choices", "noise", "sampler"],
        "MiraSearchKSampler": ["optimized", "plain", "trace"],
        "MiraTiltKSampler": ["optimized", "plain", "trace"],
        "MiraRLGuidance": ["guided"],
        "MiraDyMOGuider": ["guider"],
        "MiraInitNONoise": ["noise", "report"],
        "MiraDriftMonitor": ["plot", "table", "verdict", "gain", "drift", "clip_score", "cmmd"],
        "MiraLoadTrace": ["trace", "record"],
        "MiraSaveNoise": [],
        "MiraLoadNoise": ["noise", "sampler", "settings"],
        "MiraGoldenNoise": ["noise"],
        "MiraScoreImages": ["scores", "text"],
        "MiraRankImages": ["images", "scores", "indices", "latents", "masks"],
        "MiraDemoModel": ["model", "clip", "vae"],
    } | {node: ["reward"] for node in REWARDS}
    assert all(schema.display_name == getattr(nodes, name).NAME for name, schema in listed.items())
    inputs = {node: [i.id for i in listed[node].inputs] for node in REWARDS}
    assert inputs == REWARDS
    assert [i.id for i in listed["MiraDriftMonitor"].inputs] == [
        *(f"trace_{i}" for i in range(1, 5)), *(f"images_{i}" for i in range(1, 5)), "base_images", "clip",
        "drift_metric", "filename_prefix", "prompt",
    ]  # fmt: skip
    assert [i.id for i in listed["MiraLoadTrace"].inputs] == ["file", "index", "path"]
    assert [i.id for i in listed["MiraScoreImages"].inputs] == ["images", "reward", "prompt"]
    assert [i.id for i in listed["MiraRankImages"].inputs] == ["images", "scores", "top_k", "latents", "masks"]
    assert [i.id for i in listed["MiraSaveNoise"].inputs] == ["noise", "sampler", "filename_prefix"]
    assert [i.id for i in listed["MiraLoadNoise"].inputs] == ["file", "sampler", "path"]
    assert [i.id for i in listed["MiraGoldenNoise"].inputs] == ["file", "positive", "seed"]
    advanced = [
        "seeds", "restart_every", "restart_denoise", "gradient_steps", "learning_rate", "optimizer", "clip_norm",
        "regularizer", "beta", "weighting", "measured", "drift_metric", "hold", "keep", "stop", "patience",
        "variables", "memory", "repeatable", "iterate", "relative_beta", "final_restart",
    ]  # fmt: skip
    sampling = [
        "model", "positive", "negative", "latent_image", "vae", "reward", "seed", "steps", "cfg", "sampler_name",
        "scheduler",
    ]  # fmt: skip
    assert [i.id for i in listed["MiraOptimizeKSampler"].inputs] == [
        *sampling, "preset", "iterations", "drift_limit", "prompt", "denoise", *advanced,
    ]  # fmt: skip
    assert [i.id for i in listed["MiraDPOPreference"].inputs] == [
        "model", "positive", "negative", "latent_image", "vae", "judge", "seed", "steps", "cfg", "sampler_name",
        "scheduler", "iterations", "candidates", "prompt", "denoise", "method", "learning_rate", "beta", "energy",
        "explore", "step", "keep", "skip_ties", "kick", "memory", "timeout", "on_timeout", "iterate", "repeatable",
        "reward", "choices", "final_restart",
    ]  # fmt: skip
    assert [i.id for i in listed["MiraOptimizeSamplerAdvanced"].inputs] == [
        "noise", "guider", "sampler", "sigmas", "latent_image", "vae", "reward", "preset", "iterations", "drift_limit",
        "prompt", *advanced,
    ]  # fmt: skip
    assert [i.id for i in listed["MiraSearchKSampler"].inputs] == [
        *sampling, "method", "particles", "rounds", "prompt", "denoise", "interval", "strength", "potential", "radius",
        "iterations", "learning_rate", "regularizer", "beta", "memory", "iterate", "repeatable", "restart_denoise",
        "final_restart",
    ]  # fmt: skip
    assert [i.id for i in listed["MiraTiltKSampler"].inputs] == [
        *sampling, "tilt", "prompt", "denoise", "rounds", "restart_denoise", "memory", "iterate", "repeatable",
        "final_restart", "interval",
    ]  # fmt: skip
    assert [i.id for i in listed["MiraRLGuidance"].inputs] == ["model", "tuned", "weight", "schedule", "power"]
    assert [i.id for i in listed["MiraDyMOGuider"].inputs] == [
        "model", "positive", "negative", "vae", "reward", "cfg", "scale", "start_percent", "end_percent", "prompt"
    ]  # fmt: skip
    assert [i.id for i in listed["MiraInitNONoise"].inputs] == [
        "model", "clip", "latent_image", "sigmas", "prompt", "words", "seed", "rounds", "iterations", "response",
        "conflict",
    ]  # fmt: skip


def test_sd15s_architecture(world):
    """All its levels, blocks and widths of attention, with a fifth of the channels."""
    context = torch.randn(1, 77, 768)
    out = optimize(
        world,
        model=sd15(model_channels=64),
        positive=[[context, {}]],
        negative=[[context * 0, {}]],
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        iterations=1,
        steps=2,
    )
    optimized, plain, trace = out.args[:3]
    assert torch.isfinite(optimized["samples"]).all() and not torch.equal(optimized["samples"], plain["samples"])
    assert [r["iteration"] for r in trace.rows] == [0, 1]
    assert out.ui["mira"][0]["rows"][0]["reward"] == trace.rows[0]["reward"]


def test_advanced_equals_the_simple_one(world):
    class Noise:
        seed = 1

        def generate_noise(self, latent):
            return comfy.sample.prepare_noise(latent["samples"], self.seed)

    shared = {
        k: v for k, v in INPUTS.items() if k not in ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
    }
    out = execute(
        nodes.MiraOptimizeSamplerAdvanced,
        noise=Noise(),
        guider=world.guider(),
        sampler=comfy.samplers.sampler_object("euler_ancestral"),
        sigmas=world.sigmas(steps=2),
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        vae=world.vae,
        reward=PixelReward("brightness"),
        **shared,
    )
    for a, b in zip(out.args[:2], optimize(world).args[:2], strict=True):
        assert torch.equal(a["samples"], b["samples"])


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [([1.0], "has 1 values"), ([14.0, 3.0, 1.0], "ends at 1, not 0"), ([0.0, 1.0, 14.0], "does not descend"),
     ([math.inf, 1.0, 0.0], "NaN or infinite")],
)  # fmt: skip
def test_sigmas_that_cannot_end_in_an_image_are_refused(world, sigmas, message):
    settings = [i.id for i in nodes.MiraOptimizeSamplerAdvanced.define_schema().inputs]
    shared = {k: v for k, v in sampler_inputs(world).items() if k in settings and k != "latent_image"}
    with pytest.raises(ValueError, match=message):
        execute(
            nodes.MiraOptimizeSamplerAdvanced,
            noise=None,
            guider=world.guider(),
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=torch.tensor(sigmas),
            latent_image={"samples": torch.zeros(1, 4, 8, 8)},
            **shared,
        )


def test_every_widget_has_a_tooltip():
    for node in nodes.NODES:
        for i in node.define_schema().inputs:
            assert i.tooltip or not hasattr(i, "default"), f"{node.__name__}.{i.id}"


@pytest.mark.every_host
def test_every_node_is_found_by_other_words():
    known = "search_aliases" in inspect.signature(io.Schema).parameters
    for node in nodes.NODES:
        found = getattr(node.define_schema(), "search_aliases", None) or []
        assert not known or len(found) > 1, node.__name__


@pytest.mark.parametrize(
    "changed", [{}, {"model": 1}, {"cfg": 4.0}, {"preset": "fast"}], ids=["nothing", "model", "cfg", "preset"]
)
def test_more_iterations_go_on_only_where_nothing_else_was_changed(world, changed):
    """What is linked counts as what it is, and a setting as the value that is used."""
    inputs = sampler_inputs(world, iterations=1, seed=101)
    execute(nodes.MiraOptimizeKSampler, **inputs)
    other_model = "model" in changed
    if other_model:
        changed = {"model": world.model.clone()}
    again = execute(nodes.MiraOptimizeKSampler, **inputs | {"iterations": 2} | changed)
    assert any("went on from" in n for n in again.args[2].notices) == (not changed)
    assert ("begun anew: model changed, or was made anew, since the run before" in again.args[2].notices) == other_model
    with torch.inference_mode():
        anew = execute(nodes.MiraOptimizeKSampler, **inputs | {"iterations": 2, "seed": 102} | changed)
    assert not any("went on from" in n for n in anew.args[2].notices)


@pytest.mark.parametrize(("client", "told"), [("page", True), (None, False)])
def test_a_scripts_run_is_told_to_no_page(world, prompt_server, sent, monkeypatch, client, told):
    """It has neither client nor workflow, and every page would be told."""
    monkeypatch.setattr(prompt_server, "client_id", client)
    optimize(world, iterations=1, seed=301)
    assert ({"mira.begin", "mira.step"} <= {kind for kind, _, _ in sent()}) == told


def test_every_image_of_a_batch_is_shown_at_every_iteration(world):
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    previews = optimize(world, iterations=1, latent_image=latent).ui["mira"][0]["previews"]
    files = [[p, *p["others"]] for p in previews.values()]
    assert [len(shown) for shown in files] == [2, 2] and len({p["filename"] for shown in files for p in shown}) == 4
    folder = os.path.join(folder_paths.get_temp_directory(), "mira")
    assert all(os.path.isfile(os.path.join(folder, p["filename"])) for shown in files for p in shown)
    mira("nodes.editor.live").forget(previews[0])
    left = [os.path.isfile(os.path.join(folder, p["filename"])) for shown in files for p in shown]
    assert left == [False] * 2 + [True] * 2


def test_another_iterate_is_taken_without_running_again(world, monkeypatch):
    inputs = sampler_inputs(world, iterations=3, seed=77)
    first = execute(nodes.MiraOptimizeKSampler, **inputs)

    def never(*_, **__):
        raise AssertionError("sampling started")

    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", never)
    taken = [execute(nodes.MiraOptimizeKSampler, **inputs, iterate=k) for k in range(4)]
    assert torch.equal(taken[3].args[0]["samples"], first.args[0]["samples"])  # keep is last
    assert len({t.args[0]["samples"].sum().item() for t in taken}) == 4
    assert [t.args[2].kept for t in taken] == [[0], [1], [2], [3]] and first.args[2].kept == [3]
    assert taken[1].ui["mira"][0]["kept"] == [1] and len(taken[1].ui["mira"][0]["previews"]) == 4
    said = ["iteration 1 was taken; the run's own choice, of which noise and sampler are, is 3 (iterate -1)"]
    assert taken[1].args[2].notices == said and taken[3].args[2].notices == []
    beyond = execute(nodes.MiraOptimizeKSampler, **inputs, iterate=4)
    assert torch.equal(beyond.args[0]["samples"], first.args[0]["samples"]) and beyond.args[2].kept == [3]
    assert beyond.args[2].notices == [
        "iterate is 4, but the run ended at iteration 3: this is its own choice (iterate -1)"
    ]
    with pytest.raises(AssertionError, match="sampling started"):
        execute(nodes.MiraOptimizeKSampler, **(inputs | {"seed": 78}), iterate=1)


def test_a_cancelled_run_is_run_again_when_it_is_queued_again(world, monkeypatch):
    """Else ComfyUI's cache would hand the half of it back for ever. To take one of its iterates runs nothing."""
    memo, cancel = mira("nodes.shared.memo"), [2]

    def told(self, k, rows, score):
        if cancel and k == cancel[0]:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(mira("nodes.editor.live").LiveRun, "__call__", told)
    inputs = sampler_inputs(world, seed=4242, iterations=3)
    asked = {k: v for k, v in inputs.items() if isinstance(v, (int, float, str))}
    before = memo.cuts(asked)
    first = execute(nodes.MiraOptimizeKSampler, **inputs)
    once = memo.cuts(asked)
    assert len(first.args[2].rows) == 3 and once > before
    assert memo.cuts(asked | {"seed": None}) == once and memo.cuts(asked | {"seed": 1}) < once
    cancel.clear()
    one = execute(nodes.MiraOptimizeKSampler, **inputs, iterate=1)
    assert one.args[2].kept == [1] and len(one.args[2].rows) == 3  # of the cancelled run
    assert memo.cuts(asked) == once  # to take the same again runs nothing
    back = execute(nodes.MiraOptimizeKSampler, **inputs)
    twice = memo.cuts(asked)
    assert back.args[2].kept == first.args[2].kept and twice > once
    beyond = execute(nodes.MiraOptimizeKSampler, **inputs, iterate=3)
    assert any("was cut short at 2: this is its best so far" in n for n in beyond.args[2].notices)
    thrice = memo.cuts(asked)
    assert thrice > twice
    again = execute(nodes.MiraOptimizeKSampler, **inputs, iterate=3)
    assert len(again.args[2].rows) == 4 and memo.cuts(asked) == thrice
    for _ in range(100):  # of which not all are remembered
        known = memo.cuts(asked)
        memo.ask_again(asked)
        assert memo.cuts(asked) > known


def test_every_element_of_a_list_is_held_and_can_be_gone_on_with(world, monkeypatch):
    memo = mira("nodes.shared.memo")
    place, each = [0], range(12)
    inputs = [sampler_inputs(world, iterations=1, steps=2, seed=500 + n) for n in each]
    monkeypatch.setattr(memo, "place_in_list", lambda: place[0])

    def all_of(**changes):
        done = []
        for place[0] in each:
            done.append(execute(nodes.MiraOptimizeKSampler, **inputs[place[0]] | changes).args[2])
        return done

    first = all_of()
    longer = all_of(iterations=2)
    assert all(any("went on from iteration 1" in n for n in trace.notices) for trace in longer)
    assert [t.rows[0]["reward"] for t in longer] == [t.rows[0]["reward"] for t in first]
    with monkeypatch.context() as never:
        never.setattr(comfy.samplers.CFGGuider, "sample", None)
        assert [t.kept for t in all_of(iterations=2, iterate=1)] == [[1]] * 12
    # What there is no room for is begun anew, and that is said; no element goes for the sake of another.
    monkeypatch.setattr(memo, "ROOM_LEFT", 0)
    monkeypatch.setattr(memo, "MOST_RUNS", 4)
    each = range(6)
    memo._runs.clear()
    all_of(learning_rate=0.03)
    assert [key.split("#")[1] for key in memo._runs] == ["0", "1", "2", "3"]
    each = range(1)
    (anew,) = all_of(iterations=2, learning_rate=0.03)
    assert any("begun anew: there was no room" in n for n in anew.notices)
    (longer,) = all_of(iterations=3, learning_rate=0.03)  # the newest stays, whatever it takes
    assert any("went on from iteration 2" in n for n in longer.notices)


def test_a_picture_of_a_list_begins_with_its_own_record(monkeypatch):
    on_disk, place = mira("nodes.editor.on_disk"), [0]
    monkeypatch.setattr(on_disk, "place_in_list", lambda: place[0])
    extra = {"workflow": {}}
    for place[0] in range(3):
        on_disk.travel(extra, "7", Trace({"element": place[0]}))
    place[0] = 0
    on_disk.travel(extra, "8", Trace({"element": "alone"}))

    def saved():
        return {k: v["settings"]["element"] for k, v in json.loads(json.dumps(extra[on_disk.PNG_KEY])).items()}

    assert saved() == {"7": 0, "7#1": 1, "7#2": 2, "8": "alone"}
    place[0] = 2
    assert list(saved().items()) == [("7", 2), ("7#0", 0), ("7#1", 1), ("8", "alone")]
    assert json.loads(json.dumps(copy.deepcopy(extra)[on_disk.PNG_KEY])).keys() == {"7", "7#1", "7#2", "8"}
    place[0] = 5  # of another list
    assert saved() == {"7": 0, "7#1": 1, "7#2": 2, "8": "alone"}


def test_a_picture_begins_with_the_record_that_is_nearest_before_it(monkeypatch):
    """Of two optimisers side by side its own, of two in a chain the second's; other records follow in their order."""
    on_disk, writes = mira("nodes.editor.on_disk"), [None]
    monkeypatch.setattr(on_disk, "running", lambda: writes[0])
    of = {"5": [], "6": ["5"], "7": [], "8": ["5"], "9": ["6"], "10": ["7"], "11": ["9", "10"], "12": []}
    prompt = {
        node: {"class_type": "any", "inputs": {f"in_{i}": [before, 0] for i, before in enumerate(given)}}
        for node, given in of.items()
    }
    extra = {on_disk.PNG_KEY: [], "workflow": {}}  # of a client that sends what it likes
    for node in ("5", "7", "6"):
        on_disk.travel(extra, node, Trace({"node": node}), prompt)

    def order(node):
        writes[0] = node
        return list(json.loads(json.dumps(extra[on_disk.PNG_KEY])))

    assert order("8") == ["5", "7", "6"] and order("9") == ["6", "5", "7"] and order("10") == ["7", "5", "6"]
    assert order("11") == ["7", "6", "5"] and order("12") == order("5.0.1") == order(None) == ["5", "7", "6"]
    on_disk.travel(None, "5", Trace({}), prompt)
    on_disk.travel([], "5", Trace({}), prompt)


def test_a_result_that_another_node_asked_for_has_its_record(monkeypatch):
    """ComfyUI's cache knows no names: of a graph that was made a subgraph, say."""
    on_disk, known = mira("nodes.editor.on_disk"), sys.modules["nodes"].NODE_CLASS_MAPPINGS
    prompt = {
        "5": {"class_type": "MiraOptimizeKSampler", "inputs": {"seed": 4711}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0]}},
    }
    assert known["SaveImage"].OUTPUT_NODE
    on_disk.travel({}, "5", Trace({"seed": 4711}), prompt)
    moved = {"12:5": prompt["5"], "6": {"class_type": "SaveImage", "inputs": {"images": ["12:5", 0]}}}
    extra = on_disk.remembered({"prompt": moved, "extra_data": {"extra_pnginfo": {}}})["extra_data"]["extra_pnginfo"]
    assert {name: record["settings"] for name, record in extra[on_disk.PNG_KEY].items()} == {"12:5": {"seed": 4711}}


def test_the_latent_dict_keeps_what_else_it_holds(world):
    mask = torch.ones(1, 128, 128)
    out = optimize(world, latent_image={"samples": torch.zeros(1, 4, 8, 8), "noise_mask": mask, "batch_index": [0]})
    assert out.args[0]["noise_mask"] is mask and out.args[0]["batch_index"] == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations is 0.*use 1 to 1000"),
        ({"steps": 0}, "steps is 0.*use 1 to 10000"),
        ({"beta": -0.5}, "beta is -0.5.*reward drift; use 0 to 1000"),
        ({"iterations": 1_000_000}, "iterations is 1000000: use 1 to 1000"),
        ({"learning_rate": math.inf}, "learning_rate is inf: use 0.0001 to 10"),
        ({"seeds": 10**39}, "seeds is 10000000000000000000...: use 1 to 1000"),
        ({"beta": math.nan}, "beta is nan"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"denoise": 0.0}, "denoise is 0.0"),
        ({"stop": "drift"}, "stop is drift, which needs a drift_limit above 0"),
        ({"sampler_name": "dpm_adaptive"}, "sampler dpm_adaptive cannot be optimised through.*euler_ancestral"),
        ({"latent_image": {"samples": torch.zeros(0, 4, 16, 16)}}, "the batch is empty"),
        ({"latent_image": {"samples": torch.full((1, 4, 8, 8), math.nan)}}, "latent_image holds NaN"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 1, 16, 16)}}, "only images, .B, C, H, W. or of one frame"),
        ({"latent_image": {"samples": torch.ones(1, 16, 8, 8)}}, "16 channels, but model works in 4"),
        ({"latent_image": {"samples": None}}, "latent_image holds no latents"),
        ({"latent_image": {}}, "latent_image holds no latents"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 8, 8).long()}}, "latent_image is of torch.int64"),
        ({"latent_image": {"samples": torch.zeros(2, 4, 8, 8), "batch_index": [3]}}, "2 images, but its batch_index"),
        ({"reward": "brightness"}, "reward is a str: connect a MIRA reward node"),
        ({"vae": None}, "vae is empty: connect the checkpoint's VAE"),
        ({"vae": 5}, "vae is a int: connect"),
        ({"model": "sd15"}, "model is a str: connect a model loader's MODEL"),
    ],
)
def test_bad_input_is_named_before_any_sampling(world, monkeypatch, changes, message):
    def never(*_, **__):
        raise AssertionError("sampling started")

    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", never)
    with pytest.raises(ValueError, match=f"MIRA Optimize KSampler: .*{message}"):
        optimize(world, **changes)


def test_latents_of_several_kinds_are_refused(world):
    """As ComfyUI has them for video with audio."""
    nested = pytest.importorskip("comfy.nested_tensor").NestedTensor([torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 9)])
    with pytest.raises(ValueError, match="MIRA Optimize KSampler: latent_image holds several latents of one sample"):
        optimize(world, latent_image={"samples": nested})


def test_a_reward_without_gradient_and_one_without_its_prompt_are_refused(world):
    class BlackBox(PixelReward):
        def __init__(self):
            super().__init__("brightness")
            self.facts = self.facts.__class__("file size", -1e9, 0, (-50, -5), differentiable=False)

    with pytest.raises(ValueError, match="reward 'file size' has no gradient: use a differentiable reward here"):
        optimize(world, reward=BlackBox())
    score = execute(nodes.MiraDemoCLIPScore).args[0]
    with pytest.raises(ValueError, match="prompt is empty: give it as text"):
        optimize(world, reward=score, prompt="  ")


def test_a_checkpoint_without_a_vae_is_told(world):
    """What Load Checkpoint hands out then: ComfyUI's own class, with nothing in it."""
    import comfy.sd

    with torch.inference_mode():
        empty = comfy.sd.VAE(sd={"nothing": torch.zeros(1)})
    assert empty.first_stage_model is None
    with pytest.raises(ValueError, match=r"vae is empty: .*connect a Load VAE"):
        optimize(world, vae=empty)


def test_a_vae_of_another_model_is_refused(world):
    import copy

    vae = copy.copy(world.vae)
    vae.latent_channels = 16
    with pytest.raises(ValueError, match="vae decodes latents of 16 channels, but model makes 4"):
        optimize(world, vae=vae)


def test_validation_before_the_queue():
    validate = nodes.MiraOptimizeKSampler.validate_inputs
    assert validate(drift_limit=0.1, stop="drift") is True and validate(stop="drift") is True
    assert "drift_limit is -1" in validate(drift_limit=-1)
    assert "needs a drift_limit above 0" in validate(drift_limit=0, stop="drift")


SAMPLERS = (
    "MiraOptimizeKSampler", "MiraOptimizeSamplerAdvanced", "MiraSearchKSampler", "MiraTiltKSampler",
    "MiraDPOPreference",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_linked_value_keeps_to_the_ranges_that_a_node_shows(name):
    """ComfyUI looks at the range of no value that comes by a link."""
    inputs = getattr(nodes, name).define_schema().inputs
    ranged = [i for i in inputs if getattr(i, "max", None) is not None]
    assert len(ranged) > 5
    for known in ranged:
        for value in (known.min - 1, known.max + 1, math.nan):
            assert f"{known.id} is {value}: " in checks.complain({known.id: value}, inputs)
        assert checks.complain({known.id: known.default}, inputs) is None


def test_combine_rewards():
    bright, dark = PixelReward("brightness"), PixelReward("darkness")
    weighted = dict(reward_1=bright, weight_1=2.0, reward_2=dark, weight_2=0.5)
    reward = execute(nodes.MiraCombineRewards, **weighted, scaling="raw").args[0]
    image = torch.full((1, 3, 8, 8), 0.75)
    total, parts = reward(image, [""])
    assert total.item() == pytest.approx(2 * 0.5 - 0.5 * 0.5)
    assert {k: v.item() for k, v in parts.items()} == pytest.approx({"brightness": 0.5, "darkness": -0.5})
    with pytest.raises(ValueError, match="every weight is 0"):
        execute(nodes.MiraCombineRewards, reward_1=bright, weight_1=0.0)
    with pytest.raises(ValueError, match="Combine Rewards: ReNO's composite has no brightness"):
        execute(nodes.MiraCombineRewards, **weighted, scaling="ReNO")
    with pytest.raises(ValueError, match="MIRA Combine Rewards: reward_1 is empty: connect"):
        execute(nodes.MiraCombineRewards, **weighted | {"reward_1": None})


@pytest.mark.every_host
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_big_node_shows_eight_widgets(name):
    """Besides the prompt's box; the others are there for whoever asks."""
    inputs = getattr(nodes, name).INPUT_TYPES()
    shown = [
        k
        for part in inputs.values()
        for k, (kind, *more) in part.items()
        if (isinstance(kind, list) or kind in ("INT", "FLOAT", "BOOLEAN", "COMBO"))
        and not (more and more[0].get("advanced"))
    ]
    assert 3 <= len(shown) <= 8, shown


PRESETS = mira("nodes.shared.presets")


def test_presets_speak_of_inputs_that_there_are_within_their_ranges():
    inputs = {i.id: i for i in nodes.MiraOptimizeKSampler.define_schema().inputs}
    assert PRESETS.PRESETS.keys() | {"custom"} == PRESETS.WORDS.keys() == set(inputs["preset"].options)
    for name, chosen in PRESETS.PRESETS.items():
        assert not checks.complain(chosen | PRESETS.SUGGESTED[name], list(inputs.values())), name
        assert not chosen.keys() & PRESETS.SUGGESTED[name].keys(), name  # or a dial would show what does not run
        assert chosen.keys() <= inputs.keys() and "gradient_steps" in chosen
    settings = mira("nodes.shared.inputs")
    dials = {"iterations": 8, "drift_limit": 0.05}
    assert settings.settings_of(PRESETS.PRESETS["balanced"] | dials) == settings.DEFAULT


def test_a_preset_says_what_it_took_and_the_record_has_what_ran(world):
    given = dict(preset="fast", steps=2, iterations=2, drift_limit=0.02, learning_rate=0.02)
    trace = optimize(world, **given).args[2]
    said = next(n for n in trace.notices if n.startswith("preset fast took"))
    assert "learning_rate 0.04 for 0.02" in said and "drift_limit" not in said
    assert trace.settings["learning_rate"] == 0.04 and trace.settings["preset"] == "fast"
    assert trace.settings["restart_every"] == 3 and len(trace.settings["seeds_begun_from"]) == 1
    alone = {k: v for k, v in INPUTS.items() if k in ("seed", "steps", "cfg", "sampler_name", "scheduler")}
    links = sampler_inputs(world)
    links = {k: links[k] for k in ("model", "positive", "negative", "vae", "latent_image", "reward")}
    same = execute(nodes.MiraOptimizeKSampler, **links, **alone, preset="fast", iterations=2, drift_limit=0.02)
    assert not any("preset" in n for n in same.args[2].notices)
    assert same.args[2].of(0)[-1]["reward"] == trace.of(0)[-1]["reward"]


def test_what_a_choice_may_leave_out_is_an_input():
    no_input = {"ess", "tempering", "clip_norm", "optimizer"}  # read by some, and asked for by no node
    choosing = 0
    for schema in (node.define_schema() for node in nodes.NODES):
        for one in schema.inputs:
            if found := (one.extra_dict or {}).get("mira_read_by"):
                assert set(found) - {other.id for other in schema.inputs} <= no_input, schema.node_id
                choosing += 1
    assert choosing == 3


@pytest.mark.parametrize("node", ["MiraOptimizeKSampler", "MiraOptimizeSamplerAdvanced"])
def test_a_help_page_says_what_a_run_takes_from_its_preset(node):
    """Of every input, as the list says it: what a later preset does not list is as in the first, or is left alone."""
    text = (ROOT / "web" / "docs" / f"{node}.md").read_text()
    listed = re.findall(r"^- \*\*(\w+)\*\*: (.*)$", text.split("## Presets")[1], re.MULTILINE)
    told = {preset: dict(entry[1:].split("` ") for entry in said.split(", ")) for preset, said in listed}
    assert told.keys() == PRESETS.PRESETS.keys()
    first = next(iter(told.values()))
    names = [i.id for i in getattr(nodes, node).define_schema().inputs]
    for preset, said in told.items():
        # The dials as the editor sets them; every other input stands somewhere else than any preset has it.
        before = dict.fromkeys(names, "elsewhere") | {"preset": preset}
        taken = PRESETS.apply_preset(before | PRESETS.SUGGESTED[preset])[0]
        changed = {name: line(value) for name, value in taken.items() if value != "elsewhere" and name != "preset"}
        assert said.items() <= changed.items(), preset
        assert changed.items() <= (first | said).items(), preset


def test_the_papers_algorithm_is_to_the_letter():
    taken = PRESETS.apply_preset(INPUTS | {"preset": "mira"} | PRESETS.SUGGESTED["mira"])[0]
    settings = mira("nodes.shared.inputs").settings_of(taken)
    assert (settings.iterations, settings.lr, settings.optimizer, settings.variables) == (
        50,
        0.01,
        "adamw",
        "trajectory",
    )
    assert (settings.regularizer, settings.relative_beta, settings.clip_norm, settings.keep) == (
        "mira",
        True,
        0,
        "last",
    )
    assert (settings.seeds, settings.restart_every, settings.hold, settings.stop) == (1, 0, "no", "never")
    assert taken["gradient_steps"] == 0


@pytest.mark.parametrize("method", list(mira("sampler.rivals").RIVALS))
def test_a_rival_is_one_choice(world, method):
    out, plain, trace = optimize(world, preset=method, steps=2, beta=0.5, seed=LARGEST_SEED).args[:3]
    chosen = mira("nodes.shared.inputs").settings_of(PRESETS.apply_preset(INPUTS | {"preset": method, "beta": 0.5})[0])
    assert {k: getattr(chosen, k) for k in mira("sampler.rivals").RIVALS[method]} == mira("sampler.rivals").RIVALS[
        method
    ]
    assert any(f"preset {method} took" in n for n in trace.notices)
    # ReNO and InitNO leave the injected noises alone; the others move them.
    assert trace.rows[-1]["path_kl"] > 0
    assert torch.isfinite(out["samples"]).all()
    assert torch.equal(plain["samples"], world.ksampler(steps=2, seed=LARGEST_SEED))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variables": "injected", "sampler_name": "euler"}, "variables is injected, but the sampler injects no noise"),
        ({"hold": "projection", "drift_limit": 0.1}, "needs drift_metric path_kl"),
        ({"hold": "dual_ascent", "drift_limit": 0.1, "regularizer": "none"}, "regularizer is none: choose one"),
    ],
)
def test_what_does_not_go_together(world, changes, message):
    with pytest.raises(ValueError, match=message):
        optimize(world, **changes)


def test_drift_is_held_while_the_reward_rises(world):
    changes = dict(hold="projection", drift_metric="path_kl", drift_limit=0.002, learning_rate=0.05, iterations=4)
    trace = optimize(world, regularizer="none", **changes).args[2]
    assert max(r["path_kl"] for r in trace.rows) <= 0.002 * 1.001
    assert trace.rows[-1]["reward"] > trace.rows[0]["reward"]


def test_it_begins_from_the_best_of_several_seeds(world):
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    out, plain, trace = optimize(world, seeds=4, iterations=1, latent_image=latent).args[:3]
    assert torch.equal(plain["samples"], world.ksampler(steps=2, seed=1, batch=2))  # still the given seed's
    for image, (rewards, chosen) in enumerate(
        zip(trace.settings["seed_rewards"], trace.settings["seed_chosen"], strict=True)
    ):
        assert len(rewards) == 4 and rewards[chosen] == max(rewards)
        first = trace.of(image)[0]
        assert first["reward"] == pytest.approx(max(rewards), abs=1e-4) and first["path_kl"] == 0
        assert f"image {image} began from" in " ".join(trace.notices)
    again = optimize(world, seeds=4, iterations=1, latent_image=latent).args[0]
    assert torch.equal(again["samples"], out["samples"])
    assert "seed_rewards" not in optimize(world, seeds=1).args[2].settings


def test_cancelled_while_seeds_are_compared(world, monkeypatch):
    import comfy.model_management

    host, calls = mira("nodes.host"), []
    real = host.Scoring.score

    def cancelling(self, x0):
        calls.append(1)
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing()
        return real(self, x0)

    monkeypatch.setattr(host.Scoring, "score", cancelling)
    out, _, trace = optimize(world, seeds=5, iterations=3, final_restart=0.5).args[:3]
    assert trace.reasons == ["interrupted while seeds were compared"] == [trace.settings["ended"]]
    assert 1 <= len(trace.settings["seed_rewards"][0]) <= 2 and len(trace.rows) == 1
    assert torch.isfinite(out["samples"]).all() and "final_restart_seed" not in trace.settings
    again = optimize(world, seeds=5, iterations=3, final_restart=0.5).args[2]
    assert len(again.rows) == 4 and len(again.settings["seed_rewards"][0]) == 5


@pytest.mark.parametrize(
    ("values", "held"),
    [
        ({"hold": "auto", "drift_limit": 0.1, "drift_metric": "path_kl"}, "projection"),
        ({"hold": "auto", "drift_limit": 0.1, "drift_metric": "path_kl", "stop": "drift"}, "no"),
        ({"hold": "auto", "drift_limit": 0.1, "drift_metric": "score_distance"}, "no"),
        ({"hold": "auto", "drift_limit": 0.1, "drift_metric": "path_kl", "variables": "initno"}, "no"),
        ({"hold": "auto", "drift_limit": 0.0, "drift_metric": "path_kl"}, "no"),
        ({"drift_limit": 0.1, "drift_metric": "path_kl"}, "no"),  # a prompt that knows no such input
        ({"hold": "dual_ascent", "drift_limit": 0.1}, "dual_ascent"),
    ],
)
def test_how_drift_is_held(values, held):
    settings = mira("nodes.shared.inputs")
    assert settings.settings_of(INPUTS | values).hold == held


def test_few_steps_take_the_gradient_of_all():
    """With four of them the last three gained a tenth of what all do (docs/speed.md)."""
    settings = mira("nodes.shared.inputs")
    for chosen, steps, expected in ((-1, 4, 0), (-1, 9, 0), (-1, 10, 3), (-1, 20, 3), (3, 4, 3), (0, 20, 0)):
        assert settings.gradient_steps({"gradient_steps": chosen}, steps) == expected
    assert settings.gradient_steps(PRESETS.apply_preset({"gradient_steps": 3, "preset": "mira"})[0], 20) == 0
    assert settings.gradient_steps({"gradient_steps": -1}, 20, begins_anew=True) == 0


def test_samplers_that_begin_each_step_anew():
    """By way of the network alone does an early noise reach the image then: the last steps' gradient never finds it."""

    class Discrete(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    sampling = Discrete()
    begins_anew = mira("nodes.host.probe").begins_anew
    found = [n for n in comfy.samplers.KSampler.SAMPLERS if begins_anew(comfy.samplers.sampler_object(n), sampling)]
    assert "lcm" in found and not {"euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "heun"} & set(found)


@pytest.mark.parametrize("free", ["initial", "early", "initno"])
def test_noises_that_the_gradient_does_not_reach_are_named(world, free):
    with pytest.raises(
        ValueError, match=f"variables is {free}, but sampler lcm begins each step anew.*gradient_steps to 0"
    ):
        optimize(world, sampler_name="lcm", steps=12, variables=free, gradient_steps=3)
    trace = optimize(world, sampler_name="lcm", steps=3, variables=free, gradient_steps=-1).args[2]
    assert trace.of(0)[-1]["reward"] > trace.of(0)[0]["reward"]


def test_a_graph_tells_its_inputs_apart_and_those_of_files(tmp_path, monkeypatch):
    class Anything:
        IS_CHANGED = classmethod(lambda cls, **inputs: float("nan"))

    monkeypatch.setitem(sys.modules["nodes"].NODE_CLASS_MAPPINGS, "Anything", Anything)
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))

    def before(**changes):
        prompt = {
            "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "2": {"class_type": "LatentUpscaleBy", "inputs": {"samples": ["1", 0], "scale_by": 2.0}},
            "3": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
            "4": {"class_type": "Anything", "inputs": {}},
            "5": {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": "again.safetensors"}},
            "9": {"class_type": "MiraOptimizeKSampler", "inputs": {"latent_image": ["2", 0], "seed": 1} | changes},
        }
        return memo.graph_before(SimpleNamespace(unique_id="9", prompt=prompt))

    memo = mira("nodes.shared.memo")
    assert before() == before(seed=2) and set(before()) == {"latent_image"}
    assert len({before(latent_image=link)["latent_image"] for link in (["1", 0], ["2", 0], ["2", 1])}) == 3
    assert before() == before(iterate=["1", 0])  # what is taken of a run is none of its inputs
    assert before(reference=["3", 0]) is None  # there is no such file
    (tmp_path / "a.png").write_bytes(b"one")
    one = before(reference=["3", 0])
    assert one == before(reference=["3", 0]) and set(one) == {"latent_image", "reference", "beyond 3"}
    (tmp_path / "a.png").write_bytes(b"other")
    assert before(reference=["3", 0]) != one
    lora = tmp_path / "again.safetensors"
    lora.write_bytes(b"one")
    known = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], known[1]))
    one = before(model=["5", 0])
    assert one == before(model=["5", 0]) and "files of 5" in one
    lora.write_bytes(b"trained again")
    assert before(model=["5", 0]) != one  # of which ComfyUI's loader does not tell
    assert before(reference=["4", 0]) is None and before(latent_image=["7", 0]) is None
    assert memo.graph_before(SimpleNamespace(unique_id="9", prompt=None)) is None


def test_a_graph_may_be_longer_than_pythons_stack_and_run_in_a_circle():
    digest = mira("nodes.editor.graph").digest_of

    def chain(length, first):
        links = {str(n): {"class_type": "Pass", "inputs": {"x": [str(n - 1), 0]}} for n in range(1, length)}
        return links | {"0": {"class_type": "Begin", "inputs": {"value": first}}}

    ends = {digest(chain(5000, value), "4999") for value in (1, 1, 2)}
    assert len(ends) == 2
    both = {"class_type": "Both", "inputs": {"a": ["1", 0], "b": ["2", 0]}}
    assert len({digest(chain(3, value) | {"9": both}, "9") for value in (1, 2, 1)}) == 2
    circle = {a: {"class_type": "Pass", "inputs": {"x": [b, 0]}} for a, b in ("12", "21")}
    assert digest(circle, "1") == digest(circle, "1") != ""


def test_a_sampler_with_options_of_its_own_keeps_its_name():
    sampler = comfy.samplers.sampler_object("dpmpp_2m_sde")
    sampler.sampler_function = functools.partial(sampler.sampler_function, eta=0.5)
    assert checks.name_of(sampler) == "dpmpp_2m_sde"


def test_a_sampler_that_is_an_object_has_the_name_of_its_class():
    class TheirSampler:
        def __call__(self, model, x, *args, **kwargs):
            return x

    for function in (TheirSampler(), TheirSampler().__call__):
        assert checks.name_of(comfy.samplers.KSAMPLER(function)) == "TheirSampler"


def test_a_reward_without_a_slope_is_told_with_the_nodes_name(world):
    """It says that it has a gradient, and is the same everywhere."""

    class Flat(PixelReward):
        def __call__(self, images, prompts):
            return images.flatten(1).mean(1) * 0, {}

    with pytest.raises(RuntimeError, match="MIRA Optimize KSampler: the gradient of the reward is zero"):
        optimize(world, reward=Flat("brightness"))


def test_what_a_new_node_does_is_the_measured_default():
    """The widgets' defaults, taken together, are `DEFAULT`."""
    settings, schema = mira("nodes.shared.inputs"), nodes.MiraOptimizeKSampler.GET_SCHEMA()
    values = {i.id: getattr(i, "default", None) for i in schema.inputs}
    assert settings.settings_of({k: v for k, v in values.items() if v is not None}) == settings.DEFAULT


@pytest.fixture(params=["a file in the way", "a full disk"])
def no_room(request, tmp_path, monkeypatch):
    """ComfyUI's temporary folder, in which nothing can be stored."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(folder))
    if request.param == "a file in the way":
        (folder / "mira").touch()
        yield folder
        return
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    (folder / "full").write_bytes(b"x" * 4096)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_editor_that_cannot_be_told_costs_no_image(world, no_room, caplog):
    """Thumbnails of a run that is not new, so that nothing is remembered of it."""
    out = optimize(world, iterations=2, steps=2, seed=4711)
    trace = out.args[2]
    assert len(trace.rows) == 3 and torch.isfinite(out.args[0]["samples"]).all()
    said = [n for n in trace.notices if "previews could not be stored" in n]
    assert len(said) == 1 and sum("previews could not" in r.message for r in caplog.records) == 1
    assert out.ui["mira"][0]["previews"] == {} and len(out.ui["mira"][0]["rows"]) == 3


def test_a_node_that_is_not_run_has_no_record_in_a_picture(prompt_server):
    """It may lie in the graph, without a link to what is saved."""
    graph = mira("nodes.editor.graph")
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
        "3": {"class_type": "MiraOptimizeKSampler", "inputs": {"model": ["4", 0]}},
        "4": {"class_type": "MiraDemoModel", "inputs": {}},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0]}},
    }
    assert graph.run_by(prompt) == ["1", "2"]
    prompt["2"]["inputs"]["images"] = ["5", 0]
    assert graph.run_by(prompt) == ["2", "3", "4", "5"]


def test_nor_does_a_socket_that_fails(world, monkeypatch, prompt_server):
    def broken(*_, **__):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(prompt_server, "send_sync", broken)
    out = optimize(world, iterations=2, steps=2, seed=4712)
    assert len(out.args[2].rows) == 3 and any("was not told" in n and "gone" in n for n in out.args[2].notices)


def test_but_a_cancel_that_its_progress_bar_raises_still_cancels(world, monkeypatch):
    def cancelled(*_, **__):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", cancelled)
    out = optimize(world, iterations=3, steps=2, seed=4713)
    assert out.args[2].reasons == ["interrupted at iteration 0"] and len(out.args[2].rows) == 1


# -- what the reward cannot do is said before anything is sampled for it


@pytest.fixture
def network_calls(world, monkeypatch):
    calls = []
    network = world.model.model.diffusion_model
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return calls


def test_a_reference_batch_that_does_not_fit(world, network_calls):
    reward = mira("rewards.combine").WeightedSum(
        [PixelReward("brightness"), mira("rewards.pixel").MatchReference(torch.rand(3, 3, 16, 16))], [1.0, 1.0]
    )
    said = "reward .*match reference.*3 reference images for 1 images: give one, or one each"
    given = sampler_inputs(world, reward=reward)
    with pytest.raises(ValueError, match=f"^MIRA Optimize KSampler: {said}"):
        optimize(world, reward=reward)
    kept = {k: given[k] for k in ("model", "positive", "negative", "vae", "latent_image", "reward", "seed", "cfg")}
    for node in (nodes.MiraSearchKSampler, nodes.MiraDPOPreference):
        name = node.GET_SCHEMA().display_name
        defaults = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        with pytest.raises(ValueError, match=f"^{name}: {said}"):
            execute(node, **(defaults | kept | ({"judge": "reward"} if node is nodes.MiraDPOPreference else {})))
    with pytest.raises(ValueError, match=f"^MIRA Score Images: {said}"):
        execute(nodes.MiraScoreImages, images=[torch.rand(1, 16, 16, 3)], reward=[reward])
    assert not network_calls
    guided = nodes.MiraDyMOGuider.execute(
        world.model, world.positive, world.negative, world.vae, reward, 5.0, 0.1, 0.0, 1.0
    ).args[0]
    noise, sampler = torch.randn(1, 4, 8, 8), comfy.samplers.sampler_object("euler")
    with pytest.raises(ValueError, match=f"^MIRA DyMO Guider: {said}"), torch.inference_mode():
        guided.sample(noise, torch.zeros(1, 4, 8, 8), sampler, world.sigmas(steps=2))
    assert not network_calls


class NoBackwardHere(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("The operator 'aten::bicubic_backward' is not currently implemented for the device.")


@pytest.mark.parametrize("way", ["per_step", "offload"])
def test_a_reward_that_keeps_everything_is_not_refused_for_what_it_does_with_less(world, monkeypatch, way):
    """Features that a hook takes out of a layer are gone where that is computed again; the run may keep everything."""
    reward, ways = PixelReward("brightness"), []
    score = mira("nodes.host.scoring").Scoring._reward_whole

    def fails(scoring, *args):
        if torch.is_grad_enabled():
            ways.append(scoring.policy.memory)
            if ways[-1] == "per_step" and way == "offload":
                raise torch.OutOfMemoryError("full")
            if ways[-1] == way:
                raise ValueError("the score has no gradient")
        return score(scoring, *args)

    monkeypatch.setattr(mira("nodes.host.scoring").Scoring, "_reward_whole", fails)
    trace = optimize(world, reward=reward, iterations=1).args[2]
    assert trace.settings["checkpointing"] == "none" and way in ways


def test_a_reward_without_a_backward_on_this_device(world, monkeypatch):
    """As on Apple: told with the node's and the reward's name, before seeds are sampled and compared."""
    reward, evaluated = PixelReward("brightness"), []
    score = reward.score
    monkeypatch.setattr(
        reward, "score", lambda images, prompts: evaluated.append(1) or score(NoBackwardHere.apply(images), prompts)
    )
    said = r"^MIRA Optimize KSampler: reward 'brightness' has no backward on this device .*bicubic_backward.*--cpu"
    with pytest.raises(RuntimeError, match=said):
        optimize(world, reward=reward, seeds=4)
    assert len(evaluated) == 2  # with little kept, and with everything
