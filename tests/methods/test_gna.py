"""GNAAttn against NATTEN's masks, the rule of the paper pair by pair, and its own promises."""

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_files
import numpy as np
import pytest
import stock
import tiny_wan
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import BATCH, CASES, Case, noise

import diffattn
from diffattn import GNAAttn, TokenGrid
from diffattn.attach.denoiser import attached_to
from diffattn.blocks import FULL
from diffattn.kernels.reference import reference_attention
from diffattn.masks.base import Blocking
from diffattn.masks.block_geometry import boxes_of
from diffattn.masks.neighbourhood import AxisWindow, NeighbourhoodMask
from diffattn.methods import Site, from_dict
from diffattn.methods.gna import _pairs_in_tiles, is_block_sparse, nearest_block_sparse
from diffattn.orders import TileOrder

GOLDENS = golden_files.GOLDENS / "gna"
CPU = torch.device("cpu")


def grid_of(shape: Any, **text: int) -> TokenGrid:
    """The grid of a shape of one to three axes; those that are left out have one token."""
    return TokenGrid(*[1] * (3 - len(shape)), *(int(size) for size in shape), **text)


def tile_of(shape: list[int]) -> Any:
    return (*[1] * (3 - len(shape)), *shape)


def golden_method(golden: Any) -> GNAAttn:
    return GNAAttn(
        window=tuple(map(int, golden["window"])),
        stride=tuple(map(int, golden["stride"])),
        dilation=tuple(map(int, golden["dilation"])),
        is_causal=tuple(map(bool, golden["causal"])),
    )


def attends(x: int, k: int, size: int, window: int, s: int, d: int, causal: bool) -> bool:
    """Section 1.2 of the specification for query x and key k of an axis, one line after another."""
    if k % d != x % d:
        return False
    p, t = x // d, k // d
    length = math.ceil((size - x % d) / d)
    g = (p // s) * s
    if causal:
        e = min(g + s - 1, length - 1)
        lo, hi = max(e - window + 1, 0), p + 1
    else:
        e = min(g + s // 2, length - 1)
        lo = min(max(e - window // 2, 0), length - window)
        hi = lo + window
    return lo <= t < hi


@functools.cache
def axis_by_definition(axis: AxisWindow) -> torch.Tensor:
    rule = (axis.window, axis.stride, axis.dilation, axis.is_causal)
    places = range(axis.size)
    return torch.tensor([[attends(x, k, axis.size, *rule) for k in places] for x in places])


def by_definition(grid: TokenGrid, axes: tuple[AxisWindow, ...]) -> torch.Tensor:
    """The mask of a whole sequence, its text dense, from the masks of the axes."""
    frame, row, column = grid.coordinates(torch.arange(grid.tokens).clamp(max=grid.video.stop - 1))
    want = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for axis, place in zip(axes, (frame, row, column), strict=True):
        place = place.clamp(min=0)
        want &= axis_by_definition(axis)[place][:, place]
    text = grid.is_text(torch.arange(grid.tokens))
    return want | text[:, None] | text


def every_axis(longest: int) -> list[AxisWindow]:
    """Every setting of every axis of up to so many tokens."""
    return [
        AxisWindow(size, window, stride, dilation, causal)
        for size in range(2, longest + 1)
        for window in range(1, size + 1)
        for dilation in range(1, size // window + 1)
        for stride in range(1, window + 1)
        for causal in (False, True)
    ]


@st.composite
def axis_settings(draw: Any, size: int) -> tuple[int, int, int, bool]:
    if size == 1:  # whatever is said of it must not matter
        return 3, draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.booleans())
    window = draw(st.integers(1, size))
    dilation = draw(st.integers(1, size // window))
    return window, draw(st.integers(1, window)), dilation, draw(st.booleans())


@st.composite
def grids_and_methods(draw: Any, text: int = 9) -> tuple[TokenGrid, GNAAttn]:
    sizes = [draw(st.integers(1, 7)) for _ in range(3)]
    texts = st.integers(0, text)
    chosen = [draw(axis_settings(size)) for size in sizes]
    window, stride, dilation, causal = zip(*chosen, strict=True)
    method = GNAAttn(window=window, stride=stride, dilation=dilation, is_causal=causal)
    return TokenGrid(*sizes, draw(texts), draw(texts)), method


class TestMask:
    @pytest.mark.parametrize("path", golden_files.matching("gna/m*.npz", 18), ids=lambda p: p.stem)
    def test_it_is_nattens_token_for_token(self, path: Path) -> None:
        golden = np.load(path)
        tokens = int(golden["n"])
        want = np.unpackbits(golden["mask_packed"], axis=-1, count=tokens).astype(bool)
        mask = golden_method(golden).mask(grid_of(golden["shape"]))
        np.testing.assert_array_equal(mask.dense().numpy(), want)
        for block in (16, 7):
            np.testing.assert_array_equal(mask.blocks(block).dense()[0, 0].numpy(), want)
        assert mask.density == pytest.approx(want.mean(), abs=1e-12)

    def test_every_setting_of_every_short_axis(self) -> None:
        for axis in every_axis(16):
            place = torch.arange(axis.size)
            allowed = axis.allowed(place[:, None], place)
            assert torch.equal(allowed, axis_by_definition(axis)), axis

    def test_every_setting_of_small_images(self) -> None:
        for height, width in [(4, 5), (3, 6)]:
            grid = TokenGrid(1, height, width)
            axes = every_axis(6)
            rows = [axis for axis in axes if axis.size == height]
            columns = [axis for axis in axes if axis.size == width]
            for pair in itertools.product(rows, columns):
                names = ("window", "stride", "dilation", "is_causal")
                given = {name: tuple(getattr(axis, name) for axis in pair) for name in names}
                mask = GNAAttn(**given).mask(grid).dense()
                want = torch.kron(*map(axis_by_definition, pair))
                assert torch.equal(mask, want), pair

    @given(
        grid_and_method=grids_and_methods(),
        block_q=st.integers(1, 24),
        block_kv=st.integers(1, 24),
        tile=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    )
    @settings(max_examples=80, deadline=None)
    def test_with_text_in_any_blocks_and_order(
        self,
        grid_and_method: tuple[TokenGrid, GNAAttn],
        block_q: int,
        block_kv: int,
        tile: tuple[int, int, int],
    ) -> None:
        grid, method = grid_and_method
        want = by_definition(grid, method.axes(grid))
        mask = method.mask(grid)
        assert torch.equal(mask.dense(), want)
        assert torch.equal(mask.blocks(block_q, block_kv).dense()[0, 0], want)
        assert mask.density == pytest.approx(want.double().mean().item(), abs=1e-12)
        text = grid.is_text(torch.arange(grid.tokens))
        video = want & ~text[:, None] & ~text
        assert method.video_mask(grid).density == pytest.approx(video.double().mean().item())
        order = TileOrder(grid, tile)
        positions = order.positions()
        blocks = mask.blocks(block_q, block_kv, order=order)
        assert torch.equal(blocks.dense()[0, 0], want[positions][:, positions])

    @given(
        grid_and_method=grids_and_methods(text=0),
        block_q=st.integers(1, 24),
        block_kv=st.integers(1, 24),
        tile=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    )
    @settings(max_examples=60, deadline=None)
    def test_states_are_exact_before_any_token_is_looked_at(
        self,
        grid_and_method: tuple[TokenGrid, GNAAttn],
        block_q: int,
        block_kv: int,
        tile: tuple[int, int, int] | None,
    ) -> None:
        grid, method = grid_and_method
        order = None if tile is None else TileOrder(grid, tile)
        mask = method.mask(grid)
        states = mask.block_states(Blocking(block_q, block_kv, CPU, order))
        layout = mask.blocks(block_q, block_kv, order=order)
        assert int((states == FULL).sum()) == layout.full_blocks
        assert int((states > 0).sum()) == layout.full_blocks + layout.partial_blocks

    @pytest.mark.parametrize(
        ("window", "stride", "left", "right"),
        [
            (6, 1, 3, 2), (6, 2, 2, 2), (6, 3, 2, 1), (7, 3, 2, 2),
            (7, 4, 1, 2), (8, 8, 0, 0), (5, 2, 1, 2),
        ],
    )  # fmt: skip
    def test_margins_around_a_group(self, window: int, stride: int, left: int, right: int) -> None:
        group = 5 * stride
        mask = GNAAttn(window=window, stride=stride).mask(TokenGrid(1, 1, 15 * window)).dense()
        seen = mask[group : group + stride].nonzero()[:, 1]
        assert (seen.min(), seen.max()) == (group - left, group + stride - 1 + right)

    def test_special_cases(self) -> None:
        line = TokenGrid(1, 1, 24)
        place = torch.arange(24)
        apart = place[:, None] - place
        blocked = GNAAttn(window=6, stride=6).mask(line).dense()
        assert torch.equal(blocked, place[:, None] // 6 == place // 6)
        sliding = GNAAttn(window=5, is_causal=True).mask(line).dense()
        assert torch.equal(sliding, (apart >= 0) & (apart < 5))
        causal = GNAAttn(window="full", stride=7, is_causal=True).mask(line).dense()
        assert torch.equal(causal, apart >= 0)
        comb = GNAAttn(window=6, dilation=4).mask(line).dense()
        assert torch.equal(comb, apart % 4 == 0)

    @given(grid_and_method=grids_and_methods())
    @settings(max_examples=40, deadline=None)
    def test_every_query_sees_itself_and_without_causality_as_many_keys(
        self, grid_and_method: tuple[TokenGrid, GNAAttn]
    ) -> None:
        grid, method = grid_and_method
        axes = method.axes(grid)
        video = method.mask(grid).dense()[grid.video, grid.video]
        keys = video.sum(1)
        most = math.prod(axis.window for axis in axes)
        assert (keys <= most).all()
        if not any(axis.is_causal for axis in axes):
            assert (keys == most).all()
        assert video.diagonal().all()

    @pytest.mark.parametrize("height_and_width", [(4, 6), (4, 5)])
    def test_what_is_said_of_one_frame_is_ignored(self, height_and_width: tuple[int, int]) -> None:
        image = TokenGrid(1, 7, 12, text_after=3)
        short = GNAAttn(window=height_and_width, stride=(2, 3), dilation=(1, 2)).mask(image)
        long = GNAAttn(
            window=(5, *height_and_width),
            stride=(4, 2, 3),
            dilation=(9, 1, 2),
            is_causal=(True, False, False),
        )
        assert torch.equal(long.mask(image).dense(), short.dense())

    def test_a_line_along_any_axis_is_the_same(self) -> None:
        method = GNAAttn(window=6, stride=2, dilation=3)
        want = method.mask(TokenGrid(1, 1, 23)).dense()
        for grid in (TokenGrid(1, 23, 1), TokenGrid(23, 1, 1)):
            assert torch.equal(method.mask(grid).dense(), want)
            assert torch.equal(method.mask(grid).blocks(5).dense()[0, 0], want)
        along_width = GNAAttn(window=(6,), stride=2, dilation=3).mask(TokenGrid(1, 1, 23))
        assert torch.equal(along_width.dense(), want)

    def test_one_token_sees_itself(self) -> None:
        assert GNAAttn(window=7).mask(TokenGrid(1, 1, 1)).dense().tolist() == [[True]]

    def test_axes_must_be_the_grids(self) -> None:
        axes = (AxisWindow(1, 1), AxisWindow(4, 2), AxisWindow(5, 2))
        with pytest.raises(ValueError, match=r"the axes have \(1, 4, 5\) tokens, but the grid is"):
            NeighbourhoodMask(TokenGrid(1, 5, 4), axes)


class TestAxis:
    def test_pairs_of_ranges_are_counted(self) -> None:
        torch.manual_seed(0)
        for axis in every_axis(9):
            mask = axis_by_definition(axis).long()
            ends = torch.randint(0, axis.size + 1, (5, 2)).sort(1).values
            other = torch.randint(0, axis.size + 1, (4, 2)).sort(1).values
            want = [[int(mask[a:b, c:e].sum()) for c, e in other] for a, b in ends]
            assert axis.pairs(ends, other).tolist() == want, axis

    def test_block_sparsity_by_looking_at_every_tile(self) -> None:
        yes = 0
        for axis in every_axis(9):
            mask = axis_by_definition(axis)
            for q, kv in ((1, 1), (2, 2), (4, 2), (2, 4), (3, 3), (4, 4)):
                tiles = [t for rows in mask.split(q) for t in rows.split(kv, dim=1)]
                want = all(bool(tile.all()) or not bool(tile.any()) for tile in tiles)
                assert axis.is_block_sparse(q, kv) == want, (axis, q, kv)
                yes += want
        assert yes > 50

    def test_ends_that_are_no_whole_tile_can_be_left_out(self) -> None:
        axis = AxisWindow(45, 24, 8)
        assert not axis.is_block_sparse(8, 8)
        assert axis.is_block_sparse(8, 8, but_for_ends=True)
        assert not AxisWindow(45, 24, 7).is_block_sparse(8, 8, but_for_ends=True)
        assert not AxisWindow(48, 24, 7).is_block_sparse(8, 8, but_for_ends=True)

    def test_classes_of_a_dilated_axis(self) -> None:
        assert AxisWindow(12, 3, 2, 4).classes() == (AxisWindow(3, 3, 2),)
        assert AxisWindow(13, 3, 2, 4).classes() == (AxisWindow(3, 3, 2), AxisWindow(4, 3, 2))


class TestBoxes:
    @given(
        grid_and_method=grids_and_methods(),
        block=st.integers(1, 30),
        tile=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    )
    @settings(max_examples=60, deadline=None)
    def test_they_hold_every_token_of_their_block(
        self,
        grid_and_method: tuple[TokenGrid, GNAAttn],
        block: int,
        tile: tuple[int, int, int] | None,
    ) -> None:
        grid = grid_and_method[0]
        order = None if tile is None else TileOrder(grid, tile)
        position = torch.arange(grid.tokens) if order is None else order.positions()
        want = sorted(
            (i // block, *(int(x) for x in grid.coordinates(p)))
            for i, p in enumerate(position)
            if not grid.is_text(p)
        )
        boxes = boxes_of(grid, block, CPU, order)
        got = [
            (int(b), *place)
            for b, first, end in zip(boxes.block, boxes.first, boxes.end, strict=True)
            for place in itertools.product(*map(range, first.tolist(), end.tolist()))
        ]
        assert sorted(got) == want

    def test_there_are_few(self) -> None:
        grid = TokenGrid(6, 16, 24)
        tiles = boxes_of(grid, 128, CPU, TileOrder(grid, (2, 8, 8)))
        assert len(tiles.block) == grid.tokens // 128
        assert ((tiles.end - tiles.first) == torch.tensor([2, 8, 8])).all()
        assert len(boxes_of(TokenGrid(6, 17, 23), 128, CPU).block) <= 5 * (6 * 17 * 23 // 128 + 1)
        assert len(boxes_of(TokenGrid(512, 1, 1), 128, CPU).block) == 4


class TestParameters:
    def test_fractions_and_full(self) -> None:
        grid = TokenGrid(21, 30, 52)
        axes = GNAAttn(window=("full", 0.5, 0.3), stride=2).axes(grid)
        assert [axis.window for axis in axes] == [21, 15, 16]
        assert [axis.window for axis in GNAAttn(window=0.01).axes(grid)] == [2, 2, 2]
        assert [axis.window for axis in GNAAttn(window=1.0).axes(grid)] == [21, 30, 52]
        assert GNAAttn(window="full").mask(grid).blocks().partial_blocks == 0

    def test_a_window_beyond_the_axis_is_all_of_it_and_the_stride_still_fits(self) -> None:
        axes = GNAAttn(window=(18, 24, 24), stride=(16, 8, 8)).axes(TokenGrid(5, 30, 6))
        assert [(axis.window, axis.stride) for axis in axes] == [(5, 5), (24, 8), (6, 6)]
        dense = GNAAttn(window=40, stride=9).mask(TokenGrid(2, 5, 3)).dense()
        assert dense.all()
        axes = GNAAttn(window=0.5, stride=9).axes(TokenGrid(4, 30, 12))
        assert [axis.stride for axis in axes] == [2, 9, 6]

    @pytest.mark.parametrize(
        ("family", "grid", "window", "stride", "dense_steps"),
        [
            ("hunyuanvideo", TokenGrid(30, 48, 80), (18, 24, 24), (16, 8, 8), 15 / 50),
            ("hunyuanvideo", None, (18, 24, 24), (16, 8, 8), 15 / 50),
            ("flux", TokenGrid(1, 256, 256), ("full", 80, 80), (1, 16, 16), 9 / 28),
            ("sd3", None, ("full", 80, 80), (1, 16, 16), 9 / 28),
            ("wan2.1", TokenGrid(1, 256, 256), ("full", 80, 80), (1, 16, 16), 9 / 28),
            ("cosmos", TokenGrid(16, 44, 80), ("full", 32, 48), (1, 8, 16), 12 / 35),
            ("wan2.1", None, ("full", 32, 48), (1, 8, 16), 12 / 35),
            ("hunyuanvideo", TokenGrid(33, 45, 80), (20, 24, 24), (4, 8, 8), 15 / 50),
            ("wan2.1", TokenGrid(21, 30, 52), ("full", 22, 32), (1, 2, 8), 12 / 35),
            ("flux", TokenGrid(1, 64, 64), ("full", 40, 40), (1, 8, 8), 9 / 28),
            ("flux", TokenGrid(1, 1, 64), ("full", "full", 40), (1, 1, 8), 9 / 28),
            ("flux", TokenGrid(1, 128, 96), ("full", 48, 40), (1, 16, 8), 9 / 28),
        ],
    )
    def test_recommended_settings(
        self, family: str, grid: TokenGrid | None, window: Any, stride: Any, dense_steps: float
    ) -> None:
        method = GNAAttn().for_model(family, grid)
        assert (method.window, method.stride) == (window, stride)
        assert (method.dense_layers, method.dilation, method.is_causal) == (0, 1, False)
        for steps in (28, 35, 50):
            assert abs(int(steps * method.dense_steps) - steps * dense_steps) < 1
        assert method.for_model(family, grid) == method

    def test_dense_steps_are_the_papers(self) -> None:
        steps = {"hunyuanvideo": (50, 15), "flux": (28, 9), "cosmos": (35, 12)}
        for family, (run, dense) in steps.items():
            recommended = GNAAttn().for_model(family).dense_steps
            assert diffattn.schedule.resolve_steps(recommended, run) == dense

    @given(grid_and_method=grids_and_methods(), family=st.sampled_from(["hunyuanvideo", "flux"]))
    @settings(max_examples=40, deadline=None)
    def test_recommendations_fit_every_grid(
        self, grid_and_method: tuple[TokenGrid, GNAAttn], family: str
    ) -> None:
        grid = grid_and_method[0]
        method = GNAAttn().for_model(family, grid)
        assert torch.equal(method.mask(grid).dense(), by_definition(grid, method.axes(grid)))
        assert GNAAttn(stride=5).for_model(family, grid).mask(grid).dense().any(1).all()

    def test_what_is_given_stays(self) -> None:
        given_window = GNAAttn(window=(7, 15, 15)).for_model("hunyuanvideo", TokenGrid(30, 48, 80))
        assert (given_window.window, given_window.stride) == ((7, 15, 15), 1)
        given_stride = GNAAttn(stride=(1, 2, 30)).for_model("hunyuanvideo", TokenGrid(30, 48, 80))
        assert (given_stride.window, given_stride.stride) == ((18, 24, 24), (1, 2, 24))
        steps = GNAAttn(dense_steps=3, dense_layers=1).for_model("flux")
        assert (steps.dense_steps, steps.dense_layers) == (3, 1)

    def test_it_writes_itself_out(self) -> None:
        method = GNAAttn(window=("full", 0.5, 16), stride=(1, 2, 8), is_causal=(True, False, False))
        assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
        assert eval(repr(method), {"GNAAttn": GNAAttn}) == method
        assert hash(GNAAttn(window=[2, 3, 4])) == hash(GNAAttn(window=(2, 3, 4)))

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"window": 0}, r"^window is 0, but must be an integer of at least 1, a fraction of"),
            ({"window": -1}, "window is -1, but must be an integer of at least 1"),
            ({"window": True}, "window is True, but must be an integer of at least 1"),
            ({"window": 1.5}, r"window is 1.5, but .* above 0.0 and up to 1.0, or 'full'"),
            ({"window": float("nan")}, "window is nan, but must be"),
            ({"window": 0.0}, "window is 0.0, but must be"),
            ({"window": "all"}, "window is 'all', but must be .* or 'full'"),
            ({"window": (4, 0, 4)}, "window along height is 0, but must be an integer"),
            ({"window": (4, -1)}, "window along width is -1, but must be an integer"),
            ({"window": (4, None)}, "window along width is None, but must be an integer"),
            ({"window": ()}, "window has 0 values, but must have 1 to 3: for frames, height and"),
            ({"window": [2, 2, 2, 2]}, "window has 4 values, but must have 1 to 3"),
            ({"stride": 0}, "stride is 0, but must be an integer of at least 1"),
            ({"stride": (1, 2, 2.0)}, "stride along width is 2.0, but must be an integer"),
            ({"window": 8, "stride": 9}, "^stride is 9, but a window of 8 allows 1 to 8"),
            (
                {"window": (8, 4, 8), "stride": 5},
                "stride along height is 5, but a window of 4 allows 1 to 4",
            ),
            (
                {"window": (8, 4), "stride": (9, 8, 5)},
                "stride along width is 5, but a window of 4 allows 1 to 4",
            ),
            (
                {"window": (1, 8, 8), "stride": 4},
                "^stride along frames is 4, but a window of 1 allows only 1$",
            ),
            ({"dilation": 0}, "dilation is 0, but must be an integer of at least 1"),
            ({"dilation": None}, "dilation is None, but must be an integer of at least 1"),
            ({"is_causal": 1}, "is_causal is 1, but must be true or false"),
            ({"is_causal": (0, False, True)}, "is_causal along frames is 0, but must be true or"),
            ({"dense_steps": -1}, "dense_steps is -1, but a number of steps cannot be negative"),
        ],
    )
    def test_bad_parameters(self, parameters: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GNAAttn(**parameters)

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            (
                {"window": 8, "dilation": (1, 5, 1)},
                "dilation along height is 5, but a window of 8 on an axis of 30 tokens allows"
                " 1 to 3$",
            ),
            (
                {"window": (4, 4, "full"), "dilation": 2},
                "dilation along width is 2, but a window of 52 on an axis of 52 tokens allows"
                " only 1$",
            ),
            (
                {"window": (8, 8)},
                r"window is \(8, 8\), for height and width, but the grid 21x30x52 has 21 tokens"
                r" along frames: give values for frames, height and width",
            ),
            ({"window": 4, "stride": (2,)}, r"stride is \(2,\), for width, but the grid"),
        ],
    )
    def test_parameters_that_do_not_fit_the_grid(self, parameters: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GNAAttn(**parameters).mask(TokenGrid(21, 30, 52, text_after=3))


# What NATTEN's calls become here, on 16 tokens of one axis.
SAME_AS_NATTEN: dict[str, dict[str, Any]] = {
    "na1d kernel_size*dilation=24 on 16 tokens": {"window": 12, "dilation": 2},
    "na1d stride=5 > kernel_size=4": {"window": 4, "stride": 5},
    "na1d stride=0": {"window": 4, "stride": 0},
    "na1d dilation=0": {"window": 4, "dilation": 0},
    "na1d kernel_size=4.0": {"window": 4.0},
    "na1d kernel_size=[4] (list)": {"window": [4]},
    "na1d kernel_size=np.int64(4)": {"window": np.int64(4)},
    "na1d is_causal=1": {"window": 4, "is_causal": 1},
}
ALLOWED_HERE: dict[str, tuple[TokenGrid, dict[str, Any]]] = {
    # A window of one token along one of several axes is attention within a row or a frame.
    "na1d kernel_size=1": (TokenGrid(1, 1, 16), {"window": 1}),
    "na1d kernel_size=17 on 16 tokens": (TokenGrid(1, 1, 16), {"window": 17}),
    # What a video setting says of axes that an image does not have.
    "na1d kernel_size=(4,4) in 1-D": (TokenGrid(1, 1, 16), {"window": (4, 4)}),
    "na1d is_causal=(True,False) in 1-D": (
        TokenGrid(1, 1, 16), {"window": 4, "is_causal": (True, False)}
    ),
    "na2d dimension of size 1": (TokenGrid(1, 1, 16), {"window": (2, 4)}),
    "na1d full causal window, 1-D (kernel_size=16)": (
        TokenGrid(1, 1, 16), {"window": 16, "is_causal": True}
    ),
    "na1d float64": (TokenGrid(1, 1, 16), {"window": 4}),
    "na1d head_dim 24": (TokenGrid(1, 1, 16), {"window": 4}),
    "na1d requires_grad": (TokenGrid(1, 1, 16), {"window": 4}),
}  # fmt: skip


GRIDS_OF_SEVERAL = [
    TokenGrid(5, 6, 7),
    TokenGrid(9, 8, 16, text_after=11),
    TokenGrid(1, 13, 17, text_before=4),
    TokenGrid(21, 1, 5),
]


class TestAWindowOfOneToken:
    """Along an axis where the window is 1 a token sees its own place alone."""

    @pytest.mark.parametrize("grid", GRIDS_OF_SEVERAL, ids=str)
    @pytest.mark.parametrize(
        "alone", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=lambda axes: str(axes)
    )
    def test_the_mask_is_equality_of_places(self, grid: TokenGrid, alone: tuple[int, ...]) -> None:
        window = tuple(1 if axis in alone else "full" for axis in range(3))
        method = GNAAttn(window=window)
        index = torch.arange(grid.tokens)
        text = grid.is_text(index)
        place = index.sub(grid.text_before).clamp(0, grid.video_tokens - 1)
        places = torch.stack(
            [place // (grid.height * grid.width), place // grid.width % grid.height,
             place % grid.width]
        )  # fmt: skip
        want = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        for axis in alone:
            want &= places[axis][:, None] == places[axis]
        want |= text[:, None] | text
        mask = method.mask(grid)
        assert torch.equal(mask.dense(), want)
        order = method.order(grid)
        for block in (16, 128):
            assert torch.equal(mask.blocks(block).dense()[0, 0], want)
            layout = mask.blocks(block, order=order)
            moved = index if order is None else order.positions()
            assert torch.equal(layout.dense()[0, 0], want[moved][:, moved])
        assert mask.density == pytest.approx(float(want.double().mean()))

    @pytest.mark.parametrize("dilation", [1, 2, 5])
    @pytest.mark.parametrize("causal", [False, True])
    def test_dilation_and_causality_change_nothing(self, dilation: int, causal: bool) -> None:
        method = GNAAttn(window=1, dilation=dilation, is_causal=causal)
        assert torch.equal(method.mask(TokenGrid(5, 7, 6)).dense(), torch.eye(210).bool())

    @pytest.mark.parametrize("family", ["flux", "sd3", "qwen-image", "wan2.1", ""])
    def test_a_frame_by_itself_is_legal_on_every_family(self, family: str) -> None:
        grid = TokenGrid(1, 24, 40)
        video = GNAAttn(window=(1, 8, 8)).for_model(family, grid)
        image = GNAAttn(window=(8, 8)).for_model(family, grid)
        assert torch.equal(video.mask(grid).dense(), image.mask(grid).dense())

    def test_whole_frames_by_themselves_are_block_sparse(self) -> None:
        plan = diffattn.plan(TokenGrid(8, 16, 16), GNAAttn(window=(1, "full", "full")))
        assert plan.is_block_sparse
        assert plan.nearest_block_sparse == plan.method
        assert plan.density == plan.block_density == 1 / 8

    def test_the_nearest_block_sparse_setting_keeps_the_axis(self) -> None:
        method = GNAAttn(window=(1, 7, 8))
        near = nearest_block_sparse(method, TokenGrid(8, 16, 16), (1, 8, 8))
        assert near is not None
        assert near.window == (1, 8, 8)


class TestAnswersOfNatten:
    @pytest.fixture
    def answers(self) -> dict[str, str]:
        rows = json.loads((GOLDENS / "errors.json").read_text())
        return {row["case"]: row["result"] for row in rows}

    @pytest.mark.parametrize("case", SAME_AS_NATTEN)
    def test_the_same_is_refused(self, answers: dict[str, str], case: str) -> None:
        parameters = SAME_AS_NATTEN[case]
        if answers[case] == "ok":
            assert GNAAttn(**parameters).mask(TokenGrid(1, 1, 16)).density == 4 / 16
            return
        assert answers[case] == "ValueError"
        with pytest.raises(ValueError, match="but"):
            GNAAttn(**parameters).mask(TokenGrid(1, 1, 16))

    @pytest.mark.parametrize("case", ALLOWED_HERE)
    def test_what_it_refuses_and_we_can_do(self, answers: dict[str, str], case: str) -> None:
        assert answers[case] != "ok"
        grid, parameters = ALLOWED_HERE[case]
        q, k, v = (
            torch.randn(1, 16, 1, 24, dtype=torch.float64, requires_grad=True) for _ in range(3)
        )
        method = GNAAttn(**parameters)
        out = method.attend(q, k, v, site(grid))
        want, _ = reference_attention(q, k, v, by_definition(grid, method.axes(grid)))
        torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
        out.sum().backward()
        assert q.grad is not None


class TestBlocks:
    @pytest.mark.parametrize(
        ("method", "grid", "tiles", "visited"),
        [
            (GNAAttn(window=(18, 24, 24), stride=(16, 8, 8)), TokenGrid(30, 48, 80), 900, 81),
            (GNAAttn(window=(30, 40, 40), stride=(1, 32, 8)), TokenGrid(30, 48, 80), 900, 375),
            (GNAAttn(window=(80, 80), stride=(16, 16)), TokenGrid(1, 256, 256), 512, 50),
            (GNAAttn(window=(16, 32, 48), stride=(1, 8, 16)), TokenGrid(16, 44, 80), 440, 192),
            (GNAAttn(window=2048, stride=256), TokenGrid(1, 1, 32768), 256, 16),
        ],
    )
    def test_the_papers_settings_visit_full_blocks_only(
        self, method: GNAAttn, grid: TokenGrid, tiles: int, visited: int
    ) -> None:
        layout = method.layout(grid, CPU, method.order(grid))
        assert layout.partial_blocks == 0
        assert layout.rows == tiles
        assert (layout.full_count == visited).all()

    def test_hunyuanvideo_720p(self) -> None:
        grid = TokenGrid(33, 45, 80, text_after=256)
        method = GNAAttn().for_model("hunyuanvideo", TokenGrid(33, 45, 80))
        order = method.order(grid)
        assert order is not None
        layout = method.layout(grid, CPU, order)
        assert layout.nbytes < 16 << 20
        # Partial blocks are those of the odd frame, of the rows that are left over, and of text.
        assert layout.partial_blocks < 0.2 * layout.full_blocks
        raster = method.mask(grid).blocks()
        assert layout.density < 0.4 * raster.density
        assert method.mask(grid).density == pytest.approx(
            (method.video_mask(grid).density * grid.tokens**2 + 256 * (2 * grid.tokens - 256))
            / grid.tokens**2,
            abs=1e-12,
        )

    def test_raster_order_where_tiles_gain_nothing(self) -> None:
        assert GNAAttn(window=9).order(TokenGrid(1, 1, 4096)) is None
        assert GNAAttn(window=9).order(TokenGrid(4096, 1, 1)) is None
        assert GNAAttn(window=2).order(TokenGrid(2, 2, 3)) is None
        # Blocks of two whole rows are in raster order already.
        rows = GNAAttn(window=("full", 16, "full"), stride=(1, 2, 1))
        assert rows.order(TokenGrid(1, 32, 64)) is None

    @given(
        size=st.integers(1, 24),
        window=st.integers(1, 24),
        stride=st.integers(1, 24),
        dilation=st.sampled_from([1, 1, 2, 3]),
        causal=st.booleans(),
        side=st.sampled_from([1, 2, 3, 4, 8, 32]),
    )
    @settings(deadline=None)
    def test_pairs_in_tiles_are_those_of_the_definition(
        self, size: int, window: int, stride: int, dilation: int, causal: bool, side: int
    ) -> None:
        window = max(1, min(window, size // dilation))
        dilation = min(dilation, size)
        stride = min(stride, window)
        seen = torch.tensor(
            [
                [attends(x, k, size, window, stride, dilation, causal) for k in range(size)]
                for x in range(size)
            ]
        )
        some = full = 0
        for rows in seen.split(side):
            for pairs in rows.split(side, 1):
                some += pairs.numel() * bool(pairs.any())
                full += pairs.numel() * bool(pairs.all()) * (pairs.numel() == side * side)
        axis = AxisWindow(size, window, stride, dilation, causal)
        assert _pairs_in_tiles(axis, [side]) == {side: (some, full)}

    @pytest.mark.parametrize(("tokens", "block"), [(12, 16), (1200, 32), (4096, 64), (16384, 128)])
    def test_small_grids_have_small_blocks(self, tokens: int, block: int) -> None:
        assert GNAAttn(window=4).block_size_on(TokenGrid(1, 1, tokens, text_after=9999)) == block


class TestBlockSparsity:
    def test_the_simulators_verdicts(self) -> None:
        rows = json.loads((GOLDENS / "simulator.json").read_text())["rows"]
        assert rows
        for row in rows:
            method = GNAAttn(window=tuple(row["window"]), stride=tuple(row["stride"]))
            tiles = tile_of(row["q_tile"]), tile_of(row["kv_tile"])
            found = is_block_sparse(method, grid_of(row["shape"]), *tiles)
            assert found == row["perfectly_block_sparse"], row

    @pytest.mark.parametrize(
        ("window", "stride", "dilation"),
        [
            ((4, 16), 1, (11, 5)),
            ((12, 16), (4, 1), (1, 5)),
            ((12, 24), (4, 8), 1),
            ((20, 40), (4, 8), 1),
            ((28, 56), (4, 8), 1),
        ],
    )
    def test_cosmos_predict2_layers(self, window: Any, stride: Any, dilation: Any) -> None:
        def all_frames(values: Any) -> Any:
            return values if isinstance(values, int) else (1, *values)

        method = GNAAttn(
            window=("full", *window), stride=all_frames(stride), dilation=all_frames(dilation)
        )
        grid, tiles = TokenGrid(24, 44, 80), ((8, 4, 8), (4, 4, 8))
        assert is_block_sparse(method, grid, *tiles, within_classes=True)
        assert is_block_sparse(method, grid, *tiles) == (dilation == 1)

    def test_nearest(self) -> None:
        grid, tile = TokenGrid(30, 48, 80), (2, 8, 8)
        own = GNAAttn(window=(18, 24, 24), dense_steps=3)
        nearest = nearest_block_sparse(own, grid, tile)
        assert nearest == GNAAttn(window=(18, 24, 24), stride=(2, 8, 8), dense_steps=3)
        assert nearest_block_sparse(own, grid, (4, 8, 8), (2, 8, 8)).stride == (16, 8, 8)
        assert nearest_block_sparse(nearest, grid, tile) == nearest
        # 720p of the model's own: 45 rows are no multiple of 8, nor 33 frames of 2.
        odd = TokenGrid(33, 45, 80)
        assert nearest_block_sparse(own, odd, tile).window == ("full", "full", 24)
        kept = nearest_block_sparse(own, odd, tile, but_for_ends=True)
        assert (kept.window, kept.stride) == ((18, 24, 24), (2, 8, 8))

    def test_nearest_is_the_nearest_there_is(self) -> None:
        found = 0
        for axis in every_axis(8):
            if axis.is_causal or axis.dilation > 1:
                continue
            grid, tile = TokenGrid(1, 1, axis.size), (1, 1, 2)
            method = GNAAttn(window=axis.window, stride=axis.stride)
            good = [
                (abs(w - axis.window), -w, abs(s - min(axis.stride, w)), s)
                for w in range(2, axis.size + 1)
                for s in range(1, w + 1)
                if AxisWindow(axis.size, w, s).is_block_sparse(2, 2)
            ]
            _, window, _, stride = min(good)
            nearest = nearest_block_sparse(method, grid, tile)
            assert nearest is not None
            (along,) = (a for a in nearest.axes(grid) if a.size > 1)
            assert (along.window, along.stride) == (-window, stride), axis
            found += (along.window, along.stride) != (axis.window, axis.stride)
        assert found > 5

    def test_nearest_where_there_is_none(self) -> None:
        grid = TokenGrid(4, 16, 16)
        assert nearest_block_sparse(GNAAttn(window=4, is_causal=True), grid, (2, 8, 8)) is None
        assert nearest_block_sparse(GNAAttn(window=4, dilation=(1, 2, 2)), grid, (2, 8, 8)) is None
        within = nearest_block_sparse(
            GNAAttn(window=4, dilation=(1, 2, 2)), grid, (2, 4, 4), within_classes=True
        )
        assert within is not None


def site(grid: TokenGrid) -> Site:
    return Site("", 0, 1, grid)


class TestAttention:
    def test_grouped_heads_of_the_goldens(self) -> None:
        golden = np.load(GOLDENS / "attn_1d_gqa.npz")
        q, k, v = (torch.from_numpy(golden[name]) for name in "qkv")
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        mask = golden_method(golden).mask(grid_of((q.shape[1],)))
        out, lse = diffattn.attention(q, k, v, mask, scale=float(golden["scale"]), return_lse=True)
        torch.testing.assert_close(out, torch.from_numpy(golden["out"]), atol=2e-6, rtol=0)
        want = torch.from_numpy(golden["lse"]).transpose(1, 2)
        torch.testing.assert_close(lse, want, atol=2e-6, rtol=0)

    def test_additional_keys_of_the_goldens_are_text(self) -> None:
        golden = np.load(GOLDENS / "attn_2d_addkv.npz")
        q, k, v = (torch.from_numpy(golden[name]).flatten(1, 2) for name in "qkv")
        k, v = (
            torch.cat([x, torch.from_numpy(golden[name])], 1)
            for x, name in ((k, "add_k"), (v, "add_v"))
        )
        extra = k.shape[1] - q.shape[1]
        grid = grid_of(golden["q"].shape[1:3], text_after=extra)
        padded = torch.cat([q, torch.zeros_like(k[:, :extra])], 1)
        out = golden_method(golden).attend(padded, k, v, site(grid), scale=float(golden["scale"]))
        want = torch.from_numpy(golden["out"]).flatten(1, 2)
        torch.testing.assert_close(out[:, : q.shape[1]], want, atol=2e-6, rtol=0)

    @pytest.mark.parametrize(
        ("grid", "method"),
        [
            (TokenGrid(5, 7, 11), GNAAttn(window=(3, 4, 5), stride=(1, 2, 3))),
            (TokenGrid(4, 8, 8, text_before=1), GNAAttn(window=(2, 4, 4), stride=(2, 4, 4))),
            (TokenGrid(3, 5, 7, text_after=13), GNAAttn(window=3, dilation=(1, 1, 2))),
            (TokenGrid(1, 13, 17, text_before=6, text_after=1), GNAAttn(window=(5, 0.3))),
            (TokenGrid(5, 6, 9), GNAAttn(window=(4, 3, 3), is_causal=(True, False, True))),
            (TokenGrid(1, 1, 129), GNAAttn(window=17, stride=5)),
            (TokenGrid(6, 5, 7, text_after=3), GNAAttn(window=(1, "full", "full"))),
            (TokenGrid(4, 9, 11), GNAAttn(window=(1, 1, 4), stride=(1, 1, 2))),
            (TokenGrid(1, 12, 13, text_before=5), GNAAttn(window=(1, "full"))),
            (TokenGrid(7, 8, 9, text_after=2), GNAAttn()),
        ],
        ids=str,
    )
    def test_output_and_gradients_are_those_of_dense_attention_with_the_mask(
        self, grid: TokenGrid, method: GNAAttn
    ) -> None:
        torch.manual_seed(0)
        q, k, v, grad = (torch.randn(3, grid.tokens, 2, 8, dtype=torch.float64) for _ in range(4))
        key_mask = torch.rand(3, grid.tokens) < 0.8
        mask = by_definition(grid, method.axes(grid))
        mask = (mask & key_mask[:, None, :])[:, None].expand(-1, 2, -1, -1)

        def run(attention: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = attention(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

        got = run(lambda *x: method.attend(*x, site(grid), key_mask=key_mask))
        want = run(lambda *x: reference_attention(*x, mask, scale=8**-0.5)[0])
        for ours, truth in zip(got, want, strict=True):
            torch.testing.assert_close(ours, truth, atol=1e-10, rtol=1e-8)

    def test_blocks_in_the_methods_order_and_in_the_grids_give_the_same(self) -> None:
        grid = TokenGrid(4, 8, 12, text_after=5)
        method = GNAAttn(window=(3, 4, 5), stride=(1, 2, 2))
        assert method.order(grid) is not None
        q, k, v = torch.randn(3, 1, grid.tokens, 2, 16).unbind(0)
        raster = diffattn.attention(q, k, v, method.mask(grid))
        torch.testing.assert_close(method.attend(q, k, v, site(grid)), raster)


ATTACHED = GNAAttn(window=(2, 3, 4), stride=(1, 2, 1), dense_layers=0, dense_steps=0)


def wan() -> Case:
    grid = TokenGrid(3, 5, 7)
    inputs = {
        "hidden_states": noise(BATCH, 16, grid.frames, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 5, tiny_wan.TEXT_DIM, seed=1),
    }
    return Case(
        build=tiny_wan.transformer,
        inputs=lambda: inputs,
        grids=(grid,),
        sites=tuple(f"blocks.{layer}.attn1" for layer in range(tiny_wan.LAYERS)),
        pixel=lambda t, h, w: (0, 1, t, 2 * h, 2 * w),
    )


MODELS = {"wan": wan(), **CASES}


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_it_is_the_stock_model_with_that_mask(self, name: str) -> None:
        case = MODELS[name]
        model, inputs = case.build(), case.inputs()
        outputs = []
        with torch.no_grad():
            dense = model(**inputs, return_dict=False)[0]
            with stock.masked(model, list(case.sites), case.grid_of, ATTACHED, case.queries):
                want = model(**inputs, return_dict=False)[0]
            attachment = diffattn.set_attn_processor(model, ATTACHED)
            outputs.append(model(**inputs, return_dict=False)[0])
        # With gradients every call puts its tokens in order by itself.
        outputs.append(model(**inputs, return_dict=False)[0].detach())
        assert attachment.sparse_calls == 2 * len(case.sites)
        assert attachment.dense_calls == 0
        assert not torch.allclose(want, dense, atol=1e-3), "the mask should matter"
        for out in outputs:
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)

    def test_recommended_windows_are_those_of_the_model_and_its_grid(self) -> None:
        case = CASES["hunyuanvideo"]
        model = case.build()
        diffattn.set_attn_processor(model, GNAAttn(dense_steps=0))
        with torch.no_grad():
            model(**case.inputs(), return_dict=False)
        (group,) = attached_to(model).groups
        assert group.method == GNAAttn(dense_steps=0).for_model("hunyuanvideo", case.grids[0])
        assert group.method.window == (2, 3, 4)
