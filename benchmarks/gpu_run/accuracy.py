"""How far an attention is from float64, and whether eager attention of its dtype is as far.

The comparison is independent of any kernel: attention by its definition, at some of the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from diffattn.pipelines.bench.timing import Call
from gpu_run.masks import Rule

QUERIES = 48

# A kernel may round at other places than eager attention does: its largest error may be TIMES_EAGER
# times eager's, plus UNITS units of rounding of the largest value.
TIMES_EAGER = 3
UNITS = 2
# Inputs and intermediate float32 values are of unit size: where results cancel out, this much error
# is left.
LEFT = 20 * torch.finfo(torch.float32).eps

Tensors = Sequence[torch.Tensor]
# Gradients of q, k and v for a gradient of the output; None where a kernel computes none.
Gradients = Callable[[torch.Tensor], Sequence[torch.Tensor | None]]


@dataclass(frozen=True)
class Deviation:
    """How far a result is off.

    Attributes:
        relative: |got - truth| / |truth|; NaN where `got` has one.
        of_allowed: the largest error over the largest allowed error, see `TIMES_EAGER`.
    """

    relative: float
    of_allowed: float

    @property
    def is_right(self) -> bool:
        return self.of_allowed <= 1  # NaN is not

    @staticmethod
    def of(got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> Deviation:
        """Compare a result with float64, and with eager attention in the same dtype."""
        dtype = got.dtype
        got, eager, truth = (x.detach().double() for x in (got, eager, truth))
        allowed = TIMES_EAGER * (eager - truth).abs().max()
        allowed += UNITS * torch.finfo(dtype).eps * truth.abs().max() + LEFT
        difference = got - truth
        norm = truth.norm().clamp(min=torch.finfo(torch.float64).tiny)
        return Deviation(
            relative=float(difference.norm() / norm),
            of_allowed=float(difference.abs().max() / allowed),
        )


def worst(found: dict[str, Deviation]) -> dict[str, object]:
    """The largest deviation as facts of a row; NaN is larger than anything."""
    largest = max(found.values(), key=lambda x: (x.of_allowed != x.of_allowed, x.of_allowed))
    return {"error": largest.relative, "of_allowed": largest.of_allowed, "right": largest.is_right}


def each(found: dict[str, Deviation]) -> dict[str, dict[str, float]]:
    """All deviations as facts of a row."""
    return {name: asdict(deviation) for name, deviation in found.items()}


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by definition in the inputs' dtype, differentiable; 0 for queries that see nothing.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)`.
        allowed: bool, broadcasts to `(batch, heads, tokens_q, tokens_kv)`.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if allowed is None:
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    sees = allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed & sees, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~sees, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@dataclass(frozen=True)
class Sample:
    """Some queries of the first and the last head, and the rule of what they see.

    Attributes:
        queries, heads: int64 positions.
        rule: the rule of the mask; None where every query sees every key.
    """

    queries: torch.Tensor
    heads: torch.Tensor
    rule: Rule | None

    @staticmethod
    def of(q: torch.Tensor, rule: Rule | None) -> Sample:
        """The first query, the last, and some between."""
        tokens, heads = q.shape[1:3]
        generator = torch.Generator().manual_seed(tokens)
        some = torch.randint(tokens, (QUERIES,), generator=generator)
        queries = torch.cat([torch.tensor([0, tokens - 1]), some]).unique()
        ends = torch.tensor([0, heads - 1]).unique()
        return Sample(queries.to(q.device), ends.to(q.device), rule)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, queries, heads, head_dim)` of a tensor of all tokens and heads."""
        return x[:, self.queries][:, :, self.heads]

    def attended(self, qkv: Tensors, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Leaves of all tokens and the sampled heads, and the sampled rows of their attention."""
        leaves = [x[:, :, self.heads].to(dtype).detach().requires_grad_() for x in qkv]
        allowed = None
        if self.rule is not None:
            keys = torch.arange(qkv[1].shape[1], device=qkv[1].device)
            allowed = self.rule(self.queries[:, None], keys[None])
        return leaves, attend(leaves[0][:, self.queries], leaves[1], leaves[2], allowed)


def check_output(run: Call, qkv: Tensors, rule: Rule | None) -> dict[str, Deviation]:
    """How far the output of `run()`, `(batch, tokens, heads, head_dim)`, is off."""
    sample = Sample.of(qkv[0], rule)
    out = run()
    assert isinstance(out, torch.Tensor)
    eager, truth = (sample.attended(qkv, dtype)[1] for dtype in (qkv[0].dtype, torch.float64))
    return {"out": Deviation.of(sample.rows(out), eager, truth)}


def check_gradients(gradients: Gradients, qkv: Tensors, rule: Rule | None) -> dict[str, Deviation]:
    """How far the gradients that `gradients` computes are off.

    The gradient of the output is 0 except at the sampled queries, so that the truth depends on them
    only.
    """
    sample = Sample.of(qkv[0], rule)
    grad = torch.zeros_like(qkv[0])
    places = torch.meshgrid(sample.queries, sample.heads, indexing="ij")
    grad[:, places[0], places[1]] = torch.randn_like(grad[:, places[0], places[1]])
    expected = []
    for dtype in (qkv[0].dtype, torch.float64):
        leaves, out = sample.attended(qkv, dtype)
        expected.append(torch.autograd.grad(out, leaves, sample.rows(grad).to(dtype)))
    found = {}
    for name, got, eager, truth in zip(("dq", "dk", "dv"), gradients(grad), *expected, strict=True):
        if got is None:
            continue
        got = got[:, :, sample.heads]
        if name == "dq":
            got, eager, truth = (x[:, sample.queries] for x in (got, eager, truth))
        found[name] = Deviation.of(got, eager, truth)
    return found
