"""What diffattn relies on in diffusers' private names: a release that moves one fails here."""

import inspect

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from diffattn import _compat


def test_registry_keeps_its_tables() -> None:
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        assert isinstance(getattr(_AttentionBackendRegistry, table), dict)
    register = inspect.signature(_AttentionBackendRegistry.register).parameters
    assert {"backend", "constraints", "supports_context_parallel"} <= set(register)


def test_dispatch_takes_a_backend_for_one_call() -> None:
    parameters = inspect.signature(dispatch_attention_fn).parameters
    wanted = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"}
    assert wanted | {"enable_gqa", "backend", "parallel_config"} <= set(parameters)


def test_backends_are_an_enumeration_of_strings() -> None:
    assert issubclass(AttentionBackendName, str)


def test_a_backend_of_ours_is_called_with_heads_third() -> None:
    calls = []

    def ours(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        calls.append((tuple(query.shape), scale))
        return value

    member = _compat.register_backend(ours)
    other = _compat.register_backend(ours)
    assert member != other
    assert member not in list(AttentionBackendName)
    x = torch.randn(2, 5, 3, 4)
    assert _compat.dispatch(x, x, x, backend=member, scale=0.5) is x
    assert calls == [((2, 5, 3, 4), 0.5)]
    _compat.unregister_backend(member)
    _compat.unregister_backend(other)
    assert member not in _AttentionBackendRegistry.list_backends()


def test_processors_carry_their_backend() -> None:
    processor = WanAttnProcessor()
    assert _compat.uses_dispatch(processor)
    assert _compat.processor_backend(processor) is None
    _compat.set_processor_backend(processor, "x")
    assert _compat.processor_backend(processor) == "x"
    assert WanAttnProcessor._attention_backend is None, "set on the instance, not on the class"
    assert {"set_processor", "get_processor"} <= set(dir(WanAttention))
