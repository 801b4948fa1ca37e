"""Bytes and FLOPs of a training step, counted on torch's meta device, where nothing is computed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# A backward pass of attention makes five products of the size of a forward's two.
_BACKWARD = 2.5


class Tally(TorchDispatchMode):
    """Follows every tensor that operators make while the mode is on, but for views of weights.

    Attributes:
        now: bytes of the tensors that are alive.
        peak: the most that `now` has been.
        flops: FLOPs of matrix products and convolutions.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        own = (*model.parameters(), *model.buffers())
        self._alive = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "meta" or key in self._alive:
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class FlashAttention(TorchFunctionMode):
    """Attention that keeps queries, keys, values, outputs and a number a row, and nothing else.

    Sparse attention does so in an order of its own: it makes copies in that order, and its results
    are put back.

    Attributes:
        tokens: length of the sequence of video self-attention.
        sparse: FLOPs of video self-attention that a method makes sparse.
        dense: FLOPs of the dense model's video self-attention.
        other: FLOPs of cross-attention.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.sparse = self.dense = self.other = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        out: Tensor = _Flash.apply(named["query"], named["key"], named["value"], self)
        return out

    def is_of_video(self, query: Tensor, key: Tensor) -> bool:
        """Whether a call is video self-attention."""
        return query.shape[-2] == key.shape[-2] and query.shape[-2] >= self.tokens

    def count(self, query: Tensor, key: Tensor, *, backward: bool, taught: bool) -> None:
        """Count a pass of attention.

        Args:
            query, key: (batch, heads, tokens, channels).
            backward: whether the pass is a backward pass.
            taught: whether the pass is the dense model's.
        """
        flops = 4.0 * query.numel() * key.shape[-2] * (_BACKWARD if backward else 1)
        if not self.is_of_video(query, key):
            self.other += flops
        elif taught:
            self.dense += flops
        else:
            self.sparse += flops


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mode: FlashAttention
    ) -> Tensor:
        # A function's forward runs without gradients: whether there will be any, its inputs say.
        taught = not any(t.requires_grad for t in (query, key, value))
        mode.count(query, key, backward=False, taught=taught)
        ctx.ordered = mode.is_of_video(query, key) and not taught
        if ctx.ordered:
            query, key, value = query.clone(), key.clone(), value.clone()
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        ctx.mode = mode
        return out.clone() if ctx.ordered else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.mode.count(query, key, backward=True, taught=False)
        outer = gradients[0].clone() if ctx.ordered else gradients[0]
        made = [torch.empty_like(each) for each in (query, key, value)]
        del outer
        return (*(each.clone() for each in made), None) if ctx.ordered else (*made, None)
