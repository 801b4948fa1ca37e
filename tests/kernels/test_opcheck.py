"""torch.library.opcheck of every operator: schemas, fake results, gradients under the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_oracle import rotations
from oracles import random_layout, tensors

import diffattn.kernels.block_sparse
import diffattn.kernels.cpu
import diffattn.kernels.gather
import diffattn.kernels.gather.best_blocks
import diffattn.kernels.linear
import diffattn.kernels.summary
import diffattn.kernels.summary.joint  # noqa: F401 (each registers operators)

Arguments = tuple[Any, ...]

TOKENS_Q, TOKENS_KV, HEADS, HEAD_DIM = 35, 50, 2, 16
KINDS = ("", "_backward", "_tangent")


def qkv(dtype: torch.dtype, device: str, tokens_kv: int = TOKENS_KV) -> list[torch.Tensor]:
    return [
        torch.randn(2, tokens, HEADS, HEAD_DIM, dtype=dtype).to(device)
        for tokens in (TOKENS_Q, tokens_kv, tokens_kv)
    ]


def attention_arguments(kind: str, x: list[torch.Tensor], rest: Arguments) -> Arguments:
    """Those of an attention operator, or of its gradient's or its tangent's."""
    if not kind:
        return *(t.requires_grad_() for t in x), *rest
    out = torch.randn_like(x[0])
    wide = torch.promote_types(out.dtype, torch.float32)
    lse = torch.randn(2, HEADS, TOKENS_Q, dtype=wide, device=out.device)
    if kind == "_tangent":
        return *(torch.randn_like(t) for t in x), *x, out, lse, *rest
    return torch.randn_like(out), torch.randn_like(lse), *x, out, lse, *rest


def block_sparse(kind: str, dtype: torch.dtype, masked: bool, device: str) -> Arguments:
    layout = [x.to(device) for x in tensors(random_layout(TOKENS_Q, TOKENS_KV, 16, 32))]
    return attention_arguments(
        kind, qkv(dtype, device), (layout, key_mask(masked, device), 16, 32, 0.3)
    )


def selected(kind: str, dtype: torch.dtype, masked: bool, device: str) -> Arguments:
    starts = torch.tensor([0, 7, 8, 37, TOKENS_KV], dtype=torch.int32, device=device)
    bits = torch.randint(0, 16, (2, HEADS, TOKENS_Q, 1), dtype=torch.int32).to(device)
    return attention_arguments(
        kind, qkv(dtype, device), ([starts, bits], key_mask(masked, device), 0.3)
    )


def linear_state(
    kind: str, dtype: torch.dtype, masked: bool, device: str, backend: str
) -> Arguments:
    _, k, v = qkv(dtype, device)
    rotation = rotations(TOKENS_KV, HEAD_DIM).to(device) if masked else None
    rest = (key_mask(masked, device), rotation, 16, backend)
    if not kind:
        return k.requires_grad_(), v.requires_grad_(), *rest
    return *states(k), k, v, *rest


def linear_output(
    kind: str, dtype: torch.dtype, masked: bool, device: str, backend: str
) -> Arguments:
    q, _, _ = qkv(dtype, device)
    rotation = rotations(TOKENS_Q, HEAD_DIM).to(device) if masked else None
    moving = (q, *states(q))
    if not kind:
        return *(t.requires_grad_() for t in moving), rotation, 0.1, 16, backend
    inverse = torch.rand(q.shape[:3], dtype=moving[1].dtype, device=device)
    return torch.randn_like(q), torch.randn_like(q), inverse, *moving, rotation, 16, backend


def summary(kind: str, dtype: torch.dtype, masked: bool, device: str, backend: str) -> Arguments:
    x = qkv(dtype, device)
    bias = torch.randn(2, 1, TOKENS_KV).to(device)
    hidden = torch.randint(0, 1 << 31, (1, HEADS, 3, 2), dtype=torch.int32).to(device)
    if masked:
        bias[:, :, 3] = -torch.inf
    rest = (hidden, 16, 0.3, backend)
    if not kind:
        return *(t.requires_grad_() for t in (*x, bias)), *rest
    out = torch.randn_like(x[0])
    wide = torch.promote_types(out.dtype, torch.float32)
    lse = torch.randn(2, HEADS, TOKENS_Q, dtype=wide, device=device)
    return torch.randn_like(out), torch.randn_like(lse), out, lse, *x, bias, *rest


def joint(kind: str, dtype: torch.dtype, masked: bool, device: str) -> Arguments:
    *x, layout, mask, block_q, block_kv, scale = block_sparse("", dtype, masked, device)
    of_summary = [torch.randn(2, 9, HEADS, HEAD_DIM).to(device) for _ in range(2)]
    bias = torch.randn(2, 1, 9).to(device)
    hidden = torch.randint(0, 512, (1, HEADS, 3, 1), dtype=torch.int32).to(device)
    moving = [t.detach() for t in (*x, *of_summary, bias)]
    rest = (hidden, layout, mask, block_q, block_kv, scale)
    if not kind:
        return *(t.requires_grad_() for t in moving), *rest
    out = torch.randn_like(moving[0])
    lse = torch.randn(2, HEADS, TOKENS_Q, device=device)
    return torch.randn_like(out), torch.randn_like(lse), out, lse, *moving, *rest


def of_blocks(kind: str, dtype: torch.dtype, masked: bool, device: str) -> Arguments:
    starts = torch.tensor([0, 7, 8, 37, TOKENS_Q + 5], dtype=torch.int32, device=device)
    counted = (torch.rand(2, TOKENS_Q + 5) < 0.7).to(device) if masked else None
    keys = torch.randn(2, TOKENS_Q + 5, HEADS, HEAD_DIM, dtype=dtype).to(device)
    return keys, starts, counted, 1, 3


def best(kind: str, dtype: torch.dtype, masked: bool, device: str) -> Arguments:
    query = torch.randn(2, TOKENS_Q, HEADS, HEAD_DIM, dtype=dtype).to(device)
    means = torch.randn(2, 5, HEADS, HEAD_DIM).to(device)
    own = (torch.arange(TOKENS_Q) // 7).to(device)
    counted = (torch.rand(2, TOKENS_Q) < 0.7).to(device) if masked else None
    holds = torch.ones(2, 5, dtype=torch.bool, device=device) if masked else None
    return query, means, own, counted, holds, 0, 5, False, 2, None


def states(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A state `(batch, heads, head_dim, head_dim)` and a mean `(batch, heads, head_dim)`."""
    packed = torch.rand(
        2, HEADS, HEAD_DIM, HEAD_DIM + 1, device=x.device,
        dtype=torch.promote_types(x.dtype, torch.float32),
    )  # fmt: skip
    return packed[..., :-1].contiguous(), packed[..., -1].contiguous()


def turned(x: Any) -> Any:
    """The same tensor with other strides, if it is one of floating-point numbers."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    moved = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    return moved.requires_grad_(x.requires_grad)


def key_mask(masked: bool, device: str) -> torch.Tensor | None:
    return (torch.rand(2, TOKENS_KV) < 0.7).to(device) if masked else None


CASES: dict[str, tuple[str, Callable[..., Arguments], Arguments]] = {
    **{f"block_sparse_cpu{kind}": (kind, block_sparse, ()) for kind in KINDS},
    **{f"block_sparse_triton{kind}": (kind, block_sparse, ()) for kind in KINDS},
    **{f"selected_cpu{kind}": (kind, selected, ()) for kind in KINDS},
    **{f"selected_triton{kind}": (kind, selected, ()) for kind in KINDS[:2]},
    **{f"linear_state{kind}": (kind, linear_state, ("torch",)) for kind in KINDS[:2]},
    **{f"linear_output{kind}": (kind, linear_output, ("torch",)) for kind in KINDS[:2]},
    **{f"summary{kind}": (kind, summary, ("torch",)) for kind in KINDS[:2]},
    **{f"joint_triton{kind}": (kind, joint, ()) for kind in KINDS[:2]},
    "block_means": ("", of_blocks, ()),
    "best_blocks": ("", best, ()),
}
ON_DEVICE = [name for name in CASES if "triton" in name or name.endswith(("_means", "_blocks"))]
LINEAR = [name for name in CASES if name.startswith("linear")]


def opcheck(name: str, arguments: Arguments) -> None:
    torch.library.opcheck(getattr(torch.ops.diffattn, name).default, arguments)


def test_no_operator_is_left_out() -> None:
    """Those of `diffattn.attach.compiled` are checked in tests/test_compile.py."""
    registered = {
        name.removeprefix("diffattn::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("diffattn::")
    }
    traced = {
        name for name in registered if name.startswith(("static_mask", "method", "move_tokens"))
    }
    assert registered - traced == set(CASES)


@pytest.mark.parametrize(
    ("dtype", "masked"),
    [
        pytest.param(torch.float32, False, id="float32"),
        pytest.param(torch.bfloat16, True, id="bfloat16-key-mask"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, dtype: torch.dtype, masked: bool, device: str) -> None:
    kind, arguments, options = CASES[name]
    on = device if name in ON_DEVICE else "cpu"
    opcheck(name, arguments(kind, dtype, masked, on, *options))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ON_DEVICE])
def test_opcheck_with_other_strides(name: str) -> None:
    kind, arguments, options = CASES[name]
    of_contiguous = arguments(kind, torch.float32, True, "cpu", *options)
    opcheck(name, tuple(turned(x) for x in of_contiguous))


@pytest.mark.parametrize("name", LINEAR)
def test_opcheck_of_the_linear_kernels(name: str, device: str) -> None:
    kind, arguments, _ = CASES[name]
    opcheck(name, arguments(kind, torch.float32, True, device, "triton"))


@pytest.mark.parametrize("name", [name for name in CASES if "cpu" in name])
def test_opcheck_in_float64(name: str) -> None:
    kind, arguments, options = CASES[name]
    opcheck(name, arguments(kind, torch.float64, True, "cpu", *options))


@pytest.mark.parametrize("name", ["block_sparse_cpu_backward", "selected_cpu_backward"])
def test_opcheck_without_the_gradient_of_the_lse(name: str) -> None:
    kind, arguments, _ = CASES[name]
    grad_out, _, *rest = arguments(kind, torch.float32, False, "cpu")
    opcheck(name, (grad_out, None, *rest))
