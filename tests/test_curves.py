"""Curves over grids, against golden vectors and their definitions."""

import re

import pytest
import torch
from content_goldens import read
from golden_files import matching
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn import TokenGrid
from diffattn.curves import CURVES, along_curve

(ORDERS,) = matching("sol/o00_orders.npz", 1)
NAMES = {"morton_3d": "morton", "morton_2d_frame": "morton-frame", "hilbert": "hilbert"}


@pytest.mark.parametrize("name", [n for n in read(ORDERS).values if "start" not in n])
def test_public_orders(name: str) -> None:
    kind, sizes = re.fullmatch(r"(.+)_(\d+x\d+x\d+)", name).groups()
    grid = TokenGrid(*map(int, sizes.split("x")))
    assert torch.equal(along_curve(grid, NAMES[kind]), read(ORDERS).values[name].long())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from(CURVES))
@settings(max_examples=40, deadline=None)
def test_every_token_comes_once(frames: int, height: int, width: int, curve: str) -> None:
    order = along_curve(TokenGrid(frames, height, width, 3, 2), curve)
    assert torch.equal(order.sort().values, torch.arange(frames * height * width))


@pytest.mark.parametrize("side", [2, 4, 8])
def test_hilberts_curve_goes_from_neighbour_to_neighbour(side: int) -> None:
    grid = TokenGrid(side, side, side)
    order = along_curve(grid, "hilbert")
    places = torch.stack(grid.coordinates(order), 1)
    assert places[0].tolist() == [0, 0, 0]
    assert (places.diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("curve", CURVES)
def test_blocks_of_a_curve_are_compact(curve: str) -> None:
    """Less than a tenth of the distance within blocks of rows, as sol.md says."""
    grid = TokenGrid(8, 30, 52)
    spread = []
    for order in (torch.arange(grid.tokens), along_curve(grid, curve)):
        places = torch.stack(grid.coordinates(order), 1).float()[: 64 * 195].unflatten(0, (-1, 64))
        spread.append((places - places.mean(1, keepdim=True)).square().sum(-1).mean())
    assert spread[1] < spread[0] * (0.25 if curve == "morton-frame" else 0.1)


def test_an_unknown_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="curve is 'peano', but must be one of morton, morton-fr"):
        along_curve(TokenGrid(1, 2, 3), "peano")  # type: ignore[arg-type]
