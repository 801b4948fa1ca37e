"""SeveralGridsMask: the rules of several grids in one sequence, as one mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import EMPTY, FULL, PARTIAL
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask, Blocking


@dataclass(frozen=True, eq=False)
class Rule:
    """A mask for the queries of one grid and the keys of one grid, the same or another.

    Attributes:
        queries, keys: the numbers of the grids, as places in `SeveralGridsMask.grids`.
        mask: a mask over as many tokens. The mask is asked about other pairs, too; those answers
            are ignored.
    """

    queries: int
    keys: int
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

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        of_query, of_key = self._owner(query), self._owner(key)
        out = self._free(query.device)[of_query, of_key]
        for rule in self.rules:
            here = (of_query == rule.queries) & (of_key == rule.keys)
            out = out | here & rule.mask.allowed(query, key)
        return out

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        # Tokens of no grid have the last number. A grid's tokens keep their range in every order.
        held = [
            self._held(blocking, size).double() for size in (blocking.block_q, blocking.block_kv)
        ]
        free = self._free(blocking.device).double()
        some, missing = (held[0] @ pairs @ held[1].T > 0 for pairs in (free, 1 - free))
        states = torch.full(some.shape, PARTIAL, dtype=torch.uint8, device=blocking.device)
        states[~some] = EMPTY
        states[~missing] = FULL
        for rule in self.rules:
            here = held[0][:, rule.queries, None] * held[1][:, rule.keys]
            elsewhere = held[0].sum(1)[:, None] * held[1].sum(1) > here
            state = rule.mask.block_states(blocking)
            # A block that holds other tokens, too, is never full by a rule, and text of a rule's
            # grid may be anything to the rule.
            state = torch.where(elsewhere, state.clamp(max=PARTIAL), state)
            states = torch.maximum(states, torch.where(here > 0, state, EMPTY))
        return states

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        held = [self._held(blocking, size) for size in (blocking.block_q, blocking.block_kv)]
        sizes = blocking.block_q, blocking.block_kv
        kinds = [self._kinds(blocking, size) for size in sizes]
        out = kinds[0][row] * (int(kinds[1].max()) + 1) + kinds[1][column]
        for rule in self.rules:
            here = (held[0][row, rule.queries] > 0) & (held[1][column, rule.keys] > 0)
            at = here.nonzero().flatten()
            if not at.numel():
                continue
            kind = rule.mask.block_signatures(row[at], column[at], blocking)
            if kind is None:
                kind = torch.arange(len(at), device=row.device)
            _, kind = kind.unique(return_inverse=True)
            _, out = out.unique(return_inverse=True)
            out *= len(at) + 1
            out[at] += kind + 1
        return out

    def _block_bits(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        owners = [
            self._owners(blocking, size)[index]
            for size, index in ((blocking.block_q, row), (blocking.block_kv, column))
        ]
        of_query, of_key = owners[0][:, :, None], owners[1][:, None, :]
        out = self._free(row.device)[of_query, of_key]
        for rule in self.rules:
            is_query, is_key = of_query == rule.queries, of_key == rule.keys
            at = (is_query.flatten(1).any(1) & is_key.flatten(1).any(1)).nonzero().flatten()
            if at.numel():
                bits = rule.mask._block_bits(row[at], column[at], blocking)
                out[at] |= bits & is_query[at] & is_key[at]
        return out

    def _free(self, device: torch.device) -> torch.Tensor:
        """Whether all pairs of two grids attend, bool `(grids + 1, grids + 1)`."""
        out = torch.ones(len(self.grids) + 1, len(self.grids) + 1, dtype=torch.bool)
        for rule in self.rules:
            out[rule.queries, rule.keys] = False
        return out.to(device)

    def _owner(self, token: torch.Tensor) -> torch.Tensor:
        """The number of the grid that each token is in, `len(grids)` for none."""
        out = torch.full_like(token, len(self.grids))
        for number, grid in enumerate(self.grids):
            out[(token >= grid.video.start) & (token < grid.video.stop)] = number
        return out

    def _owners(self, blocking: Blocking, size: int) -> torch.Tensor:
        """`_owner` of each token of each block, int64 `(blocks, size)`; -1 past the end."""
        token = torch.arange(-(-self.grid.tokens // size) * size, device=blocking.device)
        owner = self._owner(token)
        owner[self.grid.tokens :] = -1
        return owner.view(-1, size)

    def _held(self, blocking: Blocking, size: int) -> torch.Tensor:
        """Tokens of each grid, and of no grid, in each block: int64 `(blocks, grids + 1)`."""
        owner = self._owners(blocking, size)
        return torch.stack([(owner == n).sum(1) for n in range(len(self.grids) + 1)], 1)

    def _kinds(self, blocking: Blocking, size: int) -> torch.Tensor:
        """int64 `(blocks,)`: blocks of one number hold tokens of the same grids in their places."""
        return self._owners(blocking, size).unique(dim=0, return_inverse=True)[1]
