"""What the registry would publish: the pack without what `.comfyignore` leaves out, as a custom node of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from testing.pack import ROOT
from tools import publish

LOADS = """
import asyncio, importlib.util, os, sys
sys.path.insert(0, os.environ["MIRA_COMFYUI"])
sys.argv = ["main.py", "--cpu"]
import comfy.cli_args, utils.extra_config
comfy.cli_args.args.cpu = True
import server
server.PromptServer(asyncio.new_event_loop())
import comfy.clip_vision, comfy.sd
before = set(sys.modules)
folder = os.environ["ARCHIVE"]
spec = importlib.util.spec_from_file_location("published", f"{folder}/__init__.py", submodule_search_locations=[folder])
pack = sys.modules["published"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
model = importlib.import_module("published.nodes.demo").load_model()
print(len(nodes), type(model.model).__name__)
"""


def published() -> list[Path]:
    """The files that are left, relative to the pack."""
    lines = [*(ROOT / ".comfyignore").read_text().splitlines(), *(ROOT / ".gitignore").read_text().splitlines()]
    ignored = [line for line in lines if line and not line.startswith("#")]
    folders = {i.rstrip("/") for i in ignored if i.endswith("/")}
    found = []
    for folder, inner, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        # Hidden ones are git's, and caches of tools.
        inner[:] = [n for n in inner if not (n[0] == "." or n in folders or (here / n).as_posix() in folders)]
        found += [here / n for n in names if (here / n).as_posix() not in ignored and not n.endswith(".pyc")]
    return found


def test_no_hidden_folder_is_published():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    hidden = {name.split("/")[0] + "/" for name in tracked if name.startswith(".") and "/" in name}
    assert hidden and hidden <= set((ROOT / ".comfyignore").read_text().splitlines())


def test_the_published_archive_is_a_whole_pack(tmp_path):
    size = 0
    for file in published():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
        size += (ROOT / file).stat().st_size
    assert not (tmp_path / "tests").exists() and not (tmp_path / "bench").exists()
    # The demo's weights are most of it: a newcomer's first picture needs no download.
    weights = sum(f.stat().st_size for f in (tmp_path / "demo" / "weights").iterdir())
    assert size - weights < 5_000_000
    run = subprocess.run(
        [sys.executable, "-c", LOADS], env=os.environ | {"ARCHIVE": str(tmp_path)}, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    *_, imported, said = run.stdout.splitlines()
    assert said.split()[0] == "30", run.stdout
    # The scorers' libraries come when a scorer does: ComfyUI's start waits for none of them.
    assert "published" in imported and not {"open_clip", "timm", "matplotlib", "pandas"} & set(imported.split())


def test_the_registry_finds_its_name_in_every_place():
    from tools.examples import REGISTRY_NAME

    text = (ROOT / "pyproject.toml").read_text()
    assert f'name = "{REGISTRY_NAME}"' in text and f'PublisherId = "{REGISTRY_NAME}"' in text
    assert "[[tool.comfy.Models]]" in text and "requires-comfyui" in text


def test_the_registry_reads_what_the_project_says(capsys):
    """By comfy-cli's own parser, which passes over what it does not understand."""
    from comfy_cli.registry.config_parser import extract_node_configuration

    read = extract_node_configuration(str(ROOT / "pyproject.toml"))
    said = capsys.readouterr()
    assert "Warning" not in said.out + said.err
    assert read.project.name == read.tool_comfy.publisher_id == "mira-alignment"
    assert read.tool_comfy.display_name == "MIRA Alignment" and read.project.license.file == "LICENSE"
    assert read.project.supported_os and read.project.supported_accelerators
    assert read.project.supported_comfyui_version == ">=0.3.64" and read.project.dependencies == ["open_clip_torch"]
    assert {m.location.split("/")[0] for m in read.tool_comfy.models} == {"mira_rewards"}
    assert len(read.tool_comfy.models) == 6 and all(m.model_url for m in read.tool_comfy.models)


def test_published_it_says_where_it_is(tmp_path, capsys):
    """Whoever publishes it, from wherever: the addresses are those of their repository at the version's tag."""
    from comfy_cli.registry.config_parser import extract_node_configuration

    text = (ROOT / "pyproject.toml").read_text()
    version = re.search('^version = "(.*)"', text, re.M)[1]
    file = tmp_path / "pyproject.toml"
    file.write_text(publish.addressed(text, "https://example.com/owner/pack/", f"v{version}"))
    read = extract_node_configuration(str(file))
    said = capsys.readouterr()
    assert "Warning" not in said.out + said.err
    assert read.project.urls.repository == "https://example.com/owner/pack"
    assert read.project.urls.issues == "https://example.com/owner/pack/issues"
    assert read.project.urls.documentation.endswith(f"/blob/v{version}/README.md")
    for shown, sides in ((read.tool_comfy.icon, [1, 1]), (read.tool_comfy.banner_url, [21, 9])):
        there = shown.removeprefix(f"https://example.com/owner/pack/raw/v{version}/")
        width, height = Image.open(ROOT / there).size
        assert width * sides[1] == height * sides[0] and (sides != [1, 1] or width <= 400)
    assert len(read.tool_comfy.models) == 6 and read.project.supported_comfyui_version == ">=0.3.64"
    with pytest.raises(ValueError, match=f"takes the tag 'v{re.escape(version)}'"):
        publish.addressed(text, "https://example.com/owner/pack", "v99.0.0")
