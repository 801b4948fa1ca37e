"""Plans: against brute force over small grids, published tables, and the simulator's goldens."""

import importlib.util
import inspect
import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import diffusers
import golden_files
import pytest
import tiny_complete
import tiny_families
import torch
from natten_sim import count_tiles

import diffattn
from diffattn import (
    CLEARAttn,
    DenseAttn,
    Estimate,
    GNAAttn,
    LinFusionAttn,
    Method,
    RadialAttn,
    TokenGrid,
    VMoBAAttn,
    plan,
)
from diffattn.planning.published import PUBLISHED


def axes3(sides, fill=1):
    """Sides of a 1-D, 2-D or 3-D grid as frames, rows and columns."""
    return (*[fill] * (3 - len(sides)), *sides)


class TestByBruteForce:
    """Every figure about blocks, counted in the dense mask."""

    @pytest.mark.parametrize(
        ("grid", "method"),
        [
            (TokenGrid(3, 7, 5), GNAAttn(window=3)),
            (TokenGrid(4, 8, 8), GNAAttn(window=(2, 4, 4), stride=(2, 4, 4))),
            (TokenGrid(5, 11, 13, 0, 1), GNAAttn(window=(3, 5, 5), stride=(1, 2, 3))),
            (TokenGrid(1, 17, 19, 7, 0), GNAAttn(window=(6, 5), dilation=(2, 1))),
            (TokenGrid(5, 9, 16, 0, 33), RadialAttn()),
            (TokenGrid(7, 6, 7), RadialAttn(rule="paper")),
            (TokenGrid(1, 1, 129), DenseAttn()),
            # Partial blocks at the ragged end alone.
            (TokenGrid(1, 25, 14), GNAAttn(window=(25, 4), stride=(1, 4))),
        ],
        ids=str,
    )
    def test_counts(self, grid, method):
        got = plan(grid, method)
        fitted = method.for_model("", replace(grid, text_before=0, text_after=0))
        order = fitted.order(grid)
        place = torch.arange(grid.tokens) if order is None else order.positions()
        mask = fitted.mask(grid).dense()[place][:, place]
        size = got.block_size
        assert size == fitted.block_size_on(grid)
        assert got.tile == (order and order.tile)
        starts = range(0, grid.tokens, size)
        blocks = [[mask[q : q + size, k : k + size] for k in starts] for q in starts]
        visited = torch.tensor([[bool(block.any()) for block in row] for row in blocks])
        full = torch.tensor([[bool(block.all()) for block in row] for row in blocks])
        text = grid.is_text(place)
        has_text = torch.tensor([bool(text[start : start + size].any()) for start in starts])
        whole = torch.tensor([start + size <= grid.tokens for start in starts]) & ~has_text
        rows = visited if bool(has_text.all()) else visited[~has_text]
        assert got.tokens == grid.tokens
        assert got.density == pytest.approx(mask.double().mean().item(), abs=1e-15)
        assert got.blocks == visited.numel()
        assert got.columns == len(starts)
        assert got.visited_blocks == int(visited.sum())
        assert got.full_blocks == int(full.sum())
        assert got.partial_blocks == int((visited & ~full).sum())
        assert got.worst_blocks == int(rows.sum(1).max())
        masked = (visited & ~full)[whole][:, whole]
        assert got.is_block_sparse is not bool(masked.any())
        assert got.block_density == int(visited.sum()) / visited.numel()
        assert got.layout_bytes == fitted.layout(grid, torch.device("cpu"), order).nbytes


class TestOfGrids:
    def test_flops(self):
        got = plan(TokenGrid(2, 3, 5, 0, 7), DenseAttn(), heads=3, head_dim=32, layers=4)
        assert got.tokens == 37
        assert got.dense_flops == got.sparse_flops == 4 * 37 * 37 * 3 * 32
        assert got.dense_forward_flops == got.sparse_forward_flops == 4 * got.dense_flops
        assert got.attention_speedup == got.flop_speedup == got.run_density == 1
        assert got.density == 1
        assert got.linear_flops is None
        assert got.attention_share is None
        assert got.model_speedup is None
        assert got.model is None

    def test_one_head_of_128_where_nothing_else_is_said(self):
        got = plan(TokenGrid(1, 2, 3), DenseAttn())
        assert (got.heads, got.head_dim, got.layers, got.steps) == (1, 128, 1, None)
        assert got.dense_flops == 4 * 36 * 128

    def test_sparse_work_falls_with_the_blocks(self):
        grid = TokenGrid(4, 16, 16)
        got = plan(grid, GNAAttn(window=(4, 8, 8), stride=(4, 8, 8)), layers=2)
        assert got.block_density == got.density == 1 / 4
        assert got.sparse_flops == got.dense_flops / 4
        assert got.attention_speedup == got.flop_speedup == 4

    def test_dense_layers_and_steps_count(self):
        method = RadialAttn(dense_layers=3, dense_steps=4, last_dense_steps=0.1)
        got = plan(TokenGrid(8, 16, 16), method, layers=10, steps=20)
        assert (got.dense_layers, got.dense_steps, got.steps) == (3, 6, 20)
        sparse = got.block_density
        assert sparse < 1
        forward = (3 + 7 * sparse) / 10
        assert got.sparse_forward_flops == pytest.approx(forward * got.dense_forward_flops)
        assert got.run_density == pytest.approx((6 + 14 * forward) / 20)

    def test_no_more_steps_stay_dense_than_there_are(self):
        got = plan(TokenGrid(2, 4, 4), RadialAttn(dense_steps=7, last_dense_steps=7), steps=10)
        assert got.dense_steps == 10
        assert got.run_density == 1

    def test_without_steps_a_run_is_its_sparse_steps(self):
        got = plan(TokenGrid(8, 16, 16), RadialAttn(dense_layers=0))
        assert got.dense_steps == 0
        assert got.run_density == got.block_density

    def test_all_figures_go_into_json(self):
        got = plan(TokenGrid(4, 8, 8, 0, 3), GNAAttn(window=3), layers=2, steps=5)
        read = json.loads(json.dumps(got.to_dict()))
        assert diffattn.methods.from_dict(read["method"]) == got.method
        assert TokenGrid(**read["grid"]) == got.grid
        names = [n for n, v in vars(type(got)).items() if isinstance(v, property)]
        for name in (*names, "density", "layout_bytes", "is_block_sparse", "worst_blocks", "steps"):
            assert read[name] == getattr(got, name)


class TestBlockSparseSettings:
    def test_the_nearest_is_one_and_is_near(self):
        # gna.md 2.3: with tiles of 2 x 8 x 8 a stride of 2 x 8 x 8 is the finest.
        got = plan(TokenGrid(30, 48, 80), GNAAttn(window=(18, 24, 24)))
        assert not got.is_block_sparse
        best = got.nearest_block_sparse
        assert (best.window, best.stride) == ((18, 24, 24), (2, 8, 8))
        after = plan(got.grid, best)
        assert after.is_block_sparse
        assert after.partial_blocks == 0
        assert after.worst_blocks == 81
        assert after.block_density == after.density == got.density == 0.09
        assert after.nearest_block_sparse == after.method

    def test_with_text_blocks_that_hold_some_do_not_count(self):
        method = GNAAttn(window=(4, 8, 8), stride=(4, 8, 8))
        for text in ({"text_after": 77}, {"text_before": 77}):
            got = plan(TokenGrid(4, 16, 16, **text), method)
            assert got.is_block_sparse
            assert got.nearest_block_sparse == got.method

    def test_a_grid_of_no_whole_tiles_has_none(self):
        got = plan(TokenGrid(21, 30, 13), GNAAttn(window=(7, 15, 5)))
        assert not got.is_block_sparse
        assert got.nearest_block_sparse is None

    def test_causal_axes_leave_tiles_of_one_token(self):
        method = GNAAttn(window=(4, 8, 8), is_causal=(True, False, False))
        got = plan(TokenGrid(4, 16, 16), method)
        assert not got.is_block_sparse
        best = got.nearest_block_sparse
        assert best.is_causal == (True, False, False)
        assert plan(got.grid, best).is_block_sparse

    def test_other_methods_are_told_no_other_setting(self):
        got = plan(TokenGrid(4, 16, 16), RadialAttn())
        assert got.is_block_sparse
        assert got.nearest_block_sparse is None


# kernels.md D.1: tokens, TFLOPs of a layer, of all layers, of the linear layers, attention's share
# of the time in per cent, and the bounds at 50, 75, 80, 90 and 100 % sparsity.
D1 = {
    ("Wan-AI/Wan2.1-T2V-1.3B", None): (
        32_760, 6.594, 197.8, 85.2, 72.7, (1.57, 2.20, 2.39, 2.89, 3.66),
    ),
    ("Wan-AI/Wan2.1-T2V-14B", (480, 832, 81)): (
        32_760, 21.98, 879, 799, 55.7, (1.39, 1.72, 1.80, 2.01, 2.26),
    ),
    ("Wan-AI/Wan2.1-T2V-14B", None): (
        75_600, 117.05, 4682, 1841, 74.4, (1.59, 2.26, 2.47, 3.03, 3.91),
    ),
    ("hunyuanvideo-community/HunyuanVideo", None): (
        119_056, 174.17, 10_450, 1618, 88.1, (1.79, 2.95, 3.39, 4.83, 8.40),
    ),
    ("black-forest-labs/FLUX.1-dev", None): (
        4_608, 0.261, 14.9, 59.5, 22.3, (1.13, 1.20, 1.22, 1.25, 1.29),
    ),
    ("black-forest-labs/FLUX.1-dev", (2048, 2048, 1)): (
        16_896, 3.51, 200, 218, 51.2, (1.34, 1.62, 1.69, 1.85, 2.05),
    ),
    ("black-forest-labs/FLUX.1-dev", (4096, 4096, 1)): (
        66_048, 53.6, 3056, 853, 80.4, (1.67, 2.52, 2.80, 3.62, 5.10),
    ),
    ("genmo/mochi-1-preview", None): (
        44_776, 24.6, 1183, 487, 73.6, (1.58, 2.23, 2.43, 2.96, 3.78),
    ),
    ("THUDM/CogVideoX-5b", None): (
        17_776, 3.88, 163, 169, 52.5, (1.36, 1.65, 1.72, 1.89, 2.10),
    ),
}  # fmt: skip


# Section 7 of clear.md: GFLOPs of a layer of Flux with 512 text tokens, by the pairs of tokens.
CLEAR_FLOPS = {
    512: (28.99, 18.05, 22.27, 18.86, 23.07),
    1024: (260.9, 63.5, 86.6, 76.4, 99.5),
    2048: (3507.9, 246.2, 352.6, 452.4, 558.7),
    4096: (53604, 979.3, 1433, 4278, 4732),
}


class TestPooledKeys:
    @pytest.mark.parametrize("pixels", CLEAR_FLOPS)
    def test_they_count_as_in_the_table_of_clear(self, pixels):
        dense, *rest = CLEAR_FLOPS[pixels]
        size = {"height": pixels, "width": pixels}
        for (factor, radius), flops in zip(itertools.product((1, 4), (8, 16)), rest, strict=True):
            method = CLEARAttn(radius=radius, down_factor=factor)
            got = plan("black-forest-labs/FLUX.1-dev", method, **size)
            assert got.dense_flops / 1e9 == pytest.approx(dense, rel=5e-4)
            assert got.dense_flops / got.flop_speedup / 1e9 == pytest.approx(flops, rel=1e-3)
            assert got.extra_keys == (0 if factor == 1 else (pixels // 64) ** 2)

    def test_they_are_in_the_flops_of_blocks_too(self):
        grid = TokenGrid(3, 9, 13, text_after=5)
        alone, more = (plan(grid, CLEARAttn(radius=3, down_factor=n)) for n in (1, 4))
        # Frame by frame, without the rows and columns that fill no cell.
        assert more.extra_keys == 3 * 2 * 3
        pairs = 3 * 9 * 13 * more.extra_keys
        assert more.sparse_flops - alone.sparse_flops == pytest.approx(4 * pairs * 128)
        assert (more.density, more.block_density) == (alone.density, alone.block_density)
        assert more.attention_speedup == pytest.approx(more.dense_flops / more.sparse_flops)
        assert more.to_dict()["extra_keys"] == 18
        assert plan(grid, CLEARAttn(radius=3, down_factor=10)).extra_keys == 0


class TestOfPublishedModels:
    @pytest.mark.parametrize(("model", "size"), D1, ids=str)
    def test_flops_and_bounds_of_the_table(self, model, size):
        sizes = dict(zip(("height", "width", "num_frames"), size or (), strict=False))
        got = plan(model, DenseAttn(), **sizes)
        tokens, layer, layers, linear, share, bounds = D1[model, size]
        assert got.tokens == tokens
        assert got.dense_flops / 1e12 == pytest.approx(layer, rel=2e-3)
        assert got.dense_forward_flops / 1e12 == pytest.approx(layers, rel=3e-3)
        assert got.linear_flops / 1e12 == pytest.approx(linear, rel=2e-3)
        assert 100 * got.attention_share == pytest.approx(share, abs=0.06)
        for sparsity, bound in zip((0.5, 0.75, 0.8, 0.9, 1), bounds, strict=True):
            assert 1 / (1 - got.attention_share * sparsity) == pytest.approx(bound, abs=0.006)

    def test_the_bound_of_a_model_is_amdahls(self):
        got = plan(
            "Wan-AI/Wan2.1-T2V-14B", RadialAttn(dense_layers=0, dense_steps=0), height=480,
            width=832,
        )  # fmt: skip
        assert got.steps == 50
        linear, attention = got.linear_flops / 790, got.dense_forward_flops / 690
        expected = (linear + attention) / (linear + attention * got.block_density)
        assert got.model_speedup == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("method", "sparsity"),
        [
            (RadialAttn(), 0.712867),
            (RadialAttn(first_distance_width="half"), 0.736632),
            (RadialAttn(decay_factor=1.0), 0.569081),
        ],
        ids=str,
    )
    def test_radials_published_sparsity(self, method, sparsity):
        sizes = {"height": 768, "width": 1280, "num_frames": 69}
        got = plan("Wan-AI/Wan2.1-T2V-14B-Diffusers", method, **sizes)
        assert got.method.dense_layers == got.dense_layers == 1
        assert (got.dense_steps, got.steps) == (12, 50)
        assert 1 - got.density == 1 - got.block_density
        assert 1 - got.density == pytest.approx(sparsity, abs=1e-6)

    def test_the_table_agrees_with_diffusers_own_defaults(self):
        published = {
            "Wan-AI/Wan2.1-T2V-14B": "WanTransformer3DModel",
            "hunyuanvideo-community/HunyuanVideo": "HunyuanVideoTransformer3DModel",
            "black-forest-labs/FLUX.1-dev": "FluxTransformer2DModel",
            "black-forest-labs/FLUX.1-Kontext-dev": "FluxTransformer2DModel",
            "black-forest-labs/FLUX.2-dev": "Flux2Transformer2DModel",
            "Qwen/Qwen-Image-Edit": "QwenImageTransformer2DModel",
            "lodestones/Chroma1-HD": "ChromaTransformer2DModel",
            "AIDC-AI/Ovis-Image-7B": "OvisImageTransformer2DModel",
            "krea/Krea-2-Raw": "Krea2Transformer2DModel",
            "genmo/mochi-1-preview": "MochiTransformer3DModel",
            "Lightricks/LTX-Video": "LTXVideoTransformer3DModel",
            "Lightricks/LTX-2": "LTX2VideoTransformer3DModel",
            "MiniMaxAI/MiniMax-H3": "MiniMaxH3Transformer3DModel",
            "nvidia/Cosmos-1.0-Diffusion-7B-Text2World": "CosmosTransformer3DModel",
            "hunyuanvideo-community/HunyuanImage-2.1": "HunyuanImageTransformer2DModel",
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "PixArtTransformer2DModel",
        }
        for name, model in published.items():
            if not hasattr(diffusers, model):
                continue  # an older diffusers
            parameters = inspect.signature(getattr(diffusers, model)).parameters
            default = {k: v.default for k, v in parameters.items()}
            shape = PUBLISHED[name]
            assert shape.heads == default["num_attention_heads"]
            assert shape.head_dim == default["attention_head_dim"]
            blocks = default["num_layers"] + default.get("num_single_layers", 0)
            assert shape.block_of_site == tuple(range(blocks))

    def test_all_make_their_own_size(self):
        for name, shape in PUBLISHED.items():
            by_prompt = None in (shape.text_before, shape.text_after)
            grid = shape.grid(None, None, None, 200 if by_prompt else None)
            assert grid.tokens > 1000, name
            assert shape.linear_flops(grid.tokens) > 0
            assert shape.steps is None or shape.steps > 0

    @pytest.mark.parametrize(
        ("model", "tokens"),
        [
            ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 31 * 22 * 40),
            ("zai-org/CogVideoX1.5-5B", 11 * 48 * 85 + 226),
            ("rhymes-ai/Allegro", 22 * 45 * 80),
            ("Lightricks/LTX-Video", 21 * 16 * 22),
            ("Lightricks/LTX-2", 16 * 16 * 24),
            ("nvidia/Cosmos-1.0-Diffusion-7B-Text2World", 16 * 44 * 80),
            ("nvidia/Cosmos-Predict2-2B-Video2World", 24 * 44 * 80),
            ("nvidia/Cosmos-Predict2-14B-Text2Image", 48 * 85),
            ("stabilityai/stable-diffusion-3.5-large", 64 * 64 + 333),
            ("black-forest-labs/FLUX.1-Kontext-dev", 64 * 64 + 512),
            ("black-forest-labs/FLUX.2-klein-4B", 64 * 64 + 512),
            ("krea/Krea-2-Turbo", 64 * 64 + 512),
            ("hunyuanvideo-community/HunyuanImage-2.1-Diffusers", 64 * 64 + 1128),
            ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 64 * 64),
        ],
    )
    def test_tokens_of_unusual_compressions(self, model, tokens):
        assert plan(model, DenseAttn()).tokens == tokens

    def test_sound_is_as_long_as_the_video(self):
        """MiniMax-H3: stereo at 40 latents a second beside 24 frames a second."""
        short = plan("MiniMaxAI/MiniMax-H3", DenseAttn(), height=480, width=832, text=200)
        assert short.tokens == 200 + 2 * 207 + 37 * 15 * 26 == 15044
        long = plan("MiniMaxAI/MiniMax-H3", DenseAttn(), num_frames=345, text=0)
        assert long.grid == TokenGrid(102, 24, 42, text_before=2 * 575)
        with pytest.raises(ValueError, match="depends on the prompt: give text"):
            plan("MiniMaxAI/MiniMax-H3", DenseAttn())

    @pytest.mark.parametrize(
        ("frames", "message"),
        [
            (107, "makes 124 to 345 frames: try 124"),
            (362, "makes 124 to 345 frames: try 345"),
            (130, r"needs 17 \* k \+ 5: try 124 or 141"),
        ],
    )
    def test_frames_that_minimax_h3_does_not_make(self, frames, message):
        with pytest.raises(ValueError, match=f"num_frames is {frames}, but this model {message}"):
            plan("MiniMaxAI/MiniMax-H3", DenseAttn(), num_frames=frames, text=0)

    def test_text_of_another_length(self):
        got = plan("genmo/mochi-1-preview", DenseAttn(), num_frames=1, text=0)
        assert got.grid == TokenGrid(1, 30, 53)

    def test_text_that_the_prompt_decides(self):
        with pytest.raises(ValueError, match="how much depends on the prompt: give text, its num"):
            plan("Qwen/Qwen-Image-Edit", DenseAttn())
        got = plan("Qwen/Qwen-Image-Edit", DenseAttn(), text=345)
        assert got.grid == TokenGrid(1, 64, 64, 345)

    @pytest.mark.parametrize(
        "name",
        [
            "flux", "flux.2", "flux.2-edit", "ovis-image", "qwen-image", "chroma", "longcat-image",
            "bria", "bria-fibo", "krea-2", "hunyuan-image", "cogview-4", "cogview-3-plus",
            "glm-image", "z-image",
        ],
    )  # fmt: skip
    def test_linear_work_is_that_of_the_layers_in_blocks(self, name):
        """Two FLOPs for each weight that a token meets, counted in a forward."""
        case = tiny_families.CASES[name]
        model, inputs = case.build(), case.inputs()
        flops = []

        def count(layer, args, output):
            if args[0].ndim == 3 and args[0].shape[1] > 1:  # tokens, no modulation of them all
                flops.append(2 * layer.weight.numel() * args[0].shape[1])

        for part, layer in model.named_modules():
            in_blocks = "transformer_blocks." in part or part.startswith("layers.")
            if in_blocks and isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(count)
        with torch.no_grad():
            model(**inputs)
        grid = case.grids[0].beside(before=case.text[1])
        assert plan(model, DenseAttn(), grid=grid).linear_flops == sum(flops)

    def test_blocks_for_a_part_of_the_tokens_are_left_out(self):
        case = tiny_families.CASES["flux.3-edit"]
        got = plan(case.build(), DenseAttn(), grid=case.grids[0].beside(before=7))
        assert (got.layers, got.tokens, got.linear_flops) == (2, 135, None)

    def test_text_stands_where_the_model_has_it(self):
        assert plan("black-forest-labs/FLUX.1-dev", DenseAttn()).grid == TokenGrid(1, 64, 64, 512)


class TestSimulator:
    """gna.md section 2, whose model reproduces the predictions in the paper's tables."""

    def test_goldens(self):
        path = golden_files.GOLDENS / "gna" / "simulator.json"
        rows = json.loads(path.read_text())["rows"]
        assert len(rows) > 20
        for row in rows:
            method = GNAAttn(window=tuple(row["window"]), stride=tuple(row["stride"]))
            grid = TokenGrid(*axes3(row["shape"]))
            got = count_tiles(method, grid, axes3(row["q_tile"]), axes3(row["kv_tile"]))
            assert got.total == row["total_kv_tiles"]
            assert got.worst == row["static_max_visited"]
            assert got.worst_dynamic == row["dynamic_max_visited"]
            assert got.is_block_sparse is row["perfectly_block_sparse"]
            assert got.speedup == pytest.approx(row["static_speedup"], abs=1e-6)
            assert got.flop_speedup == pytest.approx(row["flop_speedup"], abs=1e-6)

    @pytest.mark.parametrize(
        ("stride", "worst", "end_to_end"),
        [
            ((1, 1, 1), 275, 1.73),
            ((2, 1, 1), 250, 1.78),
            ((2, 8, 8), 90, 2.20),
            ((16, 8, 8), 81, 2.23),
            ((18, 24, 24), 135, 2.06),
        ],
    )
    def test_the_papers_predictions_for_hunyuanvideo(self, stride, worst, end_to_end):
        method = GNAAttn(window=(18, 24, 24), stride=stride)
        got = count_tiles(method, TokenGrid(30, 48, 80), (4, 8, 8), (2, 8, 8))
        assert (got.total, got.worst) == (900, worst)
        assert 1 / (1 - 0.607 + 0.607 / got.speedup) == pytest.approx(end_to_end, abs=0.01)

    @pytest.mark.parametrize("tiles", [((4, 4, 8), None), ((2, 8, 8), None)])
    def test_a_plan_visits_as_many_blocks_as_the_simulator_says(self, tiles):
        grid = TokenGrid(16, 32, 32)
        method = GNAAttn(window=(8, 16, 16), stride=(4, 8, 8))
        got = plan(grid, method)
        assert got.worst_blocks <= count_tiles(method, grid, *tiles).worst
        assert got.worst_blocks == count_tiles(method, grid, got.tile).worst

    def test_dilated_axes_are_tiled_class_by_class(self):
        # 24 tokens in 2 classes of 12: tiles of 4 see windows of 4 that begin with a tile.
        method = GNAAttn(window=(4, 4), stride=(4, 4), dilation=(1, 2))
        got = count_tiles(method, TokenGrid(1, 8, 24), (1, 4, 4))
        assert got.worst == 1
        assert got.total == 12
        assert got.is_block_sparse
        assert got.flop_speedup == pytest.approx(12.0)

    def test_tiles_without_sides(self):
        with pytest.raises(ValueError, match=r"q_tile is \(0, 1, 1\), but must be frames, rows"):
            count_tiles(GNAAttn(window=2), TokenGrid(2, 2, 2), (0, 1, 1))
        with pytest.raises(ValueError, match=r"kv_tile is \(1, 1\), but must be frames, rows"):
            count_tiles(GNAAttn(window=2), TokenGrid(2, 2, 2), (1, 1, 1), (1, 1))


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """The configuration files of a tiny Wan pipeline, without weights."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=3, attention_head_dim=16, num_layers=5, ffn_dim=64, text_dim=8,
            freq_dim=8,
        )  # fmt: skip
        vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class TestOfFolders:
    SIZE: ClassVar = {"height": 64, "width": 96, "num_frames": 9}

    @pytest.mark.parametrize("inside", ["", "transformer"])
    def test_configuration_files_are_enough(self, wan_folder, inside):
        got = plan(wan_folder / inside, RadialAttn(), **self.SIZE)
        assert got.grid == TokenGrid(3, 4, 6)
        assert (got.heads, got.head_dim, got.layers) == (3, 16, 5)
        assert got.method == RadialAttn().for_model("wan2.1", got.grid)
        per_token = 12 * 48**2 + 4 * 48 * 64 + 4 * 512 * 48
        assert got.linear_flops == 5 * (per_token * 72 + 4 * 512 * 48**2)
        assert got.model == str(wan_folder)

    def test_two_experts_are_told_by_the_index(self, wan_folder, tmp_path):
        copy = self.copy(wan_folder, tmp_path, boundary_ratio=0.9)
        assert plan(copy, RadialAttn(), **self.SIZE).method.decay_factor == 0.8

    def test_sizes_are_the_pipelines_defaults(self, wan_folder):
        got = plan(wan_folder, RadialAttn())
        # WanPipeline's own: 480 x 832 pixels, 81 frames, 50 steps.
        assert (got.grid, got.steps) == (TokenGrid(21, 30, 52), 50)

    def test_sizes_have_to_be_given_where_the_defaults_are_too_large(self, wan_folder, tmp_path):
        copy = self.copy(wan_folder, tmp_path)
        config = json.loads((copy / "transformer" / "config.json").read_text())
        changed = json.dumps(config | {"rope_max_seq_len": 16})
        (copy / "transformer" / "config.json").write_text(changed)
        with pytest.raises(
            ValueError, match=r"makes are not known: give height, width and num_fra"
        ):
            plan(copy, RadialAttn())
        with pytest.raises(
            ValueError, match=r"rope_max_seq_len of its transformer.: try at most 2"
        ):
            plan(copy, RadialAttn(), **self.SIZE | {"height": 272})

    def test_sizes_that_do_not_fit(self, wan_folder):
        with pytest.raises(ValueError, match="num_frames is 8, but this model needs 4"):
            plan(wan_folder, RadialAttn(), **self.SIZE | {"num_frames": 8})

    def test_no_pipeline(self, tmp_path):
        with pytest.raises(ValueError, match="is no diffusers pipeline: there is no model_index"):
            plan(tmp_path, RadialAttn(), **self.SIZE)

    def test_broken_files(self, wan_folder, tmp_path):
        copy = self.copy(wan_folder, tmp_path)
        (copy / "vae" / "config.json").write_text("[")
        with pytest.raises(ValueError, match=r"cannot read .*config.json: "):
            plan(copy, RadialAttn(), **self.SIZE)
        (copy / "vae" / "config.json").write_text("[]")
        with pytest.raises(ValueError, match="holds no JSON object"):
            plan(copy, RadialAttn(), **self.SIZE)

    def test_pipelines_and_models_that_diffusers_lacks(self, wan_folder, tmp_path):
        copy = self.copy(wan_folder, tmp_path, _class_name="WonPipeline")
        with pytest.raises(ValueError, match="diffusers has no pipeline 'WonPipeline'"):
            plan(copy, RadialAttn(), **self.SIZE)
        copy = self.copy(wan_folder, tmp_path, transformer=["diffusers", "WonModel"])
        with pytest.raises(ValueError, match="cannot make a WanPipeline of its configuration"):
            plan(copy, RadialAttn(), **self.SIZE)

    def test_attention_on_grids_of_several_sizes(self, tmp_path):
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            )  # fmt: skip
        unet.save_config(tmp_path / "unet")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="attention is on grids of several sizes"):
            plan(tmp_path, GNAAttn(), height=64, width=64)

    @staticmethod
    def copy(folder, target, **changes):
        """The folder's files in another, with a changed index."""
        for name in ("transformer", "vae"):
            (target / name).mkdir(exist_ok=True)
            (target / name / "config.json").write_text((folder / name / "config.json").read_text())
        index = json.loads((folder / "model_index.json").read_text())
        (target / "model_index.json").write_text(json.dumps(index | changes))
        return target


class TestInMemory:
    """A pipeline, or its denoiser, in place of a folder or an id."""

    def test_a_pipeline(self):
        pipe = tiny_complete.wan()
        got = plan(pipe, RadialAttn(), height=64, width=96, num_frames=9)
        assert got.grid == TokenGrid(3, 4, 6)
        config = pipe.transformer.config
        assert (got.heads, got.head_dim) == (config.num_attention_heads, config.attention_head_dim)
        assert got.layers == config.num_layers
        assert got.model == "WanPipeline"
        assert got.method == RadialAttn().for_model("wan2.1", got.grid)

    def test_sizes_of_a_pipeline_are_its_defaults(self):
        assert plan(tiny_complete.wan(), DenseAttn()).grid == TokenGrid(21, 30, 52)

    def test_an_attached_pipeline(self):
        pipe = tiny_complete.wan()
        diffattn.set_attn_processor(pipe, DenseAttn())
        assert plan(pipe, DenseAttn(), height=32, width=32, num_frames=1).grid.tokens == 4

    def test_a_denoiser_takes_a_grid(self):
        grid = TokenGrid(3, 4, 6)
        pipe = tiny_complete.wan()
        got = plan(pipe.transformer, "radial", grid=grid)
        assert got.model == "WanTransformer3DModel"
        assert got.density == plan(pipe, "radial", grid=grid).density
        with pytest.raises(ValueError, match=r"Model alone does not say .* give grid, .* pipeline"):
            plan(pipe.transformer, "radial", height=64, width=96, num_frames=9)
        with pytest.raises(ValueError, match="height cannot be given here: the grid says them"):
            plan(pipe.transformer, "radial", grid=grid, height=64)
        with pytest.raises(ValueError, match="grid cannot be given here: a token grid says it all"):
            plan(grid, "radial", grid=grid)

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            (None, "a NoneType"),
            (3, "a int"),
            ((1, 2, 3), "a tuple"),
            (RadialAttn(), "a RadialAttn"),
            (TokenGrid, "the class TokenGrid"),
        ],
    )
    def test_anything_else(self, target, words):
        with pytest.raises(TypeError, match=f"target is {words}, but must be a TokenGrid, the rep"):
            plan(target, DenseAttn())

    def test_a_method_that_cannot_be_attached_is_not_planned(self):
        message = "linfusion cannot be attached to models of the family sd3: it needs to know"
        for name in ("stabilityai/stable-diffusion-3-medium", "stabilityai/stable-diffusion-3.5-la"
                     "rge"):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                plan(name, LinFusionAttn())
        assert plan("Wan-AI/Wan2.1-T2V-14B", LinFusionAttn()).work
        with pytest.raises(ValueError, match="ntk_factor is 2, but models of the family wan do"):
            plan("Wan-AI/Wan2.1-T2V-14B", CLEARAttn(ntk_factor=2))

    def test_widths_that_no_model_has(self):
        with pytest.raises(
            ValueError, match="mid_dim is 99999999999999, but must be an integer fr"
        ):
            LinFusionAttn(mid_dim=99999999999999)


@dataclass(frozen=True, kw_only=True)
class ByContent(Method):
    """A method whose token pairs depend on the tokens."""

    type: ClassVar[str] = "by-content"

    def for_model(self, family, grid=None):
        return self

    def attend(self, query, key, value, site, *, scale=None, key_mask=None):
        raise AssertionError("planning attends to nothing")


class TestRefusals:
    GRID: ClassVar = TokenGrid(2, 4, 4)

    def test_unknown_models(self):
        with pytest.raises(ValueError, match="neither a folder nor a model whose shape is known; "):
            plan("nobody/knows-this", DenseAttn())
        with pytest.raises(ValueError, match=r"did you mean 'Wan-AI/Wan2.1-T2V-14B'\?"):
            plan("Wan-AI/Wan2.1-T2V-14", DenseAttn())
        with pytest.raises(
            ValueError, match=r"choose from AIDC-AI/Ovis-Image-7B, Lightricks/LTX-2, Li"
        ):
            plan("?", DenseAttn())

    def test_sizes_of_a_grid_and_heads_of_a_model(self):
        message = "height, text cannot be given here: a token grid says it all"
        with pytest.raises(ValueError, match=message):
            plan(self.GRID, DenseAttn(), height=64, text=3)
        with pytest.raises(ValueError, match="heads cannot be given here: the model says it"):
            plan("Wan-AI/Wan2.1-T2V-14B", DenseAttn(), heads=3)

    @pytest.mark.parametrize("name", ["heads", "head_dim", "layers", "steps"])
    def test_numbers_below_one(self, name):
        with pytest.raises(ValueError, match=f"{name} is 0, but must be at least 1"):
            plan(self.GRID, DenseAttn(), **{name: 0})

    def test_sizes_that_a_model_cannot_make(self):
        with pytest.raises(ValueError, match=r"height is 481, .* multiple of 16: try 480 or 496"):
            plan("Wan-AI/Wan2.1-T2V-14B", DenseAttn(), height=481)
        with pytest.raises(ValueError, match="this model makes images: try 1"):
            plan("black-forest-labs/FLUX.1-dev", DenseAttn(), num_frames=5)

    def test_text_where_it_is_apart(self):
        with pytest.raises(ValueError, match=r"text is 5, but the sequence of Wan-AI/.* its text"):
            plan("Wan-AI/Wan2.1-T2V-14B", DenseAttn(), text=5)

    def test_text_that_depends_on_the_prompt(self):
        shape = replace(PUBLISHED["genmo/mochi-1-preview"], text_after=None)
        with pytest.raises(ValueError, match="depends on the prompt: give text, its number of"):
            shape.grid(None, None, None, None)
        assert shape.grid(None, None, None, 9).text_after == 9

    def test_methods_without_a_mask_of_the_grids(self):
        with pytest.raises(ValueError, match="by-content has no mask that the grid alone decides"):
            plan(self.GRID, ByContent())

    def test_methods_that_are_more_than_their_mask(self):
        class More(CLEARAttn):
            def extra_keys(self, grid):
                return None

        with pytest.raises(ValueError, match="clear with these parameters does more than attend"):
            plan(TokenGrid(1, 8, 8), More(radius=2))

    def test_a_method_that_does_not_fit(self):
        with pytest.raises(ValueError, match="dilation along frames is 2, but a window of 2"):
            plan(self.GRID, GNAAttn(window=3, dilation=2))

    def test_more_tokens_than_can_be_counted(self):
        with pytest.raises(ValueError, match="has 4,194,304 tokens, but at most 2,097,152 are po"):
            plan(TokenGrid(1024, 64, 64), DenseAttn())


def test_the_function_is_not_hidden_by_a_module():
    assert importlib.util.find_spec("diffattn.plan") is None
    assert callable(diffattn.plan)
    assert diffattn.plan is importlib.import_module("diffattn.planning.plans").plan
    assert {"plan", "Plan"} <= set(diffattn.__all__)
    assert isinstance(plan(TokenGrid(1, 1, 1), DenseAttn()), diffattn.Plan)
    assert math.isfinite(plan(TokenGrid(1, 1, 1), RadialAttn()).attention_speedup)


@pytest.mark.parametrize(
    ("grid", "method", "teraflops"),
    [
        # Recomputed from the paper's formula, whose tables have 519.75 for the second.
        (TokenGrid(21, 30, 52), VMoBAAttn(), 145.16),
        (TokenGrid(21, 45, 80), VMoBAAttn(), 519.59),
        (TokenGrid(24, 36, 64), VMoBAAttn(preset="training"), 248.7),
    ],
    ids=str,
)
def test_flops_of_vmoba_are_the_papers(grid, method, teraflops):
    layers, channels, feed_forward, text = 30, 1536, 8960, 300
    found = plan(grid, method, heads=12, head_dim=128, layers=layers)
    tokens = grid.tokens
    other = 12 * tokens * channels**2 + 4 * text * channels**2
    other += 4 * tokens * text * channels + 4 * tokens * channels * feed_forward
    total = (layers * other + found.sparse_forward_flops) / 1e12
    # The share that a threshold keeps is an estimate here; the paper measured 0.19.
    assert total == pytest.approx(teraflops, rel=2e-4 if found.is_exact else 0.01)
    assert found.is_exact == (method.preset == "training-free")
    blocks = [len(method.partition(grid, layer).lengths()) for layer in range(3)]
    assert found.selection_flops == pytest.approx(2 * tokens * sum(blocks) / 3 * channels)


def test_an_estimate_counts_dense_layers_and_steps():
    grid = TokenGrid(4, 8, 8, text_after=5)
    method = VMoBAAttn(topk=2, chunk_1d=1, chunk_2d=(4, 4), chunk_3d=(2, 3, 3), dense_layers=2)
    found = plan(grid, method, heads=2, head_dim=8, layers=4, steps=8)
    assert isinstance(found, Estimate)
    assert (found.layers, found.dense_layers, found.steps, found.dense_steps) == (4, 2, 8, 2)
    pairs = grid.tokens**2
    shares = []
    for layer in (2, 3):
        text = pairs - grid.video_tokens**2
        blocks = len(method.partition(grid, layer).lengths())
        shares.append((text + grid.video_tokens**2 * 2 / blocks) / pairs)
    assert found.density == pytest.approx(sum(shares) / 2)
    assert not found.is_exact, "blocks of 2 x 3 x 3 do not fill the grid"
    gates = 2 * grid.video_tokens * 16 * (18 + 4) / 2
    assert found.selection_flops == pytest.approx(gates)
    assert found.dense_flops == 4 * pairs * 16
    sparse = found.dense_flops * sum(shares) + 2 * gates
    assert found.sparse_flops == pytest.approx(sparse / 2)
    assert found.sparse_forward_flops == pytest.approx(2 * found.dense_flops + sparse)
    forward = found.sparse_forward_flops / found.dense_forward_flops
    assert found.run_density == pytest.approx((2 + 6 * forward) / 8)
    assert found.attention_speedup == pytest.approx(found.dense_flops / found.sparse_flops)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["density"] == found.density
    assert read["is_exact"] is False
    assert read["model_speedup"] is None
    assert TokenGrid(**read["grid"]) == grid
    all_dense = plan(grid, VMoBAAttn(dense_layers=9), layers=4)
    assert (all_dense.density, all_dense.sparse_flops) == (None, 0)
    assert all_dense.run_density == all_dense.attention_speedup == 1
    everything = plan(grid, VMoBAAttn(preset="training", tau=1.0))
    assert (everything.density, everything.is_exact, everything.selection_flops) == (1, True, 0)


@pytest.mark.parametrize(("mid_dim", "adapting"), [(None, 53.7), (1 / 16, 3.36), (-1, 0)])
def test_flops_of_linfusion_are_those_of_a_layer_of_sdxl(mid_dim, adapting):
    # 16,384 tokens of 640 channels: 2.7 GFLOP for the state, and two networks.
    found = plan(
        TokenGrid(1, 128, 128), LinFusionAttn(mid_dim=mid_dim), heads=10, head_dim=64, layers=1
    )
    assert found.sparse_flops / 1e9 == pytest.approx(2.684 + adapting, rel=2e-3)
    assert found.dense_flops / 1e9 == pytest.approx(687, rel=2e-3)
    assert found.density is None


def test_linfusion_keeps_softmax_where_text_is_asked_or_asks():
    alone, joint = (
        plan(TokenGrid(2, 4, 8, text_after=text), LinFusionAttn(mid_dim=-1), heads=2, head_dim=4)
        for text in (0, 3)
    )
    assert joint.sparse_flops - alone.sparse_flops == 4 * (3 * 67 + 64 * 3) * 8
