"""The Triton kernels: right in every dtype and shape, on a GPU or else in Triton's interpreter."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
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
from diffattn.kernels.block_sparse import (
    block_sparse_attention,
    block_sparse_attention_gradients,
    walk,
)
from diffattn.kernels.block_sparse.launch import Problem
from diffattn.kernels.common.tile_tables import TileConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

Results = tuple[torch.Tensor, torch.Tensor]


def attend(qkv: list[torch.Tensor], layout: BlockLayout, **options: Any) -> Results:
    layout = layout.to(qkv[0].device)
    return block_sparse_attention(
        *qkv, tensors(layout), block_q=layout.block_q, block_kv=layout.block_kv, **options
    )


def check(qkv: list[torch.Tensor], layout: BlockLayout, **options: Any) -> Results:
    """Compare the results and all gradients with float64 attention under the layout's mask."""
    out, lse = attend(qkv, layout, **options)
    mask = layout.dense().to(qkv[0].device)
    assert_matches_eager(out, lse, *qkv, mask, backward=True, **options)
    return out, lse


def layout_of(states: list[list[int]], **sizes: int) -> BlockLayout:
    """A layout of the given blocks; about half of a partial one is visible."""

    def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return torch.rand(row.numel(), sizes["block_q"], sizes["block_kv"]) < 0.5

    return layout_from_states(torch.tensor(states, dtype=torch.uint8), bits, **sizes)


@pytest.fixture(params=[{}, {"ahead": True, "partial": 32}], ids=["plain", "ahead"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a block in both directions, as for large blocks in the shipped table."""
    monkeypatch.setattr(
        "diffattn.kernels.block_sparse.launch.tile_config",
        lambda *_, **__: TileConfig(16, 16, num_warps=4, num_stages=2, **request.param),
    )


@dtypes
@pytest.mark.parametrize(
    ("tokens_q", "tokens_kv", "block_q", "block_kv"),
    [
        pytest.param(31, 31, 16, 16, id="prime"),
        pytest.param(33, 33, 16, 16, id="one-over"),
        pytest.param(47, 18, 32, 16, id="more-queries"),
        pytest.param(19, 70, 16, 32, id="more-keys"),
        pytest.param(1, 65, 16, 64, id="one-query"),
        pytest.param(65, 1, 64, 16, id="text-of-length-1"),
        pytest.param(3, 2, 64, 64, id="less-than-a-block"),
    ],
)
def test_equals_dense_attention_under_the_mask(
    tokens_q: int, tokens_kv: int, block_q: int, block_kv: int, dtype: torch.dtype, device: str
) -> None:
    layout = random_layout(tokens_q, tokens_kv, block_q, block_kv)
    check(inputs(device, 2, tokens_q, tokens_kv, 3, 16, dtype), layout)


@dtypes
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("tokens_q", "tokens_kv", "block_q", "block_kv"),
    [
        pytest.param(70, 75, 64, 64, id="square"),
        pytest.param(33, 129, 32, 128, id="wide"),
        pytest.param(129, 33, 128, 32, id="high"),
    ],
)
def test_several_tiles_per_block(
    tokens_q: int, tokens_kv: int, block_q: int, block_kv: int, dtype: torch.dtype, device: str
) -> None:
    layout = random_layout(tokens_q, tokens_kv, block_q, block_kv)
    check(inputs(device, 1, tokens_q, tokens_kv, 2, 16, dtype), layout)


@pytest.mark.parametrize(
    "states",
    [
        pytest.param([[FULL] * 3] * 3, id="full"),
        pytest.param([[PARTIAL] * 3] * 3, id="partial"),
        pytest.param([[FULL, EMPTY, PARTIAL], [EMPTY] * 3, [PARTIAL, EMPTY, FULL]], id="mixed"),
        pytest.param([[EMPTY] * 3] * 3, id="empty"),
        pytest.param([[EMPTY, EMPTY, FULL]] * 3, id="short-column"),
    ],
)
def test_kinds_of_blocks(states: list[list[int]], device: str) -> None:
    layout = layout_of(states, tokens_q=37, tokens_kv=41, block_q=16, block_kv=16)
    check(inputs(device, 1, 37, 41, 2, 16), layout)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(1, torch.float32), (16, torch.bfloat16), (24, torch.float16), (40, torch.bfloat16),
     (80, torch.float32), (80, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)],
)  # fmt: skip
def test_head_dims(head_dim: int, dtype: torch.dtype, device: str) -> None:
    check(inputs(device, 1, 40, 40, 1, head_dim, dtype), random_layout(40, 40, 32, 16))


@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (2, 1), (2, 3)])
def test_layouts_per_sample_and_per_head(batch: int, heads: int, device: str) -> None:
    layouts = [random_layout(35, 50, 16, 16) for _ in range(batch * heads)]
    qkv = inputs(device, 2, 35, 50, 3, 16)
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, (batch, heads))
    stacked = [x.to(device) for x in stack_layouts(layouts, batch, heads)]
    out, lse = block_sparse_attention(*qkv, stacked, block_q=16, block_kv=16)
    mask = mask.expand(2, 3, -1, -1).to(device)
    assert_matches_eager(out, lse, *qkv, mask, backward=True)


def test_index_lists_of_any_strides(device: str) -> None:
    layout = random_layout(40, 40, 16, 16).to(device)
    qkv = inputs(device, 1, 40, 40, 2, 16)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in tensors(layout)]
    out, lse = block_sparse_attention(*qkv, strided, block_q=16, block_kv=16)
    assert_matches_eager(out, lse, *qkv, layout.dense(), backward=True)


def test_nothing_is_copied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of any strides reach the kernel where they are."""
    started_with: list[int] = []
    collect = Problem.of

    def recording(*args: Any, **options: Any) -> Problem:
        started_with.extend(x.data_ptr() for x in args[:3])
        return collect(*args, **options)

    monkeypatch.setattr(Problem, "of", staticmethod(recording))
    qkv = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in
           inputs(device, 1, 20, 20, 2, 16)]  # fmt: skip
    attend(qkv, random_layout(20, 20, 16, 16))
    assert started_with == [x.data_ptr() for x in qkv]


def test_tiles_that_reach_beyond_32_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_layout(40, 40, 16, 16).to(device)
    qkv = inputs(device, 2, 40, 40, 2, 16)
    key_mask = torch.rand(2, 40, device=device) < 0.7
    monkeypatch.setattr("diffattn.kernels.block_sparse.launch._MAX_OFFSET", 1)
    check(qkv, layout, key_mask=key_mask)


@pytest.mark.parametrize(
    ("stride", "wide"), [((0, 2**28, 16, 1), True), ((0, 2**27, 16, 1), False),
                         ((2**40, 48, 2**40, 1), False), ((0, 48, 16, 2**28), True)],
)  # fmt: skip
def test_only_tiles_need_64_bit_offsets(stride: tuple[int, ...], wide: bool) -> None:
    """Where a tile begins is always computed in 64 bits."""
    x = torch.empty_strided((2, 40, 3, 16), stride, device="meta")
    layout = tensors(random_layout(40, 40, 16, 16))
    assert Problem.of(x, x, x, layout, None, 16, 16, 1.0).wide == wide


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_memory_beyond_32_bits(dim: int, device: str) -> None:
    """The last element of q, k and v is more than 2**31 elements behind the first."""
    shape = [2, 40, 2, 16]
    stride = [1280, 32, 16, 1]
    stride[dim] = 2**31 // (shape[dim] - 1) + 16
    storage = torch.empty(2**31 + 2**17, dtype=torch.float16, device=device)
    qkv = []
    for x in inputs(device, *shape[:2], *shape[1:], torch.float16):
        storage.as_strided(shape, stride).copy_(x.detach())
        clean = storage.as_strided(shape, stride)
        layout = random_layout(40, 40, 16, 16)
        check([y.detach().requires_grad_() for y in (clean, clean, clean)], layout)
        qkv.append(clean)


def test_gradients_outside_of_autograd(device: str) -> None:
    layout = random_layout(40, 50, 16, 16).to(device)
    qkv = inputs(device, 1, 40, 50, 2, 16)
    key_mask = torch.rand(1, 50, device=device) < 0.7
    options = {"block_q": 16, "block_kv": 16, "scale": 0.3, "key_mask": key_mask}
    out, lse = block_sparse_attention(*qkv, tensors(layout), **options)
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, qkv, grad_out)
    found = block_sparse_attention_gradients(
        grad_out, *(x.detach() for x in (*qkv, out, lse)), tensors(layout), **options
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_every_time(device: str) -> None:
    layout = random_layout(70, 70, 16, 16)
    qkv = inputs(device, 1, 70, 70, 2, 16, torch.float16)
    runs = []
    for _ in range(2):
        out, lse = attend(qkv, replace(layout))
        runs.append((out, lse, *torch.autograd.grad(out.float().square().sum(), qkv)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_any_layout(data: st.DataObject, device: str) -> None:
    block = st.sampled_from([16, 32])
    tokens_q, tokens_kv = (data.draw(st.integers(1, 50)) for _ in range(2))
    block_q, block_kv = data.draw(block), data.draw(block)
    batch, heads, head_dim = (data.draw(st.integers(1, n)) for n in (2, 2, 20))
    shared = data.draw(st.sampled_from([(1, 1), (batch, 1), (1, heads), (batch, heads)]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    layouts = [
        random_layout(tokens_q, tokens_kv, block_q, block_kv, partial=data.draw(st.booleans()))
        for _ in range(shared[0] * shared[1])
    ]
    masked = data.draw(st.booleans())
    key_mask = torch.rand(batch, tokens_kv, device=device) < 0.8 if masked else None
    dtype = data.draw(st.sampled_from(DTYPES))
    qkv = inputs(device, batch, tokens_q, tokens_kv, heads, head_dim, dtype)
    out, lse = block_sparse_attention(
        *qkv, [x.to(device) for x in stack_layouts(layouts, *shared)],
        block_q=block_q, block_kv=block_kv, key_mask=key_mask,
    )  # fmt: skip
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, shared)
    mask = mask.expand(batch, heads, -1, -1).to(device)
    assert_matches_eager(out, lse, *qkv, mask, key_mask=key_mask, backward=True)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 128), (64, 64), (128, 64), (256, 32)])
def test_shipped_tiles(
    head_dim: int, block_q: int, block_kv: int, dtype: torch.dtype, device: str
) -> None:
    layout = random_layout(1111, 1111, block_q, block_kv)
    check(inputs(device, 2, 1111, 1111, 3, head_dim, dtype), layout)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph(device: str) -> None:
    layout = random_layout(300, 300, 128, 128).to(device)
    qkv = [x.detach() for x in inputs(device, 1, 300, 300, 2, 64, torch.float16)]
    expected = attend(qkv, layout)[0]
    torch.cuda.synchronize()
    other = layout_of([[FULL] * 3] * 3, tokens_q=300, tokens_kv=300, block_q=128, block_kv=128)
    other = other.to(device)
    graph = torch.cuda.CUDAGraph()
    static = [torch.zeros_like(x) for x in qkv]
    with torch.cuda.graph(graph):
        out = attend(static, layout)[0]
        out_of_new_plan = attend(static, other)[0]
    for a, b in zip(static, qkv, strict=True):
        a.copy_(b)
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(out_of_new_plan, attend(qkv, other)[0])


@pytest.mark.gpu
def test_never_waits_for_the_device(device: str) -> None:
    layout = random_layout(300, 300, 128, 128).to(device)
    qkv = inputs(device, 1, 300, 300, 2, 64, torch.float16)
    attend(qkv, replace(layout, full_index=layout.full_index.clone()))[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(qkv, layout)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_plans_need_no_values() -> None:
    """Tensors without values stand for those of a GPU: looking at one would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = tensors(random_layout(70, 90, 16, 16))
    with FakeTensorMode() as mode:
        fake = tuple(mode.from_tensor(x) for x in layout)
        rows = walk.walk_rows(fake, 90, 16)
        assert rows.order.shape == (1, 5)
        assert rows.full_index.shape == fake[1].shape
        assert walk.transpose(fake, 6).order.shape == (1, 6)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_transposed_lists_are_the_layout_by_columns(batch: int, heads: int) -> None:
    layouts = [random_layout(70, 90, 16, 16) for _ in range(batch * heads)]
    stacked = stack_layouts(layouts, batch, heads)
    columns = walk.transpose(stacked, 6)
    full_count, full_index, partial_count, partial_index, partial_mask, _ = (
        x.flatten(0, 1) if x.ndim > 2 else x for x in stacked
    )
    for i in range(batch * heads):
        full, partial = ({j: [] for j in range(6)} for _ in range(2))
        for row in range(5):
            for j in full_index[i, row, : full_count[i, row]].tolist():
                full[j].append(row)
            entries = zip(
                partial_index[i, row].tolist(), partial_mask[i, row].tolist(), strict=True
            )
            for j, mask in list(entries)[: partial_count[i, row]]:
                partial[j].append((row, mask))
        for j in range(6):
            start, stop = columns.full_start[i, j : j + 2].tolist()
            assert columns.full_row[i, start:stop].tolist() == full[j]
            start, stop = columns.partial_start[i, j : j + 2].tolist()
            found = zip(columns.partial_row[i, start:stop].tolist(),
                        columns.partial_mask[i, start:stop].tolist(), strict=True)  # fmt: skip
            assert list(found) == partial[j]
        lengths = [len(full[j]) + len(partial[j]) for j in columns.order[i].tolist()]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(columns.order[i].tolist()) == list(range(6))


def test_long_rows_first() -> None:
    layout = layout_of(
        [[FULL, EMPTY, EMPTY], [PARTIAL, FULL, FULL], [EMPTY] * 3, [EMPTY, FULL, EMPTY]],
        tokens_q=64, tokens_kv=48, block_q=16, block_kv=16,
    )  # fmt: skip
    assert walk.walk_rows(tensors(layout), 48, 16).order.tolist() == [[1, 0, 3, 2]]


def test_a_short_block_goes_to_the_end_of_its_list() -> None:
    layout = tensors(random_layout(70, 90, 16, 16, partial=False))
    shuffled = layout[1].clone()
    for row, count in zip(shuffled[0, 0], layout[0][0, 0].tolist(), strict=True):
        row[:count] = row[:count].flip(0)
    full_index = walk.walk_rows((layout[0], shuffled, *layout[2:]), 90, 16).full_index
    assert full_index is not None
    for row, before, count in zip(
        full_index[0, 0], layout[1][0, 0], layout[0][0, 0].tolist(), strict=True
    ):
        assert sorted(row[:count].tolist()) == before[:count].tolist()
        assert 5 not in row[: max(count - 1, 0)].tolist()
    assert walk.walk_rows(layout, 96, 16).full_index is None, "no block is short"


def test_plans_are_made_once_and_die_with_the_layout(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    made = []
    for name in ("walk_rows", "transpose"):
        make = getattr(walk, name)
        monkeypatch.setattr(walk, name, lambda *a, m=make, n=name: made.append(n) or m(*a))
    layout = random_layout(40, 40, 16, 16).to(device)
    qkv = inputs(device, 1, 40, 40, 1, 16)
    for _ in range(3):
        attend(qkv, layout)[0].sum().backward()
    assert made == ["walk_rows", "transpose"]
    plans = len(walk._rows), len(walk._transposes)
    dead = weakref.ref(layout.full_index)
    del layout
    gc.collect()
    assert dead() is None
    assert (len(walk._rows), len(walk._transposes)) == (plans[0] - 1, plans[1] - 1)


def test_plans_follow_changes(device: str) -> None:
    layout = layout_of([[FULL, EMPTY, EMPTY]] * 3, tokens_q=48, tokens_kv=48, block_q=16,
                       block_kv=16).to(device)  # fmt: skip
    qkv = inputs(device, 1, 48, 48, 1, 16)
    check(qkv, layout)
    layout.full_index.fill_(2)  # in place: the identity stays
    check(qkv, layout)


@pytest.mark.gpu
def test_compiles_with_inductor_and_cuda_graphs(device: str) -> None:
    torch._dynamo.reset()
    layout = random_layout(300, 300, 128, 128).to(device)
    qkv = inputs(device, 1, 300, 300, 2, 64, torch.bfloat16)

    def function(*qkv: torch.Tensor) -> torch.Tensor:
        return attend([x * 2 for x in qkv], layout)[0] + 1

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    expected = function(*qkv)
    wanted = torch.autograd.grad(expected.sum(), qkv)
    for _ in range(3):
        got = compiled(*qkv)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), qkv), wanted)


def _bad(device: str, **changes: object) -> dict[str, object]:
    """Good arguments for two samples of 40 query and 50 key tokens and three heads, changed."""
    layout = layout_of([[FULL, PARTIAL, FULL, PARTIAL]] * 3, tokens_q=40, tokens_kv=50,
                       block_q=16, block_kv=16).to(device)  # fmt: skip
    qkv = [x.detach() for x in inputs(device, 2, 40, 50, 3, 8)]
    changes = {k: x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
               for k, x in changes.items()}  # fmt: skip
    index = [changes.pop(name, getattr(layout, name)) for name in LAYOUT_FIELDS]
    return {**dict(zip("qkv", qkv, strict=True)), "layout": index, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({x: torch.randn(2, 40, 3, 8).double() for x in "qkv"}, "bfloat16; got torch.float64"),
        ({"q": torch.randn(2, 60, 3, 8)}, "has 3 rows, but 60 query tokens in blocks of 16 make 4"),
        ({"v": torch.randn(2, 50, 3, 8, device="meta")}, "v is on meta, but q on "),
        ({"full_count": torch.zeros(2, 2, 3, dtype=torch.int32)}, "for 2 samples and 3 heads"),
        ({"full_count": torch.zeros(1, 1, 3)}, "full_count must be torch.int32 .* got .*float32"),
        ({"bit_masks": torch.zeros(1, 16, 1, dtype=torch.int32, device="meta")}, "int32 on meta"),
        ({"full_index": torch.zeros(1, 1, 4, 1, dtype=torch.int32)}, "full_index must have shape"),
        ({"bit_masks": torch.zeros(1, 16, 2, dtype=torch.int32)}, r"bit_masks .* \(-1, 16, 1\)"),
        ({"block_kv": 48}, "block_kv must be one of 16, 32, 64, 128, 256 .*; got 48"),
        ({"block_q": 8}, "block_q must be one of 16, 32, 64, 128, 256 .*; got 8"),
        ({x: torch.randn(2, 40, 3, 257) for x in "qkv"}, "head_dim may be 1 to 256; got 257"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_bad_layouts_are_named(changes: dict[str, object], message: str, device: str) -> None:
    arguments: dict[str, Any] = {"block_q": 16, "block_kv": 16, **_bad(device, **changes)}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grad_out", torch.zeros(2, 39, 3, 8), r"grad_out .* \(2, 40, 3, 8\).* got .*39, 3, 8\)"),
        ("grad_out", torch.zeros(2, 40, 3, 8).half(), "grad_out .* torch.float32.* got .*float16"),
        ("out", torch.zeros(2, 40, 3, 4), r"out must .* \(2, 40, 3, 8\).* got .*3, 4\)"),
        ("lse", torch.zeros(2, 3, 50), r"lse must .* \(2, 3, 40\).* got .*50\)"),
    ],
)
def test_bad_gradients_are_named(name: str, value: torch.Tensor, message: str, device: str) -> None:
    arguments = _bad(device)
    q = arguments["q"]
    assert isinstance(q, torch.Tensor)
    arguments |= {"grad_out": q, "out": q, "lse": q.new_zeros(2, 3, 40), name: value.to(device)}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention_gradients(**arguments, block_q=16, block_kv=16)  # type: ignore[arg-type]
