"""The one place that touches private names of diffusers.

What is relied on here is stated as checks in tests/test_compat.py, so that a diffusers release that
moves something fails in one place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, MochiAttention

# Every class of attention module that has a processor.
ATTENTION_CLASSES = (Attention, MochiAttention, AttentionModuleMixin)

# diffusers hands a backend those of its keyword arguments that the backend's signature names.
BackendFunction = Callable[..., torch.Tensor]

_serial = itertools.count()


def register_backend(function: BackendFunction) -> AttentionBackendName:
    """Make `function` an attention backend of diffusers under a name of its own.

    Args:
        function: takes `query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            _parallel_config` and returns the attention output, (batch, tokens, heads, head_dim).

    Returns:
        A member of diffusers' backend enumeration, to be set on processors. It is not listed among
        the enumeration's members: nobody selects it by name.
    """
    value = f"diffattn_{next(_serial)}"
    member = str.__new__(AttentionBackendName, value)
    member._name_ = value.upper()
    member._value_ = value
    _AttentionBackendRegistry.register(member)(function)
    return member


def unregister_backend(member: AttentionBackendName) -> None:
    """Undo `register_backend`."""
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        getattr(_AttentionBackendRegistry, table).pop(member, None)


def dispatch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, backend: Any, **kwargs: Any
) -> torch.Tensor:
    """diffusers' own attention call; `backend` None is the one the user has made active."""
    parallel_config = kwargs.pop("_parallel_config", None)
    return dispatch_attention_fn(
        query, key, value, backend=backend, parallel_config=parallel_config, **kwargs
    )


def uses_dispatch(processor: object) -> bool:
    """Does this attention processor end in diffusers' dispatch call?"""
    return hasattr(processor, "_attention_backend")


def processor_backend(processor: object) -> Any:
    """The backend set on a processor, None for diffusers' active one."""
    return processor._attention_backend  # type: ignore[attr-defined]


def set_processor_backend(processor: object, backend: Any) -> None:
    processor._attention_backend = backend  # type: ignore[attr-defined]
