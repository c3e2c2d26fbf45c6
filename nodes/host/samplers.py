"""Differentiable twins of ComfyUI's k-diffusion samplers.

A sampler function is decorated with `torch.no_grad()`, may call other decorated ones, and makes its own noise. Its
twin is the same code in a namespace of its own, where every decorated function is replaced by its twin, every noise
comes from us, and nothing is detached. ComfyUI's module is left as it is.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.k_diffusion.sampling as k_diffusion
from torch import Tensor

from ...sampler.rollout import NoiseSource


def _without_no_grad(function: types.FunctionType) -> types.FunctionType:
    """Strip torch's grad-mode decorators, and no others (a context manager's `__wrapped__` is something else)."""
    while function.__globals__.get("__name__") == "torch.utils._contextlib" and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


NOISE_FACTORIES = ("default_noise_sampler", "BrownianTreeNoiseSampler")


def _attached(code: types.CodeType) -> types.CodeType:
    """The same code that clones where it detached: some samplers cut their history off, and its gradient with it."""
    return code.replace(
        co_names=tuple("clone" if name == "detach" else name for name in code.co_names),
        co_consts=tuple(_attached(c) if isinstance(c, types.CodeType) else c for c in code.co_consts),
    )


class Twins:
    """Makes the twins of sampler functions whose every noise is `source(draw)`."""

    def __init__(self, source: NoiseSource) -> None:
        self.source = source
        self.namespaces: dict[int, dict] = {}
        self.functions: dict[types.FunctionType, types.FunctionType] = {}

    def __call__(self, function: Callable) -> Callable:
        if isinstance(function, functools.partial):
            return functools.partial(self(function.func), *function.args, **function.keywords)
        return self._function(function) if isinstance(function, types.FunctionType) else function

    def noise_sampler(self, sampler: Callable) -> Callable:
        return lambda sigma, sigma_next: self.source(lambda: sampler(sigma, sigma_next))

    def _making_noise(self, factory: Callable) -> Callable:
        """A noise sampler factory whose sampler is made only when it is asked for a noise of its own."""

        def make(*args: Any, **kwargs: Any) -> Any:
            sampler = functools.cache(lambda: factory(*args, **kwargs))
            return lambda sigma, sigma_next: self.source(lambda: sampler()(sigma, sigma_next))

        return make

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        raw = _without_no_grad(function)
        if raw not in self.functions:
            namespace = self._namespace(raw.__globals__)
            twin = types.FunctionType(
                _attached(raw.__code__), namespace, raw.__name__, raw.__defaults__, raw.__closure__
            )
            twin.__kwdefaults__ = raw.__kwdefaults__
            self.functions[raw] = twin
        return self.functions[raw]

    def _namespace(self, original: dict) -> dict:
        if id(original) in self.namespaces:
            return self.namespaces[id(original)]
        namespace = self.namespaces[id(original)] = dict(original)
        # Looked up at each use: another pack may have put its own in their place.
        factories = [vars(k_diffusion)[name] for name in NOISE_FACTORIES]
        for name, value in original.items():
            if name in NOISE_FACTORIES or any(value is factory for factory in factories):
                namespace[name] = self._making_noise(value)
            elif isinstance(value, types.FunctionType):
                raw = _without_no_grad(value)
                if raw is not value or raw.__globals__ is original:
                    namespace[name] = self._function(value)
        return namespace

    def end(self) -> None:
        """Twins and what they look up hold each other, and with them the source: its noises, and the model."""
        for namespace in self.namespaces.values():
            namespace.clear()


@contextmanager
def twin_of(sampler: Any, source: NoiseSource) -> Iterator[tuple[Callable, dict]]:
    """The twin of a SAMPLER's function, whose every noise is `source(draw)`, and its options; to be called within."""
    twins, options = Twins(source), dict(sampler.extra_options)
    if "noise_sampler" in options:
        options["noise_sampler"] = twins.noise_sampler(options["noise_sampler"])
    try:
        yield twins(sampler.sampler_function), options
    finally:
        twins.end()


class StandIn:
    """Stands where ComfyUI's `KSamplerX0Inpaint` stands in a sampler function."""

    def __init__(self, model_k: Any, call: Callable) -> None:
        self.inner_model = model_k.inner_model
        self.model_k = model_k
        self.call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model_k, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        return self.call(x, sigma, **kwargs)
