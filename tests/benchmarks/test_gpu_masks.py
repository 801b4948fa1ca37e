"""The shapes and the masks that are measured on a GPU, against their definitions."""

from __future__ import annotations

import pytest
import torch
from gpu_run.masks import ALIGNED, EXACT, Mask, attended_pairs, make_mask, tile_order
from gpu_run.shapes import BACKWARD, FORWARD, SHAPES, Shape, tiny

from diffattn import TokenGrid
from diffattn.blocks import layout_from_states

CPU = torch.device("cpu")
DENSITIES = (1.0, 0.5, 0.2, 0.1)
RAGGED = Shape("ragged", TokenGrid(3, 9, 11, text_before=5), heads=3, head_dim=16)  # 302 tokens
PLAIN = Shape("plain", TokenGrid(2, 9, 17), heads=2, head_dim=16)  # 306 tokens, no text
PICTURE = Shape("picture", TokenGrid(1, 17, 23), heads=2, head_dim=16)
VIDEO = Shape("video", TokenGrid(9, 20, 21, text_after=7), heads=2, head_dim=64)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "tokens", "tera_flops"),
    # specs/kernels.md, D.1: N and attention TFLOP of a layer
    [
        ("wan-1.3b-480p", 32_760, 6.594),
        ("wan-14b-720p", 75_600, 117.05),
        ("hunyuan-720p", 119_056, 174.17),
        ("flux-1024", 4_608, 0.261),
        ("flux-4096", 66_048, 53.6),
        ("cogvideox-5b", 17_776, 3.88),
    ],
)
def test_shapes_are_those_of_the_table(name: str, tokens: int, tera_flops: float) -> None:
    shape = next(s for s in SHAPES if s.name == name)
    assert shape.tokens == tokens
    assert shape.flops(tokens**2, FORWARD) / 1e12 == pytest.approx(tera_flops, rel=2e-3)
    assert shape.flops(tokens**2, BACKWARD) == 2.5 * shape.flops(tokens**2, FORWARD)


def test_every_shape_is_in_the_table_and_both_head_sizes_are_there() -> None:
    assert len(SHAPES) == 6
    assert {s.head_dim for s in SHAPES} == {64, 128}


def test_tiny_shapes_keep_what_tables_are_chosen_by() -> None:
    for shape in SHAPES:
        assert tiny(shape).head_dim == shape.head_dim
        assert (tiny(shape).grid.text_before > 0) == (shape.grid.tokens > shape.grid.video_tokens)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("shape", [RAGGED, PLAIN, PICTURE, VIDEO], ids=lambda s: s.name)
def test_tile_order_has_every_token_once_and_text_in_its_place(shape: Shape) -> None:
    order = tile_order(shape.grid, CPU)
    assert torch.equal(order.sort().values, torch.arange(shape.tokens))
    text = shape.grid.is_text(torch.arange(shape.tokens))
    assert torch.equal(order[text], torch.arange(shape.tokens)[text])


def test_a_block_of_the_tile_order_is_a_tile_where_tiles_divide_the_grid() -> None:
    grid = TokenGrid(8, 12, 24)
    coordinates = torch.stack(grid.coordinates(tile_order(grid, CPU)), -1).view(-1, 128, 3)
    extent = coordinates.amax(1) - coordinates.amin(1) + 1
    assert torch.equal(extent, torch.tensor([4, 4, 8]).expand(len(extent), -1))
    # and the next block is a neighbour
    corner = coordinates.amin(1)
    assert torch.equal(
        ((corner[1:] - corner[:-1]).abs() / torch.tensor([4, 4, 8])).sum(1),
        torch.ones(len(extent) - 1),
    )


def brute_force(shape: Shape, mask: Mask) -> torch.Tensor:
    """The window mask from its definition, token by token, in plain Python."""
    grid = shape.grid
    order = tile_order(grid, CPU).tolist()
    axes = (grid.frames, grid.height, grid.width)
    places: list[tuple[int, ...] | None] = []
    for token in order:
        position = token - grid.text_before
        inside = 0 <= position < grid.video_tokens
        frame, rest = divmod(position, grid.height * grid.width)
        places.append((frame, *divmod(rest, grid.width)) if inside else None)

    def sees(q: tuple[int, ...] | None, k: tuple[int, ...] | None) -> bool:
        if q is None or k is None:
            return True
        assert mask.window is not None
        for i, j, n, w in zip(q, k, axes, mask.window, strict=True):
            first = min(max(i - w // 2, 0), n - w)
            if not first <= j < first + w:
                return False
        return True

    return torch.tensor([[sees(q, k) for k in places] for q in places])


@pytest.mark.parametrize("shape", [RAGGED, PLAIN, PICTURE], ids=lambda s: s.name)
def test_token_exact_masks_are_windows_token_by_token(shape: Shape) -> None:
    mask = make_mask(shape.grid, EXACT, 0.7, CPU)
    truth = brute_force(shape, mask)
    assert 0 < truth.sum() < truth.numel()
    assert torch.equal(mask.layout.dense()[0, 0], truth)
    token = torch.arange(shape.tokens)
    assert torch.equal(mask.rule(token[:, None], token[None]), truth)
    assert attended_pairs(mask.layout) == int(truth.sum())
    assert mask.layout.partial_blocks


def test_block_aligned_masks_have_full_blocks_only_and_text_that_sees_all() -> None:
    shape = VIDEO
    mask = make_mask(shape.grid, ALIGNED, 0.2, CPU)
    dense_mask = mask.layout.dense()[0, 0]
    token = torch.arange(shape.tokens)
    assert mask.layout.partial_blocks == 0
    assert torch.equal(mask.rule(token[:, None], token[None]), dense_mask)
    assert attended_pairs(mask.layout) == int(dense_mask.sum())
    text = shape.grid.is_text(token)
    assert text.any()
    assert dense_mask[text].all()
    assert dense_mask[:, text].all()
    assert dense_mask.diagonal().all()


def test_neighbouring_rows_of_a_block_aligned_mask_visit_about_as_many_blocks() -> None:
    count_ = make_mask(TokenGrid(1, 50, 51), ALIGNED, 0.2, CPU).layout.full_count
    assert int(count_.max()) - int(count_.min()) <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_block_aligned_densities_are_those_asked_for_to_half_a_block(shape: Shape) -> None:
    for density in DENSITIES:
        layout = make_mask(shape.grid, ALIGNED, density, CPU).layout
        assert abs(layout.density - density) <= 0.5001 / layout.rows**2


@pytest.mark.parametrize(
    ("name", "density"),
    # Larger shapes take seconds each on a CPU: one shows that text before the video does no harm.
    [*(("flux-1024", density) for density in DENSITIES), ("cogvideox-5b", 0.2)],
)
def test_token_exact_densities_are_near_those_asked_for(name: str, density: float) -> None:
    shape = next(s for s in SHAPES if s.name == name)
    layout = make_mask(shape.grid, EXACT, density, CPU).layout
    assert layout.density == pytest.approx(density, rel=0.1)
    assert (layout.partial_blocks > 0) == (density < 1)


def test_a_density_that_text_alone_exceeds_is_refused() -> None:
    grid = TokenGrid(1, 16, 24, text_before=200)
    with pytest.raises(ValueError, match=r"a density of 0\.1 leaves no block for the 3 blocks of"):
        make_mask(grid, ALIGNED, 0.1, CPU)


def test_at_a_density_of_one_both_kinds_leave_nothing_out() -> None:
    for kind in (ALIGNED, EXACT):
        assert make_mask(RAGGED.grid, kind, 1.0, CPU).layout.dense().all()


def test_attended_pairs_counts_bits_of_masks_in_use_only() -> None:
    torch.manual_seed(0)
    states = torch.randint(0, 3, (4, 5)).to(torch.uint8)
    layout = layout_from_states(
        states,
        lambda row, column: torch.rand(row.numel(), 32, 48) < 0.5,
        tokens_q=101, tokens_kv=211, block_q=32, block_kv=48,
    )  # fmt: skip
    assert layout.partial_blocks > 1
    assert attended_pairs(layout) == int(layout.dense().sum())
