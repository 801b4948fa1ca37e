"""Attention to selected blocks on the CPU: exact, and no work for what nobody selected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_matches_eager, inputs
from selections import packed, starts_of, token_mask

from diffattn.kernels.cpu import gather as gather_cpu
from diffattn.kernels.cpu import row_attention
from diffattn.kernels.cpu.gather import selected_attention

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


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
    qkv = inputs("cpu", 3, tokens_q, sum(lengths), 2, 20, dtype)
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
    check(inputs("cpu", 2, tokens_q, tokens, 2, 8), lengths, selected, key_mask=key_mask, scale=0.7)


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
    check(inputs("cpu", 2, 28, 28, 2, 8), lengths, selected)
    assert sum(pairs) == token_mask(selected, lengths).sum()
    if form == "matmul":
        assert max(pairs) <= 100


def test_boundaries_may_change_in_place() -> None:
    # The public code remembers blocks by the tensor they came in, whatever it holds later.
    starts = starts_of([4, 8])
    selected = torch.tensor([True, False]).expand(1, 1, 12, 2)
    qkv = inputs("cpu", 1, 12, 12, 1, 8)
    first, _ = selected_attention(*qkv, starts, packed(selected))
    starts[1] = 9
    out, lse = selected_attention(*qkv, starts, packed(selected))
    assert_matches_eager(out, lse, *qkv, token_mask(selected, [9, 3]))
    assert not torch.allclose(out, first)


def _bad(**changes: object) -> dict[str, Any]:
    """Good arguments for two samples of 10 tokens in two blocks and three heads, changed."""
    good = {name: torch.randn(2, 10, 3, 8) for name in "qkv"}
    bits = torch.full((2, 3, 10, 1), 3, dtype=torch.int32)
    return {**good, "starts": starts_of([4, 6]), "bits": bits, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
def test_bad_selections_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selected_attention(**_bad(**changes))
