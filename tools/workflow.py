"""A saved workflow (the editor's graph) as a prompt for ComfyUI's API, as the editor makes it when it queues."""

from __future__ import annotations

SEED_CONTROLS = {"fixed", "increment", "decrement", "randomize"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def widgets(info: dict) -> list[str]:
    """The names of a node's widget inputs, in the order in which the editor saves their values."""
    names = []
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *options = info["input"][group][name]
            options = options[0] if options else {}
            if (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
                names.append(name)
    return names


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """workflow: the editor's JSON. object_info: the server's `/object_info`.

    Raises ValueError for a node that the server does not know.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        if node["type"] not in object_info:
            raise ValueError(f"the workflow uses the node {node['type']!r}, which this server does not have")
        values = list(node.get("widgets_values", []))
        inputs = {}
        for name in widgets(object_info[node["type"]]):
            if values:
                inputs[name] = values.pop(0)
            if values and name in ("seed", "noise_seed") and values[0] in SEED_CONTROLS:
                values.pop(0)
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = links[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def find(prompt: dict, kind: str) -> str:
    """The id of the only node of this kind."""
    (found,) = (id for id, node in prompt.items() if node["class_type"] == kind)
    return found
