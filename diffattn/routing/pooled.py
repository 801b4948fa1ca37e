"""What scores and rules of block selection are given: a call's tokens and the means of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from diffattn.routing.rules import kept_blocks
from diffattn.selected.key_blocks import KeyBlocks


@dataclass(frozen=True)
class Always:
    """The pairs of blocks that are seen in any case.

    Attributes:
        pairs: bool (blocks, blocks).
        candidates: int64 (blocks,), the number of other blocks of each row.
        counts: the numbers in `candidates`, without repetitions and without 0.
    """

    pairs: torch.Tensor
    candidates: torch.Tensor
    counts: tuple[int, ...]
    _kept: dict[float, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def others(self) -> torch.Tensor:
        """The other pairs of blocks, bool (blocks, blocks)."""
        with torch.inference_mode(False):
            return ~self.pairs

    def kept(self, share: float) -> torch.Tensor:
        """The number of blocks that a share of each row's candidates is: int32 (blocks,)."""
        if share not in self._kept:
            with torch.inference_mode(False):
                kept = torch.zeros_like(self.candidates, dtype=torch.int32)
                for number in self.counts:
                    kept.masked_fill_(self.candidates == number, kept_blocks(share, number))
                self._kept[share] = kept
        return self._kept[share]


@dataclass(frozen=True)
class Pooled:
    """A call's tokens, in the method's order, and the means of their blocks.

    The heads are some of the model's where memory is short or where processes share the heads.

    Attributes:
        query, key: (batch, tokens, heads, head_dim).
        blocks: the blocks, the same for queries and keys; other tokens than video are among them.
        query_means, key_means: float32 (batch, blocks, heads, head_dim).
        counted: bool (batch, tokens), False for padding; None without padding.
        holds_any: bool (batch, blocks), whether any token of a block counts; None without padding.
        always: the pairs of blocks that are seen in any case.
        scale: factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    blocks: KeyBlocks
    query_means: torch.Tensor
    key_means: torch.Tensor
    counted: torch.Tensor | None
    holds_any: torch.Tensor | None
    always: Always
    scale: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of scores: batch, heads, query blocks, key blocks."""
        batch, blocks, heads, _ = self.query_means.shape
        return batch, heads, blocks, blocks

    @property
    def candidates(self) -> torch.Tensor:
        """The pairs that a rule decides about, bool (batch or 1, 1, query blocks, key blocks).

        All others are seen in any case, or have no key that counts.
        """
        candidates = self.always.others[None, None]
        return candidates if self.holds_any is None else candidates & self.holds_any[:, None, None]
