"""MIRA for ComfyUI: inference-time alignment that raises a reward and keeps the prompt."""

import os
from importlib.util import find_spec

# Before CUDA starts, or its matrix products never repeat to the bit (`repeatable` on the nodes).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tools that walk the tree (pytest, linters) import this file without ComfyUI, and need nothing of it.
if __package__ and find_spec("comfy") is not None and find_spec("comfy.utils") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
