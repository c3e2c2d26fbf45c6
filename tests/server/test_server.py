"""The real ComfyUI server with the pack in it, spoken to over HTTP and WebSocket as any client does."""

from __future__ import annotations

import asyncio
import copy
import io
import json

import numpy as np
import pytest
from PIL import Image

from testing.servers import WITH_SMALL_MODEL, on_small_model
from tools.comfy import ROOT, Client, Server, ServerError
from tools.workflow import find, to_prompt

QUICKSTART = json.loads((ROOT / "example_workflows" / "01 Quickstart.json").read_text())
OPTIMIZER = "MiraOptimizeKSampler"


@pytest.fixture(scope="module")
def on_demo_model(server):
    """The quickstart, for what is about its pictures, and for runs that are long enough to be cancelled."""

    async def get():
        async with Client(server.url) as client:
            return to_prompt(QUICKSTART, await client.get("/object_info"))

    # One round, so that an iteration is a row; small, as nobody looks at the pictures.
    prompt = changed(asyncio.run(get()), preset="custom", restart_every=0)
    return changed(prompt, "EmptyLatentImage", width=64, height=64)


@pytest.fixture(scope="module")
def quickstart(on_demo_model):
    return on_small_model(on_demo_model)


def changed(prompt, kind=OPTIMIZER, **inputs):
    prompt = copy.deepcopy(prompt)
    prompt[find(prompt, kind)]["inputs"] |= inputs
    return prompt


def small(prompt, **inputs):
    return changed(prompt, **({"steps": 3, "iterations": 3, "stop": "never"} | inputs))


async def follow(client, prompt):
    """(events, outputs): every event of the run as (type, data), and what the history keeps."""
    prompt_id = await client.submit(prompt)
    events = [event async for event in client.events(prompt_id)]
    return events, await client.outputs(prompt_id)


def run(server, prompt):
    async def go():
        async with Client(server.url) as client:
            return await follow(client, prompt)

    return asyncio.run(go())


def test_seeds_that_are_compared_are_told_as_they_are_tried(server, quickstart):
    prompt = small(quickstart, seeds=3, iterations=1, restart_every=0)
    events, _ = run(server, prompt)
    kinds = [kind for kind, _ in events if kind.startswith("mira.")]
    assert kinds == ["mira.begin", *["mira.seed"] * 3, *["mira.step"] * 2]
    assert [(d["count"], d["seeds"]) for k, d in events if k == "mira.seed"] == [(1, 3), (2, 3), (3, 3)]
    # Newer cores leave out what comes within a tenth of a second.
    progress = [d["value"] for k, d in events if k == "progress" and d["node"] == find(prompt, OPTIMIZER)]
    assert progress[0] == 1 and progress[-2:] == [4, 5] and progress == sorted(progress)


def saved_records(server, prompt, prefix):
    """(rewards of iterations that ran, the records in each PNG of the node that saves under this prefix)."""
    (node,) = (id for id, n in prompt.items() if n["inputs"].get("filename_prefix") == prefix)

    async def go():
        async with Client(server.url) as client:
            prompt_id = await client.submit(prompt, QUICKSTART)
            ran = [data["rows"][0]["reward"] async for kind, data in client.events(prompt_id) if kind == "mira.step"]
            found = []
            for entry in (await client.outputs(prompt_id))[node]["images"]:
                with Image.open(io.BytesIO(await client.image(entry))) as image:
                    image.load()
                    found.append(json.loads(image.info.get("mira_traces", "{}")))
            return ran, found

    return asyncio.run(go())


@pytest.mark.every_host
def test_the_record_is_read_back_from_a_webp_and_an_animated_png(server, quickstart):
    prompt = small(quickstart, seed=31)
    (save,) = (n["inputs"] for n in prompt.values() if n["inputs"].get("filename_prefix") == "mira/optimized")
    prompt["webp"] = {
        "class_type": "SaveAnimatedWEBP",
        "inputs": {"images": save["images"], "filename_prefix": "mira/moving", "fps": 6.0, "lossless": True,
                   "quality": 80, "method": "default"},
    }  # fmt: skip
    prompt["apng"] = {
        "class_type": "SaveAnimatedPNG",
        "inputs": {"images": save["images"], "filename_prefix": "mira/moving", "fps": 6.0, "compress_level": 4},
    }

    async def go():
        async with Client(server.url) as client:
            prompt_id = await client.submit(prompt, QUICKSTART)
            async for _ in client.events(prompt_id):
                pass
            outputs, found = await client.outputs(prompt_id), []
            for node in ("webp", "apng"):
                (entry,) = outputs[node]["images"]
                monitor = {
                    "1": {"class_type": "MiraLoadTrace", "inputs": {
                        "file": "", "index": 0, "path": f"{entry['subfolder']}/{entry['filename']}"}},
                    "2": {"class_type": "MiraDriftMonitor", "inputs": {
                        "trace_1": ["1", 0], "drift_metric": "path_kl", "filename_prefix": ""}},
                }  # fmt: skip
                found.append((await client.run(monitor))["2"]["mira"][0]["rows"])
            return outputs[find(prompt, OPTIMIZER)]["mira"][0]["rows"], found

    rows, found = asyncio.run(go())
    assert rows and found == [rows, rows]


async def pixels(client, outputs, prompt, prefix):
    (node,) = (id for id, n in prompt.items() if n["inputs"].get("filename_prefix") == prefix)
    (entry,) = outputs[node]["images"]
    return np.asarray(Image.open(io.BytesIO(await client.image(entry))))


def steps_of(events):
    return [data for kind, data in events if kind == "mira.step"]


@pytest.mark.every_host
def test_the_pack_loads_without_a_complaint(server):
    log = server.log.read_text().split("got prompt")[0]  # what ran since is others' business
    # In brackets: of custom nodes. A core may miss a package for nodes of its own, with a traceback of theirs.
    assert "(IMPORT FAILED)" not in log
    assert not any("/mira/" in part for part in log.split("Traceback")[1:])


@pytest.mark.every_host
def test_all_nodes_are_registered(server):
    async def get():
        async with Client(server.url) as client:
            return await client.get("/object_info")

    info = asyncio.run(get())
    mine = {k: v for k, v in info.items() if k.startswith("Mira")}
    assert {"MiraOptimizeKSampler", "MiraDPOPreference", "MiraScoreImages", "MiraDemoModel"} <= set(mine)
    assert all(v["description"] for v in mine.values())
    assert info[OPTIMIZER]["output"] == ["LATENT", "LATENT", "MIRA_TRACE", "NOISE", "SAMPLER"]


def test_quickstart_raises_the_reward_and_reports_every_iteration(server, on_demo_model):
    prompt = small(on_demo_model)

    async def go():
        async with Client(server.url) as client:
            events, outputs = await follow(client, prompt)
            return (
                events,
                outputs,
                await pixels(client, outputs, prompt, "mira/optimized"),
                await pixels(client, outputs, prompt, "mira/plain"),
            )

    events, outputs, optimized, plain = asyncio.run(go())
    steps = steps_of(events)
    node = find(prompt, OPTIMIZER)
    assert [s["iteration"] for s in steps] == [0, 1, 2, 3]
    assert all(s["node"] == node and s["iterations"] == 3 for s in steps)
    assert [k for k, _ in events].count("preview") >= 4
    progress = [d for k, d in events if k == "progress" and d["node"] == node]
    seeds = prompt[node]["inputs"]["seeds"]
    assert progress[-1]["value"] == progress[-1]["max"] == seeds + 4 == 8
    (record,) = outputs[node]["mira"]
    assert [r["reward"] for r in record["rows"]] == [s["rows"][0]["reward"] for s in steps]
    assert record["rows"][record["kept"][0]]["reward"] > record["rows"][0]["reward"]
    assert record["settings"]["reward"] == "brightness" and record["settings"]["ended"] == "all iterations done"
    assert optimized.shape == plain.shape == (64, 64, 3)
    assert optimized.mean() > plain.mean() + 2


@pytest.mark.every_host
def test_plain_output_is_the_stock_ksampler(server, on_demo_model):
    prompt = small(on_demo_model)
    inputs = prompt[find(prompt, OPTIMIZER)]["inputs"]
    names = (
        "model",
        "positive",
        "negative",
        "latent_image",
        "seed",
        "steps",
        "cfg",
        "sampler_name",
        "scheduler",
        "denoise",
    )
    stock = copy.deepcopy(prompt)
    node = find(stock, OPTIMIZER)
    stock[node] = {"class_type": "KSampler", "inputs": {k: inputs[k] for k in names}}
    for id in [id for id, n in stock.items() if [node, 1] in n["inputs"].values()]:
        stock[id]["inputs"] = {k: [node, 0] if v == [node, 1] else v for k, v in stock[id]["inputs"].items()}

    async def go():
        async with Client(server.url) as client:
            _, a = await follow(client, prompt)
            _, b = await follow(client, stock)
            return await pixels(client, a, prompt, "mira/plain"), await pixels(client, b, stock, "mira/plain")

    ours, theirs = asyncio.run(go())
    assert (ours == theirs).all()


def test_two_runs_are_the_same_bits_and_an_unchanged_one_is_cached(server, quickstart):
    a, b = small(quickstart, seed=11), small(quickstart, seed=12)
    node = find(a, OPTIMIZER)

    async def go():
        async with Client(server.url) as client:
            first, out_a = await follow(client, a)
            cached, _ = await follow(client, a)
            _, out_b = await follow(client, b)
            again, out_d = await follow(client, a)
            images = [await pixels(client, o, a, "mira/optimized") for o in (out_a, out_b, out_d)]
            return first, cached, again, images, [o[node]["mira"][0] for o in (out_a, out_d)]

    first, cached, again, (one, other, two), records = asyncio.run(go())
    assert len(steps_of(first)) == len(steps_of(again)) == 4 and not steps_of(cached)
    assert any(node in d["nodes"] for k, d in cached if k == "execution_cached")
    assert (one == two).all() and not (one == other).all()
    rewards = [[r["reward"] for r in record["rows"]] for record in records]
    assert rewards[0] == rewards[1]


async def cancelled(client, prompt_id: str, after: int) -> int:
    """Interrupt the run after so many iterations; how many there were in the end."""
    seen = 0
    async for kind, _ in client.events(prompt_id):
        seen += kind == "mira.step"
        if kind == "mira.step" and seen == after:
            await client.interrupt()
    return seen


def test_cancel_hands_back_the_best_so_far(server, on_demo_model):
    prompt = changed(on_demo_model, steps=4, iterations=500, seed=5, seeds=1, stop="never")
    node = find(prompt, OPTIMIZER)

    async def go():
        async with Client(server.url) as client:
            prompt_id = await client.submit(prompt)
            seen = await cancelled(client, prompt_id, after=4)
            outputs = await client.outputs(prompt_id)
            return seen, outputs, await pixels(client, outputs, prompt, "mira/optimized")

    seen, outputs, image = asyncio.run(go())
    (record,) = outputs[node]["mira"]
    assert record["settings"]["ended"].startswith("interrupted at iteration")
    assert seen < 12 and len(record["rows"]) == seen
    assert record["kept"][0] > 0 and image.shape == (64, 64, 3)
    # The server is free again.
    assert len(steps_of(run(server, small(on_demo_model, seed=6, seeds=1))[0])) == 4


@pytest.mark.parametrize(
    ("more", "rounds"), [({"seeds": 1}, 1), ({"seeds": 2, "restart_every": 8}, 2)], ids=["one seed", "seeds and rounds"]
)
def test_what_was_cancelled_goes_on_when_it_is_queued_again(server, quickstart, more, rounds):
    """To what it would have been, and then stays."""
    prompt = changed(quickstart, steps=3, iterations=16, seed=15, stop="never", **more)
    node, count = find(prompt, OPTIMIZER), 16 + rounds

    async def go():
        async with Client(server.url) as client:
            seen = await cancelled(client, await client.submit(prompt), after=2)
            again, outputs = await follow(client, prompt)
            cached, _ = await follow(client, prompt)
            await follow(client, changed(prompt, seed=16, iterations=1, restart_every=0))
            _, anew = await follow(client, prompt)
            images = [await pixels(client, o, prompt, "mira/optimized") for o in (outputs, anew)]
            return seen, steps_of(again), steps_of(cached), [o[node]["mira"][0] for o in (outputs, anew)], images

    seen, again, cached, (one, other), images = asyncio.run(go())
    told, *new = again  # what was there before comes first, and at once
    done = len(told["rows"])
    assert 2 <= seen < count and not cached and seen - 1 <= done <= seen
    assert [r["iteration"] for r in told["rows"]] == list(range(done)) and len(told["previews"]) == done
    assert [step["iteration"] for step in new] == list(range(done, count))
    assert [r["reward"] for r in one["rows"]] == [r["reward"] for r in other["rows"]] and len(one["rows"]) == count
    assert (images[0] == images[1]).all() and one["previews"].keys() == other["previews"].keys()
    assert any("went on from iteration" in n for n in one["notices"]) and "went on" not in str(other["notices"])


def test_more_iterations_go_on_from_the_last(server, quickstart):
    prompt = changed(quickstart, steps=3, iterations=3, seed=17, seeds=2, stop="never")
    longer, node = changed(prompt, iterations=5), find(prompt, OPTIMIZER)

    async def go():
        async with Client(server.url) as client:
            await follow(client, prompt)
            more, outputs = await follow(client, longer)
            await follow(client, changed(prompt, seed=18, iterations=1))
            anew, fresh = await follow(client, longer)
            images = [await pixels(client, o, prompt, "mira/optimized") for o in (outputs, fresh)]
            return len(steps_of(more)), len(steps_of(anew)), outputs[node]["mira"][0], images

    more, anew, record, (one, other) = asyncio.run(go())
    assert (more, anew) == (1 + 3, 6) and len(record["rows"]) == 6 and (one == other).all()


def test_more_iterations_of_the_default_go_on_from_the_last_round(server, quickstart):
    prompt = changed(quickstart, steps=2, iterations=7, seed=21, preset="balanced")
    longer, node = changed(prompt, iterations=9), find(prompt, OPTIMIZER)

    async def go():
        async with Client(server.url) as client:
            await follow(client, prompt)
            more, outputs = await follow(client, longer)
            await follow(client, changed(prompt, seed=22, iterations=1))
            anew, fresh = await follow(client, longer)
            images = [await pixels(client, o, prompt, "mira/optimized") for o in (outputs, fresh)]
            return [[s["iteration"] for s in steps_of(e)] for e in (more, anew)], outputs[node]["mira"][0], images

    (more, anew), record, (one, other) = asyncio.run(go())
    assert [r["round"] for r in record["rows"]] == [1] * 5 + [2] * 5 + [3] * 2
    # What there was is told at once, by its last iteration but one; that one is made once more.
    assert more == [7, 8, 9, 10, 11] and anew == list(range(12)) and (one == other).all()
    assert any("went on from iteration 8" in n for n in record["notices"])


def test_a_client_that_comes_back_goes_on_listening(server, quickstart):
    prompt = changed(quickstart, steps=4, iterations=80, seed=8, stop="never")

    async def go():
        async with Client(server.url) as client:
            prompt_id = await client.submit(prompt)
            before = 0
            async for kind, _ in client.events(prompt_id):
                before += kind == "mira.step"
                if before == 2:
                    break
            await client.socket.close()
            client.socket = await client.session.ws_connect(f"{client.url}/ws?clientId={client.id}", max_msg_size=0)
            after = [d async for k, d in client.events(prompt_id) if k == "mira.step"]
            return after, await client.outputs(prompt_id)

    after, outputs = asyncio.run(go())
    assert after and after[-1]["iteration"] == 80
    assert len(outputs[find(prompt, OPTIMIZER)]["mira"][0]["rows"]) == 81


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"iterations": 0}, "^Value 0 smaller than min of 1.*: iterations$"),  # once
        ({"steps": 0}, "^Value 0 smaller than min of 1.*: steps$"),
        ({"beta": -1.0}, "^Value -1.0 smaller than min of 0.*: beta$"),
        ({"regularizer": "kl"}, "regularizer"),
        ({"sampler_name": "dpm_fast"}, "MiraOptimizeKSampler: MIRA Optimize KSampler: sampler dpm_fast cannot"),
    ],
)
def test_bad_input_is_refused_with_a_reason(server, quickstart, inputs, message):
    with pytest.raises(ServerError, match=message):
        run(server, small(quickstart, **inputs))


def test_a_wrong_connection_is_refused(server, quickstart):
    prompt = copy.deepcopy(quickstart)
    node = prompt[find(prompt, OPTIMIZER)]
    node["inputs"]["reward"] = node["inputs"]["vae"]
    with pytest.raises(ServerError, match="MIRA_REWARD"):
        run(server, prompt)


def test_stock_nodes_work_on_the_demo_model(server, on_demo_model):
    """img2img with the stock nodes: VAEEncode, then our sampler at denoise 0.5, batch of two."""
    prompt = small(on_demo_model, denoise=0.5, seeds=1)
    node = find(prompt, OPTIMIZER)
    demo = find(prompt, "MiraDemoModel")
    prompt |= {
        "100": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 3368703}},
        "101": {"class_type": "VAEEncode", "inputs": {"pixels": ["100", 0], "vae": [demo, 2]}},
    }
    prompt[node]["inputs"]["latent_image"] = ["101", 0]
    _, outputs = run(server, prompt)
    (record,) = outputs[node]["mira"]
    assert len(record["kept"]) == 2
    for image in (0, 1):
        rows = [r for r in record["rows"] if r["image"] == image]
        assert rows[-1]["reward"] > rows[0]["reward"]


def test_advanced_with_the_custom_sampling_nodes(server, quickstart):
    """BasicGuider (no negative, no CFG), RandomNoise, KSamplerSelect and BasicScheduler."""
    prompt = copy.deepcopy(quickstart)
    node, model = find(prompt, OPTIMIZER), find(prompt, "SmallModel")
    old = prompt[node]["inputs"]
    own = ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise", "model", "positive", "negative")
    prompt |= {
        "100": {"class_type": "RandomNoise", "inputs": {"noise_seed": 4}},
        "101": {"class_type": "BasicGuider", "inputs": {"model": [model, 0], "conditioning": old["positive"]}},
        "102": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler_ancestral"}},
        "103": {
            "class_type": "BasicScheduler",
            "inputs": {"model": [model, 0], "scheduler": "karras", "steps": 3, "denoise": 1.0},
        },
    }
    links = {"noise": ["100", 0], "guider": ["101", 0], "sampler": ["102", 0], "sigmas": ["103", 0]}
    inputs = {k: v for k, v in old.items() if k not in own} | links | {"iterations": 2}
    prompt[node] = {"class_type": "MiraOptimizeSamplerAdvanced", "inputs": inputs}
    events, outputs = run(server, prompt)
    (record,) = outputs[node]["mira"]
    assert len(steps_of(events)) == 3 and record["settings"]["seed"] == 4
    assert record["rows"][-1]["reward"] > record["rows"][0]["reward"]


def test_a_workflow_of_another_server_is_refused():
    workflow = copy.deepcopy(QUICKSTART)
    workflow["nodes"][0]["type"] = "NoSuchNode"
    with pytest.raises(ValueError, match="uses the node 'NoSuchNode', which this server does not have"):
        to_prompt(workflow, {})


def rewards_of(record):
    return [row["reward"] for row in record["rows"]]


@pytest.mark.every_host
def test_a_png_has_its_record_also_when_the_run_came_from_the_cache(server, quickstart):
    prompt = small(quickstart, iterations=2, seeds=1, seed=4321)
    node = find(prompt, OPTIMIZER)
    ran, (first,) = saved_records(server, prompt, "mira/optimized")
    assert len(ran) == 3 and rewards_of(first[node]) == pytest.approx(ran)
    later = copy.deepcopy(prompt)
    (save,) = (id for id, n in later.items() if n["inputs"].get("filename_prefix") == "mira/optimized")
    later[save]["inputs"]["filename_prefix"] = "mira/later"
    assert saved_records(server, later, "mira/later") == ([], [first])

    async def again():
        async with Client(server.url) as client:
            _, outputs = await follow(client, later)
            return (await client.get("/object_info"))[OPTIMIZER], outputs

    info, outputs = asyncio.run(again())
    if "has_intermediate_output" in info:  # of 0.19 on: the history of a run from the cache has the record, too
        assert rewards_of(outputs[node]["mira"][0]) == pytest.approx(ran)
    # Another seed is another run, and nobody's record.
    ran, (other,) = saved_records(server, small(quickstart, iterations=2, seeds=1, seed=4322), "mira/optimized")
    assert list(other) == [node] and rewards_of(other[node]) == pytest.approx(ran) != rewards_of(first[node])


def test_a_copy_of_a_workflow_is_told_of_the_run_whose_result_it_was_given(server, quickstart):
    """And of no other one that a node of the same id has had since; what other clients say is no matter."""
    prompt = small(quickstart, iterations=1, seeds=1, seed=11)
    node = find(prompt, OPTIMIZER)

    async def go():
        async with Client(server.url) as client:

            async def run(prompt, workflow):
                id_ = await client.submit(prompt, workflow)
                async for _ in client.events(id_):
                    pass
                await client.outputs(id_)
                live = await client.get(f"/mira/live?nodes={node}&prompt_id={id_}")
                (known,) = (r for r in live["runs"] if r["node"] == node)
                return live["workflow"], known["workflow"], known["also"]

            return [
                await run(prompt, {"id": "a"}),
                await run(prompt, {"id": "b"}),
                await run(changed(prompt, seed=12), {"id": "c"}),
                await run(prompt, {"id": "a"}),
                await run(changed(prompt, seed=13), "no dictionary"),
            ]

    first, copy_, other, again, strange = asyncio.run(go())
    assert first == ("a", "a", ["a"]) and copy_ == ("b", "a", ["a", "b"]) and other == ("c", "c", ["c"])
    # ComfyUI may have kept the first result, or not: the run is the one that was asked for, or known to be another.
    assert again in (("a", "a", ["a"]), ("a", "c", ["c"]))
    assert strange == (None, None, [])


def test_a_list_has_a_record_for_each_and_another_iterate_runs_none_again(server, quickstart):
    prompt = small(quickstart, iterations=2, seeds=1, seed=99)
    node = find(prompt, OPTIMIZER)
    latent = prompt[node]["inputs"]["latent_image"]
    prompt[latent[0]]["inputs"]["batch_size"] = 3
    prompt["900"] = {"class_type": "RebatchLatents", "inputs": {"latents": latent, "batch_size": 1}}
    prompt[node]["inputs"]["latent_image"] = ["900", 0]
    ran, found = saved_records(server, prompt, "mira/optimized")
    assert len(ran) == 9 and len(found) == 3
    assert list(found[0]) == [node, f"{node}#1", f"{node}#2"]
    assert [reward for record in found[0].values() for reward in rewards_of(record)] == pytest.approx(ran)
    # Every picture begins with its own.
    assert [record[node] for record in found] == list(found[0].values())
    assert list(found[2]) == [node, f"{node}#0", f"{node}#1"]
    ran, again = saved_records(server, changed(prompt, iterate=1), "mira/optimized")
    assert ran == [] and [record["kept"] for record in again[0].values()] == [[1]] * 3
    assert [record[node]["settings"]["seed"] for record in again] == [
        record[node]["settings"]["seed"] for record in found
    ]


@pytest.mark.every_host
@pytest.mark.parametrize("cache", ["--cache-none", "--cache-classic"])
def test_a_run_is_known_again_where_what_comes_before_it_is_made_anew(quickstart, cache):
    """At every queueing, or after another workflow; another prompt is another run."""
    prompt = small(quickstart, iterations=2, seeds=1, seed=7)
    node = find(prompt, OPTIMIZER)
    (text,) = (id for id, n in prompt.items() if n["class_type"] == "PrimitiveStringMultiline")
    other = copy.deepcopy(prompt)
    other[text]["inputs"]["value"] = "generate an image of a cat"
    empty = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
    between = {
        "1": {"class_type": "EmptyImage", "inputs": empty},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }

    async def cancelled_between(server):
        async with Client(server.url) as client:
            longer = changed(prompt, iterations=16, seed=8, stop="never")
            await cancelled(client, await client.submit(longer), after=2)
            await client.run(between)
            return (await follow(client, longer))[1][node]["mira"][0]

    with Server(arguments=(cache, *WITH_SMALL_MODEL)) as server:
        first, _ = saved_records(server, prompt, "mira/optimized")
        run(server, between)
        again, (taken,) = saved_records(server, changed(prompt, iterate=1), "mira/optimized")
        another, _ = saved_records(server, other, "mira/optimized")
        ended = asyncio.run(cancelled_between(server))
    assert len(first) == 3 and again == [] and taken[node]["kept"] == [1]
    assert len(another) == 3 and another != first
    assert any("went on from iteration" in notice for notice in ended["notices"]) and len(ended["rows"]) == 17
