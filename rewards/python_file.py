"""A reward from a Python file of the user's own.

The file defines `FACTS`, a dict of `Facts`'s fields (only name and typical are needed), and `score(images, prompts)`:
images (B, 3, H, W), nominally in [0, 1] but not clamped, one prompt per image -> (B,). `MODULES`, a list of torch
modules, is optional: they are then loaded and offloaded by ComfyUI's memory management.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import linecache
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from .base import Facts, Reward

OutOfMemoryError = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # as older ones call it
DEFAULTS = {"low": -math.inf, "high": math.inf}


class _Fresh(importlib.machinery.SourceFileLoader):
    """Compiles the file as it is now: compiled files are told apart by their second, and a user edits faster."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """The user's code makes tensors that a later call, with a gradient, may need; the mode of gradients stays."""
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        yield


def located(problem: BaseException, path: Path) -> str:
    """The message of an exception, with the line of the user's file where it came from."""
    kind = f"{type(problem).__name__}: {problem}"
    if isinstance(problem, SyntaxError) and problem.filename == str(path):
        return f"{path.name}, line {problem.lineno}: {kind}"
    lines = [f for f in traceback.extract_tb(problem.__traceback__) if f.filename == str(path)]
    if not lines:
        return f"{path.name}: {kind}"
    return f"{path.name}, line {lines[-1].lineno} ({lines[-1].line}): {kind}"


def _is_range(value: Any) -> bool:
    """(low, high), two numbers."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and all(_is_number(v) and math.isfinite(v) for v in value)


def _is_number(value: Any) -> bool:
    """NumPy's are, too."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def facts_of(declared: Any, path: Path) -> Facts:
    fields = {f.name for f in dataclasses.fields(Facts)}
    if not isinstance(declared, dict):
        raise ValueError(f'{path.name} defines no FACTS: add FACTS = {{"name": "...", "typical": (0.0, 1.0)}}')
    if unknown := sorted(declared.keys() - fields):
        raise ValueError(f"{path.name}: FACTS has no {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    if missing := sorted({"name", "typical"} - declared.keys()):
        raise ValueError(f"{path.name}: FACTS lacks {', '.join(missing)}")
    facts = Facts(**{**DEFAULTS, **declared})
    if not isinstance(facts.name, str) or not facts.name:
        raise ValueError(f"{path.name}: FACTS['name'] is {facts.name!r}; give it a name")
    if not (_is_range(facts.typical) and facts.typical[0] < facts.typical[1]):
        raise ValueError(f"{path.name}: FACTS['typical'] is {facts.typical!r}; give (low, high), low below high")
    for bound in ("low", "high"):
        if not _is_number(value := getattr(facts, bound)):
            raise ValueError(f"{path.name}: FACTS[{bound!r}] is {value!r}; give a number, or leave it out")
    low, high = map(float, facts.typical)
    return dataclasses.replace(facts, low=float(facts.low), high=float(facts.high), typical=(low, high))


class PythonReward(Reward):
    """Runs the file once, when made. Raises ValueError for a file that does not fit, with its line. passes: exceptions
    of the host's that go through the file as they are, such as its interrupt.
    """

    def __init__(self, path: Path, passes: tuple[type[BaseException], ...] = ()) -> None:
        self.path, self.passes = path, (*passes, OutOfMemoryError, MemoryError, CheckpointError)
        linecache.checkcache(str(path))
        loader = _Fresh(f"mira_reward_{path.stem}", str(path))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None  # of a loader of files there is one
        module = importlib.util.module_from_spec(spec)
        sys.modules[loader.name] = module  # where dataclasses and pickle look for it
        try:
            with _outside_inference_mode():
                loader.exec_module(module)
        except (Exception, SystemExit) as problem:
            raise ValueError(located(problem, path)) from problem
        self.facts = facts_of(getattr(module, "FACTS", None), path)
        function = getattr(module, "score", None)
        if not callable(function):
            raise ValueError(f"{path.name} defines no function score(images, prompts)")
        self.function = function
        modules = getattr(module, "MODULES", ())
        if not isinstance(modules, (tuple, list)) or not all(isinstance(m, torch.nn.Module) for m in modules):
            raise ValueError(f"{path.name}: MODULES is {modules!r}; it must be a list of torch modules")
        self.modules = tuple(modules)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        try:
            with _outside_inference_mode():
                # Its own: it may write into it, and of a black box nothing flows back.
                own = images.clone() if self.facts.differentiable else images.detach().clone()
                score = self.function(own, list(prompts))
            if not self.facts.differentiable:
                score = torch.as_tensor(score, dtype=torch.float32, device=images.device)
        except self.passes:
            raise  # whoever called knows what to do
        except (Exception, SystemExit) as problem:
            raise RuntimeError(located(problem, self.path)) from problem
        return self._check(score, images)

    def _check(self, score: Any, images: Tensor) -> Tensor:
        if not isinstance(score, Tensor) or score.shape != (len(images),):
            kind = type(score).__name__
            found = f"a tensor of shape {tuple(score.shape)}" if isinstance(score, Tensor) else f"a {kind}"
            raise RuntimeError(f"{self.path.name}: score gave {found}; it must be a tensor of shape ({len(images)},)")
        if self.facts.differentiable and images.requires_grad and not score.requires_grad:
            raise RuntimeError(
                f"{self.path.name}: the score has no gradient, though FACTS says differentiable. Compute it from "
                "images with torch alone, or set differentiable to False and use it as a black box"
            )
        return score
