"""The examples in the docstrings of what others import."""

from __future__ import annotations

import doctest

import pytest
from mira.rewards import pixel
from mira.sampler import optimize, rollout, surrogates


@pytest.mark.parametrize("module", [rollout, surrogates, optimize, pixel])
def test_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
