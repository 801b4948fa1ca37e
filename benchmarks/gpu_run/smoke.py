"""Every kernel against float64, on small calls that together have everything a call can have.

Outputs are NaN before a kernel writes them. Each call is made twice, and must give the same bits.
A row for every case says how far the results are off (`accuracy.Deviation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from diffattn.blocks import EMPTY, FULL, PARTIAL, BlockLayout, layout_from_states, pack_bits
from diffattn.kernels.clusters import fixed_point
from diffattn.kernels.common.tile_tables import Choice
from diffattn.kernels.gather import selected_attention
from diffattn.kernels.linear import linear_attention
from diffattn.kernels.summary import summary_attention
from diffattn.operator import attention
from diffattn.pipelines.bench.timing import describe
from gpu_run import adapter
from gpu_run.accuracy import Deviation, attend, each
from gpu_run.adapter import NotTakenError
from gpu_run.candidates import AHEAD, RANKED
from gpu_run.setting import Setting

Results = dict[str, torch.Tensor]

SCALE = 0.1  # of the scores of centroids


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        block: tokens per block.
        partial: whether some blocks are partial.
        empty: whether one row of blocks visits nothing.
        key_mask: whether some keys are hidden.
    """

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    batch: int = 1
    block: int = 128
    partial: bool = False
    empty: bool = False
    key_mask: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.batch}x{self.tokens}x{self.heads}x{self.head_dim} {dtype} {self.block}"
        flags = [name for name in ("partial", "empty", "key_mask") if getattr(self, name)]
        return " ".join([text, *flags])


CASES = (
    Case(512, 4, 128, torch.bfloat16),
    Case(512, 4, 64, torch.bfloat16),
    Case(300, 2, 64, torch.float16, empty=True),
    Case(300, 3, 128, torch.float16, batch=2, partial=True, empty=True),
    Case(777, 5, 64, torch.bfloat16, batch=2, block=64, partial=True),
    Case(1000, 16, 128, torch.bfloat16, partial=True),
    Case(256, 2, 80, torch.float16, partial=True, key_mask=True),
    Case(300, 2, 128, torch.float16, batch=2, partial=True, key_mask=True),
    Case(4322, 4, 64, torch.bfloat16, partial=True),
    Case(520, 4, 128, torch.bfloat16, block=64, partial=True),
)
# The same in less time for Triton's interpreter.
DRY_CASES = tuple(
    replace(case, heads=1, tokens=140, dtype=torch.float16)
    for case in (CASES[0], CASES[3], CASES[6])
)


def run(what: str, setting: Setting) -> None:
    """Check a kernel's form, "keys-tma", or a name in `RESULTS`."""
    with _poisoned():
        for case in DRY_CASES if setting.dry else CASES:
            if not setting.journal.is_finished(str(case)):
                setting.journal.add(
                    "smoke", what=what, case=str(case), head_dim=case.head_dim,
                    **_outcome(what, case, setting),
                )  # fmt: skip
                setting.journal.finish(str(case))


@contextmanager
def _poisoned() -> Iterator[None]:
    """Make memory that nothing was written to NaN while the block runs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _outcome(what: str, case: Case, setting: Setting) -> dict[str, object]:
    try:
        first, second, found = check(what, case, setting)
    except NotTakenError as error:
        return {"taken": False, "why": str(error)}
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # nothing works any more in this process
        return {"taken": True, "right": False, "error": describe(error)}
    same = all(torch.equal(first[name], second[name]) for name in first)
    return {
        "taken": True,
        "right": all(x.is_right for x in found.values()) and same,
        "same_bits": same,
        "deviations": each(found),
    }


def check(what: str, case: Case, setting: Setting) -> tuple[Results, Results, dict[str, Deviation]]:
    """Results of two calls, and how far the results of the first call are off."""
    problem = Problem.of(case, setting)
    results = RESULTS.get(what) or _of_form(what)
    first, second = results(problem), results(problem)
    eager, truth = (problem.expected(what, dtype) for dtype in (case.dtype, torch.float64))
    found = {name: Deviation.of(got, eager[name], truth[name]) for name, got in first.items()}
    return first, second, found


@dataclass(frozen=True)
class Problem:
    """The tensors of a case.

    Attributes:
        grad: of the output.
        layout: its blocks.
        selected: bool `(batch, heads, tokens, tokens)`, the keys that queries of a gather select.
        starts, bits: the same selection as the gather kernel takes it.
    """

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    layout: BlockLayout
    key_mask: torch.Tensor | None
    selected: torch.Tensor
    starts: torch.Tensor
    bits: torch.Tensor

    @staticmethod
    def of(case: Case, setting: Setting) -> Problem:
        device = setting.device
        torch.manual_seed(case.tokens)
        size = (case.batch, case.tokens, case.heads, case.head_dim)
        q, k, v, grad = (torch.randn(size, device=device).to(case.dtype) for _ in range(4))
        key_mask = None
        if case.key_mask:
            key_mask = torch.ones(case.batch, case.tokens, dtype=torch.bool, device=device)
            key_mask[:, case.tokens // 3 : case.tokens // 2] = False
        edges = sorted({0, case.tokens, *range(0, case.tokens, 100)})
        starts = torch.tensor(edges, dtype=torch.int32, device=device)
        blocks = len(edges) - 1
        chosen = torch.rand(*size[:1], case.heads, case.tokens, blocks, device=device) < 0.4
        if not case.empty:
            chosen[..., 0] = True
        selected = chosen.repeat_interleave(starts.diff().long(), -1)
        return Problem(
            case, q, k, v, grad, _layout(case).to(device), key_mask, selected, starts, _bits(chosen)
        )

    def leaves(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [x.to(dtype).detach().requires_grad_() for x in (self.q, self.k, self.v)]

    def summaries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Biases, bits of hidden summaries, and whether each query sees each summary.

        The summaries stand in for every seventh key. The last block of queries sees none of them
        where the case has an empty row.
        """
        case, device = self.case, self.q.device
        generator = torch.Generator("cpu").manual_seed(case.tokens)
        count, rows = -(-case.tokens // 7), -(-case.tokens // case.block)
        bias = torch.rand(case.batch, case.heads, count, generator=generator) * 4
        hidden = torch.rand(case.batch, case.heads, rows, count, generator=generator) < 0.4
        if case.empty:
            hidden[:, :, -1] = True
        seen = ~hidden.repeat_interleave(case.block, 2)[:, :, : case.tokens]
        return bias.to(device), pack_bits(hidden).to(device), seen.to(device)

    def clusters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Centroids that no 16-bit number is, labels of the tokens, and whether a token counts."""
        case, device = self.case, self.q.device
        generator = torch.Generator("cpu").manual_seed(case.tokens)
        size = case.batch, case.heads, 1 + min(100, case.tokens // 9), case.head_dim
        centroids = torch.randn(size, generator=generator).to(device)
        labels = torch.arange(case.tokens, device=device) * 7 % size[2]
        counts = torch.ones(case.batch, case.tokens, dtype=torch.bool, device=device)
        if self.key_mask is not None:
            counts = self.key_mask
        return centroids, labels.expand(*size[:2], -1).contiguous(), counts

    def expected(self, what: str, dtype: torch.dtype) -> Results:
        """The results by definition, computed in a dtype."""
        if what == "clusters":
            return _eager_clusters(self, dtype)
        leaves = self.leaves(dtype)
        if what == "linear":
            out = _eager_linear(*leaves, self.key_mask)
        elif what == "summary":
            bias, _, seen = self.summaries()
            out = _eager_summary(leaves[0], *map(_every_seventh, leaves[1:]), bias, seen)
        else:
            allowed = self.layout.dense()[..., : self.case.tokens, : self.case.tokens].bool()
            if what == "gather":
                allowed = self.selected
            if self.key_mask is not None:
                allowed = allowed & self.key_mask[:, None, None]
            out = attend(*leaves, allowed)
        grads = torch.autograd.grad(out, leaves, self.grad.to(dtype))
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def _every_seventh(x: torch.Tensor) -> torch.Tensor:
    """Stands for the means of blocks."""
    return x[:, ::7]


def _eager_summary(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Attention to summaries by its definition; 0 where nothing is seen."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = (scores + bias[:, :, None].to(q.dtype)).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def _layout(case: Case) -> BlockLayout:
    """Random empty and full blocks, and some partial ones of two bit masks."""
    n = -(-case.tokens // case.block)
    states = torch.where(torch.rand(n, n) < 0.6, FULL, EMPTY)
    states.fill_diagonal_(FULL)
    if case.partial:
        states[torch.rand(n, n) < 0.3] = PARTIAL
        states[0, -1] = states[-1, 0] = PARTIAL
    if case.empty:
        states[-1] = EMPTY
    patterns = torch.rand(2, case.block, case.block) < 0.5
    return layout_from_states(
        states.to(torch.uint8), lambda row, column: patterns[(row + column) % 2],
        tokens_q=case.tokens, tokens_kv=case.tokens, block_q=case.block, block_kv=case.block,
    )  # fmt: skip


def _bits(chosen: torch.Tensor) -> torch.Tensor:
    """int32 `(..., words)` of bool `(..., blocks)`."""
    words = []
    for part in chosen.split(32, -1):
        place = torch.arange(part.shape[-1], device=part.device)
        words.append((part.long() << place).sum(-1))
    unsigned = torch.stack(words, -1)
    return torch.where(unsigned < 2**31, unsigned, unsigned - 2**32).int()


def _eager_clusters(problem: Problem, dtype: torch.dtype) -> Results:
    """The results of `of_clusters` by their definitions."""
    centroids, labels, counts = problem.clusters()
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    counts = counts[:, None, :, None].to(dtype)
    centroids = centroids.to(dtype)
    apart = ((q * counts)[:, :, :, None] - centroids[:, :, None]).norm(dim=-1)
    shares = torch.nn.functional.one_hot(labels, centroids.shape[2]).to(dtype) * counts
    sums = shares.mT @ (q * counts)
    scores = centroids @ k.mT * SCALE
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * counts.mT
    squares = weights.square() @ v.square().sum(-1)[..., None]
    return {
        "distance": apart.amin(-1),
        "mean": sums / shares.sum(2).clamp(min=1)[..., None],
        "squares": squares[..., 0],
    }


def _eager_linear(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> torch.Tensor:
    """Linear attention by its definition, every token pair computed."""
    features = [torch.nn.functional.elu(x) + 1 for x in (q, k)]
    weights = torch.einsum("bqhd,bkhd->bhqk", *features)
    count = torch.full((), k.shape[1], dtype=q.dtype, device=q.device)
    if key_mask is not None:
        weights = weights * key_mask[:, None, None]
        count = key_mask.sum(-1)[:, None, None, None].to(q.dtype)
    mean = weights / count
    total = mean.sum(-1, keepdim=True) + 1e-4
    return torch.einsum("bhqk,bkhd->bqhd", mean / total, v)


# ---------------------------------------------------------------- what is checked


def of_forward(problem: Problem, choice: Choice) -> Results:
    call = _call(problem)
    return {"out": call.forward(choice)[0]}


def of_queries(problem: Problem, choice: Choice) -> Results:
    return {"dq": _gradients(problem).queries(choice)}


def of_keys(problem: Problem, choice: Choice) -> Results:
    dk, dv = _gradients(problem).keys(choice)
    return {"dk": dk, "dv": dv}


def form_of(kernel: str, choice: Choice) -> str:
    """The name of a choice's form among the stages: "keys-tma", or "forward-gluon-ahead"."""
    from gpu_run.stages import SMOKE

    form = f"{kernel}-{choice.variant}"
    ahead = f"{form}-{AHEAD}"
    return ahead if choice.tiles.ahead and ahead in SMOKE else form


def _of_form(form: str) -> Callable[[Problem], Results]:
    """A function that runs the most promising tiles of a kernel's form."""
    kernel = form.split("-")[0]
    of_kernel = {"forward": of_forward, "queries": of_queries, "keys": of_keys}[kernel]

    def results(problem: Problem) -> Results:
        head_dim = 64 if problem.case.head_dim <= 64 else 128
        found = (x for x in RANKED[kernel, head_dim] if form_of(kernel, x) == form)
        return of_kernel(problem, next(found))

    return results


def _call(problem: Problem) -> adapter.Call:
    return adapter.Call(problem.q, problem.k, problem.v, problem.layout, problem.key_mask)


def _gradients(problem: Problem) -> adapter.Gradients:
    call = _call(problem)
    head_dim = 64 if problem.case.head_dim <= 64 else 128
    out, lse = call.forward(adapter.shipped("forward", head_dim))
    return adapter.Gradients.of(call, problem.grad, out, lse)


def _trained(problem: Problem, run: Callable[..., torch.Tensor]) -> Results:
    """Output and gradients of a differentiable function of q, k and v."""
    leaves = problem.leaves(problem.case.dtype)
    out = run(*leaves)
    grads = torch.autograd.grad(out, leaves, problem.grad)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def of_gather(problem: Problem) -> Results:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return selected_attention(q, k, v, problem.starts, problem.bits, key_mask=problem.key_mask)[
            0
        ]

    return _trained(problem, run)


def of_linear(problem: Problem) -> Results:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return linear_attention(q, k, v, key_mask=problem.key_mask, backend="triton")

    return _trained(problem, run)


def of_summary(problem: Problem) -> Results:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        bias, hidden, _ = problem.summaries()
        return summary_attention(
            q, _every_seventh(k), _every_seventh(v), bias, hidden,
            block_q=problem.case.block, backend="triton",
        )[0]  # fmt: skip

    return _trained(problem, run)


def of_public(problem: Problem) -> Results:
    """What users call, with whatever form it takes."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, problem.layout, key_mask=problem.key_mask, backend="triton")

    return _trained(problem, run)


def of_clusters(problem: Problem) -> Results:
    """Distances from the centroids of k-means' labels, means of clusters, sums over keys."""
    from diffattn.kernels.clusters.triton_errors import span_sums
    from diffattn.kernels.clusters.triton_passes import TritonPasses

    centroids, labels, counts = problem.clusters()
    passes = TritonPasses(problem.q, problem.key_mask)
    # Where kernels are compiled only, there are no labels.
    nearest = passes.nearest(centroids).clamp(0, centroids.shape[2] - 1)
    points = (problem.q * counts[..., None, None]).transpose(1, 2).double()
    own = centroids.double().gather(2, nearest[..., None].expand(points.shape))
    factor = fixed_point(passes.largest())
    sums, sizes = passes.sums(labels, centroids.shape[2], factor)
    means = sums.double() / sizes.clamp(min=1)[..., None] / factor[..., None, None]
    # All keys are one cluster. Tiles hold the keys that count, of which the first tiles are full.
    case, tile = problem.case, 64
    order = counts.long().argsort(dim=1, descending=True, stable=True)[..., None, None]
    k, v = (x.gather(1, order.expand(x.shape)) for x in (problem.k, problem.v))
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % tile)) for x in (k, v))
    starts = torch.arange(0, k.shape[1], tile, device=k.device)
    held = (counts.sum(1)[:, None] - starts).clamp(0, tile)[:, None].expand(-1, case.heads, -1)
    spans = span_sums(
        centroids, k, v, centroids[:, :, :1], torch.zeros_like(held).contiguous(), held, SCALE
    )
    scores = centroids.double() @ problem.k.transpose(1, 2).double().mT * SCALE
    weights = (spans.highest.double() - scores.amax(-1, keepdim=True)).exp()
    return {
        "distance": (points - own).norm(dim=-1).float(),
        "mean": means.float(),
        "squares": (weights.square() * spans.squares).sum(-1).float(),
    }


RESULTS: dict[str, Callable[[Problem], Results]] = {
    "clusters": of_clusters,
    "gather": of_gather,
    "linear": of_linear,
    "summary": of_summary,
    "public": of_public,
}


def passed(rows: list[dict[str, object]], what: str, head_dim: int) -> bool:
    """Whether a kernel's form was right in all cases of a head_dim that it took, and ended well.

    Args:
        rows: the rows of a run.
    """
    stage = f"smoke:{what}"
    ended = [row["rc"] for row in rows if row["stage"] == stage and row["kind"] == "stage"]
    ended = [rc for rc in ended if rc != "settled before"]
    cases = {
        row["case"]: row
        for row in rows
        if row["stage"] == stage and row["kind"] == "smoke" and row["head_dim"] == head_dim
    }
    taken = [row for row in cases.values() if row["taken"]]
    return bool(taken) and all(row["right"] for row in taken) and ended[-1:] == [0]


def launches(setting: Setting) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every case of every form, to be compiled."""
    from gpu_run.stages import SMOKE

    for what in SMOKE:
        results = RESULTS.get(what) or _of_form(what)
        for case in DRY_CASES if setting.dry else CASES:
            yield (
                f"{what} {case}",
                lambda results=results, case=case: results(Problem.of(case, setting)),
            )
