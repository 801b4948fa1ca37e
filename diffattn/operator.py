"""attention(): softmax attention under a mask, differentiable, by the backend of the device."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, overload

import torch
import torch.nn.functional as F

from diffattn.blocks import FULL, BlockLayout, layout_from_states
from diffattn.counting import watching
from diffattn.flex_backend import flex_forward
from diffattn.interception import through_modes
from diffattn.kernels.autocast import autocast_off, cast_as_sdpa
from diffattn.kernels.cpu import block_sparse as cpu_kernel
from diffattn.kernels.reference import reference_attention
from diffattn.kernels.transforms import first_order, is_forward_mode
from diffattn.masks.base import BLOCK, AttentionMask
from diffattn.orders import TileOrder

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "DIFFATTN_BACKEND"

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Forward = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        BlockLayout,
        float | None,
        torch.Tensor | None,
        bool,
    ],
    tuple[torch.Tensor, torch.Tensor | None],
]


BackendGradients = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        BlockLayout,
        float | None,
        torch.Tensor | None,
    ],
    Gradients,
]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over a layout.

    Attributes:
        forward: (query, key, value, layout, scale, key_mask, return_lse) -> (output, log-sum-exp),
            differentiable; the log-sum-exp may be None without `return_lse`.
        gradients: (grad_out, query, key, value, out, lse, layout, scale, key_mask) -> gradients
            with respect to query, key and value.
    """

    forward: Forward
    gradients: BackendGradients


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask | BlockLayout | None = None,
    *,
    order: TileOrder | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask | BlockLayout | None = None,
    *,
    order: TileOrder | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask | BlockLayout | None = None,
    *,
    order: TileOrder | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the token pairs of a mask, computing only the blocks it visits.

    In an autocast region query, key and value are cast to the region's dtype, as torch does for
    `scaled_dot_product_attention`. Function modes that change that function change this one, too.

    The output is differentiable once in query, key and value: in reverse mode, and in forward mode
    by `torch.func.jvp` or `torch.autograd.forward_ad`, as training by sCM or MeanFlow needs it. The
    tangent is not differentiable. Only `mask` and `key_mask` hide keys. A query that sees no key
    gives 0 and a log-sum-exp of -inf.

    Args:
        query, key, value: (batch, tokens, heads, head_dim), any strides, of one dtype and device.
        mask: an `AttentionMask` (computed in blocks of 128), or a `BlockLayout` built with another
            block size; None is dense attention.
        order: the order in which the tokens are cut into blocks; a `BlockLayout` must have been
            built in this order. A tiled order visits fewer blocks of a local mask. All tensors,
            results included, are in the sequence's own order. Dense attention ignores the order.
        key_mask: bool (batch, tokens): False hides a key from every query, as padding does.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        return_lse: also return the natural log-sum-exp of the scores, (batch, heads, tokens), in
            float32, or float64 for float64 tensors. Two attentions over disjoint keys can be merged
            by their log-sum-exp.
        backend: name of the backend. None takes the environment variable DIFFATTN_BACKEND, or else
            the backend of the tensors' device: "triton" on CUDA, ROCm and XPU, "cpu" on the CPU.
            "flex" is torch's compiled flex_attention (on the CPU without gradients and
            log-sum-exp), "reference" is dense float64; both are for checks. `register_backend` adds
            other backends.

    Returns:
        (batch, tokens, heads, head_dim) in the dtype of `query`, or of the autocast region; with
        `return_lse` also the log-sum-exp.

    Raises:
        TypeError: if query, key, value or key_mask is no tensor, or order is no `TileOrder`.
        ValueError: if shapes, dtypes or devices do not fit together or the mask, or the backend is
            unknown.
        NotImplementedError: if the tensors' device has no sparse kernel, or the backend cannot
            compute the call; and in a second derivative.
        ImportError: if the backend is "triton" and Triton cannot be imported.
    """
    _check_types(query, key, value, key_mask, order)
    query, key, value = cast_as_sdpa(query, key, value)
    check_inputs(query, key, value, key_mask)
    count = watching()
    if mask is None and not return_lse:
        asked_backend(backend)  # an unknown backend is an error, though dense attention needs none
        if not is_forward_mode():
            if count is not None:
                count.add_layout(query, key, None)
            return _dense_attention(query, key, value, key_mask, scale)
        # Torch's fused attention has no tangents.
        mask = every_pair(query.shape[1], key.shape[1], query.device)
    chosen = BACKENDS[choose_backend(query.device, backend)]
    layout = layout_of(mask, query, key, order)
    if count is not None:
        count.add_layout(query, key, layout)
    key_mask = order.to_tiles(key_mask) if order is not None and key_mask is not None else key_mask

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if order is not None:
            query, key, value = (order.to_tiles(x) for x in (query, key, value))
        with autocast_off(query.device.type):
            out, lse = chosen.forward(query, key, value, layout, scale, key_mask, return_lse)
        if order is not None:
            out = order.from_tiles(out)
            lse = None if lse is None else order.from_tiles(lse, 2)
        return out, lse

    if not return_lse:
        return through_modes(lambda q, k, v: attend(q, k, v)[0], query, key, value)
    out, lse = attend(query, key, value)
    assert lse is not None
    return out, lse


def attention_gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: BlockLayout,
    *,
    order: TileOrder | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> Gradients:
    """Gradients of `attention` with respect to query, key and value, for callers without autograd.

    Args:
        grad_out: gradient of the output, (batch, tokens, heads, head_dim).
        query, key, value, layout, order, scale, key_mask, backend: arguments of the forward call.
        out, lse: results of the forward call.

    Returns:
        Gradients in the shapes of query, key and value.

    Raises:
        ValueError: if the backend is unknown.
        NotImplementedError: if the tensors' device has no sparse kernel.
    """
    chosen = BACKENDS[choose_backend(query.device, backend)]
    if order is not None:
        tensors = (order.to_tiles(x) for x in (grad_out, query, key, value, out))
        grad_out, query, key, value, out = tensors
        lse = order.to_tiles(lse, 2)
        key_mask = None if key_mask is None else order.to_tiles(key_mask)
    grads: Gradients = first_order(
        chosen.gradients, grad_out, query, key, value, out, lse, layout, scale, key_mask
    )
    if order is not None:
        dq, dk, dv = (order.from_tiles(grad) for grad in grads)
        return dq, dk, dv
    return grads


def register_backend(
    name: str, forward: Forward, gradients: BackendGradients | None = None
) -> None:
    """Add a backend that `attention(backend=name)` and the variable DIFFATTN_BACKEND can choose.

    The backend computes attention under a mask: `attention`, and attached and compiled models under
    every method that is a mask. Attention over selected blocks (VMoBA) and linear attention
    (LinFusion) have kernels of their own, and refuse the backend with NotImplementedError.
    Registering the same functions again does nothing.

    Args:
        name: name of the backend.
        forward: `(query, key, value, layout, scale, key_mask, return_lse) -> (output, lse)`.
            Tensors are (batch, tokens, heads, head_dim), of any strides; `layout` is the
            `BlockLayout` of the mask, on the same device; `scale` None is 1 / sqrt(head_dim);
            `key_mask` is bool (batch, tokens), False for hidden keys, or None. The output is
            contiguous and of the dtype of `query`. The natural log-sum-exp is (batch, heads,
            tokens) in float32, or float64 for float64 tensors, and may be None unless `return_lse`.
            A query that sees no key gives 0 and -inf. The function is differentiable by autograd.
        gradients: `(grad_out, query, key, value, out, lse, layout, scale, key_mask)` -> gradients
            with respect to query, key and value. Compiled models call this function, with autograd
            switched off. When None, the gradients come from autograd over another `forward`.

    Raises:
        ValueError: if the name is empty or taken.
        TypeError: if a function cannot be called.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the backend's name is {name!r}, but must be text")
    functions = {"forward": forward} | ({} if gradients is None else {"gradients": gradients})
    for what, function in functions.items():
        if not callable(function):
            raise TypeError(f"{what} of backend {name!r} is {function!r}, but must be a function")
    made = _by_autograd(forward) if gradients is None else Backend(forward, gradients)
    if BACKENDS.setdefault(name, made) != made:
        raise ValueError(
            f"backend {name!r} cannot be registered: the name is taken; choose another one than"
            f" {', '.join(BACKENDS)}"
        )


def asked_backend(backend: str | None = None) -> str | None:
    """`backend`, or else the value of DIFFATTN_BACKEND; None where neither names a backend.

    Raises:
        ValueError: if the backend is unknown.
    """
    name = backend or os.environ.get(BACKEND_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    return name


def add_keys(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    scale: float | None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add keys to an attention, in the same softmax.

    Args:
        out: output of the attention, (batch, tokens, heads, head_dim).
        lse: log-sum-exp of the attention, (batch, heads, tokens).
        query: queries of the attention, (batch, tokens, heads, head_dim).
        key, value: the added keys and values, (batch, keys, heads, head_dim).
        layout: the blocks of added keys that query blocks see.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        key_mask: bool (batch, keys): False for added keys that are padding.

    Returns:
        The output over all keys, in the shape and dtype of `out`.
    """
    more, lse_of_more = attention(
        query, key, value, layout, scale=scale, key_mask=key_mask, return_lse=True
    )
    return merged(out, lse, more, lse_of_more)[0]


def merged(
    out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, lse_of_more: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two attentions of the same queries over different keys, as one over all; differentiable.

    Args:
        out, more: their outputs, (batch, tokens, heads, head_dim).
        lse, lse_of_more: their natural log-sum-exps, (batch, heads, tokens); -inf for a query that
            sees no key.

    Returns:
        The output and the log-sum-exp over all keys: 0 and -inf for a query that sees none.
    """
    # Where neither sees a key, infinities would make NaN of values and gradients.
    neither = (lse == -torch.inf) & (lse_of_more == -torch.inf)
    lse, lse_of_more = (x.masked_fill(neither, 0) for x in (lse, lse_of_more))
    share = (lse_of_more - lse).sigmoid().transpose(1, 2)[..., None]
    of_all = torch.logaddexp(lse, lse_of_more).masked_fill(neither, -torch.inf)
    return torch.lerp(out, more, share.to(out.dtype)), of_all


def backend_of(device: torch.device, backend: str | None = None) -> str | None:
    """The name of the backend for tensors on `device`; None where the device has no sparse kernel.

    Args:
        backend: overrides the choice.

    Raises:
        ValueError: if the backend is unknown.
    """
    return asked_backend(backend) or DEFAULT_BACKENDS.get(device.type)


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """The name of the backend for tensors on `device`; `backend` overrides the choice.

    Raises:
        ValueError: if the backend is unknown.
        NotImplementedError: if the device has no sparse kernel.
    """
    name = backend_of(device, backend)
    if name is None:
        raise NotImplementedError(
            f"the tensors are on {device}, and there are sparse kernels for"
            f" {', '.join(DEFAULT_BACKENDS)} only; move the pipeline to one of these, or pass"
            f" backend='flex' or, to check results, backend='reference'"
        )
    if not torch.compiler.is_dynamo_compiling():
        _log_choice(name, device.type)
    return name


@functools.cache  # logs each choice once
def _log_choice(name: str, device_type: str) -> None:
    logger.debug("attention on %s is computed by backend %r", device_type, name)


def _kernel_backend(load: Callable[[], ModuleType]) -> Backend:
    """The backend of a module of kernels, which take the tensors of a layout unchanged."""

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: BlockLayout,
        scale: float | None,
        key_mask: torch.Tensor | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = load().block_sparse_attention(
            query,
            key,
            value,
            layout.tensors,
            block_q=layout.block_q,
            block_kv=layout.block_kv,
            scale=scale,
            key_mask=key_mask,
        )
        return out, lse

    def gradients(
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        layout: BlockLayout,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> Gradients:
        dq, dk, dv = load().block_sparse_attention_gradients(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            layout.tensors,
            block_q=layout.block_q,
            block_kv=layout.block_kv,
            scale=scale,
            key_mask=key_mask,
        )
        return dq, dk, dv

    return Backend(forward, gradients)


def check_triton() -> None:
    """Raise ImportError if Triton cannot be imported."""
    # Imported late: the CPU path must work on platforms without Triton.
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"backend 'triton' needs Triton, which cannot be imported ({error}); install it with"
            f" 'pip install triton', or pass backend='flex', or run the pipeline on the CPU"
        ) from error


def _triton_kernel() -> ModuleType:
    check_triton()
    from diffattn.kernels import block_sparse

    return block_sparse


@functools.cache  # the same functions make the same backend
def _by_autograd(forward: Forward) -> Backend:
    """The backend of a forward whose gradients come from autograd, over another forward."""

    def gradients(
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        layout: BlockLayout,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> Gradients:
        # Autograd is off inside an operator, as in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            found, _ = forward(leaves[0], leaves[1], leaves[2], layout, scale, key_mask, False)
            dq, dk, dv = torch.autograd.grad(found, leaves, grad_out)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    return Backend(forward, gradients)


def _reference_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: BlockLayout,
    scale: float | None,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = reference_attention(
        query, key, value, layout.dense(), scale=scale, key_mask=key_mask
    )
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return out.to(query.dtype).contiguous(), lse.to(lse_dtype)


BACKENDS: dict[str, Backend] = {
    "triton": _kernel_backend(_triton_kernel),
    "cpu": _kernel_backend(lambda: cpu_kernel),
    "flex": _by_autograd(flex_forward),
    "reference": _by_autograd(_reference_forward),
}

# By type of device; the type of ROCm is "cuda".
DEFAULT_BACKENDS = {"cuda": "triton", "xpu": "triton", "cpu": "cpu"}


def _dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if key_mask is None else key_mask[:, None, None, :],
        scale=scale,
    )
    return out.transpose(1, 2)


def every_pair(tokens_q: int, tokens_kv: int, device: torch.device) -> BlockLayout:
    """The layout of dense attention from `tokens_q` queries to `tokens_kv` keys."""
    states = torch.full((-(-tokens_q // BLOCK), -(-tokens_kv // BLOCK)), FULL, dtype=torch.uint8)
    return layout_from_states(
        states,
        None,
        tokens_q=tokens_q,
        tokens_kv=tokens_kv,
        block_q=BLOCK,
        block_kv=BLOCK,
    ).to(device)


def layout_of(
    mask: AttentionMask | BlockLayout | None,
    query: torch.Tensor,
    key: torch.Tensor,
    order: TileOrder | None = None,
) -> BlockLayout:
    """The blocks of a mask, checked against the tensors of a call.

    Raises:
        ValueError: if the mask is none, or is for other tokens, heads or another device.
    """
    if isinstance(mask, BlockLayout):
        layout = mask
    elif isinstance(mask, AttentionMask):
        layout = mask.blocks(device=query.device, order=order)
    elif mask is None:
        raise ValueError("return_lse needs a mask: pass a FullMask for dense attention")
    else:
        raise ValueError(
            f"mask is a {type(mask).__name__}, but must be an AttentionMask or a BlockLayout"
        )
    if (layout.tokens_q, layout.tokens_kv) != (query.shape[1], key.shape[1]):
        raise ValueError(
            f"the mask is over {layout.tokens_q} x {layout.tokens_kv} tokens, but query and key"
            f" have {query.shape[1]} and {key.shape[1]}; build it for this grid"
        )
    if order is not None and (order.grid.tokens,) * 2 != (layout.tokens_q, layout.tokens_kv):
        raise ValueError(
            f"the order is over {order.grid.tokens} tokens, but the mask over {layout.tokens_q} x"
            f" {layout.tokens_kv}; make the order for the mask's grid"
        )
    for what, of_layout, of_query in zip(
        ("samples", "heads"), layout.full_count.shape, query.shape[::2], strict=False
    ):
        if of_layout not in (1, of_query):
            raise ValueError(
                f"the mask is one of {of_layout} {what}, but the query has {of_query}; it must have"
                f" as many, or 1 that all share"
            )
    if layout.device != query.device:
        raise ValueError(
            f"the mask's blocks are on {layout.device} and the query on {query.device};"
            f" call .to({str(query.device)!r}) on the layout"
        )
    return layout


def _check_types(
    query: object, key: object, value: object, key_mask: object, order: object
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{name} is {_kind(tensor)}, but must be a torch.Tensor of shape"
                f" (batch, tokens, heads, head_dim)"
            )
    if key_mask is not None and not isinstance(key_mask, torch.Tensor):
        raise TypeError(
            f"key_mask is {_kind(key_mask)}, but must be a bool torch.Tensor of shape"
            f" (batch, tokens), or None"
        )
    if order is not None and not isinstance(order, TileOrder):
        raise TypeError(f"order is {_kind(order)}, but must be a TileOrder or None")


def _kind(value: object) -> str:
    if value is None:
        return "None"
    kind, module = type(value).__name__, type(value).__module__
    return f"a {kind}" if module == "builtins" else f"a {module}.{kind}"


def check_inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None
) -> None:
    """Check that the tensors of a call fit together.

    Raises:
        ValueError: if they do not.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but must be"
                f" (batch, tokens, heads, head_dim)"
            )
    if key.shape != value.shape or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do"
            f" not fit: batch and heads must be equal, key and value of one shape"
        )
    for name, other in (("key", key), ("value", value), ("key_mask", key_mask)):
        if other is not None and other.device != query.device:
            raise ValueError(
                f"{name} is on {other.device} and the query on {query.device}; move it there"
            )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query is {query.dtype}, key {key.dtype} and value {value.dtype}, but all three must"
            f" be of one floating-point dtype"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"head_dim is {query.shape[3]} in query and {key.shape[3]} in key")
    if key_mask is not None and (
        key_mask.dtype != torch.bool or tuple(key_mask.shape) != (key.shape[0], key.shape[1])
    ):
        raise ValueError(
            f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}, but must be bool"
            f" {(key.shape[0], key.shape[1])}: (batch, tokens)"
        )
