"""Tile orders: exact permutations, compact blocks, and layouts and attention in them."""

import itertools
import math
from typing import Any

import golden_files
import numpy as np
import pytest
import stock
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn import AttentionMask, FullMask, PredicateMask, RadialAttn, TokenGrid
from diffattn.attach.compiled import remember, traced_attention
from diffattn.attach.context_parallel import attend_queries
from diffattn.kernels.reference import reference_attention
from diffattn.masks.base import Blocking, BlockMapMask, TextMask
from diffattn.masks.neighbourhood import AxisWindow, NeighbourhoodMask
from diffattn.methods import DenseAttn, Site
from diffattn.operator import attention, attention_gradients
from diffattn.orders import TileOrder, permuted, tile_for

GRIDS = [
    TokenGrid(5, 7, 11),
    TokenGrid(4, 8, 16),
    TokenGrid(1, 9, 13, text_before=5),
    TokenGrid(3, 5, 7, text_before=2, text_after=9),
    TokenGrid(1, 1, 1),
    TokenGrid(2, 3, 2, text_after=1),
]
TILES = [(2, 4, 4), (1, 1, 1), (4, 4, 8), (1, 3, 5)]

sizes = st.integers(1, 9)
text = st.integers(0, 12)


def window(grid: TokenGrid, *radius: int) -> AttentionMask:
    """Pairs of video tokens that are at most so far apart along each axis."""

    def near(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        apart = [
            (q - k).abs()
            for q, k in zip(grid.coordinates(query), grid.coordinates(key), strict=True)
        ]
        return (apart[0] <= radius[0]) & (apart[1] <= radius[1]) & (apart[2] <= radius[2])

    return PredicateMask(grid, near)


def golden_permutations() -> dict[str, dict[str, Any]]:
    """NATTEN's permutations by name: grid, tile, dilation, and the tokens of each class."""
    golden = np.load(golden_files.GOLDENS / "gna" / "permutations.npz")
    names = [key.removesuffix("_flip0") for key in golden.files if key.endswith("_flip0")]
    out = {}
    for name in names:
        shape, tile, dilation = (
            (1,) * (3 - golden[f"{name}_{k}"].size) + tuple(golden[f"{name}_{k}"].tolist())
            for k in ("shape", "tile", "dilation")
        )
        order = torch.from_numpy(golden[f"{name}_flip0"]).long()
        out[name] = {"grid": TokenGrid(*shape), "tile": tile, "dilation": dilation, "order": order}
    return out


class TestGoldens:
    # Tiles of interleaved tokens are NATTEN's alone.
    @pytest.mark.parametrize(
        "name", [name for name, case in golden_permutations().items() if max(case["dilation"]) == 1]
    )
    def test_whole_tiles_come_as_in_natten(self, name: str) -> None:
        grid, tile, _, order = golden_permutations()[name].values()
        # What is left over fills tiles with padding there, and comes last here.
        tiles = order[0].view(-1, math.prod(tile))
        whole = tiles[(tiles >= 0).all(1)].flatten()
        ours = TileOrder(grid, tile).positions()
        assert torch.equal(ours[: len(whole)], whole)
        left_over = sorted(set(range(grid.tokens)) - set(whole.tolist()))
        assert sorted(ours[len(whole) :].tolist()) == left_over

    @pytest.mark.parametrize("name", golden_permutations())
    def test_classes_of_a_dilation_are_nattens(self, name: str) -> None:
        grid, _, dilation, order = golden_permutations()[name].values()
        # As wide as it goes: every token of a class sees those that its windows reach.
        sizes = (grid.frames, grid.height, grid.width)
        axes = [
            AxisWindow(size, size // step, dilation=step)
            for size, step in zip(sizes, dilation, strict=True)
        ]
        mask = NeighbourhoodMask(grid, tuple(axes)).dense()
        of_class = torch.empty(grid.tokens, dtype=torch.int64)
        for number, tokens in enumerate(order):
            of_class[tokens[tokens >= 0]] = number
        assert not (mask & (of_class[:, None] != of_class)).any()
        assert (mask.sum(1) == math.prod(axis.window for axis in axes)).all()
        counts = {int(n) for n in of_class.bincount()}
        lengths = [[c.size for c in axis.classes()] for axis in axes]
        assert counts == {math.prod(combination) for combination in itertools.product(*lengths)}


class TestPermutation:
    @given(
        grid=st.builds(
            TokenGrid, frames=sizes, height=sizes, width=sizes, text_before=text, text_after=text
        ),
        tile=st.tuples(sizes, sizes, sizes),
    )
    @settings(max_examples=60, deadline=None)
    def test_every_token_has_one_place_and_text_its_own(
        self, grid: TokenGrid, tile: tuple[int, int, int]
    ) -> None:
        positions = TileOrder(grid, tile).positions()
        token = torch.arange(grid.tokens)
        assert torch.equal(positions.sort().values, token)
        is_text = grid.is_text(token)
        assert torch.equal(positions[is_text], token[is_text])

    @given(
        grid=st.builds(
            TokenGrid, frames=sizes, height=sizes, width=sizes, text_before=text, text_after=text
        ),
        tile=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    )
    @settings(max_examples=60, deadline=None)
    def test_whole_tiles_are_whole_blocks(
        self, grid: TokenGrid, tile: tuple[int, int, int]
    ) -> None:
        size = math.prod(tile)
        blocks = TileOrder(grid, tile).positions().split(size)
        found = set()
        for block in blocks:
            if len(block) < size or grid.is_text(block).any():
                continue
            places = torch.stack(grid.coordinates(block), -1)
            corner = places.amin(0)
            box = [torch.arange(c, c + side) for c, side in zip(corner.tolist(), tile, strict=True)]
            in_tile = torch.equal(places, torch.cartesian_prod(*box).view(-1, 3))
            if in_tile and not (corner % torch.tensor(tile)).any():
                found.add(tuple(corner.tolist()))
        axes = (grid.frames, grid.height, grid.width)
        whole = math.prod(n // side for n, side in zip(axes, tile, strict=True))
        # Where text before the video leaves less than a block's worth of room and nothing else is
        # left over to fill it, the last tile is cut for it.
        left_over = grid.video_tokens - whole * size
        cut = -grid.text_before % size > left_over and whole > 0
        assert len(found) == whole - cut

    def test_tiles_follow_each_other_in_raster_order(self) -> None:
        grid = TokenGrid(4, 4, 4, text_before=3)
        positions = TileOrder(grid, (2, 2, 4)).positions()
        assert positions[:3].tolist() == [0, 1, 2]
        # 13 tokens of the last tile fill up the block that text begins, and end the sequence less.
        first = positions[16:32] - 3
        assert first.tolist() == [
            t * 16 + h * 4 + w for t in (0, 1) for h in (0, 1) for w in range(4)
        ]
        second = positions[32:48] - 3
        assert second.tolist() == [
            t * 16 + h * 4 + w for t in (0, 1) for h in (2, 3) for w in range(4)
        ]

    def test_what_is_left_over_is_laid_out_in_boxes_too(self) -> None:
        # Five frames in tiles of two: the last one's blocks of 16 are squares, not strips.
        grid = TokenGrid(5, 8, 8)
        last = TileOrder(grid, (2, 2, 4)).positions()[-64:]
        for block in last.split(16):
            frame, row, column = grid.coordinates(block)
            assert (frame == 4).all()
            assert int(row.max() - row.min()) == 3
            assert int(column.max() - column.min()) == 3

    @pytest.mark.parametrize("tile", TILES)
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_there_and_back(self, grid: TokenGrid, tile: tuple[int, int, int]) -> None:
        order = TileOrder(grid, tile)
        for tokens in (grid.tokens, grid.video_tokens):
            x = torch.randn(2, tokens, 3)
            assert torch.equal(order.from_tiles(order.to_tiles(x)), x)
            moved = order.to_tiles(x.mT, dim=-1)
            assert torch.equal(moved, order.to_tiles(x).mT)
        token = torch.arange(grid.tokens)
        assert torch.equal(order.to_tiles(token, dim=0), order.positions())
        video = token[grid.video]
        assert torch.equal(order.to_tiles(video, dim=0), order.positions()[grid.video])

    def test_gradients_take_the_way_back(self) -> None:
        order = TileOrder(GRIDS[3], (2, 2, 4))
        x = torch.randn(2, GRIDS[3].tokens, 3, requires_grad=True, dtype=torch.float64)
        weight = torch.randn_like(x)
        (order.to_tiles(x) * weight).sum().backward()
        assert torch.equal(x.grad, order.from_tiles(weight))
        assert torch.autograd.gradgradcheck(order.to_tiles, x)

    def test_made_in_inference_mode_it_serves_training(self) -> None:
        order = TileOrder(GRIDS[0], (2, 4, 4))
        with torch.inference_mode():
            order.positions()
        x = torch.randn(1, GRIDS[0].tokens, 2, requires_grad=True)
        order.to_tiles(x)[:, order.positions().argsort()].sum().backward()
        assert x.grad is not None

    @given(
        sizes=st.tuples(*[st.integers(1, 6)] * 3),
        tile=st.tuples(*[st.sampled_from([1, 2, 3, 6, 8])] * 3),
        before=st.sampled_from([0, 1, 6, 48]),
    )
    @settings(deadline=None)
    def test_an_order_knows_whether_it_is_the_sequences(
        self, sizes: tuple[int, int, int], tile: tuple[int, int, int], before: int
    ) -> None:
        grid = TokenGrid(*sizes, text_before=before)
        order = TileOrder(grid, tile)
        assert order.is_in_place == torch.equal(order.positions(), torch.arange(grid.tokens))

    def test_equal_orders_are_equal(self) -> None:
        grid = GRIDS[0]
        assert TileOrder(grid, (2, 2, 4)) == TileOrder(TokenGrid(5, 7, 11), (2, 2, 4))
        assert TileOrder(grid, (2, 2, 4)) != TileOrder(grid, (2, 4, 2))
        assert repr(TileOrder(grid, (2, 2, 4))).endswith("tile=(2, 2, 4), beside=())")


class TestBadInput:
    @pytest.mark.parametrize("tile", [(2, 4), (0, 4, 4), (2, 2, -1)])
    def test_a_tile_is_three_positive_sizes(self, tile: Any) -> None:
        with pytest.raises(ValueError, match=r"tile is \(.*\), but must be frames, rows and colum"):
            TileOrder(GRIDS[0], tile)

    def test_tokens_must_be_those_of_the_grid(self) -> None:
        grid = TokenGrid(2, 2, 2, text_after=3)
        message = (
            r"dimension 1 of a tensor of shape \(1, 10\) has neither the 11 tokens of 2x2x2\+3"
        )
        with pytest.raises(ValueError, match=message + " text nor its 8 video tokens"):
            TileOrder(grid, (1, 2, 2)).to_tiles(torch.zeros(1, 10))

    def test_mask_and_order_must_be_over_one_grid(self) -> None:
        order = TileOrder(TokenGrid(2, 2, 3), (1, 2, 2))
        with pytest.raises(ValueError, match="the order is over 2x2x3, but the mask over 2x2x2"):
            FullMask(TokenGrid(2, 2, 2)).blocks(4, order=order)


class TestChoice:
    @pytest.mark.parametrize("grid", [TokenGrid(21, 30, 52), TokenGrid(1, 64, 64), GRIDS[4]])
    @pytest.mark.parametrize("block_size", [128, 64, 96])
    def test_a_tile_is_a_block(self, grid: TokenGrid, block_size: int) -> None:
        tile = tile_for(grid, block_size)
        assert math.prod(tile) == block_size
        if grid.tokens > 1:
            axes = (grid.frames, grid.height, grid.width)
            assert all(side <= axis for side, axis in zip(tile, axes, strict=True))

    def test_tiles_are_long_where_windows_are_wide(self) -> None:
        grid = TokenGrid(21, 30, 52)
        assert tile_for(grid, window=(7, 15, 15)) == (2, 8, 8)
        assert tile_for(grid, window=(21, 9, 9)) == (16, 4, 2)
        assert tile_for(TokenGrid(1, 80, 80), window=(1, 9, 80))[2] == 64


def masks(grid: TokenGrid) -> dict[str, AttentionMask]:
    n = -(-grid.tokens // 6)
    block = torch.arange(n)
    checkers = BlockMapMask(grid, (block[:, None] + block) % 2 == 0, 6)
    return {
        "full": FullMask(grid),
        "text": TextMask(grid),
        "window": window(grid, 1, 1, 2),
        "window and text": TextMask(grid) | window(grid, 1, 1, 2),
        "neither": ~(TextMask(grid) | window(grid, 1, 1, 2)),
        "checkers": checkers,
        "both": checkers & TextMask(grid),
        "band": RadialAttn(rule="paper").mask(grid),
    }


class TestLayouts:
    # Of blocks of 6, the checkers' own, many would be empty or full if tokens kept their places.
    @pytest.mark.parametrize("blocks", [(16, 16), (7, 32), (6, 6)])
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    @pytest.mark.parametrize("name", masks(GRIDS[0]))
    def test_a_layout_in_an_order_is_the_mask_permuted(
        self, name: str, grid: TokenGrid, blocks: tuple[int, int]
    ) -> None:
        mask, order = masks(grid)[name], TileOrder(grid, (2, 2, 4))
        there = order.positions()
        layout = mask.blocks(*blocks, order=order)
        assert torch.equal(layout.dense()[0, 0], mask.dense()[there][:, there])

    def test_layouts_are_kept_by_order(self) -> None:
        mask = window(GRIDS[0], 1, 1, 2)
        order = TileOrder(GRIDS[0], (2, 2, 4))
        assert mask.blocks(16, order=order) is mask.blocks(16, order=TileOrder(*_parts(order)))
        assert mask.blocks(16, order=order) is not mask.blocks(16)
        assert mask.blocks(16, order=order) is not mask.blocks(
            16, order=TileOrder(GRIDS[0], (2, 4, 2))
        )
        assert mask.density == pytest.approx(mask.dense().double().mean().item(), abs=1e-12)

    def test_full_and_text_masks_are_not_looked_at_token_by_token(self) -> None:
        grid = TokenGrid(3, 8, 8, text_before=5, text_after=40)
        order = TileOrder(grid, (1, 4, 4))
        assert FullMask(grid).blocks(16, order=order).partial_blocks == 0
        for mask in (TextMask(grid), ~TextMask(grid), TextMask(grid) & FullMask(grid)):
            device = torch.device("cpu")
            raster = mask.block_states(Blocking(16, 16, device))
            assert torch.equal(mask.block_states(Blocking(16, 16, device, order)), raster)

    @pytest.mark.parametrize(
        ("grid", "raster_blocks", "full", "partial"),
        [
            (TokenGrid(8, 16, 32), 16864, 704, 6776),
            (TokenGrid(9, 17, 33), 23054, 754, 9644),  # no axis is a multiple of the tile's
        ],
        ids=str,
    )
    def test_a_window_visits_less_than_half_the_blocks_in_tiles(
        self, grid: TokenGrid, raster_blocks: int, full: int, partial: int
    ) -> None:
        mask = window(grid, 2, 4, 4)
        raster = mask.blocks(16)
        assert (raster.full_blocks, raster.partial_blocks) == (0, raster_blocks)
        tiled = mask.blocks(16, order=TileOrder(grid, (2, 2, 4)))
        assert (tiled.full_blocks, tiled.partial_blocks) == (full, partial)

    def test_aligned_windows_have_no_partial_blocks_in_tiles(self) -> None:
        grid = TokenGrid(8, 16, 16)
        tile = (4, 4, 8)

        def same_tile(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            near = torch.ones((), dtype=torch.bool)
            for q, k, side in zip(
                grid.coordinates(query), grid.coordinates(key), tile, strict=True
            ):
                near = near & (q // side == k // side)
            return near

        mask = PredicateMask(grid, same_tile)
        tiled = mask.blocks(128, order=TileOrder(grid, tile))
        assert (tiled.full_blocks, tiled.partial_blocks) == (16, 0)
        raster = mask.blocks(128)
        assert (raster.full_blocks, raster.partial_blocks) == (0, 64)


def _parts(order: TileOrder) -> tuple[TokenGrid, tuple[int, int, int]]:
    return order.grid, order.tile


def inputs(grid: TokenGrid, batch: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(batch, grid.tokens, 2, 8, generator=generator) for _ in range(3)]
    key_mask = torch.rand(batch, grid.tokens, generator=generator) < 0.8
    return qkv, key_mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
class TestAttention:
    def test_output_and_gradients_are_those_of_the_mask(
        self, grid: TokenGrid, masked: bool
    ) -> None:
        qkv, key_mask = inputs(grid)
        leaves = [x.requires_grad_() for x in qkv]
        doubles = [x.detach().double().requires_grad_() for x in qkv]
        options = {"scale": 0.3, "key_mask": key_mask if masked else None}
        want, _ = reference_attention(
            *doubles, stock.IN_TILES.mask(grid).dense()[None, None], **options
        )
        out = stock.IN_TILES.attend(*leaves, Site("wan", 0, 1, grid), **options)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        (want * weight).sum().backward()
        for leaf, double in zip(leaves, doubles, strict=True):
            torch.testing.assert_close(leaf.grad.double(), double.grad, atol=1e-5, rtol=1e-5)

    def test_tokens_may_come_in_an_order_already(self, grid: TokenGrid, masked: bool) -> None:
        qkv, key_mask = inputs(grid)
        order = TileOrder(grid, (1, 4, 4))  # another than its own
        options = {"scale": 0.3, "key_mask": key_mask if masked else None}
        moved = options | {"key_mask": order.to_tiles(key_mask) if masked else None}
        for method in (stock.IN_TILES, stock.NEARBY, DenseAttn()):
            want = method.attend(*qkv, Site("wan", 0, 1, grid), **options)
            site = Site("wan", 0, 1, grid, order)
            out = method.attend(*(order.to_tiles(x) for x in qkv), site, **moved)
            torch.testing.assert_close(order.from_tiles(out), want)

    def test_compiled_code_permutes_as_eager_does(self, grid: TokenGrid, masked: bool) -> None:
        qkv, key_mask = inputs(grid)
        weight = torch.randn_like(qkv[0])
        site = Site("wan", 0, 1, grid)
        options = {"scale": 0.3, "key_mask": key_mask if masked else None}
        serial = remember(stock.IN_TILES)
        order = TileOrder(grid, (1, 4, 4))
        moved = options | {"key_mask": order.to_tiles(key_mask) if masked else None}

        def in_another_order(*qkv: torch.Tensor) -> torch.Tensor:
            out = traced_attention(
                *(order.to_tiles(x) for x in qkv), grid, serial, order=order, **moved
            )
            return order.from_tiles(out)

        results = []
        for function in (
            lambda *qkv: stock.IN_TILES.attend(*qkv, site, **options),
            lambda *qkv: traced_attention(*qkv, grid, serial, **options),
            in_another_order,
        ):
            leaves = [x.detach().clone().requires_grad_() for x in qkv]
            out = function(*leaves)
            (out * weight).sum().backward()
            results.append([out, *(x.grad for x in leaves)])
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                torch.testing.assert_close(got, want)

    def test_some_queries_are_computed_without_the_order(
        self, grid: TokenGrid, masked: bool
    ) -> None:
        qkv, key_mask = inputs(grid)
        site = Site("wan", 0, 1, grid)
        options = {"scale": 0.3, "key_mask": key_mask if masked else None}
        part = range(grid.tokens // 3, grid.tokens)
        want = stock.IN_TILES.attend(*qkv, site, **options)[:, part.start :]
        query = qkv[0][:, part.start :]
        out = attend_queries(stock.IN_TILES, query, *qkv[1:], site, (part,), **options)
        torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


class TestAttentionInAnOrder:
    GRID = TokenGrid(3, 5, 7, text_before=2, text_after=9)

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    @pytest.mark.parametrize("as_layout", [False, True], ids=["mask", "layout"])
    def test_tensors_come_and_go_in_the_sequences_order(
        self, as_layout: bool, backend: str
    ) -> None:
        qkv, key_mask = inputs(self.GRID)
        qkv = [x.requires_grad_() for x in qkv]
        mask = window(self.GRID, 1, 2, 2) | TextMask(self.GRID)
        order = TileOrder(self.GRID, (2, 3, 4))
        given = mask.blocks(16, 24, order=order) if as_layout else mask
        weight = torch.randn(qkv[0].shape)

        def gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad((out * weight).sum(), qkv)

        want, want_lse = reference_attention(*qkv, mask.dense(), key_mask=key_mask)
        out, lse = attention(
            *qkv, given, order=order, key_mask=key_mask, return_lse=True, backend=backend
        )
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
        wanted = gradients(want)
        for found in (
            gradients(out),
            attention_gradients(
                weight, *qkv, out, lse, mask.blocks(order=order), order=order, key_mask=key_mask
            ),
        ):
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    def test_an_order_of_other_tokens_is_refused(self) -> None:
        qkv, _ = inputs(self.GRID)
        other = TileOrder(TokenGrid(3, 5, 7), (2, 3, 4))
        mask = window(self.GRID, 1, 1, 1)
        with pytest.raises(ValueError, match=r"the order is over .*, but the mask over"):
            attention(*qkv, mask, order=other)
        with pytest.raises(ValueError, match="over 105 tokens, but the mask over 116 x 116; make"):
            attention(*qkv, mask.blocks(), order=other)


def test_a_methods_order_is_kept_with_its_permutation() -> None:
    grid = GRIDS[0]
    method = stock.NearbyInTiles()
    assert method.order(grid) is method.order(grid)
    assert method.order_on(grid) is not method.order_on(grid)
    assert stock.NEARBY.order(grid) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "first"), [(8, 0), (8, 3), (3, 0)])
@pytest.mark.parametrize("dim", [0, 1, -2, 2])
def test_a_permutation_moves_every_element_and_its_gradient(
    dtype: torch.dtype, channels: int, first: int, dim: int
) -> None:
    """In words of eight bytes where rows have whole words that begin at one."""
    numbers = torch.randint(-100, 100, (first + 4 * 5 * channels,)).to(dtype)
    x = numbers[first:].view(4, 5, channels)
    there = torch.randperm(x.shape[dim])
    want = x.movedim(dim, 0)[there].movedim(0, dim)
    with torch.no_grad():
        assert torch.equal(permuted(x, there, there.argsort(), dim), want)
    if dtype.is_floating_point:
        leaf = x.detach().requires_grad_()
        moved = permuted(leaf, there, there.argsort(), dim)
        (gradient,) = torch.autograd.grad(moved, leaf, moved.detach())
        assert torch.equal(gradient, x)


def test_a_dimension_of_one_element_has_any_stride() -> None:
    x = torch.arange(16.0).as_strided((1, 2, 8), (3, 8, 1))
    assert torch.equal(permuted(x, torch.tensor([1, 0]), torch.tensor([1, 0]), 1), x.flip(1))
    one = torch.ones(1).as_strided((1, 1, 1), (2, 2, 2))
    assert torch.equal(permuted(one, torch.tensor([0]), torch.tensor([0]), 1), one)
