"""What diffattn relies on in diffusers' private names: a release that moves one fails here."""

import inspect
from typing import Any

import pytest
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
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, **_: Any
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
    with pytest.raises(RuntimeError) as error:
        _compat.dispatch(x, x, x, backend=member)
    assert str(error.value) == (
        "an attention processor belongs to a method that was taken off its model; call"
        " set_attn_processor(None) for the model's own processors, or attach a method"
    )


def first(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return query


def test_the_registry_does_not_grow_and_no_member_in_use_gets_another_function() -> None:
    """Compiled code guards on all names of the registry, and stale processors keep members."""
    kept = _compat.register_backend(first)
    _compat.unregister_backend(kept)
    backends = list(_AttentionBackendRegistry.list_backends())
    names = set()
    for _ in range(200):
        member = _compat.register_backend(first)
        names.add(member.value)
        _compat.unregister_backend(member)
    assert kept.value not in names
    assert _AttentionBackendRegistry.list_backends() == backends


def test_many_backends_at_a_time() -> None:
    x = torch.randn(2, 5, 3, 4)
    members = [
        _compat.register_backend(lambda query, key, value, number=number, **_: query + number)
        for number in range(150)
    ]
    assert len({member.value for member in members}) == 150
    for number, member in enumerate(members):
        assert torch.equal(_compat.dispatch(x, x, x, backend=member), x + number)
        _compat.unregister_backend(member)


def test_processors_carry_their_backend() -> None:
    processor = WanAttnProcessor()
    assert _compat.uses_dispatch(processor)
    assert _compat.processor_backend(processor) is None
    _compat.set_processor_backend(processor, "x")
    assert _compat.processor_backend(processor) == "x"
    assert WanAttnProcessor._attention_backend is None, "set on the instance, not on the class"
    assert {"set_processor", "get_processor"} <= set(dir(WanAttention))
