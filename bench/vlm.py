"""A vision-language model as the judge of pairs: `python dev.py bench judge PAIRS --url URL --model NAME`.

PAIRS is a folder of a benchmark's pairs (see `bench.study`). The server speaks OpenAI's chat API. Every pair is asked
twice, in both orders, the first of them random; a side that wins both wins, anything else is a tie. Answers go to
`judgements.csv` in the folder as they come, and a pair that has one is not asked again.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from bench.grid import Failure

CRITERIA = (
    "faithfulness: does the image show what the prompt asks for?",
    "naturalness: does it look like a picture of its kind, without over-saturation, noise or distortion?",
    "appeal: which one would a person rather look at?",
)
ANSWERS = {"first": 0, "second": 1, "tie": None}
FIELDS = ("pair", "model", "prompt", "method", "against", "target", "winner", "first_order", "answers")


def question(prompt: str) -> str:
    lines = "\n".join(f"{n}. {c}" for n, c in enumerate(CRITERIA, 1))
    return (
        f"Two images were made for the prompt: {prompt!r}. Compare the first with the second by\n{lines}\n"
        "Weigh faithfulness most. Think briefly, then end with one line that is only JSON: "
        '{"better": "first"}, {"better": "second"} or {"better": "tie"}.'
    )


def picture(path: Path) -> dict:
    kind = "png" if path.suffix == ".png" else "jpeg"
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def understood(text: str) -> str:
    """first, second or tie. Raises ValueError for anything else."""
    found = re.findall(r'\{\s*"better"\s*:\s*"(first|second|tie)"\s*\}', text or "")
    if not found:
        raise ValueError(f"no verdict in {text[:200]!r}" if text else "an empty answer")
    return found[-1]


class Judge:
    """Asks a server for a verdict on two images. Answers of nonsense are asked again, `attempts` times in all."""

    def __init__(self, url: str, model: str, key: str | None = None, attempts: int = 3, timeout: float = 120.0):
        self.url, self.model, self.key = url.rstrip("/") + "/chat/completions", model, key
        self.attempts, self.timeout = attempts, timeout

    def __call__(self, prompt: str, first: Path, second: Path) -> str:
        content = [{"type": "text", "text": question(prompt)}, picture(first), picture(second)]
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        problems = []
        for attempt in range(self.attempts):
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    reply = json.loads(answer.read())
                return understood(reply["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as problem:
                text = problem.read()[:200].decode(errors="replace")
                if problem.code not in (408, 429) and problem.code < 500:
                    raise Failure(f"the judge at {self.url} refused: {problem.code} {text}") from problem
                problems.append(f"{problem.code} {text}")
                time.sleep(min(10, 2**attempt) if self.attempts > 1 else 0)
            except (urllib.error.URLError, TimeoutError, ConnectionError) as problem:
                problems.append(f"no answer: {getattr(problem, 'reason', problem)}")
            except (ValueError, KeyError, IndexError, TypeError) as problem:
                problems.append(f"nonsense: {problem}")
        raise Failure(
            f"the judge at {self.url} gave no verdict in {self.attempts} attempts ({problems[-1]}). What it has judged "
            "is in judgements.csv; run it again when it answers."
        )


def both_orders(judge: Judge, prompt: str, a: Path, b: Path, swap: bool) -> tuple[str, list[str]]:
    """("a", "b" or "tie", the two answers): a side wins when it does so in both places."""
    answers, votes = [], []
    for order in (swap, not swap):
        first, second = (b, a) if order else (a, b)
        answer = judge(prompt, first, second)
        answers.append(answer)
        votes.append({"first": "b" if order else "a", "second": "a" if order else "b", "tie": "tie"}[answer])
    return (votes[0] if votes[0] == votes[1] else "tie"), answers


def run(folder: Path, judge: Judge, seed: int = 0) -> list[dict]:
    """Judge what has no verdict yet. Returns all verdicts."""
    listing = folder / "pairs.json"
    if not listing.is_file():
        raise Failure(f"{folder} holds no pairs.json: make pairs with `python dev.py bench study`")
    pairs = json.loads(listing.read_text())["pairs"]
    out = folder / "judgements.csv"
    rows: list[dict] = []
    if out.is_file():
        lines = out.read_text().split("\n")[:-1]  # a last line without its end was cut short
        rows = [r for r in csv.DictReader(lines) if None not in r and None not in r.values()]
    known = {p["id"] for p in pairs}
    done = {r["pair"]: r for r in rows if r["pair"] in known and r["model"] == judge.model}
    # Written anew: the last line may have been cut short.
    part = out.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(out)
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        for pair in pairs:
            if pair["id"] in done:
                continue
            swap = random.Random(f"{seed} {pair['id']}").random() < 0.5
            winner, answers = both_orders(judge, pair["prompt"], folder / pair["a"], folder / pair["b"], swap)
            row = {"pair": pair["id"], "model": judge.model, "winner": winner, "answers": " ".join(answers)}
            row |= {k: pair[k] for k in ("prompt", "method", "against", "target")} | {
                "first_order": "ba" if swap else "ab"
            }
            writer.writerow(row)
            file.flush()
            done[pair["id"]] = row
    return list(done.values())


def table(rows: list[dict]) -> str:
    """Win rates by what was optimised and by method, ties counting half, with the standard error over pairs."""
    lines = []
    for target, method in sorted({(r["target"], r["method"]) for r in rows}):
        of = [r for r in rows if (r["target"], r["method"]) == (target, method)]
        points = [{"a": 1.0, "b": 0.0}.get(r["winner"], 0.5) for r in of]
        wins, losses, rate = points.count(1.0), points.count(0.0), sum(points) / len(of)
        error = (sum((p - rate) ** 2 for p in points) / max(1, len(of) - 1) / len(of)) ** 0.5
        lines.append(f"{target}: {method} against {of[0]['against']}: {wins} won, {losses} lost, "
                     f"{len(of) - wins - losses} tied of {len(of)}; win rate {rate:.3f} ±{error:.3f}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--url", required=True, help="of the API, up to and with /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # A key belongs into the environment, where no history of commands keeps it.
    judge = Judge(args.url, args.model, os.environ.get("MIRA_JUDGE_KEY"))
    print(table(run(args.pairs, judge, args.seed)))


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"bench judge: {failure}")
