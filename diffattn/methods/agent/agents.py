"""Attention through agents: a few agents gather from all keys, and all queries ask the agents.

Tensors are (batch, tokens, heads, head_dim). PyTorch's own attention computes both steps, with
memory linear in the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffattn.grid import TokenGrid


@dataclass(frozen=True)
class Agents:
    """Mean queries, each of which stands for many queries.

    Attributes:
        mean: float32 (batch, agents, heads, head_dim).
        exists: bool (batch, agents): False for the mean of no query; None if there is no such mean.
    """

    mean: torch.Tensor
    exists: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.mean.shape[1]


@dataclass(frozen=True)
class Beside:
    """Keys that queries see directly, beside the agents.

    Attributes:
        key, value: (batch, tokens, heads, head_dim).
        mask: bool (batch, tokens): False for padding; None if nothing is padded.
    """

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """PyTorch's attention over all keys, or over the keys where `key_mask` is True.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        scale: factor of the scores.
        key_mask: bool (batch, keys).

    Returns:
        (batch, tokens, heads, head_dim).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def gather_values(
    agents: Agents,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention output of each agent as a query: (batch, agents, heads, head_dim)."""
    return dense_attention(agents.mean.to(key.dtype), key, value, scale, key_mask)


def ask_agents(
    query: torch.Tensor,
    agents: Agents,
    gathered: torch.Tensor,
    scale: float,
    sharpness: float | torch.Tensor,
    beside: Beside | None = None,
) -> torch.Tensor:
    """Attention of queries with agents as keys and the agents' gathered values as values.

    Args:
        query: (batch, tokens, heads, head_dim).
        agents: the agents.
        gathered: the result of `gather_values`, (batch, agents, heads, head_dim).
        scale: factor of all scores.
        sharpness: another factor of the agents' scores.
        beside: more keys in the same softmax, with scores without `sharpness`.

    Returns:
        (batch, tokens, heads, head_dim).
    """
    # SDPA's scale is a number: a tensor there would have to wait for the device. Keys can be
    # multiplied by a tensor.
    key, value, mask = (agents.mean * sharpness).to(query.dtype), gathered, agents.exists
    if beside is not None:
        if mask is not None or beside.mask is not None:
            mask = torch.cat([_full(mask, key), _full(beside.mask, beside.key)], dim=1)
        key, value = torch.cat([key, beside.key], dim=1), torch.cat([value, beside.value], dim=1)
    return dense_attention(query, key, value, scale, mask)


def cell_agents(
    query: torch.Tensor,
    grid: TokenGrid,
    cell: tuple[int, int, int],
    mask: torch.Tensor | None = None,
) -> Agents:
    """The mean queries of the cells of a grid; cells at the end of an axis may be smaller.

    Args:
        query: the video tokens of `grid`, (batch, tokens, heads, head_dim).
        grid: the tokens.
        cell: latent frames, rows and columns of a cell.
        mask: bool (batch, tokens): False for tokens that do not count.
    """
    if mask is None:
        return Agents(_cell_means(query, grid, cell))
    share = _cell_means(mask[..., None, None].float(), grid, cell)
    mean = _cell_means(query.masked_fill(~mask[..., None, None], 0), grid, cell)
    # The mean of no token is 0 and not 0 / 0.
    return Agents(mean / share.clamp(min=torch.finfo(share.dtype).tiny), share[..., 0, 0] > 0)


def joined_agents(parts: Sequence[Agents]) -> Agents:
    """The agents of several grids as those of one."""
    if len(parts) == 1:
        return parts[0]
    mean = torch.cat([part.mean for part in parts], 1)
    if all(part.exists is None for part in parts):
        return Agents(mean)
    return Agents(mean, torch.cat([_full(part.exists, part.mean) for part in parts], 1))


def cell_count(grid: TokenGrid, cell: tuple[int, int, int]) -> int:
    """The number of cells of a grid."""
    frames, rows, columns = cell
    return -(-grid.frames // frames) * -(-grid.height // rows) * -(-grid.width // columns)


def _cell_means(x: torch.Tensor, grid: TokenGrid, cell: tuple[int, int, int]) -> torch.Tensor:
    """float32 means over cells: (batch, tokens, ...) -> (batch, cells, ...).

    The mean over a cell is the mean along its axes, one axis after another.
    """
    x = x.unflatten(1, (grid.frames, grid.height, grid.width))
    for axis in (3, 2, 1):
        x = _axis_means(x, axis, cell[axis - 1])
    return x.flatten(1, 3)


def _axis_means(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """float32 means over `size` entries along an axis; the last mean may be over fewer."""
    length = x.shape[axis]
    whole = length - length % size
    parts = []
    if whole:
        inner = x.narrow(axis, 0, whole).unflatten(axis, (-1, size))
        parts.append(inner.mean(axis + 1, dtype=torch.float32))
    if whole < length:
        rest = x.narrow(axis, whole, length - whole)
        parts.append(rest.mean(axis, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, dim=axis)


def _full(mask: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    """`mask` over the keys, bool (batch, tokens); all True for None."""
    return key.new_ones(key.shape[:2], dtype=torch.bool) if mask is None else mask
