"""A test's server with Small Model in it, and graphs on that instead of the demo model: for all but the pictures."""

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
