"""The one adapter to ComfyUI. What is to be done (`job`), its sampling as a differentiable process (`process`) and in
pieces (`chain`), from a latent to its reward (`scoring`), a look whether both have a gradient (`selftest`), runs in it
(`runs`), a restart of what came out (`restart`), its samplers with noises of ours (`samplers`), questions to them
(`probe`), a guider that follows a reward (`dymo`), what a UNet attends to (`attention`); and what networks need for a
gradient (`loading`, `dynamic`, `inference_mode`, `kernels`, `places`, `blocks`, `repeating`).
"""

from .job import INTERRUPTS, SCALES, Job, samples_of, why_no_restart
from .loading import patcher_of, synchronize, used_bytes
from .process import Process
from .restart import FinalRestart
from .runs import Optimized, optimizing, run, searching
from .scoring import Scoring, decode

__all__ = [
    "INTERRUPTS", "SCALES", "FinalRestart", "Job", "Optimized", "Process", "Scoring", "decode", "optimizing",
    "patcher_of", "run", "samples_of", "searching", "synchronize", "used_bytes", "why_no_restart",
]  # fmt: skip
