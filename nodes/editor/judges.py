"""Judges of MIRA-DPO: a black-box reward, a recorded list of choices, a person."""

from __future__ import annotations

import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from aiohttp import web
from server import PromptServer
from torch import Tensor

from ...rewards.preprocess import picture
from ...sampler.preference import ENOUGH, Verdict, by_score
from ...sampler.seeds import stream
from .live import forget, running, store

ROUTE = "/mira/choice"
WORDS = ("tie", "stop", "back")  # what may be answered instead of an image's place, from 1
ON_TIMEOUT = ("stop", "tie")


class RewardJudge:
    """score(images) -> (B,): every candidate's reward decides."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score

    def __call__(self, k: int, candidates: Sequence[Tensor]) -> Verdict:
        with torch.no_grad():
            return by_score(torch.stack([self.score(c).cpu() for c in candidates], 1))


class RecordedJudge:
    """Repeats the choices of a record, in their order; when they are used up, it has had enough."""

    def __init__(self, choices: list[list]) -> None:
        self.choices, self.used = list(choices), 0

    def __call__(self, k: int, candidates: Sequence[Tensor]) -> Verdict:
        batch = len(candidates[0])
        now = self.choices[self.used : self.used + batch]
        self.used += len(now)
        if not now:
            return Verdict(None, None, None, stop=ENOUGH)
        fits = [c[:2] for c in now] == [[k, b] for b in range(batch)]
        if not fits or max(max(c[2], c[3]) for c in now) >= len(candidates):
            raise ValueError(
                f"the recorded choices do not fit: at comparison {k} they speak of {[c[:2] for c in now]}, where "
                f"the batch has {batch} of {len(candidates)} candidates each; use the settings of the recorded run"
            )
        best, worst, tie = (torch.tensor([c[i] for c in now]) for i in (2, 3, 4))
        return Verdict(best, worst, tie.bool())

    def rewind(self, made: int) -> None:
        self.used = made


class Resuming:
    """Repeats the choices of the run before, as far as they go; what comes after is for `judge` to say.

    Ties at its end are asked again: they may be why it ended, or nobody was there.
    """

    def __init__(self, choices: list[list], judge: Callable[[int, Sequence[Tensor]], Verdict]) -> None:
        while choices and choices[-1][4]:
            choices = choices[:-1]
        self.before, self.judge, self.asked = RecordedJudge(choices), judge, False

    def __call__(self, k: int, candidates: Sequence[Tensor]) -> Verdict:
        self.asked = self.asked or len(self.before.choices) - self.before.used < len(candidates[0])
        return (self.judge if self.asked else self.before)(k, candidates)

    def rewind(self, made: int) -> None:
        if not self.asked:  # by then some of them may have been taken back
            self.before.rewind(made)

    def unused(self) -> list[list]:
        return [] if self.asked else self.before.choices[self.before.used :]


def read_choices(text: str) -> list[list]:
    """The `choices` output of a run, or a whole trace as JSON. Raises ValueError for anything else."""
    if isinstance(text, str) and not text.strip():
        raise ValueError("choices is empty: connect the choices output of an earlier run")
    try:
        data = json.loads(text)
        if isinstance(data, dict):
            data = data["settings"]["choices"]
        choices = [[int(k), int(b), int(best), int(worst), bool(tie)] for k, b, best, worst, tie in data]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as problem:
        raise ValueError(
            f"choices is not a record of choices ({problem!r}): give the choices output of an earlier run, "
            "[[comparison, image, best, worst, tie], ...]"
        ) from problem
    if not choices:
        raise ValueError("choices is empty: give the choices output of an earlier run")
    return choices


@dataclass
class Pending:
    """A choice that the run waits for. It is made once, with its token, by the client that queued the run."""

    prompt: str
    node: str
    client: str | None
    token: str
    shown: dict
    end: float = math.inf  # of the wait, on the monotonic clock
    answered: threading.Event = field(default_factory=threading.Event)
    answer: int | str = ""


_lock = threading.Lock()
_pending: dict[str, Pending] = {}  # by node id: a node waits for one choice at a time


def refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


def may_answer(pending: Pending, client: str | None) -> bool:
    """The client that queued the run; any other once that one is gone."""
    return pending.client is None or client == pending.client or pending.client not in PromptServer.instance.sockets


async def list_pending(request: web.Request) -> web.Response:
    """What is waited for, for a page that was loaded again."""
    client = request.query.get("client_id")
    with _lock:
        now = time.monotonic()
        mine = [p for p in _pending.values() if may_answer(p, client)]
        shown = [p.shown | ({"left": p.end - now} if math.isfinite(p.end) else {}) for p in mine]
    return web.json_response({"pending": shown})


async def choose(request: web.Request) -> web.Response:
    """Take one answer, if it is what the run waits for."""
    try:
        body = json.loads((await request.read()).decode())  # JSON is UTF-8, whatever charset is claimed
    except (ValueError, RecursionError):
        return refusal(400, "the body is no JSON")
    if not isinstance(body, dict):
        return refusal(400, "the body is no JSON object")
    prompt, node, token, client = (body.get(k) for k in ("prompt_id", "node_id", "token", "client_id"))
    answer: Any = body.get("choice")
    if not (answer in WORDS if isinstance(answer, str) else type(answer) is int and answer >= 1):
        return refusal(400, f"choice is {answer!r}: it must be an image's place, from 1, or one of {', '.join(WORDS)}")
    with _lock:
        pending = _pending.get(str(node))
        if pending is None:
            return refusal(409, f"node {node} waits for no choice: it was made already, or the run has ended")
        if prompt != pending.prompt:
            return refusal(409, f"the choice is for run {prompt}, but node {node} waits in run {pending.prompt}")
        fits = isinstance(token, str) and token.isascii() and secrets.compare_digest(token, pending.token)
        if not fits:
            return refusal(409, "these images are not the ones that are waited for: they were chosen from already")
        if isinstance(answer, int) and answer > len(pending.shown["images"]):
            return refusal(400, f"choice is {answer}, but {len(pending.shown['images'])} images are shown")
        if not may_answer(pending, client):
            return refusal(403, "another client queued this run, and is still connected: choose there")
        pending.answer = answer
        del _pending[str(node)]
    pending.answered.set()
    return web.json_response({"accepted": answer})


def register_routes() -> None:
    routes = PromptServer.instance.routes
    routes.get(ROUTE)(list_pending)
    routes.post(ROUTE)(choose)


class PersonJudge:
    """Shows the candidates on the node and waits for clicks: the best, and of several also the worst if that counts.

    worst: whether it does. order: draws who stands where. timeout: seconds for each choice; 0 waits for ever.
    on_timeout: one of `ON_TIMEOUT`.
    """

    def __init__(
        self, node: str, prompt: str, client: str | None, total: int, seed: int, timeout: float, on_timeout: str,
        worst: bool,
    ) -> None:  # fmt: skip
        self.node, self.prompt, self.client, self.total = node, prompt, client, total
        self.timeout, self.on_timeout, self.worst = timeout, on_timeout, worst
        self.order = stream(seed, -1)
        self.missed = 0  # ties that are none: nobody chose in time
        self.late = False  # the last one
        self.stop = ""  # said after a choice that counts

    def __call__(self, k: int, candidates: Sequence[Tensor]) -> Verdict:
        verdicts, batch = [], len(candidates[0])
        if self.stop:
            return Verdict(None, None, None, stop=self.stop)
        for b in range(batch):
            told = {"iteration": k, "iterations": self.total, "image": b, "batch": batch}
            answer = self.compare([c[b] for c in candidates], told)
            if isinstance(answer, str):
                return Verdict(None, None, None, stop=self.why(answer), back=answer == "back")
            verdicts.append(answer)
        best, worst, tie = (torch.tensor(of) for of in zip(*verdicts, strict=True))
        return Verdict(best, worst, tie)

    def why(self, answer: int | str) -> str:
        """Why no more is asked after an answer; empty: it is."""
        if answer != "stop":
            return ""
        return f"a choice that nobody made within {self.timeout:g} s" if self.late else ENOUGH

    def compare(self, images: Sequence[Tensor], told: dict) -> tuple[int, int, bool] | str:
        """(best, worst, tie), or "stop" or "back"."""
        order = torch.randperm(len(images), generator=self.order).tolist()
        while True:
            best = self.ask(order, images, told | {"wanted": "best"})
            if isinstance(best, str):
                self.missed += self.late and best == "tie"
                return (0, 1, True) if best == "tie" else best
            others = [n for n in order if n != best]
            if len(others) == 1 or not self.worst:
                return best, others[0], False
            worst = self.ask(others, images, told | {"wanted": "worst"})
            if worst == "back":
                continue
            self.stop = self.why(worst)
            return best, worst if isinstance(worst, int) else others[0], False  # of equally bad ones, any

    def _listener(self) -> str | None:
        """The page that queued the run; every page where that is closed, and another one may answer."""
        return self.client if self.client in PromptServer.instance.sockets else None

    def ask(self, order: list[int], images: Sequence[Tensor], told: dict) -> int | str:
        """Which of the images is chosen, or one of `WORDS`. order: of those that are shown."""
        token, self.late = secrets.token_urlsafe(16), False
        workflow, kind = running(self.node)
        shown: dict[str, Any] = told | {
            "prompt_id": self.prompt,
            "node": self.node,
            "workflow": workflow,
            "kind": kind,
            "token": token,
            # The names tell nothing of which candidate is which.
            "images": [
                store(picture(images[n]), f"{token}_{place}.png", compress_level=1) for place, n in enumerate(order, 1)
            ],
            "timeout": self.timeout,
        }
        pending = Pending(
            self.prompt, self.node, self.client, token, shown, end=time.monotonic() + (self.timeout or math.inf)
        )
        server = PromptServer.instance
        try:
            with _lock:
                _pending[self.node] = pending
            server.send_sync("mira.choice", shown, self._listener())
            while not pending.answered.wait(0.1):
                comfy.model_management.throw_exception_if_processing_interrupted()
                if time.monotonic() <= pending.end:
                    continue
                with _lock:  # one that was taken at the last moment counts
                    self.late = _pending.pop(self.node, None) is pending
                if self.late:
                    return self.on_timeout
        finally:
            with _lock:
                if _pending.get(self.node) is pending:
                    del _pending[self.node]
            for stored in shown["images"]:
                forget(stored)
            server.send_sync("mira.chosen", {"node": self.node, "token": token}, self._listener())
        return order[pending.answer - 1] if isinstance(pending.answer, int) else pending.answer
