"""What a prompt's graph says: which nodes it runs, and what each of them depends on."""

from __future__ import annotations

import hashlib
import json
import sys

from comfy_execution.utils import get_executing_context


def is_link(value: object, prompt: dict) -> bool:
    """Whether an input's value is the output of a node of the prompt: [its id, which]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(prompt.get(value[0]), dict)
    )


def with_all_before(prompt: dict, nodes: list[str]) -> dict[str, int]:
    """These nodes of a prompt and what comes before them, each with how many links lie between, by the shortest way."""
    found = {node: 0 for node in nodes if isinstance(prompt.get(node), dict)}
    left = list(found)
    for node in left:
        for before in (v[0] for v in (prompt[node].get("inputs") or {}).values() if is_link(v, prompt)):
            if before not in found:
                found[before] = found[node] + 1
                left.append(before)
    return found


def run_by(prompt: dict) -> list[str]:
    """The nodes that ComfyUI runs of a prompt: those with an output of their own, and what comes before them."""
    known = sys.modules["nodes"].NODE_CLASS_MAPPINGS  # ComfyUI's
    ends = [
        node
        for node, of in prompt.items()
        if isinstance(of, dict) and getattr(known.get(of.get("class_type")), "OUTPUT_NODE", False)
    ]
    found = with_all_before(prompt, ends)
    return [node for node in prompt if node in found]


def inputs_before(prompt: dict, node: str) -> dict[str, tuple]:
    """What a node's result depends on: {id: (class, inputs)} of itself and of all that it is made from."""
    before = sorted(with_all_before(prompt, [node]))
    return {id_: (prompt[id_].get("class_type"), prompt[id_].get("inputs") or {}) for id_ in before}


def digest_of(prompt: dict, node: str) -> str:
    """A digest of the node and of everything that comes before it, which ComfyUI's cache goes by."""
    digests: dict[str, str] = {}
    left, begun = [node], set[str]()
    while left:  # not by recursion: graphs are longer than Python's stack
        key, of = left[-1], prompt[left[-1]]
        if key in digests:
            left.pop()
            continue
        before = [value[0] for value in of.get("inputs", {}).values() if is_link(value, prompt)]
        begun.add(key)
        if first := [b for b in before if b not in begun]:
            left.extend(first)
            continue
        left.pop()
        inputs = {  # what has begun and has no digest is in a circle, which ComfyUI refuses
            name: digests.get(value[0], "") + str(value[1:]) if is_link(value, prompt) else value
            for name, value in of.get("inputs", {}).items()
        }
        said = json.dumps([of.get("class_type"), inputs], sort_keys=True, default=str)
        digests[key] = hashlib.sha256(said.encode()).hexdigest()
    return digests[node]


def running() -> str | None:
    """The id of the node that ComfyUI executes."""
    context = get_executing_context()
    return context.node_id if context else None


def place_in_list() -> int:
    """Which element of a list ComfyUI runs the node on, 0 where there is none."""
    context = get_executing_context()
    return (context.list_index if context else None) or 0
