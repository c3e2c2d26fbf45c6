"""A network's blocks, each of which checkpoints itself."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...sampler.memory import offloaded
from ...sampler.rollout import pulled_back
from .backwards import OwnBackwards
from .kernels import without_tf32
from .places import OutOfPlace

# Of a layer that is worth a checkpoint of its own: how many layers with weights it has at least.
BLOCK_LAYERS = 3
# Where a list of such layers inside one holds this share of its weights, they are taken instead of it.
MOST_OF_IT = 0.8


@contextmanager
def both(a: AbstractContextManager, b: AbstractContextManager) -> Iterator[None]:
    with a, b:
        yield


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
            found = pulled_back(_tensors(ctx.again(inputs)), gradients, inputs)
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
    inside = both(OwnBackwards(), OutOfPlace())
    inside = both(without_tf32(), inside) if exact else inside
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
