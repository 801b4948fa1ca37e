"""Operators are called without torch's dispatcher, but for whatever would notice an operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from oracles import random_layout
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from diffattn.kernels.checks import scale_of
from diffattn.kernels.cpu import block_sparse
from diffattn.kernels.dispatch import is_noticed, needs_gradients, operator

TOKENS = 70
OPERATOR = torch.ops.diffattn.block_sparse_cpu.default


def tensors(**options: Any) -> list[torch.Tensor]:
    return [torch.randn(2, TOKENS, 3, 8, **options) for _ in range(3)]


@functools.cache
def layout() -> list[torch.Tensor]:
    return list(random_layout(TOKENS, TOKENS, 32, 32).tensors)


def attend(*qkv: torch.Tensor) -> torch.Tensor:
    out, _ = block_sparse.block_sparse_attention(*qkv, layout(), block_q=32, block_kv=32)
    return out


def registered(*qkv: torch.Tensor) -> torch.Tensor:
    """Attention by the operator itself."""
    out, _ = OPERATOR(*qkv, layout(), None, 32, 32, qkv[0].shape[-1] ** -0.5)
    return out


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class SeenByFunction(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_operators() -> Iterator[None]:
    """Fail where the dispatcher computes the operator on the CPU while the block runs."""

    def fail(*args: Any) -> None:
        raise AssertionError("the operator was called")

    with torch.library._scoped_library("diffattn", "IMPL") as library:
        library.impl("block_sparse_cpu", fail, "AutogradCPU", allow_override=True)
        library.impl("block_sparse_cpu_backward", fail, "AutogradCPU", allow_override=True)
        yield


def test_nothing_calls_the_operator_where_nothing_notices_it() -> None:
    qkv = tensors()
    with torch.no_grad():
        expected = registered(*qkv)
    leaves = [x.clone().requires_grad_() for x in qkv]
    grad = torch.randn_like(expected)
    of_operator = torch.autograd.grad(registered(*leaves), leaves, grad)
    with no_operators():
        torch.testing.assert_close(attend(*qkv), expected, rtol=0, atol=0)
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, grad)
        with pytest.raises(AssertionError, match="the operator was called"):
            registered(*qkv)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(grads, of_operator, rtol=0, atol=0)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True)])
def test_gradients_of_some_tensors(needed: tuple[bool, ...]) -> None:
    qkv = [x.requires_grad_(of) for x, of in zip(tensors(), needed, strict=True)]
    grads = []
    for function in (attend, registered):
        function(*qkv).square().sum().backward()
        grads.append([x.grad for x in qkv])
        for x in qkv:
            x.grad = None
    for ours, of_operator, of in zip(*grads, needed, strict=True):
        assert (ours is not None) == (of_operator is not None) == of
        if of:
            torch.testing.assert_close(ours, of_operator, rtol=0, atol=0)


def test_a_call_without_gradients_keeps_nothing() -> None:
    qkv = [x.requires_grad_() for x in tensors()]
    with torch.no_grad():
        assert not attend(*qkv).requires_grad
    assert not attend(*(x.detach() for x in qkv)).requires_grad
    with torch.inference_mode():
        assert attend(*tensors()).is_inference()


def test_second_derivatives_are_refused_as_by_the_operator() -> None:
    messages = []
    for function in (attend, registered):
        q, k, v = (x.requires_grad_() for x in tensors())
        (dq,) = torch.autograd.grad(function(q, k, v).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered") as error:
            dq.sum().backward()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("mode", [Seen, SeenByFunction])
def test_modes_see_the_operator(mode: Callable[[], Any], gradients: bool) -> None:
    qkv = tensors(requires_grad=gradients)
    with mode() as seen:
        attend(*qkv)
    assert OPERATOR in seen.operators


def test_a_profiler_sees_the_operator() -> None:
    qkv = tensors()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        attend(*qkv)
    assert "diffattn::block_sparse_cpu" in {event.key for event in seen.key_averages()}


def test_a_trace_has_the_operator() -> None:
    graph = torch.jit.trace(attend, tensors(), check_trace=False).graph
    assert "diffattn::block_sparse_cpu" in str(graph)


def test_fake_tensors_take_the_operators_fake_results() -> None:
    layout()
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = attend(*tensors(dtype=torch.bfloat16))
    assert type(out).__name__ == "FakeTensor"
    assert out.shape == (2, TOKENS, 3, 8)


@pytest.mark.parametrize("gradients", [False, True])
def test_tensors_without_data_are_noticed(gradients: bool) -> None:
    """The dispatcher gives them results without data."""
    of_meta = torch.empty(3, device="meta", requires_grad=gradients)
    assert is_noticed((of_meta, 1.0))
    assert is_noticed(([torch.empty(2), of_meta],))


def test_tensors_that_are_yet_to_be_negated() -> None:
    lazy = torch.view_as_complex(torch.randn(2, TOKENS, 3, 8, 2)).conj().imag
    assert lazy.is_neg()
    _, k, v = tensors()
    torch.testing.assert_close(attend(lazy, k, v), attend(lazy.resolve_neg().contiguous(), k, v))


class Scaled(torch.Tensor):
    """A subclass that says what an operator does with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OPERATOR:
            return 7, 8
        return super().__torch_function__(func, types, args, kwargs)


def test_subclasses_say_what_the_operator_does() -> None:
    q, k, v = tensors()
    assert attend(q.as_subclass(Scaled), k, v) == 7
    assert not is_noticed((torch.nn.Parameter(q), k, None, 3, [v]))


@pytest.mark.parametrize("scale", [2, True, np.float32(0.5), torch.tensor(0.25)])
def test_scales_of_any_type_are_floats_as_the_operator_makes_them(scale: Any) -> None:
    """Triton compiles another kernel for an integer."""
    qkv = tensors()
    assert type(scale_of(scale, qkv[0])) is float
    options = {"block_q": 32, "block_kv": 32}
    given, floating = (
        block_sparse.block_sparse_attention(*qkv, layout(), scale=x, **options)[0]
        for x in (scale, float(scale))
    )
    torch.testing.assert_close(given, floating, rtol=0, atol=0)
    assert scale_of(None, torch.empty(1, 1, 1, 16)) == 0.25


def test_what_needs_gradients() -> None:
    moving = torch.ones(2, requires_grad=True)
    assert needs_gradients((torch.ones(2), [moving], 1.0))
    assert not needs_gradients((torch.ones(2), None, [torch.ones(2)]))
    with torch.no_grad():
        assert not needs_gradients((moving,))


def test_an_operator_computes_with_autocast_off() -> None:
    @operator("product_for_a_test")
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    a, b = torch.randn(4, 4), torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(a, b).dtype == torch.float32
        with Seen() as seen:
            assert product(a, b).dtype == torch.float32
    assert torch.ops.diffattn.product_for_a_test.default in seen.operators
