"""A test's server with Small Model and Small Family in it, and graphs on these instead of the demo model or files."""

from __future__ import annotations

import copy

from tools.comfy import ROOT

WITH_SMALL_MODEL = ("--extra-model-paths-config", str(ROOT / "testing" / "paths.yaml"))


def on_small_model(graph: dict) -> dict:
    """The same prompt or workflow, but for its MIRA Demo Model."""
    graph = copy.deepcopy(graph)
    workflow = "nodes" in graph
    for node in graph["nodes"] if workflow else graph.values():
        kind = "type" if workflow else "class_type"
        if node[kind] == "MiraDemoModel":
            node[kind] = "SmallModel"
    return graph


# Loaders of files: which of Small Family's outputs each of theirs is.
LOADERS = {"CheckpointLoaderSimple": (0, 1, 2), "UNETLoader": (0,), "CLIPLoader": (1,), "VAELoader": (2,)}


def on_small_family(prompt: dict, name: str) -> dict:
    """The same prompt, but for its loaders of files: one Small Family of this name, and brightness for the scorer."""
    outputs = {id: LOADERS[node["class_type"]] for id, node in prompt.items() if node["class_type"] in LOADERS}
    made = {"family": {"class_type": "SmallFamily", "inputs": {"name": name}}}
    for id, node in prompt.items():
        if id in outputs:
            continue
        inputs = {
            k: ["family", outputs[v[0]][v[1]]] if isinstance(v, list) and v[0] in outputs else v
            for k, v in node["inputs"].items()
        }
        made[id] = {"class_type": node["class_type"], "inputs": inputs}
        if node["class_type"].startswith("MiraLoad"):
            made[id] = {"class_type": "MiraPixelReward", "inputs": {"measure": "brightness"}}
    return made
