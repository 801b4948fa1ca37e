"""Grids whose blocks of frames see no later ones: the mask, and methods on such grids."""

import itertools

import pytest
import torch

from diffattn import CLEARAttn, DenseAttn, FreeSwimAttn, GNAAttn, RadialAttn, TokenGrid
from diffattn.blocks import EMPTY, FULL
from diffattn.masks.base import Blocking
from diffattn.masks.frame_causal import FrameCausalMask
from diffattn.methods.base import StaticMaskMethod
from diffattn.orders import TileOrder

GRIDS = [
    TokenGrid(6, 3, 5, causal_frames=2),
    TokenGrid(7, 4, 4, causal_frames=3),
    TokenGrid(5, 3, 3, 4, 7, causal_frames=2),
    TokenGrid(4, 5, 7, causal_frames=9),
]


def by_definition(grid: TokenGrid) -> torch.Tensor:
    """bool (tokens, tokens), pair by pair."""
    size = grid.height * grid.width
    seen = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    start = grid.text_before
    for q, k in itertools.product(range(grid.frames), repeat=2):
        if k // grid.causal_frames > q // grid.causal_frames:
            rows = slice(start + q * size, start + (q + 1) * size)
            seen[rows, start + k * size : start + (k + 1) * size] = False
    return seen


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_mask_is_its_definition(grid: TokenGrid) -> None:
    assert torch.equal(FrameCausalMask(grid).dense(), by_definition(grid))


@pytest.mark.parametrize("tile", [None, (2, 2, 4), (1, 3, 3)])
@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_hold_exactly_the_tokens_of_the_rule(
    grid: TokenGrid, block: int, tile: tuple[int, int, int] | None
) -> None:
    order = None if tile is None else TileOrder(grid, tile)
    mask = FrameCausalMask(grid)
    want = by_definition(grid)
    if order is not None:
        positions = order.positions(torch.device("cpu"))
        want = want[positions][:, positions]
    assert torch.equal(mask.blocks(block, order=order).dense()[0, 0], want)
    states = mask.block_states(Blocking(block, block, torch.device("cpu"), order))
    rows = want.split(block)
    for row, held in zip(states, rows, strict=True):
        for state, part in zip(row, held.split(block, dim=1), strict=True):
            assert (state == FULL) == bool(part.all())
            assert (state == EMPTY) == (not part.any())


@pytest.mark.parametrize(
    "method",
    [
        DenseAttn(),
        GNAAttn(window=(4, 3, 3)),
        GNAAttn(window=(4, 2, 4), stride=(2, 2, 4)),
        CLEARAttn(radius=2, frame_radius=3),
        RadialAttn(rule="paper"),
        RadialAttn(),
        FreeSwimAttn(),
    ],
    ids=lambda method: (
        f"{method.type}-{getattr(method, 'rule', '')}{getattr(method, 'stride', '')}"
    ),
)
@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_methods_keep_the_rule(grid: TokenGrid, method: StaticMaskMethod) -> None:
    free = TokenGrid(grid.frames, grid.height, grid.width, grid.text_before, grid.text_after)
    method = method.for_model("skyreels-v2", grid.alone)
    want = method.mask(free).dense() & by_definition(grid)
    assert torch.equal(method.mask(grid).dense(), want)
    assert want.diagonal().all()
    layout = method.layout(grid, torch.device("cpu"), method.order(grid))
    assert int(layout.full_count.sum() + layout.partial_count.sum()) > 0
    assert method.mask(grid).density == pytest.approx(want.double().mean().item())


def test_numbers_of_frames() -> None:
    with pytest.raises(ValueError, match="causal_frames is -1, but cannot be negative"):
        TokenGrid(2, 2, 2, causal_frames=-1)
    with pytest.raises(TypeError, match=r"causal_frames is 1\.5, but must be an integer"):
        TokenGrid(2, 2, 2, causal_frames=1.5)  # type: ignore[arg-type]
