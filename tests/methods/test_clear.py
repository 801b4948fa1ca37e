"""CLEARAttn against the public code's masks and outputs, and its definition pair by pair."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import golden_files
import numpy as np
import pytest
import stock
import tiny_families
import tiny_wan
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import BATCH, noise

import diffattn
from diffattn import CLEARAttn, DenseAttn, TokenGrid
from diffattn.blocks import PARTIAL
from diffattn.kernels.reference import reference_attention
from diffattn.masks.base import Blocking
from diffattn.methods import Site, from_dict
from diffattn.methods.clear.disk import best_tile
from diffattn.models import family_of
from diffattn.operator import add_keys, every_pair
from diffattn.orders import tiles_that_fit

GOLDENS = golden_files.GOLDENS / "clear"


def golden_mask(golden: Any, name: str) -> np.ndarray:
    """A mask of a golden file, (queries, keys); there are as many queries as keys, or more keys."""
    rows, columns = golden[f"{name}_shape"].tolist()
    bits = np.unpackbits(golden[f"{name}_bits"], count=rows * columns)
    return bits.reshape(rows, columns).astype(bool)


@pytest.mark.parametrize("case", range(14))
def test_mask_is_that_of_the_public_code(case: int) -> None:
    golden = np.load(GOLDENS / "1_masks.npz")
    height, width, text, radius, _ = golden["configs_H_W_T_r_d"][case].tolist()
    grid = TokenGrid(1, height, width, text_before=text)
    method = CLEARAttn(radius=radius)
    # Pooled keys come after all others and are no matter of the mask.
    want = golden_mask(golden, f"m{case}")[:, : grid.tokens]
    mask = method.mask(grid)
    np.testing.assert_array_equal(mask.dense().numpy(), want)
    assert mask.density == pytest.approx(want.mean(), abs=1e-12)


@pytest.mark.parametrize("case", range(6))
def test_blocks_are_those_of_the_public_code(case: int) -> None:
    golden = np.load(GOLDENS / "2_block_masks.npz")
    height, width, text, radius, _ = golden[f"b{case}_cfg_H_W_T_r_d"].tolist()
    mask = CLEARAttn(radius=radius).mask(TokenGrid(1, height, width, text_before=text))
    layout = mask.blocks(128)
    if case != 4:  # with pooled keys, of which the mask knows nothing
        assert layout.density == pytest.approx(golden[f"b{case}_density"].item(), abs=1e-12)
    for count, index, name in (
        (layout.full_count, layout.full_index, "full"),
        (layout.partial_count, layout.partial_index, "partial"),
    ):
        ours = np.zeros((layout.rows, layout.columns), dtype=bool)
        for row in range(layout.rows):
            ours[row, index[0, 0, row, : count[0, 0, row]].numpy()] = True
        theirs = golden[f"b{case}_{name}"].astype(bool)
        # They ask a full mask of the short last block for tokens that it does not have.
        whole = (height * width + text) // 128
        np.testing.assert_array_equal(ours[:whole, :whole], theirs[:whole, :whole])


def test_token_counts_of_whole_disks() -> None:
    golden = np.load(GOLDENS / "1_masks.npz")
    for radius, count in zip(golden["disk_radii"], golden["disk_counts"], strict=True):
        side = 2 * int(radius) - 1
        middle = torch.tensor(side * side // 2)
        mask = CLEARAttn(radius=int(radius)).mask(TokenGrid(1, side, side))
        assert int(mask.allowed(middle, torch.arange(side * side)).sum()) == count


@pytest.mark.parametrize("case", range(6))
def test_windows_of_videos_are_those_of_the_goldens(case: int) -> None:
    golden = np.load(GOLDENS / "8_video_derived.npz")
    frames, height, width, frame_radius, radius, window, text, side = golden[f"v{case}_cfg"]
    before, after = (int(text), 0) if side == "first" else (0, int(text))
    grid = TokenGrid(int(frames), int(height), int(width), before, after)
    method = CLEARAttn(
        radius=int(radius), frame_radius=int(frame_radius), window=str(window), first_frame=False
    )
    want = golden_mask(golden, f"v{case}")
    np.testing.assert_array_equal(method.mask(grid).dense().numpy(), want)


@pytest.mark.parametrize(
    ("pixels", "radius", "raster", "tiles"),
    [(1024, 8, 0.417, 0.380), (2048, 16, 0.274, 0.153), (4096, 32, 0.2428, 0.0899)],
)
def test_tiles_visit_as_few_blocks_as_the_analysis_says(
    pixels: int, radius: int, raster: float, tiles: float
) -> None:
    grid = TokenGrid(1, pixels // 16, pixels // 16, text_before=512)
    method = CLEARAttn(radius=radius)
    in_tiles = method.layout(grid, torch.device("cpu"), method.order(grid))
    assert method.mask(grid).blocks(128).density == pytest.approx(raster, rel=2e-3)
    assert in_tiles.density == pytest.approx(tiles, rel=2e-3)


@pytest.mark.parametrize("limits", [[9, 4, 1, 0, 0], [2, 0, 0, 0, 0], [30, 30, 5, 1, 1]])
@pytest.mark.parametrize("sizes", [(5, 7, 9), (2, 11, 6), (1, 13, 13)])
def test_the_best_tile_visits_the_fewest_pairs(
    sizes: tuple[int, int, int], limits: list[int]
) -> None:
    grid = TokenGrid(*sizes)
    limit = torch.tensor(limits, dtype=torch.int32)
    place = torch.cartesian_prod(*map(torch.arange, sizes))
    frames, rows, columns = (place[:, None] - place).abs().unbind(2)
    seen = rows**2 + columns**2 < limit[frames]

    def visited(tile: tuple[int, int, int]) -> int:
        tiles = place // torch.tensor(tile)
        number = (tiles[:, 0] * sizes[1] + tiles[:, 1]) * sizes[2] + tiles[:, 2]
        holds = number == number.unique()[:, None]  # (tiles, tokens)
        touched = holds.double() @ seen.double() @ holds.double().T > 0
        count = holds.sum(1)
        return int((touched * count[:, None] * count).sum())

    best = best_tile(grid, limit, 8)
    assert visited(best) == min(map(visited, tiles_that_fit(grid, 8)))


def test_flops_of_the_paper() -> None:
    # Table 7: 3.92 TFLOPs of attention in a layer at 8192 x 8192, where dense attention is 847.73.
    grid = TokenGrid(1, 512, 512, text_before=512)
    flops = 4 * grid.tokens**2 * 3072
    assert flops / 1e12 == pytest.approx(847.73, abs=0.005)
    assert flops * CLEARAttn(radius=8).mask(grid).density / 1e12 == pytest.approx(3.915, abs=5e-4)


def definition(grid: TokenGrid, method: CLEARAttn) -> torch.Tensor:
    """The token mask, from the words of the paper and, for videos, their obvious extension."""
    token = torch.arange(grid.tokens)
    text = (token < grid.text_before) | (token >= grid.tokens - grid.text_after)
    place = torch.cartesian_prod(
        torch.arange(grid.frames), torch.arange(grid.height), torch.arange(grid.width)
    ).view(-1, 3)
    frames, rows, columns = (place[:, None] - place[None]).double().unbind(2)
    plane, time = (rows**2 + columns**2) ** 0.5 / method.radius, frames.abs() / method.frame_radius
    if method.window == "cylinder":
        near = (plane < 1) & (time < 1)
    else:
        # What is exactly on the surface is outside, however its sum was rounded.
        near = (plane**2 + time**2) < 1 - 1e-12
    if method.first_frame and grid.frames > 1:
        near |= (place[:, 0] == 0)[:, None] | (place[:, 0] == 0)[None]
    out = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    out[torch.outer(~text, ~text)] = near.flatten()
    return out


any_grid = st.builds(
    TokenGrid,
    frames=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 11),
    text_before=st.integers(0, 19),
    text_after=st.integers(0, 9),
)
any_window = st.builds(
    CLEARAttn,
    radius=st.integers(1, 13),
    frame_radius=st.integers(1, 8),
    window=st.sampled_from(["ellipsoid", "cylinder"]),
    first_frame=st.booleans(),
)


@given(
    grid=any_grid, method=any_window, block_q=st.integers(1, 24), block_kv=st.sampled_from([1, 16])
)
@settings(max_examples=60, deadline=None)
def test_mask_is_the_definition_in_any_blocks_and_order(
    grid: TokenGrid, method: CLEARAttn, block_q: int, block_kv: int
) -> None:
    want = definition(grid, method)
    mask = method.mask(grid)
    assert torch.equal(mask.dense(), want)
    # Not as a product of matrices, but pair by pair, as an accelerator does it.
    token = torch.arange(grid.tokens)
    assert torch.equal(mask.allowed(token[None, :], token[:, None]), want.T)
    assert torch.equal(mask.blocks(block_q, block_kv).dense()[0, 0], want)
    assert mask.density == pytest.approx(want.double().mean().item(), abs=1e-12)
    order = method.order(grid)
    assert order is not None
    moved = order.positions()
    for size in (block_q, 128):
        layout = mask.blocks(size, order=order)
        assert torch.equal(layout.dense()[0, 0], want[moved][:, moved])


@given(grid=any_grid, method=any_window, order=st.booleans())
@settings(max_examples=60, deadline=None)
def test_states_are_never_wrong(grid: TokenGrid, method: CLEARAttn, order: bool) -> None:
    tiles = method.order(grid) if order else None
    states = method.video_mask(grid).block_states(Blocking(8, 16, torch.device("cpu"), tiles))
    moved = torch.arange(grid.tokens) if tiles is None else tiles.positions()
    text = grid.is_text(moved)
    want = definition(grid, method)[moved][:, moved] & ~text[:, None] & ~text[None]
    for row, column in torch.cartesian_prod(*map(torch.arange, states.shape)).tolist():
        block = want[row * 8 : row * 8 + 8, column * 16 : column * 16 + 16]
        assert states[row, column] != 0 or not block.any()
        assert states[row, column] != 2 or block.all()


def test_a_radius_beyond_the_grid_is_dense_attention() -> None:
    grid = TokenGrid(1, 7, 13, text_before=3)
    assert CLEARAttn(radius=10**9).mask(grid).dense().all()
    assert CLEARAttn(radius=10**9).layout(grid, torch.device("cpu")).partial_blocks == 0


def test_radius_1_without_text_gives_the_values() -> None:
    grid = TokenGrid(1, 9, 17)
    q, k, v = (noise(3, grid.tokens, 2, 16, seed=i) for i in range(3))
    out = CLEARAttn(radius=1).attend(q, k, v, Site("flux", 0, 1, grid))
    torch.testing.assert_close(out, v)


def test_other_sizes_in_turn_change_nothing() -> None:
    method, grids = CLEARAttn(radius=3), (TokenGrid(1, 5, 9), TokenGrid(1, 9, 5))
    first, second = (method.mask(grid).dense() for grid in grids)
    assert not torch.equal(first, second)
    assert torch.equal(method.mask(grids[0]).dense(), first)


def test_mask_of_an_8k_image_builds_without_looking_at_token_pairs() -> None:
    # 262,656 tokens: their pairs would be 69 GB.
    grid = TokenGrid(1, 512, 512, text_before=512)
    method = CLEARAttn(radius=8)
    layout = method.layout(grid, torch.device("cpu"), method.order(grid))
    assert layout.nbytes < 64 << 20
    assert len(layout.bit_masks) < 32
    assert layout.density == pytest.approx(0.0081, rel=5e-3)


@pytest.mark.parametrize("window", ["ellipsoid", "cylinder"])
def test_few_of_a_videos_blocks_are_looked_at(window: str) -> None:
    # Those that hold the same by being shifted alike, or by being out of reach of each other.
    grid = TokenGrid(33, 45, 80, text_after=256)
    method = CLEARAttn(window=window)
    mask, order = method.mask(grid), method.order(grid)
    blocking = Blocking(128, 128, torch.device("cpu"), order)
    partial = (mask.block_states(blocking) == PARTIAL).nonzero(as_tuple=True)
    kinds = mask.block_signatures(*partial, blocking)
    assert kinds is not None
    assert len(kinds.unique()) < len(kinds) / 12


@pytest.mark.parametrize(
    ("grid", "method"),
    [
        (TokenGrid(1, 13, 23, text_before=7), CLEARAttn(radius=4)),
        (TokenGrid(1, 16, 16, text_before=1), CLEARAttn(radius=5)),
        (TokenGrid(5, 7, 11, text_after=1), CLEARAttn(radius=3, frame_radius=2)),
        (TokenGrid(3, 8, 9), CLEARAttn(radius=3, frame_radius=2, window="cylinder")),
        (TokenGrid(2, 8, 8, text_before=1), CLEARAttn(radius=3, frame_radius=1, first_frame=False)),
    ],
    ids=lambda x: str(x) if isinstance(x, TokenGrid) else "",
)
def test_output_and_gradients_are_those_of_dense_attention_under_the_mask(
    grid: TokenGrid, method: CLEARAttn
) -> None:
    q, k, v = (noise(3, grid.tokens, 2, 32, seed=i).requires_grad_() for i in range(3))
    mask = definition(grid, method.for_model("", grid))
    key_mask = torch.rand(3, grid.tokens, generator=torch.Generator().manual_seed(3)) < 0.8
    key_mask |= mask.all(0)  # every query sees something
    for keys in (None, key_mask):
        out = method.attend(q, k, v, Site("flux", 0, 1, grid), key_mask=keys)
        seen = mask if keys is None else mask & keys[:, None, None, :]
        seen = seen.expand(3, 1, -1, -1) if seen.ndim == 4 else seen
        want, _ = reference_attention(*(x.double() for x in (q, k, v)), seen)
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
        weights = noise(*out.shape, seed=9)
        found = torch.autograd.grad(out, (q, k, v), weights)
        true = torch.autograd.grad(want, (q, k, v), weights.double())
        for ours, theirs in zip(found, true, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def flux_inputs(height: int, width: int, text: int = 7) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, height * width, 16),
        "encoder_hidden_states": noise(BATCH, text, 16, seed=1),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": tiny_families.image_ids(height, width),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }


@pytest.mark.parametrize(("height", "width", "text"), [(6, 9, 7), (11, 19, 1), (16, 16, 7)])
def test_flux_is_the_stock_model_with_the_mask(height: int, width: int, text: int) -> None:
    model, inputs = tiny_families.flux(), flux_inputs(height, width, text)
    method = CLEARAttn(radius=3)
    grid = TokenGrid(1, height, width, text_before=text)
    dense = forward(model, inputs)
    with stock.masked(model, list(family_of(model).layers(model)), lambda _: grid, method):
        want = forward(model, inputs)
    assert not torch.allclose(want, dense, atol=1e-3), "the mask should matter"
    attachment = diffattn.set_attn_processor(model, method)
    torch.testing.assert_close(forward(model, inputs), want, atol=1e-5, rtol=1e-4)
    assert attachment.sparse_calls == 4
    diffattn.set_attn_processor(model, None)
    assert torch.equal(forward(model, inputs), dense)


@pytest.mark.parametrize("window", ["ellipsoid", "cylinder"])
def test_wan_is_the_stock_model_with_the_mask(window: str) -> None:
    model = tiny_wan.transformer()
    inputs = {
        "hidden_states": noise(BATCH, 16, 5, 12, 14),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 5, tiny_wan.TEXT_DIM, seed=1),
    }
    method = CLEARAttn(radius=3, frame_radius=2, window=window)
    grid = TokenGrid(5, 6, 7)
    with stock.masked(model, list(family_of(model).layers(model)), lambda _: grid, method):
        want = forward(model, inputs)
    assert not torch.allclose(want, forward(model, inputs), atol=1e-3), "the mask should matter"
    diffattn.set_attn_processor(model, method)
    torch.testing.assert_close(forward(model, inputs), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "grid"),
    [("flux", TokenGrid(1, 64, 64)), ("wan2.1", TokenGrid(21, 30, 52)), ("something else", None)],
)
def test_recommended_settings(family: str, grid: TokenGrid | None) -> None:
    method = CLEARAttn().for_model(family, grid)
    assert (method.radius, method.window, method.frame_radius) == (16, "ellipsoid", 8)
    assert method.first_frame is True
    assert (method.dense_layers, method.dense_steps) == (0, 0)
    given = CLEARAttn(
        radius=8, window="cylinder", frame_radius=2, first_frame=False, dense_layers=1
    )
    assert given.for_model(family, grid) == CLEARAttn(
        radius=8,
        window="cylinder",
        frame_radius=2,
        first_frame=False,
        dense_layers=1,
        dense_steps=0,
    )


def test_a_method_writes_itself_out() -> None:
    method = CLEARAttn(radius=8, window="cylinder")
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert eval(repr(method), {"CLEARAttn": CLEARAttn}) == method


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"radius": 0}, "radius is 0, but must be an integer of at least 1"),
        ({"radius": 7.5}, "radius is 7.5, but must be an integer of at least 1"),
        ({"frame_radius": -1}, "frame_radius is -1, but must be an integer of at least 1"),
        ({"window": "box"}, "window is 'box', but must be one of ellipsoid, cylinder"),
        ({"first_frame": 1}, "first_frame is 1, but must be true or false"),
    ],
)
def test_bad_parameters(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        CLEARAttn(**parameters)


def cells_by_definition(grid: TokenGrid, side: int) -> torch.Tensor:
    """Bool (cells, video tokens): which tokens are in which cell, cell by cell."""
    cells = []
    for frame in range(grid.frames):
        for top in range(0, grid.height - side + 1, side):
            for left in range(0, grid.width - side + 1, side):
                cell = torch.zeros(grid.frames, grid.height, grid.width, dtype=torch.bool)
                cell[frame, top : top + side, left : left + side] = True
                cells.append(cell.flatten())
    return torch.stack(cells) if cells else torch.zeros(0, grid.video_tokens, dtype=torch.bool)


def with_cells(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: TokenGrid,
    method: CLEARAttn,
    weight: torch.Tensor,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of tensors (batch, tokens, heads, head_dim) with the cells among the keys."""
    cells = cells_by_definition(grid, method.down_factor)
    summing = torch.zeros(cells.shape, dtype=q.dtype)
    for i, cell in enumerate(cells):
        # Rows and columns of a cell are in raster order among its tokens, and so in the weights.
        summing = summing.index_put(
            (torch.tensor(i), cell.nonzero().flatten()), weight.flatten().to(q.dtype)
        )
    more = [torch.einsum("cn,bnhd->bchd", summing, x[:, grid.video]) for x in (k, v)]
    video = ~grid.is_text(torch.arange(grid.tokens))
    seen = torch.cat([definition(grid, method), video[:, None].expand(-1, len(cells))], 1)
    if key_mask is not None:
        counted = torch.nn.functional.pad(key_mask, (0, len(cells)), value=True)
        seen = seen & counted[:, None, None, :]
    k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@dataclass(frozen=True, kw_only=True)
class ByDefinition(DenseAttn):
    """CLEAR pair by pair, all of them, with cells that are means."""

    clear: CLEARAttn

    def for_model(self, family: str, grid: TokenGrid | None = None) -> "ByDefinition":
        return self

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, site: Site, **rest: Any
    ) -> torch.Tensor:
        side = self.clear.down_factor
        mean = torch.full((side, side), side**-2)
        tensors = (x.double() for x in (query, key, value))
        out = with_cells(*tensors, site.grid, self.clear, mean, **rest)
        return out.to(query.dtype)


@pytest.mark.parametrize("side", [2, 100])  # no grid here has a cell of 100 x 100 tokens
@pytest.mark.parametrize("name", tiny_families.CASES)
def test_every_family_attends_by_it(name: str, side: int) -> None:
    case = tiny_families.CASES[name]
    model, inputs = case.build(), case.inputs()
    method = CLEARAttn(radius=2, frame_radius=2, down_factor=1 if side > 2 else side)
    with_defaults = replace(method.for_model(""), down_factor=side)
    dense = forward(model, inputs)
    diffattn.set_attn_processor(model, ByDefinition(clear=with_defaults))
    want = forward(model, inputs)
    attachment = diffattn.set_attn_processor(model, method)
    torch.testing.assert_close(forward(model, inputs), want, atol=2e-5, rtol=1e-4)
    assert attachment.sparse_calls == len(case.sites)
    assert not torch.allclose(want, dense, atol=1e-4), "the mask should matter"


class Weights(torch.nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.spatial_weight = torch.nn.Parameter(noise(side, side, seed=8))


@pytest.mark.parametrize(
    ("grid", "side"),
    [
        (TokenGrid(1, 12, 20, text_before=7), 4),
        (TokenGrid(1, 13, 23, text_before=1), 4),  # cells do not cover the last row and columns
        (TokenGrid(1, 11, 12, text_after=5), 2),
        (TokenGrid(3, 7, 9, text_after=1), 3),
        (TokenGrid(1, 3, 9), 4),  # no cell at all
    ],
    ids=str,
)
def test_cells_are_keys_in_the_same_softmax(grid: TokenGrid, side: int) -> None:
    method = CLEARAttn(radius=3, down_factor=side).for_model("", grid)
    weights = Weights(side)
    q, k, v = (noise(3, grid.tokens, 2, 32, seed=i).double().requires_grad_() for i in range(3))
    out = method.attend(q, k, v, Site("flux", 0, 1, grid, weights=weights))
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weights.spatial_weight)]
    want = with_cells(*leaves[:3], grid, method, leaves[3])
    torch.testing.assert_close(out, want, atol=1e-9, rtol=1e-9)
    up = noise(*out.shape, seed=9).double()
    ours = [q, k, v, weights.spatial_weight]
    found = torch.autograd.grad(out, ours, up, allow_unused=True)
    true = torch.autograd.grad(want, leaves, up, allow_unused=True)
    # Where there is no cell nothing depends on the weights.
    assert (found[3] is None) == (grid.height < side)
    for mine, theirs in zip(found, true, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_text_sees_what_it_sees_without_cells() -> None:
    grid = TokenGrid(1, 8, 12, text_before=5)
    q, k, v = (noise(2, grid.tokens, 2, 16, seed=i) for i in range(3))
    site = Site("flux", 0, 1, grid)
    dense, _ = reference_attention(q, k, v, torch.ones(grid.tokens, grid.tokens, dtype=torch.bool))
    for side in (1, 2, 4, 100):
        out = CLEARAttn(radius=3, down_factor=side).attend(q, k, v, site)
        torch.testing.assert_close(out[:, :5], dense[:, :5].float(), atol=1e-6, rtol=1e-5)


def test_bands_of_rows_with_their_halo_are_the_whole() -> None:
    golden = np.load(GOLDENS / "6_halo_derived.npz")
    height, width, text, radius, _, _ = golden["cfg_H_W_T_r_headdim_P"].tolist()
    q, k, v = (torch.from_numpy(golden[name])[None, :, None] for name in "qkv")
    grid = TokenGrid(1, height, width, text_before=text)
    whole = CLEARAttn(radius=radius).attend(q, k, v, Site("flux", 0, 1, grid))[0, :, 0]
    torch.testing.assert_close(whole, torch.from_numpy(golden["out_full"]), atol=1e-12, rtol=0)

    # Text sees the bands one after the other: added to a softmax, they make that of all.
    words, out, lse = q[:, :text], None, None
    for first, end, halo_first, halo_end in golden["rank_rows_and_halo"].tolist():
        assert (halo_first, halo_end) == (
            max(0, first - radius + 1), min(height, end + radius - 1)
        )  # fmt: skip
        # Of the rows beyond its halo a band sees nothing.
        mask = CLEARAttn(radius=radius).mask(TokenGrid(1, height, width)).dense()
        seen = mask.view(height, width, height, width)[first:end].any(3).any(1).any(0)
        assert seen.nonzero().flatten().tolist() == list(range(halo_first, halo_end))
        band = slice(text + first * width if out is not None else 0, text + end * width)
        key, value = k[:, band], v[:, band]
        layout = every_pair(text, key.shape[1], torch.device("cpu"))
        if out is None:
            out, lse = diffattn.attention(words, key, value, layout, return_lse=True)
        else:
            out = add_keys(out, lse, words, key, value, layout, None)
            _, more = diffattn.attention(words, key, value, layout, return_lse=True)
            lse = torch.logaddexp(lse, more)
    want = torch.from_numpy(golden["text_lse_merged"])
    torch.testing.assert_close(out[0, :, 0], want, atol=1e-12, rtol=0)


def test_pooled_keys_are_those_of_the_public_code() -> None:
    golden = np.load(GOLDENS / "1_masks.npz")
    for case, config in enumerate(golden["configs_H_W_T_r_d"].tolist()):
        height, width, text, _, side = config
        if side > 1:
            grid = TokenGrid(1, height, width, text_before=text)
            want = golden_mask(golden, f"m{case}")[:, grid.tokens :]
            assert want.shape[1] == len(cells_by_definition(grid, side))
            assert want[text:].all()
            assert not want[:text].any()


@pytest.mark.parametrize("scale", ["out", "out_proportional"])
@pytest.mark.parametrize("name", ["3_local_double", "4_down_double"])
def test_attention_modules_are_those_of_the_public_code(
    name: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttention

    golden = np.load(GOLDENS / f"{name}.npz")
    config = next(golden[key] for key in golden.files if key.startswith("cfg")).tolist()
    height, width, text, radius, heads, head_dim, *rest = config
    side = rest[0] if rest else 1
    proportional = scale == "out_proportional"
    method = CLEARAttn(
        radius=radius,
        down_factor=side,
        proportional_attention=proportional,
        reference_scale=proportional and side > 1,
    )
    grid = TokenGrid(1, height, width, text_before=text)
    weights = Weights(side)
    if side > 1:
        weights.spatial_weight.data = torch.from_numpy(golden["spatial_weight"]).view(side, side)
    module = FluxAttention(
        heads * head_dim,
        heads=heads,
        dim_head=head_dim,
        added_kv_proj_dim=heads * head_dim,
        added_proj_bias=True,
        out_bias=True,
        context_pre_only=False,
        bias=True,
        eps=1e-6,
    )
    state = {k[2:]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith("w.")}
    module.load_state_dict(state)

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return method.attend(q, k, v, Site("flux", 0, 1, grid, weights=weights)).transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    image, words, cos, sin = (
        torch.from_numpy(golden[key]) for key in ("image", "text", "rope_cos", "rope_sin")
    )
    with torch.no_grad():
        image, words = module(image, words, image_rotary_emb=(cos, sin))
    out = torch.cat([words, image], 1)
    torch.testing.assert_close(out, torch.from_numpy(golden[scale]), atol=2e-5, rtol=0)


def test_scales_are_those_of_the_public_code() -> None:
    golden = np.load(GOLDENS / "7_scalars.npz")
    local = CLEARAttn(proportional_attention=True)
    down = CLEARAttn(proportional_attention=True, down_factor=4, reference_scale=True)
    for method, name in ((local, "local"), (down, "down")):
        for tokens, factor in zip(
            golden["seq_lens_text_plus_image"].tolist(),
            golden[f"prop_scale_times_sqrt_d_{name}"].tolist(),
            strict=True,
        ):
            grid = TokenGrid(1, 1, tokens - 512, text_before=512)
            assert method.score_scale(grid, 64, None) == pytest.approx(factor / 8, rel=1e-12)
            assert method.score_scale(grid, 64, 0.5) == pytest.approx(factor / 2, rel=1e-12)
    assert CLEARAttn().score_scale(TokenGrid(1, 1, 9), 64, None) is None
    # Our own scale counts the tokens of the sequence, with cells or without.
    own = CLEARAttn(proportional_attention=True, down_factor=4)
    assert own.score_scale(TokenGrid(1, 64, 64, 512), 64, None) == pytest.approx(1 / 8)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("text", [{}, {"text_before": 7}, {"text_after": 70}], ids=str)
@pytest.mark.parametrize("side", [1, 3])
def test_proportional_attention_counts_every_token_of_the_sequence(
    side: int, text: dict[str, int], scale: float | None
) -> None:
    """Scores grow with the root of the logarithm of tokens, text included and cells not."""
    grid = TokenGrid(1, 6, 9, **text)
    method = CLEARAttn(
        radius=3, down_factor=side, proportional_attention=True, trained_tokens=20
    ).for_model("", grid)
    weights = Weights(side)
    q, k, v = (noise(2, grid.tokens, 2, 16, seed=i) for i in range(3))
    site = Site("flux", 0, 1, grid, weights=weights if side > 1 else None)
    out = method.attend(q, k, v, site, scale=scale)
    sharper = math.sqrt(math.log(54 + sum(text.values())) / math.log(20))
    scale = sharper * (1 / 4 if scale is None else scale)
    if side > 1:
        want = with_cells(q, k, v, grid, method, weights.spatial_weight, scale)
    else:
        want = reference_attention(q, k, v, definition(grid, method), scale=scale)[0].float()
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def sdpa_with_cells(model: Any, grid: TokenGrid, method: CLEARAttn) -> Any:
    """What PyTorch's attention is replaced by to get the stock model with cells."""
    weights = iter(list(model.sites_weights))

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scale = method.score_scale(grid, q.shape[-1], None)
        return with_cells(q, k, v, grid, method, next(weights), scale).transpose(1, 2)

    return sdpa


WITH_CELLS = CLEARAttn(radius=2, down_factor=2, proportional_attention=True)


def trained(model: torch.nn.Module) -> list[torch.Tensor]:
    """Give the cells of each layer of an attached Flux weights of their own."""
    out = []
    for i, name in enumerate(family_of(model).layers(model)):
        weight = model.get_submodule(name).clear.spatial_weight
        weight.data.copy_(noise(2, 2, seed=20 + i))
        out.append(weight.detach().clone())
    return out


@pytest.mark.parametrize(("height", "width"), [(6, 9), (8, 16)])
def test_flux_with_cells_is_the_stock_model_with_them(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_families.flux(), flux_inputs(height, width)
    grid, method = TokenGrid(1, height, width, text_before=7), WITH_CELLS.for_model("flux")
    diffattn.set_attn_processor(model, method)
    weights = trained(model)
    out = forward(model, inputs)
    diffattn.set_attn_processor(model, None)
    model.sites_weights = weights
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", sdpa_with_cells(model, grid, method)
    )
    torch.testing.assert_close(out, forward(model, inputs), atol=1e-5, rtol=1e-4)


class TestWeightsOfSites:
    def test_state_dict_and_optimizers_see_them_while_attached(self) -> None:
        model = tiny_families.flux()
        before = list(model.state_dict())
        diffattn.set_attn_processor(model, WITH_CELLS)
        sites = list(family_of(model).layers(model))
        added = {name for name, _ in model.named_parameters()} - set(before)
        assert added == {f"{site}.clear.spatial_weight" for site in sites}
        for name in added:
            weight = model.get_parameter(name)
            assert weight.requires_grad
            assert torch.equal(weight, torch.full((2, 2), 0.25))
        assert model.to(torch.bfloat16).get_parameter(min(added)).dtype == torch.bfloat16
        diffattn.set_attn_processor(model, None)
        assert list(model.state_dict()) == before

    def test_none_leaves_no_trace(self) -> None:
        model, inputs = tiny_families.flux(), flux_inputs(6, 9)
        want = forward(model, inputs)
        theta = model.pos_embed.theta
        diffattn.set_attn_processor(model, CLEARAttn(radius=2, down_factor=2, ntk_factor=10))
        assert not torch.allclose(forward(model, inputs), want, atol=1e-3)
        diffattn.set_attn_processor(model, None)
        assert model.pos_embed.theta == theta
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any("clear" in m._modules for m in model.modules())
        assert torch.equal(forward(model, inputs), want)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_reach_each_layers_own(self, checkpointing: bool) -> None:
        model, inputs = tiny_families.flux(), flux_inputs(6, 9)
        diffattn.set_attn_processor(model, WITH_CELLS)
        trained(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        names = [name for name, _ in model.named_parameters() if "spatial_weight" in name]
        assert len(names) == 4
        for name in names:
            weight, step = model.get_parameter(name), 1e-2
            direction = weight.grad / weight.grad.norm()
            losses = []
            with torch.no_grad():
                for sign in (1, -1):
                    weight += sign * step * direction
                    losses.append(model(**inputs, return_dict=False)[0].square().mean().item())
                    weight -= sign * step * direction
            slope = (losses[0] - losses[1]) / (2 * step)
            assert slope == pytest.approx(weight.grad.norm().item(), rel=0.05), name

    def test_a_copied_model_has_its_own(self) -> None:
        import copy

        model, inputs = tiny_families.flux(), flux_inputs(6, 9)
        diffattn.set_attn_processor(model, CLEARAttn(radius=2, down_factor=2, ntk_factor=3))
        trained(model)
        want = forward(model, inputs)
        copied = copy.deepcopy(model)
        assert torch.equal(forward(copied, inputs), want)
        for name, weight in copied.named_parameters():
            if "spatial_weight" in name:
                weight.data.zero_()
        assert not torch.equal(forward(copied, inputs), want)
        assert torch.equal(forward(model, inputs), want)
        diffattn.set_attn_processor(copied, None)
        assert copied.pos_embed.theta == 10000
        assert model.pos_embed.theta == 30000
        assert torch.equal(forward(model, inputs), want)

    def test_compiled_blocks_use_their_own(self) -> None:
        model, inputs = tiny_families.flux(), flux_inputs(6, 9)
        diffattn.set_attn_processor(model, WITH_CELLS)
        trained(model)
        want = forward(model, inputs)
        torch.compiler.reset()
        for block in model.single_transformer_blocks:
            block.compile(backend="eager")
        torch.testing.assert_close(forward(model, inputs), want, atol=1e-5, rtol=1e-4)


def test_ntk_factor_is_the_stock_model_with_another_base() -> None:
    model, inputs = tiny_families.flux(), flux_inputs(6, 9)
    model.pos_embed.theta = 100_000
    method = CLEARAttn(radius=3)
    diffattn.set_attn_processor(model, method)
    want = forward(model, inputs)
    diffattn.set_attn_processor(model, None)
    model.pos_embed.theta = 10_000
    diffattn.set_attn_processor(model, CLEARAttn(radius=3, ntk_factor=10))
    torch.testing.assert_close(forward(model, inputs), want, atol=1e-6, rtol=1e-5)
    parts = {"transformer_blocks.*": CLEARAttn(radius=3, ntk_factor=10), "*": method}
    diffattn.set_attn_processor(model, parts)
    assert model.pos_embed.theta == 100_000, "a factor that two share counts once"
    parts = {"transformer_blocks.*": CLEARAttn(ntk_factor=10), "*": CLEARAttn(ntk_factor=2)}
    with pytest.raises(ValueError, match=r"different ways.*ntk_factor=10 and ntk_factor=2"):
        diffattn.set_attn_processor(model, parts)
    assert model.pos_embed.theta == 10_000


def test_ntk_factor_is_refused_where_there_is_no_such_embedding() -> None:
    with pytest.raises(ValueError, match=r"ntk_factor is 10, but WanTransformer3DModel does not"):
        diffattn.set_attn_processor(tiny_wan.transformer(), CLEARAttn(ntk_factor=10))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"down_factor": 0}, "down_factor is 0, but must be an integer of at least 1"),
        ({"trained_tokens": 1}, "trained_tokens is 1, but must be an integer of at least 2"),
        ({"proportional_attention": 1}, "proportional_attention is 1, but must be true or false"),
        ({"reference_scale": "x"}, "reference_scale is 'x', but must be true or false"),
        ({"reference_scale": True}, "reference_scale is True, but .* leave it out"),
        ({"ntk_factor": 0.5}, "ntk_factor is 0.5, but must be a number of at least 1"),
        ({"ntk_factor": True}, "ntk_factor is True, but must be a number of at least 1"),
        ({"ntk_factor": float("inf")}, "ntk_factor is inf, but must be a number"),
    ],
)
def test_bad_parameters_beyond_the_window(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        CLEARAttn(**parameters)


def test_compiled_code_has_the_scale_and_no_graph_break() -> None:
    model, inputs = tiny_families.flux(), flux_inputs(6, 9)
    method = CLEARAttn(radius=3, proportional_attention=True)
    diffattn.set_attn_processor(model, CLEARAttn(radius=3))
    other = forward(model, inputs)
    diffattn.set_attn_processor(model, method)
    want = forward(model, inputs)
    assert not torch.allclose(want, other, atol=1e-4), "the scale should matter"
    torch.compiler.reset()
    for block in model.single_transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(forward(model, inputs), want, atol=1e-5, rtol=1e-4)


def test_wan_with_a_window_is_that_of_the_goldens() -> None:
    golden = np.load(GOLDENS / "8_video_derived.npz")
    frames, height, width, frame_radius, radius = golden["wan_cfg_F_H_W_rt_rs"].tolist()
    state = {k[6:]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith("wan_w.")}
    inputs = {k[7:]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith("wan_in.")}
    channels = inputs["hidden_states"].shape[1]
    model = tiny_families.make(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=inputs["encoder_hidden_states"].shape[2],
        freq_dim=state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
        ffn_dim=len(state["blocks.0.ffn.net.0.proj.weight"]),
        num_layers=2,
        rope_max_seq_len=32,
    )
    model.load_state_dict(state)
    torch.testing.assert_close(
        forward(model, inputs), torch.from_numpy(golden["wan_out_full"]), atol=2e-5, rtol=0
    )
    method = CLEARAttn(radius=radius, frame_radius=frame_radius, first_frame=False)
    attachment = diffattn.set_attn_processor(model, method)
    torch.testing.assert_close(
        forward(model, inputs), torch.from_numpy(golden["wan_out_window"]), atol=2e-5, rtol=0
    )
    assert next(iter(attachment.models.values())).grid == TokenGrid(frames, height, width)
