"""Attention to selected blocks on the CPU: exact, and no work for what nobody selected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_matches_eager

from diffattn.kernels.cpu import gather as gather_cpu
from diffattn.kernels.cpu import row_attention
from diffattn.kernels.cpu.gather import selected_attention

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def inputs(
    batch: int,
    tokens_q: int,
    tokens_kv: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    return [
        torch.randn(batch, tokens, heads, head_dim).to(dtype).requires_grad_()
        for tokens in (tokens_q, tokens_kv, tokens_kv)
    ]


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def packed(selected: torch.Tensor) -> torch.Tensor:
    """Bits of `(batch, heads, tokens, blocks)`: int32, a word for 32 blocks."""
    words = torch.zeros(*selected.shape[:3], -(-selected.shape[3] // 32), dtype=torch.int64)
    for c in range(selected.shape[3]):
        words[..., c // 32] += selected[..., c].long() << (c % 32)
    return words.to(torch.int32)  # wraps: bit 31 is the sign


def token_mask(selected: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Bool `(batch, heads, tokens, keys)`: block by block, as the definition has it."""
    parts = [selected[..., c : c + 1].expand(-1, -1, -1, n) for c, n in enumerate(lengths)]
    return torch.cat(parts, -1)


def check(
    qkv: list[torch.Tensor], lengths: list[int], selected: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the results and all gradients with float64 attention under the selection's mask."""
    out, lse = selected_attention(*qkv, starts_of(lengths), packed(selected), **options)
    mask = token_mask(selected, lengths)
    assert_matches_eager(out, lse, *qkv, mask, backward=True, **options)
    return out, lse


@pytest.fixture(params=["flash", "matmul"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the arithmetic, whatever this CPU would choose."""
    rows = {"flash": row_attention.FlashRows, "matmul": row_attention.MatmulRows}[request.param]
    monkeypatch.setattr(gather_cpu, "pick_row_attention", lambda dtype: rows())
    return request.param


@dtypes
@pytest.mark.parametrize(
    ("tokens_q", "lengths"),
    [
        pytest.param(127, [1, 37, 20, 69], id="ragged"),
        pytest.param(65, [13] * 5, id="even"),
        pytest.param(31, [7], id="one-block"),
        pytest.param(50, [1] * 67, id="three-words"),
        pytest.param(1, [2, 3], id="one-query"),
    ],
)
def test_equals_dense_attention_under_the_mask(
    tokens_q: int, lengths: list[int], dtype: torch.dtype, form: str
) -> None:
    qkv = inputs(3, tokens_q, sum(lengths), 2, 20, dtype)
    check(qkv, lengths, torch.rand(3, 2, tokens_q, len(lengths)) < 0.4)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    tokens_q=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_selection(
    lengths: list[int], tokens_q: int, share: float, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    tokens = sum(lengths)
    selected = torch.rand(2, 2, tokens_q, len(lengths)) < share
    key_mask = torch.rand(2, tokens) < 0.5 if masked else None
    check(inputs(2, tokens_q, tokens, 2, 8), lengths, selected, key_mask=key_mask, scale=0.7)


@dtypes
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    lengths = [5, 6]
    selected = torch.ones(2, 2, 11, 2, dtype=torch.bool)
    selected[0, 1, 3] = False
    selected[1, :, 4] = torch.tensor([True, False])
    key_mask = torch.ones(2, 11, dtype=torch.bool)
    key_mask[1, :5] = False
    out, lse = check(inputs(2, 11, 11, 2, 8, dtype), lengths, selected, key_mask=key_mask)
    for sample, heads, row in ((0, [1], 3), (1, [0, 1], 4)):
        assert not out[sample, row, heads].any()
        assert (lse[sample, heads, row] == -torch.inf).all()
    assert lse.isfinite().sum() == lse.numel() - 3


def test_nan_in_hidden_keys_stays_there() -> None:
    lengths = [4, 9]
    q, k, v = (x.detach() for x in inputs(1, 13, 13, 2, 8))
    key_mask = torch.rand(1, 13) < 0.7
    key_mask[0, 2] = False
    selected = torch.ones(1, 2, 13, 2, dtype=torch.bool)
    want, _ = selected_attention(q, k, v, starts_of(lengths), packed(selected), key_mask=key_mask)
    for x in (k, v):
        x[~key_mask] = torch.nan
    out, _ = selected_attention(q, k, v, starts_of(lengths), packed(selected), key_mask=key_mask)
    assert torch.equal(out, want)


def test_only_selected_pairs_are_computed(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    rows = row_attention.FlashRows if form == "flash" else row_attention.MatmulRows
    pairs = []
    compute = rows.forward

    def counted(self: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        pairs.append(q.shape[2] * k.shape[2])
        return compute(self, q, k, *rest)

    monkeypatch.setattr(rows, "forward", counted)
    monkeypatch.setattr(gather_cpu, "_SCORES_PER_PART", 100)
    lengths = [3, 17, 8]
    selected = torch.rand(2, 2, 28, 3) < 0.3
    selected[..., 1] = True
    check(inputs(2, 28, 28, 2, 8), lengths, selected)
    assert sum(pairs) == token_mask(selected, lengths).sum()
    if form == "matmul":
        assert max(pairs) <= 100


def test_boundaries_may_change_in_place() -> None:
    # The public code remembers blocks by the tensor they came in, whatever it holds later.
    starts = starts_of([4, 8])
    selected = torch.tensor([True, False]).expand(1, 1, 12, 2)
    qkv = inputs(1, 12, 12, 1, 8)
    first, _ = selected_attention(*qkv, starts, packed(selected))
    starts[1] = 9
    out, lse = selected_attention(*qkv, starts, packed(selected))
    assert_matches_eager(out, lse, *qkv, token_mask(selected, [9, 3]))
    assert not torch.allclose(out, first)


def test_gradient_of_one_of_the_results() -> None:
    lengths = [5, 7]
    qkv = inputs(1, 12, 12, 2, 8)
    bits = packed(torch.rand(1, 2, 12, 2) < 0.9)
    for which in (0, 1):
        result = selected_attention(*qkv, starts_of(lengths), bits)[which]
        found = torch.autograd.grad(torch.where(result.isfinite(), result, 0).sum(), qkv)
        assert all(x.isfinite().all() for x in found)
        # Scores do not depend on the values.
        assert found[2].any() == (which == 0)


def test_any_strides() -> None:
    lengths = [6, 5]
    selected = torch.rand(2, 3, 11, 2) < 0.6
    base = [torch.randn(2, 3, 8, 11).permute(0, 3, 1, 2) for _ in range(3)]
    want = selected_attention(*base, starts_of(lengths), packed(selected))
    got = selected_attention(*(x.contiguous() for x in base), starts_of(lengths), packed(selected))
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    key_mask = torch.rand(2, 12) < 0.8 if masked else None
    bits = packed(torch.rand(2, 2, 12, 3) < 0.6)
    torch.library.opcheck(
        torch.ops.diffattn.selected_cpu.default,
        (*inputs(2, 12, 12, 2, 8), [starts_of([3, 4, 5]), bits], key_mask, 0.3),
    )


def _bad(**changes: object) -> dict[str, Any]:
    """Good arguments for two samples of 10 tokens in two blocks and three heads, changed."""
    good = {name: torch.randn(2, 10, 3, 8) for name in "qkv"}
    bits = torch.full((2, 3, 10, 1), 3, dtype=torch.int32)
    return {**good, "starts": starts_of([4, 6]), "bits": bits, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 10, 3, 8).half()}, r"share one dtype of .*torch.float16"),
        ({"k": torch.randn(2, 10, 1, 8)}, "have the batch, heads and head_dim of q"),
        ({"q": torch.randn(2, 10, 24)}, r"\(batch, tokens, heads, head_dim\); got \(2, 10, 24\)"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, r"tokens_kv\) = \(2, 10\); got .*9"),
        ({"starts": starts_of([4, 6]).long()}, r"starts must be torch.int32 .* got torch.int64"),
        ({"starts": starts_of([])}, r"starts must be torch.int32 \(blocks \+ 1,\); got .* \(1,\)"),
        ({"starts": starts_of([4, 7])}, r"ascend from 0 to the 10 keys; got 0 \.\. 11"),
        ({"starts": starts_of([7, -3, 6])}, r"ascend from 0 .* got 0 \.\. 10, unsorted"),
        ({"bits": torch.zeros(2, 3, 9, 1, dtype=torch.int32)}, r"= \(2, 3, 10, 1\) for 2 blocks"),
        ({"bits": torch.zeros(2, 3, 10, 1)}, "bits must be torch.int32 .* got torch.float32"),
        ({"v": torch.randn(2, 10, 3, 8, device="meta")}, "CPU path, but v is on meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selected_attention(**_bad(**changes))
