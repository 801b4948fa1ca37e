"""Attention processors that change the inputs of the projections to queries and keys.

Such a processor is the model's own, of a derived class, and is called with an attention module that
has other `to_q` and `to_k`. Hooks on the two modules would suffice for an unchanged model. But LoRA
replaces these modules, and offloading replaces their `forward`. The new `to_q` and `to_k` call the
module that is in place at the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from diffattn.methods.base import SiteState


class InputMaps(Protocol):
    """Maps of the inputs of the two projections: (batch, tokens, channels), before and after."""

    def map_q(self, x: torch.Tensor) -> torch.Tensor: ...

    def map_k(self, x: torch.Tensor) -> torch.Tensor: ...


def with_input_maps(processor: Any, name: str, state: SiteState) -> Any:
    """Make a processor project mapped inputs in sparse calls.

    Args:
        processor: the processor to change.
        name: name of the attention module's submodule that is an `InputMaps`.
        state: the state of the site, which says whether calls are sparse.

    Returns:
        `processor`.
    """
    own: Any = type(processor)
    if not hasattr(own, "_diffattn_maps"):
        processor.__class__ = _mapping_class(own)
    processor._diffattn_maps = name, state
    return processor


@functools.cache
def _mapping_class(cls: type) -> type:
    """A subclass of `cls` that passes a `_Mapped` attention module to `cls.__call__`."""
    own: Callable[..., Any] = cls.__call__

    # diffusers passes a processor the arguments that the processor's signature names.
    @functools.wraps(own)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        name, state = self._diffattn_maps
        if state is None or not state.sparse:
            return own(self, attn, *args, **kwargs)
        return own(self, _Mapped(attn, attn.get_submodule(name)), *args, **kwargs)

    # For IP-Adapters, diffusers makes new processors of the class, which no site has a state for.
    untold = {"_diffattn_maps": ("", None)}
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": __name__} | untold)


class _Mapped:
    """An attention module that projects mapped inputs to queries and keys."""

    def __init__(self, attn: Any, maps: InputMaps) -> None:
        if getattr(attn, "fused_projections", False):
            raise RuntimeError(
                "the attached method changes what is projected to queries and keys, but not to"
                " values, and fuse_qkv_projections() has made one projection of the three: call"
                " unfuse_qkv_projections()"
            )
        self._attn = attn
        self._maps = maps
        self._queries = 0

    def to_q(self, x: torch.Tensor) -> torch.Tensor:
        self._queries = x.shape[1]
        return self._attn.to_q(self._maps.map_q(x))

    def to_k(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != self._queries:
            raise ValueError(
                f"this call has {self._queries} queries and {x.shape[1]} keys, but the attached"
                f" method is for self-attention alone, where queries and keys are the same tokens:"
                f" reference images and cross-attention need set_attn_processor(None) here"
            )
        return self._attn.to_k(self._maps.map_k(x))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)
