"""The one adapter to ComfyUI: its sampling as a differentiable process (`process`), from a latent to its reward
(`scoring`), a look whether both have a gradient (`selftest`), runs in it (`runs`), a restart of what came out
(`restart`), what its networks need for a gradient (`grad`), its samplers with noises of ours (`samplers`), and
questions to them (`probe`).
"""

from .process import (
    INTERRUPTS,
    SCALES,
    Chain,
    Job,
    Process,
    patcher_of,
    samples_of,
    synchronize,
    used_bytes,
    why_no_restart,
)
from .restart import FinalRestart
from .runs import Optimized, optimizing, run, searching
from .scoring import Scoring, decode

__all__ = [
    "INTERRUPTS", "SCALES", "Chain", "FinalRestart", "Job", "Optimized", "Process", "Scoring", "decode", "optimizing",
    "patcher_of", "run", "samples_of", "searching", "synchronize", "used_bytes",
    "why_no_restart",
]  # fmt: skip
