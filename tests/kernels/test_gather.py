"""Attention to selected blocks in Triton, on a GPU or else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import assert_matches_eager, inputs
from selections import packed, random_selection, starts_of, token_mask

from diffattn.kernels.common.launch import is_hopper
from diffattn.kernels.common.tile_tables import Choice, TileConfig
from diffattn.kernels.gather import forward, launch, selected_attention, selecting
from diffattn.kernels.gather.configs import GLUON_TILES
from diffattn.kernels.gather.launch import SelectionProblem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

Results = tuple[torch.Tensor, torch.Tensor]


def attend(
    qkv: list[torch.Tensor], lengths: list[int], selected: torch.Tensor, **options: Any
) -> Results:
    device = qkv[0].device
    starts, bits = starts_of(lengths).to(device), packed(selected).to(device)
    return selected_attention(*qkv, starts, bits, **options)


def check(
    qkv: list[torch.Tensor], lengths: list[int], selected: torch.Tensor, **options: Any
) -> Results:
    """Compare the results and all gradients with float64 attention under the selection's mask."""
    out, lse = attend(qkv, lengths, selected, **options)
    mask = token_mask(selected, lengths).to(qkv[0].device)
    assert_matches_eager(out, lse, *qkv, mask, backward=True, **options)
    return out, lse


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, chunks and groups of queries, as for long sequences."""
    tile = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(forward, "_PROGRAMS", 3)
    monkeypatch.setattr(launch, "tile_config", lambda *_, **__: tile)
    monkeypatch.setattr(launch, "_MOST_QUERIES", 32)
    monkeypatch.setattr(launch, "_MANY_PROGRAMS", 0)
    monkeypatch.setattr(selecting, "CHUNK", 16)


@dtypes
def test_equals_dense_attention_under_the_mask(dtype: torch.dtype, device: str) -> None:
    qkv = inputs(device, 2, 47, 47, 2, 16, dtype)
    check(qkv, [1, 37, 9], random_selection(2, 2, 47, 3, share=0.6))


@pytest.mark.parametrize(
    ("batch", "tokens", "lengths"),
    [
        pytest.param(3, 31, [31], id="one-block"),
        pytest.param(1, 1, [1], id="one-token"),
        pytest.param(1, 33, [0, 16, 0, 17, 0], id="empty-blocks"),
    ],
)
def test_forms_of_blocks(batch: int, tokens: int, lengths: list[int], device: str) -> None:
    qkv = inputs(device, batch, tokens, tokens, 1, 16)
    check(qkv, lengths, random_selection(batch, 1, tokens, len(lengths), share=0.6))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("tokens", "lengths", "dtype"),
    [(83, [7, 33, 43], torch.float32), (83, [83], torch.bfloat16), (65, [64, 1], torch.float16)],
    ids=["ragged", "one-block", "one-over"],
)
def test_several_tiles_and_groups(
    tokens: int, lengths: list[int], dtype: torch.dtype, device: str
) -> None:
    qkv = inputs(device, 1, tokens, tokens, 2, 16, dtype)
    selected = random_selection(1, 2, tokens, len(lengths))
    selected[:, 0, :, 0] = True  # a list longer than two groups
    selected[:, 1, :40] = False  # a group of queries that select nothing
    check(qkv, lengths, selected)


def test_several_words_and_bits_beyond_the_last_block(device: str) -> None:
    lengths = [1] * 36
    qkv = inputs(device, 1, 36, 36, 1, 16)
    selected = random_selection(1, 1, 36, 36, share=0.1)
    selected[..., [0, *range(2, 29)]] = False  # to be quick
    selected[..., 31] = True  # the sign
    out, lse = check(qkv, lengths, selected)
    bits = packed(selected)
    bits[..., 1] |= -1 << 4
    found = selected_attention(*qkv, starts_of(lengths).to(device), bits.to(device))
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], lse)


@pytest.mark.parametrize("head_dim", [1, 24, 80, 128, 256])
def test_head_dims(head_dim: int, device: str) -> None:
    dtype = torch.bfloat16 if head_dim > 64 else torch.float32
    qkv = inputs(device, 1, 20, 20, 1, head_dim, dtype)
    check(qkv, [13, 7], random_selection(1, 1, 20, 2))


def test_more_keys_than_queries(device: str) -> None:
    qkv = inputs(device, 2, 19, 70, 2, 16)
    check(qkv, [40, 30], random_selection(2, 2, 19, 2))


def test_queries_that_select_everything(device: str) -> None:
    qkv = inputs(device, 2, 40, 40, 2, 16)
    out, lse = attend(qkv, [13, 27], torch.ones(2, 2, 40, 2, dtype=torch.bool))
    assert_matches_eager(out, lse, *qkv, None, backward=True)


def test_bits_of_any_strides(device: str) -> None:
    qkv = inputs(device, 2, 40, 40, 3, 16)
    selected = random_selection(1, 40, 3, 2)
    bits = packed(selected).to(device).transpose(1, 2).expand(2, 3, 40, 1)
    out, lse = selected_attention(*qkv, starts_of([11, 29]).to(device), bits)
    mask = token_mask(selected.transpose(1, 2).expand(2, 3, 40, 2), [11, 29]).to(device)
    assert_matches_eager(out, lse, *qkv, mask, backward=True)


@pytest.mark.usefixtures("small_tiles")
def test_heads_longer_than_32_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MAX_OFFSET", 1)
    qkv = inputs(device, 2, 40, 40, 1, 16)
    key_mask = torch.rand(2, 40, device=device) < 0.7
    check(qkv, [7, 33], random_selection(2, 1, 40, 2), key_mask=key_mask)


@pytest.mark.parametrize(
    ("stride", "wide"), [((0, 2**26, 16, 1), True), ((0, 2**25, 16, 1), False),
                         ((2**40, 48, 2**40, 1), False), ((0, 48, 16, 2**28), True)],
)  # fmt: skip
def test_only_heads_need_64_bit_offsets(stride: tuple[int, ...], wide: bool) -> None:
    """Where a head begins is always computed in 64 bits."""
    x = torch.empty_strided((2, 40, 3, 16), stride, device="meta")
    assert SelectionProblem.of(x, x, x, starts_of([40]), None).wide == wide


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_memory_beyond_32_bits(dim: int, device: str) -> None:
    """The last element of q, k and v is more than 2**31 elements behind the first."""
    shape = [2, 40, 2, 16]
    stride = [1280, 32, 16, 1]
    stride[dim] = 2**31 // (shape[dim] - 1) + 16
    storage = torch.empty(2**31 + 2**17, dtype=torch.float16, device=device)
    x = storage.as_strided(shape, stride).copy_(torch.randn(shape))
    qkv = [x.detach().requires_grad_() for _ in range(3)]
    check(qkv, [7, 33], random_selection(2, 2, 40, 2))


@settings(
    max_examples=8, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_any_selection(data: st.DataObject, device: str, small_tiles: None) -> None:
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any))
    batch, heads, head_dim = (data.draw(st.integers(1, n)) for n in (2, 2, 20))
    tokens_q = data.draw(st.integers(1, 35))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    share = data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    selected = random_selection(batch, heads, tokens_q, len(lengths), share=share)
    key_mask = None
    if data.draw(st.booleans()):
        key_mask = torch.rand(batch, sum(lengths), device=device) < 0.8
    dtype = data.draw(st.sampled_from(DTYPES))
    qkv = inputs(device, batch, tokens_q, sum(lengths), heads, head_dim, dtype)
    check(qkv, lengths, selected, key_mask=key_mask)


@pytest.mark.usefixtures("small_tiles")
def test_the_same_bits_every_time_and_in_any_number_of_turns(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = inputs(device, 3, 40, 40, 1, 16, torch.float16)
    selected = random_selection(3, 1, 40, 2)
    runs = []
    for scratch in (2**30, 2**30, 10000, 1):
        monkeypatch.setattr(selecting, "_SCRATCH_BYTES", scratch)
        out, lse = attend(qkv, [17, 23], selected)
        runs.append((out, lse, *torch.autograd.grad(out.float().square().sum(), qkv)))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


@given(pairs=st.integers(1, 50), each=st.integers(1, 2**31))
def test_turns_cover_all_heads_within_the_scratch_memory(pairs: int, each: int) -> None:
    turns = list(selecting.turns(pairs, each))
    assert [i for first, count in turns for i in range(first, first + count)] == [*range(pairs)]
    counts = [count for _, count in turns]
    assert max(counts) - min(counts) <= 1
    assert max(counts) == 1 or max(counts) * each <= selecting._SCRATCH_BYTES
    at_once = max(1, selecting._SCRATCH_BYTES // each)
    assert len(turns) == -(-pairs // at_once)


@pytest.mark.parametrize("scratch", [2**30, 2**20, 1])
def test_turns_of_the_forward_cover_all_queries(
    scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "_SCRATCH_BYTES", scratch)
    q = torch.empty(2, 1000, 3, 16, device="meta", dtype=torch.float16)
    problem = SelectionProblem.of(q, q, q, starts_of([500, 500]), None)
    turns = list(forward.turns_of(problem))
    assert [
        (pair, query)
        for turn in turns
        for pair in range(turn.first_pair, turn.first_pair + turn.pairs)
        for query in range(turn.queries.start, turn.queries.stop)
    ] == [(pair, query) for pair in range(6) for query in range(1000)]
    each = 2 * (16 * 2 + 12) + 4
    for turn in turns:
        queries = turn.queries.stop - turn.queries.start
        assert turn.pairs * queries * each <= scratch or (turn.pairs == 1 and queries <= 256)


def test_lists_are_the_selection_by_blocks(device: str) -> None:
    selected = random_selection(2, 3, 70, 34)
    lists = selecting.selecting_queries(
        packed(selected).to(device), 34, first_pair=2, pairs=2, chunk=32
    )
    assert lists.first.shape == (2, 34, 4)
    by_pair = selected.flatten(0, 1)[2:4]
    for pair in range(2):
        for block in range(34):
            expected = by_pair[pair, :, block].nonzero().flatten()
            first = lists.first[pair, block].tolist()
            assert first == [int((expected < n).sum()) for n in (0, 32, 64, 96)]
            assert lists.query[pair, block, : first[-1]].tolist() == expected.tolist()
            earlier = by_pair[pair, expected, :block].sum(1)
            assert torch.equal(lists.earlier[pair, block, : first[-1]].cpu(), earlier.int())
        assert torch.equal(lists.selected[pair].cpu(), by_pair[pair].sum(1).int())


def test_query_tiles_cut_every_list(device: str) -> None:
    count = torch.tensor([[0, 33, 16], [1, 0, 70]], dtype=torch.int32, device=device)
    first = torch.stack([torch.zeros_like(count), count], -1)
    query = torch.empty(2, 3, 70, device=device)
    tiles = selecting.query_tiles(selecting.Lists(first, query, query, query), 16)
    assert tiles.stop.tolist() == [0, 3, 4, 5, 5, 10]
    assert tiles.list.tolist() == [1, 1, 1, 2, 3, 5, 5, 5, 5, 5, *[6] * 20]


@given(data=st.data())
def test_key_tiles_cut_every_block(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any))
    size = data.draw(st.sampled_from([16, 32]))
    counts = [data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
              for _ in range(2)]  # fmt: skip
    first = torch.tensor(counts, dtype=torch.int32)[..., None].expand(-1, -1, 3)
    lists = selecting.Lists(first, *torch.empty(3, 0))
    tiles = selecting.key_tiles(starts_of(lengths), sum(lengths), size, lists)
    found = [
        (block, start)
        for block, start in zip(tiles.block.tolist(), tiles.start.tolist(), strict=True)
        if block < len(lengths)
    ]
    starts = starts_of(lengths).tolist()
    assert found == [
        (c, t) for c, n in enumerate(lengths) for t in range(starts[c], starts[c] + n, size)
    ]
    for order, count in zip(tiles.order.tolist(), counts, strict=True):
        assert sorted(order) == [*range(len(tiles.block))]
        blocks = [tiles.block[i].item() for i in order]
        lengths_of_lists = [count[c] if c < len(lengths) else -1 for c in blocks]
        assert lengths_of_lists == sorted(lengths_of_lists, reverse=True)


def test_plans_need_no_values() -> None:
    """Tensors without values stand for those of a GPU: looking at one would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        starts = mode.from_tensor(starts_of([10, 50, 20]))
        first = mode.from_tensor(torch.zeros(4, 3, 2, dtype=torch.int32))
        tiles = selecting.key_tiles(starts, 80, 32, selecting.Lists(*[first] * 4))
        assert tiles.order.shape == (4, 5)


# Block lengths of the published settings, and a text of seven tokens.
GPU_LENGTHS = [7, 455, 1365, 64, 1, 768, 129]


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_shipped_tiles(head_dim: int, dtype: torch.dtype, masked: bool, device: str) -> None:
    tokens = sum(GPU_LENGTHS)
    qkv = inputs(device, 1, tokens, tokens, 2, head_dim, dtype)
    selected = random_selection(1, 2, tokens, len(GPU_LENGTHS), share=0.3)
    selected[..., 0] = True
    selected[:, :, :7] = True
    key_mask = torch.rand(1, tokens, device=device) < 0.9 if masked else None
    check(qkv, GPU_LENGTHS, selected, key_mask=key_mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [64, 128])
def test_the_gluon_form(keys: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    if not is_hopper(torch.device(device)):
        pytest.skip("the Gluon form is for Hopper GPUs")
    lengths = [*GPU_LENGTHS, 0, 385]
    tokens = sum(lengths)
    q, k, v = inputs(device, 1, tokens, tokens, 3, head_dim, dtype)
    selected = random_selection(1, 3, tokens, len(lengths), share=0.3)
    selected[:, :, 5:9] = False
    bits, starts = packed(selected).to(device), starts_of(lengths).to(device)
    choice = Choice("gluon", replace(GLUON_TILES, block_n=keys))
    out, lse = forward.forward(
        q.detach(), k.detach(), v.detach(), starts, bits, None, scale=0.1, choice=choice
    )
    mask = token_mask(selected, lengths).to(device)
    assert_matches_eager(out, lse, q, k, v, mask, scale=0.1)


@pytest.mark.gpu
def test_the_same_bits_every_time_on_a_busy_gpu(device: str) -> None:
    """Running sums pass from thread to thread through memory: a race would change some bit."""
    tokens = sum(GPU_LENGTHS)
    qkv = inputs(device, 2, tokens, tokens, 8, 128, torch.bfloat16)
    selected = random_selection(2, 8, tokens, len(GPU_LENGTHS))
    runs = []
    for _ in range(20):
        out, lse = attend(qkv, GPU_LENGTHS, selected)
        runs.append((out, lse, *torch.autograd.grad(out.float().square().sum(), qkv)))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph(device: str) -> None:
    qkv = [x.detach() for x in inputs(device, 1, 300, 300, 2, 64, torch.float16)]
    selected = random_selection(1, 2, 300, 3)
    starts, bits = starts_of([100, 7, 193]).to(device), packed(selected).to(device)
    expected = selected_attention(*qkv, starts, bits)[0]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    static = [torch.zeros_like(x) for x in qkv]
    with torch.cuda.graph(graph):
        out = selected_attention(*static, starts, bits)[0]
    for a, b in zip(static, qkv, strict=True):
        a.copy_(b)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_never_waits_for_the_device(device: str) -> None:
    qkv = inputs(device, 1, 300, 300, 2, 64, torch.float16)
    starts = starts_of([100, 7, 193]).to(device)
    bits = packed(random_selection(1, 2, 300, 3)).to(device)
    selected_attention(*qkv, starts, bits)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        selected_attention(*qkv, starts, bits)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_compiles_with_inductor_and_cuda_graphs(device: str) -> None:
    torch._dynamo.reset()
    qkv = inputs(device, 1, 300, 300, 2, 64, torch.bfloat16)
    starts = starts_of([100, 7, 193]).to(device)
    bits = packed(random_selection(1, 2, 300, 3)).to(device)

    def function(*qkv: torch.Tensor) -> torch.Tensor:
        return selected_attention(*(x * 2 for x in qkv), starts, bits)[0] + 1

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    expected = function(*qkv)
    wanted = torch.autograd.grad(expected.sum(), qkv)
    for _ in range(3):
        got = compiled(*qkv)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), qkv), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({x: torch.randn(2, 50, 3, 8).double() for x in "qkv"}, "bfloat16; got torch.float64"),
        ({"v": torch.randn(2, 50, 3, 8, device="meta")}, "v is on meta, but q on "),
        ({x: torch.randn(2, 50, 3, 257) for x in "qkv"}, "head_dim may be 1 to 256; got 257"),
        ({"starts": torch.tensor([0, 50])}, "starts must be torch.int32 on .*; got torch.int64"),
        ({"starts": torch.zeros(1, dtype=torch.int32)}, r"at least one key block; got shape \(1,"),
        ({"starts": torch.zeros(2, 2, dtype=torch.int32)}, r"\(blocks \+ 1,\) .* got .*\(2, 2\)"),
        ({"bits": torch.zeros(2, 3, 50, 1)}, "bits must be torch.int32 on .*; got torch.float32"),
        ({"bits": torch.zeros(2, 3, 50, 1, dtype=torch.int32, device="meta")}, "got .* on meta"),
        ({"bits": torch.zeros(2, 3, 49, 1, dtype=torch.int32)},
         r"\(2, 3, 50, 1\) for q \(2, 50, 3, 8\) and the 2 key blocks of starts; got .*49, 1\)"),
        ({"bits": torch.zeros(2, 3, 50, 2, dtype=torch.int32)}, r"\(2, 3, 50, 1\).*3, 50, 2\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)  # fmt: skip
def test_bad_selections_are_named(
    changes: dict[str, torch.Tensor], message: str, device: str
) -> None:
    arguments = {x: torch.randn(2, 50, 3, 8) for x in "qkv"}
    arguments |= {"starts": starts_of([20, 30]), "bits": torch.zeros(2, 3, 50, 1).int(), **changes}
    arguments = {k: x if x.device.type == "meta" else x.to(device) for k, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        selected_attention(**arguments)
