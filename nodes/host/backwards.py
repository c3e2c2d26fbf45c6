"""A decoder's backward passes of our own, where PyTorch's keep more than they need, or take one processor of a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.grad import conv2d_input, conv3d_input
from torch.overrides import TorchFunctionMode

INPUT_GRADIENTS: dict[Callable, Callable] = {torch.conv2d: conv2d_input, torch.conv3d: conv3d_input}
WIDEST = 256  # channels of a head, for which attention by blocks of keys has a backward that repeats
QUERIES = 512  # that are looked at together, of a picture's tens of thousands


class _Convolution(torch.autograd.Function):
    """By a weight without a gradient, for which alone PyTorch keeps the input."""

    @staticmethod
    def forward(ctx: Any, function: Callable, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.function, ctx.shape, ctx.how = function, x.shape, how
        ctx.save_for_backward(weight)
        return function(x, weight, bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (weight,) = ctx.saved_tensors
        found = INPUT_GRADIENTS[ctx.function](ctx.shape, weight, gradient, *ctx.how)
        return None, found, None, None, *(None for _ in ctx.how)


class _Attention(torch.autograd.Function):
    """PyTorch's, with a backward in pieces of the queries, each of which keeps a whole card busy.

    To repeat to the bit PyTorch's goes through all keys in one block for each head of each image, and the only one that
    has as many channels as a decoder's single head leaves all but one processor of the card idle.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return scaled_dot_product_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        q, k, v = ctx.saved_tensors
        scale, dq = q.shape[-1] ** -0.5, torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
        for first in range(0, q.shape[-2], QUERIES):
            rows = slice(first, first + QUERIES)
            queries, out = q[..., rows, :] * scale, gradient[..., rows, :]
            share = (queries @ k.mT).to(dk.dtype).softmax(-1)
            moved = (out @ v.mT).to(dk.dtype)
            moved = (share * (moved - (moved * share).sum(-1, keepdim=True))).to(q.dtype)
            dq[..., rows, :] = moved @ k * scale
            dk += moved.mT @ queries
            dv += share.to(q.dtype).mT @ out
        return dq, dk.to(k.dtype), dv.to(v.dtype)


class OwnBackwards(TorchFunctionMode):
    """What is computed is PyTorch's, to the bit."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in INPUT_GRADIENTS and not kwargs and torch.is_grad_enabled() and _frozen_convolution(*args):
            return _Convolution.apply(func, *args)
        if func is scaled_dot_product_attention and torch.is_grad_enabled() and _plain_attention(*args, **kwargs):
            return _Attention.apply(*args[:3])
        return func(*args, **kwargs)


def _frozen_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any) -> bool:
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    usual = x.ndim == weight.ndim and not any(isinstance(h, str) for h in how)
    return x.requires_grad and frozen and usual and not torch.is_autocast_enabled(x.device.type)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0, is_causal: bool = False,
    **more: Any,
) -> bool:  # fmt: skip
    plain = attn_mask is None and not dropout_p and not is_causal and not any(v for v in more.values())
    return plain and _one_processor(q) and (q.requires_grad or k.requires_grad or v.requires_grad)


def _one_processor(q: Tensor) -> bool:
    """Whether PyTorch's backward goes through all of it in one block."""
    return q.is_cuda and torch.are_deterministic_algorithms_enabled() and q.shape[-1] > WIDEST
