"""The judge behind an OpenAI-compatible URL, against a real local server."""

from __future__ import annotations

import base64
import csv
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from bench import vlm
from bench.grid import Failure


class Server:
    """Answers as `reply(first, second)` says, the mean brightness of both images; keeps what it was asked."""

    def __init__(self, reply):
        self.asked, server = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, body, self.headers.get("Authorization")))
                pictures = [c["image_url"]["url"] for c in body["messages"][0]["content"] if c["type"] == "image_url"]
                status, text = reply(*(brightness(p) for p in pictures))
                answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer if status == 200 else text.encode())

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def brightness(url: str) -> float:
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).convert("L")
    return sum(image.getdata()) / (image.width * image.height)


@pytest.fixture
def serve():
    started = []

    def start(reply):
        started.append(Server(reply))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()


@pytest.fixture
def folder(tmp_path):
    pairs = []
    for n in range(6):
        for side, value in (("a", 200), ("b", 50 if n < 4 else 220)):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"{n}{side}.png")
        pair = {"id": f"p{n}", "prompt": "a fox", "method": "mira", "against": "dno", "target": "x"}
        pairs.append(pair | {"a": f"{n}a.png", "b": f"{n}b.png"})
    (tmp_path / "pairs.json").write_text(json.dumps({"pairs": pairs}))
    return tmp_path


def brighter(first, second):
    return 200, 'I looked.\n{"better": "' + ("first" if first > second else "second") + '"}'


def test_the_better_image_wins_in_both_orders(serve, folder):
    server = serve(brighter)
    rows = vlm.run(folder, vlm.Judge(server.url, "eye", "secret"))
    assert [r["winner"] for r in rows] == ["a"] * 4 + ["b"] * 2
    assert len(server.asked) == 12 and {r["first_order"] for r in rows} == {"ab", "ba"}
    path, body, key = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "eye" and key == "Bearer secret"
    assert "a fox" in body["messages"][0]["content"][0]["text"]
    assert "x: mira against dno: 4 won, 2 lost, 0 tied of 6; win rate 0.667 ±0.211" in vlm.table(rows)


def test_a_judge_that_prefers_a_place_has_only_ties(serve, folder):
    rows = vlm.run(folder, vlm.Judge(serve(lambda a, b: (200, '{"better": "first"}')).url, "eye"))
    assert {r["winner"] for r in rows} == {"tie"} and "win rate 0.500" in vlm.table(rows)


def test_nonsense_is_asked_again_and_then_said(serve, folder):
    answers = iter(["no idea", '{"better": "left"}', '{"better": "tie"}', *['{"better": "tie"}'] * 20])
    judge = vlm.Judge(serve(lambda a, b: (200, next(answers))).url, "eye")
    assert len(vlm.run(folder, judge)) == 6
    (folder / "judgements.csv").unlink()
    with pytest.raises(Failure, match=r"no verdict in 2 attempts \(nonsense: no verdict in 'hm'\)"):
        vlm.run(folder, vlm.Judge(serve(lambda a, b: (200, "hm")).url, "eye", attempts=2))


def test_what_was_judged_is_kept_and_not_asked_again(serve, folder):
    count = iter(range(100))
    server = serve(lambda a, b: brighter(a, b) if next(count) < 5 else (400, "out of credit"))
    with pytest.raises(Failure, match="refused: 400 out of credit"):
        vlm.run(folder, vlm.Judge(server.url, "eye"))
    with (folder / "judgements.csv").open(newline="") as file:
        assert [r["pair"] for r in csv.DictReader(file)] == ["p0", "p1"]
    again = serve(brighter)
    rows = vlm.run(folder, vlm.Judge(again.url, "eye"))
    assert len(rows) == 6 and len(again.asked) == 8
    assert vlm.run(folder, vlm.Judge("http://127.0.0.1:9/v1", "eye")) == rows  # all known: nobody is asked


def test_a_line_that_was_cut_short_is_judged_again_and_models_are_kept_apart(serve, folder):
    vlm.run(folder, vlm.Judge(serve(brighter).url, "eye"))
    path = folder / "judgements.csv"
    path.write_text(path.read_text()[:-12])
    again = serve(brighter)
    assert len(vlm.run(folder, vlm.Judge(again.url, "eye"))) == 6 and len(again.asked) == 2
    other = serve(brighter)
    assert len(vlm.run(folder, vlm.Judge(other.url, "other eye"))) == 6 and len(other.asked) == 12
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12


def test_nobody_answers(folder, tmp_path_factory):
    with pytest.raises(Failure, match=r"gave no verdict in 1 attempts .*no answer"):
        vlm.run(folder, vlm.Judge("http://127.0.0.1:9/v1", "eye", attempts=1))
    with pytest.raises(Failure, match=r"holds no pairs\.json"):
        vlm.run(tmp_path_factory.mktemp("empty"), vlm.Judge("http://x", "eye"))
