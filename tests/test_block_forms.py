"""Layouts in other libraries' index forms: each form, read by its own rules, is the same mask."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, noop_mask

import diffattn
from diffattn import BlockLayout, PredicateMask, RadialAttn, TokenGrid
from diffattn.block_forms import (
    FA4Blocks,
    TokenRule,
    from_block_mask,
    to_block_mask,
    to_cudnn,
    to_fa4,
    to_flashinfer,
    to_flashinfer_variable,
)
from diffattn.blocks import layout_from_states
from diffattn.kernels.checks import LAYOUT_NAMES

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

DOCUMENT = torch.arange(150) // 37
REACH = torch.tensor([[5, 40, 150], [1, 0, 77]])
GRID = TokenGrid(5, 4, 7, text_after=3)


def near_by_head(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> object:
    return (q - k).abs() < REACH[b, h]


# mask_mod, samples, heads, query tokens, key tokens, block size
BLOCK_MASKS: dict[str, tuple[MaskMod, int, int, int, int, int | tuple[int, int]]] = {
    "everything": (noop_mask, 1, 1, 64, 64, 32),
    "causal, ragged": (lambda b, h, q, k: q >= k, 1, 1, 131, 131, 32),
    "documents, more keys": (
        lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
        1,
        1,
        97,
        149,
        (32, 16),
    ),
    "odd blocks": (lambda b, h, q, k: (q * 7 + k) % 5 < 2, 1, 1, 29, 41, (7, 45)),
    "by head": (near_by_head, 1, 3, 150, 150, 16),
    "by sample and head": (near_by_head, 2, 3, 67, 130, (16, 33)),
    "nothing": (lambda b, h, q, k: q < 0, 1, 1, 20, 20, 8),
}


def random_layout(*, partial: bool = True, size: tuple[int, ...] = (75, 90, 16, 32)) -> BlockLayout:
    tokens_q, tokens_kv, block_q, block_kv = size
    generator = torch.Generator().manual_seed(0)
    shape = (-(-tokens_q // block_q), -(-tokens_kv // block_kv))
    states = torch.randint(0, 3, shape, generator=generator)
    states[1] = 0  # a row that sees nothing
    return layout_from_states(
        (states if partial else states // 2 * 2).to(torch.uint8),
        lambda row, column: torch.rand(len(row), block_q, block_kv, generator=generator) < 0.5,
        tokens_q=tokens_q,
        tokens_kv=tokens_kv,
        block_q=block_q,
        block_kv=block_kv,
    )


def layout_by_head(name: str = "by sample and head") -> BlockLayout:
    mod, b, h, q, k, size = BLOCK_MASKS[name]
    return from_block_mask(create_block_mask(mod, b, h, q, k, device="cpu", BLOCK_SIZE=size))


LAYOUTS = {
    "random": lambda: random_layout(),
    "odd blocks": lambda: random_layout(size=(29, 41, 7, 45)),
    "only full": lambda: random_layout(partial=False),
    "radial": lambda: RadialAttn(block_size=16).mask(GRID).blocks(16),
    "text of one token": lambda: (
        RadialAttn(block_size=16).mask(TokenGrid(3, 4, 5, text_before=1)).blocks(16, 32)
    ),
    "predicate": lambda: PredicateMask(GRID, lambda q, k: (q - k).abs() % 11 < 4).blocks(128),
    "by sample and head": layout_by_head,
}


@pytest.mark.parametrize("apart", [True, False], ids=["full blocks apart", "every block partial"])
@pytest.mark.parametrize("name", BLOCK_MASKS)
def test_from_block_mask_is_its_mask(name: str, apart: bool) -> None:
    mod, b, h, q, k, size = BLOCK_MASKS[name]
    block_mask = create_block_mask(mod, b, h, q, k, device="cpu", BLOCK_SIZE=size)
    if not apart:
        lists = block_mask.kv_indices.shape
        block_mask = BlockMask.from_kv_blocks(
            torch.full(lists[:3], lists[3], dtype=torch.int32),
            torch.arange(lists[3], dtype=torch.int32).expand(lists),
            BLOCK_SIZE=size,
            mask_mod=mod,
            seq_lengths=(q, k),
        )
    layout = diffattn.from_block_mask(block_mask)
    assert torch.equal(layout.dense(), create_mask(mod, b, h, q, k, device="cpu"))
    assert (layout.block_q, layout.block_kv) == ((size, size) if isinstance(size, int) else size)
    assert layout.full_count.shape[:2] == (b, h)
    for index in (layout.full_index, layout.partial_index):
        assert index.dtype == torch.int32


def test_equal_masks_of_different_heads_are_stored_once() -> None:
    def near(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((q - k).abs() < 8) | (h == 3)

    layouts = [
        from_block_mask(create_block_mask(near, 1, heads, 64, 64, device="cpu", BLOCK_SIZE=16))
        for heads in (1, 4)
    ]
    assert layouts[1].bit_masks.shape == layouts[0].bit_masks.shape == (3, 16, 1)


def test_the_lists_say_which_blocks_the_rule_is_asked_about() -> None:
    one, two = (torch.tensor([[[n, n]]], dtype=torch.int32) for n in (1, 2))
    block_mask = BlockMask.from_kv_blocks(
        one,
        torch.tensor([[[[1, 99, 99], [0, 99, 99]]]], dtype=torch.int32).clamp(max=2),
        two - one,
        torch.tensor([[[[2, 0, 0], [1, 0, 0]]]], dtype=torch.int32),
        BLOCK_SIZE=(4, 8),
        mask_mod=lambda b, h, q, k: k % 2 == 1,
        seq_lengths=(8, 24),
    )
    even = torch.arange(8) % 2 == 1
    nothing, everything = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    want = torch.stack([torch.cat([nothing, even, everything])] * 4)
    want = torch.cat([want, torch.stack([torch.cat([even, everything, nothing])] * 4)])
    assert torch.equal(from_block_mask(block_mask).dense()[0, 0], want)


def test_never_looks_at_every_token_pair() -> None:
    tokens = 200_000  # 40 GB as a token mask
    blocks = -(-tokens // 128)
    diagonal = torch.arange(blocks, dtype=torch.int32)[:, None].expand(blocks, blocks)
    ones = torch.ones(1, 1, blocks, dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        ones,
        diagonal[None, None],
        mask_mod=lambda b, h, q, k: q >= k,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )
    layout = from_block_mask(block_mask)
    assert layout.partial_blocks == blocks
    assert layout.bit_masks.shape[0] == 2  # the last block is a short one


def test_lists_that_do_not_fit_are_refused() -> None:
    one = torch.ones(1, 1, 2, dtype=torch.int32)
    index = torch.tensor([[[[7, 0], [0, 0]]]], dtype=torch.int32)
    for lists, name in (((one, index), "kv_indices"), ((one * 0, index, one, index), "full_kv_in")):
        block_mask = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=4, seq_lengths=(8, 8), compute_q_blocks=False
        )
        with pytest.raises(ValueError, match=rf"{name}.* holds 0 .. 7, but .* make 2 key blocks"):
            from_block_mask(block_mask)
    block_mask = BlockMask.from_kv_blocks(
        one, index.clamp(max=1), BLOCK_SIZE=4, seq_lengths=(12, 8), compute_q_blocks=False
    )
    with pytest.raises(ValueError, match=r"states has shape \(2, 2\), but 12 x 8 tokens"):
        from_block_mask(block_mask)


@pytest.mark.parametrize("name", LAYOUTS)
def test_to_block_mask_is_the_same_mask(name: str) -> None:
    layout = LAYOUTS[name]()
    block_mask = layout.to_block_mask()
    batch, heads = layout.full_count.shape[:2]
    assert block_mask.shape == (batch, heads, layout.tokens_q, layout.tokens_kv)
    assert (layout.block_q, layout.block_kv) == block_mask.BLOCK_SIZE
    # Its rule alone says it all, also to those that look at nothing else (eager flex_attention).
    rule = create_mask(
        block_mask.mask_mod, batch, heads, layout.tokens_q, layout.tokens_kv, device="cpu"
    )
    assert torch.equal(rule, layout.dense())
    # The forward and the transposed lists name the blocks in which anything attends.
    assert block_mask.q_indices is not None
    visited = torch.zeros(batch, heads, layout.rows, layout.columns, dtype=torch.int32)
    transposed = torch.zeros_like(visited)
    for b in range(batch):
        for h in range(heads):
            for count, index, into in (
                (block_mask.kv_num_blocks, block_mask.kv_indices, visited),
                (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, visited),
                (block_mask.q_num_blocks, block_mask.q_indices, transposed.mT),
                (block_mask.full_q_num_blocks, block_mask.full_q_indices, transposed.mT),
            ):
                for row, n in enumerate(count[b, h].tolist()):
                    into[b, h, row, index[b, h, row, :n].long()] += 1
    padded = torch.zeros(
        batch, heads, layout.rows * layout.block_q, layout.columns * layout.block_kv
    )
    padded[:, :, : layout.tokens_q, : layout.tokens_kv] = layout.dense()
    blocks = padded.unflatten(3, (-1, layout.block_kv)).unflatten(2, (-1, layout.block_q))
    want = blocks.amax((3, 5)).int()
    assert torch.equal(visited, want)
    assert torch.equal(transposed, want)


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip_gives_the_very_same_lists(name: str) -> None:
    layout = LAYOUTS[name]()
    back = from_block_mask(to_block_mask(layout))
    for field in LAYOUT_NAMES:
        assert torch.equal(getattr(back, field), getattr(layout, field)), field
    assert (back.tokens_q, back.tokens_kv) == (layout.tokens_q, layout.tokens_kv)


@pytest.mark.parametrize("name", ["random", "by sample and head"])
def test_a_key_mask_leaves_no_block_full(name: str) -> None:
    layout = LAYOUTS[name]()
    key_mask = torch.rand(2, layout.tokens_kv, generator=torch.Generator().manual_seed(1)) < 0.5
    block_mask = to_block_mask(layout, key_mask=key_mask)
    heads = layout.full_count.shape[1]
    rule = create_mask(
        block_mask.mask_mod, 2, heads, layout.tokens_q, layout.tokens_kv, device="cpu"
    )
    assert torch.equal(rule, layout.dense() & key_mask[:, None, None, :])
    assert block_mask.full_kv_num_blocks is not None
    assert not block_mask.full_kv_num_blocks.any()


def pair_attends(rule: TokenRule, block: tuple[int, int], *pair: int) -> bool:
    """The look-up as `TokenRule` states it, for one pair of tokens."""
    b, h, i, j = pair
    block_q, block_kv = block
    b, h = b % rule.blocks.shape[0], h % rule.blocks.shape[1]
    mask = rule.bits[rule.blocks[b, h, i // block_q, j // block_kv]]
    w = j % block_kv
    return bool(mask[i % block_q, w // 32] >> (w % 32) & 1)


def dense_of_fa4(
    blocks: FA4Blocks, rule: TokenRule | None, tokens_q: int, tokens_kv: int, transposed: bool
) -> torch.Tensor:
    batch, heads = blocks.full_block_cnt.shape[:2]
    out = torch.zeros(batch, heads, tokens_q, tokens_kv, dtype=torch.bool)
    block_q, block_kv = blocks.block_size
    for b in range(batch):
        for h in range(heads):
            for count, index, masked in (
                (blocks.full_block_cnt, blocks.full_block_idx, False),
                (blocks.mask_block_cnt, blocks.mask_block_idx, True),
            ):
                for line, n in enumerate(count[b, h].tolist()):
                    for other in index[b, h, line, :n].tolist():
                        row, column = (other, line) if transposed else (line, other)
                        for i in range(row * block_q, min((row + 1) * block_q, tokens_q)):
                            for j in range(
                                column * block_kv, min((column + 1) * block_kv, tokens_kv)
                            ):
                                assert not out[b, h, i, j]
                                out[b, h, i, j] = not masked or (
                                    rule is not None
                                    and pair_attends(rule, blocks.block_size, b, h, i, j)
                                )
    return out


@pytest.mark.parametrize("name", ["odd blocks", "only full", "text of one token", "small by head"])
def test_fa4_lists_are_the_same_mask_in_both_directions(name: str) -> None:
    if name == "small by head":
        mod = BLOCK_MASKS["by head"][0]
        block_mask = create_block_mask(mod, 1, 3, 30, 45, device="cpu", BLOCK_SIZE=(8, 16))
        layout = from_block_mask(block_mask)
    else:
        layout = LAYOUTS[name]()
    form = to_fa4(layout)
    assert (form.rule is None) == (layout.partial_blocks == 0)
    for blocks, transposed in ((form.forward, False), (form.backward, True)):
        got = dense_of_fa4(blocks, form.rule, layout.tokens_q, layout.tokens_kv, transposed)
        assert torch.equal(got, layout.dense())
        for count, index in (
            (blocks.mask_block_cnt, blocks.mask_block_idx),
            (blocks.full_block_cnt, blocks.full_block_idx),
        ):
            assert count.dtype == index.dtype == torch.int32
            assert index.shape[-1] == max(1, int(count.max()))  # compact
    assert set(vars(form.forward)) == {
        "mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size",
    }  # fmt: skip


def test_cudnn_lists_are_the_same_mask() -> None:
    layout = random_layout(partial=False, size=(300, 317, 64, 64))
    form = to_cudnn(layout, batch=2, heads=3)
    assert form.q2k_block_nums.shape == (2, 3, 5)
    assert form.block_sizes.tolist() == [64, 64, 64, 64, 61]
    assert form.sparse_block_size == 64
    assert form.allow_empty_block_nums  # the layout has a row that sees nothing
    for x in (form.q2k_block_index, form.q2k_block_nums, form.block_sizes):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    for b, h in ((0, 0), (1, 2)):
        got = torch.zeros(300, 317, dtype=torch.bool)
        for row, n in enumerate(form.q2k_block_nums[b, h].tolist()):
            for column in form.q2k_block_index[b, h, row, :n].tolist():
                stop = column * 64 + int(form.block_sizes[column])
                got[row * 64 : row * 64 + 64, column * 64 : stop] = True
        assert torch.equal(got, layout.dense()[0, 0])
    mask = RadialAttn(block_size=64).mask(TokenGrid(5, 8, 8))
    assert not to_cudnn(mask.blocks(64), batch=1, heads=1).allow_empty_block_nums


def test_cudnn_refuses_what_it_cannot_compute() -> None:
    partial = RadialAttn(block_size=64).mask(TokenGrid(5, 9, 7)).blocks(128)
    with pytest.raises(ValueError, match=r"\d+ of the layout's blocks are partial, and cuDNN's"):
        to_cudnn(partial, batch=1, heads=1)
    full = random_layout(partial=False)
    with pytest.raises(ValueError, match="blocks are 16 x 32 tokens, but cuDNN takes 64 x 64 or 1"):
        to_cudnn(full, batch=1, heads=1)
    two_heads = create_block_mask(
        lambda b, h, q, k: q // 64 == h * k // 64, 1, 2, 128, 128, device="cpu", BLOCK_SIZE=64
    )
    layout = from_block_mask(two_heads)
    assert to_cudnn(layout, batch=2, heads=2).q2k_block_index.shape == (2, 2, 2, 2)
    with pytest.raises(ValueError, match="layout is for 2 heads, but 3 were asked for"):
        to_cudnn(layout, batch=1, heads=3)


@pytest.mark.parametrize("partial", [True, False])
def test_flashinfer_matrix_is_the_same_mask(partial: bool) -> None:
    layout = random_layout(partial=partial, size=(75, 96, 16, 32))
    form = to_flashinfer(layout)
    assert (form.mask is None) == (not partial)
    assert form.indptr.dtype == form.indices.dtype == torch.int32
    assert (form.M, form.N, form.R, form.C) == (75, 96, 16, 32)
    got = torch.zeros(form.M, form.N, dtype=torch.bool)
    for row in range(len(form.indptr) - 1):
        for at in range(form.indptr[row], form.indptr[row + 1]):
            column = int(form.indices[at])
            tile = torch.ones(16, 32, dtype=torch.bool) if form.mask is None else form.mask[at]
            rows = min(16, 75 - row * 16)
            got[row * 16 :, column * 32 :][:rows, :32] = tile[:rows]
    assert torch.equal(got, layout.dense()[0, 0])


def test_flashinfer_variable_map_is_the_same_mask() -> None:
    mod = lambda b, h, q, k: (q // 16 + h) % 3 == k // 16 % 3  # noqa: E731
    block_mask = create_block_mask(mod, 1, 2, 75, 90, device="cpu", BLOCK_SIZE=16)
    layout = from_block_mask(block_mask)
    form = to_flashinfer_variable(layout, heads=2)
    for h in range(2):
        rows = form.block_mask_map[h].repeat_interleave(form.block_row_sz[h], 0)
        got = rows.repeat_interleave(form.block_col_sz[h], 1)
        assert torch.equal(got, layout.dense()[0, h])
    shared = to_flashinfer_variable(random_layout(partial=False), heads=4)
    assert shared.block_mask_map.shape == (4, 5, 3)
    assert shared.block_row_sz.tolist() == [[16, 16, 16, 16, 11]] * 4


def test_flashinfer_refuses_what_it_cannot_compute() -> None:
    with pytest.raises(ValueError, match="90 key tokens do not fill blocks of 32"):
        to_flashinfer(random_layout())
    by_head = layout_by_head()
    with pytest.raises(ValueError, match=r"one of 2 samples and 3 heads, .* shared by all"):
        to_flashinfer(by_head)
    with pytest.raises(ValueError, match=r"blocks are partial, and FlashInfer's variable"):
        to_flashinfer_variable(by_head, heads=3)
    mod = lambda b, h, q, k: (q // 16 + h) % 3 == k // 16 % 3  # noqa: E731
    block_mask = create_block_mask(mod, 1, 2, 75, 90, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match="1 samples and 2 heads, but must be for one sample, and"):
        to_flashinfer_variable(from_block_mask(block_mask), heads=3)
