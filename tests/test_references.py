"""Static masks over sequences with references: every policy against its definition by tokens."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffattn
from diffattn import (
    AttentionTileAttn,
    CLEARAttn,
    FreeSwimAttn,
    GNAAttn,
    LVSAAttn,
    RadialAttn,
    TokenGrid,
)
from diffattn.grid import Reference
from diffattn.masks import AttentionMask, PredicateMask, allowed_pairs
from diffattn.methods import DenseAttn, StaticMaskMethod
from diffattn.orders import TileOrder, joined_order

BLOCK = 16
POLICIES = ("exact", "visible", "local")


@dataclass(frozen=True, kw_only=True)
class Clear(CLEARAttn):
    """CLEAR in small blocks, so that small references are not too small."""

    def block_size_on(self, grid: TokenGrid) -> int:
        return BLOCK

    def order_on(self, grid: TokenGrid) -> TileOrder:
        return TileOrder(grid, (1, 4, 4))


@dataclass(frozen=True, kw_only=True)
class Gna(GNAAttn):
    def block_size_on(self, grid: TokenGrid) -> int:
        return BLOCK


@dataclass(frozen=True, kw_only=True)
class FreeSwim(FreeSwimAttn):
    def block_size_on(self, grid: TokenGrid) -> int:
        return BLOCK


@dataclass(frozen=True, kw_only=True)
class Tile(AttentionTileAttn):
    def block_size_on(self, grid: TokenGrid) -> int:
        return BLOCK


@dataclass(frozen=True, kw_only=True)
class Lvsa(LVSAAttn):
    def block_size_on(self, grid: TokenGrid) -> int:
        return BLOCK


@dataclass(frozen=True, kw_only=True)
class Checkers(StaticMaskMethod):
    """A user's method: it says nothing sensible about text, and has no rule between grids."""

    type: ClassVar[str] = "checkers"

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Checkers:
        return self

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        return PredicateMask(grid, lambda q, k: (q - k) % 3 == 0)

    def block_size_on(self, grid: TokenGrid) -> int:
        return BLOCK


@dataclass(frozen=True, kw_only=True)
class Strips(Checkers):
    """The example of docs/your-own-method.md: tokens see the rows near their own."""

    type: ClassVar[str] = "strips"
    by_place: ClassVar[bool] = True

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        def near(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (grid.coordinates(query)[1] - grid.coordinates(key)[1]).abs() <= 1

        return PredicateMask(grid, near)


METHODS: dict[str, StaticMaskMethod] = {
    "clear": Clear(radius=3, frame_radius=2),
    "clear, cylinder": Clear(radius=2, window="cylinder", frame_radius=3, first_frame=False),
    "gna": Gna(window=(3, 3, 3), stride=(1, 2, 1)),
    "gna, causal": Gna(window=(2, 3, 3), is_causal=(True, False, False)),
    "freeswim": FreeSwim(native=(4, 4), radius=1),
    "radial": RadialAttn(block_size=BLOCK, decay_factor=0.3),
    "radial, paper": RadialAttn(rule="paper", block_size=BLOCK),
    "radial, reference": RadialAttn(block_size=BLOCK, block_rule="reference"),
    "tile": Tile(global_frames=1),
    "tile, fraction": Tile(global_frames=0.4),
    "lvsa": Lvsa(window=0, first_frames=0, period=2, phase=1),
    "dense": DenseAttn(),
    "checkers": Checkers(),
    "strips": Strips(),
}


@dataclass(frozen=True)
class Rectangle:
    """The video or a reference, as the oracle sees it: sizes, first token, time of each frame."""

    sizes: tuple[int, int, int]
    start: int
    times: tuple[float, ...]
    aligned: bool = True

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.sizes
        return frames * rows * columns

    def places(self) -> list[tuple[int, int, int]]:
        return list(itertools.product(*map(range, self.sizes)))


def rectangles(grid: TokenGrid, method: StaticMaskMethod) -> list[Rectangle]:
    """The video, and the references that are not small."""
    out = [
        Rectangle(
            (grid.frames, grid.height, grid.width), grid.text_before, tuple(range(grid.frames))
        )
    ]
    for r in grid.references:
        times = r.times or tuple(range(r.frames))
        if grid.frames == r.frames == 1:
            times = (0,)
        if r.tokens >= method.block_size_on(grid) and r.frames * r.height > 1:
            out.append(Rectangle((r.frames, r.height, r.width), r.start, times, r.aligned))
    return out


def alike(a: Rectangle, b: Rectangle) -> bool:
    return a.aligned and b.aligned and a.sizes[1:] == b.sizes[1:]


def rule_between(
    method: StaticMaskMethod, grid: TokenGrid, a: Rectangle, b: Rectangle
) -> torch.Tensor | None:
    """The pairs of two grids of one plane under "local", from definitions; None for all pairs."""
    same = a.sizes == b.sizes and a.times == b.times
    frames, rows, columns = a.sizes
    distances = [[round(abs(s - t)) for t in b.times] for s in a.times]
    if isinstance(method, GNAAttn | FreeSwimAttn | LVSAAttn | Strips):
        return method.video_mask(TokenGrid(*a.sizes)).dense() if same else None
    if isinstance(method, AttentionTileAttn):
        size, many = rows * columns, method.global_frames or 0.5
        seen_by_all = [
            set(range(0, n, math.ceil(n / (max(1, int(many * n + 0.5)) if many < 1 else many))))
            for n in (frames, b.sizes[0])
        ]
        out = torch.zeros(a.tokens, b.tokens, dtype=torch.bool)
        for i, j in itertools.product(range(a.tokens), range(b.tokens)):
            f, g = i // size, j // size
            at_one_time = f == g if same else distances[f][g] == 0
            out[i, j] = at_one_time or f in seen_by_all[0] or g in seen_by_all[1]
        return out
    if isinstance(method, CLEARAttn):
        first = min(frames, b.sizes[0]) > 1 and method.first_frame is not False
        out = torch.zeros(a.tokens, b.tokens, dtype=torch.bool)
        radius, reach = method.radius or 16, method.frame_radius or 8
        for i, (f, r, c) in enumerate(a.places()):
            for j, (g, s, d) in enumerate(b.places()):
                away, near = distances[f][g], (r - s) ** 2 + (c - d) ** 2
                if method.window == "cylinder":
                    seen = away < reach and near < radius**2
                else:
                    seen = away**2 / reach**2 + near / radius**2 < 1
                out[i, j] = seen or (first and 0 in (f, g))
        return out
    if isinstance(method, RadialAttn) and method.rule == "paper":
        size = rows * columns
        out = torch.zeros(a.tokens, b.tokens, dtype=torch.bool)
        for i, j in itertools.product(range(a.tokens), range(b.tokens)):
            d = distances[i // size][j // size]
            octave = 1 << (max(d, 1).bit_length() - 1)
            apart = abs(i % size - j % size)
            if octave <= size:
                seen = apart + 1 <= size / octave
            else:
                seen = apart == 0 and d % -(-octave // size) == 0
            out[i, j] = seen or j < size
        return out
    if isinstance(method, RadialAttn) and method.block_rule == "covering":
        return radial_blocks(method, grid, a, b, distances)
    return None


def radial_blocks(
    method: RadialAttn,
    grid: TokenGrid,
    a: Rectangle,
    b: Rectangle,
    distances: list[list[int]],
) -> torch.Tensor:
    """Radial's rule for blocks, by counting the rows and columns of every piece of a block."""
    settled = method._settled("", TokenGrid(*a.sizes))
    size = a.sizes[1] * a.sizes[2]

    def pieces(r: Rectangle) -> dict[tuple[int, int], list[int]]:
        out: dict[tuple[int, int], list[int]] = {}
        for token in range(r.tokens):
            out.setdefault(((r.start + token) // BLOCK, token // size), []).append(token % size)
        return out

    kept = set()
    for (row, f), mine in pieces(a).items():
        for (column, g), others in pieces(b).items():
            width = method._block_half_width(settled, distances[f][g], size)
            if g == 0:
                width = size
            if width < 0:
                continue
            counts = [sum(abs(x - y) <= width for x in mine) for y in others]
            touched = sum(count > 0 for count in counts)
            enough = sum(count > len(mine) // 3 for count in counts)
            if enough > 0.6 * touched:
                kept.add((row, column))
    out = torch.zeros(a.tokens, b.tokens, dtype=torch.bool)
    for i, j in itertools.product(range(a.tokens), range(b.tokens)):
        out[i, j] = ((a.start + i) // BLOCK, (b.start + j) // BLOCK) in kept
    return out


def oracle(method: StaticMaskMethod, grid: TokenGrid) -> torch.Tensor:
    """bool (tokens, tokens): the pairs that attend, from the definition of each policy."""
    found = rectangles(grid, method)
    if method.references == "exact":
        found = found[:1]
    out = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for a, b in itertools.product(found, found):
        block = slice(a.start, a.start + a.tokens), slice(b.start, b.start + b.tokens)
        if a == b:
            view = TokenGrid(*a.sizes, a.start, grid.tokens - a.start - a.tokens)
            out[block] = method.video_mask(view).dense()[block]
        elif method.references == "local" and alike(a, b):
            rule = rule_between(method, grid, a, b)
            if rule is not None:
                out[block] = rule
    return out


LAYOUTS = {
    "kontext": TokenGrid(1, 6, 8, 5, 48, references=(Reference(53, 1, 6, 8, times=(1.0,)),)),
    "two references": TokenGrid(
        1, 6, 8, 7, 83, references=(Reference(55, 1, 5, 7), Reference(90, 1, 6, 8))
    ),
    "key frames": TokenGrid(
        3, 4, 6, 58, 2,
        references=(Reference(3, 1, 4, 6, times=(0.0,)), Reference(30, 1, 4, 6, times=(2.6,))),
    ),
    "a video of its size": TokenGrid(3, 4, 6, 90, 5, references=(Reference(7, 3, 4, 6),)),
    "a longer video": TokenGrid(
        2, 4, 5, 3, 110, references=(Reference(50, 5, 4, 5, times=(-4.0, -3.0, -2.0, -1.5, 0.0)),)
    ),
    "not aligned": TokenGrid(2, 4, 6, 1, 52, references=(Reference(51, 2, 4, 6, aligned=False),)),
    "small ones": TokenGrid(
        2, 4, 6, 25, 9, references=(Reference(2, 1, 3, 5), Reference(17, 1, 1, 8))
    ),
}  # fmt: skip


def policies(method: StaticMaskMethod) -> list[StaticMaskMethod]:
    return [replace(method, references=policy) for policy in POLICIES]


@pytest.mark.filterwarnings("ignore:references='local'")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_masks_blocks_and_orders_are_the_definition(name: str, layout: str) -> None:
    check(METHODS[name], LAYOUTS[layout])


def check(method: StaticMaskMethod, grid: TokenGrid) -> None:
    previous = None
    for fitted in policies(method):
        mask, want = fitted.mask(grid), oracle(fitted, grid)
        assert torch.equal(mask.dense(), want)
        if previous is not None:
            assert bool((previous | ~want).all())  # every pair of this policy is one of the former
        previous = want
        order = fitted.order(grid)
        orders = [None, *([] if order is None else [order])]
        for block, order in itertools.product((BLOCK, 32), orders):
            there = torch.arange(grid.tokens) if order is None else order.positions()
            assert torch.equal(there.sort()[0], torch.arange(grid.tokens))
            laid_out = mask.blocks(block, order=order).dense()[0, 0]
            assert torch.equal(laid_out, want[there][:, there])


@st.composite
def sequences(draw: st.DrawFn) -> TokenGrid:
    """A video with references and other tokens around it, in any order."""
    side = st.integers(1, 6)
    sizes = draw(st.tuples(st.integers(1, 3), side, side))
    count = draw(st.integers(0, 3))
    references = []
    others = st.tuples(st.integers(1, 3), side, side)
    for _ in range(count):
        alike = draw(st.booleans())
        plane = sizes[1:] if alike else None
        frames, rows, columns = draw(others)
        rows, columns = plane or (rows, columns)
        times = draw(
            st.one_of(
                st.just(()),
                st.lists(st.integers(-9, 9).map(lambda n: n / 2), min_size=frames, max_size=frames)
                .map(sorted)
                .map(tuple),
            )
        )
        references.append(((frames, rows, columns), draw(st.booleans()), times))
    before = draw(st.integers(0, count))
    gap = st.integers(0, 20)
    at, kept = draw(gap), []
    for number in range(count + 1):
        if number == before:
            start = at
            at += sizes[0] * sizes[1] * sizes[2]
        if number < count:
            shape, aligned, times = references[number]
            kept.append(Reference(at, *shape, aligned=aligned, times=times))
            at = kept[-1].stop + draw(gap)
    video = sizes[0] * sizes[1] * sizes[2]
    return TokenGrid(*sizes, start, at - start - video, references=tuple(kept))


@pytest.mark.filterwarnings("ignore:references='local'", "ignore:a reference of")
@settings(max_examples=40, deadline=None)
@given(sequences(), st.sampled_from(sorted(METHODS)))
def test_any_layout(grid: TokenGrid, name: str) -> None:
    check(METHODS[name], grid)


@pytest.mark.filterwarnings("ignore:references='local'")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["clear", "gna", "freeswim", "radial", "radial, paper", "tile"])
def test_attention_and_gradients(name: str, policy: str) -> None:
    grid = LAYOUTS["two references" if "clear" in name else "a video of its size"]
    method = replace(METHODS[name], references=policy)
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(1, grid.tokens, 2, 16, generator=generator, dtype=torch.float64)
        for _ in range(4)
    )
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    site = diffattn.methods.Site("", 0, 1, grid)
    fitted = replace(method, **({"temperature": False} if name == "freeswim" else {}))
    out = fitted.attend(*tensors, site)
    grads = torch.autograd.grad(out, tensors, upstream)
    expected = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = oracle(fitted, grid)
    scores = torch.einsum("bqhd,bkhd->bhqk", *expected[:2]) / 4
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    want = torch.einsum("bhqk,bkhd->bqhd", weights, expected[2])
    for found, wanted in zip(
        (out, *grads), (want, *torch.autograd.grad(want, expected, upstream)), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_without_references_policies_are_one(name: str) -> None:
    grid = TokenGrid(2, 4, 6, 5, 9)
    exact, visible, local = policies(METHODS[name])
    for method in (visible, local):
        assert torch.equal(method.mask(grid).dense(), exact.mask(grid).dense())
        assert type(method.mask(grid)) is type(exact.mask(grid))
        assert method.order(grid) == exact.order(grid)
        assert method.mask(grid) is method.mask(TokenGrid(2, 4, 6, 5, 9))


@pytest.mark.parametrize("name", ["clear", "gna", "freeswim", "radial, paper", "tile"])
def test_a_copy_of_the_video_is_seen_as_the_video(name: str) -> None:
    grid = TokenGrid(3, 4, 6, 90, 0, references=(Reference(7, 3, 4, 6),))
    mask = replace(METHODS[name], references="local").mask(grid).dense()
    own, copy = slice(90, 162), slice(7, 79)
    for rows, columns in ((own, copy), (copy, own), (copy, copy)):
        assert torch.equal(mask[rows, columns], mask[own, own])


def test_text_sees_and_is_seen_under_every_policy() -> None:
    grid = LAYOUTS["two references"]
    inside = torch.zeros(grid.tokens, dtype=torch.bool)
    inside[grid.video] = True
    for reference in grid.references:
        inside[reference.start : reference.stop] = True
    for method in policies(METHODS["clear"]):
        mask = method.mask(grid).dense()
        assert mask[~inside].all()
        assert mask[:, ~inside].all()


class TestWarnings:
    def test_no_rule_between_grids(self) -> None:
        grid = LAYOUTS["a video of its size"]
        with pytest.warns(UserWarning, match="references='local' is references='visible' here"):
            replace(METHODS["checkers"], references="local").mask(grid)

    def test_no_aligned_reference(self) -> None:
        with pytest.warns(UserWarning, match="clear has no rule between these grids"):
            replace(METHODS["clear"], references="local").mask(LAYOUTS["not aligned"])

    def test_nothing_to_say_without_large_references(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replace(METHODS["clear"], references="local").mask(LAYOUTS["small ones"])

    def test_parameters_that_do_not_fit_a_reference(self) -> None:
        grid = TokenGrid(1, 8, 8, 0, 24, references=(Reference(64, 1, 6, 4),))
        method = Gna(window=(1, 4, 4), dilation=(1, 2, 2))
        with pytest.warns(UserWarning, match="a reference of 1x6x4 tokens attends to all tokens"):
            mask = method.mask(grid).dense()
        assert mask[64:].all()
        assert mask[:, 64:].all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            method.order(grid)  # the reason has been said


def test_a_policy_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="references is 'all', but must be one of exact, visible"):
        GNAAttn(references="all")


class TestOrders:
    def test_each_grid_keeps_its_own_order(self) -> None:
        grid = TokenGrid(1, 8, 16, 40, 200, references=(Reference(200, 1, 8, 16),))
        order = CLEARAttn().order(grid)
        assert order is not None
        for start in (40, 200):
            view = TokenGrid(1, 8, 16, start, grid.tokens - start - 128)
            own = TileOrder(view, (1, 8, 16)).positions()[start : start + 128]
            assert torch.equal(order.positions()[start : start + 128], own)

    def test_tiles_stay_blocks_whatever_stands_before(self) -> None:
        grid = TokenGrid(1, 16, 16, 70, 256 + 60, references=(Reference(330, 1, 16, 16),))
        there = CLEARAttn().order(grid).positions()
        for start in (70, 330):
            first = -(-start // 128) * 128
            block = there[first : first + 128] - start
            assert block.min() >= 0
            rows, columns = block // 16, block % 16
            assert int(rows.max() - rows.min()) + 1 == 8
            assert int(columns.max() - columns.min()) + 1 == 16

    def test_only_a_reference_has_an_order(self) -> None:
        grid = TokenGrid(1, 2, 2, 0, 64, references=(Reference(4, 1, 8, 8),))
        beside = TileOrder(TokenGrid(1, 8, 8, 4, 0), (1, 4, 4))
        order = joined_order(grid, [None, beside])
        assert torch.equal(order.positions()[:4], torch.arange(4))
        assert torch.equal(order.positions()[4:], beside.positions()[4:])
        assert joined_order(grid, [None, None]) is None

    def test_orders_of_other_sequences_are_refused(self) -> None:
        with pytest.raises(ValueError, match="an order of 16 tokens cannot stand beside an order"):
            TileOrder(TokenGrid(1, 8, 8), (1, 4, 4), (TileOrder(TokenGrid(1, 4, 4), (1, 2, 2)),))


def pictures(text: int, *sides: int) -> TokenGrid:
    """A square picture after its text, and square references after the picture."""
    start, references = text + sides[0] ** 2, []
    for side in sides[1:]:
        references.append(Reference(start, 1, side, side))
        start = references[-1].stop
    return TokenGrid(
        1, sides[0], sides[0], text, start - text - sides[0] ** 2, references=tuple(references)
    )


class TestPublishedFigures:
    """Shares of pairs and of blocks on real sequences, as measured when policies were chosen."""

    KONTEXT, KONTEXT_2048 = pictures(512, 64, 64), pictures(512, 128, 128)
    EDIT_PLUS, FLUX2 = pictures(300, 83, 64, 64), pictures(512, 128, 64, 64, 64)
    H3 = TokenGrid(37, 15, 26, 614)
    KEY_FRAMES = TokenGrid(
        37, 15, 26, 1394,
        references=(Reference(200, 1, 15, 26, times=(0,)), Reference(590, 1, 15, 26, times=(36,))),
    )  # fmt: skip
    REF2VA = TokenGrid(37, 15, 26, 15044, references=(Reference(200, 37, 15, 26),))
    HALF = TokenGrid(16, 22, 38, 0, 3344, references=(Reference(13376, 16, 11, 19),))
    SAME = TokenGrid(16, 22, 38, 0, 13376, references=(Reference(13376, 16, 22, 38),))
    DISKS = CLEARAttn(first_frame=False)

    @pytest.mark.filterwarnings("ignore:references='local'")
    @pytest.mark.parametrize(
        ("method", "grid", "figures"),
        [
            (CLEARAttn(), KONTEXT, "0.813/0.852 0.626/0.704 0.251/0.408"),
            (GNAAttn(), KONTEXT, "0.865/0.865 0.730/0.730 0.460/0.460"),
            (CLEARAttn(), KONTEXT_2048, "0.768/0.782 0.536/0.563 0.073/0.127"),
            (GNAAttn(), KONTEXT_2048, "0.786/0.786 0.572/0.572 0.144/0.144"),
            (CLEARAttn(), EDIT_PLUS, "0.819/0.852 0.699/0.762 0.579/0.665"),
            (CLEARAttn(), FLUX2, "0.699/0.716 0.649/0.677 0.549/0.598"),
            (DISKS, H3, "0.303/0.444"),
            (GNAAttn(), H3, "0.231/0.357"),
            (RadialAttn(), H3, "0.356/0.358"),
            (GNAAttn(), KEY_FRAMES, "0.305/0.418 0.304/0.418 0.304/0.418"),
            (GNAAttn(), REF2VA, "0.800/0.833 0.600/0.668 0.199/0.336"),
            (RadialAttn(), REF2VA, "0.832/0.833 0.665/0.666 0.329/0.332"),
            (RadialAttn(), HALF, "0.667/0.669 0.646/0.647 0.646/0.647"),
            (DISKS, SAME, "0.828/0.904 0.655/0.808 0.310/0.609"),
        ],
    )
    def test_density(self, method: StaticMaskMethod, grid: TokenGrid, figures: str) -> None:
        family = {1: "flux", 16: "ltx"}.get(grid.frames, "hunyuanvideo")
        for policy, expected in zip(POLICIES, figures.split(), strict=False):
            fitted = replace(method, references=policy).for_model(family, grid.alone)
            layout = fitted.layout(grid, torch.device("cpu"), fitted.order(grid))
            pairs, blocks = map(float, expected.split("/"))
            assert allowed_pairs(layout) / grid.tokens**2 == pytest.approx(pairs, abs=0.00061)
            assert layout.density == pytest.approx(blocks, abs=0.00061)


class TestPlans:
    GRID = TokenGrid(1, 16, 16, 40, 300, references=(Reference(296, 1, 16, 16),))

    def test_a_plan_counts_references_and_says_the_policy(self) -> None:
        plans = [
            diffattn.plan(self.GRID, CLEARAttn(radius=5, references=policy)) for policy in POLICIES
        ]
        assert plans[0].density > plans[1].density > plans[2].density
        for policy, plan in zip(POLICIES, plans, strict=True):
            mask = CLEARAttn(radius=5, references=policy).mask(self.GRID).dense()
            assert plan.density == pytest.approx(float(mask.double().mean()))
            assert policy in str(plan)
            assert plan.to_dict()["method"]["references"] == policy
            assert plan.to_dict()["grid"]["references"][0]["start"] == 296
        assert "1x16x16+84 text+reference 1x16x16" in str(plans[0])

    def test_small_references_are_named(self) -> None:
        grid = TokenGrid(1, 16, 16, 0, 20, references=(Reference(256, 1, 4, 5),))
        assert "visible, 0 of 1 with pairs left out (1x4x5: as text)" in str(
            diffattn.plan(grid, CLEARAttn())
        )

    def test_blocks_of_references_count_as_blocks_of_pictures(self) -> None:
        grid = TokenGrid(1, 64, 64, 512, 4096, references=(Reference(4608, 1, 64, 64),))
        fitted = GNAAttn().for_model("flux", grid.alone)
        assert diffattn.plan(grid, fitted).is_block_sparse
        assert not diffattn.plan(grid, CLEARAttn()).is_block_sparse
