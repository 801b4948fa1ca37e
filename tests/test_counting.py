"""The pairs that attached attention computes, against dense boolean masks."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_complete
import torch

import diffattn
from diffattn import BlockTopKAttn, DenseAttn, GNAAttn, Method, SolAttn, TokenGrid, VMoBAAttn
from diffattn.counting import counted_pairs, pairs_of, watching
from diffattn.methods.selected_blocks import SelectedBlocksMethod

ALWAYS: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
GRID = TokenGrid(2, 4, 6)


def run(method: Method | dict[str, Method | None], steps: int = 2) -> diffattn.attach.Attachment:
    pipe = tiny_complete.wan()
    pipe.set_progress_bar_config(disable=True)
    attachment = diffattn.set_attn_processor(pipe, method)
    pipe(
        "a red circle", height=64, width=96, num_frames=5, num_inference_steps=steps,
        output_type="latent", guidance_scale=1.0, max_sequence_length=32,
    )  # fmt: skip
    assert attachment is not None
    return attachment


@pytest.mark.parametrize("grid", [TokenGrid(3, 5, 7), TokenGrid(4, 9, 11, text_after=13)], ids=str)
@pytest.mark.parametrize("method", [GNAAttn(window=3), DenseAttn()], ids=lambda m: m.type)
def test_the_pairs_of_a_layout(method: Any, grid: TokenGrid) -> None:
    layout = method.for_model("", grid).layout(grid, torch.device("cpu"))
    assert pairs_of(layout).tolist() == layout.dense().sum((-2, -1)).tolist()


def test_each_head_and_sample_of_a_layout_counts() -> None:
    random = torch.Generator().manual_seed(0)
    chosen = torch.rand(2, 3, 4, 4, generator=random) > 0.5
    from diffattn.routing.lists import layout_of_blocks

    layout = layout_of_blocks(chosen, tokens_q=55, tokens_kv=55, block_q=16, block_kv=16)
    assert pairs_of(layout).tolist() == layout.dense().sum((-2, -1)).tolist()


def test_a_mask_in_every_call() -> None:
    method = GNAAttn(window=(1, 3, 3), **ALWAYS)
    with counted_pairs() as pairs:
        attachment = run(method)
    assert (pairs.sparse_calls, pairs.dense_calls) == (attachment.sparse_calls, 0)
    assert pairs.density == pytest.approx(method.mask(GRID).density)


def test_calls_that_the_schedule_keeps_dense_count_whole() -> None:
    method = GNAAttn(window=(1, 3, 3), dense_layers=0, dense_steps=1)
    with counted_pairs() as pairs:
        run(method, steps=4)
    assert pairs.dense_calls * 3 == pairs.sparse_calls
    assert pairs.density == pytest.approx((1 + 3 * method.mask(GRID).density) / 4)


@pytest.mark.parametrize(
    "method",
    [
        BlockTopKAttn(keep=0.5, block=16, **ALWAYS),
        SolAttn(tau=0.0, block=16, **ALWAYS),
        BlockTopKAttn(keep=0.5, block=16, remainder="summary", **ALWAYS),
    ],
    ids=["drop", "sol", "summary"],
)
def test_what_a_method_selects_by_content(
    method: SelectedBlocksMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    choose = SelectedBlocksMethod._chosen

    def chosen(self: Any, *args: Any) -> torch.Tensor:
        out = choose(self, *args)
        tokens = out.repeat_interleave(16, -1).repeat_interleave(16, -2)
        shares.append(tokens[..., : GRID.tokens, : GRID.tokens].double().mean().item())
        return out

    monkeypatch.setattr(SelectedBlocksMethod, "_chosen", chosen)
    with counted_pairs() as pairs:
        run(method)
    assert pairs.density == pytest.approx(sum(shares) / len(shares))
    assert 0 < sum(shares) / len(shares) < 1


def test_what_each_query_selects_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffattn.methods.vmoba import method as vmoba
    from diffattn.selected.attention import dense_mask

    shares = []
    attend = vmoba.selected_attention

    def selected(query: Any, key: Any, value: Any, blocks: Any, bits: Any, **rest: Any) -> Any:
        shares.append(dense_mask(blocks, bits).double().mean().item())
        return attend(query, key, value, blocks, bits, **rest)

    monkeypatch.setattr(vmoba, "selected_attention", selected)
    with counted_pairs() as pairs:
        run(VMoBAAttn(chunk_1d=1, chunk_2d=(2, 3), chunk_3d=(1, 2, 3), topk=1, **ALWAYS))
    assert pairs.density == pytest.approx(sum(shares) / len(shares))
    assert pairs.shares is not None
    assert pairs.shares.sum(1).tolist() == pytest.approx([1.0] * len(pairs.shares))


def test_nobody_counts_outside_of_the_block() -> None:
    with counted_pairs() as pairs:
        assert watching() is pairs
    assert watching() is None
    assert pairs.density is None
    run(GNAAttn(window=3, **ALWAYS))
    assert pairs.sparse_calls == 0
