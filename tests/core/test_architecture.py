"""The layers: only `nodes/` and the guarded root know ComfyUI; the core knows no reward, and rewards no core."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution", "node_helpers"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("folder", ["sampler", "rewards", "demo"])
def test_imports(folder):
    files = [p for p in (ROOT / folder).rglob("*.py") if "train" not in p.parts]
    assert files
    for path in files:
        for name in imports(path):
            assert name.split(".")[0] not in HOST, f"{path.name} imports {name}"
            other = {"sampler": "rewards", "rewards": "sampler"}.get(folder)
            assert other is None or other not in name.split("."), f"{path.name} imports {name}"


FLOORS = {"host": (), "editor": (), "shared": ("host", "editor")}  # what each may import of the others


@pytest.mark.parametrize("folder", FLOORS)
def test_the_rooms_of_nodes_stand_on_one_another(folder):
    """Nodes import from all of them, none imports a node, and there is no circle."""
    nodes = {p.stem for p in (ROOT / "nodes").glob("*.py")} - {"__init__"}
    assert len(nodes) > 8
    for path in (ROOT / "nodes" / folder).glob("*.py"):
        for name in imports(path):
            if not name.startswith("..") or name.startswith("..."):
                continue
            room = name[2:].split(".")[0]
            assert room not in nodes, f"{folder}/{path.name} imports the node {room}"
            assert not room or room in FLOORS[folder], f"{folder}/{path.name} imports {room}"


PAGE = re.compile(r"\b(document|window|app|api|performance|requestAnimationFrame)\b[.(]")


def test_one_script_alone_knows_the_editor_and_pure_ones_no_page():
    scripts = {p.name: p.read_text() for p in (ROOT / "web").glob("*.js")}
    assert {name for name, text in scripts.items() if "/scripts/" in text} == {"mira.js"}
    pure = {name: text for name, text in scripts.items() if text.startswith("// Pure")}
    assert {"asked.js", "graph.js", "layout.js", "png.js", "series.js"} == pure.keys()
    for name, text in pure.items():
        assert not (found := PAGE.search(text)), f"{name} has {found}"
        for other in re.findall(r'from "\./([\w.]+)"', text):
            assert other in pure or other == "columns.js", f"{name} imports {other}"
    assert PAGE.search(scripts["chart.js"])  # it can fail
