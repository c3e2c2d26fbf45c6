"""Rewards of the user's own, from Python files."""

from pathlib import Path

import pytest
import torch
from mira.rewards.python_file import PythonReward

ROOT = Path(__file__).resolve().parents[2]
GOOD = """FACTS = {"name": "red", "typical": (0.0, 1.0)}
def score(images, prompts):
    return images[:, 0].mean((1, 2))
"""


def made(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return PythonReward(path)


def test_a_file_becomes_a_reward(tmp_path):
    reward = made(tmp_path, GOOD)
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    total, parts = reward(images, [""] * 3)
    torch.testing.assert_close(total, images[:, 0].mean((1, 2)))
    assert parts.keys() == {"red"} and total.requires_grad and reward.facts.differentiable


def test_a_file_may_define_classes(tmp_path):
    """A dataclass looks its module up by name."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "@dataclass\nclass Weights:\n    red: float = 1.0\n"
    assert made(tmp_path, text + GOOD).facts.name == "red"


def test_an_edit_counts_at_once(tmp_path):
    assert made(tmp_path, GOOD).facts.name == "red"
    assert made(tmp_path, GOOD.replace('"red"', '"rad"')).facts.name == "rad"  # same size, same second
    assert not list(tmp_path.rglob("*.pyc"))


def test_the_example():
    reward = PythonReward(ROOT / "docs" / "examples" / "warmth.py")
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[1, 2] = 1, 1
    assert reward.score(images, ["", ""]).tolist() == [1, -1]


def test_a_black_box_may_answer_with_a_list(tmp_path):
    text = (
        'FACTS = dict(name="n", typical=(0, 1), differentiable=False)\ndef score(images, prompts):\n    return [1, 2]\n'
    )
    assert made(tmp_path, text).score(torch.rand(2, 3, 4, 4), ["", ""]).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", r"mine.py, line 1: SyntaxError"),
        ("import nothing_like_it", r"mine.py, line 1 \(import nothing_like_it\): ModuleNotFoundError"),
        ("def score(images, prompts): ...", "defines no FACTS"),
        ('FACTS = {"name": "n"}', "FACTS lacks typical"),
        ('FACTS = {"name": "n", "typical": (0, 1), "tipical": 1}', "FACTS has no tipical"),
        ('FACTS = {"name": "n", "typical": (0, float("inf"))}', "low below high"),
        ('FACTS = {"name": "n", "typical": (1, 0)}', "give .low, high., low below high"),
        ('FACTS = {"name": "", "typical": (0, 1)}', "give it a name"),
        (
            'FACTS = {"name": "n", "typical": (0, 1), "low": "a"}',
            r"FACTS\['low'\] is 'a'; give a number, or leave it out",
        ),
        ('FACTS = {"name": "n", "typical": (0, 1), "high": None}', r"FACTS\['high'\] is None"),
        ('FACTS = {"name": "n", "typical": (0, 1)}', "defines no function score"),
        (GOOD + "MODULES = [3]", "MODULES is .3.; it must be a list of torch modules"),
        (GOOD + "MODULES = 5", "MODULES is 5; it must be a list"),
        ('FACTS = {"name": "n", "typical": ("x", None)}', "give .low, high., low below high"),
        ('FACTS = {"name": "n", "typical": (0, float("nan"))}', "give .low, high., low below high"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return images[5]", r"mine.py, line 3 \(return images\[5\]\): IndexError"),
        ("return images.mean()", r"shape \(\); it must be a tensor of shape \(2,\)"),
        ("return [1, 2]", "gave a list"),
        ("return images.detach().flatten(1).mean(1)", "has no gradient, though FACTS says differentiable"),
    ],
)
def test_a_score_that_does_not_fit(tmp_path, body, message):
    reward = made(tmp_path, GOOD.replace("return images[:, 0].mean((1, 2))", body))
    with pytest.raises(RuntimeError, match=message):
        reward.score(torch.rand(2, 3, 4, 4, requires_grad=True), ["", ""])


def test_the_hosts_own_exceptions_go_through_the_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD.replace("return images", 'raise LookupError("x") #'))
    for passes, kind in (((LookupError,), LookupError), ((), RuntimeError)):
        with pytest.raises(kind, match="x"):
            PythonReward(path, passes).score(torch.rand(1, 3, 4, 4), [""])


def test_running_out_of_memory_is_passed_on(tmp_path):
    reward = made(tmp_path, GOOD.replace("return images", 'import torch; raise torch.OutOfMemoryError("x") #'))
    with pytest.raises(torch.OutOfMemoryError):
        reward.score(torch.rand(1, 3, 4, 4), [""])
