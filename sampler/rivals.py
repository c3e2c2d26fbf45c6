"""The rivals of MIRA among noise optimisers, with the settings of their authors, by the fields of `Settings`.

What a rival does not say (the number of iterations, for all; MIRA's beta, which its authors chose by the reward, and
which is here a share of the reward's pull) is the user's.
"""

from __future__ import annotations

_ALONE = {"seeds": 1, "restart_every": 0, "hold": "no", "stop": "never", "drift_limit": 0.0, "relative_beta": False}

RIVALS: dict[str, dict] = {
    # arXiv 2510.01549, Algorithm 1
    "mira": _ALONE
    | {
        "variables": "trajectory", "optimizer": "adamw", "lr": 0.01, "clip_norm": 0.0, "regularizer": "mira",
        "relative_beta": True, "keep": "last",
    },
    # arXiv 2405.18881, without and with its probability regularisation
    "dno": _ALONE
    | {
        "variables": "trajectory", "optimizer": "adamw", "lr": 0.01, "clip_norm": 1.0, "regularizer": "none",
        "beta": 0.0, "keep": "last",
    },
    "dno_prno": _ALONE
    | {
        "variables": "trajectory", "optimizer": "adamw", "lr": 0.01, "clip_norm": 1.0, "regularizer": "prno",
        "beta": 1.0, "keep": "last",
    },
    # arXiv 2406.04312; its composite of rewards is a scaling of Combine Rewards
    "reno": _ALONE
    | {
        "variables": "initial", "optimizer": "sgd", "lr": 5.0, "clip_norm": 0.1, "regularizer": "chi", "beta": 0.01,
        "keep": "best_reward",
    },
    # arXiv 2404.04650: its parameterisation and KL on the given reward; with its own attention losses: initno.py
    "initno": _ALONE
    | {
        "variables": "initno", "optimizer": "adam", "lr": 0.01, "regularizer": "none", "beta": 1.0,
        "keep": "best_reward",
    },
}  # fmt: skip
