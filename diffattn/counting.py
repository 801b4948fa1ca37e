"""The token pairs that attention computes, counted while a block of code runs.

Attached sites report their calls, and the operators report the pairs that they compute. What is
counted is what ran: the selection of each call, and the calls that a schedule kept dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import torch

from diffattn.blocks import BlockLayout, unpack_bits

_watching: ContextVar[PairCount | None] = ContextVar("diffattn_pair_count", default=None)


class PairCount:
    """The pairs of the calls of attached sites, over samples and heads; no call waits for a device.

    Attributes:
        sparse_calls, dense_calls: calls under a method, and calls that stayed dense.
        layout: the blocks of the latest call of a method that lists blocks; None before any.
    """

    def __init__(self) -> None:
        self.sparse_calls = 0
        self.dense_calls = 0
        self.layout: BlockLayout | None = None
        self._selection: tuple[torch.Tensor, torch.Tensor] | None = None
        self._possible = 0
        self._computed: list[torch.Tensor | int] = []
        # A layout of a static mask serves many calls.
        self._known: WeakKeyDictionary[BlockLayout, torch.Tensor] = WeakKeyDictionary()

    @property
    def density(self) -> float | None:
        """Share of the pairs that were computed, all calls together; None without a call.

        Attention that chooses no pairs, such as linear attention, counts as none.
        """
        if not self._possible:
            return None
        return sum(float(pairs) for pairs in self._computed) / self._possible

    @property
    def shares(self) -> torch.Tensor | None:
        """The share of each block's queries that selected each block, float (blocks, blocks).

        It is of the latest call whose queries select by themselves, over samples and heads; None
        before any.
        """
        if self._selection is None:
            return None
        lengths, bits = self._selection
        chosen = unpack_bits(bits, lengths.numel()).float().mean((0, 1))  # (tokens, blocks)
        block_of = torch.arange(lengths.numel(), device=bits.device).repeat_interleave(
            lengths.long()
        )
        sums = chosen.new_zeros(lengths.numel(), lengths.numel()).index_add_(0, block_of, chosen)
        return sums / lengths[:, None]

    def add_call(self, query: torch.Tensor, key: torch.Tensor, *, sparse: bool) -> None:
        """Count a call of a site: query and key (batch, tokens, heads, head_dim)."""
        pairs = _all_pairs(query, key)
        self._possible += pairs
        self.sparse_calls += sparse
        self.dense_calls += not sparse
        if not sparse:
            self._computed.append(pairs)

    def add_layout(
        self, query: torch.Tensor, key: torch.Tensor, layout: BlockLayout | None
    ) -> None:
        """Count the pairs of a layout, or all pairs where there is none."""
        if layout is None:
            self._computed.append(_all_pairs(query, key))
            return
        self.layout = layout
        if layout not in self._known:
            self._known[layout] = pairs_of(layout).sum() / layout.full_count[..., 0].numel()
        self._computed.append(self._known[layout] * (query.shape[0] * query.shape[2]))

    def add_selection(self, lengths: torch.Tensor, bits: torch.Tensor) -> None:
        """Count the pairs of queries with the blocks that they have selected.

        Args:
            lengths: tokens of each block.
            bits: as for `diffattn.selected.attention.selected_attention`.
        """
        self._selection = lengths, bits
        queries = unpack_bits(bits, lengths.numel()).sum((0, 1, 2), dtype=torch.float64)
        self._computed.append(queries @ lengths.double())


@contextmanager
def counted_pairs() -> Iterator[PairCount]:
    """Count the pairs of all attached sites that are called while the block runs.

    Calls in compiled code are not counted.
    """
    count = PairCount()
    token = _watching.set(count)
    try:
        yield count
    finally:
        _watching.reset(token)


def watching() -> PairCount | None:
    """The count of this context; None where nobody counts."""
    return None if torch.compiler.is_dynamo_compiling() else _watching.get()


def pairs_of(layout: BlockLayout) -> torch.Tensor:
    """The number of token pairs that attend, int64 (batch|1, heads|1)."""
    device = layout.device
    width = torch.full((layout.columns,), layout.block_kv, device=device)
    width[-1] = layout.tokens_kv - (layout.columns - 1) * layout.block_kv
    height = torch.full((layout.rows,), layout.block_q, device=device)
    height[-1] = layout.tokens_q - (layout.rows - 1) * layout.block_q
    listed = _listed(layout.full_index, layout.full_count)
    pairs = ((width[layout.full_index.long()] * listed).sum(-1) * height).sum(-1)
    if layout.bit_masks.shape[0]:
        ones = unpack_bits(layout.bit_masks, layout.block_kv).sum((-2, -1))
        listed = _listed(layout.partial_index, layout.partial_count)
        pairs = pairs + (ones[layout.partial_mask.long()] * listed).sum((-2, -1))
    return pairs


def _listed(index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which entries of index lists mean a block."""
    return torch.arange(index.shape[-1], device=index.device) < count[..., None]


def _all_pairs(query: torch.Tensor, key: torch.Tensor) -> int:
    batch, queries, heads, _ = query.shape
    return batch * heads * queries * key.shape[1]
