"""What a GPU run's rows come to: the tuned table, the verdicts and the page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import triton
from gpu_run import report, table
from gpu_run.candidates import RANKED
from gpu_run.journal import Row
from gpu_run.verdicts import (
    ALIGNED,
    EXACT,
    FAIL,
    INCOMPLETE,
    NOT_MEASURED,
    PASS,
    RATED,
    errors,
    outcomes_of_tests,
    verdict,
    verdicts,
)

from diffattn.kernels.common.tile_tables import Choice, TileConfig
from diffattn.kernels.common.tuned import read_table

COUNT = 11  # verdicts
DENSITIES = (1.0, 0.5, 0.2, 0.1)
RUN: Row = {
    "kind": "run", "stage": "run", "sources": "abc", "gpu": "NVIDIA H100", "revision": "123",
    "date": "2026-12-01 10:00 UTC", "minutes": 8.0, "dry": False, "continued": False,
}  # fmt: skip
FACTS: Row = {
    "kind": "facts", "stage": "tune:forward-128", "sources": "abc", "gpu": "NVIDIA H100",
    "torch": "2.11.0", "triton": triton.__version__, "python": "3.12.3",
}  # fmt: skip


# ---------------------------------------------------------------- the tuned table


def tune_row(
    kernel: str, place: str, one: Choice, ms: float | None, shipped_ms: float | None, **more: Any
) -> Row:
    row: Row = {
        "kind": "tune", "stage": f"tune:{kernel}-128", "sources": "abc", "kernel": kernel,
        "head_dim": 128, "shape": "wan", "place": place, "variant": one.variant,
        "tiles": asdict(one.tiles), "shipped": False,
    }  # fmt: skip
    if ms is None:
        return row | {"error": "wrong"} | more
    ratio = ms / shipped_ms if shipped_ms else None
    return row | {"ms": ms, "rounds": [ms], "of_shipped": ratio} | more


A, B, C = (Choice("tma", TileConfig(m, 64, 8, 2, 64, True)) for m in (32, 64, 128))


def chosen(rows: list[Row]) -> dict[str, tuple[str, int]]:
    return {one["kernel"]: (one["variant"], one["block_m"]) for one in table.fastest(rows)}


def test_the_least_mean_over_the_masks_is_chosen() -> None:
    rows = [
        tune_row("forward", "dense", A, 10.0, 10.0, shipped=True),
        tune_row("forward", "sparse", A, 2.0, 2.0, shipped=True),
        tune_row("forward", "dense", B, 9.0, 10.0),  # 0.9 and 0.9
        tune_row("forward", "sparse", B, 1.8, 2.0),
        tune_row("forward", "dense", C, 8.0, 10.0),  # 0.8 and 1.2
        tune_row("forward", "sparse", C, 2.4, 2.0),
    ]
    (one,) = table.fastest(rows)
    assert chosen(rows) == {"forward": ("tma", 64)}
    assert one["ms"] == {"dense": 9.0, "sparse": 1.8}
    assert one["shipped_ms"] == {"dense": 10.0, "sparse": 2.0}
    # The latest time of a choice counts.
    rows.append(tune_row("forward", "sparse", C, 1.0, 2.0))
    assert chosen(rows) == {"forward": ("tma", 128)}


def test_a_choice_that_was_not_timed_on_every_mask_is_not_chosen() -> None:
    rows = [
        tune_row("forward", "dense", A, 10.0, 10.0),
        tune_row("forward", "sparse", A, 2.0, 2.0),
        tune_row("forward", "dense", B, 1.0, 10.0),
        tune_row("forward", "sparse", B, None, None),
    ]
    assert chosen(rows) == {"forward": ("tma", 32)}


def test_without_the_shipped_choice_times_themselves_are_compared() -> None:
    rows = [tune_row("forward", "dense", one, ms, None) for one, ms in ((A, 3.0), (B, 2.0))]
    assert chosen(rows) == {"forward": ("tma", 64)}


def test_the_table_is_one_that_the_package_reads(tmp_path: Path) -> None:
    assert table.tuned_table([RUN, FACTS]) is None
    rows = [
        tune_row(kernel, "dense", one, 1.0 + number, 2.0, head_dim=head_dim)
        for (kernel, head_dim), choices in RANKED.items()
        for number, one in enumerate(choices)
    ]
    text = table.tuned_table([RUN, FACTS, *rows])
    assert text is not None
    path = tmp_path / "tuned.json"
    path.write_text(text)
    read = read_table(path)
    assert (read.gpu, read.triton) == ("NVIDIA H100", triton.__version__)
    assert read.choices == {place: choices[0] for place, choices in RANKED.items()}
    assert json.loads(text)["revision"] == "123"


def test_every_candidate_is_one_that_the_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    for (kernel, head_dim), choices in RANKED.items():
        for one in choices:
            rows = [tune_row(kernel, "dense", one, 1.0, 2.0, head_dim=head_dim)]
            path.write_text(table.tuned_table([RUN, FACTS, *rows]) or "")
            assert read_table(path).choices[kernel, head_dim] == one


# ---------------------------------------------------------------- verdicts


def rate(
    shape: str, head_dim: int, direction: str, mask: str, asked: float, ms: float, **more: Any
) -> Row:
    row: Row = {
        "kind": "rate", "stage": f"rates:{shape}", "sources": "abc", "shape": shape,
        "direction": direction, "candidate": "diffattn", "head_dim": head_dim, "tokens": 1000,
        "mask": mask, "asked": asked, "density": asked, "pairs": asked * 1e6, "ms": ms, "low": ms,
        "high": ms, "rounds": [ms] * 3, "tflops": 500.0, "of_cudnn": 0.9, "error": 1e-3,
        "of_allowed": 0.2, "right": True, "first_call_s": 1.0,
    }  # fmt: skip
    return row | more


def smoke_row(**more: Any) -> Row:
    row: Row = {
        "kind": "smoke", "stage": "smoke:keys-tma", "sources": "abc", "what": "keys-tma",
        "case": "a", "head_dim": 128, "taken": True, "right": True, "same_bits": True,
        "deviations": {"dk": {"relative": 1e-3, "of_allowed": 0.3}},
    }  # fmt: skip
    return row | more


def stage_row(stage: str, rc: int | str = 0) -> Row:
    return {"kind": "stage", "stage": stage, "sources": "abc", "rc": rc, "seconds": 3.0}


def row_of_test(outcome: str = "passed", test: str = "test_a.py::test_b") -> Row:
    return {"kind": "test", "stage": "tests:kernels", "sources": "abc", "test": test,
            "outcome": outcome, "seconds": 1.0}  # fmt: skip


def good_rows() -> list[Row]:
    rows = [RUN, FACTS, smoke_row(), stage_row("smoke:keys-tma"), row_of_test(),
            stage_row("tests:kernels")]  # fmt: skip
    for head_dim, shapes in RATED.items():
        for shape in shapes:
            for direction in ("forward", "backward"):
                for asked in DENSITIES:
                    rows.append(rate(shape, head_dim, direction, ALIGNED, asked, 100 * asked))
                    if asked < 1:
                        rows.append(rate(shape, head_dim, direction, EXACT, asked, 140 * asked))
    for direction in ("forward", "backward"):
        for mask, asked in ((ALIGNED, 1.0), (ALIGNED, 0.2), (EXACT, 0.2)):
            for candidate, factor in (("diffattn", 1.0), ("flex", 1.3)):
                rows.append(
                    rate("wan-1.3b-480p", 128, direction, mask, asked, 100 * asked * factor)
                    | {"stage": "flex:wan-1.3b-480p", "candidate": candidate}
                )
    for method in ("radial", "gna", "clear", "freeswim", "attention-tile", "lvsa"):
        rows.append(
            {"kind": "building", "stage": "building:hunyuan-720p", "sources": "abc",
             "shape": "hunyuan-720p", "method": method, "tokens": 1000, "first_ms": 200.0,
             "ms": 50.0, "peak_bytes": 2**20, "nbytes": 2**20, "density": 0.1,
             "partial_blocks": 7, "bit_masks": 3}
        )  # fmt: skip
    for tokens in (17_160, 32_760, 75_600):
        for number in range(17):
            rows.append(
                {"kind": "selecting", "stage": "selecting", "sources": "abc", "tokens": tokens,
                 "method": f"method {number}", "partition": "2d", "density": 0.25,
                 "dense_ms": 9.0, "around_ms": 0.2, "total_ms": 5.0, "around_share": 0.04,
                 "speed_up": 1.8}
            )  # fmt: skip
    return rows


def statuses(rows: list[Row]) -> list[str]:
    return [one.status for one in verdicts(rows)]


def changed(match: dict[str, Any], **new: Any) -> list[Row]:
    rows = good_rows()
    hit = [i for i, row in enumerate(rows) if match.items() <= row.items()]
    assert hit
    for i in hit:
        rows[i] = rows[i] | new
    return rows


def test_everything_met() -> None:
    assert statuses(good_rows()) == [PASS] * COUNT
    assert [v.measured for v in verdicts(good_rows())][:6] == [9, 9, 6, 24, 24, 6]


def test_nothing_measured() -> None:
    assert statuses([RUN, FACTS]) == [NOT_MEASURED] * COUNT


RATES: dict[str, Any] = {"kind": "rate", "stage": "rates:wan-14b-720p"}
FLEX: dict[str, Any] = {"kind": "rate", "stage": "flex:wan-1.3b-480p", "candidate": "flex"}


@pytest.mark.parametrize(
    ("match", "new", "failed"),
    [
        (RATES | {"direction": "forward", "asked": 0.2, "mask": ALIGNED}, {"of_cudnn": 0.84}, 0),
        (RATES | {"direction": "backward", "asked": 0.1, "mask": ALIGNED}, {"of_cudnn": 0.74}, 1),
        ({"stage": "rates:cogvideox-5b", "asked": 0.5, "mask": ALIGNED}, {"of_cudnn": 0.74}, 2),
        (RATES | {"asked": 0.1, "mask": ALIGNED}, {"ms": 11.2}, 3),
        (RATES | {"asked": 0.5, "mask": EXACT}, {"ms": 75.5}, 4),
        (FLEX | {"asked": 1.0}, {"ms": 99.0}, 5),
        (FLEX | {"asked": 0.2, "mask": ALIGNED}, {"ms": 20.0}, 5),  # as fast as ours
        (RATES | {"asked": 0.5}, {"of_allowed": 1.1}, 6),
        (RATES | {"asked": 0.5}, {"of_allowed": float("nan")}, 6),
        ({"kind": "smoke"}, {"right": False, "error": "boom", "deviations": {}}, 6),
        ({"kind": "smoke"}, {"right": False, "same_bits": False}, 6),
        ({"kind": "stage", "stage": "smoke:keys-tma"}, {"rc": "time-out"}, 6),
        ({"kind": "building", "method": "gna"}, {"ms": 100.0}, 7),
        ({"kind": "selecting", "tokens": 17_160}, {"speed_up": 1.0}, 8),
        ({"kind": "selecting", "tokens": 75_600}, {"around_share": 0.05}, 9),
        ({"kind": "test"}, {"outcome": "failed"}, 10),
    ],
)
def test_one_case_that_misses_fails(match: Row, new: Row, failed: int) -> None:
    found = statuses(changed(match, **new))
    assert found[failed] == FAIL
    assert [status for i, status in enumerate(found) if i != failed] == [PASS] * (COUNT - 1)


@pytest.mark.parametrize(
    ("match", "new"),
    [
        (RATES | {"direction": "forward", "mask": ALIGNED}, {"of_cudnn": 0.85}),
        (RATES | {"asked": 1.0}, {"of_cudnn": 0.1}),  # where nothing is required
        (RATES | {"mask": EXACT}, {"of_cudnn": 0.1}),
        # A mask that is denser than asked may take longer in proportion.
        (
            {"stage": "rates:wan-14b-720p", "asked": 0.1, "mask": ALIGNED},
            {"ms": 12.0, "density": 0.12},
        ),
        ({"kind": "selecting", "tokens": 17_160}, {"speed_up": 0.5, "density": 0.43}),
        ({"kind": "selecting", "tokens": 17_160}, {"speed_up": 1.01}),
        ({"kind": "selecting", "tokens": 17_160}, {"around_share": 0.5}),
        ({"kind": "test"}, {"outcome": "passed"}),
    ],
)
def test_cases_on_the_right_side_pass(match: dict[str, Any], new: dict[str, Any]) -> None:
    found = statuses(changed(match, **new))
    assert FAIL not in found


def test_what_was_left_out_leaves_verdicts_open() -> None:
    rows = [row for row in good_rows() if row.get("shape") != "hunyuan-720p"]
    assert statuses(rows)[:5] == [INCOMPLETE, INCOMPLETE, PASS, INCOMPLETE, INCOMPLETE]
    assert statuses(rows)[7] == NOT_MEASURED
    assert errors([*good_rows(), stage_row("smoke:gather", "no time")]).status == INCOMPLETE
    assert (
        outcomes_of_tests([row_of_test(), stage_row("tests:kernels", "time-out")]).status
        == INCOMPLETE
    )
    assert outcomes_of_tests([row_of_test("skipped")]).status == NOT_MEASURED


def test_later_rows_count() -> None:
    rows = changed({"kind": "smoke"}, right=False, error="boom", deviations={})
    rows += [smoke_row(), stage_row("smoke:keys-tma")]
    assert FAIL not in statuses(rows)
    rows.append(rate("wan-14b-720p", 128, "forward", ALIGNED, 0.2, 20.0, of_cudnn=0.3))
    assert statuses(rows)[0] == FAIL


def test_a_verdict_names_its_worst_case() -> None:
    rows = changed(RATES | {"direction": "forward", "asked": 0.2, "mask": ALIGNED}, of_cudnn=0.5)
    text = str(verdicts(rows)[0])
    assert text == (
        "FAIL: forward, head_dim 128, densities 0.1-0.5: at least 0.85 of cuDNN's rate; worst"
        " 0.500 (wan-14b-720p forward block-aligned 0.2), 9 of 9 cases"
    )
    assert verdict("x", [("a", float("nan"))], planned=1, at_least=0.5).status == FAIL


# ---------------------------------------------------------------- the page


def test_the_page_has_a_line_for_every_figure(tmp_path: Path) -> None:
    rows = good_rows()
    rows += [
        tune_row("forward", "dense", A, 10.0, 10.0, shipped=True),
        tune_row("forward", "dense", B, 9.0, 10.0),
        tune_row("forward", "dense", C, None, None),
        {"kind": "yardstick", "stage": "yardstick", "sources": "abc", "name": "copy", "ms": 1.4,
         "gb_per_s": 3000.0},
        {"kind": "linear", "stage": "linear", "sources": "abc", "shape": "wan",
         "direction": "forward", "tokens": 1000, "ms": 1.0, "dense_ms": 13.0, "speed_up": 13.0},
        {"kind": "summary", "stage": "summary", "sources": "abc", "shape": "wan",
         "direction": "backward", "tokens": 1000, "ms": 2.0, "dense_ms": 20.0, "tflops": 400.0,
         "of_dense": 0.1},
        {"kind": "call", "stage": "rates:wan", "sources": "abc", "shape": "wan", "asked": 0.1,
         "host_us": 80.0, "host_us_recorded": 90.0, "host_us_backward": 140.0,
         "permute_ms": 0.3, "permute_of_call": 0.2},
        {"kind": "smoke", "stage": "smoke:forward-gluon", "sources": "abc", "what": "forward-gluon",
         "case": "b", "head_dim": 80, "taken": False, "why": "a key | mask"},
        row_of_test("failed", "test_a.py::test_c") | {"error": "Traceback\nAssertionError: no"},
        {"kind": "compile", "stage": "compile:0/12", "sources": "abc",
         "failed": {"gluon": "RuntimeError"}},
    ]  # fmt: skip
    for tokens, speed_up in ((1000, 1.2), (2000, 0.9), (4000, 1.5)):
        rows.append(
            {"kind": "method", "stage": "methods", "sources": "abc", "tokens": tokens,
             "method": "gna", "ms": 1.0, "dense_ms": speed_up, "speed_up": speed_up}
        )  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut off')
    (tmp_path / "clocks.csv").write_text(
        "2026/12/01, 345 MHz, 2619 MHz, 70.1 W, 30, 0x0, 0 %\n"
        "2026/12/01, 1980 MHz, 2619 MHz, 650.5 W, 60, 0x4, 100 %\n"
        "2026/12/01, 1700 MHz, 2619 MHz, 690.0 W, 64, 0x4, 99 %\n"
        "2026/12/01, 1800"
    )
    lines = report.write(path, tmp_path / "docs", "gpu-h100")
    assert lines[0].startswith("PASS: forward")
    page = (tmp_path / "docs" / "gpu-h100.md").read_text()
    for text in (
        "- 2026-12-01 10:00 UTC: NVIDIA H100, revision 123, sources abc, 8 minutes",
        "- gpu NVIDIA H100, torch 2.11.0, triton",
        "- clocks.sm lowest / median / highest: 1700 / 1840 / 1980",
        "- PASS: time over compiled FlexAttention's",
        "| wan-14b-720p | forward | block-aligned | 0.200 | 0.200 | diffattn | 20.000"
        " | 20.000-20.000 | 500 | 90% | 1.0e-03 | 0.20 |",
        "| wan-1.3b-480p | forward | token-exact | 0.200 | 20.000 | 26.000 | 1.30 |",
        "| copy | 1.400 | 3000 GB/s |",
        "| forward | 128 | tma | 64x64 w8 s2 p64 ahead | dense: 9.000 | dense: 10.000 |",
        "| forward | 128 | tma | 128x64 w8 s2 p64 ahead | dense | - | - | wrong |",
        "| 17160 | method 0 | 2d | 0.250 | 9.000 | 0.200 | 5.000 | 4% | 1.80 |",
        "| wan | backward | 2.000 | 400 | 20.000 | 10% |",
        "| gna | 1.20 | 0.90 | 1.50 | 4000 |",
        "| wan | forward | 1.000 | 13.000 | 13.0 |",
        "| hunyuan-720p | radial | 200 | 50 | 1.0 | 1 | 0.100 | 7 | 3 |",
        "| wan | 0.1 | 80 | 90 | 140 | 0.300 | 20% |",
        "| keys-tma | a | dk 1.0e-03 | 0.30 | yes | right |",
        "| forward-gluon | b | - | - | - | not taken: a key \\| mask |",
        "| test_a.py::test_c | failed | AssertionError: no |",
        "| smoke:keys-tma | 0 | 3 |",
        "| compile:0/12 |  | {'gluon': 'RuntimeError'} |",
    ):
        assert text in page, text
    record = json.loads((tmp_path / "docs" / "gpu-h100.json").read_text())
    assert len(record["rows"]) == len(rows)
    assert record["tuned"][0]["block_m"] == 64
    assert [one["status"] for one in record["verdicts"]][:3] == [PASS] * 3


def test_rows_of_every_table_are_as_wide_as_its_header() -> None:
    for block in report.markdown(good_rows(), {}).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_a_run_that_was_cut_off_at_once_has_a_page() -> None:
    page = report.markdown([RUN], {})
    assert "- not measured: forward, head_dim 128" in page
    assert "## Rates" not in page
    assert "dry run" not in page
    assert "A dry run on a CPU" in report.markdown([RUN | {"dry": True}], {})
