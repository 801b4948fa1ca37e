"""Attention to selected key blocks in Triton as one differentiable operator."""

from __future__ import annotations

import torch
import triton

from ..checks import check_inputs, scale_of
from ..operators import over_selection
from .backward import backward
from .forward import forward, forward_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256

_INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to the key blocks it has selected; differentiable.

    Only selected blocks are computed, padded to tiles: a key block to a multiple of 16 to 128 keys,
    and the queries that selected the block to a multiple of 16 to 128. In the backward pass the
    queries are padded in groups of at most 2048 neighbours. In addition to the results, the forward
    pass takes up to 1 GiB of memory for lists and partial results; queries take turns where all of
    them would need more. The backward pass takes up to 1 GiB for lists and sums. If a single head
    needs more, more is taken: 4 bytes per query for each of twice `blocks` and `head_dim`.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)` of one dtype, any strides; the key length may
            differ from the query length. float32 is multiplied in full, unless
            `torch.set_float32_matmul_precision` allows TF32.
        starts: int32 `(blocks + 1,)`, the first key of every block, then the number of keys: from 0
            ascending, blocks of any length. Values must be so: a check would wait for the device.
        bits: int32 `(batch, heads, tokens, words)` of any strides, with a word for 32 blocks: bit
            `c % 32` of word `c // 32` is set where a query selects block c. Bits past the last
            block are ignored.
        scale: factor of the scores; `head_dim ** -0.5` when None.
        key_mask: bool `(batch, tokens_kv)`, false for keys that no query sees.

    Returns:
        out: like q; 0 for a query that sees nothing.
        lse: float32 `(batch, heads, tokens)`, natural logarithm of the sum of the exponentials of a
            query's scores, -inf for a query that sees nothing.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_selection(q, starts, bits)
    _check_supported(q, k, v, key_mask)
    return _attend(q, k, v, [starts, bits], key_mask, scale_of(scale, q))


_attend = over_selection(
    "selected_triton",
    forward,
    backward,
    "the Triton kernel for selected blocks has no forward-mode derivative (torch.func.jvp,"
    " dual_level); call diffattn.selected.selected_attention, which takes the block-sparse kernel"
    " for it",
)


def _check_selection(q: torch.Tensor, starts: torch.Tensor, bits: torch.Tensor) -> None:
    for name, x in (("starts", starts), ("bits", bits)):
        if x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"{name} must be torch.int32 on {q.device}; got {x.dtype} on {x.device}"
            )
    if starts.ndim != 1 or starts.shape[0] < 2:
        raise ValueError(
            "starts must be (blocks + 1,) for at least one key block; got shape"
            f" {tuple(starts.shape)}"
        )
    batch, tokens, heads, _ = q.shape
    blocks = starts.shape[0] - 1
    expected = (batch, heads, tokens, -(-blocks // 32))
    if bits.shape != expected:
        raise ValueError(
            f"bits must be (batch, heads, tokens, words) = {expected} for q {tuple(q.shape)} and"
            f" the {blocks} key blocks of starts; got {tuple(bits.shape)}"
        )


def _check_supported(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> None:
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim may be 1 to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    for name, x in (("k", k), ("v", v), ("key_mask", key_mask)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q on {q.device}")
    if q.device.type == "cpu" and not _INTERPRETED:
        raise ValueError(
            "the Triton kernels run on a GPU, but q is on cpu; use diffattn.kernels.cpu, or"
            " set TRITON_INTERPRET=1 before Triton is imported to run them in its interpreter"
        )
