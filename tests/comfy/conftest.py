from __future__ import annotations

import asyncio

import pytest

from bench.pack import mira
from bench.world import World  # puts ComfyUI on the path

import server  # isort: skip


@pytest.fixture(scope="session")
def world():
    return World(apart=False)  # as the nodes are


@pytest.fixture(scope="module", autouse=True)
def prompt_server():
    """ComfyUI's own, to which nobody listens; and the rewards' folder, as after ComfyUI's start."""
    mira("nodes.files").register()
    loop = asyncio.new_event_loop()
    instance = server.PromptServer(loop)
    instance.client_id = None
    yield instance
    loop.close()
