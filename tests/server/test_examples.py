"""Every example workflow, as it is saved, on the real server; those of the demo model run, most on a smaller one."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from mira.sampler.trace import Trace

from testing.servers import on_small_family, on_small_model
from tools.comfy import ROOT, Client, comfyui_folder
from tools.examples import BLUEPRINT, EXAMPLES, NOTES, blueprint, gallery, graph, needs_files, published
from tools.help import columns_js, page, pages
from tools.workflow import find, to_prompt

FOLDER = ROOT / "example_workflows"
HAS_BLUEPRINTS = (comfyui_folder() / "app" / "subgraph_manager.py").is_file()
NAMES = sorted(p.stem for p in FOLDER.glob("*.json"))
ON_DEMO_MODEL = ("01 Quickstart", "10 Guidance")  # the first that a person opens, and one with the model's LoRA
SHORT = {"steps": 3, "step": 1, "iterations": 2, "width": 64, "height": 64}

# What the examples for checkpoints are about.
OF = {
    "17 SD1.5 - aesthetic": "SD 1.5", "18 SDXL - HPS": "SDXL", "19 SDXL Lightning - PickScore": "SDXL",
    "20 Z-Image-Turbo - HPS": "Z-Image", "21 FLUX.2 klein - HPS": "FLUX.2", "22 Qwen-Image - HPS": "Qwen-Image",
}  # fmt: skip


@pytest.fixture(scope="module")
def info(server):
    async def get():
        async with Client(server.url) as client:
            return await client.get("/object_info")

    return asyncio.run(get())


def without_unused_outputs(saved: dict) -> dict:
    """Newer cores have given SaveImage and PreviewImage an output, which nothing is connected to."""
    for node in saved["nodes"]:
        if node["type"] in ("SaveImage", "PreviewImage"):
            node["outputs"] = []
    return saved


def workflow(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def known_here(name: str, info: dict) -> bool:
    """Older cores lack the newest models' own nodes."""
    return all(node["type"] in info or node["type"] == "MarkdownNote" for node in workflow(name)["nodes"])


def test_every_description_has_its_file_and_thumbnail(info):
    assert set(NAMES) == set(EXAMPLES)
    for name in NAMES:
        assert (FOLDER / f"{name}.jpg").stat().st_size > 2000
        if not known_here(name, info):
            continue
        saved = workflow(name)
        assert without_unused_outputs(saved) == without_unused_outputs(
            graph(name, EXAMPLES[name](), info, NOTES[name])
        ), f"{name}.json is out of date: run python -m tools.examples"


@pytest.mark.parametrize("name", [n for n in NAMES if not needs_files(n)])
def test_it_runs(server, info, name):
    saved = workflow(name)
    prompt = to_prompt(saved if name in ON_DEMO_MODEL else on_small_model(saved), info)
    for node in prompt.values():
        node["inputs"] |= {k: v for k, v in SHORT.items() if k in node["inputs"]}
        if node["inputs"].get("judge") == "person":
            node["inputs"] |= {"timeout": 0.3, "on_timeout": "tie"}

    async def go():
        async with Client(server.url) as client:
            return await client.run(prompt)

    outputs = asyncio.run(go())
    for key, node in prompt.items():
        if node["class_type"] in ("SaveImage", "PreviewImage"):
            assert outputs[key]["images"], node
    if name == "02 Held near the model":
        says = outputs[find(prompt, "MiraDriftMonitor")]["mira_text"][0]
        assert "seed-to-seed" in says or "hacked" in says


@pytest.mark.parametrize("name", [n for n in NAMES if needs_files(n)])
def test_it_loads_but_for_the_files(server, info, name):
    """Without the checkpoint nothing runs, and the loader says where its file comes from."""
    if not known_here(name, info):
        pytest.skip("this ComfyUI does not know the model")
    prompt = to_prompt(workflow(name), info)

    async def go():
        async with Client(server.url) as client:
            return await client.submit(prompt)

    with pytest.raises(Exception, match=r"not in list|download it into models/mira_rewards"):
        asyncio.run(go())


@pytest.mark.parametrize("name", [n for n in NAMES if needs_files(n)])
def test_it_runs_on_a_small_network_of_its_family(server, info, name):
    """As it is saved, but for the files, sizes, the scorer, and how often."""
    from testing.families import known  # which brings ComfyUI, for this one test

    if not known_here(name, info) or OF[name] not in known():
        pytest.skip("this ComfyUI does not know the model")
    prompt = on_small_family(to_prompt(workflow(name), info), OF[name])
    side = 256 if OF[name] == "FLUX.2" else 128  # sixteen pixels to a latent, or eight
    most = {"steps": 8, "iterations": 5, "width": side, "height": side}
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= {k: min(inputs[k], v) for k, v in most.items() if k in inputs}

    async def go():
        async with Client(server.url) as client:
            return await client.run(prompt)

    outputs = asyncio.run(go())
    saved = [outputs[key]["images"] for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert len(saved) == 2 and all(saved)
    (said,) = (entry["mira"] for entry in outputs.values() if "mira" in entry)
    trace = Trace.from_dict(said[0])
    rows = trace.of(0)
    assert rows[-1]["round"] == 2 and rows[trace.kept[0]]["reward"] > rows[0]["reward"]


@pytest.mark.parametrize("name", [n for n in NAMES if needs_files(n)])
def test_the_editor_can_offer_what_is_missing(name):
    """Every file that an example names, with the folder that its loader looks in."""
    nodes, known = workflow(name)["nodes"], published()
    named = [(node, value) for node in nodes for value in node.get("widgets_values", []) if value in known]
    files = [v for n in nodes for v in n.get("widgets_values", []) if str(v).endswith((".safetensors", ".pt", ".pth"))]
    assert sorted(files) == sorted(value for _, value in named)
    for node, value in named:
        (offer,) = [m for m in node["properties"]["models"] if m["name"] == value]
        assert offer["url"].startswith("https://") and offer["directory"] == known[value][0]


def test_every_node_has_a_help_page_that_is_up_to_date(info):
    mine = {k for k in info if k.startswith("Mira")}
    assert mine == set(pages())
    for node in mine:
        text = (ROOT / "web" / "docs" / f"{node}.md").read_text()
        assert text == page(node, info[node]), f"{node}.md is out of date: run python -m tools.help"
        assert (ROOT / "web" / "docs" / "pictures" / f"{node}.jpg").stat().st_size > 1000
    assert (ROOT / "web" / "columns.js").read_text() == columns_js(), "out of date: run python -m tools.help"


def test_a_help_page_begins_with_the_inputs_that_matter(info):
    """Of a node that has more than a glance takes in; the names are the node's own."""
    for node in pages():
        groups = info[node]["input"]
        names = [*groups.get("required", {}), *groups.get("optional", {})]
        before = (ROOT / "web" / "docs" / f"{node}.md").read_text().split("## ")[0]
        if len(names) <= 4:
            continue
        _, _, told = before.partition("inputs matter:\n\n")
        heads = [line.split(":")[0] for line in told.split("\n\n")[0].splitlines()]
        assert 2 <= len(heads) <= 3, node
        assert {name for head in heads for name in re.findall(r"`(\w+)`", head)} <= set(names), node


@pytest.mark.skipif(not HAS_BLUEPRINTS, reason="this ComfyUI shows no blueprints")
def test_the_blueprint_is_up_to_date_and_offered(server, info):
    saved = json.loads((ROOT / "subgraphs" / f"{BLUEPRINT}.json").read_text())
    assert saved == blueprint(info), "run python -m tools.examples"

    async def get():
        async with Client(server.url) as client:
            return await client.get("/global_subgraphs")

    assert BLUEPRINT in [entry["name"] for entry in asyncio.run(get()).values()]


def test_the_gallery_shows_every_example():
    assert (ROOT / "docs" / "gallery.md").read_text() == gallery()


@pytest.mark.parametrize("language", ["fr", "zh"])
def test_a_language_names_every_node_and_nothing_that_is_not_there(server, info, language):
    async def get():
        async with Client(server.url) as client:
            return await client.get("/i18n")

    told = asyncio.run(get())[language]
    mine = {k: v for k, v in info.items() if k.startswith("Mira")}
    assert told["nodeDefs"].keys() >= mine.keys()
    for node, of in mine.items():
        said = told["nodeDefs"][node]
        assert said["display_name"].startswith("MIRA") and said["description"] != of["description"]
        inputs = {**of["input"].get("required", {}), **of["input"].get("optional", {})}
        assert said.get("inputs", {}).keys() == inputs.keys()
        assert all(int(place) < len(of["output"]) for place in said.get("outputs", {}))
        assert {part for part in of["category"].split("/")} <= told["nodeCategories"].keys()
