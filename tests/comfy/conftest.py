from __future__ import annotations

import asyncio

import pytest
import torch

from testing.networks import SMALL, random_unet, small_world  # puts ComfyUI on the path
from testing.pack import mira

import server  # isort: skip


@pytest.fixture(scope="session")
def world():
    """apart: as the nodes are."""
    return small_world(apart=False)


@pytest.fixture(scope="session")
def demo_model():
    with torch.inference_mode():
        return mira("nodes.demo").load_model()


@pytest.fixture(scope="session")
def demo_vae():
    with torch.inference_mode():
        return mira("nodes.demo").load_vae()


@pytest.fixture
def larger(world, monkeypatch):
    """For what 8 latents a side are too few."""
    monkeypatch.setattr(world, "side", 16)


@pytest.fixture
def trained(world, demo_model, demo_vae, monkeypatch):
    """For what is about pictures: the demo model, at the size of its training."""
    monkeypatch.setattr(world, "model", demo_model)
    monkeypatch.setattr(world, "vae", demo_vae)
    monkeypatch.setattr(world, "side", 16)


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def half_model(request):
    """The small network in half precision."""
    return random_unet(SMALL, request.param)


class InPlaceResidual(torch.nn.Module):
    """What the Flux family does: x += ... on a tensor that backward needs."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        x = self.block(x, *args, **kwargs)
        y = x.sigmoid()
        y += 0.1 * y
        return x + 0.1 * y


@pytest.fixture
def in_place_model():
    """The small network with such a residual in its middle."""
    model = random_unet(SMALL, torch.float32)
    blocks = model.model.diffusion_model.middle_block[1].transformer_blocks
    blocks[0] = InPlaceResidual(blocks[0])
    return model


@pytest.fixture(scope="module", autouse=True)
def prompt_server():
    """ComfyUI's own, to which nobody listens; and the rewards' folder, as after ComfyUI's start."""
    mira("nodes.shared.files").register()
    loop = asyncio.new_event_loop()
    instance = server.PromptServer(loop)
    instance.client_id = "page"
    yield instance
    loop.close()


@pytest.fixture
def sent(prompt_server):
    """Gives what was sent since it was asked last: (kind, what, to whom)."""

    def take():
        prompt_server.loop.run_until_complete(asyncio.sleep(0))
        return [prompt_server.messages.get_nowait() for _ in range(prompt_server.messages.qsize())]

    take()
    return take
