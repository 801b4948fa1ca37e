"""FreeSwimAttn against the public code's masks, the rule pair by pair, and dense attention."""

import itertools
import math
from pathlib import Path
from typing import Any

import golden_files
import numpy as np
import pytest
import stock
import torch
from tiny_families import CASES

import diffattn
from diffattn import FreeSwimAttn, TokenGrid
from diffattn.masks.base import Blocking
from diffattn.methods import Site, from_dict
from diffattn.orders import TileOrder

GOLDENS = golden_files.GOLDENS / "freeswim"


def sees(q: int, k: int, size: int, d: int) -> bool:
    """Section 2 of the specification, along one axis."""
    return min(q - d, size - 1 - 2 * d) <= k <= max(q + d, 2 * d)


def by_definition(grid: TokenGrid, radius: tuple[int, int]) -> torch.Tensor:
    """The mask of a whole sequence, its text dense."""
    want = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for q, k in itertools.product(range(grid.video_tokens), repeat=2):
        (h, w), (h2, w2) = (divmod(x % grid.frame_tokens, grid.width) for x in (q, k))
        want[grid.text_before + q, grid.text_before + k] = sees(
            h, h2, grid.height, radius[0]
        ) and sees(w, w2, grid.width, radius[1])
    return want


def dense_oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


GRIDS = [
    (TokenGrid(2, 7, 9), (1, 2)),
    (TokenGrid(1, 11, 13), (2, 3)),
    (TokenGrid(5, 3, 4), (2, 1)),
    (TokenGrid(3, 1, 17), (1, 4)),
    (TokenGrid(1, 1, 129), (0, 5)),
    (TokenGrid(2, 5, 5, text_before=3), (1, 0)),
    (TokenGrid(3, 5, 7, text_after=1), (1, 2)),
]


class TestMask:
    @pytest.mark.parametrize(
        "path", golden_files.matching("freeswim/mask_*.npz", 7), ids=lambda p: p.stem
    )
    def test_it_is_the_public_codes_token_for_token(self, path: Path) -> None:
        golden = np.load(path)
        frames, height, width, d_h, d_w, tokens = (
            int(golden[name]) for name in ("T", "H", "W", "d_h", "d_w", "L")
        )
        want = np.unpackbits(golden["packed"])[: tokens**2].reshape(tokens, tokens).astype(bool)
        grid = TokenGrid(frames, height, width)
        mask = FreeSwimAttn(radius=(d_h, d_w)).mask(grid)
        np.testing.assert_array_equal(mask.dense().numpy(), want)
        np.testing.assert_array_equal(mask.dense().sum(1).numpy(), golden["row_count"])
        for block in (16, 7):
            np.testing.assert_array_equal(mask.blocks(block).dense()[0, 0].numpy(), want)
        assert mask.density == pytest.approx(want.mean(), abs=1e-12)

    def test_its_blocks_are_the_public_codes(self) -> None:
        golden = np.load(GOLDENS / "blockmask_t2_24x40_d5_8.npz")
        grid = TokenGrid(*(int(golden[name]) for name in "THW"))
        layout = FreeSwimAttn(radius=(int(golden["d_h"]), int(golden["d_w"]))).mask(grid).blocks()
        classes = golden["classes"]
        visited = layout.full_count + layout.partial_count
        np.testing.assert_array_equal(visited[0, 0].numpy(), (classes > 0).sum(1))

    @pytest.mark.parametrize(("grid", "radius"), GRIDS, ids=str)
    def test_it_is_the_rule_in_both_orders(self, grid: TokenGrid, radius: tuple[int, int]) -> None:
        method = FreeSwimAttn(radius=radius)
        want = by_definition(grid, radius)
        mask = method.mask(grid)
        assert torch.equal(mask.dense(), want)
        assert mask.density == pytest.approx(want.double().mean().item(), abs=1e-12)
        order = TileOrder(grid, (grid.frames, 1, 1))
        for tiled in (order, method.order_on(grid)):
            if tiled is None:
                continue
            place = tiled.positions()
            for block in (16, 5):
                dense = mask.blocks(block, order=tiled).dense()[0, 0]
                assert torch.equal(dense, want[place][:, place])

    def test_sizes_of_windows_from_the_native_resolution(self) -> None:
        for family, radius in [("wan2.1", (15, 26)), ("wan2.2", (22, 40)), ("ltx", (8, 11))]:
            assert FreeSwimAttn().for_model(family).radius == radius
        assert FreeSwimAttn(native=(45, 80)).for_model("wan2.1").radius == (22, 40)
        grid = TokenGrid(1, 68, 120)
        mask = FreeSwimAttn().mask(grid)
        assert mask.density == pytest.approx(31 * 53 / (68 * 120), abs=1e-12)

    def test_patches_through_time_halve_the_blocks_that_1080p_visits(self) -> None:
        grid = TokenGrid(21, 68, 120)
        mask = FreeSwimAttn().mask(grid)
        order = FreeSwimAttn().order_on(grid)
        assert order is not None
        assert order.tile == (21, 2, 3)
        cpu = torch.device("cpu")
        raster = (mask.block_states(Blocking(128, 128, cpu)) > 0).float().mean().item()
        tiled = (mask.block_states(Blocking(128, 128, cpu, order)) > 0).float().mean().item()
        # Section 4.1 of the specification.
        assert raster == pytest.approx(0.481, abs=0.002)
        assert tiled == pytest.approx(0.249, abs=0.002)

    def test_it_is_full_up_to_one_token_more_than_the_native_size(self) -> None:
        method = FreeSwimAttn(native=(4, 6))
        assert method.is_full_on(TokenGrid(2, 5, 7))
        assert not method.is_full_on(TokenGrid(2, 6, 7))
        assert not method.is_full_on(TokenGrid(2, 5, 8))


class TestAttention:
    @pytest.mark.parametrize("temperature", [True, False])
    @pytest.mark.parametrize(("grid", "radius"), GRIDS, ids=str)
    def test_output_and_gradients_are_dense_attentions(
        self, grid: TokenGrid, radius: tuple[int, int], temperature: bool
    ) -> None:
        generator = torch.Generator().manual_seed(grid.tokens)
        shape = (3, grid.tokens, 2, 16)
        q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        method = FreeSwimAttn(radius=radius, temperature=temperature)
        site = Site("wan", 0, 1, grid)
        out = method.attend(*leaves, site)
        out.backward(dout)
        want_leaves = [x.double().requires_grad_() for x in (q, k, v)]
        factor = math.log(2 * 1560, 1560) if temperature else 1.0
        scale = math.sqrt(factor / 16)
        want = dense_oracle(*want_leaves, by_definition(grid, radius), scale)
        want.backward(dout.double())
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
        for leaf, wanted in zip(leaves, want_leaves, strict=True):
            torch.testing.assert_close(leaf.grad.double(), wanted.grad, atol=5e-5, rtol=0)

    def test_the_temperature_is_the_public_codes(self) -> None:
        scale = FreeSwimAttn().score_scale(TokenGrid(21, 68, 120), 128, None)
        assert scale == pytest.approx(0.0924609, abs=5e-8)
        half = FreeSwimAttn().score_scale(TokenGrid(21, 68, 120), 128, 0.5)
        assert half == pytest.approx(0.5 * math.sqrt(1.094274), abs=1e-6)
        assert FreeSwimAttn(temperature=False).score_scale(TokenGrid(1, 2, 2), 128, 0.5) == 0.5

    @pytest.mark.parametrize("name", CASES)
    def test_every_family_attends_by_it(self, name: str) -> None:
        case = CASES[name]
        model, inputs = case.build(), case.inputs()
        method = FreeSwimAttn(radius=1, temperature=False)
        with torch.no_grad():
            dense = model(**inputs, return_dict=False)[0]
            with stock.masked(model, list(case.sites), case.grid_of, method, case.queries):
                want = model(**inputs, return_dict=False)[0]
            diffattn.set_attn_processor(model, method)
            got = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(got, dense, atol=1e-4)


class TestParameters:
    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"radius": -1}, "radius is -1, but must be an integer of at least 0"),
            ({"radius": (1, 2, 3)}, "radius has 3 values, but must have 2: for height and width"),
            ({"radius": True}, "radius is True, but must be an integer of at least 0"),
            ({"radius": (-1, 4)}, "radius along height is -1, but must be an integer of at least"),
            ({"radius": [1, 0.5]}, "radius along width is 0.5, but must be an integer of at least"),
            ({"native": 30}, "native is 30, but must be two integers of at least 1: rows and col"),
            ({"native": (30,)}, "native has 1 values, but must have 2: for height and width"),
            ({"native": (0, 4)}, "native along height is 0, but must be an integer of at least 1"),
            ({"native": (4, "x")}, "native along width is 'x', but must be an integer of at lea"),
            ({"native": (1, 1)}, r"native is \(1, 1\), but must be more than one token"),
            ({"dense_layers": -1}, "dense_layers is -1, but must be an integer of at least 0"),
            ({"temperature": 1}, "temperature is 1, but must be true or false"),
        ],
    )
    def test_bad_ones_are_named(self, parameters: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FreeSwimAttn(**parameters)

    def test_they_survive_json(self) -> None:
        method = from_dict({"type": "freeswim", "radius": [2, 3], "native": [4, 5]})
        assert method == FreeSwimAttn(radius=(2, 3), native=(4, 5))
        assert from_dict(method.to_dict()) == method
