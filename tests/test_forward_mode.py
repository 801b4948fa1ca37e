"""Forward-mode derivatives through attention(), its methods, and a model: true, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_wan
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton_device import triton_device

import diffattn
from diffattn import FullMask, GNAAttn, PredicateMask, RadialAttn, TokenGrid, attention
from diffattn.attach.compiled import remember, traced_attention, traced_method
from diffattn.kernels.linear import linear_attention
from diffattn.operator import BACKEND_VARIABLE, attention_gradients
from diffattn.orders import TileOrder
from diffattn.selected.attention import dense_mask, selected_attention
from diffattn.selected.key_blocks import KeyBlocks

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Any]

GRID = TokenGrid(3, 4, 5, text_after=2)
MASK = PredicateMask(GRID, lambda q, k: ((q - k).abs() < 13) & (q % 7 != 3))
SECOND_ORDER = "attention has first derivatives only, and a second one is asked for"

backends = pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def inputs(
    dtype: torch.dtype = torch.float32, tokens: int = GRID.tokens, device: str = "cpu"
) -> tuple[Tensors, Tensors]:
    """Query, key, value and their tangents."""
    x, dx = (tuple(torch.randn(2, tokens, 2, 16, dtype=dtype).to(device) for _ in range(3))
             for _ in range(2))  # fmt: skip
    return x, dx


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The textbook lines; 0 for a query that sees nothing."""
    blind = ~mask.any(-1, keepdim=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf).masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(blind, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def double(tensors: Tensors) -> Tensors:
    return tuple(x.detach().double().cpu() for x in tensors)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double().cpu(), want, atol=1e-5, rtol=1e-5)


def by_dual_numbers(function: Function, x: Tensors, dx: Tensors) -> tuple[Any, Any]:
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(*pair) for pair in zip(x, dx, strict=True)))
        return tuple(forward_ad.unpack_dual(out))


how = pytest.mark.parametrize("jvp", [torch.func.jvp, by_dual_numbers], ids=["func", "dual"])


@backends
@how
def test_attention_has_its_true_tangent(
    jvp: Function, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    layout = MASK.blocks(16).to(device)
    key_mask = torch.rand(2, GRID.tokens) < 0.7
    x, dx = inputs(device=device)
    out, tangent = jvp(
        lambda *x: attention(*x, layout, key_mask=key_mask.to(device), backend=backend), x, dx
    )
    mask = MASK.dense() & key_mask[:, None, None]
    want = torch.func.jvp(lambda *x: softmax_attention(*x, mask), double(x), double(dx))
    close(out, want[0])
    close(tangent, want[1])


@backends
@how
def test_training_by_mean_flow(
    jvp: Function, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss goes backward through the output, with the detached tangent in its target."""
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    layout = MASK.blocks(16).to(device)
    x, dx = inputs(device=device)
    weight = (torch.randn(3, 16, 16) / 4).to(device).requires_grad_()

    def loss(function: Function, weight: torch.Tensor, x: Tensors, dx: Tensors) -> torch.Tensor:
        # Weights before attention: then its inputs and their tangents require gradients.
        def model(*x: torch.Tensor) -> torch.Tensor:
            return function(*(t @ w for t, w in zip(x, weight, strict=True)))

        out, tangent = jvp(model, x, dx)
        return (out - (tangent + 1).detach()).square().mean()

    loss(lambda *x: attention(*x, layout, backend=backend), weight, x, dx).backward()
    exact = weight.detach().double().cpu().requires_grad_()
    loss(lambda *x: softmax_attention(*x, MASK.dense()), exact, double(x), double(dx)).backward()
    assert weight.grad is not None
    assert exact.grad is not None
    close(weight.grad, exact.grad)


def test_transforms_of_torch_func() -> None:
    """Gradients over tangents, and derivatives that torch.vmap collects one by one."""
    x, dx = inputs(torch.float64)
    mask = MASK.dense()
    layout = MASK.blocks(16)
    few = tuple(t[:1, :3, :1, :2] for t in x)
    dense = FullMask(TokenGrid(1, 1, 3)).blocks(16)
    everything = torch.ones(3, 3, dtype=torch.bool)

    def loss(function: Function) -> Function:
        def of_inputs(*x: torch.Tensor) -> torch.Tensor:
            out, tangent = torch.func.jvp(function, x, dx)
            return (out * tangent.detach()).sum()

        return of_inputs

    def sparse(*x: torch.Tensor) -> torch.Tensor:
        return attention(*x, layout)

    def truth(*x: torch.Tensor) -> torch.Tensor:
        return softmax_attention(*x, mask)

    def of_few(*x: torch.Tensor) -> torch.Tensor:
        return attention(*x, dense)

    def truth_of_few(*x: torch.Tensor) -> torch.Tensor:
        return softmax_attention(*x, everything)

    all_three = (0, 1, 2)
    for transformed, expected in [
        (torch.func.grad(loss(sparse), all_three)(*x), torch.func.grad(loss(truth), all_three)(*x)),
        (torch.func.linearize(sparse, *x)[1](*dx), torch.func.jvp(truth, x, dx)[1]),
        (torch.func.vjp(sparse, *x)[1](dx[0]), torch.func.vjp(truth, *x)[1](dx[0])),
        (torch.func.jacfwd(of_few)(*few), torch.func.jacrev(truth_of_few)(*few)),
        (torch.func.jacrev(of_few)(*few), torch.func.jacrev(truth_of_few)(*few)),
    ]:
        torch.testing.assert_close(transformed, expected, atol=1e-10, rtol=1e-10)


def through_the_tangent(function: Function, x: Tensors, dx: Tensors) -> None:
    leaf = x[0].clone().requires_grad_()
    _, tangent = torch.func.jvp(function, (leaf, *x[1:]), dx)
    tangent.square().sum().backward()


def within_the_level(function: Function, x: Tensors, dx: Tensors) -> None:
    leaf = x[0].clone().requires_grad_()
    with forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, (leaf, *x[1:]), dx))
        torch.autograd.grad(forward_ad.unpack_dual(out).primal.sum(), leaf)


def of_a_dual_gradient(function: Function, x: Tensors, dx: Tensors) -> None:
    leaf = x[0].clone().requires_grad_()
    out = function(leaf, *x[1:])
    with forward_ad.dual_level():
        torch.autograd.grad(out, leaf, forward_ad.make_dual(dx[0], dx[1]))


def forward_over_reverse(function: Function, x: Tensors, dx: Tensors) -> None:
    torch.func.jvp(torch.func.grad(lambda q: function(q, *x[1:]).sum()), x[:1], dx[:1])


def forward_over_forward(function: Function, x: Tensors, dx: Tensors) -> None:
    torch.func.jvp(lambda *x: torch.func.jvp(function, x, dx)[1], x, dx)


def reverse_over_forward(function: Function, x: Tensors, dx: Tensors) -> None:
    torch.func.grad(lambda *x: torch.func.jvp(function, x, dx)[1].sum())(*x)


SECOND_DERIVATIVES = [
    through_the_tangent,
    within_the_level,
    of_a_dual_gradient,
    forward_over_reverse,
    forward_over_forward,
    reverse_over_forward,
]


@pytest.mark.parametrize("derivative", SECOND_DERIVATIVES)
@pytest.mark.parametrize("what", ["block-sparse", "selected", "linear"])
def test_second_derivatives_are_refused(derivative: Function, what: str) -> None:
    x, dx = inputs()
    layout = MASK.blocks(16)
    blocks, bits = selection()
    functions: dict[str, Function] = {
        "block-sparse": lambda *x: attention(*x, layout),
        "selected": lambda *x: selected_attention(*x, blocks, bits),
        "linear": linear_attention,
    }
    with pytest.raises(NotImplementedError, match=f"{SECOND_ORDER}.*backend='reference', which"):
        derivative(functions[what], x, dx)


@pytest.mark.parametrize("derivative", SECOND_DERIVATIVES)
def test_the_reference_has_second_derivatives(derivative: Function) -> None:
    """As the message says."""
    derivative(lambda *x: attention(*x, MASK.blocks(16), backend="reference"), *inputs())


@backends
def test_gradients_outside_of_autograd_have_no_tangents(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    layout = MASK.blocks(16).to(device)
    x, dx = inputs(device=device)
    out, lse = attention(*x, layout, return_lse=True, backend=backend)

    def gradients(*x: torch.Tensor) -> torch.Tensor:
        return attention_gradients(out, *x, out, lse, layout, backend=backend)[0]

    gradients(*x)
    with pytest.raises(NotImplementedError, match=SECOND_ORDER):
        torch.func.jvp(gradients, x, dx)


def test_no_mask_is_dense_attention_in_forward_mode_too() -> None:
    (q, *_), (dq, *_) = inputs(tokens=150)
    (_, k, v), (_, dk, dv) = inputs(tokens=131)
    key_mask = torch.rand(2, 131) < 0.8
    x, dx = (q, k, v), (dq, dk, dv)
    out, tangent = torch.func.jvp(lambda *x: attention(*x, key_mask=key_mask), x, dx)
    mask = key_mask[:, None, None].expand(2, 2, 150, 131)
    want = torch.func.jvp(lambda *x: softmax_attention(*x, mask), double(x), double(dx))
    close(out, want[0])
    close(tangent, want[1])


def test_the_lse_moves_too() -> None:
    """A merge of two attentions, over some keys and over the others, is that over all of them."""
    x, dx = inputs(torch.float64)
    some = PredicateMask(GRID, lambda q, k: k % 3 == 0)
    rest = PredicateMask(GRID, lambda q, k: k % 3 != 0)

    def merged(*x: torch.Tensor) -> torch.Tensor:
        (out, lse), (more, lse_of_more) = (
            attention(*x, mask, return_lse=True) for mask in (some, rest)
        )
        share = torch.sigmoid(lse - lse_of_more).transpose(1, 2)[..., None]
        return out * share + more * (1 - share)

    mask = torch.ones(GRID.tokens, GRID.tokens, dtype=torch.bool)
    found = torch.func.jvp(merged, x, dx)
    want = torch.func.jvp(lambda *x: softmax_attention(*x, mask), x, dx)
    torch.testing.assert_close(found, want, atol=1e-10, rtol=1e-10)


@how
def test_flex_says_that_it_has_no_tangents(jvp: Function) -> None:
    message = r"backend 'flex' has no forward-mode derivatives \(torch.func.jvp.*leave the backend"
    with pytest.raises(NotImplementedError, match=message):
        jvp(lambda *x: attention(*x, MASK, backend="flex"), *inputs())


def selection(batch: int = 2, heads: int = 2) -> tuple[KeyBlocks, torch.Tensor]:
    """Ragged blocks of the grid's tokens, and bits of which some queries have none."""
    bits = torch.randint(0, 8, (batch, heads, GRID.tokens, 1), dtype=torch.int32)
    bits[:, :, 5] = 0
    return KeyBlocks.of_lengths([20, 1, 41]), bits


@backends
def test_selected_attention(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    blocks, bits = selection(1, 1)
    key_mask = torch.rand(1, GRID.tokens) < 0.7
    mask = dense_mask(blocks, bits) & key_mask[:, None, None]
    x, dx = (tuple(t[:1, :, :1] for t in some) for some in inputs(device=device))
    out, tangent = torch.func.jvp(
        lambda *x: selected_attention(
            *x, blocks, bits.to(device), key_mask=key_mask.to(device), backend=backend
        ),
        x, dx,
    )  # fmt: skip
    want = torch.func.jvp(lambda *x: softmax_attention(*x, mask), double(x), double(dx))
    close(out, want[0])
    close(tangent, want[1])


def test_tile_orders_carry_tangents_and_gradients() -> None:
    order = TileOrder(GRID, (1, 2, 5))
    (x, *_), (dx, *_) = inputs()
    _, tangent = torch.func.jvp(order.to_tiles, (x,), (dx,))
    assert torch.equal(tangent, order.to_tiles(dx))
    assert torch.equal(torch.func.grad(lambda x: (order.to_tiles(x) * dx).sum())(x),
                       order.from_tiles(dx))  # fmt: skip


METHODS = [
    RadialAttn(decay_factor=0.0, split_threshold=8, block_size=4, dense_layers=0, dense_steps=0),
    GNAAttn(window=(3, 5, 3), dense_layers=0, dense_steps=0),
]


def model_of(method: diffattn.Method) -> tuple[torch.nn.Module, Function]:
    """A tiny model and it as a function of its latents, in float64."""
    model = tiny_wan.transformer().double()
    diffattn.set_attn_processor(model, method)
    text = torch.randn(1, 5, tiny_wan.TEXT_DIM, dtype=torch.float64)
    timestep = torch.tensor([900.0])

    def call(latents: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False
        )[0]
        return out

    return model, call


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.type)
def test_a_model_has_the_tangent_that_torch_finds_for_dense_attention(
    method: diffattn.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, call = model_of(method)
    x, dx = torch.randn(2, 1, 16, 5, 12, 10, dtype=torch.float64)
    # Cross-attention is torch's own, of which the fused form has no tangents.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = torch.func.jvp(call, (x,), (dx,))
        monkeypatch.setenv(BACKEND_VARIABLE, "reference")
        want = torch.func.jvp(call, (x,), (dx,))
    assert want[1].abs().max() > 0.01
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.type)
def test_a_compiled_model_leaves_attention_out(method: diffattn.Method) -> None:
    _, call = model_of(method)
    x, dx = torch.randn(2, 1, 16, 5, 12, 10, dtype=torch.float64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        want = torch.func.jvp(call, (x,), (dx,))
        compiled = torch.compile(
            lambda x, dx: torch.func.jvp(call, (x,), (dx,)), backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x, dx), want, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("inside", [True, False], ids=["jvp-compiled", "compiled-jvp"])
def test_compiled_attention_has_its_tangent_or_says_why_not(inside: bool) -> None:
    x, dx = inputs()
    layout = MASK.blocks(16)

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return attention(*x, layout)

    def tangent(**options: Any) -> torch.Tensor:
        torch._dynamo.reset()
        if inside:
            function = torch.compile(
                lambda *x: torch.func.jvp(attend, x, dx), backend="aot_eager", **options
            )
            return function(*x)[1]
        function = torch.compile(attend, backend="aot_eager", **options)
        return by_dual_numbers(function, x, dx)[1]

    torch.testing.assert_close(tangent(), torch.func.jvp(attend, x, dx)[1])
    message = "torch.compile drops the forward-mode derivative of attention; compile without"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        tangent(fullgraph=True)


def test_compiled_code_tells_calls_with_tangents_from_others() -> None:
    x, dx = inputs()
    layout = MASK.blocks(16)
    counter = CompileCounterWithBackend("aot_eager")

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return attention(*x, layout) * 2

    compiled = torch.compile(attend, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(compiled(*x), attend(*x))
        torch.testing.assert_close(by_dual_numbers(compiled, x, dx), torch.func.jvp(attend, x, dx))


def test_operators_that_only_compiled_code_calls_refuse_tangents() -> None:
    method = METHODS[0]
    serial = remember(method)
    x, dx = inputs()
    for traced in (traced_attention, traced_method):
        message = "compiled attention has no forward-mode derivative .*without fullgraph"
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(lambda *x, f=traced: f(*x, GRID, serial), x, dx)
