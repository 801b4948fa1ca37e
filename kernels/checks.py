"""Checks of arguments that the attention kernels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

LayoutTensors = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]

LAYOUT_NAMES = (
    "full_count",
    "full_index",
    "partial_count",
    "partial_index",
    "partial_mask",
    "bit_masks",
)


def check_tensors(**arguments: object) -> None:
    """Raise TypeError for an argument that is no tensor; arrays of other libraries are none."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            is_array = hasattr(value, "__array__")
            hint = f"; torch.as_tensor({name}) makes one of it" if is_array else ""
            raise TypeError(f"{name} is {type(value).__name__}, but must be a torch.Tensor{hint}")


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Check that q, k, v and the key mask fit together.

    Raises:
        ValueError: if dtypes or shapes do not fit together.
    """
    if q.dtype not in dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v must share one dtype of {', '.join(map(str, dtypes))};"
            f" got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.ndim != 4 or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            "q, k, v must be non-empty (batch, tokens, heads, head_dim);"
            f" got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    expected = (q.shape[0], k.shape[1], *q.shape[2:])
    if k.shape != expected or v.shape != expected:
        raise ValueError(
            "k and v must have the batch, heads and head_dim of q, and the same number of tokens;"
            f" got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]):
        raise ValueError(
            f"key_mask must be torch.bool (batch, tokens_kv) = {tuple(k.shape[:2])};"
            f" got {key_mask.dtype} {tuple(key_mask.shape)}"
        )


def scale_of(scale: float | None, q: torch.Tensor) -> float:
    """The factor of the scores, a float whatever number is given; `head_dim ** -0.5` when None."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def check_layout(
    q: torch.Tensor, layout: Sequence[torch.Tensor], block_q: int, block_kv: int
) -> None:
    """Check that a layout's tensors fit q and each other; values are not checked.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit.
    """
    if len(layout) != len(LAYOUT_NAMES):
        raise ValueError(
            f"the layout must be {len(LAYOUT_NAMES)} tensors, {', '.join(LAYOUT_NAMES)};"
            f" got {len(layout)}"
        )
    full_count, full_index, partial_count, partial_index, partial_mask, bit_masks = layout
    if block_q < 1 or block_kv < 1:
        raise ValueError(f"blocks need at least one token; got {block_q} x {block_kv}")
    device = q.device
    for name, x in zip(LAYOUT_NAMES, layout, strict=True):
        if x.dtype != torch.int32 or x.device != device:
            raise ValueError(f"{name} must be torch.int32 on {device}; got {x.dtype} on {x.device}")
    batch, tokens_q, heads, _ = q.shape
    rows, words = -(-tokens_q // block_q), -(-block_kv // 32)
    shape, lists = tuple(full_count.shape), tuple(partial_index.shape)
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise ValueError(
            f"full_count must be (1 or {batch}, 1 or {heads}, rows) for {batch} samples and"
            f" {heads} heads; got {shape}"
        )
    if shape[2] != rows:
        raise ValueError(
            f"the layout has {shape[2]} rows, but {tokens_q} query tokens in blocks of {block_q}"
            f" make {rows}"
        )
    for name, x, fits, expected in (
        ("full_index", full_index, full_index.shape[:-1] == shape, (*shape, -1)),
        ("partial_count", partial_count, partial_count.shape == shape, shape),
        ("partial_index", partial_index, partial_index.shape[:-1] == shape, (*shape, -1)),
        ("partial_mask", partial_mask, partial_mask.shape == lists, lists),
        ("bit_masks", bit_masks, bit_masks.shape[1:] == (block_q, words), (-1, block_q, words)),
    ):
        if not fits:
            raise ValueError(f"{name} must have shape {expected} (-1: any); got {tuple(x.shape)}")
