"""Dynamic VRAM, newer cores' default on NVIDIA: weights are moved away while a model runs, before backward used them.

What is differentiated is a copy of the network that stays where it is; the graph's own is left as it was found.
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from types import MethodType
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .patches import patches_of

log = logging.getLogger("mira")
# Of a network in dynamic VRAM: a plain patcher of its copy, which lives as long as the network does.
_STILL: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# What dynamic VRAM writes into a network: how the names begin, and what a class says otherwise.
_TRACES = ("_v", "_pin", "_prefetch", "_comfy_graph", "dynamic_", "weight_lowvram", "bias_lowvram")
_CASTS = ("comfy_cast_weights", "comfy_force_cast_weights", "weight_function", "bias_function")


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Whether it is of dynamic VRAM: ComfyUI's default on NVIDIA since 0.16."""
    return hasattr(patcher, "is_dynamic") and bool(patcher.is_dynamic())


def on_one_device(patcher: ModelPatcher, what: str) -> ModelPatcher:
    """Of a model whose work is split over several GPUs (MultiGPU Work Units) the part on its own device: the others run
    in threads that know nothing of gradients, and of what is recorded here.
    """
    if patcher.get_additional_models_with_key("multigpu"):
        log.warning("%s is split over several GPUs: it runs on %s alone", what, patcher.load_device)
        patcher = patcher.clone()
        patcher.remove_additional_models("multigpu")
    return patcher


def static(patcher: ModelPatcher, what: str, own: bool = False) -> ModelPatcher:
    """The same patches on a copy of the network that stays where it is; a patcher that is not dynamic, as it is.

    what: node and input, for the error. own: a copy that nobody else is given. Raises ValueError where none can be had.
    """
    patcher = on_one_device(patcher, what)
    if "disable_dynamic" not in inspect.signature(patcher.clone).parameters:
        return patcher
    if is_dynamic(patcher):
        patcher = _static(patcher, what, own)
    options = _static_options(patcher.model_options, what)
    if options is not patcher.model_options:
        patcher = patcher.clone()
        patcher.model_options = options
    for other in [*patcher.model_patches_models(), *patcher.get_nested_additional_models()]:
        if is_dynamic(other):
            raise ValueError(_stays_dynamic(what, other))
    return patcher


def static_guider(guider: Any, what: str) -> Any:
    """A copy of a CFGGuider whose model, with its patches, and conditioning stay where they are."""
    guider = copy.copy(guider)
    its_own = guider.model_options is guider.model_patcher.model_options
    guider.model_patcher = static(guider.model_patcher, f"{what}: model")
    if its_own:  # the very patches that ComfyUI moves with the model are called
        guider.model_options = guider.model_patcher.model_options
    elif any(is_dynamic(p) for patch in patches_of(guider.model_options) for p in _networks(patch)):
        raise ValueError(
            f"{what}: the guider has model patches of its own in dynamic VRAM, which no gradient survives: patch the "
            "model before the guider, or start ComfyUI with --disable-dynamic-vram"
        )
    guider.original_conds = with_static_networks(guider.original_conds, what)
    return guider


def _stays_dynamic(what: str, patcher: ModelPatcher) -> str:
    return (
        f"{what} comes with a {type(patcher.model).__name__} in dynamic VRAM, which no gradient survives: bypass what "
        "adds it, or start ComfyUI with --disable-dynamic-vram"
    )


def _static(patcher: ModelPatcher, what: str, own: bool) -> ModelPatcher:
    if patcher.injections:
        raise ValueError(
            f"{what} is in dynamic VRAM and has {' and '.join(patcher.injections)} in its layers, which a copy of it "
            "would lose: load such a LoRA without bypass, or start ComfyUI with --disable-dynamic-vram"
        )
    base = None if own else _STILL.get(patcher.model)
    if base is None:
        try:
            network = _copied(patcher)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise ValueError(
                f"{what} is a {type(patcher.model).__name__} in dynamic VRAM, which moves weights away before a "
                f"gradient has used them, and it cannot be copied out of it ({str(problem).splitlines()[0]}): start "
                "ComfyUI with --disable-dynamic-vram"
            ) from problem
        base = comfy.model_patcher.ModelPatcher(network, patcher.load_device, patcher.offload_device)
        if not own:
            _STILL[patcher.model] = base
    clone = patcher.clone(disable_dynamic=True, model_override=base.get_clone_model_override())
    clone.parent = base  # to whom ComfyUI's list of loaded models turns when the clone is gone
    return clone


def _networks(patch: object) -> list:
    models = getattr(patch, "models", None)
    return list(models()) if callable(models) else []


def _static_options(options: dict, what: str) -> dict:
    """A model's options, whose patches' own networks stay where they are too (a "model patch", such as Z-Image's and
    Qwen-Image's ControlNets).
    """
    done: dict[int, Any] = {}  # a patch in several places stays one: it may keep something between its calls
    for patch in patches_of(options):
        if id(patch) not in done and any(is_dynamic(p) for p in _networks(patch)):
            done[id(patch)] = new = copy.copy(patch)
            for name, inner in vars(patch).items():
                if isinstance(inner, ModelPatcher):
                    setattr(new, name, static(inner, f"{what}: the network of {type(patch).__name__}"))
    if not done:
        return options

    def of(value: Any) -> Any:
        if id(value) in done:
            return done[id(value)]
        if type(value) is dict:
            return {k: of(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(of(v) for v in value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, of(value.__self__))
        # Others may find a patch by what they hold (Anima's LLLite).
        if any(id(inner) in done for inner in getattr(value, "__dict__", {}).values()):
            done[id(value)] = new = copy.copy(value)
            for name, inner in vars(value).items():
                setattr(new, name, of(inner))
            return new
        return value

    return of(options)


def _copied(patcher: ModelPatcher) -> nn.Module:
    """A copy of a dynamic patcher's network in the precision it runs in; read from its file where that is known."""
    network = None
    if getattr(patcher, "cached_patcher_init", None) is not None:
        network = patcher.clone(disable_dynamic=True).model
    if network is None or _layers(network) != _layers(patcher.model):  # what another pack did to it is in no file
        network = None  # not two copies at once
        network = _without_traces(patcher)
    # Dynamic VRAM keeps weights in the file's precision, and casts them as it moves them.
    for child in network.modules():
        for name, p in child._parameters.items():
            dtype = getattr(child, f"{name}_comfy_model_dtype", None)
            if type(p) is nn.Parameter and p.is_floating_point() and dtype not in (None, p.dtype):
                child._parameters[name] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    return network


def _layers(network: nn.Module) -> dict[str, tuple[str, str]]:
    """By name, not by class: ComfyUI makes the classes of quantised layers anew for every file that it reads. Its own
    nodes change what stands beside the layers (the noise schedule).
    """
    kinds = {name: type(module) for name, module in getattr(network, "diffusion_model", network).named_modules()}
    return {name: (kind.__module__, kind.__qualname__) for name, kind in kinds.items()}


def _without_traces(patcher: ModelPatcher) -> nn.Module:
    """A copy of the network without what dynamic VRAM wrote into it."""
    comfy.model_management.unload_model_and_clones(patcher)  # else some weights are on the device
    memo: dict[int, object] = {}
    for module in patcher.model.modules():
        for name, value in vars(module).items():
            if name.startswith(_TRACES) and not isinstance(value, (int, float, str, type(None))):
                memo[id(value)] = None
    network = copied(patcher.model, memo)
    for module in network.modules():
        for name in [n for n in vars(module) if n.startswith(_TRACES) or n in _CASTS]:
            delattr(module, name)
    return network


def copied(network: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """A copy of a network that ComfyUI made, of which nobody knows yet. memo: as copy.deepcopy's."""
    memo = {} if memo is None else memo
    for module in network.modules():
        if getattr(module, "current_patcher", None) is not None:
            memo[id(module.current_patcher)] = None
        if hasattr(module, "model_config"):  # answers every name, so that copy.deepcopy takes it for what it is not
            memo[id(module.model_config)] = module.model_config
        for p in module.parameters(recurse=False):
            if is_traceable_wrapper_subclass(p):  # quantised: several tensors, of whose storage there is none
                memo[id(p)] = nn.Parameter(p.detach().to(p.device, copy=True), requires_grad=False)
    return copy.deepcopy(network, memo)


def with_static_networks(conds: dict[str, list[dict]], what: str) -> dict[str, list[dict]]:
    """A guider's conditioning, whose ControlNets and other networks stay where they are too: see `static`."""
    done = {}  # the same one stays the same one: conditionings that share it run in one batch

    def of(control: Any) -> Any:
        chain = control
        while chain is not None and not is_dynamic(getattr(chain, "control_model_wrapped", None)):
            chain = getattr(chain, "previous_controlnet", None)
        if chain is None:  # nothing in it moves: as it is
            return control
        if id(control) not in done:
            done[id(control)] = new = copy.copy(control)
            new.previous_controlnet = of(control.previous_controlnet)
            patcher = getattr(control, "control_model_wrapped", None)
            if is_dynamic(patcher):
                new.control_model_wrapped = static(patcher, f"{what}: the ControlNet")
                new.control_model = new.control_model_wrapped.model
        return done[id(control)]

    def all_of(cond: dict) -> dict:
        new = dict(cond)
        if "control" in cond:
            new["control"] = of(cond["control"])
        if "gligen" in cond:
            kind, patcher, *rest = cond["gligen"]
            new["gligen"] = (kind, static(patcher, f"{what}: GLIGEN"), *rest)
        if "additional_models" in cond:
            others = cond["additional_models"]  # which only tells what to load: who uses them holds them, too
            for other in others if isinstance(others, list) else [others]:
                if is_dynamic(other):
                    raise ValueError(_stays_dynamic(f"{what}: the conditioning", other))
        return new

    return {k: [all_of(c) for c in cs] for k, cs in conds.items()}
