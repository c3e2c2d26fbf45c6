"""What tells that the prompt is lost, on rows whose answer is known."""

from __future__ import annotations

import pytest

from bench.surrogates import tells


def rows(value):
    """Two images that keep their adherence and two that lose it, each at two iterations; one that never had any."""
    kept = {
        "a": (0.9, 0.8, 0.7),
        "b": (0.8, 0.8, 0.6),
        "c": (0.9, 0.4, 0.1),
        "d": (0.6, 0.2, 0.2),
        "e": (0.3, 0.1, 0.0),
    }
    return [
        {"animal": animal, "iteration": k, "adherence": adherence, "drift": value(animal, k)}
        for animal, path in kept.items()
        for k, adherence in enumerate(path)
    ]


@pytest.mark.parametrize(
    ("value", "area"),
    [
        (lambda animal, k: float(animal in "cde"), 1.0),
        (lambda animal, k: -float(animal in "cde"), 0.0),
        (lambda animal, k: 1.0, 0.5),
        (lambda animal, k: float(k + 2 * (animal == "c")), 0.75),  # "d" is seen no better than by a coin
    ],
)
def test_the_area_is_the_share_of_pairs_that_are_told_apart(value, area):
    assert tells(rows(value), "drift") == pytest.approx(area)
