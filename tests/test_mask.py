"""Masks, their algebra, and the block layouts built from them."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn import AttentionMask, DenseAttn, FullMask, PredicateMask, RadialAttn, TokenGrid
from diffattn.blocks import EMPTY, FULL, PARTIAL, layout_from_states, pack_bits, unpack_bits
from diffattn.masks.base import Blocking, BlockMapMask, TextMask, allowed_pairs

GRID = TokenGrid(3, 4, 5, text_before=2, text_after=7)


def causal(grid: TokenGrid) -> AttentionMask:
    return PredicateMask(grid, lambda query, key: key <= query)


def checkers(grid: TokenGrid, block_size: int) -> AttentionMask:
    n = -(-grid.tokens // block_size)
    block = torch.arange(n)
    return BlockMapMask(grid, (block[:, None] + block[None, :]) % 2 == 0, block_size)


def every_mask(grid: TokenGrid) -> dict[str, AttentionMask]:
    return {
        "full": FullMask(grid),
        "text": TextMask(grid),
        "causal": causal(grid),
        "some queries": PredicateMask(grid, lambda query, key: query % 3 == 1),
        "some keys": PredicateMask(grid, lambda query, key: key < 20),
        "checkers": checkers(grid, 6),
        "band": RadialAttn(rule="paper").video_mask(grid),
    }


@pytest.mark.parametrize("blocks", [(1, 1), (6, 6), (7, 3), (16, 32), (128, 128)])
@pytest.mark.parametrize("name", every_mask(GRID))
def test_blocks_hold_exactly_the_tokens_of_the_rule(name: str, blocks: tuple[int, int]) -> None:
    mask = every_mask(GRID)[name]
    layout = mask.blocks(*blocks)
    token = torch.arange(GRID.tokens)
    want = mask.allowed(token[:, None], token[None, :]).expand(GRID.tokens, GRID.tokens)
    assert torch.equal(mask.dense(), want)
    assert torch.equal(layout.dense()[0, 0], want)
    states = mask.block_states(Blocking(*blocks, torch.device("cpu")))
    rows, columns = layout.rows, layout.columns
    assert states.shape == (rows, columns)
    for r in range(rows):
        for c in range(columns):
            held = want[r * blocks[0] : (r + 1) * blocks[0], c * blocks[1] : (c + 1) * blocks[1]]
            if states[r, c] == FULL:
                assert held.all()
            if states[r, c] == EMPTY:
                assert not held.any()
    assert mask.density == pytest.approx(want.double().mean().item(), abs=1e-12)


@given(
    first=st.sampled_from(sorted(every_mask(GRID))),
    second=st.sampled_from(sorted(every_mask(GRID))),
    blocks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=60, deadline=None)
def test_algebra(first: str, second: str, blocks: tuple[int, int]) -> None:
    a, b = every_mask(GRID)[first], every_mask(GRID)[second]
    cases = [
        (a & b, a.dense() & b.dense()),
        (a | b, a.dense() | b.dense()),
        (~a, ~a.dense()),
        (~(a & ~b), ~a.dense() | b.dense()),
    ]
    for mask, want in cases:
        assert torch.equal(mask.dense(), want)
        assert torch.equal(mask.blocks(*blocks).dense()[0, 0], want)


def test_full_mask_has_no_partial_blocks() -> None:
    layout = FullMask(GRID).blocks(16)
    assert layout.partial_blocks == 0
    assert layout.full_blocks == layout.rows * layout.columns
    assert layout.density == 1


def test_equal_bit_masks_are_stored_once() -> None:
    grid = TokenGrid(8, 8, 8)
    layout = causal(grid).blocks(16)
    assert layout.partial_blocks == layout.rows
    assert layout.bit_masks.shape == (1, 16, 1)


@dataclass(frozen=True, eq=False)
class Repeated(AttentionMask):
    """A user's mask: every block of 16 below the anti-diagonal holds the same pattern."""

    pattern: torch.Tensor

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        below = query // 16 + key // 16 >= self.grid.tokens // 16
        return below & self.pattern[query % 16, key % 16]

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        if (blocking.block_q, blocking.block_kv) != (16, 16):
            return super().block_states(blocking)
        block = torch.arange(-(-self.grid.tokens // 16), device=blocking.device)
        below = block[:, None] + block >= self.grid.tokens // 16
        return torch.where(below, PARTIAL, EMPTY).to(torch.uint8)

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor | None:
        whole = (blocking.block_q, blocking.block_kv) == (16, 16)
        return torch.zeros_like(row) if whole else None


@pytest.mark.parametrize(
    ("pattern", "full_at_the_end"),
    [
        pytest.param(lambda query, key: (query + key) % 3 != 1, 0, id="stripes"),
        pytest.param(lambda query, key: key < 8, 4, id="first-keys"),
        pytest.param(lambda query, key: query < 8, 4, id="first-queries"),
        pytest.param(lambda query, key: key >= 8, 0, id="last-keys"),
    ],
)
def test_short_blocks_are_like_no_whole_block_of_their_signature(
    pattern: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], full_at_the_end: int
) -> None:
    place = torch.arange(16)
    mask = Repeated(TokenGrid(1, 1, 56), pattern(place[:, None], place).expand(16, 16))
    layout = mask.blocks(16)
    assert torch.equal(layout.dense()[0, 0], mask.dense())
    assert layout.full_blocks == full_at_the_end
    assert allowed_pairs(layout) == int(mask.dense().sum())


def test_layout_is_built_once_per_block_size() -> None:
    mask = causal(GRID)
    assert mask.blocks(16) is mask.blocks(16, 16)
    assert mask.blocks(16) is not mask.blocks(16, 8)


def test_masks_of_different_grids_do_not_combine() -> None:
    with pytest.raises(ValueError, match="different grids cannot be combined: 3x4x5"):
        FullMask(GRID) & FullMask(TokenGrid(1, 1, 1))


@pytest.mark.parametrize("size", [0, -1, 1.5, 100_000, "128", True])
def test_block_sizes_are_integers_of_a_sound_size(size: Any) -> None:
    with pytest.raises(
        ValueError, match=r"block sizes must be integers from 1 to 8192, not .* x 16"
    ):
        FullMask(GRID).blocks(size, 16)
    with pytest.raises(ValueError, match="block sizes must be integers from 1 to 8192, not 16 x "):
        FullMask(GRID).blocks(16, size)


@pytest.mark.parametrize("other", [torch.ones(60, 60), True, "radial"])
def test_masks_combine_with_masks_alone(other: Any) -> None:
    for combine in (operator.and_, operator.or_):
        with pytest.raises(TypeError, match="a mask combines with another mask, not with a "):
            combine(FullMask(GRID), other)


@pytest.mark.parametrize("grid", ["21x30x52", (21, 30, 52), None])
def test_methods_have_masks_on_token_grids(grid: Any) -> None:
    with pytest.raises(TypeError, match=r"^grid is .*, but must be a TokenGrid, such as TokenGrid"):
        DenseAttn().mask(grid)


def test_block_map_must_fit_the_grid() -> None:
    with pytest.raises(ValueError, match=r"69 tokens in blocks of 16 make 5 x 5"):
        BlockMapMask(GRID, torch.ones(4, 4, dtype=torch.bool), 16)


def test_layout_checks_its_states() -> None:
    states = torch.full((2, 2), PARTIAL, dtype=torch.uint8)
    sizes = {"block_q": 8, "block_kv": 8}
    with pytest.raises(ValueError, match=r"states has shape \(2, 2\), but 20 x 16 tokens"):
        layout_from_states(states, None, tokens_q=20, tokens_kv=16, **sizes)
    with pytest.raises(ValueError, match="4 blocks are partial, but no bits were given"):
        layout_from_states(states, None, tokens_q=16, tokens_kv=16, **sizes)


@given(n=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_bits_survive_packing(n: int, seed: int) -> None:
    mask = torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), n), mask)
    words = sum(mask[:, :32].long()[:, j] << j for j in range(min(n, 32)))
    assert torch.equal(pack_bits(mask)[:, 0].long() & 0xFFFFFFFF, words)


@pytest.mark.parametrize("view", [lambda m: m.T[:32], lambda m: m[5], lambda m: m[:1, 7:39]])
def test_bits_of_views_are_packed(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    mask = view(torch.rand(64, 65, generator=torch.Generator().manual_seed(1)) < 0.5)
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape[-1]), mask)
    wide = mask[..., :1].expand(*mask.shape[:-1], 96)
    assert torch.equal(unpack_bits(pack_bits(wide), 96), wide)


def test_layout_moves_between_devices() -> None:
    layout = causal(GRID).blocks(16)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert moved.full_index.shape == layout.full_index.shape
