"""Bidirectional linear attention: a pass over the keys, one over the queries, a state between.

With the features f(x) = elu(x) + 1, which are positive, and M keys that count:

    state    S = 1/M sum_j R_j f(k_j) v_j^T        m = 1/M sum_j f(k_j)
    output   o_i = S^T R_i f(q_i) / (f(q_i) . m + eps)

R is the rotary position embedding, if there is one. It turns features after they were made, and in
the numerator alone: rotated ones are not positive, and their sum may be 0. The size of the state,
head_dim x (head_dim + 1) per head, does not depend on the number of tokens.

Features, state and quotient are float32 for 16-bit inputs: in float16 the denominator overflows
for features of 32 already, and elu(x) + 1 is 0 for x < -8.3.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist

from .checks import check_inputs

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

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)` of one dtype, any strides; the key length may
            differ from the query length.
        eps: added to the denominator, beside the *mean* of the features of the keys.
        key_mask: bool `(batch, tokens_kv)`, false for keys that do not count.
        rotation: float32 `(2, tokens, head_dim / 2)`, cosines and sines by which the neighbouring
            channels of q *and* k were rotated. The rotation is taken back before features are made.
        group: a process group of torch.distributed over which the keys are spread, in parts of any
            sizes: the output for the queries of this process is that of all keys. What is sent is
            the state.
        chunk: tokens whose features are in memory at a time, with the backend "torch".
        backend: "torch" is matrix products, on every device; "triton" a kernel for GPUs.

    Returns:
        Like q; 0 where no key counts.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_supported(q, k, rotation, key_mask, chunk, backend)
    state, total = _state_op(k, v, key_mask, rotation, chunk, backend)
    count = _count(k, key_mask)
    if group is not None:
        packed = _SumOverProcesses.apply(torch.cat([state, total[..., None]], -1), group)
        state, total = packed[..., :-1], packed[..., -1]
        dist.all_reduce(count, group=group)
    count = count.clamp(min=1).to(state.dtype)[:, None, None]
    out, _ = _output_op(q, state / count[..., None], total / count, rotation, eps, chunk, backend)
    return out


def _count(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """How many keys count, `(batch,)`."""
    if key_mask is not None:
        return key_mask.sum(1)
    return torch.full((k.shape[0],), k.shape[1], device=k.device)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of what each process has. Each one's loss depends on it: so does each gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        out = grads[0].contiguous().clone()
        dist.all_reduce(out, group=ctx.group)
        return out, None


@torch.library.custom_op("diffattn::linear_state", mutates_args=())
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


@_state_op.register_fake
def _(k: torch.Tensor, *rest: torch.Tensor | int | str | None) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, dim = k.shape
    dtype = _wide(k.dtype)
    return k.new_empty(batch, heads, dim, dim, dtype=dtype), k.new_empty(
        batch, heads, dim, dtype=dtype
    )


@torch.library.custom_op("diffattn::linear_state_backward", mutates_args=())
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


@_state_backward_op.register_fake
def _(
    d_state: torch.Tensor,
    d_total: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: torch.Tensor | int | str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("diffattn::linear_output", mutates_args=())
def _output_op(
    q: torch.Tensor,
    state: torch.Tensor,
    mean: torch.Tensor,
    rotation: torch.Tensor | None,
    eps: float,
    chunk: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a state's queries, and one over the denominator, `(batch, tokens, heads)`."""
    state, mean = state.contiguous(), mean.contiguous()
    out, inverse = _passes(backend, chunk).apply(q, state, mean, eps, rotation, None)
    assert inverse is not None
    return out, inverse


@_output_op.register_fake
def _(
    q: torch.Tensor, *rest: torch.Tensor | int | float | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


@torch.library.custom_op("diffattn::linear_output_backward", mutates_args=())
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


@_output_backward_op.register_fake
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
    ctx.save_for_backward(*tensors)
    ctx.options = chunk, backend


def _state_autograd(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dk, dv = _state_backward_op(*grads, *ctx.saved_tensors, *ctx.options)
    return dk, dv, None, None, None, None


def _setup_output(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, state, mean, rotation, _, chunk, backend = inputs
    ctx.save_for_backward(*output, q, state, mean, rotation)
    ctx.options = chunk, backend


def _output_autograd(
    ctx: Any, grad_out: torch.Tensor, grad_inverse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    # The denominator is not handed out: nothing depends on it.
    grads = _output_backward_op(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None)


_state_op.register_autograd(_state_autograd, setup_context=_setup_state)
_output_op.register_autograd(_output_autograd, setup_context=_setup_output)


class TorchPasses:
    """The passes over tokens in matrix products, a chunk of tokens at a time.

    `x` are the queries or keys that features F = f(x) are made of, `y` what they are multiplied
    with; all are `(batch, tokens, heads, head_dim)`, and y may have a factor per token, x another,
    `(batch, tokens, heads)`. Tokens that `mask` leaves out are as if they were not there.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def collect(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        rotation: torch.Tensor | None,
        mask: torch.Tensor | None,
        y_factor: torch.Tensor | None = None,
        x_factor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums over tokens of R F (y_factor y)^T and of x_factor F."""
        batch, _, heads, dim = x.shape
        dtype = _wide(x.dtype)
        state = x.new_zeros(batch, heads, dim, dim, dtype=dtype)
        total = x.new_zeros(batch, heads, dim, dtype=dtype)
        for part in self._parts(x):
            features = _features(_unrotated(x[:, part], rotation, part))
            right = y[:, part].to(dtype)
            if y_factor is not None:
                right = right * y_factor[:, part, :, None]
            if mask is not None:
                hidden = ~mask[:, part, None, None]
                features, right = features.masked_fill(hidden, 0), right.masked_fill(hidden, 0)
            weighted = features if x_factor is None else features * x_factor[:, part, :, None]
            total += weighted.sum(1)
            rotated = _rotated(features, rotation, part)
            state += torch.einsum("bthd,bthe->bhde", rotated, right)
        return state, total

    def apply(
        self,
        x: torch.Tensor,
        state: torch.Tensor,
        mean: torch.Tensor | None,
        eps: float,
        rotation: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """R F times the state, in the dtype of x, divided by F . mean + eps where there is a mean.

        Returns:
            The product, and one over the denominator, `(batch, tokens, heads)`.
        """
        out = x.new_empty(x.shape)
        inverse = None if mean is None else x.new_empty(x.shape[:3], dtype=state.dtype)
        for part in self._parts(x):
            features = _features(_unrotated(x[:, part], rotation, part))
            if mask is not None:
                features = features.masked_fill(~mask[:, part, None, None], 0)
            rotated = _rotated(features, rotation, part)
            product = torch.einsum("bthd,bhde->bthe", rotated, state)
            if mean is not None and inverse is not None:
                denominator = torch.einsum("bthd,bhd->bth", features, mean) + eps
                inverse[:, part] = 1 / denominator
                product = product / denominator[..., None]
            out[:, part] = product
        return out, inverse

    def pull_back(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        state: torch.Tensor,
        mean: torch.Tensor,
        rotation: torch.Tensor | None,
        mask: torch.Tensor | None,
        y_factor: torch.Tensor | None = None,
        x_factor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of x where R F has state (y_factor y), and F besides x_factor mean."""
        out = x.new_empty(x.shape)
        for part in self._parts(x):
            plain = _unrotated(x[:, part], rotation, part)
            right = y[:, part].to(state.dtype)
            if y_factor is not None:
                right = right * y_factor[:, part, :, None]
            grad = torch.einsum("bhde,bthe->bthd", state, right)
            direct = mean[:, None]
            if x_factor is not None:
                direct = direct * x_factor[:, part, :, None]
            grad = (_unrotated(grad, rotation, part) + direct) * _slope(plain)
            grad = _rotated(grad, rotation, part)
            if mask is not None:
                grad = grad.masked_fill(~mask[:, part, None, None], 0)
            out[:, part] = grad
        return out

    def denominator_gradient(
        self, grad_out: torch.Tensor, out: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        """That of the denominator, `(batch, tokens, heads)`."""
        gradient = torch.empty_like(inverse)
        for part in self._parts(out):
            wide = out[:, part].to(inverse.dtype)
            gradient[:, part] = -(grad_out[:, part] * wide).sum(-1) * inverse[:, part]
        return gradient

    def _parts(self, x: torch.Tensor) -> Iterator[slice]:
        for start in range(0, x.shape[1], self.chunk):
            yield slice(start, min(start + self.chunk, x.shape[1]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of features and state."""
    return torch.promote_types(dtype, torch.float32)


def _features(x: torch.Tensor) -> torch.Tensor:
    # elu(x) + 1 would round what is left of exp(x) - 1 for very negative x. Of the two terms one
    # is 0 or 1; `where` takes longer than both.
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


def _slope(x: torch.Tensor) -> torch.Tensor:
    """The derivative of `_features`."""
    return x.clamp(max=0).exp()


def _rotated(x: torch.Tensor, rotation: torch.Tensor | None, part: slice) -> torch.Tensor:
    """Some tokens of a sequence, rotated; `x` is wide."""
    if rotation is None:
        return x
    cos, sin = rotation[:, part, None].to(x.dtype)
    return _turn(x, cos, sin)


def _unrotated(x: torch.Tensor, rotation: torch.Tensor | None, part: slice) -> torch.Tensor:
    """The inverse of `_rotated`, and wide."""
    x = x.to(_wide(x.dtype))
    if rotation is None:
        return x
    cos, sin = rotation[:, part, None].to(x.dtype)
    return _turn(x, cos, -sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _passes(backend: str, chunk: int) -> Any:
    return _triton_passes() if backend == "triton" else TorchPasses(chunk)


@functools.cache
def _triton_passes() -> Any:
    # Imported late: there are platforms without Triton.
    from . import linear_triton

    return linear_triton


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
