"""Pooled keys: one more key and value for each cell of an image, a trainable sum over the cell."""

from __future__ import annotations

import torch

from diffattn.grid import TokenGrid
from diffattn.methods.base import SiteWeights


class CellWeights(SiteWeights):
    """The weights of a layer's sums over cells; all heads and channels, keys and values share them.

    Attributes:
        spatial_weight: `(down_factor, down_factor)`, a weight for each row and column of a cell.
            The initial weights make the sum a mean.
    """

    spatial_weight: torch.nn.Parameter

    def __init__(self, down_factor: int, beside: torch.nn.Module) -> None:
        """Make the weights on the device and in the dtype of the weights of `beside`."""
        super().__init__()
        self.spatial_weight = torch.nn.Parameter(mean_weight(down_factor))
        self.place_beside(beside)


def mean_weight(down_factor: int) -> torch.Tensor:
    """The weights, `(down_factor, down_factor)`, that make the sum over a cell its mean."""
    return torch.full((down_factor, down_factor), down_factor**-2)


def cells(grid: TokenGrid, side: int) -> int:
    """The number of cells that `pooled` makes of the video tokens of `grid`."""
    return grid.frames * (grid.height // side) * (grid.width // side)


def pooled(x: torch.Tensor, grid: TokenGrid, weight: torch.Tensor) -> torch.Tensor:
    """The weighted sums over the cells of a sequence's video tokens, frame by frame.

    Rows and columns at the end of a frame that do not fill a cell are left out, as in the paper.

    Args:
        x: keys or values of a call over `grid`, (batch, tokens, heads, head_dim).
        grid: the tokens of the call.
        weight: `(side, side)`, the weights of the tokens of a cell.

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
