"""The tensors of a block-sparse call in the form that launches of kernels take."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..checks import LayoutTensors
from ..common.launch import SMALLEST_SCALE, float32_precision, on_device, padded_head_dim
from ..common.tile_tables import TileConfig
from .configs import fitted, tile_config
from .descriptors import describable, tile_descriptor
from .walk import Rows

# The largest offset inside a tile that 32 bits hold.
_MAX_OFFSET = 2**31 - 1


@dataclass(frozen=True)
class Problem:
    """The arguments of an attention call as its kernels take them.

    Attributes:
        layout: index lists and bit masks as the caller passed them: caches find plans by them.
        lists: the same lists and masks, contiguous.
        scale: factor of the scores.
        layout_strides: how many layouts apart two samples and two heads are; 0 where they share.
        key_mask: uint8 `(batch, tokens_kv)`, or an arbitrary tensor if there is no key mask.
        key_mask_strides: of sample and token.
        wide: whether a tile spans more memory than 32-bit offsets reach.
        precision: `input_precision` of float32 products.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_q: int
    block_kv: int
    scale: float
    layout: LayoutTensors
    lists: tuple[torch.Tensor, ...]
    layout_strides: tuple[int, int]
    key_mask: torch.Tensor
    key_mask_strides: tuple[int, int]
    has_key_mask: bool
    wide: bool
    precision: str

    @staticmethod
    def of(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: LayoutTensors,
        key_mask: torch.Tensor | None,
        block_q: int,
        block_kv: int,
        scale: float,
        *,
        more: tuple[torch.Tensor, ...] = (),
    ) -> Problem:
        """Collect a call's arguments; `more` are further tensors like q that are read."""
        samples, layout_heads, _ = layout[0].shape
        mask = q if key_mask is None else key_mask.view(torch.uint8)
        return Problem(
            device=q.device,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            block_q=block_q,
            block_kv=block_kv,
            scale=scale,
            layout=layout,
            lists=tuple(x.contiguous() for x in layout),
            layout_strides=(layout_heads if samples > 1 else 0, 1 if layout_heads > 1 else 0),
            key_mask=mask,
            key_mask_strides=(0, 0) if key_mask is None else (mask.stride(0), mask.stride(1)),
            has_key_mask=key_mask is not None,
            wide=any(_tile_span(x, max(block_q, block_kv)) > _MAX_OFFSET for x in (q, k, v, *more)),
            precision=float32_precision(),
        )

    @cached_property
    def block_d(self) -> int:
        """The head dimension, padded as matrix products take it."""
        return padded_head_dim(self.head_dim)

    def tma_takes(self, *tensors: torch.Tensor) -> bool:
        """Whether the copy engine can fetch the tensors, in tiles as large as matrix units want."""
        return min(self.block_q, self.block_kv) >= 64 and all(map(describable, tensors))

    @property
    def scale_not_0(self) -> float:
        """The scale, never 0: kernels hide scores before they scale them, and 0 * -inf is NaN."""
        return self.scale or SMALLEST_SCALE

    @property
    def compiled_for(self) -> tuple[object, ...]:
        """The constants that kernels are compiled for, beside device, dtype and head_dim."""
        return self.block_q, self.block_kv, self.masked

    def tiles(self, kernel: str, variant: str, measured: TileConfig | None) -> TileConfig:
        """The measured tiles if there are any, else the shipped tiles; no larger than a block."""
        tiles = measured or tile_config(
            kernel, variant, self.block_d, self.dtype, masked=self.masked
        )
        found = fitted(kernel, tiles, self.block_q, self.block_kv)
        if variant == "gluon":
            # Shorter tiles leave room for more of them: as many keys are under way.
            shorter = tiles.block_n // found.block_n
            found = replace(found, num_stages=found.num_stages * shorter)
        return found

    @property
    def masked(self) -> bool:
        """Whether there is a key mask or padding in the head dimension: both take registers."""
        return self.has_key_mask or self.head_dim != self.block_d

    def rows_layout(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        """The layout's tensors for a kernel that walks query rows."""
        if rows.full_index is None:
            return self.lists
        return (self.lists[0], rows.full_index, *self.lists[2:])

    def rows_have_masks(self, tokens_kv: int) -> bool:
        """Whether a block of a row may need a mask: a partial block, or a short last block."""
        return self.has_partial or tokens_kv % self.block_kv != 0

    @property
    def has_partial(self) -> bool:
        """Whether there may be partial blocks. Without bit masks there are none."""
        return self.layout[5].shape[0] > 0

    def sources(
        self, *tiles: tuple[torch.Tensor, int], tma: bool
    ) -> list[torch.Tensor | TensorDescriptor]:
        """The pointers or descriptors by which kernels read tensors: see `common/primitives.py`.

        Args:
            tiles: tensors `(batch, tokens, heads, head_dim)` and the tokens per tile of each.
            tma: whether the copy engine fetches the tiles.
        """
        if not tma:
            return [x for x, _ in tiles]
        return [tile_descriptor(x, tokens, self.block_d) for x, tokens in tiles]

    def constants(self, config: TileConfig) -> dict[str, object]:
        """The compile-time arguments that all kernels share."""
        return {
            "D": self.head_dim,
            "BLOCK_D": self.block_d,
            "BLOCK_Q": self.block_q,
            "BLOCK_KV": self.block_kv,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_KEY_MASK": self.has_key_mask,
            "WIDE": self.wide,
            "PRECISION": self.precision,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,  # Triton is about to change its own default
        }

    def on_device(self) -> AbstractContextManager[object]:
        """A context in which Triton launches on the device of the tensors."""
        return on_device(self.device)


def _tile_span(x: torch.Tensor, block: int) -> int:
    """Elements from the first to the last element of a block of tokens of one head."""
    _, tokens, _, head_dim = x.shape
    _, s_t, _, s_d = x.stride()
    return (min(block, tokens) - 1) * s_t + (head_dim - 1) * s_d
