"""Pooled keys: each cell of an image as one more key and value, a trainable sum of its tokens'."""

from __future__ import annotations

import torch

from diffattn.grid import TokenGrid
from diffattn.methods.base import SiteWeights


class CellWeights(SiteWeights):
    """The weights of a layer's cells, for all its heads and channels, keys and values.

    Attributes:
        spatial_weight: `(down_factor, down_factor)`, of the rows and columns of a cell; the mean
            until it is trained.
    """

    spatial_weight: torch.nn.Parameter

    def __init__(self, down_factor: int, beside: torch.nn.Module) -> None:
        """Make the weights on the device and in the dtype of those of `beside`."""
        super().__init__()
        self.spatial_weight = torch.nn.Parameter(mean_weight(down_factor))
        self.place_beside(beside)


def mean_weight(down_factor: int) -> torch.Tensor:
    """Weights of a cell that make its sum the mean."""
    return torch.full((down_factor, down_factor), down_factor**-2)


def cells(grid: TokenGrid, side: int) -> int:
    """How many cells `pooled` makes of the video tokens of `grid`."""
    return grid.frames * (grid.height // side) * (grid.width // side)


def pooled(x: torch.Tensor, grid: TokenGrid, weight: torch.Tensor) -> torch.Tensor:
    """The sums over cells of the video tokens of a sequence, frame by frame.

    Rows and columns that do not fill a cell at the end of a frame are in none, as in the paper.

    Args:
        x: keys or values of a call over `grid`, (batch, tokens, heads, head_dim).
        weight: `(side, side)`.

    Returns:
        (batch, cells, heads, head_dim).
    """
    side = weight.shape[0]
    rows, columns = grid.height // side, grid.width // side
    frames = x[:, grid.video].unflatten(1, (grid.frames, grid.height, grid.width))
    whole = frames[:, :, : rows * side, : columns * side]
    cells = whole.unflatten(3, (columns, side)).unflatten(2, (rows, side))
    out = torch.einsum("bfyaxche,ac->bfyxhe", cells, weight.to(x.device, x.dtype))
    return out.flatten(1, 3)
