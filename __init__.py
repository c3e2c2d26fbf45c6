"""MIRA for ComfyUI: inference-time alignment that raises a reward and keeps the prompt."""

from importlib.util import find_spec

# Tools that walk the tree (pytest, linters) import this file without ComfyUI, and need nothing of it.
if __package__ and find_spec("comfy") is not None and find_spec("comfy.utils") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
