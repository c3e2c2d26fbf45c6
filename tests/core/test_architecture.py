"""The layers: only `nodes/` and the guarded root know ComfyUI; the core knows no reward, and rewards no core."""

import ast
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
