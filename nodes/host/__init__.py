"""The one adapter to ComfyUI: its sampling as a differentiable process (`process`), runs in it (`runs`), a restart
of what came out (`restart`), what its
networks need for a gradient (`grad`), its samplers with noises of ours (`samplers`), and questions to them (`probe`).
"""

from .process import (
    INTERRUPTS,
    SCALES,
    Chain,
    Job,
    Process,
    decode,
    patcher_of,
    samples_of,
    synchronize,
    used_bytes,
)
from .restart import FinalRestart
from .runs import Optimized, optimizing, run, searching

__all__ = [
    "INTERRUPTS", "SCALES", "Chain", "FinalRestart", "Job", "Optimized", "Process", "decode", "optimizing",
    "patcher_of", "run", "samples_of", "searching", "synchronize", "used_bytes",
]  # fmt: skip
