"""``diffattn bench``: what is measured, what is kept, and what two runs say about each other."""

import json
import re
import statistics
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch

import diffattn as package
from diffattn import (
    AgentAttn,
    CLEARAttn,
    GNAAttn,
    LinFusionAttn,
    Method,
    SLAAttn,
    TokenGrid,
    VMoBAAttn,
    VSAAttn,
)
from diffattn.kernels.reference import reference_attention
from diffattn.methods import METHODS
from diffattn.pipelines.bench import fitting, session
from diffattn.pipelines.bench.cases import (
    DTYPES,
    Case,
    Shape,
    attention_call,
    bound_of,
    cases_of,
    describe_method,
    selection_call,
)
from diffattn.pipelines.bench.comparing import Change, compare
from diffattn.pipelines.bench.dense import dense_attention, fastest
from diffattn.pipelines.bench.inputs import smooth_fields
from diffattn.pipelines.bench.rows import DENSE, Record, Row, key_of, read_record, write_record
from diffattn.pipelines.bench.timing import HostTimer, Spread, interleave
from diffattn.pipelines.errors import UserError

CPU = torch.device("cpu")
TINY = ["--grid", "2x6x8", "--heads", 2, "--head-dim", 16, "--rounds", 3]
GRID = TokenGrid(2, 6, 8)
GNA = "gna window=1,3,3"


def row(**changes):
    """A row of a measurement that never was."""
    fields = {
        "label": GNA, "grid": {"frames": 2, "height": 6, "width": 8}, "heads": 2, "head_dim": 16,
        "batch": 1, "dtype": "float32", "direction": "forward", "backend": "cpu",
        "method": GNAAttn(window=(1, 3, 3)).to_dict(), "layers": 64,
        "rounds": (10.0, 10.0, 10.0), "dense_rounds": (20.0, 20.0, 20.0),
    }  # fmt: skip
    return Row(**(fields | changes))


def record(*rows, device=None, versions=None):
    device = device or {"type": "cpu", "name": "a processor", "threads": 1}
    return Record(device, versions or {"torch": "2.12"}, "2026-01-01", rows)


@pytest.fixture
def bench(diffattn, tmp_path, monkeypatch):
    """Run ``diffattn bench`` inside ``tmp_path``; bad input leaves nothing there."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        before = set(tmp_path.rglob("*"))
        result = diffattn("bench", *arguments)
        if result.code == 2:
            assert set(tmp_path.rglob("*")) == before
        return result

    return run


class TestMeasuring:
    def test_methods_beside_dense_attention(self, bench, tmp_path):
        result = bench(*TINY, "--attn", GNA, "--attn", "vmoba", "--backward", "-o", "now.json")
        assert result.code == 0, result.err
        found = json.loads((tmp_path / "now.json").read_text())
        directions = [entry["direction"] for entry in found["rows"]]
        assert directions == ["forward"] * 5 + ["backward"] * 5
        labels = [DENSE, GNA, *(f"vmoba, block {n}" for n in range(3))]
        assert [entry["label"] for entry in found["rows"]] == labels * 2
        assert found["device"]["type"] == "cpu"
        assert found["versions"]["torch"] == torch.__version__
        for entry in found["rows"]:
            assert len(entry["rounds"]) == 3
            assert entry["ms"]["median"] == statistics.median(entry["rounds"])
            pairs = zip(entry["dense_rounds"], entry["rounds"], strict=True)
            assert entry["speed_up"] == statistics.median(dense / ours for dense, ours in pairs)
            selects = entry["label"].startswith("vmoba") and entry["direction"] == "forward"
            assert (entry["selection_ms"] is not None) == selects
            assert entry["peak_mib"] > 0
        plan = package.plan(GRID, GNAAttn(window=(1, 3, 3)), heads=2, head_dim=16)
        of_gna = found["rows"][1]
        assert of_gna["bound"] == plan.attention_speedup
        assert of_gna["of_bound"] == of_gna["speed_up"] / plan.attention_speedup
        for label in labels:
            assert re.search(rf"^{re.escape(label)} +[\d.]", result.out, re.M), result.out

    def test_selection_and_attention_add_up(self):
        measured = row(rounds=(10.0, 12.0, 11.0), selection_rounds=(4.0, 5.0, 3.0))
        assert measured.selection.median == 4.0
        assert measured.attention.median == statistics.median([6.0, 7.0, 8.0])

    def test_the_size_of_a_model(self, bench, tmp_path):
        result = bench(
            "--model", "Wan-AI/Wan2.1-T2V-1.3B", "--height", 32, "--width", 48, "--num-frames", 5,
            "--rounds", 3, "--attn", "radial", "-o", "now.json",
        )  # fmt: skip
        assert result.code == 0, result.err
        (dense, radial) = read_record(tmp_path / "now.json").rows
        assert (dense.shape.grid, dense.heads, dense.head_dim) == (TokenGrid(2, 2, 3), 12, 128)
        assert (radial.family, radial.layers) == ("wan", 30)
        # The first block of Wan stays dense under Radial's recommended settings.
        assert radial.layer == package.RadialAttn().for_model("wan2.1").dense_layers == 1

    def test_every_method(self, bench, tmp_path):
        result = bench(*TINY, "--attn", "all", "-o", "now.json")
        assert result.code == 0, result.err
        rows = read_record(tmp_path / "now.json").rows
        assert [one.failed for one in rows] == [""] * len(rows)
        measured = {one.method["type"] for one in rows if one.method}
        # AutoAttn is measured as the method that it chooses.
        assert measured == {name for name in METHODS if name not in ("dense", "auto")}

    def test_json_on_the_screen(self, bench):
        result = bench(*TINY, "--attn", GNA, "--json")
        assert [entry["label"] for entry in json.loads(result.out)] == [DENSE, GNA]

    def test_a_config_file(self, bench, tmp_path):
        (tmp_path / "m.json").write_text(json.dumps(SLAAttn(keep=0.5).to_dict()))
        assert bench(*TINY, "--attn-config", "m.json", "-o", "now.json").code == 0
        assert read_record(tmp_path / "now.json").rows[1].label == "sla keep=0.5"

    def test_a_method_that_fails_does_not_stop_the_others(self, bench, tmp_path, broken):
        result = bench(*TINY, "--attn", "broken", "--attn", GNA, "-o", "now.json")
        assert result.code == 0
        rows = {one.label: one for one in read_record(tmp_path / "now.json").rows}
        assert rows["broken"].failed == "RuntimeError: no kernel here"
        assert rows[GNA].rounds
        assert "broken: failed: RuntimeError: no kernel here" in result.out

    def test_a_failure_in_the_rounds(self, bench, tmp_path, broken, monkeypatch):
        monkeypatch.setattr(Broken, "good_calls", 4)  # the warm-ups, and one round
        assert bench(*TINY, "--attn", "broken", "-o", "now.json").code == 0
        _, failed = read_record(tmp_path / "now.json").rows
        assert (failed.failed, failed.rounds) == ("RuntimeError: no kernel here", ())


@dataclass(frozen=True, kw_only=True)
class Broken(Method):
    """A method whose kernel fails after some calls."""

    type: ClassVar[str] = "broken"
    good_calls: ClassVar[int] = 0
    calls: ClassVar[int] = 0

    def for_model(self, family, grid=None):
        return self

    def attend(self, query, key, value, site, *, scale=None, key_mask=None):
        Broken.calls += 1
        if Broken.calls > self.good_calls:
            raise RuntimeError("no kernel here")
        return value.clone()


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(METHODS, "broken", Broken)
    monkeypatch.setattr(Broken, "calls", 0)


@pytest.mark.parametrize(
    "method",
    [GNAAttn(window=(1, 3, 3)), CLEARAttn(radius=2), VMoBAAttn(topk=2), VSAAttn(keep=0.5)],
    ids=describe_method,
)
def test_calls_compute_what_the_method_says(method):
    """Against dense float64 attention under the mask of the method or of its selection."""
    grid = TokenGrid(2, 6, 8, text_after=3)
    shape = Shape(grid, 2, 16, 1, "float32")
    qkv = smooth_fields(grid, 2, 16, torch.float32, CPU)
    (case, *_) = cases_of(method, "", "", grid, 4)
    selection = selection_call(case, shape, qkv)
    if selection is None:
        masks = [case.method.mask(grid).dense()] * 2
    else:
        extra = (grid, case.layer) if method.type == "vmoba" else (grid,)
        chosen = selection()[0]
        masks = [case.method.selection_mask(one, *extra).dense() for one in chosen]
    truth, _ = reference_attention(*qkv, torch.stack(masks)[None])
    torch.testing.assert_close(
        attention_call(case, shape, CPU)(*qkv).double(), truth, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("method", [LinFusionAttn(), SLAAttn(), VSAAttn(coarse=True), AgentAttn()])
@pytest.mark.parametrize("text", [0, 5])
def test_methods_with_weights_of_their_own_run(method, text):
    grid = TokenGrid(2, 8, 8, text_after=text)
    shape = Shape(grid, 2, 16, 1, "bfloat16")
    (case,) = cases_of(method, "wan2.1", "wan", grid, 2)
    qkv = smooth_fields(grid, 2, 16, torch.bfloat16, CPU)
    out = attention_call(case, shape, CPU)(*qkv)
    assert out.shape == qkv[0].shape
    assert out.isfinite().all()


def test_layers_that_take_turns_are_measured_each():
    method = VMoBAAttn(partitions=("3d", "1d"), dense_layers=3)
    assert [case.layer for case in cases_of(method, "", "", GRID, 9)] == [3, 4]


def test_a_bound_of_an_estimate():
    (case, *_) = cases_of(VMoBAAttn(), "", "", GRID, 4)
    shape = Shape(GRID, 2, 16, 1, "float32")
    work = case.method.work(GRID, 0, 2, 16)
    assert bound_of(case, shape).speed_up == 4 * 96**2 * 32 / work.flops


def test_methods_are_written_as_they_are_read():
    method = GNAAttn(window=(1, 3, 3), dense_steps=0.5)
    name, *words = describe_method(method).split()
    options = session.Settings(methods=(" ".join([name, *words]),), grids=(GRID,))
    (group,) = session.groups_of(options)
    assert group.cases[0].method == method.for_model("", GRID)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fields_are_smooth_and_of_unit_size(dtype):
    grid = TokenGrid(3, 8, 12, text_before=4, text_after=5)
    q, k, v = smooth_fields(grid, 2, 16, DTYPES[dtype], CPU, 2)
    assert q.shape == k.shape == v.shape == (2, grid.tokens, 2, 16)
    assert q.dtype == DTYPES[dtype]
    video = v[:, grid.video].float()
    assert 0.9 < video.std() < 1.1
    # Neighbours in a row of the grid are alike, tokens of the text are not.
    assert (video[:, 1:12] - video[:, :11]).std() < 0.9
    again = smooth_fields(grid, 2, 16, DTYPES[dtype], CPU, 2)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))


class TestDenseBackends:
    """Which of the backends of a GPU dense attention is measured with."""

    class Scripted:
        def __init__(self, times):
            self.times = times

        def milliseconds(self, call):
            return self.times[call()]

    def made_by(self, names):
        """A `make` whose calls give the name of the backend, in the order of the candidates."""
        left = iter(names)

        def make(attend):
            name = next(left)
            if name.startswith("no "):
                raise RuntimeError(f"{name} on this GPU")
            return lambda: name

        return make

    def test_the_fastest_is_taken(self):
        make = self.made_by(["cudnn", "flash", "efficient"])
        timer = self.Scripted({"cudnn": 3.0, "flash": 2.0, "efficient": 5.0})
        backend, call = fastest(make, torch.device("cuda"), timer)
        assert (backend, call()) == ("flash", "flash")

    def test_a_backend_that_fails_is_left_out(self):
        make = self.made_by(["no cudnn", "flash", "no efficient"])
        backend, _ = fastest(make, torch.device("cuda"), self.Scripted({"flash": 2.0}))
        assert backend == "flash"

    def test_reasons_that_torch_warns_of_are_not_shown(self, recwarn):
        def make(attend):
            warnings.warn("Flash attention has been runtime disabled", stacklevel=1)
            return lambda: "any"

        fastest(make, torch.device("cuda"), self.Scripted({"any": 1.0}))
        assert not recwarn.list

    def test_no_dense_attention_in_a_dtype(self, monkeypatch):
        def fail(*_):
            raise RuntimeError("dense attention does not work here (flash: no)")

        monkeypatch.setattr(fitting, "fastest", fail)
        with pytest.raises(UserError, match=r"^float16 on cpu: dense attention does not work here"):
            fitting._rate(Shape(GRID, 2, 16, 1, "float16"), CPU, HostTimer())

    def test_none_works(self):
        make = self.made_by(["no cudnn", "no flash", "no efficient"])
        with pytest.raises(RuntimeError, match="cudnn: RuntimeError: no cudnn on this GPU; flash"):
            fastest(make, torch.device("cuda"), self.Scripted({}))

    def test_dense_attention_is_dense(self):
        q, k, v = torch.randn(3, 1, 7, 2, 8).unbind()
        truth, _ = reference_attention(q, k, v, None)
        out = dense_attention("flash")(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5)


class TestInterrupts:
    @pytest.fixture
    def interrupted(self, monkeypatch):
        """Let the timer be interrupted at a measurement."""

        def after(calls):
            class Timer(HostTimer):
                left = calls

                def milliseconds(self, call):
                    if not self.left:
                        raise KeyboardInterrupt
                    self.left -= 1
                    return super().milliseconds(call)

            timer = Timer()
            monkeypatch.setattr(session, "timer_for", lambda device: timer)
            monkeypatch.setattr(session, "least_seconds", lambda *_: 0.0)

        return after

    def test_finished_groups_are_kept(self, bench, tmp_path, interrupted):
        interrupted(6)  # three rounds of two calls
        result = bench(*TINY, "--grid", "1x4x4", "--attn", GNA, "-o", "now.json")
        assert result.code == 130
        assert "interrupted: kept now.json" in result.err
        assert [one.label for one in read_record(tmp_path / "now.json").rows] == [DENSE, GNA]
        assert GNA in result.out

    def test_finished_rounds_are_kept(self, bench, tmp_path, interrupted):
        interrupted(5)
        assert bench(*TINY, "--attn", GNA, "-o", "now.json").code == 130
        rows = read_record(tmp_path / "now.json").rows
        assert sorted(len(one.rounds) for one in rows) == [2, 3]

    def test_without_a_file_the_rows_are_shown(self, bench, interrupted):
        interrupted(4)
        result = bench(*TINY, "--attn", GNA)
        assert GNA in result.out
        assert "kept the rows above; --output FILE keeps them in a file" in result.err

    def test_before_the_first_row_nothing_is_written(self, bench, tmp_path, interrupted):
        interrupted(0)
        (tmp_path / "now.json").write_text("of an earlier run")
        result = bench(*TINY, "--attn", GNA, "-o", "now.json")
        assert (result.code, result.out) == (130, "")
        assert "nothing was written" in result.err
        assert (tmp_path / "now.json").read_text() == "of an earlier run"

    def test_times_so_far_are_left_to_the_caller(self):
        times = {}

        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interleave(
                {"a": int, "b": interrupt}, HostTimer(), least=1, most=1, seconds=0.0, times=times
            )
        assert (len(times["a"]), times["b"]) == (1, [])


class TestLimits:
    def test_memory(self, bench, monkeypatch):
        monkeypatch.setattr(fitting, "free_memory", lambda device: 3 << 30)
        error = bench("--grid", "81x90x160+5", "--attn", "radial", "--batch", 2).error
        assert re.fullmatch(
            r"1,166,405 tokens with 12 heads of 128 in float32, forward, need at least 106\.8 GiB"
            r" of memory, but cpu has 3\.0 GiB free: try fewer tokens, --heads 1, --batch 1,"
            r" --dtype bfloat16, or go on anyway by --no-memory-check",
            error,
        )

    def test_the_check_of_memory_can_be_switched_off(self, bench, monkeypatch):
        monkeypatch.setattr(fitting, "free_memory", lambda device: 1)
        assert "go on anyway by --no-memory-check" in bench(*TINY).error
        assert bench(*TINY, "--no-memory-check").code == 0

    def test_a_grid_beyond_what_blocks_can_list(self, bench):
        assert "at most 2,097,152 are possible" in bench("--grid", "999x99x99").error

    def test_hours_on_a_cpu(self, bench, monkeypatch):
        monkeypatch.setattr(fitting, "_rate", lambda *_: 20e9)
        error = bench("--grid", "21x45x80", "--attn", "gna window=5,9,9").error
        # Dense attention is 4 * 75600^2 * 12 * 128 FLOPs, 1756 s at this rate, in six calls.
        assert re.match(
            r"the least that can be measured, 3 warm-up calls and 3 rounds, takes about 3\.\d hours"
            r" on cpu: give --minutes \d+, or fewer tokens than 75,600, fewer heads or fewer"
            r" methods$",
            error,
        ), error

    def test_the_estimate_counts_bounds_and_directions(self, monkeypatch):
        shape = Shape(TokenGrid(1, 1, 1000), 1, 64, 1, "float32")
        flops = 4 * 1000**2 * 64
        monkeypatch.setattr(fitting, "_rate", lambda *_: flops)
        seconds = partial(fitting.least_seconds, device=CPU, timer=HostTimer())
        assert seconds([fitting.Group(shape, "forward", ())]) == 6
        assert seconds([fitting.Group(shape, "backward", ())]) == 1 + 6 * 2.5

    @pytest.mark.parametrize(
        ("seconds", "shown"),
        [
            (45, "45 s"),
            (89.4, "89 s"),
            (90, "2 minutes"),
            (3600, "60 minutes"),
            (9000, "2.5 hours"),
        ],
    )
    def test_durations(self, seconds, shown):
        assert fitting.duration(seconds) == shown

    def test_the_rate_is_measured(self):
        shape = Shape(TokenGrid(1, 1, 64), 1, 16, 1, "float32")
        assert fitting._rate(shape, CPU, HostTimer()) > 1e6

    def test_lack_of_memory_in_a_group(self, bench, monkeypatch):
        def fail(*_):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

        monkeypatch.setattr(session, "measure", fail)
        result = bench(*TINY)
        assert result.code == 2
        assert result.err.splitlines() == [
            "96 tokens, forward, dense attention, radial left out: out of memory",
            "diffattn: out of memory: take fewer tokens, fewer heads, or --dtype bfloat16",
        ]


class TestComparing:
    def test_ratio_and_noise(self):
        change = Change(row(rounds=(10.0,) * 5), row(rounds=(12.0,) * 5))
        assert change.ratio == pytest.approx(1.2)
        assert (change.noise, change.verdict) == (0, "slower")
        assert change.fails(19)
        assert not change.fails(21)

    def test_a_change_within_the_noise(self):
        # 10 +- 1 and 11 +- 2 between the tenths: parts of 0.1 and 0.18.
        old, new = [9.0, 10.0, 11.0] * 5, [9.0, 11.0, 13.0] * 5
        change = Change(row(rounds=tuple(old)), row(rounds=tuple(new)))
        assert change.ratio == pytest.approx(1.1)
        assert change.noise == pytest.approx(1.1 * (0.1**2 + (2 / 11) ** 2) ** 0.5)
        assert change.verdict == "the same"
        assert not change.fails(0)

    def test_faster(self):
        change = Change(row(), row(rounds=(5.0,) * 3))
        assert change.verdict == "faster"
        assert not change.fails(0)

    def test_relative_to_dense_attention(self):
        """A machine that is busy slows both down."""
        busy = row(rounds=(20.0, 30.0, 25.0), dense_rounds=(40.0, 60.0, 50.0))
        assert Change(row(), busy).verdict == "slower"
        change = Change(row(), busy, relative=True)
        assert (change.ratio, change.noise, change.verdict) == (1, 0, "the same")

    def test_files(self, bench, tmp_path):
        dense = row(label=DENSE, method=None, layers=1, backend="torch torch")
        write_record(tmp_path / "old.json", record(dense, row()))
        slow = row(rounds=(13.0, 13.0, 13.0))
        write_record(tmp_path / "new.json", record(dense, slow, versions={"torch": "2.13"}))
        result = bench("--compare", "old.json", "new.json")
        assert result.code == 0
        lines = result.out.splitlines()
        assert lines[0] == "torch 2.12 -> 2.13"
        assert re.fullmatch(
            rf"{GNA} at 96 tokens, float32, forward +10 +13 +1\.300 +0\.000 +slower", lines[-1]
        )
        assert bench("--compare", "old.json", "new.json", "--fail-above", 31).code == 0
        failed = bench("--compare", "old.json", "new.json", "--fail-above", 29.5)
        assert failed.code == 1
        assert failed.out.splitlines()[-1].endswith("slower, by more than 29.5 %")
        # In the other direction nothing is slower.
        assert bench("--compare", "new.json", "old.json", "--fail-above", 0).code == 0
        relative = bench("--compare", "old.json", "new.json", "--relative")
        assert "old x dense" in relative.out
        assert DENSE not in relative.out

    def test_as_json(self, bench, tmp_path):
        write_record(tmp_path / "old.json", record(row()))
        write_record(tmp_path / "new.json", record(row(rounds=(5.0, 5.0, 5.0))))
        (change,) = json.loads(bench("--compare", "old.json", "new.json", "--json").out)
        assert (change["ratio"], change["verdict"]) == (0.5, "faster")

    def test_measuring_the_old_cases_again(self, bench, tmp_path):
        arguments = ["--attn", GNA, "--attn", "vmoba topk=2", "--backward"]
        assert bench(*TINY, *arguments, "-o", "old.json").code == 0
        result = bench("--compare", "old.json", "-o", "new.json", "--rounds", 3)
        assert result.code == 0, result.err
        old, new = (read_record(tmp_path / f"{name}.json") for name in ("old", "new"))
        assert [key_of(one) for one in old.rows] == [key_of(one) for one in new.rows]
        assert "not compared" not in result.out
        assert len(compare(old, new).changes) == len(old.rows) == 10

    @pytest.mark.parametrize(
        ("device", "words"),
        [
            ({"type": "cuda", "name": "NVIDIA H100"}, r"cuda (NVIDIA H100)"),
            ({"type": "cpu", "name": "another", "threads": 1}, "cpu (another, 1 threads)"),
            ({"type": "cpu", "name": "a processor", "threads": 8}, "cpu (a processor, 8 threads)"),
        ],
    )
    def test_other_devices_are_refused(self, device, words):
        with pytest.raises(UserError) as caught:
            compare(record(row()), record(row(), device=device))
        assert str(caught.value) == (
            "times of different devices cannot be compared: the old run is of cpu (a processor, 1"
            f" threads), the new one of {words}"
        )

    def test_another_device_is_refused_before_anything_is_measured(self, bench, tmp_path):
        write_record(tmp_path / "old.json", record(row()))
        error = bench("--compare", "old.json").error
        assert error.startswith(
            "times of different devices cannot be compared: the old run is of cpu (a processor, 1"
            " threads), the new one of cpu ("
        )

    def test_what_is_measured_when_an_interrupt_comes_is_shown(self, bench, tmp_path, monkeypatch):
        assert bench(*TINY, "--attn", GNA, "-o", "old.json").code == 0

        class Timer(HostTimer):
            left = 4

            def milliseconds(self, call):
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
                return super().milliseconds(call)

        timer = Timer()
        monkeypatch.setattr(session, "timer_for", lambda device: timer)
        monkeypatch.setattr(session, "least_seconds", lambda *_: 0.0)
        result = bench("--compare", "old.json")
        assert result.code == 130
        assert GNA in result.out

    def test_what_has_no_counterpart(self):
        longer = row(grid={"frames": 4, "height": 6, "width": 8})
        failed = row(dtype="bfloat16", rounds=(), failed="OutOfMemoryError: 3 GiB")
        found = compare(record(row(), longer, row(heads=4)), record(row(), failed))
        assert len(found.changes) == 1
        assert found.left_out == (
            f"{GNA} at 192 tokens, float32, forward: not in the new run",
            f"{GNA} at 96 tokens, float32, forward: not in the new run",
            f"{GNA} at 96 tokens, bfloat16, forward: not in the old run",
        )

    def test_other_parameters_are_another_case(self):
        other = row(method=GNAAttn(window=(1, 5, 5)).to_dict())
        with pytest.raises(UserError, match=r"no time to compare: .*not in the new run; .*not in"):
            compare(record(row()), record(other))

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            ({}, {"rounds": (), "failed": "RuntimeError: x"}, "the new run has no time: Runt"),
            ({"backend": "triton"}, {"backend": "flex"}, "the backend was triton and is flex"),
            (
                {"label": DENSE, "method": None, "backend": "torch cudnn"},
                {"label": DENSE, "method": None, "backend": "torch flash"},
                "torch's backend was torch cudnn and is torch flash",
            ),
        ],
    )
    def test_rows_that_cannot_be_compared(self, old, new, reason):
        both = row(heads=1)
        found = compare(record(both, row(**old)), record(both, row(**new)))
        assert len(found.changes) == 1
        assert reason in found.left_out[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --grid, once or several times, or --model"),
        ([*TINY, "--model", "x"], "give --grid, once or several times, or --model"),
        ([*TINY, "--height", 8], "--height cannot be given with --grid, which says it all"),
        (
            ["--model", "Wan-AI/Wan2.1-T2V-1.3B", "--heads", 3],
            "--heads cannot be given with --model, which says it",
        ),
        (["--model", "nobody/nothing"], "is neither a folder nor a model whose shape is known"),
        (["--reference", "4x4"], "--reference needs --grid, among whose tokens it stands"),
        ([*TINY, "--attn", "gan"], "unknown method 'gan'; did you mean 'gna'?"),
        ([*TINY, "--attn", "gna windw=3"], "gna has no parameter 'windw'; did you mean 'window'?"),
        ([*TINY, "--attn", "gna 3"], "--attn-arg takes name=value, not '3'"),
        ([*TINY, "--attn", 'gna "3'], "not 'gna \"3' (No closing quotation)"),
        ([*TINY, "--attn", " "], "--attn takes a method"),
        (
            [*TINY, "--attn", "gna", "--attn", "clear", "--attn-arg", "radius=3"],
            "--attn-arg is for a single method",
        ),
        ([*TINY, "--attn", "gna window=0"], "window"),
        ([*TINY, "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, not"),
        ([*TINY, "--rounds", 2], "--rounds must be a whole number of at least 3, not 2"),
        ([*TINY, "--minutes", 0], "--minutes must be a number above 0, not 0"),
        ([*TINY, "--batch", 0], "--batch must be a whole number of at least 1, not 0"),
        ([*TINY, "--device", "cuda"], "--device cuda: torch sees no such device here"),
        ([*TINY, "--fail-above", 3], "--fail-above needs --compare OLD.json"),
        ([*TINY, "--relative"], "--relative needs --compare OLD.json"),
        (["now.json"], "now.json is given without --compare OLD.json"),
        (["--compare", "no.json"], "cannot read no.json: No such file or directory"),
        (
            [*TINY, "--compare", "no.json"],
            "--grid, --heads, --head-dim cannot be given with --compare: the old file says what",
        ),
        (
            ["--compare", "a.json", "b.json", "--output", "c.json"],
            "--output cannot be given with --compare: nothing is measured",
        ),
        (
            ["--compare", "a.json", "--fail-above", -1],
            "--fail-above must be a number of at least 0",
        ),
        ([*TINY, "-o", "no/now.json"], "--output no/now.json: there is no folder no"),
        ([*TINY, "-o", "."], "--output . is a folder: give the name of a file"),
    ],
)
def test_bad_input(bench, arguments, message):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is one")
    assert message in bench(*arguments).error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not a file of diffattn bench: Expecting value"),
        ("[]", 'is not a file of diffattn bench: it has no "diffattn_bench"'),
        ('{"settings": {}}', 'is not a file of diffattn bench: it has no "diffattn_bench"'),
        ('{"diffattn_bench": 7}', "is a file of another version of diffattn bench"),
        ('{"diffattn_bench": 1}', "is damaged: KeyError: 'device'; measure again"),
        (
            '{"diffattn_bench": 1, "device": {}, "versions": {}, "date": "", "rows": [{}]}',
            "is damaged: ValueError: a row lacks label, grid, heads",
        ),
        (
            '{"diffattn_bench": 1, "device": {}, "versions": {}, "date": "", "rows": [3]}',
            "is damaged: TypeError",
        ),
    ],
)
def test_damaged_files(bench, tmp_path, text, message):
    (tmp_path / "old.json").write_text(text)
    assert message in bench("--compare", "old.json").error


@pytest.mark.parametrize("change", [{"rounds": [0.0]}, {"direction": "up"}, {"dtype": "int8"}])
def test_rows_that_no_run_has_written(tmp_path, change):
    path = tmp_path / "old.json"
    write_record(path, record(row()))
    content = json.loads(path.read_text())
    content["rows"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged: ValueError: "):
        read_record(path)


def test_files_are_read_as_they_were_written(tmp_path):
    grid = {"frames": 2, "height": 3, "width": 4, "text_after": 13,
            "references": [{"start": 24, "frames": 1, "height": 3, "width": 4}]}  # fmt: skip
    written = record(row(grid=grid), row(rounds=(), failed="no"), row(selection_rounds=(1.0, 2.0)))
    write_record(tmp_path / "a.json", written)
    found = read_record(tmp_path / "a.json")
    # JSON has lists for tuples.
    assert [key_of(one) for one in found.rows] == [key_of(one) for one in written.rows]
    assert [one.to_dict()["ms"] for one in found.rows] == [
        one.to_dict()["ms"] for one in written.rows
    ]
    assert replace(found, rows=()) == replace(written, rows=())
    assert found.rows[2].selection_rounds == (1.0, 2.0)
    assert found.rows[0].shape.grid.references[0].width == 4
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(
        UserError, match=r"cannot write --output .*a\.json: No space left on device"
    ):
        write_record(path, record(row()))
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_agents_of_a_unet_are_refused():
    with pytest.raises(UserError, match="agent merges tokens of a U-Net before attention"):
        cases_of(AgentAttn(), "sd15", "unet", GRID, 4)


def test_methods_that_do_not_fit_the_model_are_refused():
    with pytest.raises(UserError, match="linfusion cannot be attached to models of the family"):
        cases_of(LinFusionAttn(), "mochi", "mochi", GRID, 4)


def test_a_case_measured_again_is_the_same(tmp_path):
    (group,) = session.groups_again([row()])
    assert group.shape == Shape(GRID, 2, 16, 1, "float32")
    assert group.cases == (Case(GNAAttn(window=(1, 3, 3)), "", 0, 64, GNA),)
    with pytest.raises(UserError, match="the old run has no rows"):
        session.groups_again([])


def test_spreads():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


@pytest.mark.gpu
def test_every_method_on_a_gpu(bench, tmp_path):
    result = bench(
        "--grid", "4x16x16", "--heads", 2, "--head-dim", 64, "--attn", "all", "--backward",
        "--rounds", 3, "-o", "now.json",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = read_record(tmp_path / "now.json").rows
    assert {one.failed for one in rows} == {""}
    assert {one.dtype for one in rows} == {"bfloat16"}
    assert rows[0].backend.removeprefix("torch ") in ("cudnn", "flash", "efficient")
