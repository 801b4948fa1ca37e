"""What every sparse attention promises, whichever way it is told what to see, wherever it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import assert_matches_eager, inputs, layout_of_mask, stack_layouts
from selections import packed, starts_of, token_mask

from diffattn.kernels import block_sparse, gather
from diffattn.kernels.common.tile_tables import TileConfig
from diffattn.kernels.cpu import block_sparse as cpu
from diffattn.kernels.cpu import gather as gather_cpu
from diffattn.kernels.cpu import row_attention, row_plan
from diffattn.kernels.reference import reference_attention

Results = tuple[torch.Tensor, torch.Tensor]

# Key blocks of these lengths, in layouts of 16 x 16: a whole block, one of two parts, a ragged end.
LENGTHS = [16, 7, 9, 11]
TOKENS = sum(LENGTHS)
BLOCK = 16


@dataclass(frozen=True)
class Operator:
    """A sparse attention, called by the key blocks of `LENGTHS` that each query selects.

    Attributes:
        function: the operator.
        device: where its tensors live.
        is_gather: it takes the selection itself; otherwise the layout of the selection's mask.
        widest: the widest dtype that it takes.
    """

    function: Callable[..., Results]
    device: str
    is_gather: bool
    widest: torch.dtype

    @property
    def tolerance(self) -> dict[str, float]:
        """How far results of the widest dtype may be from float64."""
        return {"atol": 1e-5, "rtol": 1e-5} if self.widest == torch.float32 else {}

    def pattern(self, selected: torch.Tensor, lengths: list[int] = LENGTHS) -> dict[str, Any]:
        """What says which keys a query sees, as arguments.

        `selected` is bool `(batch, heads, queries, blocks)`.
        """
        if self.is_gather:
            arguments: dict[str, Any] = {"starts": starts_of(lengths), "bits": packed(selected)}
            return {name: x.to(self.device) for name, x in arguments.items()}
        masks = token_mask(selected, lengths)
        layouts = [layout_of_mask(mask, BLOCK) for mask in masks.flatten(0, 1)]
        layout = [x.to(self.device) for x in stack_layouts(layouts, *masks.shape[:2])]
        return {"layout": layout, "block_q": BLOCK, "block_kv": BLOCK}

    def attend(
        self,
        qkv: list[torch.Tensor],
        selected: torch.Tensor,
        lengths: list[int] = LENGTHS,
        **options: Any,
    ) -> Results:
        return self.function(*qkv, **self.pattern(selected, lengths), **options)

    def check(self, qkv: list[torch.Tensor], selected: torch.Tensor, **options: Any) -> Results:
        """Compare results and all gradients with float64 attention under the selection's mask."""
        out, lse = self.attend(qkv, selected, **options)
        mask = token_mask(selected, LENGTHS).to(self.device)
        assert_matches_eager(out, lse, *qkv, mask, backward=True, **options)
        return out, lse


# Operators by name and form, and the dtypes that each is tried in; the widest that it takes first.
# Triton's interpreter is slow: what the other form of a kernel shares is not tried in all.
LOW = [torch.float16, torch.bfloat16]
OPERATORS = {
    "cpu-flash": [torch.float64, torch.float32, *LOW],
    "cpu-matmul": [torch.float64, torch.float32, *LOW],
    "triton": [torch.float32, *LOW],
    "triton-ahead": [torch.float32],
    "gather": [torch.float32, *LOW],
    "gather_cpu-flash": [torch.float64, torch.float32, *LOW],
    "gather_cpu-matmul": [torch.float64, torch.float32, *LOW],
}
every_operator = pytest.mark.parametrize("operator", OPERATORS, indirect=True)
every_dtype = pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, dtypes in OPERATORS.items()
        for dtype in dtypes
    ],
    indirect=["operator"],
)


@pytest.fixture
def operator(
    request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch
) -> Operator:
    """An operator that cuts these few tokens as it cuts thousands."""
    name, _, form = request.param.partition("-")
    widest = OPERATORS[request.param][0]
    if name in ("cpu", "gather_cpu"):
        rows = {"flash": row_attention.FlashRows, "matmul": row_attention.MatmulRows}[form]
        for module in (cpu, gather_cpu):
            monkeypatch.setattr(module, "pick_row_attention", lambda dtype: rows())
        monkeypatch.setattr(row_plan, "_SHARED_KEYS", 16)
        monkeypatch.setattr(row_plan, "_KEYS_PER_TILE", 20)
        monkeypatch.setattr(row_plan, "_ROWS_COMPARED", 2)
        function = cpu.block_sparse_attention if name == "cpu" else gather_cpu.selected_attention
        return Operator(function, "cpu", name == "gather_cpu", widest)
    tile = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, ahead=form == "ahead")
    if name == "triton":
        # The shipped tiles, or else smaller ones that partial blocks cut in another way.
        if form:
            monkeypatch.setattr(block_sparse.launch, "tile_config", lambda *_, **__: tile)
        return Operator(block_sparse.block_sparse_attention, device, False, widest)
    monkeypatch.setattr(gather.launch, "tile_config", lambda *_, **__: tile)
    monkeypatch.setattr(gather.launch, "_MOST_QUERIES", 32)
    monkeypatch.setattr(gather.launch, "_MANY_PROGRAMS", 0)
    monkeypatch.setattr(gather.selecting, "CHUNK", 16)
    return Operator(gather.selected_attention, device, True, widest)


def random_pattern(batch: int = 2, heads: int = 1) -> torch.Tensor:
    """A selection by whose mask blocks of 16 x 16 tokens are empty, partial and full."""
    rows = -(-TOKENS // BLOCK)
    share = torch.randint(0, 3, (batch, heads, rows, len(LENGTHS))) / 2  # none, a half, all
    share = share.repeat_interleave(BLOCK, 2)[:, :, :TOKENS]
    return torch.rand(share.shape) < share


def make(operator: Operator, batch: int = 2, heads: int = 1, head_dim: int = 16,
         dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:  # fmt: skip
    return inputs(operator.device, batch, TOKENS, TOKENS, heads, head_dim, dtype)


# --- what is seen


@every_dtype
def test_rows_that_see_nothing(operator: Operator, dtype: torch.dtype) -> None:
    selected = random_pattern(1, 2)
    selected[:, :, 3:5] = False
    selected[:, :, BLOCK : 2 * BLOCK] = False
    selected[0, 1, 40] = False
    out, lse = operator.check(make(operator, 1, 2, dtype=dtype), selected)
    nothing = ~selected.any(-1).to(operator.device)
    assert (out.transpose(1, 2)[nothing] == 0).all()
    assert torch.equal(lse == -torch.inf, nothing)


@every_dtype
def test_key_mask(operator: Operator, dtype: torch.dtype) -> None:
    key_mask = torch.rand(3, TOKENS, device=operator.device) < 0.7
    key_mask[1] = False
    key_mask[2, :16] = False  # a block of which nothing is left
    selected = random_pattern(3)
    selected[2, :, 30] = torch.tensor([True, False, False, False])
    qkv = make(operator, 3, dtype=dtype)
    out, lse = operator.check(qkv, selected, key_mask=key_mask)
    for sample, query in ((1, slice(None)), (2, slice(30, 31))):
        assert (out[sample, query] == 0).all()
        assert (lse[sample, :, query] == -torch.inf).all()


@every_operator
def test_key_mask_that_hides_nothing(operator: Operator) -> None:
    qkv, selected = make(operator), random_pattern()
    key_mask = torch.ones(2, TOKENS, dtype=torch.bool, device=operator.device)
    operator.check(qkv, selected, key_mask=key_mask)


@every_dtype
def test_nan_in_hidden_keys_stays_there(operator: Operator, dtype: torch.dtype) -> None:
    qkv, selected = make(operator, dtype=dtype), random_pattern()
    key_mask = torch.ones(2, TOKENS, dtype=torch.bool, device=operator.device)
    key_mask[0, 20:] = False
    poisoned = [x.detach().clone() for x in qkv]
    poisoned[1][0, 20:] = torch.nan
    poisoned[2][0, 20:] = torch.inf
    poisoned = [x.requires_grad_() for x in poisoned]
    out, lse = operator.attend(poisoned, selected, key_mask=key_mask)
    mask = token_mask(selected, LENGTHS).to(operator.device)
    assert_matches_eager(out, lse, *qkv, mask, key_mask=key_mask)
    gradients = torch.autograd.grad(out.sum(), poisoned)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[1][0, 20:] == 0).all()


@every_dtype
def test_what_nobody_selects_is_not_read(operator: Operator, dtype: torch.dtype) -> None:
    selected = random_pattern(1, 2)
    selected[..., 1:3] = False
    clean = make(operator, 1, 2, dtype=dtype)
    poisoned = [x.detach().clone() for x in clean]
    for x in poisoned[1:]:
        x[:, 16:32] = torch.nan
    poisoned = [x.requires_grad_() for x in poisoned]
    results = []
    for qkv in (clean, poisoned):
        out, lse = operator.attend(qkv, selected)
        results.append((out, lse, *torch.autograd.grad(out.sum(), qkv)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (results[1][3][:, 16:32] == 0).all()


@every_operator
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_and_inf_that_are_visible_propagate(
    which: int, value: float, operator: Operator
) -> None:
    selected = torch.zeros(1, 1, TOKENS, len(LENGTHS), dtype=torch.bool)
    selected[:, :, :BLOCK, 0] = True
    selected[:, :, BLOCK:, 1:] = True
    clean = [x.detach() for x in make(operator, 1, 1)]
    qkv = [x.clone() for x in clean]
    qkv[which][0, 3, 0, 5] = value
    out, _ = operator.attend(qkv, selected)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x[:, :BLOCK].transpose(1, 2) for x in qkv)
    ).transpose(1, 2)
    assert not expected.isfinite().all()
    torch.testing.assert_close(out[:, :BLOCK], expected, equal_nan=True)
    assert torch.equal(out[:, BLOCK:], operator.attend(clean, selected)[0][:, BLOCK:])


# --- scores


@every_operator
@pytest.mark.parametrize("scale", [0.9, -0.4, 0.0])
def test_scale(scale: float, operator: Operator) -> None:
    operator.check(make(operator, 1), random_pattern(1), scale=scale)


@every_dtype
@pytest.mark.parametrize("scale", [0.125, -0.125])
def test_large_scores_do_not_overflow(scale: float, operator: Operator, dtype: torch.dtype) -> None:
    """A row's scores are hundreds apart: exp() of any but their true maximum overflows."""
    qkv = [(8 * x.detach()).requires_grad_() for x in make(operator, 1, 1, 64, dtype)]
    selected = random_pattern(1, 1)
    out, lse = operator.attend(qkv, selected, scale=scale)
    mask = token_mask(selected, LENGTHS).to(operator.device)
    assert_matches_eager(out, lse, *qkv, mask, scale=scale)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), qkv))


# --- strides


@every_dtype
def test_any_strides(operator: Operator, dtype: torch.dtype) -> None:
    q = torch.randn(2, 16, TOKENS, 2).to(operator.device, dtype).permute(0, 2, 3, 1)
    k = torch.randn(2, 2, TOKENS, 16).to(operator.device, dtype).transpose(1, 2)  # heads first
    v = torch.randn(2, TOKENS, 1, 16).to(operator.device, dtype).expand(2, TOKENS, 2, 16)
    assert q.stride(-1) != 1  # tokens inside
    assert v.stride(2) == 0
    operator.check([x.requires_grad_() for x in (q, k, v)], random_pattern(2, 2))


@every_operator
def test_slices_of_fused_projections(operator: Operator) -> None:
    fused = torch.randn(1, TOKENS, 3 * 2 * 24, device=operator.device, requires_grad=True)
    qkv = [x.unflatten(-1, (2, 24)) for x in fused.chunk(3, -1)]
    assert not any(x.is_contiguous() for x in qkv)
    operator.check(qkv, random_pattern(1, 2))


@every_operator
def test_key_mask_of_any_strides(operator: Operator) -> None:
    key_mask = (torch.rand(TOKENS, 2, device=operator.device) < 0.7).T
    operator.check(make(operator), random_pattern(), key_mask=key_mask)


# --- gradients


@every_operator
@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_gradient_of_one_of_the_results(which: int, operator: Operator) -> None:
    qkv, selected = make(operator, 1, dtype=operator.widest), random_pattern(1)
    mask = token_mask(selected, LENGTHS).to(operator.device)
    truth = reference_attention(*qkv, mask)[which]
    kept = truth.isfinite()
    found = torch.autograd.grad(operator.attend(qkv, selected)[which][kept].sum(), qkv)
    expected = torch.autograd.grad(truth[kept].sum(), qkv, materialize_grads=True)
    torch.testing.assert_close(found, expected, **operator.tolerance)


@every_operator
def test_gradient_of_stride_0(operator: Operator) -> None:
    qkv, selected = make(operator, 1, dtype=operator.widest), random_pattern(1)
    mask = token_mask(selected, LENGTHS).to(operator.device)
    expected = torch.autograd.grad(reference_attention(*qkv, mask)[0].sum(), qkv)
    found = torch.autograd.grad(operator.attend(qkv, selected)[0].sum(), qkv)
    torch.testing.assert_close(found, expected, **operator.tolerance)


@every_operator
def test_rows_that_see_nothing_ignore_their_gradient(operator: Operator) -> None:
    """The gradient of an LSE of -inf is NaN in a merge of two attentions: it means nothing."""
    qkv, selected = make(operator, 1), random_pattern(1)
    selected[:, :, :BLOCK] = False
    out, lse = operator.attend(qkv, selected)
    grad_lse = torch.ones_like(lse)
    found = torch.autograd.grad((out, lse), qkv, (out, grad_lse), retain_graph=True)
    grad_lse[..., :BLOCK] = torch.nan
    for a, b in zip(found, torch.autograd.grad((out, lse), qkv, (out, grad_lse)), strict=True):
        assert torch.equal(a, b)


@every_operator
def test_two_attentions_merge_to_one(operator: Operator) -> None:
    """Keys in two parts, joined by their LSE, give the attention over all keys, and its gradients.

    The log-sum-exp of both parts depends on q and k: its gradient must be right too.
    """
    qkv, selected = make(operator, 1), random_pattern(1)
    selected[..., 0] = True  # every query sees something
    parts = []
    for blocks in (slice(0, 2), slice(2, 4)):
        first, count = sum(LENGTHS[: blocks.start]), sum(LENGTHS[blocks])
        q, (k, v) = qkv[0], (x[:, first : first + count] for x in qkv[1:])
        parts.append(operator.attend([q, k, v], selected[..., blocks], LENGTHS[blocks]))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part - lse).exp().transpose(1, 2)[..., None] for _, part in parts]
    out = sum(part * weight for (part, _), weight in zip(parts, weights, strict=True))
    mask = token_mask(selected, LENGTHS).to(operator.device)
    assert_matches_eager(out, lse, *qkv, mask, backward=True)


# --- compilers and bad input


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "operator", ["cpu-flash", "triton", "gather", "gather_cpu-flash"], indirect=True
)
def test_compiles_to_one_graph(operator: Operator, dynamic: bool) -> None:
    torch._dynamo.reset()
    qkv, pattern = make(operator, 1, head_dim=8), operator.pattern(random_pattern(1))

    def function(*qkv: torch.Tensor) -> torch.Tensor:
        out, lse = operator.function(*(x * 2 for x in qkv), **pattern)
        return out.sum() + torch.where(lse.isfinite(), lse, 0).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, got = function(*qkv), compiled(*qkv)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, qkv), torch.autograd.grad(expected, qkv))


@pytest.mark.parametrize(
    "operator", ["cpu-flash", "triton", "gather", "gather_cpu-flash"], indirect=True
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 43, 3, 8).half()}, r"share one dtype of .*torch.float16"),
        ({x: torch.ones(2, 43, 3, 8).int() for x in "qkv"}, "share one dtype of .*int32"),
        ({"q": torch.randn(2, 43, 24)}, r"\(batch, tokens, heads, head_dim\); got \(2, 43, 24\)"),
        ({"v": torch.randn(2, 42, 3, 8)}, r"same number of tokens; got .* v \(2, 42, 3, 8\)"),
        ({"k": torch.randn(2, 43, 1, 8)}, "have the batch, heads and head_dim of q"),
        ({"key_mask": torch.ones(2, 40).bool()}, r"tokens_kv\) = \(2, 43\); got .*40"),
        ({"key_mask": torch.ones(2, 43)}, "must be torch.bool .* got torch.float32"),
        ({"v": torch.randn(2, 43, 3, 8, device="meta")}, "v is on meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_bad_input_is_named(
    changes: dict[str, torch.Tensor], message: str, operator: Operator
) -> None:
    good = {x: torch.randn(2, TOKENS, 3, 8) for x in "qkv"}
    arguments = {
        name: x if x.device.type == "meta" else x.to(operator.device)
        for name, x in {**good, **changes}.items()
    }
    pattern = operator.pattern(random_pattern(2, 3))
    with pytest.raises(ValueError, match=message):
        operator.function(**arguments, **pattern)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(
            """
from diffattn.blocks import FULL, layout_from_states
from diffattn.kernels.block_sparse import block_sparse_attention
states = torch.full((1, 1), FULL, dtype=torch.uint8)
layout = layout_from_states(states, None, tokens_q=9, tokens_kv=9, block_q=16, block_kv=16)
block_sparse_attention(x, x, x, layout.tensors, block_q=16, block_kv=16)
""",
            id="triton",
        ),
        pytest.param(
            """
from diffattn.kernels.gather import selected_attention
bits = torch.ones(1, 1, 9, 1, dtype=torch.int32)
selected_attention(x, x, x, torch.tensor([0, 9], dtype=torch.int32), bits)
""",
            id="gather",
        ),
    ],
)
def test_triton_needs_a_gpu_or_the_interpreter(call: str) -> None:
    code = f"import torch\nx = torch.randn(1, 9, 1, 16)\n{call}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "ValueError: the Triton kernels run on a GPU, but q is on cpu" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr
