"""Presets of the optimising nodes: inputs that are set together, by the names of the nodes' inputs."""

from __future__ import annotations

from ...sampler.optimize import Settings
from ...sampler.rivals import RIVALS

# What the measurement in docs/restart.md chose: a drift that is named and held in every round, and restarts between.
DEFAULT = Settings(
    iterations=8,
    lr=0.04,
    regularizer="none",
    beta=1.0,
    drift_metric="path_kl",
    drift_limit=0.05,
    keep="best_within_drift",
    stop="plateau_at_limit",
    hold="projection",
    seeds=4,
    restart_every=4,
    restart_denoise=0.8,
)
CUSTOM = "custom"
# Fields of `Settings` that have another name on a node, and those that no preset of ours sets: the two dials.
_NAMES = {"lr": "learning_rate"}
_FREE = ("iterations", "drift_limit", "loss_scale")


def named(settings: dict) -> dict:
    """By the names of a node's inputs what is by the names of `Settings`."""
    return {_NAMES.get(name, name): value for name, value in settings.items()}


BALANCED = named({k: getattr(DEFAULT, k) for k in Settings.__dataclass_fields__ if k not in _FREE}) | {
    "hold": "auto",
    "gradient_steps": -1,
}
PRESETS: dict[str, dict] = {
    "balanced": BALANCED,
    "fast": BALANCED | {"seeds": 2, "restart_every": 3},
    "strong": BALANCED,
    "exact_gradient": BALANCED | {"gradient_steps": 0},
    **{name: named(settings) | {"gradient_steps": 0} for name, settings in RIVALS.items()},
}
# What the editor sets the dials to when a preset is chosen, where the preset has them not; they stay the user's. The
# paper ran 50 iterations of MIRA.
DIALS = {"iterations": DEFAULT.iterations, "drift_limit": DEFAULT.drift_limit}
SUGGESTED: dict[str, dict] = {
    "balanced": DIALS,
    "fast": DIALS | {"iterations": 6},
    "strong": {"iterations": 24, "drift_limit": 0.1},
    "exact_gradient": DIALS,
    **{name: {"iterations": 12} for name in RIVALS},
    "mira": {"iterations": 50, "beta": 0.1},
}
WORDS = {
    "balanced": "the measured default",
    "fast": "two seeds and 6 iterations, for three quarters of the work",
    "strong": "24 iterations and twice the limit, for rewards of texture; of light and colour it goes too far",
    "exact_gradient": "balanced, through all sampling steps: slower",
    "mira": "the paper's Algorithm 1",
    "dno": "plain noise optimisation",
    "dno_prno": "the same with its authors' regularisation",
    "reno": "ReNO, of the initial noise",
    "initno": "InitNO's variables on the reward",
    "custom": "what the advanced inputs say",
}


def apply_preset(values: dict) -> tuple[dict, list[str]]:
    """(a node's values with its preset in them, what the preset put in the place of other values, in words)."""
    preset = values.get("preset", CUSTOM)
    if preset == CUSTOM:
        return values, []
    chosen = PRESETS[preset]
    replaced = [f"{k} {v} for {values[k]}" for k, v in chosen.items() if k in values and values[k] != v]
    return values | chosen, [f"preset {preset} took {', '.join(replaced)}"] if replaced else []
