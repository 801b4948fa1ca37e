"""The page made from a run's rows: what must be reached, the figures, and what went wrong."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_run import table
from gpu_run.journal import Row, latest, read
from gpu_run.verdicts import FLEX, OURS, rates, verdicts

ABOUT = """How the figures are made:

- All calls of a direction are timed one after another, round after round, so that ratios come from
  the same seconds; `ms` is the median of the rounds by CUDA events, ratios are medians of the
  ratios of the rounds. A buffer larger than the L2 cache is written before every call, as often as
  the host needs to launch the call: `ms` is time of the device without gaps from launching. The
  time of the host for a call is a figure of its own. Only where a call waits for the device, `ms`
  contains both.
- TFLOP/s are effective: 4 * heads * pairs * head_dim forward and 2.5 times that backward, where
  pairs are the token pairs that attend. Backward is the backward pass alone.
- "block-aligned" masks have full blocks only: every block sees the nearest ones in space and time.
  "token-exact" ones are 3-D windows over single tokens in tile order. The density of both is the
  share of the blocks of 128 x 128 that are visited; "attended" is the share of the token pairs.
- "around" is everything that a selecting method does outside of its kernels, timed as a call whose
  kernels are left out: tokens put in order and back, pooling, scores, the rule, lists. A method
  that remembers is a call of the first sparse step of a run, and of a later step where it says so.
  Its density is the share of the pairs of tokens that tiles cover: SVG2 fills clusters up to whole
  tiles, so that the share may be above 1.
- Errors are against float64: |got - truth| / |truth|, and the largest one over what eager
  attention in the same dtype allows (3 times its own, and 2 units of rounding)."""


def write(results: Path, folder: Path, name: str) -> list[str]:
    """Write `name`.json and `name`.md from a run's results.jsonl; returns the verdicts' lines.

    Rows of a run that was cut off serve as well.
    """
    rows = read(results)
    judged = verdicts(rows)
    record = {
        "runs": _of_kind(rows, "run"),
        "verdicts": [asdict(one) for one in judged],
        "tuned": table.fastest(rows),
        "clocks": clocks(results.with_name("clocks.csv")),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(rows, record["clocks"]))
    return [str(one) for one in judged]


def markdown(rows: list[Row], clock: dict[str, str]) -> str:
    sections = [
        "# Attention on a GPU",
        "Written by `python3 benchmarks/gpu_run report`.",
        _facts(rows, clock),
        ABOUT,
        "## What must be reached\n\n" + "\n".join(f"- {one}" for one in verdicts(rows)),
        _section("Rates", _rates(rows)),
        _section("Beside FlexAttention", _flex(rows)),
        _section("Dense attention, a matrix product and a copy", _yardstick(rows)),
        _section("Chosen forms and tiles", _chosen(rows)),
        _section("All that was tried", _tried(rows)),
        _section("Selecting methods", _selecting(rows)),
        _section("Where methods beat dense attention", _methods(rows)),
        _section("Attention to summaries", _summary(rows)),
        _section("Linear attention", _linear(rows)),
        _section("Building masks", _building(rows)),
        _section("Around the kernel", _calls(rows)),
        _section("Errors of small calls", _smoke(rows)),
        _section("Tests that failed", _tests(rows)),
        _section("Stages", _stages(rows)),
        _section("What failed", _failed(rows)),
    ]
    if _of_kind(rows, "run") and _of_kind(rows, "run")[-1]["dry"]:
        sections.insert(1, "**A dry run on a CPU: these figures say nothing about any GPU.**")
    return "\n\n".join(section for section in sections if section) + "\n"


def clocks(path: Path) -> dict[str, str]:
    """Lowest, median and highest value of each column of nvidia-smi, while the GPU was busy."""
    from gpu_run.clocks import FIELDS

    columns: dict[str, list[float]] = {}
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        names = FIELDS.split(",")
        if len(cells) != len(names):
            continue
        values = dict(zip(names, cells, strict=True))
        if _number(values["utilization.gpu"]) in (None, 0.0):
            continue
        for key in ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"):
            number = _number(values[key])
            if number is not None:
                columns.setdefault(key, []).append(number)
    return {
        key: f"{min(x):g} / {statistics.median(x):g} / {max(x):g}" for key, x in columns.items()
    }


def _number(text: str) -> float | None:
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        return None


# ---------------------------------------------------------------- sections


def _facts(rows: list[Row], clock: dict[str, str]) -> str:
    lines = []
    for run in _of_kind(rows, "run"):
        lines.append(
            f"- {run['date']}: {run['gpu']}, revision {run['revision']}, sources {run['sources']},"
            f" {run['minutes']:g} minutes{', continued' if run['continued'] else ''}"
        )
    machine = latest(_of_kind(rows, "facts"), "gpu", "torch", "triton", "cuda", "cudnn")
    for facts in machine:
        known = {k: v for k, v in facts.items() if k not in ("at", "stage", "kind", "sources")}
        lines.append("- " + ", ".join(f"{key} {value}" for key, value in known.items()))
    lines += [f"- {key} lowest / median / highest: {value}" for key, value in clock.items()]
    return "\n".join(lines)


def _rates(rows: list[Row]) -> list[list[str]]:
    found = [
        [
            row["shape"], row["direction"], row["mask"], f"{row['density']:.3f}",
            f"{row['pairs'] / row['tokens'] ** 2:.3f}", row["candidate"], f"{row['ms']:.3f}",
            f"{row['low']:.3f}-{row['high']:.3f}", f"{row['tflops']:.0f}",
            _percent(row.get("of_cudnn")), f"{row['error']:.1e}", f"{row['of_allowed']:.2f}",
        ]
        for row in rates(rows).values()
    ]  # fmt: skip
    return [
        ["shape", "direction", "mask", "density", "attended", "candidate", "ms", "10-90 %",
         "TFLOP/s", "of cuDNN", "error", "of allowed"], *found,
    ]  # fmt: skip


def _flex(rows: list[Row]) -> list[list[str]]:
    times = rates(rows, "flex:")
    lines = []
    for (place, candidate), row in times.items():
        other = times.get((place, FLEX))
        if candidate == OURS and other:
            ratio = statistics.median(
                a / b for a, b in zip(other["rounds"], row["rounds"], strict=False)
            )
            lines.append(
                [*place[:3], f"{row['density']:.3f}", f"{row['ms']:.3f}", f"{other['ms']:.3f}",
                 f"{ratio:.2f}"]
            )  # fmt: skip
    return [["shape", "direction", "mask", "density", "ms", "flex ms", "flex / ours"], *lines]


def _yardstick(rows: list[Row]) -> list[list[str]]:
    lines = [
        [row["name"], f"{row['ms']:.3f}", f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row
         else f"{row['gb_per_s']:.0f} GB/s"]
        for row in latest(_of_kind(rows, "yardstick"), "name")
    ]  # fmt: skip
    lines += [
        [f"{candidate} {place[0]} {place[1]}", f"{row['ms']:.3f}", f"{row['tflops']:.0f} TFLOP/s"]
        for (place, candidate), row in rates(rows, "yardstick").items()
    ]
    return [["what", "ms", "rate"], *lines]


def _chosen(rows: list[Row]) -> list[list[str]]:
    return [
        ["kernel", "head_dim", "form", "tiles", "ms", "shipped ms"],
        *(
            [
                one["kernel"], str(one["head_dim"]), one["variant"], _tiles(one),
                _by_place(one["ms"]), _by_place(one["shipped_ms"]),
            ]
            for one in table.fastest(rows)
        ),
    ]  # fmt: skip


def _tried(rows: list[Row]) -> list[list[str]]:
    tried = latest(_of_kind(rows, "tune"), "kernel", "head_dim", "variant", "tiles", "place")
    lines = []
    for row in tried:
        outcome = f"{row['ms']:.3f}" if "ms" in row else "-"
        why = row.get("not_taken") or row.get("error") or ""
        if "ms" not in row and not why:
            why = "wrong"
        lines.append(
            [row["kernel"], str(row["head_dim"]), row["variant"], _tiles(row["tiles"]),
             row["place"], outcome, _percent(row.get("of_shipped")),
             str(why) if "ms" not in row else ""]
        )  # fmt: skip
    return [["kernel", "head_dim", "form", "tiles", "mask", "ms", "of shipped", "why not"], *lines]


def _selecting(rows: list[Row]) -> list[list[str]]:
    found = latest(_of_kind(rows, "selecting"), "tokens", "method", "partition")
    parts = ("dense", "around", "total")
    return [
        ["tokens", "method", "blocks", "density", *(f"{part} ms" for part in parts), "around",
         "speed-up"],
        *(
            [
                str(r["tokens"]), r["method"], r["partition"], f"{r['density']:.3f}",
                *(f"{r[f'{part}_ms']:.3f}" for part in parts), _percent(r["around_share"]),
                f"{r['speed_up']:.2f}",
            ]
            for r in found
            if "speed_up" in r
        ),
    ]  # fmt: skip


def _methods(rows: list[Row]) -> list[list[str]]:
    found = latest((r for r in _of_kind(rows, "method") if "ms" in r), "tokens", "method")
    tokens = sorted({r["tokens"] for r in found})
    by = {(r["method"], r["tokens"]): r["speed_up"] for r in found}
    lines = []
    for method in dict.fromkeys(r["method"] for r in found):
        known = [(n, by[method, n]) for n in tokens if (method, n) in by]
        # Faster from that number of tokens on, not only there.
        slow = [n for n, speed_up in known if speed_up <= 1]
        pays = next((n for n, _ in known if not slow or n > max(slow)), None)
        lines.append(
            [method, *(f"{by[method, n]:.2f}" if (method, n) in by else "-" for n in tokens),
             str(pays or "-")]
        )  # fmt: skip
    return [["method", *(f"{n} tokens" for n in tokens), "faster from"], *lines]


def _linear(rows: list[Row]) -> list[list[str]]:
    found = latest((r for r in _of_kind(rows, "linear") if "ms" in r), "shape", "direction")
    return [
        ["shape", "direction", "ms", "dense ms", "speed-up"],
        *(
            [r["shape"], r["direction"], f"{r['ms']:.3f}", f"{r['dense_ms']:.3f}",
             f"{r['speed_up']:.1f}"]
            for r in found
        ),
    ]  # fmt: skip


def _summary(rows: list[Row]) -> list[list[str]]:
    found = latest((r for r in _of_kind(rows, "summary") if "ms" in r), "shape", "direction")
    return [
        ["shape", "direction", "ms", "TFLOP/s", "dense ms", "of dense"],
        *(
            [r["shape"], r["direction"], f"{r['ms']:.3f}", f"{r['tflops']:.0f}",
             f"{r['dense_ms']:.3f}", _percent(r["of_dense"])]
            for r in found
        ),
    ]  # fmt: skip


def _building(rows: list[Row]) -> list[list[str]]:
    found = latest((r for r in _of_kind(rows, "building") if "ms" in r), "shape", "method")
    return [
        ["shape", "method", "first ms", "ms", "MiB", "peak MiB", "density", "partial", "bit masks"],
        *(
            [
                r["shape"], r["method"], f"{r['first_ms']:.0f}", f"{r['ms']:.0f}",
                f"{r['nbytes'] / 2**20:.1f}", f"{r['peak_bytes'] / 2**20:.0f}",
                f"{r['density']:.3f}", str(r["partial_blocks"]), str(r["bit_masks"]),
            ]
            for r in found
        ),
    ]  # fmt: skip


def _calls(rows: list[Row]) -> list[list[str]]:
    found = latest(_of_kind(rows, "call"), "shape", "asked")
    return [
        ["shape", "density", "host us of a call", "with gradients", "of a backward pass",
         "permute ms", "permute / attention"],
        *(
            [r["shape"], f"{r['asked']:g}", _microseconds(r, "host_us"),
             _microseconds(r, "host_us_recorded"), _microseconds(r, "host_us_backward"),
             f"{r['permute_ms']:.3f}", _percent(r["permute_of_call"])]
            for r in found
        ),
    ]  # fmt: skip


def _microseconds(row: Row, key: str) -> str:
    return f"{row[key]:.0f}" if key in row else "-"


def _smoke(rows: list[Row]) -> list[list[str]]:
    lines = []
    for row in latest(_of_kind(rows, "smoke"), "what", "case"):
        deviations = row.get("deviations", {})
        if not row["taken"]:
            outcome = f"not taken: {row['why']}"
        elif row["right"]:
            outcome = "right"
        else:
            outcome = row.get("error") or ("WRONG" if row["same_bits"] else "WRONG or other bits")
        lines.append(
            [
                row["what"], row["case"],
                ", ".join(f"{name} {x['relative']:.1e}" for name, x in deviations.items()) or "-",
                f"{max(x['of_allowed'] for x in deviations.values()):.2f}" if deviations else "-",
                {True: "yes", False: "no", None: "-"}[row.get("same_bits")], outcome,
            ]
        )  # fmt: skip
    return [["kernel", "case", "errors", "of allowed", "same bits", "outcome"], *lines]


def _tests(rows: list[Row]) -> list[list[str]]:
    failed = [
        row
        for row in latest(_of_kind(rows, "test"), "test")
        if row["outcome"] not in ("passed", "skipped")
    ]
    lines = [[r["test"], r["outcome"], _last_line(r.get("error", ""))] for r in failed]
    return [["test", "outcome", "why"], *lines]


def _stages(rows: list[Row]) -> list[list[str]]:
    lines = [
        [row["stage"], str(row["rc"]), f"{row['seconds']:.0f}" if "seconds" in row else "-"]
        for row in _of_kind(rows, "stage")
    ]
    return [["stage", "ended with", "seconds"], *lines]


def _failed(rows: list[Row]) -> list[list[str]]:
    lines = [
        [row["stage"], " ".join(str(row[key]) for key in ("shape", "direction", "candidate", "mask",
         "asked", "method", "tokens", "partition") if key in row), str(row["failed"])]
        for row in rows
        if row.get("failed")
    ]  # fmt: skip
    return [["stage", "what", "why"], *lines]


# ---------------------------------------------------------------- tables


def _of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _section(title: str, lines: Iterable[list[str]]) -> str:
    header, *body = lines
    if not body:
        return ""
    cells = [header, ["---"] * len(header), *body]
    text = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in cells)
    return f"## {title}\n\n{text}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{x:.0%}"


def _tiles(tiles: dict[str, Any]) -> str:
    text = "{block_m}x{block_n} w{num_warps} s{num_stages}".format(**tiles)
    if tiles["partial"] is not None:
        text += f" p{tiles['partial']}"
    return f"{text} ahead" if tiles["ahead"] else text


def _by_place(times: dict[str, float]) -> str:
    return ", ".join(f"{place}: {ms:.3f}" for place, ms in times.items())


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
