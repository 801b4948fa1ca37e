"""Error of an attention against float64 on some of its queries, independent of any kernel."""

from __future__ import annotations

import torch
from gpu_candidates import Candidate
from gpu_layouts import Rule, tile_order
from gpu_shapes import Shape

QUERIES = 48


def sample(shape: Shape, device: torch.device) -> torch.Tensor:
    """Positions of the queries to check: the first, the last and some between, int64."""
    generator = torch.Generator().manual_seed(shape.tokens)
    some = torch.randint(shape.tokens, (QUERIES,), generator=generator)
    return torch.cat([torch.tensor([0, shape.tokens - 1]), some]).unique().to(device)


def float64_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, rule: Rule | None
) -> torch.Tensor:
    """Attention of some queries in float64, `(batch, queries, heads, head_dim)`; differentiable."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, queries], k) * q.shape[-1] ** -0.5
    if rule is not None:
        key = torch.arange(k.shape[1], device=k.device)
        scores = scores.masked_fill(~rule(queries[:, None], key[None]), -torch.inf)
    # A query always sees itself, in every mask of this benchmark.
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def errors(
    candidate: Candidate,
    shape: Shape,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backward: bool,
) -> dict[str, float]:
    """Relative errors |got - truth| / |truth| of the output, or of the three gradients.

    The first and the last heads are looked at. For the gradients, those of all other queries'
    outputs are 0, so that the queries looked at are all that the truth depends on.
    """
    queries = sample(shape, q.device)
    heads = torch.tensor([0, shape.heads - 1], device=q.device).unique()
    rule = candidate.mask.rule if candidate.mask else None
    with torch.set_grad_enabled(backward):
        # Only as many leaves as are needed in float64: the tensors are gigabytes.
        exact = [x[:, :, heads].double().requires_grad_(backward) for x in (q, k, v)]
        truth = float64_rows(exact[0], exact[1], exact[2], queries, rule)
        leaves = [_order(x, candidate, shape) for x in (q, k, v)]
        leaves = [candidate.arrange(x).detach().requires_grad_(backward) for x in leaves]
        with candidate.context():
            out = candidate.attend(*leaves)
            if not backward:
                got = _order(candidate.restore(out), candidate, shape, back=True)
                return {"out": relative(got[:, queries][:, :, heads], truth)}
            weights = torch.randn_like(truth)
            grad = torch.zeros_like(q)
            places = torch.meshgrid(queries, heads, indexing="ij")
            grad[:, places[0], places[1]] = weights.to(q.dtype)
            weights = grad[:, places[0], places[1]].double()
            arranged = candidate.arrange(_order(grad, candidate, shape))
            grads = torch.autograd.grad(out, leaves, arranged)
    truths = torch.autograd.grad(truth, exact, weights)
    found = {}
    for name, got, wanted in zip(("dq", "dk", "dv"), grads, truths, strict=True):
        got = _order(candidate.restore(got), candidate, shape, back=True)[:, :, heads]
        if name == "dq":
            got, wanted = got[:, queries], wanted[:, queries]
        found[name] = relative(got, wanted)
    return found


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    """NaN where `got` has one."""
    return float((got.double() - truth).norm() / truth.norm())


def _order(x: torch.Tensor, candidate: Candidate, shape: Shape, back: bool = False) -> torch.Tensor:
    """Tokens from the tile order to the model's, or back, for candidates that want that."""
    if not candidate.raster:
        return x
    order = tile_order(shape.grid, x.device)
    return x[:, order] if back else x[:, order.argsort()]
