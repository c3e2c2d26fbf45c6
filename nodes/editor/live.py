"""What the graph editor is told while a node runs, and what a page that was loaded again can ask for."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from aiohttp import web
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from ...rewards.preprocess import picture
from ...sampler.optimize import Score
from ...sampler.trace import Trace, json_row
from .graph import inputs_before
from .on_disk import Unfinished

log = logging.getLogger("mira")
ROUTE = "/mira/live"
PREVIEW = 512  # pixels of the longer side, of ComfyUI's own preview and of a stored one
MOST_SHOWN = 8  # images of a batch that are stored
MOST = 8  # runs that are remembered
FILED = 32  # runs whose thumbnails stay
UNTOLD = "the editor was not told of every iteration"

_runs: OrderedDict[str, tuple[dict, dict]] = OrderedDict()  # (run, its `inputs_before`) by node id, the newest last
_previews: deque[dict[int, dict]] = deque()  # of the last runs, whatever their nodes, the newest last


def store(image: Image.Image, name: str, **options: Any) -> dict:
    """Into ComfyUI's temporary folder; returns what /view needs to show it."""
    folder = os.path.join(folder_paths.get_temp_directory(), "mira")
    os.makedirs(folder, exist_ok=True)
    image.save(os.path.join(folder, name), **options)
    return {"filename": name, "subfolder": "mira", "type": "temp"}


def forget(shown: dict) -> None:
    """Delete what `store` stored, and others of the same iteration."""
    for one in (shown, *shown.get("others", ())):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder_paths.get_temp_directory(), one["subfolder"], one["filename"]))


def _running() -> Sequence | None:
    """The item of ComfyUI's queue that is being run: (number, id, prompt, extra data, ...)."""
    queue = getattr(PromptServer.instance, "prompt_queue", None)
    return next(iter(queue.currently_running.values()), None) if queue else None


def _queued(prompt_id: str) -> Sequence | None:
    """The same of a prompt that is being run, or was."""
    queue = PromptServer.instance.prompt_queue
    with queue.mutex:  # meanwhile it is in one of both
        past = queue.history.get(prompt_id)
        items = [*queue.currently_running.values(), *([past["prompt"]] if past else [])]
    return next((item for item in items if item[1] == prompt_id), None)


def _workflow_of(item: Sequence) -> str | None:
    """The id of the workflow that an item was made from; other clients than the editor need not say."""
    found = item[3]
    for name in ("extra_pnginfo", "workflow", "id"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def running(node: str) -> tuple[str | None, str | None]:
    """(the id of the workflow that is being run, the class of its node): another one may have the same node ids."""
    item = _running()
    return (_workflow_of(item), item[2].get(node, {}).get("class_type")) if item else (None, None)


def text_output(text: str, **more: Any) -> dict:
    """A `ui` output that a node shows in words, of the node that is being executed."""
    context = get_executing_context()
    workflow, kind = running(context.node_id) if context else (None, None)
    return {"mira_text": [text], "mira_of": [{"workflow": workflow, "kind": kind}]} | more


class LiveRun:
    """Progress bar, preview, stored thumbnails and an event per iteration, to the client that asked for the run."""

    def __init__(self, hidden: Any, iterations: int, told: dict, settings: dict, seeds: int = 0) -> None:
        """hidden: the node's own. told: what the chart needs to know; settings: of the run, as its record has them.
        seeds: how many samples are compared before the first iteration.
        """
        node = hidden.unique_id
        self.node, self.seeds = node, seeds
        self.unfinished = Unfinished(node, told | settings, hidden.extra_pnginfo)
        self.name = secrets.token_hex(8)
        self.notices: list[str] = []  # what could not be reported, once
        self.bar = comfy.utils.ProgressBar(seeds + iterations + 1, node_id=node)
        self.server = PromptServer.instance
        context = get_executing_context()
        workflow, kind = running(node)
        item = _running()
        self.run = {
            "run": self.name,
            "node": node,
            "workflow": workflow,
            "kind": kind,
            "also": [],  # ids of workflows that are a copy, as far as this goes, and were given its result
            "prompt_id": context.prompt_id if context else None,
            "client": self.server.client_id,
            "iterations": iterations,
            "settings": told,
            "rows": [],
            "previews": {},
        }
        _previews.append(self.run["previews"])
        while len(_previews) > FILED:
            gone = _previews.popleft()
            for shown in gone.values():
                forget(shown)
            gone.clear()  # whoever goes on with that run is promised no picture
        _runs[node] = self.run, inputs_before(item[2], node) if item else {}
        _runs.move_to_end(node)
        while len(_runs) > MOST:
            _runs.popitem(last=False)
        with self._noted("the editor was not told that the run begins"):
            self._send("mira.begin", seeds=seeds)

    def go_on(self, before: LiveRun, done: int) -> None:
        """Begin with the first `done` iterations of an earlier run, and tell of them."""
        self.run["rows"] = [r for r in before.run["rows"] if r["iteration"] < done]
        self.run["previews"] |= {k: p for k, p in before.run["previews"].items() if k < done}
        self.unfinished.go_on(before.unfinished, done)
        if done:
            with self._noted(UNTOLD):
                self._send(iteration=done - 1, rows=self.run["rows"], previews=self.run["previews"])

    def tell_seeds(self, count: int) -> None:
        """So many of the seeds are sampled and scored."""
        with self._noted("the editor was not told of every seed"):
            self._send("mira.seed", count=count, seeds=self.seeds)
            self.bar.update_absolute(count)

    def __call__(self, k: int, rows: list[dict], score: Score) -> None:
        with self._noted("the best image so far could not be stored while the run went on", trace=False):
            self.unfinished(k, rows, score)
        with self._noted(UNTOLD):
            self._tell(k, [json_row(r) for r in rows], score)

    @contextlib.contextmanager
    def _noted(self, what: str, trace: bool = True) -> Iterator[None]:
        """Nothing that fails within may cost the image, but for the interrupt that a progress bar raises."""
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as problem:
            self._note(f"{what}: {problem}", trace=trace)

    def _note(self, notice: str, trace: bool = False) -> None:
        """Once a run: what cannot be reported now will not be at the next iteration either."""
        if not self.notices:
            self.notices.append(notice)
            log.warning("node %s: %s", self.node, notice, exc_info=trace)

    def _tell(self, k: int, rows: list[dict], score: Score) -> None:
        # A choice that was taken back, or a retry, is reported again.
        self.run["rows"] = [r for r in self.run["rows"] if r["iteration"] < k] + rows
        shown = [picture(image) for image in score.images[:MOST_SHOWN]]
        for image in shown:
            image.thumbnail((PREVIEW, PREVIEW))
        preview = None
        try:
            preview = store(shown[0], f"{self.name}_{k}.jpg", quality=88)
            self.run["previews"][k] = preview
            for b, image in enumerate(shown[1:], 1):
                other = store(image, f"{self.name}_{k}_{b}.jpg", quality=88)
                preview.setdefault("others", []).append(other)
        except OSError as problem:  # a full disk; chart and progress can do without
            self._note(f"previews could not be stored in ComfyUI's temp folder: {problem}")
        self._send(iteration=k, rows=rows, preview=preview)
        self.bar.update_absolute(self.seeds + k + 1, preview=("JPEG", shown[0], PREVIEW))

    def _send(self, what: str = "mira.step", **event: Any) -> None:
        if self.server.client_id is None and not self.run["workflow"]:  # a script's, of which every page would be told
            return
        of = {name: self.run[name] for name in ("run", "node", "workflow", "kind", "iterations", "settings")}
        self.server.send_sync(what, of | event, self.server.client_id)

    def output(self, trace: Trace) -> dict:
        """The node's `ui` output, from which history and a reloaded page draw the same chart."""
        of = {name: self.run[name] for name in ("run", "workflow", "kind")}
        self.unfinished.done()
        self.run["output"] = {"mira": [trace.to_dict() | of | {"previews": dict(self.run["previews"])}]}
        return self.run["output"]


async def list_runs(request: web.Request) -> web.Response:
    """The runs of this client, and those of the nodes that it names: a cached node tells nothing by itself. And which
    workflow the prompt that it names is of: what is cached may be of another one, of which this is a copy. And what
    the run that it names was asked (`inputs_before`). No runs that ended without a result; a script's,
    which has neither client nor workflow, by their nodes alone.
    """
    client, nodes = request.query.get("client_id"), request.query.get("nodes", "").split(",")
    without = request.query.get("runs") == "no"  # they may be many megabytes
    item = _queued(request.query.get("prompt_id", ""))
    workflow = _workflow_of(item) if item else None
    known = list(_runs.items())  # another thread adds to it
    for node, (run, before) in known:
        if item and workflow and node in nodes and before and before == inputs_before(item[2], node):
            run["also"] = sorted({*run["also"], workflow})
    runs = [] if without else [_told(run) for node, (run, _) in known if _is_for(run, client) or node in nodes]
    of = request.query.get("asked")
    what = next((before for _, (run, before) in known if run["run"] == of), None)
    return web.json_response({"runs": [r for r in runs if r], "workflow": workflow, "asked": what})


def _is_for(run: dict, client: str | None) -> bool:
    return run["client"] == client if run["client"] else bool(run["workflow"])


def _told(run: dict) -> dict | None:
    """A run as a page is told of it: its rows once, and nothing of one that is over and has no result."""
    if "output" in run:
        return run | {"rows": []}
    item = _running()
    return run if run["prompt_id"] is None or (item and item[1] == run["prompt_id"]) else None


def register_routes() -> None:
    PromptServer.instance.routes.get(ROUTE)(list_runs)
