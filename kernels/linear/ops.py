"""Bidirectional linear attention: a pass over the keys, one over the queries, a state between.

With the features f(x) = elu(x) + 1, which are positive, and M keys that count:

    state    S = 1/M sum_j R_j f(k_j) v_j^T        m = 1/M sum_j f(k_j)
    output   o_i = S^T R_i f(q_i) / (f(q_i) . m + eps)

R is the rotary position embedding, if there is one. R turns finished features, and only in the
numerator: rotated features may be negative, and their sum may be 0. The size of the state,
head_dim x (head_dim + 1) per head, does not depend on the number of tokens.

Features, state and quotient are float32 for 16-bit inputs: in float16 the denominator overflows
already for features of 32, and elu(x) + 1 is 0 for x < -8.3.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..autocast import cast_as_sdpa
from ..checks import check_inputs, check_tensors
from ..dispatch import operator
from ..transforms import first_order, materialized, save, transformable
from .torch_passes import TorchPasses, wide

# Tokens whose features are in memory at a time, where no kernel keeps them in registers.
CHUNK = 4096

Backend = Literal["torch", "triton"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    eps: float = 1e-4,
    key_mask: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
    group: Any = None,
    chunk: int = CHUNK,
    backend: Backend = "torch",
) -> torch.Tensor:
    """Linear attention, without the projections around it; differentiable in q, k and v.

    In an autocast region q, k and v are cast to the region's dtype, as torch does for attention.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)` of one dtype, any strides; the key length may
            differ from the query length.
        eps: added to the denominator, which is computed with the *mean* of the keys' features.
        key_mask: bool `(batch, tokens_kv)`, false for keys that do not count.
        rotation: float32 `(2, tokens, head_dim / 2)`, cosines and sines by which the neighbouring
            channels of q *and* k were rotated. The rotation is undone before features are computed.
        group: a process group of torch.distributed over which the keys are spread, in parts of any
            sizes. The queries of this process then attend to the keys of all processes. Processes
            exchange only the state.
        chunk: tokens whose features are in memory at a time, with the backend "torch".
        backend: "torch" for matrix products on every device, "triton" for kernels on GPUs.

    Returns:
        Like q; 0 where no key counts.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    check_tensors(q=q, k=k, v=v)
    q, k, v = cast_as_sdpa(q, k, v)
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_supported(q, k, rotation, key_mask, chunk, backend)
    state, total = _state(k, v, key_mask, rotation, chunk, backend)
    count = _count(k, key_mask)
    if group is not None:
        packed = _SumOverProcesses.apply(torch.cat([state, total[..., None]], -1), group)
        state, total = packed[..., :-1], packed[..., -1]
        dist.all_reduce(count, group=group)
    count = count.clamp(min=1).to(state.dtype)[:, None, None]
    state, mean = state / count[..., None], total / count
    out, _ = _output(q, state, mean, rotation, float(eps), chunk, backend)
    return out


def _count(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """How many keys count, `(batch,)`."""
    if key_mask is not None:
        return key_mask.sum(1)
    return torch.full((k.shape[0],), k.shape[1], device=k.device)


class _SumOverProcesses(torch.autograd.Function):
    """A sum over processes. The loss of every process depends on it: its gradient is a sum too."""

    @staticmethod
    def forward(x: torch.Tensor, group: Any) -> torch.Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _SumOverProcesses.apply(grads[0], ctx.group), None

    @staticmethod
    def jvp(ctx: Any, *of_arguments: torch.Tensor) -> Any:
        return _SumOverProcesses.apply(of_arguments[0], ctx.group)


@operator("linear_state")
def _state_op(
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rotation: torch.Tensor | None,
    chunk: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over keys of f(k) v^T and of f(k)."""
    return _passes(backend, chunk).collect(k, v, rotation, key_mask)


@_state_op.registered.register_fake
def _(k: torch.Tensor, *rest: torch.Tensor | int | str | None) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, dim = k.shape
    dtype = wide(k.dtype)
    return k.new_empty(batch, heads, dim, dim, dtype=dtype), k.new_empty(
        batch, heads, dim, dtype=dtype
    )


@operator("linear_state_backward")
def _state_backward_op(
    d_state: torch.Tensor,
    d_total: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rotation: torch.Tensor | None,
    chunk: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    passes = _passes(backend, chunk)
    d_state, d_total = d_state.contiguous(), d_total.contiguous()
    dk = passes.pull_back(k, v, d_state, d_total, rotation, key_mask)
    dv, _ = passes.apply(k, d_state, None, 0.0, rotation, key_mask)
    return dk, dv


@_state_backward_op.registered.register_fake
def _(
    d_state: torch.Tensor,
    d_total: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: torch.Tensor | int | str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@operator("linear_output")
def _output_op(
    q: torch.Tensor,
    state: torch.Tensor,
    mean: torch.Tensor,
    rotation: torch.Tensor | None,
    eps: float,
    chunk: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output for q by a state, and one over the denominator, `(batch, tokens, heads)`."""
    state, mean = state.contiguous(), mean.contiguous()
    out, inverse = _passes(backend, chunk).apply(q, state, mean, eps, rotation, None)
    assert inverse is not None
    return out, inverse


@_output_op.registered.register_fake
def _(
    q: torch.Tensor, *rest: torch.Tensor | int | float | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@operator("linear_output_backward")
def _output_backward_op(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    inverse: torch.Tensor,
    q: torch.Tensor,
    state: torch.Tensor,
    mean: torch.Tensor,
    rotation: torch.Tensor | None,
    chunk: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    passes = _passes(backend, chunk)
    state, mean = state.contiguous(), mean.contiguous()
    of_denominator = passes.denominator_gradient(grad_out, out, inverse)
    dq = passes.pull_back(q, grad_out, state, mean, rotation, None, inverse, of_denominator)
    d_state, d_mean = passes.collect(q, grad_out, rotation, None, inverse, of_denominator)
    return dq, d_state, d_mean


@_output_backward_op.registered.register_fake
def _(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    inverse: torch.Tensor,
    q: torch.Tensor,
    state: torch.Tensor,
    mean: torch.Tensor,
    *rest: torch.Tensor | int | str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), state.new_empty(state.shape), mean.new_empty(mean.shape)


def _setup_state(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, chunk, backend = inputs
    save(ctx, *tensors)
    ctx.options = chunk, backend


def _state_autograd(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dk, dv = first_order(_state_backward_op, *grads, *ctx.saved_tensors, *ctx.options)
    return dk, dv, None, None, None, None


def _state_tangents(ctx: Any, *of_arguments: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    k, v, key_mask, rotation = ctx.saved_tensors
    moved = materialized(of_arguments, k, v)
    # Tangents are computed in matrix products, whatever the backend.
    passes = TorchPasses(ctx.options[0])
    found: tuple[torch.Tensor, ...] = first_order(
        passes.collect_tangent, k, v, *moved, rotation, key_mask
    )
    return found


def _setup_output(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, state, mean, rotation, _, chunk, backend = inputs
    save(ctx, *output, q, state, mean, rotation)
    ctx.options = chunk, backend


def _output_autograd(
    ctx: Any, grad_out: torch.Tensor, grad_inverse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    # Callers do not get `inverse`: its gradient is 0.
    grads = first_order(_output_backward_op, grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None)


def _output_tangents(ctx: Any, *of_arguments: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    out, inverse, q, state, mean, rotation = ctx.saved_tensors
    moved = materialized(of_arguments, q, state, mean)
    passes = TorchPasses(ctx.options[0])
    found: tuple[torch.Tensor, ...] = first_order(
        passes.apply_tangent, q, state, mean, out, inverse, *moved, rotation
    )
    return found


_state = transformable(_state_op, _setup_state, _state_autograd, _state_tangents)
_output = transformable(_output_op, _setup_output, _output_autograd, _output_tangents)


def _passes(backend: str, chunk: int) -> Any:
    return _triton_passes() if backend == "triton" else TorchPasses(chunk)


@functools.cache
def _triton_passes() -> Any:
    # Imported late: there are platforms without Triton.
    from . import triton_passes

    return triton_passes


def _check_supported(
    q: torch.Tensor,
    k: torch.Tensor,
    rotation: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    chunk: int,
    backend: str,
) -> None:
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend must be 'torch' or 'triton'; got {backend!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token; got {chunk}")
    for name, x in (("k", k), ("rotation", rotation), ("key_mask", key_mask)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q on {q.device}")
    if rotation is not None:
        if k.shape[1] != q.shape[1] or q.shape[3] % 2:
            raise ValueError(
                "a rotation is for queries and keys of the same tokens with an even head_dim; got"
                f" {q.shape[1]} queries, {k.shape[1]} keys, head_dim {q.shape[3]}"
            )
        expected = (2, q.shape[1], q.shape[3] // 2)
        if tuple(rotation.shape) != expected or rotation.dtype != torch.float32:
            raise ValueError(
                f"rotation must be torch.float32 {expected};"
                f" got {rotation.dtype} {tuple(rotation.shape)}"
            )
    if backend == "triton":
        _triton_passes().check_supported(q)
