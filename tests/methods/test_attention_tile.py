"""AttentionTileAttn against goldens of the definition, the paper's table, and the definition."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import golden_files
import numpy as np
import pytest
import stock
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import CASES

from diffattn import AttentionTileAttn, TokenGrid
from diffattn.blocks import PARTIAL
from diffattn.masks.base import Blocking
from diffattn.masks.frame_pairs import FramePairsMask
from diffattn.methods import Site, from_dict
from diffattn.operator import attention
from diffattn.orders import TileOrder
from diffattn.tile_calibration import CANDIDATES


def frames_seen_by_all(frames: int, count: int) -> set[int]:
    """The paper's R: i * ceil(N / k) for i = 0 .. k - 1, as far as there are such frames."""
    return {i * math.ceil(frames / count) for i in range(count)} & set(range(frames))


def by_definition(grid: TokenGrid, count: int) -> torch.Tensor:
    """bool (tokens, tokens): text sees and is seen by all, frames by the paper's rule."""
    seen_by_all = frames_seen_by_all(grid.frames, count)
    out = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for q in range(grid.video_tokens):
        for k in range(grid.video_tokens):
            i, j = q // grid.frame_tokens, k // grid.frame_tokens
            seen = i == j or i in seen_by_all or j in seen_by_all
            out[grid.text_before + q, grid.text_before + k] = seen
    return out


class TestGoldens:
    PATHS = golden_files.matching("vdit/d0[1-8]*.npz", 8)

    @pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
    def test_masks_and_blocks(self, path: Path) -> None:
        golden = np.load(path)
        meta = ast.literal_eval(golden["meta"].item())
        frames, size, block = meta["frames"], meta["tokens_per_frame"], meta["block"]
        method = AttentionTileAttn(global_frames=meta["k"])
        assert list(method.global_frames_of(frames)) == golden["references"].tolist()
        assert method.frame_pairs(frames) == golden["frame_mask"].sum()
        mask = method.mask(TokenGrid(frames, 1, size))
        want = torch.from_numpy(golden["frame_mask"]).bool()
        want = want.repeat_interleave(size, 0).repeat_interleave(size, 1)
        assert torch.equal(mask.dense(), want)
        blocking = Blocking(block, block, torch.device("cpu"))
        np.testing.assert_array_equal(mask.block_states(blocking).numpy(), golden["block_states"])
        layout = mask.blocks(block)
        assert torch.equal(layout.dense()[0, 0], want)
        visited = golden["block_states"] > 0
        assert layout.full_count.sum() == (golden["block_states"] == 2).sum()
        assert layout.partial_count.sum() + layout.full_count.sum() == visited.sum()

    @pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
    def test_outputs_and_gradients(self, path: Path) -> None:
        golden = np.load(path)
        meta = ast.literal_eval(golden["meta"].item())
        q, k, v, do = (
            torch.from_numpy(golden[name]).float().div(16).transpose(1, 2).contiguous()
            for name in ("q", "k", "v", "do")
        )
        for x in (q, k, v):
            x.requires_grad_()
        grid = TokenGrid(meta["frames"], 1, meta["tokens_per_frame"])
        method = AttentionTileAttn(global_frames=meta["k"])
        out = method.attend(q, k, v, Site("", 0, 1, grid))
        found = (out, *torch.autograd.grad(out, (q, k, v), do))
        for name, x in zip(("o", "dq", "dk", "dv"), found, strict=True):
            want = torch.from_numpy(golden[name]).transpose(1, 2)
            torch.testing.assert_close(x, want, atol=3e-6, rtol=1e-5)

    def test_block_sparsities_of_the_paper(self) -> None:
        (path,) = golden_files.matching("vdit/d09_paper_table.npz", 1)
        for frames, k, printed, exact in np.load(path)["table"]:
            grid = TokenGrid(int(frames), 45, 80)
            layout = AttentionTileAttn(global_frames=int(k)).mask(grid).blocks(128)
            sparsity = 100 * (1 - layout.density)
            assert sparsity == pytest.approx(exact, abs=1e-6)
            assert round(sparsity, 2) == printed


any_grid = st.builds(
    TokenGrid,
    frames=st.integers(1, 9),
    height=st.integers(1, 3),
    width=st.integers(1, 5),
    text_before=st.integers(0, 9),
    text_after=st.integers(0, 9),
)


class TestMask:
    @given(
        grid=any_grid,
        count=st.integers(1, 12),
        block_q=st.integers(1, 30),
        block_kv=st.integers(1, 30),
        tile=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    )
    @settings(max_examples=40, deadline=None)
    def test_any_grid_blocks_and_order(
        self,
        grid: TokenGrid,
        count: int,
        block_q: int,
        block_kv: int,
        tile: tuple[int, int, int] | None,
    ) -> None:
        method = AttentionTileAttn(global_frames=count)
        mask, want = method.mask(grid), by_definition(grid, count)
        assert torch.equal(mask.dense(), want)
        assert mask.density == pytest.approx(want.double().mean().item(), abs=1e-12)
        order = None if tile is None else TileOrder(grid, tile)
        there = torch.arange(grid.tokens) if order is None else order.positions()
        laid_out = mask.blocks(block_q, block_kv, order=order).dense()[0, 0]
        assert torch.equal(laid_out, want[there][:, there])

    @given(grid=any_grid, count=st.integers(1, 4), block_q=st.integers(1, 30), data=st.data())
    @settings(max_examples=40, deadline=None)
    def test_states_are_exact_and_signatures_hold(
        self, grid: TokenGrid, count: int, block_q: int, data: st.DataObject
    ) -> None:
        mask = AttentionTileAttn(global_frames=count).video_mask(grid)
        block_kv = data.draw(st.integers(1, 30))
        blocking = Blocking(block_q, block_kv, torch.device("cpu"))
        states, dense = mask.block_states(blocking), mask.dense()
        row, column = (states == PARTIAL).nonzero(as_tuple=True)
        numbers = mask.block_signatures(row, column, blocking)
        of_number: dict[int, torch.Tensor] = {}
        for r in range(states.shape[0]):
            for c in range(states.shape[1]):
                pairs = dense[r * block_q :][:block_q, c * block_kv :][:, :block_kv]
                want = 2 if pairs.all() else int(pairs.any())
                assert states[r, c] == want
        if numbers is None:
            return
        for r, c, number in zip(row.tolist(), column.tolist(), numbers.tolist(), strict=True):
            pairs = dense[r * block_q :][:block_q, c * block_kv :][:, :block_kv]
            if tuple(pairs.shape) == (block_q, block_kv):
                assert torch.equal(of_number.setdefault(number, pairs), pairs)

    def test_few_masks_are_looked_at_token_by_token(self) -> None:
        grid = TokenGrid(21, 30, 52)
        mask = AttentionTileAttn(global_frames=5).video_mask(grid)
        blocking = Blocking(128, 128, torch.device("cpu"))
        row, column = (mask.block_states(blocking) == PARTIAL).nonzero(as_tuple=True)
        numbers = mask.block_signatures(row, column, blocking)
        assert numbers is not None
        assert len(row) > 3000
        assert len(numbers.unique()) < 300

    def test_without_other_frames_the_relation_is_dense(self) -> None:
        for frames in (1, 2, 5):
            grid = TokenGrid(frames, 2, 3)
            assert AttentionTileAttn(global_frames=frames).mask(grid).dense().all()
            assert AttentionTileAttn(global_frames=frames + 4).mask(grid).dense().all()
            assert AttentionTileAttn(global_frames=1.0).mask(grid).dense().all()

    def test_one_global_frame_is_a_row_a_column_and_the_diagonal(self) -> None:
        relation = AttentionTileAttn(global_frames=1).mask(TokenGrid(7, 1, 1)).dense()
        want = torch.eye(7, dtype=torch.bool)
        want[0] = want[:, 0] = True
        assert torch.equal(relation, want)

    @given(frames=st.integers(1, 60), count=st.integers(1, 70))
    @settings(deadline=None)
    def test_global_frames_and_pairs(self, frames: int, count: int) -> None:
        method = AttentionTileAttn(global_frames=count)
        found = method.global_frames_of(frames)
        assert set(found) == frames_seen_by_all(frames, count)
        assert list(found) == sorted(set(found))
        relation = method.mask(TokenGrid(frames, 1, 1)).dense()
        assert torch.equal(relation, relation.T)
        assert relation.diagonal().all()
        assert int(relation.sum()) == method.frame_pairs(frames)
        if frames % count == 0:  # linear in the number of frames
            assert int(relation.sum()) == frames * (1 + 2 * count) - count**2 - count
        assert method.is_full_on(TokenGrid(frames, 2, 2)) == bool(relation.all())

    def test_fractions_are_the_paper_s_counts(self) -> None:
        def counts(frames: int) -> list[int]:
            tiles = [AttentionTileAttn(global_frames=share) for share in CANDIDATES]
            return [len(tile.global_frames_of(frames)) for tile in tiles]

        assert counts(24) == [1, 3, 4, 6, 8, 12]
        assert counts(8) == [1, 1, 1, 2, 3, 4]
        assert AttentionTileAttn().global_frames_of(21) == tuple(range(0, 21, 2))
        assert AttentionTileAttn(global_frames=0.01).global_frames_of(21) == (0,)
        assert AttentionTileAttn(global_frames=4).global_frames_of(9) == (0, 3, 6)

    def test_a_relation_of_other_frames_is_refused(self) -> None:
        message = r"relation has shape \(3, 3\), but the grids have 4 x 2 frames"
        with pytest.raises(ValueError, match=message):
            FramePairsMask(
                TokenGrid(4, 1, 2),
                torch.ones(3, 3, dtype=torch.bool),
                TokenGrid(2, 1, 2, text_after=4),
            )


@pytest.mark.parametrize("grid", [TokenGrid(5, 3, 7, 3, 10), TokenGrid(9, 2, 2, 0, 5)], ids=str)
def test_attention_beside_text_with_padding(grid: TokenGrid) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(2, grid.tokens, 2, 16, generator=generator, dtype=torch.float64)
        for _ in range(4)
    )
    key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
    key_mask[1, -3:] = False
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    method = AttentionTileAttn(global_frames=2)
    out = method.attend(*leaves, Site("", 0, 1, grid), scale=0.3, key_mask=key_mask)
    found = (out, *torch.autograd.grad(out, leaves, upstream))
    others = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = by_definition(grid, 2) & key_mask[:, None, None, :]
    scores = torch.einsum("bqhd,bkhd->bhqk", *others[:2]) * 0.3
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    want = torch.einsum("bhqk,bkhd->bqhd", weights, others[2])
    expected = (want, *torch.autograd.grad(want, others, upstream))
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, atol=1e-10, rtol=1e-10)


def test_the_layout_alone_gives_the_method_s_output() -> None:
    grid = TokenGrid(6, 4, 5)
    method = AttentionTileAttn(global_frames=0.3)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 16).unbind(0)
    out = method.attend(q, k, v, Site("", 0, 1, grid))
    assert method.order(grid) is None
    torch.testing.assert_close(out, attention(q, k, v, method.mask(grid)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["cogvideox-5b", "hunyuanvideo", "allegro-padded", "skyreels-v2"])
def test_attached_is_the_stock_model_with_that_mask(name: str) -> None:
    stock.check_attached(CASES[name], AttentionTileAttn(global_frames=1))


def test_settings() -> None:
    for family in ("wan2.1", "cogvideox", "something else"):
        fitted = AttentionTileAttn().for_model(family, TokenGrid(21, 30, 52))
        assert (fitted.global_frames, fitted.dense_layers, fitted.dense_steps) == (0.5, 0, 0)
    kept = AttentionTileAttn(global_frames=3, dense_layers=1, dense_steps=0.2).for_model("wan2.1")
    assert (kept.global_frames, kept.dense_layers, kept.dense_steps) == (3, 1, 0.2)
    method = AttentionTileAttn(global_frames=1 / 3)
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert hash(method) == hash(AttentionTileAttn(global_frames=1 / 3))


def test_quality_without_training_is_said_to_be_unknown() -> None:
    said = AttentionTileAttn().caution(TokenGrid(21, 30, 52))
    assert said == (
        "the paper trains models for these masks; the quality without training is not known"
    )
    assert AttentionTileAttn().caution(TokenGrid(1, 64, 64)) is None
    assert AttentionTileAttn(global_frames=21).caution(TokenGrid(21, 30, 52)) is None


@pytest.mark.parametrize("value", [0, -2, 0.0, 1.5, math.nan, "half", True, {1: 2}])
def test_bad_parameters(value: Any) -> None:
    message = (
        f"global_frames is {value!r}, but must be an integer of at least 1, or a fraction of the"
        f" frames above 0.0 and up to 1.0"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionTileAttn(global_frames=value)
