"""The recipes of CONTRIBUTING.md, walked: in a copy, exactly what they say, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def code_of(recipe: str) -> str:
    section = TEXT.split(f"### {recipe}\n")[1].split("\n### ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture
def copy(tmp_path):
    for folder in ("sampler", "rewards", "nodes", "demo"):
        shutil.copytree(
            ROOT / folder, tmp_path / "pack" / folder, ignore=shutil.ignore_patterns("__pycache__", "train")
        )
    return tmp_path / "pack"


def run(copy: Path, code: str) -> str:
    start = f"""
import sys, types
pack = types.ModuleType("mira")
pack.__path__ = [{str(copy)!r}]
sys.modules["mira"] = pack
"""
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, cwd=copy, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_regulariser_comes_into_the_loss_and_the_record(copy):
    file = copy / "sampler" / "surrogates.py"
    function, table = code_of("A regulariser"), "# What may stand in the loss.\nREGULARIZERS: dict[str, Surrogate] = {"
    name = re.match(r"def (\w+)", function)[1]
    text = file.read_text()
    assert table in text
    file.write_text(text.replace(table, f'{function}\n\n{table}"{name}": {name}, '))
    out = run(
        copy,
        f"""
sys.path.insert(0, {str(ROOT / "tests" / "core")!r})
import gaussian
from mira.sampler.optimize import Score, Settings, optimize
score = lambda x0: Score(x0.flatten(1).mean(1), {{}}, x0.detach())
runs = [
    optimize(gaussian.rollout(), score, gaussian.noises(), Settings(iterations=5, lr=0.1, regularizer={name!r}, beta=b))
    for b in (0.0, 10.0)
]
free, held = (r.trace.of(0) for r in runs)
assert free[0][{name!r}] == 0 < held[-1][{name!r}] < free[-1][{name!r}], (free, held)
print("held")
""",
    )
    assert out == "held\n"


@pytest.mark.skipif(not os.environ.get("MIRA_COMFYUI"), reason="the schema is ComfyUI's")
def test_both_come_into_the_schema(copy):
    pixel, surrogates = copy / "rewards" / "pixel.py", copy / "sampler" / "surrogates.py"
    function = code_of("A regulariser")
    name = re.match(r"def (\w+)", function)[1]
    table = "# What may stand in the loss.\nREGULARIZERS: dict[str, Surrogate] = {"
    surrogates.write_text(surrogates.read_text().replace(table, f'{function}\n\n{table}"{name}": {name}, '))
    measure = code_of("A reward")
    text = pixel.read_text()
    text = text.replace('REFERENCE = "match reference"', f'{measure}\nREFERENCE = "match reference"')
    pixel.write_text(text)
    out = run(
        copy,
        f"""
sys.path[:0] = [{os.environ.get("MIRA_COMFYUI")!r}, {str(ROOT)!r}]
from testing.pack import with_comfyui
with_comfyui()
import torch
from mira.nodes import MiraOptimizeKSampler, MiraPixelReward
choices = lambda node, id: next(i for i in node.define_schema().inputs if i.id == id).options
assert {name!r} in choices(MiraOptimizeKSampler, "regularizer")
assert "warmth" in choices(MiraPixelReward, "measure")
red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
print(MiraPixelReward.execute("warmth").args[0](red, ["", ""])[0].tolist())
""",
    )
    assert out.splitlines()[-1] == "[1.0, 1.0]"


def test_every_file_that_is_named_is_there():
    named = set(re.findall(r"`((?:sampler|rewards|nodes|tools|tests|web|docs)/[\w/.]*)`", TEXT))
    assert len(named) > 15
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_module_is_on_the_map():
    sketch = TEXT.split("```")[1]
    for folder in ("sampler", "rewards", "nodes", "nodes/host", "nodes/editor", "nodes/shared"):
        for file in (ROOT / folder).glob("*.py"):
            assert file.stem == "__init__" or re.search(rf"\b{file.stem}\b", sketch), f"{folder}/{file.name}"
