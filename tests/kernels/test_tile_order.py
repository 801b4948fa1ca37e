"""The order in which programs take the tiles of all heads."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from diffattn.kernels.common.primitives import FIRST_TILES, tile_of_program


@triton.jit
def numbers_kernel(p_numbers, tiles, heads):
    i_tile, i_b, i_h, i_layout = tile_of_program(tiles, heads, 100, 1)
    p_own = p_numbers + tl.program_id(0) * 4
    tl.store(p_own, i_tile)
    tl.store(p_own + 1, i_b)
    tl.store(p_own + 2, i_h)
    tl.store(p_own + 3, i_layout)


@pytest.mark.parametrize(
    ("batch", "heads", "tiles"), [(1, 1, 1), (2, 3, 1), (1, 5, 7), (2, 3, 8), (1, 3, 9), (2, 2, 21)]
)
def test_first_tiles_of_all_heads_then_head_by_head(
    batch: int, heads: int, tiles: int, device: str
) -> None:
    numbers = torch.zeros(batch * heads * tiles, 4, dtype=torch.int32, device=device)
    numbers_kernel[(len(numbers),)](numbers, tiles, heads)
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    first = min(tiles, FIRST_TILES.value)
    expected = [(tile, b, h, 100 * b + h) for tile in range(first) for b, h in pairs]
    expected += [(tile, b, h, 100 * b + h) for b, h in pairs for tile in range(first, tiles)]
    assert [tuple(row) for row in numbers.tolist()] == expected
