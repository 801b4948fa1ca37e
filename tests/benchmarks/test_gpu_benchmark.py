"""benchmarks/gpu.py without a GPU: its cases, masks, counts, verdicts, files and the whole run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import gpu
import gpu_candidates
import gpu_measure
import pytest
import torch
from gpu_accuracy import errors
from gpu_candidates import (
    Candidate,
    UnavailableError,
    dense,
    fastvideo,
    flashinfer,
    flex,
    flex_candidate,
    forward_kernel,
    natten,
    public,
    raw,
    tiles,
)
from gpu_layouts import ALIGNED, EXACT, KINDS, Mask, attended_pairs, make_mask, tile_order
from gpu_measure import Run, expected_seconds, prepared, run_groups
from gpu_report import (
    FAIL,
    INCOMPLETE,
    NOT_MEASURED,
    PASS,
    LeftOut,
    MaskRow,
    Results,
    Row,
    markdown,
    summary_table,
    verdicts,
    write,
)
from gpu_shapes import BACKWARD, DENSITIES, FORWARD, SHAPES, TINY_SHAPES, Group, Shape, groups
from gpu_timing import Budget, DeviceTimer, HostTimer, Spread, describe, interleave, median_ratio

from diffattn import TokenGrid
from diffattn.blocks import layout_from_states

CPU = torch.device("cpu")
SCRIPT = Path(gpu.__file__)
RAGGED = Shape("ragged", TokenGrid(3, 9, 11, text_before=5), heads=3, head_dim=16)  # 302 tokens
PLAIN = Shape("plain", TokenGrid(2, 9, 17), heads=2, head_dim=16)  # 306 tokens, no text
PICTURE = Shape("picture", TokenGrid(1, 17, 23), heads=2, head_dim=16)


def two_masks(shape: Shape) -> list[Mask]:
    return [make_mask(shape.grid, kind, 0.8, CPU) for kind in KINDS]


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "tokens", "tera_flops"),
    # specs/kernels.md, D.1: N and attention TFLOP of a layer
    [
        ("wan-1.3b-480p", 32_760, 6.594),
        ("wan-14b-720p", 75_600, 117.05),
        ("hunyuan-720p", 119_056, 174.17),
        ("flux-1024", 4_608, 0.261),
        ("flux-4096", 66_048, 53.6),
        ("cogvideox-5b", 17_776, 3.88),
    ],
)
def test_shapes_are_those_of_the_table(name: str, tokens: int, tera_flops: float) -> None:
    shape = next(s for s in SHAPES if s.name == name)
    assert shape.tokens == tokens
    assert shape.flops(tokens**2, FORWARD) / 1e12 == pytest.approx(tera_flops, rel=2e-3)
    assert shape.flops(tokens**2, BACKWARD) == 2.5 * shape.flops(tokens**2, FORWARD)


def test_every_shape_is_in_the_table_and_both_head_sizes_are_there() -> None:
    assert len(SHAPES) == 6
    assert {s.head_dim for s in SHAPES} == {64, 128}


def test_groups_come_in_the_order_of_the_shapes_forward_first() -> None:
    names = [group.name for group in groups(SHAPES[:2])]
    assert names == [f"{s.name} {d}" for s in SHAPES[:2] for d in (FORWARD, BACKWARD)]


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("shape", [RAGGED, PLAIN, PICTURE, *TINY_SHAPES], ids=lambda s: s.name)
def test_tile_order_has_every_token_once_and_text_in_its_place(shape: Shape) -> None:
    order = tile_order(shape.grid, CPU)
    assert torch.equal(order.sort().values, torch.arange(shape.tokens))
    text = shape.grid.is_text(torch.arange(shape.tokens))
    assert torch.equal(order[text], torch.arange(shape.tokens)[text])


def test_a_block_of_the_tile_order_is_a_tile_where_tiles_divide_the_grid() -> None:
    grid = TokenGrid(8, 12, 24)
    coordinates = torch.stack(grid.coordinates(tile_order(grid, CPU)), -1).view(-1, 128, 3)
    extent = coordinates.amax(1) - coordinates.amin(1) + 1
    assert torch.equal(extent, torch.tensor([4, 4, 8]).expand(len(extent), -1))
    # and the next block is a neighbour
    corner = coordinates.amin(1)
    assert torch.equal(
        ((corner[1:] - corner[:-1]).abs() / torch.tensor([4, 4, 8])).sum(1),
        torch.ones(len(extent) - 1),
    )


def brute_force(shape: Shape, mask: Mask) -> torch.Tensor:
    """The window mask from its definition, token by token, in plain Python."""
    grid = shape.grid
    order = tile_order(grid, CPU).tolist()
    axes = (grid.frames, grid.height, grid.width)
    places: list[tuple[int, ...] | None] = []
    for token in order:
        position = token - grid.text_before
        inside = 0 <= position < grid.video_tokens
        frame, rest = divmod(position, grid.height * grid.width)
        places.append((frame, *divmod(rest, grid.width)) if inside else None)

    def sees(q: tuple[int, ...] | None, k: tuple[int, ...] | None) -> bool:
        if q is None or k is None:
            return True
        assert mask.window is not None
        for i, j, n, w in zip(q, k, axes, mask.window, strict=True):
            first = min(max(i - w // 2, 0), n - w)
            if not first <= j < first + w:
                return False
        return True

    return torch.tensor([[sees(q, k) for k in places] for q in places])


@pytest.mark.parametrize("shape", [RAGGED, PLAIN, PICTURE], ids=lambda s: s.name)
def test_token_exact_masks_are_windows_token_by_token(shape: Shape) -> None:
    mask = make_mask(shape.grid, EXACT, 0.7, CPU)
    truth = brute_force(shape, mask)
    assert 0 < truth.sum() < truth.numel()
    assert torch.equal(mask.layout.dense()[0, 0], truth)
    token = torch.arange(shape.tokens)
    assert torch.equal(mask.rule(token[:, None], token[None]), truth)
    assert attended_pairs(mask.layout) == int(truth.sum())
    assert mask.layout.partial_blocks


def test_block_aligned_masks_have_full_blocks_only_and_text_that_sees_all() -> None:
    shape = TINY_SHAPES[0]
    mask = make_mask(shape.grid, ALIGNED, 0.2, CPU)
    dense_mask = mask.layout.dense()[0, 0]
    token = torch.arange(shape.tokens)
    assert mask.layout.partial_blocks == 0
    assert torch.equal(mask.rule(token[:, None], token[None]), dense_mask)
    assert attended_pairs(mask.layout) == int(dense_mask.sum())
    text = shape.grid.is_text(token)
    assert text.any()
    assert dense_mask[text].all()
    assert dense_mask[:, text].all()
    assert dense_mask.diagonal().all()


def test_neighbouring_rows_of_a_block_aligned_mask_visit_about_as_many_blocks() -> None:
    count_ = make_mask(TINY_SHAPES[1].grid, ALIGNED, 0.2, CPU).layout.full_count
    assert int(count_.max()) - int(count_.min()) <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_block_aligned_densities_are_those_asked_for_to_half_a_block(shape: Shape) -> None:
    for density in DENSITIES:
        layout = make_mask(shape.grid, ALIGNED, density, CPU).layout
        assert abs(layout.density - density) <= 0.5001 / layout.rows**2


@pytest.mark.parametrize(
    ("name", "density"),
    # Larger shapes take seconds each on a CPU: one shows that text before the video does no harm.
    [*(("flux-1024", density) for density in DENSITIES), ("cogvideox-5b", 0.2)],
)
def test_token_exact_densities_are_near_those_asked_for(name: str, density: float) -> None:
    shape = next(s for s in SHAPES if s.name == name)
    layout = make_mask(shape.grid, EXACT, density, CPU).layout
    assert layout.density == pytest.approx(density, rel=0.1)
    assert (layout.partial_blocks > 0) == (density < 1)


def test_a_density_that_text_alone_exceeds_is_refused() -> None:
    grid = TokenGrid(1, 16, 24, text_before=200)
    with pytest.raises(ValueError, match=r"a density of 0\.1 leaves no block for the 3 blocks of"):
        make_mask(grid, ALIGNED, 0.1, CPU)


def test_at_a_density_of_one_both_kinds_are_the_same_and_measured_once() -> None:
    masks = [make_mask(RAGGED.grid, kind, 1.0, CPU) for kind in KINDS]
    assert all(mask.layout.dense().all() for mask in masks)
    assert gpu_candidates.masks_of(masks) == masks[:1]


def test_attended_pairs_counts_bits_of_masks_in_use_only() -> None:
    torch.manual_seed(0)
    states = torch.randint(0, 3, (4, 5)).to(torch.uint8)
    layout = layout_from_states(
        states,
        lambda row, column: torch.rand(row.numel(), 32, 48) < 0.5,
        tokens_q=101, tokens_kv=211, block_q=32, block_kv=48,
    )  # fmt: skip
    assert layout.partial_blocks > 1
    assert attended_pairs(layout) == int(layout.dense().sum())


# ---------------------------------------------------------------- candidates


def check(candidate: Candidate, shape: Shape, *, backward: bool) -> dict[str, float]:
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, shape.tokens, shape.heads, shape.head_dim) for _ in range(3))
    return errors(candidate, shape, q, k, v, backward=backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("make", [public, raw])
def test_our_candidates_are_right(make: Any, backward: bool) -> None:
    for mask in two_masks(RAGGED):
        found = check(make(RAGGED, mask, torch.float32), RAGGED, backward=backward)
        assert set(found) == ({"dq", "dk", "dv"} if backward else {"out"})
        assert all(error < 1e-5 for error in found.values()), found


@pytest.mark.parametrize("backward", [False, True])
def test_the_error_of_a_wrong_mask_is_large(backward: bool) -> None:
    small, large = (make_mask(RAGGED.grid, ALIGNED, density, CPU) for density in (0.8, 1.0))
    wrong = replace(public(RAGGED, large, torch.float32), mask=small)
    found = check(wrong, RAGGED, backward=backward)
    assert max(found.values()) > 0.05


def test_an_error_in_one_far_off_gradient_row_counts() -> None:
    mask = two_masks(RAGGED)[0]
    right = public(RAGGED, mask, torch.float32)

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            grad = grad.clone()
            grad[:, -1] += 1
            return grad

    wrong = replace(right, attend=lambda q, k, v: right.attend(q, Spoiled.apply(k), v))
    found = check(wrong, RAGGED, backward=True)
    assert found["dk"] > 0.1
    assert found["dq"] < 1e-5
    assert found["dv"] < 1e-5


def test_dense_flash_is_right_and_cudnn_is_left_out_with_its_reason_on_the_cpu() -> None:
    assert check(dense("flash"), RAGGED, backward=True)["dq"] < 1e-5
    with pytest.raises(RuntimeError, match="No viable backend"):
        check(dense("cudnn"), RAGGED, backward=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_has_the_same_mask() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    for mask in two_masks(RAGGED):
        candidate = flex_candidate(mask, flex_attention)
        assert check(candidate, RAGGED, backward=False)["out"] < 1e-5
        with pytest.raises(UnavailableError, match="compared on GPUs only"):
            flex(RAGGED, mask, torch.float32)


def attend_by_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visited: torch.Tensor, block: int
) -> torch.Tensor:
    """Dense attention, (heads, tokens, d), under a bool map of blocks (heads, rows, columns)."""
    mask = visited.repeat_interleave(block, 1).repeat_interleave(block, 2)
    mask = mask[:, : q.shape[1], : k.shape[1]]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_flashinfer_is_given_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: dict[str, Any] = {}

    class Variable:
        def __init__(self, workspace: torch.Tensor) -> None:
            assert workspace.dtype == torch.uint8

        def plan(self, visited: Any, rows: Any, columns: Any, *heads: int, **types: Any) -> None:
            assert heads == (3, 3, 16)
            assert rows.sum(1).tolist() == columns.sum(1).tolist() == [302] * 3
            planned.update(types, visited=visited)

        def run(self, q: Any, k: Any, v: Any) -> torch.Tensor:
            return attend_by_blocks(q, k, v, planned["visited"], 128)

    module = types.ModuleType("flashinfer")
    module.VariableBlockSparseAttentionWrapper = Variable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    candidate = flashinfer(RAGGED, two_masks(RAGGED)[0], torch.float32)
    assert check(candidate, RAGGED, backward=False)["out"] < 1e-5
    assert planned["q_data_type"] == planned["kv_data_type"] == torch.float32
    assert not candidate.backward


def test_flashinfer_is_given_the_same_partial_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("whole", TokenGrid(2, 8, 24), heads=2, head_dim=16)  # 3 blocks
    planned: list[Any] = []

    class Bsr:
        def __init__(self, workspace: torch.Tensor) -> None: ...

        def plan(self, *blocks: Any, mask: Any, **types: Any) -> None:
            planned.extend([*blocks, mask])

        def run(self, q: Any, k: Any, v: Any) -> torch.Tensor:
            indptr, indices, tokens_q, tokens_kv, block_q, block_kv, *heads, mask = planned
            assert heads == [2, 2, 16]
            allowed = torch.zeros(tokens_q, tokens_kv, dtype=torch.bool)
            for row, (start, stop) in enumerate(pairwise(indptr.tolist())):
                for i in range(start, stop):
                    column = int(indices[i])
                    allowed[row * block_q :, column * block_kv :][:block_q, :block_kv] = mask[i]
            return attend_by_blocks(
                *(x.transpose(0, 1) for x in (q, k, v)), allowed.expand(2, -1, -1), 1
            ).transpose(0, 1)

    module = types.ModuleType("flashinfer")
    module.BlockSparseAttentionWrapper = Bsr  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    mask = make_mask(shape.grid, EXACT, 0.7, CPU)
    assert mask.layout.partial_blocks
    assert check(flashinfer(shape, mask, torch.float32), shape, backward=False)["out"] < 1e-5


def test_fastvideo_is_given_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def block_sparse_attn(
        q: Any, k: Any, v: Any, block_map: torch.Tensor, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        assert q.shape == (1, 3, 320, 16)
        assert q.is_contiguous()
        assert sizes.tolist() == [64, 64, 64, 64, 302 - 256]
        assert sizes.dtype == torch.int32
        assert block_map.shape == (1, 3, 5, 5)
        tokens = int(sizes.sum())
        out = attend_by_blocks(q[0], k[0, :, :tokens], v[0, :, :tokens], block_map[0], 64)
        return out[None], None

    module = types.ModuleType("fastvideo_kernel.block_sparse_attn")
    module.block_sparse_attn = block_sparse_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", types.ModuleType("fastvideo_kernel"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    aligned, exact = two_masks(RAGGED)
    for backward in (False, True):
        found = check(fastvideo(RAGGED, aligned, torch.float32), RAGGED, backward=backward)
        assert max(found.values()) < 1e-5
    with pytest.raises(UnavailableError, match="whole blocks only"):
        fastvideo(RAGGED, exact, torch.float32)


@pytest.mark.parametrize("shape", [PLAIN, PICTURE], ids=lambda s: s.name)
def test_natten_is_given_the_same_windows(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    def neighbourhood(q: Any, k: Any, v: Any, kernel_size: tuple[int, ...]) -> torch.Tensor:
        axes = q.shape[1:-2]
        grid = torch.stack(torch.meshgrid(*map(torch.arange, axes), indexing="ij"), -1)
        at, size = grid.flatten(0, -2), torch.tensor(kernel_size)
        first = (at - size // 2).clamp(min=0).minimum(torch.tensor(axes) - size)
        step = at[None] - first[:, None]
        allowed = ((step >= 0) & (step < size)).all(-1)
        flat = (x.flatten(1, len(axes)).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=allowed)
        return out.transpose(1, 2).unflatten(1, axes)

    module = types.ModuleType("natten")
    module.na2d = module.na3d = neighbourhood  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "natten", module)
    aligned, exact = two_masks(shape)
    for backward in (False, True):
        found = check(natten(shape, exact, torch.float32), shape, backward=backward)
        assert max(found.values()) < 1e-5
    with pytest.raises(UnavailableError, match="over single tokens"):
        natten(shape, aligned, torch.float32)
    with pytest.raises(UnavailableError, match="no place for text"):
        natten(RAGGED, two_masks(RAGGED)[1], torch.float32)


needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs Triton on CPU tensors"
)


@needs_interpreter
def test_the_plain_variant_and_other_tiles_are_right() -> None:
    aligned, exact = two_masks(PLAIN)
    candidate = forward_kernel("plain", PLAIN, exact, torch.float32)
    assert check(candidate, PLAIN, backward=False)["out"] < 1e-5
    assert candidate.name == "diffattn plain"
    other = next(iter(tiles(FORWARD)))(PLAIN, aligned, torch.float32)
    assert other.name == "diffattn plain 64x64 w4 s2"
    assert check(other, PLAIN, backward=False)["out"] < 1e-5


def test_a_variant_that_does_not_take_a_mask_says_so() -> None:
    exact = two_masks(PLAIN)[1]
    with pytest.raises(UnavailableError, match="tma_ws does not take token-exact layouts"):
        forward_kernel("tma_ws", PLAIN, exact, torch.bfloat16)


def test_sweeping_the_backward_pass_replaces_the_tiles_of_one_kernel_and_puts_them_back() -> None:
    from diffattn.kernels.block_sparse.launch import Problem

    q = torch.zeros(1, PLAIN.tokens, PLAIN.heads, PLAIN.head_dim)
    mask = two_masks(PLAIN)[0]
    problem = Problem.of(q, q, q, mask.layout.tensors, None, 128, 128)
    kernels = ("forward", "queries", "keys")
    shipped = [problem.tiles(kernel) for kernel in kernels]
    for make in tiles(BACKWARD):
        candidate = make(PLAIN, mask, torch.float32)
        kernel = candidate.name.split()[1]
        with candidate.context():
            found = [problem.tiles(k) for k in kernels]
        config = found[kernels.index(kernel)]
        sizes = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
        assert candidate.name == f"diffattn {kernel} {sizes}"
        assert [c for c, k in zip(found, kernels, strict=True) if k != kernel] == [
            c for c, k in zip(shipped, kernels, strict=True) if k != kernel
        ]
        assert [problem.tiles(k) for k in kernels] == shipped


# ---------------------------------------------------------------- time


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedTimer:
    """Calls, and takes as many milliseconds as the call returns."""

    def milliseconds(self, call: Any) -> float:
        return float(call())


def test_the_cache_is_overwritten_before_a_call_and_outside_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    properties = types.SimpleNamespace(L2_cache_size=100 << 20)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    timer = DeviceTimer(CPU)
    assert timer._scratch.nbytes == 400 << 20
    timer._scratch[::4096] = 1
    seen: list[int] = []
    took = timer.milliseconds(lambda: seen.append(int(timer._scratch[::4096].max())))
    assert seen == [0]
    start = time.perf_counter()
    timer._scratch.zero_()
    assert took < 1000 * (time.perf_counter() - start)


def test_rounds_are_interleaved_and_turn_around() -> None:
    order: list[str] = []

    def prepare(name: str) -> Any:
        return lambda round_: lambda: order.append(f"{name}{round_}") or len(order)

    times, failed = interleave(
        {"a": prepare("a"), "b": prepare("b")}, ScriptedTimer(), least=3, most=3, seconds=0
    )
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert times == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert not failed


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 2), (25, 3), (1000, 5)])
def test_rounds_end_with_their_time_but_not_before_the_least(seconds: float, rounds: int) -> None:
    clock = FakeClock()

    def ten_seconds() -> float:
        clock.now += 10
        return 1.0

    times, _ = interleave(
        {"a": lambda _: ten_seconds}, ScriptedTimer(),
        least=2, most=5, seconds=seconds, clock=clock,
    )  # fmt: skip
    assert len(times["a"]) == rounds


def test_a_call_that_fails_is_dropped_with_its_reason_and_the_others_go_on() -> None:
    def fails_in_the_second_round(round_: int) -> Any:
        if round_ == 1:
            raise MemoryError("no room\nfor more")
        return lambda: 1.0

    times, failed = interleave(
        {"bad": fails_in_the_second_round, "good": lambda _: lambda: 2.0},
        ScriptedTimer(), least=3, most=3, seconds=0,
    )  # fmt: skip
    assert times == {"good": [2.0] * 3}
    assert failed == {"bad": "MemoryError: no room"}


def test_spread_and_ratio() -> None:
    spread = Spread.of([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (spread.median, spread.low, spread.high) == pytest.approx((3.0, 1.4, 4.6))
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    # Both slow down together in the last rounds: the ratio does not change.
    assert median_ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == 2.0


def test_descriptions_are_one_line_with_notes() -> None:
    error = ValueError("first\nsecond")
    error.add_note("a note\nof two lines")
    assert describe(error) == "ValueError: first; a note"
    assert describe(KeyError()) == "KeyError"


def a_run(clock: FakeClock, minutes: float, results: Results | None = None) -> Run:
    return Run(
        device=CPU, dtype=torch.float32, timer=HostTimer(), budget=Budget(minutes, clock),
        results=results or Results({}), densities=(1.0, 0.5), variants=[], sweep=False,
        rounds=3, group_seconds=0.0,
    )  # fmt: skip


def test_groups_that_do_not_fit_into_the_minutes_are_listed_and_smaller_ones_measured() -> None:
    clock = FakeClock()
    small, large = Group(TINY_SHAPES[0], FORWARD), Group(SHAPES[2], BACKWARD)
    run = a_run(clock, minutes=2.0)
    assert expected_seconds(large, run) > 120 > expected_seconds(small, run)
    measured: list[str] = []
    saves = count()

    def measure(group: Group, run: Run) -> None:
        clock.now += 1
        measured.append(group.name)

    run_groups([small, large, small], run, measure, lambda: next(saves))
    assert measured == [small.name] * 2
    (left,) = run.results.left_out
    assert left.what == "hunyuan-720p backward"
    assert "s of the 119 s left of 2 minutes" in left.why
    assert next(saves) == 3


def test_slow_groups_make_the_later_ones_wait_for_more_time() -> None:
    clock = FakeClock()
    run = a_run(clock, minutes=10.0)
    group = Group(TINY_SHAPES[0], FORWARD)
    guess = expected_seconds(group, run)

    def ten_times_slower(group: Group, run: Run) -> None:
        clock.now += 10 * guess

    run_groups([group], run, ten_times_slower, lambda: None)
    assert expected_seconds(group, run) == pytest.approx(10 * guess)
    assert guess > 0


def test_time_grows_with_the_work() -> None:
    run = a_run(FakeClock(), minutes=9)
    seconds = {g.name: expected_seconds(g, run) for g in groups(SHAPES)}
    assert seconds["hunyuan-720p backward"] > seconds["hunyuan-720p forward"]
    assert seconds["hunyuan-720p forward"] > seconds["wan-1.3b-480p forward"]
    run.densities = (0.1,)
    assert expected_seconds(groups(SHAPES)[0], run) < seconds["wan-1.3b-480p forward"]


def test_inputs_are_used_in_turn_and_backward_times_no_forward() -> None:
    mask = two_masks(RAGGED)[0]
    events: list[str] = []
    sets = [tuple(torch.full((1, 302, 3, 16), float(i)) for _ in range(4)) for i in range(2)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        events.append(f"forward {q[0, 0, 0, 0]:.0f} {torch.is_grad_enabled()}")
        return q * 2 + k + v

    candidate = Candidate("fake", mask, attend)
    call = prepared(candidate, sets, backward=False)(1)
    assert events == []
    call()
    assert events == ["forward 1 False"]
    call = prepared(candidate, sets, backward=True)(2)
    assert events[1:] == ["forward 0 True"]
    gradients = call()
    assert len(events) == 2
    assert [float(g.mean()) for g in gradients] == [0.0, 0.0, 0.0]  # of an output weight of 0


# ---------------------------------------------------------------- verdicts


PLANNED = [("wan", FORWARD, 128), ("wan", BACKWARD, 128), ("cog", FORWARD, 64)]


def row(
    shape: str, direction: str, candidate: str, kind: str, asked: float, ms: float, **more: Any
) -> Row:
    facts: dict[str, Any] = {
        "head_dim": 128, "tokens": 1000, "density": asked, "attended": asked, "low": ms,
        "high": ms, "tflops": 500.0, "of_cudnn": 0.8, "of_best": 0.8, "first_call_s": 1.0,
        "error": 1e-3, "rounds": [ms, ms, ms],
    }  # fmt: skip
    return Row(shape, direction, candidate, kind=kind, asked=asked, ms=ms, **(facts | more))


def good_rows() -> list[Row]:
    rows = []
    for shape, direction, _ in PLANNED:
        for density in DENSITIES:
            rows.append(row(shape, direction, "diffattn", ALIGNED, density, 100 * density))
            rows.append(row(shape, direction, "flex", ALIGNED, density, 130 * density))
            if density < 1:
                ms = 140 * density
                rows.append(row(shape, direction, "diffattn", EXACT, density, ms))
                rows.append(row(shape, direction, "flex", EXACT, density, 1.2 * ms))
    return rows


def statuses(rows: list[Row]) -> list[str]:
    return [v.status for v in verdicts(Results({}, rows=rows, planned=PLANNED))]


def changed(match: dict[str, Any], **new: Any) -> list[Row]:
    rows = good_rows()
    hit = [i for i, r in enumerate(rows) if all(getattr(r, k) == x for k, x in match.items())]
    assert hit
    for i in hit:
        rows[i] = replace(rows[i], **new)
    return rows


def test_everything_met() -> None:
    found = verdicts(Results({}, rows=good_rows(), planned=PLANNED))
    assert [v.status for v in found] == [PASS] * 5
    assert [v.measured for v in found] == [3, 3, 9, 21, 9]
    assert all(v.measured == v.planned for v in found)


def test_nothing_measured() -> None:
    assert statuses([]) == [NOT_MEASURED] * 5


@pytest.mark.parametrize(
    ("match", "new", "failed"),
    [
        ({"direction": FORWARD, "asked": 0.2, "kind": ALIGNED}, {"of_cudnn": 0.74}, 0),
        ({"direction": BACKWARD, "asked": 0.1, "kind": ALIGNED}, {"of_cudnn": 0.59}, 1),
        ({"candidate": "diffattn", "asked": 0.1, "kind": ALIGNED}, {"ms": 11.2}, 2),
        ({"candidate": "flex", "asked": 1.0, "shape": "cog"}, {"ms": 99.0}, 3),
        ({"candidate": "flex", "asked": 0.2, "kind": EXACT}, {"ms": 28.0}, 3),  # as fast as ours
        ({"candidate": "diffattn", "asked": 0.5, "kind": EXACT}, {"ms": 75.5, "density": 0.5}, 4),
    ],
)
def test_one_case_that_misses_fails(match: dict, new: dict, failed: int) -> None:
    found = statuses(changed(match, **new))
    assert found[failed] == FAIL
    # The last case is slower than flex, too; all else is untouched.
    assert [s for i, s in enumerate(found) if i not in (failed, 3)] == [PASS] * (
        4 if failed == 3 else 3
    )


@pytest.mark.parametrize(
    ("match", "new"),
    [
        ({"direction": FORWARD, "asked": 0.2, "kind": ALIGNED}, {"of_cudnn": 0.75}),
        ({"direction": BACKWARD, "asked": 0.1, "kind": ALIGNED}, {"of_cudnn": 0.6}),
        # below the requirement, where it does not apply
        ({"direction": FORWARD, "asked": 1.0}, {"of_cudnn": 0.1}),
        ({"kind": EXACT}, {"of_cudnn": 0.1}),
        ({"shape": "cog"}, {"of_cudnn": 0.1}),
        ({"candidate": "diffattn", "asked": 0.1, "kind": ALIGNED}, {"ms": 10.9}),
        # a mask that is denser than asked may take longer in proportion
        ({"candidate": "diffattn", "asked": 0.1, "kind": ALIGNED}, {"ms": 12.0, "density": 0.12}),
    ],
)
def test_cases_on_the_right_side_pass(match: dict, new: dict) -> None:
    assert statuses(changed(match, **new)) == [PASS] * 5


def test_a_case_that_was_left_out_leaves_the_verdict_open() -> None:
    rows = [r for r in good_rows() if (r.shape, r.direction, r.asked) != ("wan", BACKWARD, 0.1)]
    assert statuses(rows) == [PASS, INCOMPLETE, INCOMPLETE, INCOMPLETE, INCOMPLETE]


def test_not_a_number_fails() -> None:
    rows = changed({"direction": FORWARD, "asked": 0.5, "kind": ALIGNED}, of_cudnn=float("nan"))
    assert statuses(rows)[0] == FAIL


def test_a_verdict_names_its_worst_case() -> None:
    rows = changed({"direction": FORWARD, "asked": 0.2, "kind": ALIGNED}, of_cudnn=0.5)
    text = str(verdicts(Results({}, rows=rows, planned=PLANNED))[0])
    assert text.startswith("FAIL: forward, head_dim 128, block-aligned, density 0.1-0.5: at least")
    assert text.endswith("worst 0.500 (wan forward block-aligned 0.2), 3 of 3 cases")


# ---------------------------------------------------------------- files


def some_results() -> Results:
    results = Results({"device": "none"}, rows=good_rows(), planned=PLANNED)
    results.left_out = [LeftOut("a", "no time"), LeftOut("b", "no time"), LeftOut("c", "broken")]
    results.masks = [
        MaskRow("wan", EXACT, 0.5, 0.5, 0.3, (3, 4, 5), 7, 8, 9, 12.0, 2**20, 2**21),
        MaskRow("wan", ALIGNED, 0.5, 0.5, 0.5, None, 7, 0, 0, 1.0, 2**20, None),
    ]
    return results


def test_markdown_has_a_line_for_every_case() -> None:
    text = markdown("A title", "How it is made", some_results())
    assert text.startswith("# A title\n")
    assert "- device: none" in text
    assert "| wan | forward | block-aligned | 0.100 | 10.000 | 500 | 80% | 80% | 1.30 |" in text
    assert "- a, b: no time\n- c: broken" in text
    assert "| wan | token-exact | 0.5 | 0.500 | 0.300 | 3x4x5 | 7 | 8 | 9 | 12 | 1.0 | 2 |" in text
    assert "| 1 | 1.0 | - |" in text
    assert text.count("PASS: ") == 5


def test_rows_of_every_table_are_as_wide_as_its_header() -> None:
    for block in markdown("t", "a", some_results()).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_the_summary_has_no_column_for_kernels_that_were_not_measured() -> None:
    rows = [r for r in good_rows() if r.candidate == "diffattn"]
    assert "flex" in summary_table(good_rows()).splitlines()[0]
    assert "flex" not in summary_table(rows).splitlines()[0]


def test_json_has_everything(tmp_path: Path) -> None:
    write(tmp_path / "new", "gpu", "t", "a", some_results())
    record = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert len(record["rows"]) == len(good_rows())
    assert record["rows"][0]["rounds"] == [100.0] * 3
    assert [v["status"] for v in record["verdicts"]] == [PASS] * 5
    assert record["left_out"][2] == {"what": "c", "why": "broken"}
    assert record["device"] == "none"


def test_a_write_that_fails_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "gpu", "t", "a", some_results())
    before = (tmp_path / "gpu.json").read_text()
    results = some_results()
    results.info["device"] = "other"

    def broken(self: Path, text: str) -> int:
        with open(self, "w") as file:
            file.write(text[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, "gpu", "t", "a", results)
    assert (tmp_path / "gpu.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


# ---------------------------------------------------------------- the program


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TINY_SHAPES", (PLAIN, PICTURE))


def test_dry_run_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    for package in ("flashinfer", "fastvideo_kernel", "natten"):
        monkeypatch.setitem(sys.modules, package, None)
    argv = ["--dry-run", "--densities", "1", "0.7", "--output", str(tmp_path)]
    assert gpu.main(argv) == 0
    record = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert "say nothing about any GPU" in record["title"]
    assert (tmp_path / "gpu-dry-run.md").read_text().startswith(f"# {record['title']}")
    found = {(r["shape"], r["direction"], r["candidate"], r["kind"]) for r in record["rows"]}
    assert found == {
        (shape, direction, *what)
        for shape in ("plain", "picture")
        for direction in (FORWARD, BACKWARD)
        for what in (("flash", "dense"), ("diffattn", ALIGNED), ("diffattn", EXACT))
    }
    for r in record["rows"]:
        assert r["error"] < 1e-5
        assert len(r["rounds"]) == 3
        assert 0 < r["low"] <= r["ms"] <= r["high"]
        shape = PLAIN if r["shape"] == "plain" else PICTURE
        flops = shape.flops(round(r["attended"] * shape.tokens**2), r["direction"])
        assert r["tflops"] == pytest.approx(flops / r["ms"] / 1e9)
        assert r["of_cudnn"] is None
    assert [r["of_best"] for r in record["rows"] if r["candidate"] == "flash"] == [1.0] * 4
    assert {m["kind"] for m in record["masks"]} == set(KINDS)
    assert all(c["public_us"] > 0 and c["permute_ms"] > 0 for c in record["calls"])
    reasons = {x["what"]: x["why"] for x in record["left_out"]}
    assert "No viable backend" in reasons["plain forward cudnn"]
    for package in ("flashinfer", "fastvideo", "natten"):
        assert reasons[f"plain forward {package}"].startswith("ModuleNotFoundError: ")
    assert "not measured: forward, head_dim 128" in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    measure = gpu_measure.measure_group
    calls = count()

    def interrupted(group: Group, run: Run) -> None:
        if next(calls):
            os.kill(os.getpid(), signal.SIGTERM)
        measure(group, run)

    monkeypatch.setattr(gpu, "measure_group", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        status = gpu.main(["--dry-run", "--densities", "0.7", "--output", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status == 130
    record = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert {(r["shape"], r["direction"]) for r in record["rows"]} == {("plain", FORWARD)}
    assert record["interrupted"].startswith("after ")
    interrupted_ = [x["what"] for x in record["left_out"] if x["why"] == "interrupted"]
    assert interrupted_ == ["plain backward", "picture forward", "picture backward"]


def test_a_run_without_time_measures_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    assert gpu.main(["--dry-run", "--minutes", "0", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert record["rows"] == []
    assert len(record["left_out"]) == 4
    assert all("left of 0 minutes" in x["why"] for x in record["left_out"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "benchmarks/gpu.py needs a GPU that torch can use (CUDA or ROCm), and there is none;"
        " --dry-run tries the program on the CPU\n"
    )


@pytest.mark.parametrize("text", ["0", "1.5", "-0.1"])
def test_densities_outside_of_zero_and_one_are_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.parse([f"--densities={text}"])
    assert f"{text} is not above 0 and at most 1" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_short_run_on_a_gpu(tmp_path: Path) -> None:
    command = [
        sys.executable, SCRIPT, "--minutes", "3", "--shapes", "flux-1024",
        "--densities", "1", "0.2", "--rounds", "3", "--output", tmp_path,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    record = json.loads((tmp_path / "gpu.json").read_text())
    ours = [r for r in record["rows"] if r["candidate"] == "diffattn"]
    assert len(ours) == 6
    assert all(r["error"] < 1e-2 for r in record["rows"])
    assert {"cudnn", "flash", "flex"} <= {r["candidate"] for r in record["rows"]}
