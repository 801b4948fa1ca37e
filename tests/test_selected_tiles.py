"""Selected blocks tile by tile: what the gather computes."""

import pytest
import torch

from diffattn.blocks import pack_bits
from diffattn.kernels.reference import reference_attention
from diffattn.selected import tiles as unions
from diffattn.selected.attention import dense_mask
from diffattn.selected.key_blocks import KeyBlocks
from diffattn.selected.tiles import selected_pairs, union_attention, union_pairs


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
