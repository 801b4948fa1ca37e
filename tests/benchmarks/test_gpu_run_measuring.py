"""The parts of a GPU run that measure, on a CPU: times, errors, and what is timed at all."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_run import compiling, rates, selecting, smoke, tune
from gpu_run.accuracy import Deviation, attend, check_gradients, check_output, worst
from gpu_run.adapter import NotTakenError
from gpu_run.candidates import MOST, RANKED, RISKY, label, ranked
from gpu_run.import_folder import ROOT
from gpu_run.journal import Journal
from gpu_run.masks import ALIGNED, EXACT, make_mask
from gpu_run.setting import Setting
from gpu_run.shapes import BACKWARD, FORWARD, Shape
from gpu_run.stages import KERNEL_TESTS, SMOKE, dry_stages, real_stages
from gpu_run.worker import MODULES
from triton_device import triton_device

from diffattn import SLAAttn, SolAttn, SVG2Attn, TokenGrid, VMoBAAttn, attention
from diffattn.kernels.common import tuned, variants
from diffattn.kernels.common.tile_tables import Choice, TileConfig
from diffattn.kernels.reference import reference_attention
from diffattn.pipelines.bench.timing import (
    DeviceTimer,
    HostTimer,
    Spread,
    describe,
    interleave,
    median_ratio,
)
from diffattn.routing import clusters

CPU = torch.device("cpu")
SHAPE = Shape("ragged", TokenGrid(3, 9, 11, text_before=5), heads=3, head_dim=16)  # 302 tokens

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs Triton on CPU tensors"
)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(
        device=CPU, dry=True, dtype=torch.float32, timer=HostTimer(),
        journal=Journal(tmp_path / "results.jsonl", "stage", "abc"), densities=(1.0, 0.8),
        tuning=(1.0, 0.8), compared=(1.0,), ends=time.monotonic() + 100,
    )  # fmt: skip


def rows(setting: Setting, kind: str) -> list[dict[str, Any]]:
    return [row for row in setting.journal.rows() if row["kind"] == kind]


# ---------------------------------------------------------------- time


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

        def query(self) -> bool:
            return False

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


class SimulatedGPU:
    """A device that does what the host launches, one after another, by a clock of its own.

    Attributes:
        host: milliseconds at which the host is.
        free: milliseconds at which the device has done all that was launched.
        fills: how often the buffer has been written.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0
        self.fills = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None:
                self.at = max(gpu.host, gpu.free)

            def query(self) -> bool:
                return self.at <= gpu.host

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Buffer:
            def zero_(self) -> None:
                gpu.fills += 1
                gpu.launch(0.005, 0.1)

        properties = types.SimpleNamespace(L2_cache_size=1 << 20)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch, "empty", lambda *size, **options: Buffer())

    def launch(self, host_ms: float, device_ms: float) -> None:
        self.host += host_ms
        self.free = max(self.host, self.free) + device_ms

    def wait(self) -> None:
        self.host = max(self.host, self.free)


@pytest.mark.parametrize("host_ms", [0.1, 0.9, 1.7, 6.0, 12.0])
def test_times_are_those_of_the_device_however_slow_the_host_is(
    host_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGPU(monkeypatch)
    timer = DeviceTimer(CPU)

    def three_kernels() -> None:
        for _ in range(3):
            gpu.launch(host_ms / 3, 0.2)

    assert timer.milliseconds(three_kernels) == pytest.approx(0.6)
    # The second time no head start is tried in vain.
    gpu.fills = 0
    assert timer.milliseconds(three_kernels) == pytest.approx(0.6)
    assert gpu.fills * 0.1 < max(1.1, 2.5 * host_ms)


def test_a_call_that_waits_for_the_device_is_repeated_a_few_times_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SimulatedGPU(monkeypatch)
    timer = DeviceTimer(CPU)
    calls: list[None] = []

    def waits() -> None:
        calls.append(None)
        gpu.launch(0.01, 0.2)
        gpu.wait()
        gpu.launch(0.5, 0.2)

    assert timer.milliseconds(waits) == pytest.approx(0.9)
    assert len(calls) == 6  # after head starts of 1, 2, 4, 8, 16 and again 1 ms
    assert timer.milliseconds(waits) == pytest.approx(0.9)
    assert len(calls) == 7


def test_rounds_are_interleaved_and_turn_around() -> None:
    order: list[str] = []

    def call(name: str) -> Any:
        return lambda: order.append(name) or len(order)

    times, failed = interleave(
        {"a": call("a"), "b": call("b")}, ScriptedTimer(), least=3, most=3, seconds=0
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert not failed


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 2), (25, 3), (1000, 5)])
def test_rounds_end_with_their_time_but_not_before_the_least(seconds: float, rounds: int) -> None:
    now = [100.0]

    def ten_seconds() -> float:
        now[0] += 10
        return 1.0

    times, _ = interleave(
        {"a": ten_seconds}, ScriptedTimer(),
        least=2, most=5, seconds=seconds, clock=lambda: now[0],
    )  # fmt: skip
    assert len(times["a"]) == rounds


def test_a_call_that_fails_is_dropped_with_its_reason_and_the_others_go_on() -> None:
    calls = iter([1.0])

    def fails_the_second_time() -> float:
        for ms in calls:
            return ms
        raise MemoryError("no room\nfor more")

    times, failed = interleave(
        {"bad": fails_the_second_time, "good": lambda: 2.0},
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


def test_rounds_do_not_outlast_the_process(setting: Setting) -> None:
    late = replace(setting, dry=False, ends=time.monotonic() + 10)
    assert late.rounds(60.0)["seconds"] == pytest.approx(4.0, abs=0.1)
    assert late.rounds(1.0)["seconds"] == 1.0
    assert replace(late, ends=0.0).rounds(60.0)["seconds"] == 0.0


# ---------------------------------------------------------------- errors


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    size = (1, SHAPE.tokens, SHAPE.heads, SHAPE.head_dim)
    return [torch.randn(size).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("kind", [ALIGNED, EXACT])
def test_right_results_are_right_and_those_of_another_mask_are_not(kind: str) -> None:
    mask, other = (make_mask(SHAPE.grid, kind, density, CPU) for density in (0.8, 1.0))
    qkv = inputs()
    leaves = [x.requires_grad_() for x in inputs()]
    for layout, is_right in ((mask.layout, True), (other.layout, False)):
        out = attention(*leaves, layout)
        found = check_output(lambda out=out: out, qkv, mask.rule) | check_gradients(
            lambda grad, out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True),
            qkv,
            mask.rule,
        )
        assert set(found) == {"out", "dq", "dk", "dv"}
        assert [deviation.is_right for deviation in found.values()] == [is_right] * 4
        assert all((deviation.relative < 1e-5) == is_right for deviation in found.values())


def test_an_error_in_one_far_off_gradient_row_counts() -> None:
    mask = make_mask(SHAPE.grid, ALIGNED, 0.8, CPU)
    leaves = [x.requires_grad_() for x in inputs()]

    def spoiled(grad: torch.Tensor) -> list[torch.Tensor]:
        dq, dk, dv = torch.autograd.grad(attention(*leaves, mask.layout), leaves, grad)
        dk[:, -1] += 1
        return [dq, dk, dv]

    found = check_gradients(spoiled, inputs(), mask.rule)
    assert [found[name].is_right for name in ("dq", "dk", "dv")] == [True, False, True]
    assert worst(found)["right"] is False
    assert worst(found)["error"] == found["dk"].relative


def test_eager_attention_of_16_bits_is_its_own_measure() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = inputs(dtype)
        found = check_output(lambda q=q, k=k, v=v: attend(q, k, v, None), (q, k, v), None)
        assert found["out"].of_allowed < 1 / 3
        assert found["out"].relative > 1e-4


def test_textbook_lines_are_the_reference_and_0_where_nothing_is_seen() -> None:
    q, k, v = inputs(torch.float64)
    allowed = torch.rand(1, SHAPE.heads, SHAPE.tokens, SHAPE.tokens) < 0.3
    allowed[..., 7, :] = False
    out = attend(q, k, v, allowed)
    torch.testing.assert_close(out, reference_attention(q, k, v, allowed)[0])
    assert (out[:, 7] == 0).all()


def test_what_is_not_a_number_is_wrong() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    got = torch.tensor([1.0, torch.nan, 1.0])
    assert not Deviation.of(got, truth.float(), truth).is_right
    zero = torch.zeros(3, dtype=torch.float64)
    assert Deviation.of(zero.float(), zero.float(), zero).is_right
    found = {"a": Deviation(1.0, 7.0), "b": Deviation(float("nan"), float("nan"))}
    assert worst(found)["error"] != worst(found)["error"]


# ---------------------------------------------------------------- smoke

CASE = smoke.Case(140, 2, 16, torch.float32, batch=2, block=64, partial=True, empty=True)


@pytest.fixture
def checked(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the smoke stage with results that are given, and returns its row."""
    monkeypatch.setattr(smoke, "DRY_CASES", (CASE,))

    def run(results: Any) -> dict[str, Any]:
        monkeypatch.setitem(smoke.RESULTS, "fake", results)
        smoke.run("fake", setting)
        return rows(setting, "smoke")[-1]

    return run


def right(problem: smoke.Problem) -> dict[str, torch.Tensor]:
    return problem.expected("fake", torch.float32)


def test_right_results_pass(checked: Any, setting: Setting) -> None:
    row = checked(right)
    assert row["right"]
    assert row["same_bits"]
    assert set(row["deviations"]) == {"out", "dq", "dk", "dv"}
    assert not torch.are_deterministic_algorithms_enabled()
    # What has a row is not checked again.
    smoke.run("fake", setting)
    assert len(rows(setting, "smoke")) == 1


def test_what_is_not_written_is_seen(checked: Any) -> None:
    def unwritten(problem: smoke.Problem) -> dict[str, torch.Tensor]:
        found = right(problem)
        out = problem.q.new_empty(problem.q.shape)
        out[:, :-1] = found["out"][:, :-1]
        return found | {"out": out}

    row = checked(unwritten)
    assert not row["right"]
    assert row["deviations"]["out"]["relative"] != row["deviations"]["out"]["relative"]


def test_results_that_differ_the_second_time_are_wrong(checked: Any) -> None:
    calls: list[int] = []

    def moving(problem: smoke.Problem) -> dict[str, torch.Tensor]:
        calls.append(1)
        found = right(problem)
        return found | {"out": found["out"] * (1 + 1e-6 * len(calls))}

    row = checked(moving)
    assert not row["right"]
    assert not row["same_bits"]
    assert row["deviations"]["out"]["of_allowed"] < 1


def test_a_wrong_mask_is_wrong(checked: Any) -> None:
    def wrong(problem: smoke.Problem) -> dict[str, torch.Tensor]:
        return replace(problem, layout=dense_layout(problem)).expected("fake", torch.float32)

    assert not checked(wrong)["right"]


def dense_layout(problem: smoke.Problem) -> Any:
    case = replace(problem.case, partial=False, empty=False)
    return smoke._layout(case)


def test_a_kernel_that_raises_has_a_row_with_the_reason(checked: Any) -> None:
    def raises(problem: smoke.Problem) -> dict[str, torch.Tensor]:
        raise RuntimeError("PassManager::run failed\nand more")

    row = checked(raises)
    assert (row["right"], row["error"]) == (False, "RuntimeError: PassManager::run failed")


def test_a_call_that_is_not_taken_is_no_failure(checked: Any) -> None:
    def refuses(problem: smoke.Problem) -> dict[str, torch.Tensor]:
        raise NotTakenError("not on this chip")

    row = checked(refuses)
    assert (row["taken"], row["why"]) == (False, "not on this chip")


def test_a_broken_context_ends_the_process(checked: Any) -> None:
    def broken(problem: smoke.Problem) -> dict[str, torch.Tensor]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        checked(broken)


@needs_interpreter
@pytest.mark.parametrize("what", ["forward-plain", "queries-plain", "keys-plain", "clusters"])
def test_kernels_pass_in_the_interpreter(
    what: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_device(monkeypatch)
    case = replace(CASE, head_dim=64, tokens=70, heads=1, batch=1)
    _, _, found = smoke.check(what, case, setting)
    assert all(deviation.is_right for deviation in found.values()), found


def row_of_smoke(**facts: Any) -> dict[str, Any]:
    row = {"stage": "smoke:keys-tma", "kind": "smoke", "head_dim": 128, "taken": True,
           "right": True, "case": "a"}  # fmt: skip
    return row | facts


ENDED = {"stage": "smoke:keys-tma", "kind": "stage", "rc": 0}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([row_of_smoke(), ENDED], True),
        ([row_of_smoke(), row_of_smoke(case="b", taken=False), ENDED], True),
        ([row_of_smoke(right=False), row_of_smoke(), ENDED], True),  # the later one counts
        ([row_of_smoke(), ENDED, ENDED | {"rc": "settled before"}], True),
        ([row_of_smoke(), row_of_smoke(case="b", right=False), ENDED], False),
        ([row_of_smoke(), ENDED | {"rc": "time-out"}], False),
        ([row_of_smoke()], False),  # has not ended
        ([row_of_smoke(taken=False), ENDED], False),
        ([row_of_smoke(head_dim=64), ENDED], False),
        ([ENDED], False),
    ],
)
def test_what_has_passed(found: list[dict[str, Any]], expected: bool) -> None:
    assert smoke.passed(found, "keys-tma", 128) == expected


# ---------------------------------------------------------------- tuning


def choice(variant: str, block_m: int = 64) -> Choice:
    return Choice(variant, TileConfig(block_m, 64, 4, 2))


SHIPPED, OTHER, RISK = choice("plain"), choice("tma"), choice("gluon")


@pytest.fixture
def tuning(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(tune.adapter, "shipped", lambda kernel, head_dim: SHIPPED)
    monkeypatch.setitem(tune.RANKED, ("forward", 16), (RISK, OTHER))
    monkeypatch.setattr(tune, "DRY_CHOICES", 8)
    for variant in ("plain", "tma", "gluon"):
        journal = replace(setting.journal, stage=f"smoke:forward-{variant}")
        journal.add("smoke", what="x", case="a", head_dim=16, taken=True, right=True)
        journal.add("stage", rc=0)
    return replace(setting, timer=ScriptedTimer())


MS = {SHIPPED: 4.0, OTHER: 2.0, RISK: 1.0}


def place(**more: Any) -> tune.Place:
    facts: dict[str, Any] = {
        "name": "whole", "run": MS.__getitem__, "check": lambda one: {"out": Deviation(0.1, 0.5)},
    }  # fmt: skip
    return tune.Place(**(facts | more))


def test_every_choice_is_timed_beside_the_shipped_one(tuning: Setting) -> None:
    calls: list[str] = []

    def run(one: Choice) -> float:
        calls.append(one.variant)
        return MS[one]

    tune._time("forward", SHAPE, place(run=run), tuning)
    found = {row["variant"]: row for row in rows(tuning, "tune")}
    assert {name: row["of_shipped"] for name, row in found.items()} == {
        "plain": 1.0, "tma": 0.5, "gluon": 0.25,
    }  # fmt: skip
    assert found["tma"]["tiles"] == dataclasses.asdict(OTHER.tiles)
    assert [found[name]["shipped"] for name in ("plain", "tma")] == [True, False]
    # The risky one has not run before the others were done.
    assert calls == ["plain", "tma", "gluon", "plain"]


def test_others_have_their_rows_when_a_risky_form_hangs(tuning: Setting) -> None:
    def run(one: Choice) -> float:
        if one == RISK:
            raise KeyboardInterrupt
        return MS[one]

    with pytest.raises(KeyboardInterrupt):
        tune._time("forward", SHAPE, place(run=run), tuning)
    assert [row["variant"] for row in rows(tuning, "tune")] == ["plain", "tma"]


def test_what_has_not_passed_its_smoke_stage_is_not_run(tuning: Setting) -> None:
    replace(tuning.journal, stage="smoke:forward-gluon").add("stage", rc="time-out")
    ran: set[str] = set()

    def check(one: Choice) -> dict[str, Deviation]:
        ran.add(one.variant)
        return {"out": Deviation(0.1, 0.5)}

    tune._time("forward", SHAPE, place(check=check), tuning)
    assert ran == {"plain", "tma"}
    (row,) = (row for row in rows(tuning, "tune") if row["variant"] == "gluon")
    assert row["error"] == "the stage smoke:forward-gluon has not passed"
    assert "ms" not in row


@pytest.mark.parametrize("wrong", [Deviation(0.1, 1.5), Deviation(float("nan"), float("nan"))])
def test_wrong_results_are_not_timed(wrong: Deviation, tuning: Setting) -> None:
    def check(one: Choice) -> dict[str, Deviation]:
        return {"out": wrong if one == OTHER else Deviation(0.1, 0.5)}

    tune._time("forward", SHAPE, place(check=check), tuning)
    assert ["ms" in row for row in rows(tuning, "tune") if row["variant"] == "tma"] == [False]


def test_choices_that_do_not_compile_or_do_not_take_the_call_say_so(tuning: Setting) -> None:
    def check(one: Choice) -> dict[str, Deviation]:
        if one == OTHER:
            raise RuntimeError("out of resource: shared memory")
        if one == RISK:
            raise NotTakenError("no partial blocks")
        return {"out": Deviation(0.1, 0.5)}

    tune._time("forward", SHAPE, place(check=check), tuning)
    found = {row["variant"]: row for row in rows(tuning, "tune")}
    assert found["tma"]["error"] == "RuntimeError: out of resource: shared memory"
    assert found["gluon"]["not_taken"] == "no partial blocks"
    assert found["plain"]["ms"] == 4.0


def test_candidates_are_few_legal_and_written_as_they_are_read() -> None:
    for (kernel, head_dim), choices in RANKED.items():
        assert len(choices) <= MOST
        assert len(set(choices)) == len(choices)
        for one in choices:
            assert one.variant in tuned.VARIANTS[kernel]
        assert ranked(kernel, head_dim, choices[-1])[0].variant not in RISKY
    assert label(RANKED["forward", 128][0]) == "gluon 128x128 w4 s2"
    assert label(RANKED["forward", 128][2]) == "tma 128x64 w8 s3 p64 ahead"


def test_ranked_puts_what_ships_first_and_what_could_hang_last() -> None:
    found = ranked("forward", 128, SHIPPED)
    assert found[0] == SHIPPED
    assert len(found) == MOST
    kinds = [one.variant in RISKY for one in found]
    assert kinds == sorted(kinds)
    assert any(kinds)


def test_tables_may_name_every_form_of_the_kernels() -> None:
    for kernel, names in variants.KERNELS.items():
        assert tuned.VARIANTS[kernel] == names


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_rates_of_a_shape(
    direction: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = rates.masks_of(SHAPE, (1.0, 0.8), setting)
    assert [mask.name for mask in masks] == [
        "block-aligned 1", "block-aligned 0.8", "token-exact 0.8",
    ]  # fmt: skip
    on_cpu = [
        rates.Attention(rates.OURS, mask, lambda q, k, v, m=mask: attention(q, k, v, m.layout))
        for mask in masks
    ]
    broken = rates.Attention("flex", masks[0], lambda q, k, v: 1 / 0)
    rates.measure(SHAPE, direction, [rates.dense("flash"), *on_cpu, broken], setting)
    found = rows(setting, "rate")
    failed = [row for row in found if "failed" in row]
    assert [row["failed"] for row in failed] == ["ZeroDivisionError: division by zero"]
    timed = [row for row in found if "ms" in row]
    assert len(timed) == 4
    for row in timed:
        assert row["right"]
        assert row["error"] < 1e-5
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        flops = (4 if direction == FORWARD else 10) * 3 * row["pairs"] * 16
        assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9)
    dense, *ours = timed
    assert dense["of_flash"] == 1.0
    for row in ours:
        share = row["pairs"] / SHAPE.tokens**2
        ratios = [a / b for a, b in zip(dense["rounds"], row["rounds"], strict=True)]
        assert row["of_flash"] == pytest.approx(share * ratios[0])
    # What is done is not measured again.
    rates.measure(SHAPE, direction, [rates.dense("flash")], setting)
    assert rows(setting, "rate") == found


# ---------------------------------------------------------------- compiling, stages


def test_kernels_that_do_not_compile_are_listed_and_the_others_compiled(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(compiling, "DRY_LAUNCHES", 10)
    monkeypatch.setattr(compiling.triton.runtime.driver, "set_active", lambda driver: None)
    launched: list[int] = []
    fake = [
        ("good", lambda: launched.append(1)),
        ("bad", fails),
        ("last", lambda: launched.append(2)),
    ]
    monkeypatch.setattr(compiling.tune, "launches", lambda setting: iter(fake))
    monkeypatch.setattr(compiling.smoke, "launches", lambda setting: iter(()))
    monkeypatch.setattr(compiling.selecting, "launches", lambda setting: iter(()))
    compiling.run("0/1", setting)
    (row,) = rows(setting, "compile")
    assert launched == [1, 2]
    assert row["failed"] == {"bad": "RuntimeError: PassManager::run failed"}
    assert row["launches"] == 3


def test_compilers_share_the_launches(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []

    def launches(setting: Setting) -> Iterator[tuple[str, Any]]:
        for number in range(7):
            yield str(number), lambda number=number: launched.append(number)

    monkeypatch.setattr(compiling.tune, "launches", launches)
    monkeypatch.setattr(compiling.smoke, "launches", lambda setting: iter(()))
    monkeypatch.setattr(compiling.selecting, "launches", lambda setting: iter(()))
    for number in range(3):
        compiling.run(f"{number}/3", replace(setting, dry=False))
    assert sorted(launched) == list(range(7))


def test_stages_have_names_of_their_own_modules_that_exist_and_tests_that_exist() -> None:
    for stages in (list(real_stages(ROOT)), list(dry_stages(ROOT))):
        names = [stage.name for stage in stages]
        assert len(set(names)) == len(names)
        for stage in stages:
            kind = stage.name.partition(":")[0]
            assert stage.least <= stage.limit
            if kind == "tests":
                files = [x.partition("::")[0] for x in stage.command if x.startswith("tests/")]
                assert files
                assert all((ROOT / file).exists() for file in files)
            else:
                assert importlib.util.find_spec(f"gpu_run.{MODULES[kind]}")
    kinds = {stage.name.partition(":")[0] for stage in dry_stages(ROOT)}
    assert kinds == {*MODULES, "tests"}
    assert all((ROOT / file).exists() for file in KERNEL_TESTS)


def test_every_form_has_a_smoke_stage_and_tiles_to_try() -> None:
    assert "gather" in SMOKE
    for kernel, names in variants.KERNELS.items():
        of_gather = kernel.startswith("gather_")
        for variant in names:
            assert of_gather or f"{kernel}-{variant}" in SMOKE
            for head_dim in (128,) if of_gather else (64, 128):
                assert any(one.variant == variant for one in RANKED[kernel, head_dim])


def test_choices_wait_for_the_smoke_stage_of_their_form() -> None:
    tiles = TileConfig(128, 128, 4, 2)
    ahead = replace(tiles, ahead=True)
    assert smoke.form_of("forward", Choice("gluon", tiles)) == "forward-gluon"
    assert smoke.form_of("forward", Choice("gluon", ahead)) == "forward-gluon-ahead"
    assert smoke.form_of("queries", Choice("tma", ahead)) == "queries-tma"
    forms = {
        smoke.form_of(kernel, one)
        for (kernel, _), choices in RANKED.items()
        if kernel not in tune.GATHER
        for one in choices
    }
    assert forms == {what for what in SMOKE if "-" in what}


# ---------------------------------------------------------------- methods that select


def test_rows_of_selecting_methods(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenAttn(SolAttn):
        def attend(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("no such kernel")

    chosen = {"vmoba": VMoBAAttn(topk=2), "sla": SLAAttn(), "broken": BrokenAttn()}
    monkeypatch.setattr(selecting, "METHODS", chosen)
    selecting.run("", setting)
    found = rows(setting, "selecting")
    assert [(row["method"], row["partition"]) for row in found] == [
        ("broken", "-"), ("vmoba", "1d"), ("vmoba", "2d"), ("vmoba", "3d"), ("sla", "-"),
    ]  # fmt: skip
    assert found[0]["failed"] == "NotImplementedError: no such kernel"
    for row in found[1:]:
        assert row["tokens"] == 768
        assert row["around_ms"] > 0
        assert row["around_share"] == pytest.approx(row["around_ms"] / row["total_ms"])
        assert row["speed_up"] == pytest.approx(row["dense_ms"] / row["total_ms"])
    # Two of 8 runs and of as many boxes; one of 12 blocks of keys.
    assert found[1]["density"] == pytest.approx(2 / 8)
    assert found[4]["density"] == pytest.approx(1 / 12)
    assert setting.journal.is_finished("768")


def test_methods_that_remember_are_timed_in_a_later_step_too(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterations: list[int] = []

    def k_means(x: Any, start: Any, count: int, counted: Any) -> Any:
        iterations.append(count)
        return clusters.k_means(x, start, count, counted)

    method = SVG2Attn(iterations=3, warm_iterations=1, query_cluster=80, key_cluster=40)
    monkeypatch.setattr(selecting, "METHODS", {"svg2": method})
    monkeypatch.setattr("diffattn.methods.svg2.k_means", k_means)
    selecting.run("", setting)
    found = rows(setting, "selecting")
    assert [row["method"] for row in found] == ["svg2", "svg2, later step"]
    assert all(row["speed_up"] > 0 for row in found)
    # Three calls of each before the times, each of queries and of keys: of those with a memory
    # only the first starts anew.
    assert iterations[:12] == [3, 3] * 4 + [1, 1] * 2
