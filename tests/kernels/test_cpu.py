"""The CPU path: right in every dtype and shape, and really skipping what it need not visit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    LAYOUT_FIELDS,
    assert_matches_eager,
    inputs,
    random_layout,
    stack_layouts,
    tensors,
)

from diffattn.blocks import EMPTY, FULL, PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.cpu import row_attention, row_plan
from diffattn.kernels.cpu.block_sparse import block_sparse_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def attend(
    qkv: list[torch.Tensor], layout: BlockLayout, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return block_sparse_attention(
        *qkv, tensors(layout), block_q=layout.block_q, block_kv=layout.block_kv, **options
    )


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Limits at which layouts of a few tokens are cut and shared as others are of thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_plan, "_SHARED_KEYS", 16)
        patch.setattr(row_plan, "_SHARING_QUERIES", 128)
        patch.setattr(row_plan, "_KEYS_PER_TILE", 70)
        patch.setattr(row_plan, "_MASKED_QUERIES", 64)
        patch.setattr(row_plan, "_ROWS_COMPARED", 5)
        yield


@pytest.fixture(params=["flash", "matmul"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the arithmetic, whatever this CPU would choose."""
    rows = {"flash": row_attention.FlashRows, "matmul": row_attention.MatmulRows}[request.param]
    monkeypatch.setattr(
        "diffattn.kernels.cpu.block_sparse.pick_row_attention", lambda dtype: rows()
    )
    return request.param


@dtypes
@pytest.mark.parametrize(
    ("tokens_q", "tokens_kv", "block_q", "block_kv"),
    [
        pytest.param(127, 127, 32, 32, id="prime"),
        pytest.param(129, 129, 64, 64, id="one-over"),
        pytest.param(257, 101, 128, 64, id="more-queries"),
        pytest.param(31, 211, 16, 40, id="more-keys"),
        pytest.param(5, 7, 1, 1, id="tokens"),
        pytest.param(3, 2, 128, 128, id="less-than-a-block"),
    ],
)
def test_equals_dense_attention_under_the_mask(
    tokens_q: int, tokens_kv: int, block_q: int, block_kv: int, dtype: torch.dtype
) -> None:
    layout = random_layout(tokens_q, tokens_kv, block_q, block_kv)
    qkv = inputs("cpu", 3, tokens_q, tokens_kv, 5, 16, dtype)
    assert_matches_eager(*attend(qkv, layout), *qkv, layout.dense(), backward=True)


@pytest.mark.usefixtures("form")
@dtypes
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 128])
def test_both_forms_at_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    layout = random_layout(150, 150, 32, 32)
    qkv = inputs("cpu", 1, 150, 150, 2, head_dim, dtype)
    assert_matches_eager(*attend(qkv, layout), *qkv, layout.dense(), backward=True)


@pytest.mark.usefixtures("form")
def test_both_forms_are_exact_in_float64() -> None:
    layout = random_layout(70, 90, 16, 32)
    qkv = inputs("cpu", 2, 70, 90, 2, 8, torch.float64)
    out, lse = attend(qkv, layout)
    assert lse.dtype == torch.float64
    assert_matches_eager(out, lse, *qkv, layout.dense(), backward=True)


@dtypes
@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (2, 1), (2, 3)])
def test_layouts_per_sample_and_per_head(batch: int, heads: int, dtype: torch.dtype) -> None:
    layouts = [random_layout(100, 120, 32, 32) for _ in range(batch * heads)]
    qkv = inputs("cpu", 2, 100, 120, 3, 16, dtype)
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, (batch, heads))
    stacked = stack_layouts(layouts, batch, heads)
    out, lse = block_sparse_attention(*qkv, stacked, block_q=32, block_kv=32)
    assert_matches_eager(out, lse, *qkv, mask.expand(2, 3, -1, -1), backward=True)


@pytest.mark.usefixtures("form")
def test_weights_that_round_to_0_leave_a_finite_lse() -> None:
    layout = random_layout(64, 64, 64, 64, partial=False)
    layout.full_count.fill_(1)
    qkv = [20 * x.detach() for x in inputs("cpu", 1, 64, 64, 1, 64, torch.bfloat16)]
    assert_matches_eager(*attend(qkv, layout), *qkv, None)


def test_only_visited_keys_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Counting(row_attention.FlashRows):
        def forward(self, q, k, *rest):  # type: ignore[no-untyped-def]
            seen.append(q.shape[:3].numel() * k.shape[2])
            return super().forward(q, k, *rest)

    monkeypatch.setattr(
        "diffattn.kernels.cpu.block_sparse.pick_row_attention", lambda dtype: Counting()
    )
    layout = random_layout(256, 256, 32, 32, partial=False)
    attend(inputs("cpu", 2, 256, 256, 6, 8, torch.float32), layout)
    assert sum(seen) == layout.density * 2 * 6 * 256 * 256
    # Of a partial block, keys that some query of the row sees, filled up to whole vectors.
    seen.clear()
    states = torch.full((2, 2), PARTIAL, dtype=torch.uint8)
    bits = torch.zeros(128, 128, dtype=torch.bool)
    bits[:, 40] = bits[7, 90:98] = True
    layout = layout_from_states(
        states, lambda r, c: bits.expand(len(r), -1, -1),
        tokens_q=256, tokens_kv=256, block_q=128, block_kv=128,
    )  # fmt: skip
    attend(inputs("cpu", 1, 256, 256, 1, 8, torch.float32), layout)
    assert sum(seen) == 256 * 32


def _tiles(groups: tuple[row_plan.Group, ...]) -> Iterator[tuple[row_plan.Tile, torch.Tensor]]:
    """Every tile, with its queries."""
    for group in groups:
        tokens = torch.cat([torch.arange(*span) for span in group.spans])
        assert len(tokens) == sum(group.lengths)
        for tile in group.tiles:
            yield tile, tokens[tile.start : tile.stop]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("tokens_q", "tokens_kv"), [(600, 500), (33, 1000)])
def test_tiles_are_the_layout(tokens_q: int, tokens_kv: int, share: bool) -> None:
    layout = random_layout(tokens_q, tokens_kv, 16, 20)
    layout.full_count[0, 0, ::5] = 0
    key_mask = torch.rand(tokens_kv) < 0.8
    plan = row_plan.make_row_plan(
        tensors(layout), tokens_q=tokens_q, tokens_kv=tokens_kv, block_q=16, block_kv=20,
        share=share,
    )  # fmt: skip
    ((groups,),) = plan.groups
    for mask in (None, key_mask):
        visits = torch.zeros(tokens_q, tokens_kv, dtype=torch.int64)
        begun = torch.zeros(tokens_q, dtype=torch.bool)
        for tile, queries in _tiles(groups):
            assert (begun[queries] != tile.first).all()
            begun[queries] = True
            visit = plan.visit(tile, mask, torch.float32)
            if visit is None:
                continue
            keys = torch.arange(tokens_kv)[visit.keys]
            seen = torch.ones(len(queries), len(keys), dtype=torch.int64)
            if visit.bias is not None:
                seen *= visit.bias.scores[0] == 0
                blind = seen.sum(1) == 0
                found = visit.bias.blind
                assert not blind.any() if found is None else torch.equal(found[0], blind)
            visits[queries[:, None], keys] += seen
        assert begun.all()
        expected = layout.dense()[0, 0] if mask is None else layout.dense()[0, 0] & mask
        assert torch.equal(visits, expected.long())
    firsts = [tile.first for tile, _ in _tiles(groups)]
    assert share == (sum(firsts) < len(firsts))


def test_rows_with_the_same_keys_are_one_tile() -> None:
    states = torch.full((4, 4), FULL, dtype=torch.uint8)
    states[1, 0] = EMPTY
    layout = layout_from_states(
        states, None, tokens_q=100, tokens_kv=100, block_q=32, block_kv=32
    )  # fmt: skip
    for share, expected in (
        (True, [(((0, 32), (64, 100), (32, 64)), (32, 100)), (((0, 32), (64, 100)), (0, 32))]),
        (False, [(((0, 32), (64, 100)), (0, 100)), (((32, 64),), (32, 100))]),
    ):
        plan = row_plan.make_row_plan(
            tensors(layout), tokens_q=100, tokens_kv=100, block_q=32, block_kv=32, share=share
        )
        ((groups,),) = plan.groups
        tiles = [(tuple(queries.tolist()), tile.run) for tile, queries in _tiles(groups)]
        assert tiles == [
            (tuple(token for span in spans for token in range(*span)), run)
            for spans, run in expected
        ]


@pytest.mark.usefixtures("form")
def test_large_tiles_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.kernels.cpu.block_sparse._ELEMENTS_PER_PART", 2000)
    layout = random_layout(200, 200, 64, 32)
    for dtype in (torch.float32, torch.bfloat16):
        qkv = inputs("cpu", 1, 200, 200, 2, 16, dtype)
        assert_matches_eager(*attend(qkv, layout), *qkv, layout.dense(), backward=True)


def test_many_distinct_masks_are_expanded_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.kernels.cpu.row_plan._KEEP_MASKS_BYTES", 0)
    monkeypatch.setattr("diffattn.kernels.cpu.row_plan._KEEP_PATTERNS_BYTES", 0)
    layout = random_layout(100, 100, 32, 40)
    qkv = inputs("cpu", 1, 100, 100, 2, 16, torch.float32)
    assert_matches_eager(*attend(qkv, layout), *qkv, layout.dense(), backward=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_layout(data: st.DataObject) -> None:
    size = st.integers(1, 70)
    tokens_q, tokens_kv, block_q, block_kv = (data.draw(size) for _ in range(4))
    batch, heads, head_dim = (data.draw(st.integers(1, n)) for n in (2, 6, 20))
    shared = data.draw(st.sampled_from([(1, 1), (batch, 1), (1, heads), (batch, heads)]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    layouts = [
        random_layout(tokens_q, tokens_kv, block_q, block_kv, partial=data.draw(st.booleans()))
        for _ in range(shared[0] * shared[1])
    ]
    key_mask = torch.rand(batch, tokens_kv) < 0.8 if data.draw(st.booleans()) else None
    dtype = data.draw(st.sampled_from(DTYPES))
    qkv = inputs("cpu", batch, tokens_q, tokens_kv, heads, head_dim, dtype)
    out, lse = block_sparse_attention(
        *qkv, stack_layouts(layouts, *shared), block_q=block_q, block_kv=block_kv,
        key_mask=key_mask,
    )  # fmt: skip
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, shared)
    mask = mask.expand(batch, heads, -1, -1)
    assert_matches_eager(out, lse, *qkv, mask, key_mask=key_mask, backward=True)


def test_plan_is_made_once_for_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = row_plan.make_row_plan
    monkeypatch.setattr(row_plan, "make_row_plan", lambda *a, **o: made.append(1) or make(*a, **o))
    layout = random_layout(90, 90, 32, 32)
    qkv = inputs("cpu", 1, 90, 90, 1, 8, torch.float32)
    for _ in range(3):
        attend(qkv, layout)[0].sum().backward()
    assert len(made) == 1


def test_plan_follows_changes_and_dies_with_the_layout() -> None:
    layout = random_layout(96, 96, 32, 32, partial=False)
    layout.full_count.fill_(1)
    layout.full_index.fill_(0)
    qkv = [x.detach() for x in inputs("cpu", 1, 96, 96, 1, 8, torch.float32)]
    attend(qkv, layout)
    layout.full_index.fill_(2)  # in place: the identity stays
    assert_matches_eager(*attend(qkv, layout), *qkv, layout.dense())
    other = [t.clone() for t in tensors(layout)]
    other[1].fill_(1)
    out, _ = block_sparse_attention(*qkv, other, block_q=32, block_kv=32)
    assert not torch.equal(out, attend(qkv, layout)[0])
    plans = len(row_plan._cache)
    dead = weakref.ref(layout.full_index)
    del layout, other
    gc.collect()
    assert dead() is None
    assert len(row_plan._cache) == plans - 2


def test_inference_mode_keeps_the_plan() -> None:
    with torch.inference_mode():
        layout = random_layout(64, 64, 32, 32)
        qkv = inputs("cpu", 1, 64, 64, 1, 8, torch.float32)
        assert_matches_eager(*attend(qkv, layout), *qkv, layout.dense())
        assert layout.full_index in row_plan._cache


def _bad(**changes: object) -> dict[str, object]:
    """Good arguments for two samples of 40 query and 50 key tokens and three heads, changed."""
    states = torch.tensor([[FULL, PARTIAL, FULL, PARTIAL]] * 3, dtype=torch.uint8)
    bits = torch.eye(16, dtype=torch.bool)
    layout = layout_from_states(
        states, lambda r, c: bits.expand(len(r), -1, -1),
        tokens_q=40, tokens_kv=50, block_q=16, block_kv=16,
    )  # fmt: skip
    qkv = [torch.randn(2, n, 3, 8) for n in (40, 50, 50)]
    index = [changes.pop(name, getattr(layout, name)) for name in LAYOUT_FIELDS]
    return {**dict(zip("qkv", qkv, strict=True)), "layout": index, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 60, 3, 8)}, "has 3 rows, but 60 query tokens in blocks of 16 make 4"),
        ({"v": torch.randn(2, 50, 3, 8, device="meta")}, "CPU path, but v is on meta"),
        ({"full_count": torch.zeros(2, 2, 3, dtype=torch.int32)}, "for 2 samples and 3 heads"),
        ({"full_count": torch.zeros(1, 1, 3)}, "full_count must be torch.int32 on cpu"),
        ({"full_index": torch.zeros(1, 1, 4, 1, dtype=torch.int32)}, "full_index must have shape"),
        ({"bit_masks": torch.zeros(1, 16, 2, dtype=torch.int32)}, r"bit_masks .* \(-1, 16, 1\)"),
        ({"block_kv": 0}, "at least one token; got 16 x 0"),
        ({"full_index": torch.full((1, 1, 3, 2), 9, dtype=torch.int32)}, "9 .* there are 4 key"),
        ({"partial_mask": torch.full((1, 1, 3, 2), 99, dtype=torch.int32)}, "99 .* bit masks"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_bad_layouts_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"block_q": 16, "block_kv": 16, **_bad(**changes)}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)
