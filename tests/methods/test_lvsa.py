"""LVSAAttn against the public code's masks, periods and outputs, and its own promises."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
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

from diffattn import LVSAAttn, TokenGrid
from diffattn.methods import Site, from_dict


def golden_and_method(path: Path) -> tuple[Any, dict[str, Any], LVSAAttn]:
    golden = np.load(path)
    meta = ast.literal_eval(golden["meta"].item())
    period: dict[str, Any] = {"period": meta["period"]}
    if meta["auto"]:
        period = {
            "period": "auto",
            "trained_frames": meta["reference_frames"],
            "sparsity_scale": meta["scale"],
        }
    method = LVSAAttn(
        window=meta["window"], first_frames=meta["first"], expand=meta["expand"], **period
    )
    return golden, meta, method


def at(method: LVSAAttn, phase: int) -> LVSAAttn:
    return replace(method, phase=phase)


class TestGoldens:
    PATHS = (*golden_files.matching("lvsa/l0*.npz", 9), *golden_files.matching("lvsa/l10*.npz", 1))

    @pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
    def test_masks_of_every_step(self, path: Path) -> None:
        golden, meta, method = golden_and_method(path)
        frames, size = meta["frames"], meta["tokens_per_frame"]
        assert method.period_on(frames) == meta["period"]
        for n, step in enumerate(golden["steps"].tolist()):
            turned = at(method, step)
            want = torch.from_numpy(golden["frame_masks"][n]).bool()
            assert torch.equal(turned.relation(frames), want)
            anchors = np.flatnonzero(golden["global_frames"][n]).tolist()
            assert list(turned.anchors(frames)) == anchors
            dense = want.repeat_interleave(size, 0).repeat_interleave(size, 1)
            assert torch.equal(turned.mask(TokenGrid(frames, 1, size)).dense(), dense)

    @pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
    def test_outputs_and_gradients(self, path: Path) -> None:
        golden, meta, method = golden_and_method(path)
        method = at(method, int(golden["steps"][-1]))
        q, k, v, do = (torch.from_numpy(golden[x]).float() / 16 for x in ("q", "k", "v", "do"))
        for x in (q, k, v):
            x.requires_grad_()
        grid = TokenGrid(meta["frames"], 1, meta["tokens_per_frame"])
        out = method.attend(q, k, v, Site("", 0, 1, grid))
        found = (out, *torch.autograd.grad(out, (q, k, v), do))
        for name, x in zip(("o", "dq", "dk", "dv"), found, strict=True):
            torch.testing.assert_close(x, torch.from_numpy(golden[name]), atol=3e-6, rtol=1e-5)

    def test_automatic_periods(self) -> None:
        (path,) = golden_files.matching("lvsa/l11_auto_period_table.npz", 1)
        table = np.load(path)["table"]
        assert len(table) == 3456
        for frames, window, first, trained, scale, period in table:
            method = LVSAAttn(
                window=int(window),
                first_frames=int(first),
                period="auto",
                trained_frames=int(trained),
                sparsity_scale=float(scale),
            )
            assert method.period_on(int(frames)) == period


class TestPromises:
    @given(
        frames=st.integers(1, 60),
        window=st.integers(0, 6),
        first=st.integers(0, 5),
        period=st.integers(0, 12),
        phase=st.integers(0, 30),
    )
    @settings(deadline=None)
    def test_frames_that_are_seen(
        self, frames: int, window: int, first: int, period: int, phase: int
    ) -> None:
        method = LVSAAttn(window=window, first_frames=first, period=period, phase=phase)
        anchors, relation = method.anchors(frames), method.relation(frames)
        assert set(range(min(first, frames))) <= set(anchors)
        assert relation[:, list(anchors)].all()
        if window:
            assert relation.diagonal().all()
            beside = min(2 * window + 1, frames - len(anchors))
            assert (relation.sum(1) == len(anchors) + beside).all()
        else:
            assert (relation.sum(1) == len(anchors)).all()
        if period:
            assert torch.equal(relation, at(method, phase + period).relation(frames))
            turns = [set(at(method, p).anchors(frames)) for p in range(period)]
            assert set().union(*turns) == set(range(frames))

    @given(
        grid=st.builds(
            TokenGrid,
            frames=st.integers(1, 14),
            height=st.integers(1, 3),
            width=st.integers(1, 4),
            text_before=st.integers(0, 6),
            text_after=st.integers(0, 6),
        ),
        window=st.integers(0, 2),
        period=st.integers(0, 5),
        block=st.integers(1, 40),
    )
    @settings(max_examples=40, deadline=None)
    def test_any_grid_with_text(
        self, grid: TokenGrid, window: int, period: int, block: int
    ) -> None:
        method = LVSAAttn(window=window, period=period, phase=1)
        frame = torch.arange(grid.video_tokens) // grid.frame_tokens
        want = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        want[grid.video, grid.video] = method.relation(grid.frames)[frame][:, frame]
        assert torch.equal(method.mask(grid).dense(), want)
        assert torch.equal(method.mask(grid).blocks(block).dense()[0, 0], want)

    @pytest.mark.parametrize("frames", [1, 13, 21])
    def test_videos_of_the_trained_length_are_dense(self, frames: int) -> None:
        method = LVSAAttn().for_model("wan2.1")
        assert method.period_on(frames) == 1
        assert method.mask(TokenGrid(frames, 2, 3)).dense().all()
        assert not method.mask(TokenGrid(33, 2, 3)).dense().all()


@pytest.mark.parametrize("name", ["cogvideox-1.5", "hunyuanvideo-1.5", "allegro-padded"])
@pytest.mark.parametrize("phase", [0, 1])
def test_attached_is_the_stock_model_with_that_mask(name: str, phase: int) -> None:
    method = LVSAAttn(window=0, first_frames=0, period=2, phase=phase)
    stock.check_attached(CASES[name], method)


def test_settings_of_models() -> None:
    for family, frames, period in (("wan2.1", 81, 6), ("hunyuanvideo", 49, 2), ("wan2.2", 41, 3)):
        fitted = LVSAAttn().for_model(family, TokenGrid(frames, 30, 52))
        assert fitted.period == "auto"
        assert fitted.period_on(frames) == period
        assert (fitted.dense_layers, fitted.dense_steps) == (0, 0)
    assert LVSAAttn().for_model("something else").period == 4
    assert LVSAAttn(trained_frames=10).for_model("something else").period == "auto"
    assert LVSAAttn(trained_frames=10).for_model("wan2.1").trained_frames == 10
    assert LVSAAttn(period=5).for_model("wan2.1").period == 5
    method = LVSAAttn(period="auto", phase=2, expand=False)
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_an_automatic_period_needs_the_trained_length() -> None:
    with pytest.raises(ValueError, match="period is 'auto', but the length that the model was"):
        LVSAAttn(period="auto").mask(TokenGrid(30, 2, 2))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"window": -1}, "window is -1, but must be an integer of at least 0"),
        ({"first_frames": 0.5}, "first_frames is 0.5, but must be an integer of at least 0"),
        (
            {"period": "automatic"},
            "period is 'automatic', but must be an integer of at",
        ),
        ({"period": -1}, "period is -1, but must be an integer of at least 0, or 'auto'"),
        ({"trained_frames": 0}, "trained_frames is 0, but must be an integer of at least 1"),
        ({"sparsity_scale": 0}, "sparsity_scale is 0, but must be a number above 0"),
        ({"sparsity_scale": math.inf}, "sparsity_scale is inf, but must be a number above 0"),
        ({"expand": 1}, "expand is 1, but must be true or false"),
        ({"phase": -1}, "phase is -1, but must be an integer of at least 0"),
        ({"phase": "turn"}, "phase is 'turn', but must be an integer of at least 0"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LVSAAttn(**parameters)
