"""Writes the help pages web/docs/<NodeId>.md: what docs/help/<NodeId>.md says, and the inputs and outputs as the server
knows them. `{files}` in a page stands for docs/help/files.md, and so on: what several pages say.

    python -m tools.help      (in ComfyUI's environment, $MIRA_COMFYUI set, as dev.py sets it)

And web/columns.js: which columns of a record the chart does not draw. Pictures, web/docs/pictures/<NodeId>.jpg, are
made by tools.pictures.
"""

from __future__ import annotations

import asyncio
import re

from testing.pack import mira

from .comfy import ROOT, Client, Server

COLUMNS = mira("sampler.trace").COLUMNS
FOLDER = ROOT / "web" / "docs"
PROSE = ROOT / "docs" / "help"
SHARED = ("files", "optimising")


def line(text) -> str:
    return " ".join(str(text).split())


def point(name: str, facts: list, said: str) -> str:
    """A point of a list, which a narrow panel wraps, as it does no table."""
    known = "; ".join(line(fact) for fact in facts if line(fact))
    return f"- `{name}`{f' ({known})' if known else ''}{f': {line(said)}' if line(said) else ''}"


def described(name: str, spec: list, optional: bool) -> str:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list) or kind == "COMBO":
        values = kind if isinstance(kind, list) else options.get("options", [])
        # Files and samplers differ from one installation to the next.
        kind = "choice" if len(values) > 10 or any("." in str(v) for v in values) else ", ".join(map(str, values))
    elif kind in ("INT", "FLOAT") and "min" in options:
        kind = f"{options['min']:g} to {options['max']:g}"
    default = line(options.get("default", "")) if kind != "choice" else ""
    facts = [kind, default and f"default {default}", "optional" if optional else ""]
    return point(name, facts, options.get("tooltip", ""))


def pages() -> list[str]:
    """The ids of the nodes that have one."""
    return sorted(path.stem for path in PROSE.glob("Mira*.md"))


def prose(node: str) -> tuple[str, str]:
    """(when to use it and the inputs that matter, what else there is to say). A paragraph and a point of a list are one
    line each: the editor's help keeps line breaks.
    """
    text = (PROSE / f"{node}.md").read_text()
    for name in SHARED:
        text = text.replace(f"{{{name}}}", (PROSE / f"{name}.md").read_text())
    parts = [re.sub(r"\s*\n(?!- )\s*", " ", part.strip()) for part in text.strip().split("\n\n")]
    first = 3 if parts[1:] and parts[1].endswith("matter:") else 1
    return "\n\n".join(parts[:first]), "\n\n".join(parts[first:])


def presets(inputs: dict) -> list[str]:
    """What presets set: the first one whole, of the others what differs from it; nothing for a node without any."""
    options = inputs["preset"][1] if "preset" in inputs else {}
    if "mira_presets" not in options:
        return []
    # What it sets, and in the editor the dials, too.
    sets = {preset: options["mira_dials"][preset] | values for preset, values in options["mira_presets"].items()}
    first = next(iter(sets))
    lines = ["## Presets", "", f"In the editor. What is as in {first}, or left as it is, is not listed.", ""]
    for preset, values in sets.items():
        told = {k: v for k, v in values.items() if preset == first or sets[first].get(k) != v}
        lines.append(f"- **{preset}**: {', '.join(f'`{k}` {line(v)}' for k, v in told.items() if k in inputs)}")
    return [*lines, ""]


def page(node: str, info: dict) -> str:
    """The first screen: when to use it, the inputs that matter, its picture."""
    when, more = prose(node)
    picture = f"![{info['display_name']}](pictures/{node}.jpg)"
    lines = [f"# {info['display_name']}", "", when, "", picture, "", *([more, ""] if more else [])]
    inputs = [(n, s, g == "optional") for g in ("required", "optional") for n, s in info["input"].get(g, {}).items()]
    lines += presets({name: spec for name, spec, _ in inputs})
    if inputs:
        lines += ["## Inputs", "", *(described(*i) for i in inputs), ""]
    lines += ["## Outputs", ""]
    tooltips = info.get("output_tooltips") or [""] * len(info["output"])
    for name, kind, tooltip in zip(info["output_name"], info["output"], tooltips, strict=True):
        lines.append(point(name, [kind], tooltip or ""))
    if node == "MiraLoadTrace":
        lines += [
            "",
            "## Columns",
            "",
            "Beside these a record has the parts of a reward, as `reward.` and their names.",
            "",
        ]
        lines += [point(name, [], column.said) for name, column in COLUMNS.items()]
    return "\n".join(lines) + "\n"


def columns_js() -> str:
    names = ", ".join(f'"{name}"' for name, column in COLUMNS.items() if not column.measured)
    return (
        "// Made by tools/help.py of COLUMNS in sampler/trace.py: what a row holds that was not measured of an image.\n"
        f"export const BOOKKEEPING = new Set([{names}]);\n"
    )


async def ask() -> dict:
    with Server() as server:
        async with Client(server.url) as client:
            return await client.get("/object_info")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    (ROOT / "web" / "columns.js").write_text(columns_js())
    everything = asyncio.run(ask())
    for node_id in pages():
        (FOLDER / f"{node_id}.md").write_text(page(node_id, everything[node_id]))
        print(FOLDER / f"{node_id}.md")
