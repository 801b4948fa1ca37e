"""Methods that are no mask, over sequences with references: each policy by its definition."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_oracle import linear_truth, rotations

import diffattn
from diffattn import AgentAttn, CLEARAttn, LinFusionAttn, TokenGrid, VMoBAAttn
from diffattn.grid import Reference
from diffattn.kernels.reference import reference_attention
from diffattn.methods import Method, Site
from diffattn.selected.key_blocks import JointPartition
from diffattn.spans import division_of, spans_of

HEADS, DIM = 2, 16
POLICIES = ("exact", "visible", "local")
# Two references of more than 128 tokens, one of a few, text at both ends and between.
GRID = TokenGrid(
    2, 8, 9, 160, 176,
    references=(Reference(5, 2, 8, 9), Reference(310, 1, 10, 14), Reference(455, 1, 3, 5)),
)  # fmt: skip
# As in key frames before the video, without text.
BARE = TokenGrid(2, 8, 9, 288, 0, references=(Reference(0, 2, 8, 9), Reference(144, 2, 8, 9)))
SPANS = {
    GRID: [(160, (2, 8, 9)), (5, (2, 8, 9)), (310, (1, 10, 14))],
    BARE: [(288, (2, 8, 9)), (0, (2, 8, 9)), (144, (2, 8, 9))],
}
both = pytest.mark.parametrize("grid", [GRID, BARE], ids=["with text", "bare"])
policies = pytest.mark.parametrize("policy", POLICIES)


def tensors(grid: TokenGrid, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = batch, grid.tokens, HEADS, DIM
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def site(grid: TokenGrid, **more: Any) -> Site:
    return Site("", 0, 1, grid, **more)


def positions(span: tuple[int, tuple[int, int, int]]) -> torch.Tensor:
    start, (frames, rows, columns) = span
    return torch.arange(start, start + frames * rows * columns)


def sparse(grid: TokenGrid, policy: str) -> list[tuple[int, tuple[int, int, int]]]:
    """The rectangles that have something of their own under a policy of linear methods."""
    return SPANS[grid] if policy == "local" else SPANS[grid][:1]


def split(grid: TokenGrid, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in these rectangles, in order, and of all other tokens."""
    inside = torch.zeros(grid.tokens, dtype=torch.bool)
    for span in sparse(grid, policy):
        inside[positions(span)] = True
    return inside.nonzero().flatten(), (~inside).nonzero().flatten()


# --- VMoBA


def chunks(
    span: tuple[int, tuple[int, int, int]], chunk: tuple[int, int, int]
) -> list[torch.Tensor]:
    """The tokens of each block of a rectangle."""
    start, sizes = span
    blocks: dict[tuple[int, ...], list[int]] = {}
    for n, place in enumerate(itertools.product(*map(range, sizes))):
        blocks.setdefault(tuple(p // c for p, c in zip(place, chunk, strict=True)), []).append(n)
    return [start + torch.tensor(tokens) for tokens in blocks.values()]


def vmoba_mask(
    q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, policy: str, topk: int, chunk: Any
) -> torch.Tensor:
    """bool (batch, heads, tokens, tokens), by ranking each query's blocks one by one."""
    batch, tokens, heads, _ = q.shape
    out = torch.ones(batch, heads, tokens, tokens, dtype=torch.bool)
    spans = SPANS[grid][:1] if policy == "exact" else SPANS[grid]
    blocks = [chunks(span, chunk) for span in spans]
    pools = [[b for span in blocks for b in span]] if policy == "local" else blocks
    for pool in pools:
        count = round(topk * len(pool) / len(blocks[0]))
        means = [k[:, block].mean(1) for block in pool]
        for b, h in itertools.product(range(batch), range(heads)):
            scores = torch.stack([q[b, :, h] @ mean[b, h] for mean in means], 1)
            for own, block in enumerate(pool):
                for token in block.tolist():
                    rank = scores[token].clone()
                    rank[own] = torch.inf
                    seen = set(rank.argsort(descending=True)[:count].tolist())
                    for other in set(range(len(pool))) - seen:
                        out[b, h, token, pool[other]] = False
    return out


@both
@policies
def test_vmoba_selects_by_the_policy(grid: TokenGrid, policy: str) -> None:
    method = VMoBAAttn(partitions=("3d",), chunk_3d=(1, 4, 5), topk=3, references=policy)
    q, k, v = tensors(grid)
    want = vmoba_mask(q, k, grid, policy, 3, (1, 4, 5))
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out = method.attend(*given, site(grid))
    expected = [x.clone().requires_grad_() for x in (q, k, v)]
    truth, _ = reference_attention(*expected, want)
    torch.testing.assert_close(out, truth, atol=1e-10, rtol=1e-10)
    upstream = torch.randn(out.shape, dtype=out.dtype)
    for found, right in zip(
        torch.autograd.grad(out, given, upstream),
        torch.autograd.grad(truth, expected, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, right, atol=1e-9, rtol=1e-9)
    bits = method.selection(q, k, site(grid))
    for head in range(HEADS):
        mask = method.selection_mask(bits[0, head], grid, 0)
        assert torch.equal(mask.dense(), want[0, head])
    assert method.expected_density(grid, 0) == pytest.approx(float(want.double().mean()), abs=0.02)


@pytest.mark.parametrize(
    "method",
    [
        VMoBAAttn(preset="training", partitions=("2d",), chunk_2d=(4, 5), tau=0.3),
        VMoBAAttn(partitions=("1d",), chunk_1d=0.4, topk=2, granularity="tile", tile=16),
        VMoBAAttn(preset="training", partitions=("3d",), scope="unpublished-all", tau=0.2),
    ],
    ids=["threshold", "tiles", "all heads"],
)
@policies
def test_vmoba_leaves_out_what_the_policy_lets_it(method: VMoBAAttn, policy: str) -> None:
    """Other selections: tokens outside of their own pool are always seen, and policies include."""
    method = method.for_model("", GRID.alone)
    method = type(method)(**{**method.__getstate__(), "references": policy})
    q, k, v = tensors(GRID)
    mask = method.selection_mask(method.selection(q, k, site(GRID))[0, 0], GRID, 0).dense()
    out = method.attend(q, k, v, site(GRID))
    masks = torch.stack(
        [
            method.selection_mask(bits, GRID, 0).dense()
            for bits in method.selection(q, k, site(GRID))[0]
        ]
    )
    torch.testing.assert_close(out, reference_attention(q, k, v, masks[None])[0])
    own = [positions(span) for span in SPANS[GRID]]
    free = torch.ones_like(mask)
    for a, b in itertools.product(range(3), range(3)):
        if (policy == "local") or (a == b and (policy == "visible" or a == 0)):
            free[own[a][:, None], own[b]] = False
    assert mask[free].all()
    assert not mask[own[0][:, None], own[0]].all()
    if policy == "local":
        assert not mask[own[0][:, None], own[1]].all()


def test_vmoba_hides_padding() -> None:
    method = VMoBAAttn(partitions=("3d",), chunk_3d=(1, 4, 5), topk=3, references="visible")
    q, k, v = tensors(GRID)
    key_mask = torch.ones(1, GRID.tokens, dtype=torch.bool)
    key_mask[:, 2:5] = False
    out = method.attend(q, k, v, site(GRID), key_mask=key_mask)
    mask = vmoba_mask(q, k, GRID, "visible", 3, (1, 4, 5)) & key_mask[:, None, None]
    torch.testing.assert_close(out, reference_attention(q, k, v, mask)[0])


def test_vmoba_without_large_references_is_as_ever() -> None:
    grid = TokenGrid(2, 8, 9, 0, 20, references=(Reference(144, 1, 4, 5),))
    assert not isinstance(VMoBAAttn().partition(grid, 0), JointPartition)


# --- LinFusion


@both
@policies
@pytest.mark.parametrize("tables", ["none", "all tokens", "pictures"])
def test_linfusion_by_the_policy(grid: TokenGrid, policy: str, tables: str) -> None:
    q, k, v = (x.float() for x in tensors(grid))
    gate = torch.tensor([0.3, -0.2])
    inside, others = split(grid, policy)
    rotation = rotary = None
    if tables != "none":
        whole = rotations(grid.tokens, DIM)
        rotation = whole[:, inside]
        rows = whole[:, grid.pictures] if tables == "pictures" else whole
        rotary = tuple(table.repeat_interleave(2, -1) for table in rows)
    weights: Any = SimpleNamespace(text_gate=gate)
    out = LinFusionAttn(references=policy).attend(
        q, k, v, site(grid, weights=weights, rotary=rotary)
    )
    want = linear_truth(q[:, inside], k[:, inside], v[:, inside], rotation=rotation)
    if len(others):
        beside, lse = reference_attention(q[:, inside], k[:, others], v[:, others], None)
        counted = len(inside) * gate.double().exp()[None, :, None]
        share = (lse.exp() / (lse.exp() + counted)).transpose(1, 2)[..., None]
        want = share * beside + (1 - share) * want
        dense = reference_attention(q[:, others], k, v, None)[0]
        torch.testing.assert_close(out[:, others].double(), dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[:, inside].double(), want, atol=1e-5, rtol=1e-4)


def test_linfusion_without_a_gate_counts_as_its_first_value() -> None:
    """In models without text in their sequence the references stand beside the video."""
    q, k, v = (x.float() for x in tensors(BARE))
    outs = [
        LinFusionAttn().attend(q, k, v, site(BARE, weights=SimpleNamespace(text_gate=gate)))  # type: ignore[arg-type]
        for gate in (None, torch.zeros(HEADS))
    ]
    assert torch.equal(*outs)


def test_linfusion_needs_the_place_of_every_token() -> None:
    q, k, v = (x.float() for x in tensors(GRID))
    rotary = tuple(x.repeat_interleave(2, -1) for x in rotations(GRID.video_tokens, DIM))
    at: Any = site(GRID, weights=SimpleNamespace(text_gate=torch.zeros(HEADS)), rotary=rotary)  # type: ignore[arg-type]
    assert LinFusionAttn().attend(q, k, v, at).isfinite().all()
    with pytest.raises(NotImplementedError, match=r"is of 144 tokens.*or references='visible'"):
        LinFusionAttn(references="local").attend(q, k, v, at)


# --- Agent attention


@both
@policies
@pytest.mark.parametrize("padded", [False, True])
def test_agents_by_the_policy(grid: TokenGrid, policy: str, padded: bool) -> None:
    cell, shortcut, scale = (1, 3, 4), 0.1, DIM**-0.5
    method = AgentAttn(cell=cell, k_scale2=0.3, k_shortcut=shortcut, references=policy)
    q, k, v = (x.float() for x in tensors(grid))
    seen = torch.ones(1, grid.tokens, dtype=torch.bool)
    if padded:
        seen[:, -3:] = False
    out = method.attend(q, k, v, site(grid), key_mask=seen if padded else None)
    inside, others = split(grid, policy)
    agents = []
    for span in sorted(sparse(grid, policy)):
        for tokens in chunks(span, cell):
            counted = tokens[seen[0, tokens]]
            agents.append(q[:, counted].mean(1) if len(counted) else None)
    found = [a for a in agents if a is not None]
    means = torch.stack(found, 1)
    gathered = reference_attention(means, k, v, seen[:, None, None], scale=scale)[0].float()
    sharp = DIM ** (0.5 * 0.7)
    beside = others[seen[0, others]]
    keys = torch.cat([means * sharp, k[:, beside]], 1)
    values = torch.cat([gathered, v[:, beside]], 1)
    want = reference_attention(q[:, inside], keys, values, None, scale=scale)[0]
    want = want + shortcut * v[:, inside].double()
    torch.testing.assert_close(out[:, inside].double(), want, atol=1e-5, rtol=1e-4)
    if len(others):
        dense = reference_attention(q[:, others], k, v, seen[:, None, None], scale=scale)[0]
        torch.testing.assert_close(out[:, others].double(), dense, atol=1e-5, rtol=1e-4)


# --- CLEAR's pooled keys, and the scale of scores


@policies
def test_pooled_keys_are_those_of_the_video(policy: str) -> None:
    grid = TokenGrid(1, 12, 12, 5, 144 + 6, references=(Reference(150, 1, 12, 12),))
    method = CLEARAttn(radius=3, down_factor=4, references=policy)
    q, k, v = tensors(grid)
    out = method.attend(q, k, v, site(grid))
    mask = method.mask(grid).dense()
    pooled_k, pooled_v = (
        x[:, grid.video].unflatten(1, (3, 4, 3, 4)).mean((2, 4)).flatten(1, 2) for x in (k, v)
    )
    sees = torch.zeros(grid.tokens, 9, dtype=torch.bool)
    sees[grid.video] = True
    want, _ = reference_attention(
        q, torch.cat([k, pooled_k], 1), torch.cat([v, pooled_v], 1), torch.cat([mask, sees], 1)
    )
    torch.testing.assert_close(out, want)


def test_the_scale_counts_all_tokens() -> None:
    method = CLEARAttn(proportional_attention=True, trained_tokens=100)
    grid = TokenGrid(1, 12, 12, 5, 150, references=(Reference(150, 1, 12, 12),))
    assert method.score_scale(grid, 16, None) == method.score_scale(
        TokenGrid(1, 12, 12, 5, 150), 16, None
    )


# --- costs


@pytest.mark.parametrize("name", ["vmoba", "linfusion", "agent"])
def test_cheaper_policies_cost_less(name: str) -> None:
    grid = TokenGrid(
        1, 32, 32, 77, 2048 + 9, references=(Reference(1101, 1, 32, 32), Reference(2130, 1, 32, 32))
    )
    costs = [
        diffattn.plan(grid, diffattn.methods.from_dict({"type": name, "references": policy}))
        for policy in POLICIES
    ]
    flops = [cost.sparse_flops for cost in costs]
    assert flops[2] < flops[1] <= flops[0]
    assert (flops[1] < flops[0]) == (name == "vmoba")


@policies
def test_linfusion_counts_its_softmax(policy: str) -> None:
    method = LinFusionAttn(mid_dim=-1, references=policy)
    work = method.work(GRID, 0, HEADS, DIM)
    inside, others = map(len, split(GRID, policy))
    channels = HEADS * DIM
    softmax = others * GRID.tokens + inside * others
    assert work.flops == 4 * inside * channels * DIM + 4 * softmax * channels


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.booleans())
def test_a_division_comes_together_again(a: int, b: int, c: int, local: bool) -> None:
    grid = TokenGrid(
        1,
        3,
        4,
        a + 8 + b,
        c + 6,
        references=(Reference(a, 1, 2, 4), Reference(a + b + 20, 1, 3, 2)),
    )
    division = division_of(grid, spans_of(grid, 8 if local else 99))
    x = torch.arange(2 * grid.tokens).view(2, -1, 1)
    inside, outside = division.inside(x), division.outside(x)
    assert inside.shape[1] == division.tokens == (20 if local else 12)
    assert outside.shape[1] == division.others
    assert torch.equal(division.joined(inside, outside), x)


@pytest.mark.parametrize("method", [VMoBAAttn(), LinFusionAttn(), AgentAttn()])
def test_without_references_policies_are_one(method: Method) -> None:
    grid = TokenGrid(2, 8, 9, 5, 7)
    q, k, v = (x.float() for x in tensors(grid))
    at: Any = site(grid, weights=SimpleNamespace(text_gate=torch.zeros(HEADS)))  # type: ignore[arg-type]
    if isinstance(method, AgentAttn):
        at = site(grid)
    outs = [
        type(method)(references=policy).for_model("", grid.alone).attend(q, k, v, at)
        for policy in POLICIES
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
