"""SeveralGridsMask: the rules of several grids in one sequence, as one mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import EMPTY, FULL, PARTIAL, pack_bits
from diffattn.distinct import distinct_rows
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask, Blocking

_NO_RULE = -1  # of pairs of grids that attend everywhere


@dataclass(frozen=True, eq=False)
class Rule:
    """A mask for the queries of some grids and the keys of some grids.

    Attributes:
        pairs: the numbers of the grids of queries and keys, as places in `SeveralGridsMask.grids`.
        mask: a mask over as many tokens. The mask is asked about other pairs, too; those answers
            are ignored.
    """

    pairs: tuple[tuple[int, int], ...]
    mask: AttentionMask


@dataclass(frozen=True, eq=False)
class SeveralGridsMask(AttentionMask):
    """Tokens of some pairs of grids attend by rules; all other pairs of tokens attend.

    Attributes:
        grids: grids over the same tokens as `grid`, each with other tokens as its video.
        rules: at most one rule for each ordered pair of grids, itself included.
    """

    grids: tuple[TokenGrid, ...]
    rules: tuple[Rule, ...]

    # Tokens of no grid have the last number. The tokens of a grid keep their range in every order.

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        rule_of = self._rule_of(query.device)[self._owner(query), self._owner(key)]
        out = rule_of < 0
        for number, rule in enumerate(self.rules):
            out = out | (rule_of == number) & rule.mask.allowed(query, key)
        return out

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        rule_of = self._rule_of(blocking.device)
        held = [
            self._held(blocking, size).double() for size in (blocking.block_q, blocking.block_kv)
        ]
        pairs = held[0].sum(1)[:, None] * held[1].sum(1)
        free = held[0] @ (rule_of < 0).double() @ held[1].T
        states = torch.full(pairs.shape, EMPTY, dtype=torch.uint8, device=blocking.device)
        states[free > 0] = PARTIAL
        states[free == pairs] = FULL
        for number, rule in enumerate(self.rules):
            here = held[0] @ (rule_of == number).double() @ held[1].T
            # A block with other pairs, too, is never full by a rule.
            state = rule.mask.block_states(blocking)
            state = torch.where(here == pairs, state, state.clamp(max=PARTIAL))
            states = torch.maximum(states, torch.where(here > 0, state, EMPTY))
        return states

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        if not row.numel():
            return row
        rule_of = self._rule_of(row.device)
        (held_q, kind_q), (held_kv, kind_kv) = (
            (self._held(blocking, size)[index] > 0, self._kinds(blocking, size)[index])
            for size, index in ((blocking.block_q, row), (blocking.block_kv, column))
        )
        # Two blocks of one grid each are told by their rule, others by the grids of their tokens.
        is_pure = (held_q.sum(1) == 1) & (held_kv.sum(1) == 1)
        rule = rule_of[held_q.int().argmax(1), held_kv.int().argmax(1)]
        mixed = len(self.rules) + kind_q * (int(kind_kv.max()) + 1) + kind_kv
        out = torch.where(is_pure, rule, mixed)
        for number in range(len(self.rules)):
            touched = (held_q[:, :, None] & held_kv[:, None]) & (rule_of == number)
            at = touched.flatten(1).any(1).nonzero().flatten()
            if not at.numel():
                continue
            kind = self.rules[number].mask.block_signatures(row[at], column[at], blocking)
            if kind is None:
                kind = torch.arange(len(at), device=row.device)
            _, kind = kind.unique(return_inverse=True)
            _, out = out.unique(return_inverse=True)
            out *= len(at) + 1
            out[at] += kind + 1
        return out

    def block_bits(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        rule_of = self._rule_of(row.device)
        of_query = self._owners(blocking, blocking.block_q)[row]
        of_key = self._owners(blocking, blocking.block_kv)[column]
        block = torch.arange(len(row), device=row.device)[:, None]

        def pairs_of(number: int) -> torch.Tensor:
            # The keys that the queries of each grid have under a rule, then of each query's grid.
            return pack_bits((rule_of == number)[:, of_key].transpose(0, 1))[block, of_query]

        out = pairs_of(_NO_RULE)
        for number, rule in enumerate(self.rules):
            words = pairs_of(number)
            at = words.flatten(1).any(1).nonzero().flatten()
            if at.numel():
                out[at] |= words[at] & rule.mask.block_bits(row[at], column[at], blocking)
        return out

    def _rule_of(self, device: torch.device) -> torch.Tensor:
        """The number of the rule between two grids, int64 `(grids + 1, grids + 1)`."""
        out = torch.full((len(self.grids) + 1,) * 2, _NO_RULE)
        for number, rule in enumerate(self.rules):
            for query, key in rule.pairs:
                out[query, key] = number
        return out.to(device)

    def _owner(self, token: torch.Tensor) -> torch.Tensor:
        """The number of the grid that each token is in, `len(grids)` for none."""
        out = torch.full_like(token, len(self.grids))
        for number, grid in enumerate(self.grids):
            out[(token >= grid.video.start) & (token < grid.video.stop)] = number
        return out

    def _owners(self, blocking: Blocking, size: int) -> torch.Tensor:
        """`_owner` of each token of each block, int64 `(blocks, size)`.

        Places past the end of the sequence belong to the grid of the last token.
        """
        token = torch.arange(-(-self.grid.tokens // size) * size, device=blocking.device)
        return self._owner(token.clamp(max=self.grid.tokens - 1)).view(-1, size)

    def _held(self, blocking: Blocking, size: int) -> torch.Tensor:
        """Tokens of each grid, and of no grid, in each block: int64 `(blocks, grids + 1)`."""
        owner = self._owners(blocking, size)
        return torch.stack([(owner == n).sum(1) for n in range(len(self.grids) + 1)], 1)

    def _kinds(self, blocking: Blocking, size: int) -> torch.Tensor:
        """int64 `(blocks,)`: blocks of one number hold tokens of the same grids in their places."""
        return distinct_rows(self._owners(blocking, size))[1]
