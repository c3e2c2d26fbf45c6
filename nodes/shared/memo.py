"""The last runs of the optimising nodes, so that another of their iterates can be taken without running again."""

from __future__ import annotations

import inspect
import itertools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import folder_paths
from comfy.cli_args import args
from torch import Tensor

from ...sampler.resume import Left
from ..editor.graph import digest_of, is_link, place_in_list, with_all_before
from ..host import Optimized
from .files import written

PLAIN = (int, float, str, bool, type(None))
MOST, MOST_RUNS = 8, 64  # nodes whose iterates are held, and runs of them: a list is many
MOST_CUTS = 64
USED = "used "  # before the name of a setting: its value, whatever the widget says that a preset overrules
TAKEN = {"iterate", "final_restart"}  # what a run is asked for when it is there
LONGER = {"iterations", "preset"}  # the settings of which a run that goes on has others
ROOM_LEFT = 2**30  # bytes for what runs can be gone on with: an optimiser's state is several times the noises


@dataclass
class _Run:
    """inputs: held, see `_hold`. graph: what came before the node, where that tells. done: the run, and what the editor
    was told of it. taken: what was taken of it last.
    """

    inputs: dict
    graph: dict | None
    done: tuple[Optimized, Any]
    taken: tuple[int, float]


_runs: OrderedDict[str, _Run] = OrderedDict()  # by node and element of a list
_cuts: list[tuple[int, dict]] = []  # the widgets of runs that were cut short, numbered
_numbers = itertools.count(1)


GONE = object()  # in the place of what is no more, and of nothing else: an input that is missing is None


def _hold(value: object) -> Callable:
    """Gives the value back. Models and the like are not kept alive by having been used."""
    if isinstance(value, PLAIN):
        return lambda: value
    try:
        there = weakref.ref(value)
        return lambda: GONE if there() is None else there()
    except TypeError:  # lists and dicts: conditioning, latents
        return lambda: value


def _same(a: dict, b: dict) -> bool:
    """a: held, b: as they are. Plain values by value; models and the like by identity, as ComfyUI hands the same ones
    to an unchanged node.
    """
    return a.keys() == b.keys() and not _changed(a, b)


def _changed(a: dict, b: dict) -> list[str]:
    """The names that both have whose values differ, as `_same` compares."""
    pairs = [(k, a[k](), b[k]) for k in a if k in b]
    return [k for k, x, y in pairs if not (x is y or (isinstance(x, PLAIN) and isinstance(y, PLAIN) and x == y))]


def _made_alike(a: dict, b: dict) -> bool:
    """As `_same`, of inputs that come from the same graph, made anew: conditioning and latents by what is in them; what
    cannot be looked into (a model) by its kind.
    """
    return a.keys() == b.keys() and all(_alike(a[k](), b[k]) for k in a)


def _alike(x: Any, y: Any) -> bool:
    if x is y or (x is GONE and not isinstance(y, PLAIN)):
        return True
    if type(x) is not type(y):
        return False
    if isinstance(x, Tensor):
        return x.shape == y.shape and bool((x == y).all())
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(_alike, x, y))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_alike(x[k], y[k]) for k in x)
    return x == y if isinstance(x, PLAIN) else True


def graph_before(hidden: Any) -> dict[str, str] | None:
    """What a node's links come from, as ComfyUI's own cache tells one input from another: by the node's inputs, a
    digest, and what the nodes before it look at beyond theirs (at a file). None where that does not tell: one of them
    gives something else every time, or is not known.
    """
    try:
        prompt, kinds = hidden.prompt, sys.modules["nodes"].NODE_CLASS_MAPPINGS
        inputs = prompt[str(hidden.unique_id)]["inputs"]
        links = {k: v for k, v in inputs.items() if isinstance(v, list) and k not in TAKEN}
        if not all(is_link(link, prompt) for link in links.values()):
            return None
        before = sorted(with_all_before(prompt, [link[0] for link in links.values()]))
        looked = {node: _looked_at(kinds[prompt[node]["class_type"]], prompt[node]) for node in before}
        digests = {k: f"{digest_of(prompt, link[0])}:{link[1]}" for k, link in links.items()}
        beyond = {f"beyond {node}": repr(what) for node, what in looked.items() if what is not None}
        return digests | beyond | {f"files of {node}": found for node in before if (found := _files_of(prompt[node]))}
    except Exception:  # a graph of another's making; what cannot be told costs a run, and no more
        return None


def _files_of(node: dict) -> str:
    """When the files that a node's inputs name were written: ComfyUI's own loaders do not ask, and a LoRA that is
    trained again under its name is another one.
    """
    names = [v for v in node["inputs"].values() if isinstance(v, str) and len(v) < 256]
    paths = [folder_paths.get_full_path(folder, n) for n in names for folder in folder_paths.folder_names_and_paths]
    return written(*filter(None, paths))


def _looked_at(kind: type, node: dict) -> Any:
    """What a node's class asks ComfyUI to compare beside its inputs, as it is told of those; None where nothing.
    Raises ValueError where that does not tell one result from another.
    """
    own = [vars(c) for c in kind.__mro__ if c.__module__.split(".")[0] != "comfy_api"]
    names = [name for name in ("fingerprint_inputs", "IS_CHANGED") if any(name in defined for defined in own)]
    if getattr(kind, "NOT_IDEMPOTENT", False):
        raise ValueError(f"{kind.__name__} gives something else every time")
    if not names:
        return None
    if "is_changed" in node and not getattr(args, "cache_none", False):  # ComfyUI's cache has asked, of each of a list
        found = node["is_changed"] if isinstance(node["is_changed"], list) else [node["is_changed"]]
    else:
        ask = getattr(kind, names[0])
        if inspect.iscoroutinefunction(ask):
            raise ValueError(f"{kind.__name__} takes its time to tell")
        found = [ask(**{k: None if isinstance(v, list) else v for k, v in node["inputs"].items()})]  # as ComfyUI does
    if not all(isinstance(value, PLAIN) and value == value for value in found):  # NaN is another one every time
        raise ValueError(f"{kind.__name__} does not tell")
    return found


def of(
    hidden: Any, inputs: dict, taken: tuple[int, float], run: Callable[[], tuple[Optimized, object]]
) -> tuple[Optimized, Any]:
    """What `run` gave for these very inputs when they were asked for before, or gives now. hidden: the node's own.
    taken: what of it is wanted, (iterate, share of a final restart).

    A run that was cut short is repeated when it is asked for again as it was: who queues it again wants its end. What
    comes before a node is made anew after another workflow, and with --cache-none always: for another iterate the same
    graph will do.
    """
    node, graph = _place(hidden), graph_before(hidden)
    before = _runs.get(node)
    if before:
        optimized, last = before.done[0], before.taken
        same = _same(before.inputs, inputs) or (
            taken != last and _of_one_graph(before.inputs, before.graph, inputs, graph)
        )
        if same and not (optimized.result.cut_short and taken == last):
            before.graph, before.taken = graph, taken
            if optimized.result.cut_short and not 0 <= taken[0] < len(optimized.iterates):
                ask_again(inputs)  # its best so far once more: next time, its end
            return before.done
    done = run()
    _runs[node] = _Run({k: _hold(v) for k, v in inputs.items()}, graph, done, taken)
    _runs.move_to_end(node)
    _make_room(node)
    if done[0].result.cut_short:
        ask_again(inputs)
    return done


def _make_room(new: str) -> None:
    """The oldest go, a node with all elements of its list: but never one for the sake of another of the same list."""
    nodes = list(dict.fromkeys(place.split("#")[0] for place in reversed(_runs)))
    while nodes[1:] and (len(nodes) > MOST or len(_runs) > MOST_RUNS):
        oldest = nodes.pop()
        for place in [p for p in _runs if p.split("#")[0] == oldest]:
            del _runs[place]
    if len(_runs) > MOST_RUNS:
        del _runs[new]
    room = ROOM_LEFT
    for place, run in reversed(_runs.items()):
        result = run.done[0].result
        if result.left and isinstance(result.left.value, bytes):
            room -= len(result.left.value)
            if room < 0 and place != new:
                result.left = Left(None, result.left.done)


def _place(hidden: Any) -> str:
    return f"{hidden.unique_id}#{place_in_list()}"  # a list is one run for each of its elements


def ask_again(inputs: dict) -> None:
    """What came of these inputs was cut short: ComfyUI's own cache is not to have it."""
    _cuts.append((next(_numbers), {k: v for k, v in inputs.items() if isinstance(v, PLAIN)}))
    del _cuts[:-MOST_CUTS]


def left_of(hidden: Any, inputs: dict, used: dict) -> tuple[tuple[Left, Any] | None, str]:
    """((what a run of these inputs can go on from, what the editor was told of it) or None, why none, if that is worth
    a word): the node's last run, where that was cut short or had fewer iterations.
    """
    before = _runs.get(_place(hidden))
    if before is None:
        return None, ""
    (optimized, live), left = before.done, before.done[0].result.left
    last = {k.removeprefix(USED): there() for k, there in before.inputs.items() if k.startswith(USED)}
    same = last.keys() == used.keys() and all(last[k] == used[k] for k in used.keys() - LONGER)
    others = [
        {k: v for k, v in of.items() if k not in used and not k.startswith(USED)} for of in (before.inputs, inputs)
    ]
    if left is None or not same or others[0].keys() != others[1].keys():
        return None, ""
    more = used["iterations"] - last["iterations"]
    if more < 0 or (more == 0 and not optimized.result.cut_short):
        return None, ""
    changed = _changed(*others)
    if changed and not _of_one_graph(others[0], before.graph, others[1], graph_before(hidden)):
        # Of a setting of one's own one knows; and with --cache-none nothing is ever the same.
        quiet = getattr(args, "cache_none", False) or any(isinstance(inputs[k], PLAIN) for k in changed)
        why = f"begun anew: {', '.join(changed)} changed, or was made anew, since the run before"
        return None, "" if quiet else why
    if left.value is None:
        return None, "begun anew: there was no room to keep what it takes to go on from the run before"
    return (left, live), ""


def last_run(hidden: Any, inputs: dict, free: Collection[str]) -> Optimized | None:
    """The node's last run, where it was of these inputs but for the `free` ones."""
    if (before := _runs.get(_place(hidden))) is None:
        return None
    known, asked = ({k: v for k, v in of.items() if k not in free} for of in (before.inputs, inputs))
    same = _same(known, asked) or _of_one_graph(known, before.graph, asked, graph_before(hidden))
    return before.done[0] if same else None


def _of_one_graph(known: dict, its_graph: dict | None, inputs: dict, graph: dict | None) -> bool:
    """Whether inputs, though made anew, are the known ones."""
    return graph is not None and graph == its_graph and _made_alike(known, inputs)


def cuts(inputs: dict) -> int:
    """The number of the last run of these widgets that was cut short, 0 if none was; links, which ComfyUI does not know
    yet when it asks, fit any.

    As a node's fingerprint it takes a cancelled run out of ComfyUI's own cache.
    """
    given = {k: v for k, v in inputs.items() if isinstance(v, PLAIN) and v is not None and k != "iterate"}
    return max((n for n, cut in _cuts if all(cut.get(k, v) == v for k, v in given.items())), default=0)


def take_iterate(done: Optimized, iterate: int, noises: bool) -> tuple[Tensor, list[int], list[str]]:
    """(latent, kept iterations, notices): the kept ones for -1, and for one that the run never had; else that iterate
    of every image. noises: whether the node hands out those of the kept ones.
    """
    trace, count = done.result.trace, len(done.iterates)
    if iterate < 0:
        return done.latent, trace.kept, []
    if iterate >= count:
        ended = "was cut short at" if done.result.cut_short else "ended at iteration"
        which = "best so far" if done.result.cut_short else "own choice (iterate -1)"
        return done.latent, trace.kept, [f"iterate is {iterate}, but the run {ended} {count - 1}: this is its {which}"]
    taken = [iterate] * len(trace.kept)
    if taken == trace.kept:
        return done.iterates[iterate], taken, []
    chosen = ", ".join(map(str, dict.fromkeys(trace.kept)))
    whose = ", of which noise and sampler are," if noises else ""
    told = f"iteration {iterate} was taken; the run's own choice{whose} is {chosen} (iterate -1)"
    return done.iterates[iterate], taken, [told]
