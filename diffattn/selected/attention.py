"""selected_attention(): attention over key blocks that every query has selected for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffattn.blocks import unpack_bits
from diffattn.counting import watching
from diffattn.interception import through_modes
from diffattn.kernels.autocast import autocast_off, cast_as_sdpa
from diffattn.kernels.checks import check_tensors
from diffattn.kernels.cpu import gather as gather_cpu
from diffattn.kernels.reference import reference_attention
from diffattn.kernels.transforms import is_forward_mode
from diffattn.masks.base import AttentionMask
from diffattn.operator import check_triton, choose_backend
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.selected.tiles import union_attention

# The backends of `attention` that also compute this operator.
_NAMES = ("triton", "cpu", "reference")


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: KeyBlocks,
    bits: torch.Tensor,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax attention of every query over the blocks it has selected; differentiable.

    A query that sees no key gives 0. Autocast and function modes act as on `diffattn.attention`.
    The CPU kernel and the Triton kernel gather the queries of each block. For forward-mode
    derivatives on Triton, tiles of neighbouring queries are computed instead (`union_attention`).

    Args:
        query, key, value: (batch, tokens, heads, head_dim), in the order of the blocks.
        blocks: the blocks of the sequence.
        bits: int32 (batch, heads, tokens, ceil(blocks / 32)): bit `c % 32` of word `c // 32` is set
            where a query has selected block `c`.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        key_mask: bool (batch, tokens): False hides a key from every query, as padding does.
        backend: "triton", "cpu" or "reference", by default chosen as for `diffattn.attention`.

    Returns:
        (batch, tokens, heads, head_dim) in the dtype of `query`, or of the autocast region.

    Raises:
        TypeError: if query, key or value is no tensor.
        ValueError: if shapes, dtypes or devices do not fit together, or the backend is unknown.
        NotImplementedError: if the tensors' device or the backend has no kernel.
        ImportError: if the backend is "triton" and Triton cannot be imported.
    """
    check_tensors(query=query, key=key, value=value)
    query, key, value = cast_as_sdpa(query, key, value)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with autocast_off(query.device.type):
            return _attend(query, key, value, blocks, bits, scale, key_mask, backend)

    return through_modes(attend, query, key, value)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: KeyBlocks,
    bits: torch.Tensor,
    scale: float | None,
    key_mask: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    name = choose_backend(query.device, backend)
    if name not in _NAMES:
        raise NotImplementedError(
            f"backend {name!r} has no attention over selected blocks; leave the backend out, or"
            f" pass backend='reference' to check results"
        )
    if name == "reference":
        mask = dense_mask(blocks, bits)
        out, _ = reference_attention(query, key, value, mask, scale=scale, key_mask=key_mask)
        return out.to(query.dtype)
    # The kernel that gathers has no tangents; the kernel of the union has.
    if name == "triton" and is_forward_mode():
        return union_attention(
            query, key, value, blocks, bits, scale=scale, key_mask=key_mask, backend=name
        )
    if (count := watching()) is not None:
        count.add_selection(blocks.starts.diff(), bits)
    kernel = gather_cpu.selected_attention if name == "cpu" else _triton_gather()
    out, _ = kernel(query, key, value, blocks.starts, bits, scale=scale, key_mask=key_mask)
    return out


def _triton_gather() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    check_triton()
    from diffattn.kernels.gather import selected_attention

    return selected_attention


@dataclass(frozen=True, eq=False)
class SelectionMask(AttentionMask):
    """The selection of one head in one call, as a mask.

    Attributes:
        chosen: bool `(tokens, blocks)`, the blocks that each query has selected; tokens are in the
            model's order.
        block_of: int64 `(tokens,)`, the block of each token.
    """

    chosen: torch.Tensor
    block_of: torch.Tensor

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.chosen[query, self.block_of[key]]


def dense_mask(blocks: KeyBlocks, bits: torch.Tensor) -> torch.Tensor:
    """The token mask of a selection: bool (batch, heads, tokens, tokens).

    Needs memory for every token pair: for tests and pictures.
    """
    lengths = blocks.starts.diff().long()
    block_of = torch.arange(blocks.blocks, device=bits.device).repeat_interleave(lengths)
    return unpack_bits(bits, blocks.blocks)[..., block_of]
