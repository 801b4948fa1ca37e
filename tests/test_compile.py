"""torch.compile: as many graphs as the stock model, and the same output and gradients."""

import warnings
from typing import Any

import pytest
import tiny_wan
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from triton_device import triton_device

import diffattn
from diffattn import FullMask, RadialAttn, TokenGrid, attention
from diffattn.attach.compiled import remember, traced_attention
from diffattn.kernels.cpu import block_sparse as cpu_kernel
from diffattn.kernels.reference import reference_attention
from diffattn.operator import BACKEND_VARIABLE

SPARSE = RadialAttn(
    decay_factor=0.0, split_threshold=8, block_size=4, dense_layers=0, dense_steps=0
)


def inputs(frames: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 16, frames, 12, 10, generator=generator),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def graphs(model: torch.nn.Module, how: str) -> tuple[int, torch.Tensor]:
    """Number of graphs of two calls, and the output."""
    counter = CompileCounterWithBackend("aot_eager")
    if how == "whole":
        call: Any = torch.compile(model, fullgraph=True, backend=counter)
    else:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        call = model
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(**inputs())
        out = call(**inputs())[0]
    return counter.frame_count, out


@pytest.mark.parametrize("how", ["whole", "repeated blocks"])
def test_as_many_graphs_as_stock(how: str) -> None:
    stock, _ = graphs(tiny_wan.transformer(), how)
    torch._dynamo.reset()
    eager = tiny_wan.transformer()
    diffattn.set_attn_processor(eager, SPARSE)
    with torch.no_grad():
        want = eager(**inputs())[0]
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, SPARSE)
    count, out = graphs(model, how)
    assert count == stock
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


def test_compiled_attention_trains() -> None:
    grid = TokenGrid(5, 3, 4)
    generator = torch.Generator().manual_seed(0)
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=4)
    serial = remember(method)
    leaves = [torch.randn(2, grid.tokens, 3, 8, generator=generator) for _ in range(3)]
    weight = torch.randn(2, grid.tokens, 3, 8, generator=generator)
    key_mask = torch.rand(2, grid.tokens, generator=generator) < 0.8
    layout = method.layout(grid, torch.device("cpu"))

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, layout, key_mask=key_mask)

    def traced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return traced_attention(q, k, v, grid, serial, key_mask=key_mask)

    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    results = []
    for function in (eager, traced, compiled):
        copies = [x.clone().requires_grad_() for x in leaves]
        out = function(*copies)
        (out * weight).sum().backward()
        results.append([out, *(x.grad for x in copies)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_operator_is_a_good_citizen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=16)
    q, k, v = (torch.randn(1, 24, 2, 8, requires_grad=True, device=device) for _ in range(3))
    torch.library.opcheck(
        torch.ops.diffattn.static_mask_attention.default,
        (q, k, v, None, [3, 2, 4, 0, 0], remember(method), 0.35, backend),
    )


def test_the_other_operators_are_good_citizens_too() -> None:
    """Gradients of attention under a mask, and attention by any method with its gradients."""
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=16)
    size, serial = [3, 2, 4, 0, 0], remember(method)
    q, k, v, out, grad = (torch.randn(1, 24, 2, 8) for _ in range(5))
    key_mask = torch.arange(24)[None] < 20
    operators = torch.ops.diffattn
    torch.library.opcheck(
        operators.static_mask_attention_backward.default,
        (grad, q, k, v, out, torch.randn(1, 2, 24), key_mask, size, serial, 0.35, "cpu"),
    )
    source = Whole()  # found for as long as it lives
    whole = remember(source)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        operators.method_attention.default, (*leaves, key_mask, size, whole, None)
    )
    torch.library.opcheck(
        operators.method_attention_backward.default, (grad, q, k, v, key_mask, size, whole, None)
    )


class Whole:
    """Attends to every token of a grid."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: TokenGrid,
        *,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return attention(query, key, value, FullMask(grid), scale=scale, key_mask=key_mask)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_gradients_come_from_the_backend_of_the_output(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the device's own kernel was used")

    monkeypatch.setattr(cpu_kernel, "block_sparse_attention", wrong)
    monkeypatch.setattr(cpu_kernel, "block_sparse_attention_gradients", wrong)
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    grid = TokenGrid(3, 4, 4)
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=16)
    serial = remember(method)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, grid.tokens, 2, 8, generator=generator) for _ in range(3)]
    leaves = [x.to(device).requires_grad_() for x in leaves]
    compiled = torch.compile(
        lambda q, k, v: traced_attention(q, k, v, grid, serial),
        fullgraph=True,
        backend="aot_eager",
    )
    out = compiled(*leaves)
    # Compiled code keeps to its backend, so that gradients are those of the output.
    monkeypatch.delenv(BACKEND_VARIABLE)
    weight = torch.randn(out.shape, generator=generator).to(device)
    found = torch.autograd.grad(out, leaves, weight)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want, _ = reference_attention(*exact, method.mask(grid).dense(device))
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    for got, truth in zip(found, torch.autograd.grad(want, exact, weight.double()), strict=True):
        torch.testing.assert_close(got.double(), truth, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_attention_compiles_in_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    grid = TokenGrid(3, 4, 4)
    layout = RadialAttn(decay_factor=0.0, split_threshold=8).mask(grid).blocks(16, device=device)
    q, k, v = (torch.randn(1, grid.tokens, 2, 8, device=device) for _ in range(3))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, layout, backend=backend) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
