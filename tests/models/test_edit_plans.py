"""Plans of editing, against the study of section 5.6 of the models of 2026.

The study counted token pairs and blocks with code of its own. Figures are the share of token pairs
that attend and the share of blocks that are visited, under CLEAR with radius 16.
"""

import pytest

from diffattn import CLEARAttn, TokenGrid, plan
from diffattn.grid import Reference
from diffattn.planning.published import PUBLISHED

STUDY = {
    # Model, pixels of the target and of each reference, text: tokens, and figures by policy.
    ("black-forest-labs/FLUX.1-Kontext-dev", 1024, (1024,), None): (
        8_704, {"exact": (0.813, 0.852), "visible": (0.626, 0.704), "local": (0.251, 0.408)},
    ),
    ("black-forest-labs/FLUX.1-Kontext-dev", 2048, (2048,), None): (
        33_280, {"exact": (0.768, 0.782), "visible": (0.536, 0.563), "local": (0.073, 0.127)},
    ),
    ("Qwen/Qwen-Image-Edit-2509", 1328, (1024, 1024), 300): (
        15_381, {"exact": (0.819, 0.852), "visible": (0.699, 0.762), "local": (0.579, 0.665)},
    ),
    ("black-forest-labs/FLUX.2-dev", 2048, (1024, 1024, 1024), None): (
        29_184, {"exact": (0.699, 0.716), "visible": (0.649, 0.677), "local": (0.549, 0.598)},
    ),
}  # fmt: skip


def with_references(grid: TokenGrid, *sides: int) -> TokenGrid:
    start, references = grid.tokens, []
    for side in sides:
        references.append(Reference(start, 1, side, side))
        start += side * side
    return TokenGrid(
        1, grid.height, grid.width, grid.text_before, start - grid.tokens,
        references=tuple(references),
    )  # fmt: skip


@pytest.mark.parametrize("call", STUDY, ids=lambda call: f"{call[0]} {call[1]}")
def test_token_pairs_and_blocks_are_those_of_the_study(call: tuple) -> None:
    model, target, references, text = call
    tokens, figures = STUDY[call]
    alone = PUBLISHED[model].grid(target, target, 1, text)
    grid = with_references(alone, *(pixels // 16 for pixels in references))
    for policy, (density, block_density) in figures.items():
        got = plan(model, CLEARAttn(radius=16, references=policy), grid=grid)
        assert got.tokens == tokens
        assert got.density == pytest.approx(density, abs=1e-3)
        assert got.block_density == pytest.approx(block_density, abs=2e-3)
