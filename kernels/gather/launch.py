"""The tensors of a gather call in the form that launches of kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import triton

from ..common.launch import float32_precision, on_device, padded_head_dim
from ..common.tile_tables import TileConfig
from . import selecting
from .configs import GLUON_TILES, tile_config

# The largest offset from the first token of a head that 32 bits hold.
_MAX_OFFSET = 2**31 - 1

# A program owns a group of queries. The more queries, the smaller the share of padding in the last
# tile for each key block; but there should be several programs for every multiprocessor.
_MOST_QUERIES = 2048
_MANY_PROGRAMS = 256


@dataclass(frozen=True)
class SelectionProblem:
    """The arguments of a call as its kernels take them.

    Attributes:
        key_mask: uint8 `(batch, tokens_kv)`, or an arbitrary tensor if there is no key mask.
        key_mask_strides: of sample and token.
        wide: whether a head spans more memory than 32-bit offsets reach.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    tokens_q: int
    tokens_kv: int
    heads: int
    head_dim: int
    blocks: int
    chunk: int
    key_mask: torch.Tensor
    key_mask_strides: tuple[int, int]
    has_key_mask: bool
    wide: bool

    @staticmethod
    def of(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts: torch.Tensor,
        key_mask: torch.Tensor | None,
        *more: torch.Tensor,
    ) -> SelectionProblem:
        """Collect a call's arguments; `more` are further tensors like q that are read."""
        mask = q if key_mask is None else key_mask.view(torch.uint8)
        batch, tokens_q, heads, head_dim = q.shape
        running = (tokens_q - 1) * head_dim  # span of a head's float32 sums
        return SelectionProblem(
            device=q.device,
            dtype=q.dtype,
            batch=batch,
            tokens_q=tokens_q,
            tokens_kv=k.shape[1],
            heads=heads,
            head_dim=head_dim,
            blocks=starts.shape[0] - 1,
            chunk=selecting.CHUNK,
            key_mask=mask,
            key_mask_strides=(0, 0) if key_mask is None else (mask.stride(0), mask.stride(1)),
            has_key_mask=key_mask is not None,
            wide=max(running, *(_head_span(x) for x in (q, k, v, *more))) > _MAX_OFFSET,
        )

    @property
    def block_d(self) -> int:
        return padded_head_dim(self.head_dim)

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.tokens_q, self.chunk)

    def turns(self, state_floats: int) -> Iterator[tuple[int, int]]:
        """First pair and number of pairs per turn; a pair also needs `state_floats` per query."""
        each = selecting.list_bytes(self.blocks, self.tokens_q) + 4 * state_floats * self.tokens_q
        return selecting.turns(self.batch * self.heads, each)

    def chunks_per_group(self, pairs: int) -> int:
        """Chunks of queries per group, where each group of each pair has a program."""
        chunks = _MOST_QUERIES // selecting.CHUNK
        while chunks > 1 and pairs * triton.cdiv(self.chunks, chunks) < _MANY_PROGRAMS:
            chunks //= 2
        return chunks

    @property
    def masked(self) -> bool:
        """Whether there is a key mask or padding in the head dimension: both take registers."""
        return self.has_key_mask or self.head_dim != self.block_d

    @property
    def compiled_for(self) -> tuple[object, ...]:
        """The constants that kernels are compiled for, beside device, dtype and head_dim."""
        return (self.masked,)

    def tiles(self, kernel: str, variant: str, measured: TileConfig | None) -> TileConfig:
        """The measured tiles if there are any, else the shipped tiles."""
        if variant == "gluon":
            return measured or GLUON_TILES
        return measured or tile_config(kernel, self.block_d, self.dtype, masked=self.masked)

    def on_device(self) -> AbstractContextManager[object]:
        """A context in which Triton launches on the device of the tensors."""
        return on_device(self.device)

    def constants(self, config: TileConfig) -> dict[str, object]:
        """The compile-time arguments that all kernels share."""
        return {
            "D": self.head_dim,
            "BLOCK_D": self.block_d,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_KEY_MASK": self.has_key_mask,
            "WIDE": self.wide,
            "PRECISION": float32_precision(),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,  # Triton is about to change its own default
        }


def _head_span(x: torch.Tensor) -> int:
    """Elements from the first to the last element of a head."""
    _, tokens, _, head_dim = x.shape
    _, s_t, _, s_d = x.stride()
    return (tokens - 1) * s_t + (head_dim - 1) * s_d
