"""The models and scorers of the benchmark that no test downloads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.rigs import PAPER, Rig, begun_at
from testing.world import PixelReward, World


def test_what_was_distilled_into_one_step_is_given_plain_noise():
    """As DMD samples: noise of unit variance, at the timestep that it was trained for."""
    world, seen = World(side=8), []

    def watch(apply, args):
        seen.append((args["input"], args["timestep"]))
        return apply(args["input"], args["timestep"], **args["c"])

    with torch.inference_mode():
        model = begun_at(world.model, PAPER["pixart-dmd"].begins_at)
        model.set_model_unet_function_wrapper(watch)
    sampling = model.get_model_object("model_sampling")
    whole = world.model.get_model_object("model_sampling")
    world.ksampler(model=model, latent=torch.zeros(16, 4, 8, 8), steps=1, cfg=1.0, sampler="euler", seed=3)
    ((x, sigma),) = seen
    x = sampling.calculate_input(sigma, x)
    assert sampling.timestep(sigma).unique().tolist() == [400] == whole.timestep(sigma).unique().tolist()
    assert x.std().item() == pytest.approx(1, abs=0.03)
    assert whole.sigma_max > 5 * sampling.sigma_max  # the world's own is as it was


def test_renos_composite_has_its_own_weights_and_no_other_hps():
    def scorer(name: str) -> PixelReward:
        reward = PixelReward("brightness")
        reward.facts = replace(reward.facts, name=name)
        return reward

    names = {"hps": "HPSv2.1", "image_reward": "ImageReward", "pickscore": "PickScore"}
    rig = Rig(None, None, clip_score=scorer("CLIPScore"), others={k: scorer(n) for k, n in names.items()})
    images = torch.full((1, 3, 8, 8), 0.75)
    assert rig.composite()(images, [""])[0].item() == pytest.approx(0.5 * (5 + 1 + 0.01 + 0.05))
    rig.others["hps"] = scorer("HPSv2")
    with pytest.raises(ValueError, match="ReNO's composite has no HPSv2:"):
        rig.composite()
