"""What is left of an attempt that was cut short."""

from __future__ import annotations

import logging
import traceback
import weakref

import pytest
import torch
from mira.sampler import ending
from mira.sampler.ending import attempt, within_memory


class Cancelled(Exception):
    pass


class Held:
    """Stands for an activation in a frame."""


@pytest.fixture
def alive():
    return []


def failing(problem: BaseException, alive: list) -> None:
    activation = Held()
    alive.append(weakref.ref(activation))
    raise problem


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (Cancelled(), "interrupted"),
        (torch.OutOfMemoryError("full"), "out of memory"),
        (ValueError("two\nlines"), "error (ValueError: two)"),
        (KeyError("weight"), "error (KeyError: 'weight')"),
        (OSError(), "error (OSError: )"),
    ],
)
def test_nothing_of_it_is_alive(problem, said, alive, monkeypatch):
    given_back = []
    monkeypatch.setattr(ending, "give_back", lambda: given_back.append(1))
    found, cut = attempt((Cancelled,), failing, problem, alive)
    assert found is None and str(cut) == said and alive[0]() is None
    assert cut.interrupted == (said == "interrupted") and bool(given_back) == cut.memory == (said == "out of memory")


def test_nor_of_what_it_came_from(alive):
    def chained():
        try:
            failing(KeyError("inner"), alive)
        except KeyError as inner:
            raise ValueError("outer") from inner

    _, cut = attempt((), chained)
    assert cut.failed and alive[0]() is None


def test_what_went_well_comes_back():
    assert attempt((), lambda a, b: a + b, 1, 2) == (3, None) == within_memory(lambda a, b: a + b, 1, 2)


def test_an_error_says_where_it_came_from_once(caplog, alive):
    def nested():
        _, cut = attempt((), failing, RuntimeError("broken"), alive)
        raise cut.problem

    with caplog.at_level(logging.ERROR, "mira"):
        _, cut = attempt((), nested)
    assert caplog.text.count("RuntimeError: broken") == 2  # the message, and the end of its traceback
    assert "in failing" in caplog.text
    assert any(frame.name == "failing" for frame in traceback.extract_tb(cut.problem.__traceback__))


def test_what_is_no_error_goes_through(alive):
    with pytest.raises(KeyboardInterrupt):
        attempt((Cancelled,), failing, KeyboardInterrupt(), alive)
    with pytest.raises(ValueError, match="mine"):
        within_memory(failing, ValueError("mine"), alive)
    _, cut = within_memory(failing, RuntimeError("CUDA error: out of memory"), alive)
    assert cut.memory and alive[-1]() is None
