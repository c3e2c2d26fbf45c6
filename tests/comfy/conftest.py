from __future__ import annotations

import pytest

from bench.world import World


@pytest.fixture(scope="session")
def world():
    return World()
