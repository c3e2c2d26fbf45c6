"""A reward from a server of the user's own, as a black box: PNGs and prompts out, scores back.

The request is a POST of JSON, {"images": [PNG in base64, ...], "prompts": [text, ...]}; the answer is JSON,
{"scores": [number, ...]}, one per image, higher is better.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import math
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Facts, Reward
from .preprocess import picture

NODE = "MIRA Reward from HTTP"  # whose url it is, wherever the reward is asked
SPEAKING = 1.0  # seconds that a refusal has for its words
SAID = "mira_said"  # on a HTTPError
LARGEST = 3.4e38  # of a score: what float32 holds
MOST = 1_000_000  # bytes of an answer that are read
PAUSE = 0.5  # seconds before the second attempt; doubled for every further one, up to the longest
LONGEST_PAUSE = 30


def host_of(url: str, allowed: Sequence[str] = ()) -> str:
    """The URL's host. Raises ValueError for one that is not http(s), or neither this machine nor in `allowed`."""
    if not url.isascii() or any(c.isspace() for c in url):
        raise ValueError(f"url is {url!r}: give it in ASCII without spaces, with %-codes for any other character")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as problem:
        raise ValueError(f"url is no address ({problem}): give one such as http://127.0.0.1:8000/score") from None
    if "@" in parts.netloc:
        raise ValueError("url has a user or a password in it, which would stand in every saved workflow: leave it out")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"url is {url!r}: give an address such as http://127.0.0.1:8000/score")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and host not in allowed:
        raise ValueError(
            f"url leads to {host}, another machine, and a workflow may not send your images there on its own. If you "
            f"want it to, start ComfyUI with the environment variable MIRA_HTTP_HOSTS={host}"
        )
    return host


def check_typical(low: float, high: float) -> None:
    """Raise ValueError for a range that does not rise: combined rewards would turn around."""
    if not low < high:
        raise ValueError(f"typical_low is {low}, typical_high is {high}: give the lower one first")


def png(image: Tensor) -> str:
    """(3, H, W) in [0, 1] -> the PNG of its 8-bit pixels, in base64."""
    file = io.BytesIO()
    picture(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead away from the host that was allowed."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class HTTPReward(Reward):
    """timeout: seconds for one attempt, from the first byte out to the last one in; retries: further attempts.

    poll: called about ten times a second while waiting, and may raise to give up.
    """

    def __init__(
        self,
        url: str,
        name: str,
        timeout: float,
        retries: int,
        needs_prompt: bool,
        typical: tuple[float, float] = (0.0, 1.0),
        allowed: Sequence[str] = (),
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        host_of(url, allowed)
        check_typical(*typical)
        self.url, self.timeout, self.retries, self.poll = url, timeout, retries, poll
        self.facts = Facts(name, -math.inf, math.inf, typical, False, needs_prompt, "8-bit PNG")
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        body = json.dumps({"images": [png(i) for i in images], "prompts": list(prompts)}).encode()
        for attempt in range(self.retries + 1):
            try:
                answer = self._wait(body)
                break
            except (OSError, http.client.HTTPException) as problem:
                refused = isinstance(problem, urllib.error.HTTPError) and problem.code < 500
                if refused or attempt == self.retries:
                    raise RuntimeError(self._explain(problem, attempt + 1)) from problem
                self._sleep(min(PAUSE * 2**attempt, LONGEST_PAUSE))
        return torch.tensor(self._scores(answer, len(images)), device=images.device)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.poll()
            time.sleep(min(0.1, left))

    def _wait(self, body: bytes) -> bytes:
        """One attempt, in a thread of its own: a server that drips cannot hold the caller beyond the timeout."""
        done: list = []

        def ask() -> None:
            try:
                request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
                with self.opener.open(request, timeout=self.timeout) as response:
                    done.append(response.read(MOST + 1))
            except Exception as problem:  # handed to the caller's thread
                done.append(problem)
                if isinstance(problem, urllib.error.HTTPError):  # here too: what it says may drip as well
                    with contextlib.suppress(Exception):
                        said = b""
                        while len(said) < 200 and (more := problem.read1(200)):
                            said += more
                            vars(problem)[SAID] = said[:200].decode(errors="replace").strip()

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        end = time.monotonic() + self.timeout
        while thread.is_alive() and time.monotonic() < end:
            self.poll()
            thread.join(0.1)
            if done:  # a refusal, which still speaks
                end = min(end, time.monotonic() + SPEAKING)
        if not done:
            raise TimeoutError(f"no answer within {self.timeout:g} s")
        if isinstance(done[0], Exception):
            raise done[0]
        return done[0]

    def _explain(self, problem: Exception, attempts: int) -> str:
        times = "once" if attempts == 1 else f"{attempts} times"
        if isinstance(problem, urllib.error.HTTPError):
            said = vars(problem).get(SAID)
            reason = f"it answered {problem.code} {problem.reason}{f' ({said})' if said else ''}"
            if 300 <= problem.code < 400:
                reason += f", which is not followed: give the url where it leads, {problem.headers.get('Location')}"
        else:
            reason = str(getattr(problem, "reason", problem)) or type(problem).__name__
        return f"{NODE}: the reward server at {self.url} was asked {times}: {reason}. Is it running, and is url right?"

    def _scores(self, answer: bytes, count: int) -> list[float]:
        def nonsense(what: str) -> RuntimeError:
            return RuntimeError(
                f'{NODE}: the reward server at {self.url} answered {what}; it must answer {{"scores": [...]}} with '
                f"{count} finite number(s), one per image"
            )

        if len(answer) > MOST:
            raise nonsense(f"with more than {MOST} bytes")
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise nonsense(repr(answer[:80].decode(errors="replace"))) from problem
        numbers = isinstance(scores, list) and all(
            isinstance(s, (int, float)) and not isinstance(s, bool) for s in scores
        )
        if not numbers or len(scores) != count or not all(-LARGEST <= s <= LARGEST for s in scores):
            raise nonsense(f"the scores {repr(scores)[:80] if numbers else type(scores).__name__}")
        return [float(s) for s in scores]
