"""The prompt and its negative are predicted together, or one after the other, as the plain sample had them."""

import comfy.model_management
import pytest
import torch
from mira.nodes import host
from mira.sampler.search import SearchSettings

LATENT = torch.zeros(1, 4, 8, 8)
MUCH = 1e18  # bytes


@pytest.fixture(params=[(MUCH, 2), (0, 1)], ids=["room", "full"])
def card(request, world, monkeypatch):
    """(model, how many latents each of its calls has had, how many the plain sample's should have): on a card where
    that much is free when the plain sample begins, and then little and much by turns.
    """
    free, size = request.param
    model, sizes = world.model.clone(), []

    def wrapper(apply, args):
        sizes.append(len(args["input"]))
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)

    def get_free_memory(_=None, torch_free_too=False):
        now = MUCH * (len(sizes) // 3 % 2) if sizes else free
        return (now, now) if torch_free_too else now

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)
    return model, sizes, size


def same_throughout(card, done):
    _, sizes, size = card
    return set(sizes) == {size} and not any("another image" in notice for notice in done.result.trace.notices)


@pytest.mark.every_host
@pytest.mark.parametrize("memory", ["none", "per_step"])
def test_every_trajectory_is_predicted_as_the_plain_one(world, card, memory):
    done = world.optimize(model=card[0], memory=memory, steps=3, iterations=1, latent=LATENT)
    assert same_throughout(card, done)
    assert "memory_required" not in vars(card[0].model)


def test_where_memory_runs_out_it_is_decided_anew(world, monkeypatch):
    """The plain sample was alone on the card; beside decoder and scorer ComfyUI would take one after the other."""
    model, sizes = world.model.clone(), []

    def wrapper(apply, args):
        sizes.append(len(args["input"]))
        if len(sizes) > 3 and sizes[-1] > 1:
            raise torch.OutOfMemoryError("full")
        return apply(args["input"], args["timestep"], **args["c"])

    def get_free_memory(_=None, torch_free_too=False):
        now = MUCH if len(sizes) < 3 else 0
        return (now, now) if torch_free_too else now

    model.set_model_unet_function_wrapper(wrapper)
    theirs = world.model.model.memory_required
    monkeypatch.setattr(world.model.model, "memory_required", theirs, raising=False)  # another pack's
    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)
    done = world.optimize(model=model, memory="per_step", steps=3, iterations=1, latent=LATENT)
    assert set(sizes[:4]) == {2} and set(sizes[4:]) == {1} and not done.result.cut_short
    assert vars(world.model.model)["memory_required"] is theirs


def test_so_is_every_particle(world, card):
    with torch.inference_mode():
        job = world.job(model=card[0], steps=3, latent=LATENT)
        job.settings = SearchSettings(method="best_of_n", particles=3)
        assert same_throughout(card, host.run(job, host.searching))
