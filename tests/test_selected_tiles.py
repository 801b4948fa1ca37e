"""Selected blocks tile by tile: what the gather computes, and when it is chosen."""

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from triton_device import triton_device

from diffattn import TokenGrid
from diffattn.blocks import pack_bits
from diffattn.kernels.reference import reference_attention
from diffattn.selected import tiles as unions
from diffattn.selected.attention import dense_mask, selected_attention
from diffattn.selected.key_blocks import KeyBlocks, Partition
from diffattn.selected.tiles import prefers_union, selected_pairs, union_attention, union_pairs


def call(
    blocks: KeyBlocks, tokens: int, share: float = 0.4, batch: int = 2, heads: int = 3
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and a random selection."""
    torch.manual_seed(tokens)
    qkv = [torch.randn(batch, tokens, heads, 16).requires_grad_() for _ in range(3)]
    selected = torch.rand(batch, heads, tokens, blocks.blocks) < share
    # Some tiles agree, and some agree on nothing.
    selected[:, :, : tokens // 2] = selected[:, :, :1]
    selected[0, 0, :, 0] = False
    return qkv, pack_bits(selected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([128, 128, 256], (0, 0)),
        ([130, 1, 77, 127], (3, 0)),
        ([5, 6] * 20, (0, 129)),
        ([9], (1, 1)),
    ],
)
def test_equals_dense_attention_under_the_selection(
    lengths: list[int], text: tuple[int, int], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two turns of heads.
    blocks = KeyBlocks.of_lengths(lengths, text_before=text[0], text_after=text[1])
    rows = blocks.padded(128)[1].numel()
    monkeypatch.setattr(unions, "_MASK_BYTES", 2 * 2 * rows * blocks.blocks * 128 * 16)
    tokens = sum(lengths) + sum(text)
    qkv, bits = call(blocks, tokens)
    key_mask = torch.rand(2, tokens) < 0.8 if masked else None
    out = union_attention(*qkv, blocks, bits, scale=0.3, key_mask=key_mask)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    want, _ = reference_attention(*exact, dense_mask(blocks, bits), scale=0.3, key_mask=key_mask)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, qkv, weight)
    for got, truth in zip(found, torch.autograd.grad(want, exact, weight.double()), strict=True):
        torch.testing.assert_close(got.double(), truth, atol=5e-6, rtol=1e-5)


def test_blocks_are_filled_up_to_tiles() -> None:
    blocks = KeyBlocks.of_lengths([3, 4, 1], text_before=2, text_after=5)
    token, block = blocks.padded(4)
    none = 15
    assert token.view(-1, 4).tolist() == [
        [0, 1, none, none],
        [2, 3, 4, none],
        [5, 6, 7, 8],
        [9, none, none, none],
        [10, 11, 12, 13],
        [14, none, none, none],
    ]
    assert block.tolist() == [0, 1, 2, 3, 4, 4]


def test_pairs_are_counted() -> None:
    blocks = KeyBlocks.of_lengths([128, 256])
    selected = torch.zeros(1, 1, 384, 2, dtype=torch.bool)
    selected[:, :, :128, 0] = True
    selected[:, :, 130, 1] = True
    bits = pack_bits(selected)
    # Tile 0 sees one tile, the one query of tile 1 two; 3 x 3 there are.
    assert union_pairs(blocks, bits).item() == pytest.approx(3 / 9)
    assert selected_pairs(blocks, bits).item() == pytest.approx((128 * 128 + 256) / 384**2)
    ragged = KeyBlocks.of_lengths([64])
    everything = pack_bits(torch.ones(1, 1, 64, 1, dtype=torch.bool))
    assert union_pairs(ragged, everything).item() == pytest.approx(4), "half of the tile is filled"


class Arrival:
    """An event that has come when it is told to."""

    here = True

    def __init__(self, device: Any) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        return Arrival.here


def test_the_union_is_chosen_where_neighbours_select_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", Arrival)
    monkeypatch.setattr(unions, "_measured", WeakKeyDictionary())
    monkeypatch.setattr(unions, "_chosen", WeakKeyDictionary())
    blocks = KeyBlocks.of_lengths([128] * 4)
    alike = pack_bits(torch.eye(4).bool().repeat_interleave(128, 0)[None, None])
    mixed = pack_bits(torch.eye(4).bool().repeat(128, 1)[None, None])
    assert not prefers_union(blocks, alike), "nothing is known yet"
    Arrival.here = False
    assert not prefers_union(blocks, alike), "the measurement has not come"
    Arrival.here = True
    assert prefers_union(blocks, mixed), "by the call before"
    assert not prefers_union(blocks, mixed)
    other = Partition(TokenGrid(4, 8, 16), (1, 8, 16)).key_blocks(torch.device("cpu"))
    assert not prefers_union(other, alike), "other blocks are measured apart"


def test_the_choice_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(monkeypatch)
    blocks = KeyBlocks.of_lengths([17, 16], device)
    qkv, bits = call(blocks, 33, batch=1, heads=1)
    qkv, bits = [x.detach().to(device) for x in qkv], bits.to(device)
    used = []
    plain = unions.union_attention

    def spied(*args: Any, **options: Any) -> torch.Tensor:
        used.append("union")
        return plain(*args, **options)

    monkeypatch.setattr("diffattn.selected.attention.union_attention", spied)
    outs = []
    for choice in (False, True):
        monkeypatch.setattr("diffattn.selected.attention.prefers_union", lambda *_, c=choice: c)
        outs.append(selected_attention(*qkv, blocks, bits, backend="triton"))
    assert used == ["union"]
    want, _ = reference_attention(*qkv, dense_mask(blocks, bits))
    for out in outs:
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    # Training gathers: its backward has no use for the union.
    leaves = [x.requires_grad_() for x in qkv]
    selected_attention(*leaves, blocks, bits, backend="triton").sum().backward()
    assert used == ["union"]
    assert leaves[1].grad.any()
