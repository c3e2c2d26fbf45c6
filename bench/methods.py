"""The rivals of the benchmark, each as its authors run it, scaled to one budget of network evaluations.

A budget is counted in plain samples: one forward pass of the denoiser per step counts 1, a backward pass 2 (what they
cost; see docs/speed.md). So K iterations of noise optimisation cost (K + 1) + 2 K.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from testing.pack import ROOT, mira, with_comfyui

with_comfyui()

Settings, lengths = mira("sampler.optimize").Settings, mira("sampler.restart").lengths
SearchSettings, SEARCHES = mira("sampler.search").SearchSettings, mira("sampler.search").METHODS
PreferenceSettings = mira("sampler.preference").PreferenceSettings
DEFAULT, GRADIENT_STEPS = mira("nodes.shared.inputs").DEFAULT, mira("nodes.shared.inputs").GRADIENT_STEPS
RIVALS = mira("sampler.rivals").RIVALS
guidance, cfg_guider = mira("nodes.guidance"), mira("nodes.shared.job").cfg_guider

# The paper's weights of the penalty (arXiv 2510.01549).
BETA = {"aesthetic": 0.2, "brightness": 1.0, "darkness": 0.8, "JPEG": 1.0, "hps": 0.5, "pickscore": 0.5}
# exp(strength * reward) of FK and 1 / alpha of DAS, for rewards of these sizes: of order 10 over a typical gain.
STRENGTH = {"aesthetic": 10.0, "brightness": 20.0, "darkness": 20.0, "JPEG": 10.0, "hps": 200.0, "pickscore": 10.0}


@dataclass(frozen=True)
class Method:
    """settings(budget, reward, lr, steps) of the kind that says how it runs. gradient: whether the reward needs one.

    steps: of the sampler; 0: the benchmark's. guider(model, positive, negative, cfg, vae, reward): in place of plain
    guidance. fewest_steps: below which it can do nothing. gradient_steps: through how many of the last steps the
    gradient goes, 0 for all. only: the one reward that it can be asked for.
    """

    settings: Callable
    gradient: bool = True
    steps: int = 0
    guider: Callable | None = None
    fewest_steps: int = 1
    gradient_steps: int = 0
    only: str = ""


def optimising(gradient_steps: int = 0, **fixed) -> Method:
    def settings(budget: int, reward: str, lr: float, steps: int):
        chosen = {k: v(reward) if callable(v) else v for k, v in fixed.items()}
        seeds = min(chosen.get("seeds", 1), max(1, budget // 4))
        left = budget - (seeds if seeds > 1 else 0)  # each seed is a run forward
        cost = 1 + 2 * min(gradient_steps or steps, steps) / steps
        settings = Settings(**{"iterations": 1, "lr": lr, "keep": "last"} | chosen | {"seeds": seeds})

        def passes(iterations: int) -> float:
            """A restart is sampled, and sampled again as its round's first iterate."""
            return 1 + cost * iterations + 2 * (len(lengths(replace(settings, iterations=iterations))) - 1)

        return replace(settings, iterations=max((n for n in range(1, budget) if passes(n) <= left), default=1))

    return Method(settings, gradient_steps=gradient_steps)


def searching(method: str, cost: Callable[[int], dict], gradient: bool = False) -> Method:
    def settings(budget: int, reward: str, lr: float, steps: int):
        return SearchSettings(**{"method": method, "strength": STRENGTH[reward], "lr": lr} | cost(budget))

    return Method(settings, gradient, fewest_steps=2 if SEARCHES[method].steers else 1)


def preferring(gradient: bool = False, **fixed) -> Method:
    def settings(budget: int, reward: str, lr: float, steps: int):
        chosen = {k: v(budget) if callable(v) else v for k, v in fixed.items()}
        return PreferenceSettings(**{"lr": lr, "keep": "incumbent"} | chosen)

    return Method(settings, gradient)


def published_dpo(budget: int, reward: str, lr: float, steps: int) -> PreferenceSettings:
    """Algorithm 2 with the paper's numbers, which cost 300 plain samples whatever the budget is."""
    return PreferenceSettings(iterations=50, lr=0.01, beta=0.2 if reward == "aesthetic" else 1.0, keep="last_winner")


@functools.cache
def tuned_model():
    """The demo model with its LoRA towards brightness: loaded once, beside the base model."""
    import comfy.sd
    from safetensors.torch import load_file

    lora = load_file(ROOT / "demo" / "weights" / "bright_lora.safetensors")
    return comfy.sd.load_lora_for_models(mira("nodes.demo").load_model(), None, lora, 1.0, 0)[0]


def by_tuned_model(weight: float, schedule: str) -> Callable:
    def guider(model, positive, negative, cfg, vae, reward):
        guided = guidance.MiraRLGuidance.execute(model, tuned_model(), weight, schedule, 1.0).args[0]
        return cfg_guider(guided, positive, negative, cfg)

    return guider


def by_reward(model, positive, negative, cfg, vae, reward):
    return guidance.MiraDyMOGuider.execute(model, positive, negative, vae, reward, cfg, 1.0, 0.2, 1.0).args[0]


def guided(guider: Callable, cost: int, **more) -> Method:
    """cost: of one guided sample, in plain ones."""
    return replace(searching("best_of_n", lambda b: {"particles": max(1, b // cost)}), guider=guider, **more)


def halving_cost(n: int, steps: int = 8) -> float:
    """Of halving n seeds, in plain samples, its own plain one among them."""
    passes, at, alive = steps, 0, n
    for step in SearchSettings(method="halving", particles=n).looks(steps):
        left = math.ceil(alive / 2) if step < steps else alive
        passes += alive * (step - at) + alive - left  # a survivor's prediction is its next step's
        at, alive = step, left
    return passes / steps


def most_to_halve(budget: int) -> int:
    """The most seeds whose halving costs no more than so many plain samples."""
    return max((n for n in range(1, 8 * budget) if halving_cost(n) <= budget), default=1)


def rival(name: str, **more) -> Method:
    """A step of its authors' length would need their number of iterations: all get the benchmark's."""
    return optimising(**{k: v for k, v in RIVALS[name].items() if k != "lr"} | more)


METHODS: dict[str, Method] = {
    **{name: rival(name) for name in ("dno", "dno_prno")},
    "mira": rival("mira", beta=BETA.__getitem__, relative_beta=False),
    "mira_two_sided": optimising(regularizer="mira_two_sided", beta=0.3),
    "score_distance": optimising(regularizer="score_distance", beta=0.1),
    # The nodes' defaults: from the best of several seeds, within a named drift.
    "default": optimising(
        regularizer=DEFAULT.regularizer, beta=DEFAULT.beta, drift_metric=DEFAULT.drift_metric,
        drift_limit=DEFAULT.drift_limit, keep=DEFAULT.keep, stop=DEFAULT.stop, hold=DEFAULT.hold,
        seeds=DEFAULT.seeds, restart_every=DEFAULT.restart_every, restart_denoise=DEFAULT.restart_denoise,
        gradient_steps=GRADIENT_STEPS,
    ),
    "projection": optimising(drift_metric="path_kl", drift_limit=0.05, hold="projection"),
    "reno": optimising(**RIVALS["reno"]),
    "initno": rival("initno"),
    "best_of_n": searching("best_of_n", lambda b: {"particles": b}),
    "halving": searching("halving", lambda b: {"particles": most_to_halve(b)}),
    "zero_order": searching("zero_order", lambda b: {"particles": max(1, (b - 1) // 4), "rounds": 4}),
    "fk_steering": searching("fk_steering", lambda b: {"particles": b - 1}),
    "code": searching("code", lambda b: {"particles": b - 1}),
    "das": searching("das", lambda b: {"particles": max(1, (b - 1) // 3)}, gradient=True),
    "ntrk": searching("ntrk", lambda b: {"particles": max(1, (b - 1) // 3), "rounds": 1}, gradient=True),
    # Two trajectories, two rounds of n updates: 6 + 4 n runs forward and 4 n backward.
    "mira_fk": searching(
        "mira_fk", lambda b: {"particles": 2, "rounds": 2, "iterations": max(1, (b - 6) // 12), "beta": 0.1},
        gradient=True,
    ),
    "mira_dpo": preferring(True, method="dpo", iterations=lambda b: max(1, b // 6)),
    "hybrid2": preferring(
        True, method="hybrid2", candidates=5, explore=0.01, iterations=lambda b: max(1, b // 8)
    ),
    "dueling": preferring(method="dueling", explore=0.6, iterations=lambda b: b - 1),
    # A guided sample is one sample: the best of as many as the budget has.
    "dymo": guided(by_reward, cost=3, fewest_steps=2),
    "rlg": guided(by_tuned_model(1.5, "constant"), cost=2, only="brightness"),
    "aig": guided(by_tuned_model(1.0, "annealed"), cost=2, only="brightness"),
}  # fmt: skip

# Not in the comparison unless they are asked for: the ablation of beta, reward against sampling steps, and Algorithm 2
# at its own cost.
BETAS, STEPS = (0.05, 0.2, 1.0, 5.0), (4, 16)
SWEEPS: dict[str, Method] = {f"mira_beta_{b:g}": rival("mira", beta=b, relative_beta=False) for b in BETAS} | {
    f"{name}_steps_{n}": replace(METHODS[name], steps=n) for name in ("dno", "mira", "default") for n in STEPS
}
SWEEPS["mira_dpo_published"] = Method(published_dpo, gradient=True)
ALL = METHODS | SWEEPS
