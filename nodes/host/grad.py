"""What keeps a gradient alive inside ComfyUI: inference mode, weights, attention, in-place sums, block checkpoints.

ComfyUI runs nodes in inference mode, and so its own nodes find every weight as they left it: weights are moved in
inference mode only (`loaded`), and what autograd cannot save is replaced by an equal copy once they are in place.
"""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import CellType
from typing import Any, TypeVar

import comfy.conds
import comfy.ldm.modules.attention
import comfy.model_management
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ...sampler.memory import NO_ENGINE, offloaded, out_of_memory
from .dynamic import is_dynamic
from .patches import controls, things_in

log = logging.getLogger("mira")
T = TypeVar("T")

# Of a layer that is worth a checkpoint of its own: how many layers with weights it has at least.
BLOCK_LAYERS = 3
# Where a list of such layers inside one holds this share of its weights, they are taken instead of it.
MOST_OF_IT = 0.8


def normal(value: Any) -> Any:
    """A copy, outside inference mode, of every tensor in nested lists, tuples, dicts and ComfyUI's conditioning; the
    rest as it is.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: normal(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(normal(v) for v in value)
    if isinstance(value, comfy.conds.CONDRegular):
        value = copy.copy(value)
        vars(value).update({k: normal(v) for k, v in vars(value).items()})
    return value


def made_in_inference_mode(t: Tensor) -> bool:
    """Whether autograd could not save it."""
    # Both signs: `is_inference()` forgets after `.to(dtype)`, where the version counter is what autograd will ask for;
    # a weight of ours that a stock node moved since has a counter, and data that were made in inference mode.
    if t.is_inference() or t.detach().is_inference():
        return True
    try:
        t._version  # noqa: B018
    except RuntimeError:
        return True
    return False


def leave_inference_mode(module: nn.Module) -> None:
    """Re-register every weight, buffer and plain tensor that was made in inference mode: autograd cannot save those."""
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None and made_in_inference_mode(p):
                # Not `clone`: there are quantised tensors whose clone is the very same.
                child._parameters[name] = nn.Parameter(p.detach().to(p.device, copy=True), requires_grad=False)
        for name, b in child._buffers.items():
            if b is not None and made_in_inference_mode(b):
                child._buffers[name] = b.detach().clone()
        replace_tensors(child)
    for part in ("latent_format", "model_sampling"):  # of a diffusion model: these may be no modules
        if getattr(module, part, None) is not None:
            replace_tensors(getattr(module, part))


def replace_tensors(thing: Any) -> None:
    """Plain tensors that an object or the cell of a closure holds, alone or in lists, tuples and dicts: means of a
    format, cached positions.
    """
    if isinstance(thing, CellType):
        if _holds_one(thing.cell_contents):
            thing.cell_contents = normal(thing.cell_contents)
        return
    for name, value in vars(thing).items():
        if name not in ("_parameters", "_buffers", "_modules") and _holds_one(value):
            vars(thing)[name] = normal(value)


def _holds_one(value: Any, depth: int = 2) -> bool:
    if isinstance(value, Tensor):
        return made_in_inference_mode(value)
    if depth and type(value) in (list, tuple, dict):
        return any(_holds_one(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value))
    return False


def leave_inference_mode_with(guider: Any, model_options: dict) -> None:
    """The same of conditioning, and of what patches bring along but the model itself. guider: the run's own copy."""
    if hasattr(guider, "conds"):
        guider.conds = normal(guider.conds)
        for control in controls(guider.conds):
            replace_tensors(control)  # the hint that it holds
            if isinstance(network := getattr(control, "control_model", None), nn.Module):
                leave_inference_mode(network)  # a ControlLora's is made for every sample
    patcher = guider.model_patcher
    known = {id(m) for m in patcher.model.modules()}
    injected = [i for group in patcher.injections.values() for i in group]  # adapters beside the weights
    for thing in itertools.chain.from_iterable(map(things_in, [model_options, *injected])):
        if not isinstance(thing, nn.Module):
            replace_tensors(thing)
        elif id(thing) not in known:
            leave_inference_mode(thing)
            thing.requires_grad_(False)


@contextmanager
def both(a: AbstractContextManager, b: AbstractContextManager) -> Iterator[None]:
    with a, b:
        yield


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, no weight asks for a gradient: only the noises do, and no activation is kept for the weights."""
    asking = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


@contextmanager
def _uncollected() -> Iterator[None]:
    """While ComfyUI walks its list of loaded models: a network that is collected meanwhile takes its entry along."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def loaded(patchers: Sequence, memory: float, gradient: bool = True) -> Iterator[None]:
    """ComfyUI's patchers on the device in one call (several could evict one another), with what a gradient needs.

    memory: bytes that the work within will take beside the weights. gradient: without one, weights may stay behind and
    come when they are used, as in ComfyUI's own sampling, which keeps what lies where of those: none is replaced.
    """
    for patcher in {m for p in patchers for m in (p, *p.model_patches_models())}:
        if gradient and is_dynamic(patcher):
            raise RuntimeError(
                f"{type(patcher.model).__name__}: its weights are in dynamic VRAM, which no gradient survives: start "
                "ComfyUI with --disable-dynamic-vram"
            )
    # A weight that is moved outside inference mode is one that no stock node can use any more, and making room moves
    # those of other models too.
    with torch.inference_mode(), _uncollected():
        comfy.model_management.load_models_gpu(list(patchers), memory_required=memory, force_full_load=gradient)
    modules = [patcher.model for patcher in patchers]
    if gradient:
        management = comfy.model_management
        # A full load is none there. Other packs leave weights elsewhere too, and bring them themselves.
        for patcher in patchers if management.vram_state == management.VRAMState.NO_VRAM else ():
            if any(p.device.type != patcher.load_device.type for p in patcher.model.parameters()):
                raise RuntimeError(
                    f"{type(patcher.model).__name__}: ComfyUI has left weights in the CPU's memory, and a gradient "
                    "needs all of them on the card: start ComfyUI without --novram"
                )
        with torch.inference_mode(False):
            for module in modules:
                leave_inference_mode(module)
    with frozen(modules):
        yield


# ComfyUI's own switches, where it has them: kernels without a backward off, and a backward in fp8 off too, which its
# training nodes may have left on.
SWITCHES = {"in_training": True, "training_fp8_bwd": False}


@contextmanager
def training(gradient: bool = True) -> Iterator[None]:
    """Outside inference mode, with a gradient, and with none of ComfyUI's kernels that have no exact backward.

    gradient: without one, these kernels alone, so that the same noises give the same image in every method; the mode is
    the graph's, which a guider with gradients of its own may have left.
    """
    management = comfy.model_management
    before = {name: getattr(management, name) for name in SWITCHES if hasattr(management, name)}
    try:
        for name in before:
            setattr(management, name, SWITCHES[name])
        with ExitStack() as stack:
            if gradient:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.enable_grad())
            yield
    finally:
        for name, value in before.items():
            setattr(management, name, value)


ATTENTION = ("optimized_attention", "optimized_attention_masked")
# comfy-kitchen's fused rotary positions and norms, which have no backward; those that write over their input end in _.
FUSED = re.compile(r"(apply_rope|rms_rope|rms_adaln|adaln)\w*(?<!_)")


@contextmanager
def pytorch_kernels() -> Iterator[None]:
    """PyTorch's own code where a model asks for "the optimised one" and listens to no option.

    Of attention: sage and flash have no backward, and some models call the function that they imported, without
    `transformer_options` (see `sdpa`). Of rotary positions and norms: fused kernels are in cores without a switch for
    training, and in models that do not ask it (Cosmos Predict 2, Anima and JoyImage in 0.33).
    """
    changed = []
    for name, module in list(sys.modules.items()):
        if name.startswith("comfy.") or name == "comfy_kitchen":
            for known, value in list(vars(module).items()):
                if (other := _pytorch_kernel(known, value)) is not None:
                    changed.append((vars(module), known, value, other))
    try:
        for namespace, name, _, other in changed:
            namespace[name] = other
        yield
    finally:
        for namespace, name, value, _ in changed:
            namespace[name] = value


def _pytorch_kernel(name: str, value: object) -> Callable | None:
    """What takes the place of a module's function of this name, or None: it stays."""
    if name in ATTENTION:
        return comfy.ldm.modules.attention.attention_pytorch
    if FUSED.fullmatch(name) and getattr(value, "__module__", "") == "comfy_kitchen":
        from comfy_kitchen.backends import eager

        return getattr(eager, name, None)
    return None


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions and matrix products of a GPU in full float32: cuDNN's default costs three digits of a score."""
    backends: Any = torch.backends
    off: bool | str
    switches, name, off = (backends.cudnn, backends.cuda.matmul), "allow_tf32", False
    try:
        before = [getattr(switch, name) for switch in switches]
    except RuntimeError:  # once somebody has used the newer switch, the older one cannot be read
        switches, name, off = (backends.cudnn.conv, backends.cuda.matmul), "fp32_precision", "ieee"
        before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, off)
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)


@contextmanager
def repeatable(wanted: bool = True) -> Iterator[None]:
    """The same bits every time, on a GPU too. An operation that cannot raises RuntimeError (`has_no_repeatable_way`);
    then `give_up_repeating` is for the rest. Not wanted, it only sees to it that this ends here.

    It also wants CUBLAS_WORKSPACE_CONFIG in the environment before CUDA starts, which the pack's `__init__` sees to.
    """
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory  # nothing here reads what it has not written
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    choices = cudnn.deterministic, cudnn.benchmark
    try:
        if wanted:
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False
            cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark = choices


def give_up_repeating() -> None:
    """Until `repeatable` ends."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def has_no_repeatable_way(problem: BaseException) -> bool:
    return isinstance(problem, RuntimeError) and "deterministic" in str(problem)


def has_no_engine(problem: BaseException) -> bool:
    """Of cuDNN's, none fits into a full card; or none repeats, which it tells in the same words."""
    return any(w in str(problem).lower() for w in NO_ENGINE)


class Repeating:
    """Work outside of a run that is the same bits every time, as long as the device has a way: else that is logged."""

    def __init__(self, node: str) -> None:
        self.node, self.possible = node, True

    def __call__(self, device: torch.device, work: Callable[[], T]) -> T:
        if self.possible and device.type == "cuda":
            try:
                with repeatable():
                    return work()
            except RuntimeError as problem:
                if not self.gives_up(problem):
                    raise
        return work()

    def gives_up(self, problem: BaseException) -> bool:
        """Whether it goes on without, from now on: nothing else than that may mend this."""
        if not self.possible or not (has_no_repeatable_way(problem) or has_no_engine(problem)):
            return False
        self.possible = False
        said = str(problem).splitlines()[0]
        log.warning("%s: does not repeat to the bit on this device: %s", self.node, said)
        return True


# In-place arithmetic, and what gives the same without writing over what backward needs.
OUT_OF_PLACE: dict[Callable, Callable] = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.div_: torch.div,
}
LEAST_COVER = 1e-20  # the sum of the prompts' strengths at a pixel: a mask has none between this and 0
NORMS = (nn.functional.layer_norm, nn.functional.rms_norm)


class OutOfPlace(TorchFunctionMode):
    """x += y, x *= y and so on make a new tensor: residuals of the Flux family, guidance that rescales.

    But in ComfyUI's own sampling code, which adds regions of the image into one tensor, and means it.
    """

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and func in OUT_OF_PLACE and not _called_by("comfy.samplers"):
            return OUT_OF_PLACE[func](*args, **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


class SlicesToo(OutOfPlace):
    """And a slice is a copy: x[:, :n] = f(x[:, :n]) writes over what f has saved (FreeU V2)."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        return out.clone() if func is Tensor.__getitem__ and torch.is_grad_enabled() else out


class NormsApart(OutOfPlace):
    """Writing into a slice stays what it is, and a norm keeps a copy of its input, over which it is done; what a tensor
    is multiplied with is not itself written over (PixelDiT).
    """

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in NORMS:
            args = (args[0].clone(), *args[1:])
        elif func is Tensor.addcmul_ and args[0] is args[1]:
            func = torch.addcmul
        elif func in OUT_OF_PLACE and args[0]._is_view():
            return func(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)


class Uncovered(TorchFunctionMode):
    """Where no prompt covers the image, ComfyUI divides nothing by 1e-37, and backward would overflow: by more than
    that, which gives nothing all the same.
    """

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        divides = func in (Tensor.div_, Tensor.__itruediv__)
        if divides and torch.is_grad_enabled() and _called_by("comfy.samplers"):
            args = (args[0], args[1].clamp(min=LEAST_COVER))
        return func(*args, **(kwargs or {}))


def gaps_of(guider: Any) -> Callable:
    """The context in which a guider's prediction has a gradient where its prompts leave gaps."""
    conds = [c for cs in getattr(guider, "conds", {}).values() for c in cs]
    regional = any(c.get(part) is not None for c in conds for part in ("area", "mask", "strength"))
    return Uncovered if regional else nullcontext


# From one to the next where backward finds that something was overwritten, or that a gradient changes the prediction.
PLACES = (nullcontext, OutOfPlace, SlicesToo, NormsApart)


def written_over(problem: BaseException) -> bool:
    """Whether backward found that something it needs was overwritten: the next of PLACES may do."""
    return "inplace operation" in str(problem) or "in-place operation" in str(problem)


def sdpa(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention: sage, flash, sub-quadratic and split have no backward, or change with free memory."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


class Around:
    """An override of attention that the graph has, around PyTorch's: what it does to queries, keys and values stays.

    heeded: whether it has always called what it was given. A kernel of its own has no backward: PyTorch's attention
    takes its place, in that call.
    """

    def __init__(self, theirs: Callable) -> None:
        self.theirs, self.heeded = theirs, True

    def __call__(self, _: Any, *args: Any, **kwargs: Any) -> Tensor:
        called: list[bool] = []

        def pytorch(*args: Any, **kwargs: Any) -> Tensor:
            called.append(True)
            return sdpa(None, *args, **(kwargs | {"_inside_attn_wrapper": True}))  # else ComfyUI asks for the override

        try:
            out = self.theirs(pytorch, *args, **kwargs)
        except (RuntimeError, TypeError, ValueError, AssertionError) as problem:
            if called or out_of_memory(problem):
                raise
        if called:
            return out
        self.heeded = False
        return sdpa(None, *args, **kwargs)


def attention_of(model_options: dict) -> Callable:
    """The override of attention that leaves a gradient: PyTorch's, within the graph's own where there is one."""
    own = model_options.get("transformer_options", {}).get("optimized_attention_override")
    if own is None or own is sdpa or isinstance(own, Around):  # ours already, of whoever samples around this
        return own or sdpa
    return Around(own)


def _called_by(module: str) -> bool:
    """Whether the code that called torch is of this module."""
    frame = sys._getframe(2)
    while frame.f_globals is globals():  # modes of ours around one another
        frame = frame.f_back
    return frame.f_globals.get("__name__") == module


def blocks_of(root: nn.Module) -> list[nn.Module]:
    """The layers of `root` that are worth a checkpoint of their own, found by repetition and depth.

    A layer of several layers with weights whose class occurs again: residual and transformer blocks of every family.
    None lies within another: in a list of them that is most of a layer, they are taken, else the layer.
    """
    kinds = Counter(type(m) for m in root.modules())

    def size(m: nn.Module) -> int:
        return sum(p.numel() for p in m.parameters())

    def is_block(m: nn.Module) -> bool:
        folder = isinstance(m, nn.Sequential) or type(m).forward is nn.Module.forward
        if folder or kinds[type(m)] < 2:
            return False
        return sum(any(True for _ in layer.parameters(recurse=False)) for layer in m.modules()) >= BLOCK_LAYERS

    def blocks_inside(m: nn.Module) -> list[nn.Module]:
        found = []
        for child in m.children():
            found += blocks_at(child)
        return found

    def blocks_at(m: nn.Module) -> list[nn.Module]:
        if not is_block(m):
            return blocks_inside(m)
        lists = [child for part in m.modules() if isinstance(part, (nn.ModuleList, nn.Sequential)) for child in part]
        inner = [child for child in lists if is_block(child)]
        return blocks_inside(m) if sum(map(size, inner)) > MOST_OF_IT * size(m) else [m]

    return list(dict.fromkeys(blocks_inside(root)))


class _Block(torch.autograd.Function):
    """What a block gave, and its gradient by computing it again: of a call only `inputs` is kept.

    torch's own checkpoint keeps a record of every tensor inside, which costs more than a small block itself, and does
    not see what is written over in place.
    """

    @staticmethod
    def forward(ctx: Any, given: tuple[Tensor, ...], again: Callable, *inputs: Tensor) -> Any:
        ctx.again = again
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return given if len(given) > 1 else given[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            outputs = zip(_tensors(ctx.again(inputs)), gradients, strict=True)
            pairs = [(o, g) for o, g in outputs if g is not None and o.requires_grad]
            if not pairs:
                return None, None, *(None for _ in inputs)
            found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        return None, None, *found


def _tensors(out: Any) -> tuple[Tensor, ...] | None:
    """What a block returns, as a tuple, or None where it is more than tensors."""
    out = (out,) if isinstance(out, Tensor) else out
    return tuple(out) if type(out) in (tuple, list) and all(isinstance(t, Tensor) for t in out) else None


def _holds_gradient(value: object, depth: int = 2) -> bool:
    """Whether a tensor that carries a gradient is inside a container."""
    if isinstance(value, Tensor):
        return value.requires_grad
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth > 0 and any(_holds_gradient(v, depth - 1) for v in inner)


def _checkpointed(inside: Callable, args: list, kwargs: dict) -> Any:
    """inside(*args, **kwargs), computed again in backward."""
    carrying = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    named = [k for k, a in kwargs.items() if isinstance(a, Tensor) and a.requires_grad]
    others = [a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
    # Blocks hand lists on and write into them (Wan's VAE).
    if any(type(a) is list for a in args) or any(_holds_gradient(a) for a in others):
        return _checkpointed_by_torch(inside, args, kwargs)

    inputs = [args[i] for i in carrying] + [kwargs[k] for k in named]
    if not inputs:
        return inside(*args, **kwargs)
    # What is to be computed again must not hold them, with their history, beside what autograd saves.
    args = [None if i in carrying else a for i, a in enumerate(args)]
    kwargs = {k: None if k in named else a for k, a in kwargs.items()}

    def again(inputs: Any) -> Any:
        given, rest = list(args), dict(kwargs)
        values = iter(inputs)
        for i in carrying:
            given[i] = next(values)
        for k in named:
            rest[k] = next(values)
        return inside(*given, **{k: copy.copy(a) if type(a) is dict else a for k, a in rest.items()})

    versions = [t._version for t in inputs]
    # With a gradient wanted, and none to come from what is known: if one does, it comes from elsewhere.
    out = again([t.detach() for t in inputs])
    if [t._version for t in inputs] != versions:
        raise RuntimeError("an inplace operation of a block writes over its input")
    given = _tensors(out)
    if given is None or any(t.requires_grad for t in given):
        return _checkpointed_by_torch(again, [inputs], {})
    # An input that is handed on as it is must not be mistaken for one that has the gradient already.
    given = tuple(t.detach() for t in given)
    made = _Block.apply(given, again, *inputs)
    if isinstance(out, Tensor):
        return made
    return type(out)(made if isinstance(made, tuple) else (made,))


def _checkpointed_by_torch(inside: Callable, args: list, kwargs: dict, random: bool = False) -> Any:
    """The same for what has more than tensors going in and out, gradients by other ways, or draws random numbers."""
    lists = [copy.copy(a) if type(a) is list else None for a in args]
    done: list[bool] = []

    def once_more(*args: Any, **kwargs: Any) -> Any:
        begun = args  # computed again, lists begin as they were
        if done:
            begun = tuple(a if was is None else copy.copy(was) for a, was in zip(args, lists, strict=True))
        done.append(True)
        return inside(*begun, **kwargs)

    return checkpoint(once_more, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)


def block_place(offload: bool, exact: bool = False) -> AbstractContextManager:
    """Where a block is run, and computed again. offload: what it keeps waits in the CPU's memory, of one layer of a
    decoder at full resolution gigabytes. exact: without TF32, as a reward is.
    """
    inside = both(without_tf32(), OutOfPlace()) if exact else OutOfPlace()
    return both(offloaded(), inside) if offload else inside


def blocks_checkpointed(
    root: nn.Module, place: Callable, *, overheard: bool = False, random: bool = False
) -> Callable | None:
    """A context within which the blocks of `root` checkpoint themselves, or None where it has none.

    place: the context of each block's forward; it must be there again when the block is recomputed in backward.
    overheard: a gradient comes back by more than what the blocks return: by what hooks inside them take out.
    random: they may draw random numbers, and draw the same ones again.
    """
    blocks = blocks_of(root)
    if not blocks:
        return None

    @contextmanager
    def patched() -> Iterator[None]:
        def wrap(forward: Callable) -> Callable:
            def inside(*args: Any, **kwargs: Any) -> Any:
                with place():
                    return forward(*args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                if not torch.is_grad_enabled():
                    return forward(*args, **kwargs)
                # A network writes into its options where it is, which guidance by attention reads.
                own = [copy.copy(a) if type(a) is dict else a for a in args]
                kwargs = {k: copy.copy(a) if type(a) is dict else a for k, a in kwargs.items()}
                if overheard or random:
                    return _checkpointed_by_torch(inside, own, kwargs, random)
                return _checkpointed(inside, own, kwargs)

            return run

        before = [vars(block).get("forward") for block in blocks]  # another pack may have set one
        for block in blocks:
            block.forward = wrap(block.forward)
        try:
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    return patched
