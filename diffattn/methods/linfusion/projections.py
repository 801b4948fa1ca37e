"""Attention processors that change what is projected to queries and keys.

They are the model's own, of a class derived from theirs: they are handed the attention module with
other `to_q` and `to_k`. Hooks on these modules would do for a model as it is, but LoRA puts another
module in their place, and offloading another `forward`: whatever is there is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from diffattn.methods.base import SiteState


class InputMaps(Protocol):
    """What the inputs of the two projections become, (batch, tokens, channels) both."""

    def map_q(self, x: torch.Tensor) -> torch.Tensor: ...

    def map_k(self, x: torch.Tensor) -> torch.Tensor: ...


def with_input_maps(processor: Any, name: str, state: SiteState) -> Any:
    """Have a processor project mapped inputs, in calls that go to the method.

    Args:
        processor: is changed, and returned.
        name: of the attention module's submodule that has the maps.
        state: tells which calls those are.
    """
    own: Any = type(processor)
    if not hasattr(own, "_diffattn_maps"):
        processor.__class__ = _mapping_class(own)
    processor._diffattn_maps = name, state
    return processor


@functools.cache
def _mapping_class(cls: type) -> type:
    """A class of processors like `cls`, which is called with a `_Mapped` attention module."""
    own: Callable[..., Any] = cls.__call__

    # diffusers hands a processor the arguments that its signature names.
    @functools.wraps(own)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        name, state = self._diffattn_maps
        if state is None or not state.sparse:
            return own(self, attn, *args, **kwargs)
        return own(self, _Mapped(attn, attn.get_submodule(name)), *args, **kwargs)

    # diffusers makes new processors of a class, for IP-Adapters, without telling them anything.
    untold = {"_diffattn_maps": ("", None)}
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": __name__} | untold)


class _Mapped:
    """An attention module whose queries and keys are those of mapped inputs."""

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
