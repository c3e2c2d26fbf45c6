"""Rewards over HTTP, against real servers on loopback."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mira.rewards import http
from mira.rewards.http import HTTPReward, host_of
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
IMAGES = torch.rand(2, 3, 8, 10)


@contextmanager
def serving(answer):
    """answer(asked, number) -> (status, body, seconds to wait); yields (url, list of what was asked)."""
    asked, number = [], [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body, wait = answer(asked[-1], number[0])
            number[0] += 1
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body)
                body = ""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for byte in body.encode():  # dripping, where asked to wait
                time.sleep(wait)
                self.wfile.write(bytes([byte]))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", asked
    finally:
        server.shutdown()
        server.server_close()


def iter_raises(after=3):
    """A poll that is told of a cancel the third time."""
    calls = iter(range(after))

    def poll():
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return poll


def reward(url, timeout=5.0, retries=0, **kwargs):
    return HTTPReward(url, "mine", timeout, retries, True, **kwargs)


def test_scores_come_back_and_images_go_out_whole():
    with serving(lambda asked, n: (200, json.dumps({"scores": [0.5, -2]}), 0)) as (url, asked):
        assert reward(url).score(IMAGES, ["a", "b"]).tolist() == [0.5, -2]
    assert asked[0]["prompts"] == ["a", "b"]
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(asked[0]["images"][1]))))
    assert np.array_equal(sent, (IMAGES[1] * 255).round().byte().movedim(0, 2).numpy())


@pytest.mark.parametrize(
    "body",
    [
        "", "[]", "{}", '{"scores": [1]}', '{"scores": [1, NaN]}', '{"scores": ["a", 1]}', '{"scores": [true, 1]}',
        '{"scores": [1, 1' + "0" * 400 + "]}", '{"scores": [1, 1' + "0" * 5000 + "]}", "[" * 9000, '{"scores": 7}',
    ],
    ids=lambda body: body[:20],
)  # fmt: skip
def test_nonsense_is_said_and_not_retried(body):
    with serving(lambda asked, n: (200, body, 0)) as (url, asked):
        with pytest.raises(RuntimeError, match=r"must answer .*2 finite number\(s\)"):
            reward(url, retries=3).score(IMAGES, ["", ""])
        assert len(asked) == 1


def test_a_failing_server_is_retried(monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.01)
    with serving(lambda asked, n: (200, '{"scores": [1, 2]}', 0) if n else (503, "busy", 0)) as (url, asked):
        assert reward(url, retries=1).score(IMAGES, ["", ""]).tolist() == [1, 2]
        assert len(asked) == 2


def test_the_pauses_grow_no_longer_than_a_person_waits(monkeypatch):
    pauses = []
    monkeypatch.setattr(http.HTTPReward, "_sleep", lambda self, seconds: pauses.append(seconds))
    with (
        serving(lambda asked, n: (503, "busy", 0)) as (url, _),
        pytest.raises(RuntimeError, match="asked 9 times"),
    ):
        reward(url, retries=8).score(IMAGES, ["", ""])
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_what_is_refused_is_not_retried():
    with serving(lambda asked, n: (404, "no such page", 0)) as (url, asked):
        with pytest.raises(RuntimeError, match=r"asked once: it answered 404 .*no such page"):
            reward(url, retries=3).score(IMAGES, ["", ""])
        assert len(asked) == 1


def test_a_redirect_is_not_followed():
    said = r"302 .*is not followed: give the url where it leads, http://192\.0\.2\.1/"
    with serving(lambda asked, n: (302, "http://192.0.2.1/", 0)) as (url, _), pytest.raises(RuntimeError, match=said):
        reward(url).score(IMAGES, ["", ""])


def test_what_a_refusal_says_may_drip_as_well():
    start = time.monotonic()
    with serving(lambda asked, n: (400, "no" * 50, 0.2)) as (url, _):
        with pytest.raises(RuntimeError, match=rf"{url} was asked once: it answered 400 Bad Request \((no)*n?\)"):
            reward(url, timeout=0.5).score(IMAGES, ["", ""])
        with pytest.raises(KeyboardInterrupt):
            reward(url, timeout=60, poll=iter_raises()).score(IMAGES, ["", ""])
    assert time.monotonic() - start < 5


def test_a_server_that_drips_does_not_hang_the_run():
    start = time.monotonic()
    with serving(lambda asked, n: (200, '{"scores": [1, 2]}', 0.2)) as (url, _):
        with pytest.raises(RuntimeError, match=r"no answer within 0\.5 s"):
            reward(url, timeout=0.5).score(IMAGES, ["", ""])
        assert time.monotonic() - start < 2


def test_no_server_at_all(monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.01)
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:9/score was asked 3 times: .*refused.*Is it running"):
        reward("http://127.0.0.1:9/score", retries=2).score(IMAGES, ["", ""])


def test_a_cancel_ends_the_wait():
    class Cancelled(Exception):
        pass

    def poll():
        if time.monotonic() - start > 0.3:
            raise Cancelled

    with serving(lambda asked, n: (200, '{"scores": [1, 2]}', 0.5)) as (url, _):
        start = time.monotonic()
        with pytest.raises(Cancelled):
            reward(url, timeout=30, poll=poll).score(IMAGES, ["", ""])
        assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/x", "127.0.0.1:80", "", "file:///etc/passwd", "http:///x", "//127.0.0.1/x"]
)
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="give an address such as"):
        host_of(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/", "http://127.0.0.1:abc/", "http://[::1", "http://[x]/"])
def test_what_cannot_be_an_address(url):
    with pytest.raises(ValueError, match="url is no address"):
        host_of(url)


def test_a_password_is_in_no_workflow():
    with pytest.raises(ValueError, match="a user or a password") as problem:
        host_of("http://me:secret@127.0.0.1/")
    assert "secret" not in str(problem.value)


@pytest.mark.parametrize("typical", [(1.0, 0.0), (1.0, 1.0), (float("nan"), 1.0)])
def test_a_typical_range_rises(typical):
    with pytest.raises(ValueError, match="give the lower one first"):
        HTTPReward("http://127.0.0.1:1/", "mine", 1.0, 0, False, typical)


@pytest.mark.parametrize("url", ["http://127.0.0.1/sc\u00f6re", "http://127.0.0.1/a b", "http://127.0.0.1/\n"])
def test_an_address_is_in_ascii(url):
    with pytest.raises(ValueError, match="give it in ASCII"):
        host_of(url)


@pytest.mark.parametrize("host", ["192.168.0.5", "example.org", "127.0.0.1.example.org", "0.0.0.0"])
def test_other_machines_have_to_be_allowed(host):
    with pytest.raises(ValueError, match=f"MIRA_HTTP_HOSTS={host}"):
        host_of(f"http://{host}/score")
    assert host_of(f"http://{host}/score", [host]) == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"])
def test_this_machine(host):
    assert host_of(f"https://{host}:1/x")


def test_the_example_server_serves():
    example = ROOT / "docs" / "examples" / "reward_server.py"
    with subprocess.Popen([sys.executable, str(example), "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            images = torch.zeros(2, 3, 8, 8)
            images[0, 1], images[1] = 1, 0.5
            assert reward(url).score(images, ["a", "b"]).tolist() == pytest.approx([1, 1 / 3], abs=1e-6)
        finally:
            process.terminate()
