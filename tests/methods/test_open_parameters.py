"""Parameters left at None: a method by itself does what `for_model` says, for no known model."""

import pytest
import torch

from diffattn import (
    AttentionTileAttn,
    CLEARAttn,
    FreeSwimAttn,
    GNAAttn,
    LVSAAttn,
    RadialAttn,
    TokenGrid,
    VMoBAAttn,
)
from diffattn.methods import StaticMaskMethod

GRIDS = [
    TokenGrid(1, 6, 9),
    TokenGrid(5, 6, 7, text_after=3),
    TokenGrid(35, 4, 5),  # as long as only long videos are, on frames of less than a block
    TokenGrid(3, 40, 48, text_before=2),
]
STATIC = [
    RadialAttn(),
    RadialAttn(decay_factor=0.5, sink=False),
    RadialAttn(rule="paper"),
    RadialAttn(block_rule="reference", block_size=16),
    GNAAttn(),
    GNAAttn(stride=2),
    GNAAttn(window=(2, "full", 3)),
    CLEARAttn(),
    CLEARAttn(radius=3, window="cylinder"),
    FreeSwimAttn(radius=2),
    FreeSwimAttn(native=(4, 5)),
    AttentionTileAttn(),
    AttentionTileAttn(global_frames=3),
    LVSAAttn(),
    LVSAAttn(trained_frames=9, phase=2),
]
BY_CONTENT = [
    VMoBAAttn(),
    VMoBAAttn(topk=(3, 1, 2)),
    VMoBAAttn(preset="training", chunk_2d=(2, 3)),
    VMoBAAttn(granularity="tile", partitions=("3d", "1d"), chunk_1d=0.5),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", STATIC, ids=repr)
def test_masks(method: StaticMaskMethod, grid: TokenGrid) -> None:
    settled = method.for_model("", grid)
    assert None not in (settled.dense_layers, settled.dense_steps)
    assert settled.for_model("", grid) == settled
    tokens = torch.arange(grid.tokens)[:: 1 + grid.tokens // 500]
    want = settled.mask(grid).allowed(tokens[:, None], tokens)
    assert torch.equal(method.mask(grid).allowed(tokens[:, None], tokens), want)
    assert method.order(grid) == settled.order(grid)
    assert method.block_size_on(grid) == settled.block_size_on(grid)
    assert method.score_scale(grid, 64, None) == settled.score_scale(grid, 64, None)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", BY_CONTENT, ids=repr)
def test_selections(method: VMoBAAttn, grid: TokenGrid) -> None:
    settled = method.for_model("", grid)
    assert settled.for_model("", grid) == settled
    for layer in range(len(method.partitions)):
        assert method.partition(grid, layer).chunk == settled.partition(grid, layer).chunk
        rule = method.rule(grid, layer)
        assert rule == settled.rule(grid, layer)
        assert (rule.topk is None) == (settled.select == "threshold")
        assert (rule.scope, rule.tau, rule.tile) == (settled.scope, settled.tau, settled.tile or 1)
    assert method.heads_apart == settled.heads_apart


def test_few_blocks_still_leave_a_query_two() -> None:
    assert VMoBAAttn().for_model("wan", TokenGrid(3, 4, 6)).topk == (2, 2, 2)
