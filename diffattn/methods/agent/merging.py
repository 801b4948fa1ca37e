"""Merging similar tokens, and copying the result of a merged token back to its parts.

Each cell of a grid has one destination; all other tokens are sources. The sources that are most
similar to a destination are merged into their most similar destination. Agents arise in the same
way with more merging: an agent is the mean of a cluster of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

# Number of scores, of sources against destinations, in memory at a time for one sample.
_SCORES = 1 << 22


@dataclass(frozen=True)
class Merging:
    """The assignment of the tokens of a call to merged tokens and to agents.

    Attributes:
        owner: int64 (batch, tokens): index of the merged token that contains each token.
        sizes: float32 (batch, merged tokens): number of tokens in each merged token.
        agent_of: int64 (batch, merged tokens): index of the agent of each merged token; None if
            agents would be half as many as merged tokens or more, and so save nothing.
        agents: number of agents; 0 if `agent_of` is None.
    """

    owner: torch.Tensor
    sizes: torch.Tensor
    agent_of: torch.Tensor | None
    agents: int

    @property
    def tokens(self) -> int:
        """The number of merged tokens."""
        return self.sizes.shape[1]

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of the tokens in each merged token.

        Args:
            x: (batch, tokens, channels).

        Returns:
            (batch, merged tokens, channels).
        """
        total = _sum_over(x.float(), self.owner, self.tokens)
        return (total / self.sizes[..., None]).to(x.dtype)

    def unmerge(self, x: torch.Tensor) -> torch.Tensor:
        """For each token a copy of its merged token.

        Args:
            x: (batch, merged tokens, channels).

        Returns:
            (batch, tokens, channels).
        """
        return x.gather(1, self.owner[..., None].expand(-1, -1, x.shape[2]))

    def agent_means(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of each agent's merged tokens, weighted by the sizes of the merged tokens.

        Args:
            x: (batch, merged tokens, heads, head_dim).

        Returns:
            float32 (batch, agents, heads, head_dim).
        """
        assert self.agent_of is not None
        sizes = self.sizes[..., None]
        total = _sum_over(x.flatten(2).float() * sizes, self.agent_of, self.agents)
        count = _sum_over(sizes, self.agent_of, self.agents)
        return (total / count).unflatten(2, x.shape[2:])


@lru_cache(maxsize=256)
def cell_offsets(
    height: int, width: int, stride: tuple[int, int], seed: tuple[int, ...] | None
) -> torch.Tensor:
    """The place of the destination within each cell: int64 (rows of cells, columns of cells).

    Args:
        height, width: rows and columns of the grid. Rows and columns at the end that fill no cell
            have no destination.
        stride: rows and columns of a cell.
        seed: numbers that determine a random choice; None chooses the first token of each cell.
    """
    cells = height // stride[0], width // stride[1]
    if seed is None:
        return torch.zeros(cells, dtype=torch.int64)
    mixed = 0
    for number in seed:
        mixed = (mixed * 1_000_003 + number) % (1 << 63)
    generator = torch.Generator().manual_seed(mixed)
    return torch.randint(stride[0] * stride[1], cells, generator=generator)


def sources_and_destinations(
    height: int, width: int, stride: tuple[int, int], offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources and destinations of a grid, as int64 positions of tokens in row-major order.

    Args:
        height, width: rows and columns of the grid.
        stride: rows and columns of a cell.
        offsets: the result of `cell_offsets`.

    Raises:
        ValueError: if the grid has no whole cell.
    """
    if not offsets.numel():
        raise ValueError(
            f"a grid of {height} x {width} tokens is smaller than the stride of {stride[0]} x"
            f" {stride[1]}, so there is no token to merge others into: choose a smaller stride, or"
            f" a smaller max_downsample to leave small grids alone"
        )
    rows, columns = (torch.arange(size) for size in offsets.shape)
    row = rows[:, None] * stride[0] + offsets // stride[1]
    column = columns * stride[1] + offsets % stride[1]
    destinations = (row * width + column).flatten()
    is_source = torch.ones(height * width, dtype=torch.bool)
    is_source[destinations] = False
    return is_source.nonzero().flatten(), destinations


@torch.no_grad()
def match(
    x: torch.Tensor,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    ratio: float,
    agent_ratio: float,
) -> Merging:
    """Merge the sources that are most similar to a destination.

    Memory is linear in the tokens: the scores of all pairs are never in memory at once.

    Args:
        x: the vectors to compare tokens by, (batch, tokens, channels).
        sources, destinations: positions of tokens, from `sources_and_destinations`.
        ratio: share of the tokens to merge into others, limited by the number of sources.
        agent_ratio: share of the tokens to merge when forming agents. There are no agents unless
            they are fewer than half of the merged tokens.
    """
    batch, tokens = x.shape[:2]
    sources, destinations = sources.to(x.device), destinations.to(x.device)
    merged, merged_for_agents = (
        min(int(tokens * share), len(sources)) for share in (ratio, agent_ratio)
    )
    best, nearest = _nearest(F.normalize(x.float(), dim=-1), sources, destinations)
    order = best.argsort(dim=1, descending=True, stable=True)

    def owners(count: int) -> torch.Tensor:
        kept = len(sources) - count
        into = kept + nearest.gather(1, order[:, :count])
        owner = x.new_empty(batch, tokens, dtype=torch.int64)
        owner[:, destinations] = kept + torch.arange(len(destinations), device=x.device)
        places = sources[order]
        alone = torch.arange(kept, device=x.device).expand(batch, -1)
        return owner.scatter_(1, places, torch.cat([into, alone], 1))

    owner = owners(merged)
    left, agents = tokens - merged, tokens - merged_for_agents
    ones = torch.ones(batch, tokens, 1, device=x.device)
    sizes = _sum_over(ones, owner, left)[..., 0]
    if 2 * agents >= left:
        return Merging(owner, sizes, None, 0)
    # All tokens of a merged token have the same agent: the order of the writes does not matter.
    agent_of = owner.new_empty(batch, left).scatter_(1, owner, owners(merged_for_agents))
    return Merging(owner, sizes, agent_of, agents)


def _nearest(
    x: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and index of each source's most similar destination: (batch, sources) each."""
    goals = x[:, destinations].transpose(1, 2)
    parts = [
        (x[:, some] @ goals).max(dim=-1)
        for some in sources.split(max(1, _SCORES // len(destinations)))
    ]
    if not parts:
        empty = x.new_empty(len(x), 0)
        return empty, empty.long()
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


def _sum_over(x: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Sums over the tokens of each owner: (batch, tokens, channels) -> (batch, count, channels)."""
    out = x.new_zeros(len(x), count, x.shape[2])
    return out.scatter_add_(1, owner[..., None].expand(-1, -1, x.shape[2]), x)
