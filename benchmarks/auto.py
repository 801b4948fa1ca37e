"""The table of AutoAttn: which method comes nearest to the dense model at equal attention work.

    python benchmarks/auto.py --output benchmarks

writes benchmarks/auto.json, benchmarks/auto.md and diffattn/methods/auto/table.json. An interrupted
run goes on from benchmarks/auto.part.json.

How the figures are made:

- The bundled model (16 x 12 x 12 tokens, 4 layers) generates clips of held-out captions, in 10
  steps, and in 4 steps as few-step models do.
- "work" is the share of the dense run's attention that a run computes: token pairs and means, dense
  steps included. A speed stands for a share: faithful 60 %, balanced 40 %, fast 25 %. The parameter
  of each candidate is solved for that share, so that candidates of a speed do equal work.
- "PSNR" is the mean over the clips against the dense model's clip of the same caption and noise.
- The candidate with the highest PSNR of a speed is the table's line. Its blocks have 32 tokens,
  because the model has 2,304 tokens only. For calls over at least 8,192 tokens the table has the
  same method with blocks of 64 along the Morton curve, the setting of its paper, which a model of
  this size cannot measure.
- Methods that need training are no candidates, and neither are masks that do not look at what the
  tokens hold (benchmarks/equal_density.md). VMoBA is left out as well: a kernel that gathers keys
  for each query has a price on GPUs that is not known yet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import torch
from diffusers import WanPipeline
from equal_density import counted

import diffattn
from diffattn import BlockTopKAttn, Method, SolAttn, early_ramp
from diffattn.lora.recipes import recipe_for
from diffattn.pipelines.run.compare import psnr
from diffattn.samples.moving_shapes import MODEL_DIR
from diffattn.samples.moving_shapes.adaptation import HeldOut
from diffattn.samples.moving_shapes.evaluate import Sampling

TABLE = Path(diffattn.__file__).parent / "methods" / "auto" / "table.json"
WORK = {"faithful": 0.6, "balanced": 0.4, "fast": 0.25}
RUNS = {False: 10, True: 4}
BLOCK, LARGE_BLOCK = 32, 64
LARGE = 8192
HEADER = "| steps | speed | candidate | work | PSNR, dB | |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """A candidate's figures; the attributes are those of `diffattn.methods.auto.table`."""

    speed: str
    few_steps: bool
    name: str
    method: dict[str, Any]
    work: float
    psnr_db: float


def candidates(speed: str, steps: int) -> Iterator[tuple[str, Method]]:
    """Methods whose runs of `steps` steps do the work of a speed."""
    few = steps == RUNS[True]
    wanted = WORK[speed]
    own = 1 / 72  # every row also sees its own block
    for dense in (0.0, 0.25) if few else (0.1, 0.2):
        share = (wanted - dense) / (1 - dense)
        if share < 0.08:
            continue
        head: dict[str, Any] = {"dense_layers": 0, "dense_steps": dense, "block": BLOCK}
        means = 1 / BLOCK
        yield (
            f"BlockTopK, {dense:.0%} dense",
            BlockTopKAttn(keep=round(share - own, 3), order="raster", **head),
        )
        yield (
            f"BlockTopK with summaries, {dense:.0%} dense",
            BlockTopKAttn(
                keep=round(share - own - means, 3), order="raster", remainder="summary", **head
            ),
        )
        tau = NormalDist().inv_cdf(1 - max(0.02, share - own - means))
        yield (
            f"Sol-Attn, {dense:.0%} dense",
            SolAttn(tau=round(tau, 2), neighbours=0, order="raster", **head),
        )
    for peak in (0.5, 1.0):
        share = ramp_for(wanted - own - 1 / BLOCK, peak, steps)
        if share is not None:
            ramp = early_ramp(share, peak)
            yield (
                f"BlockTopK with summaries, ramp from {peak:.0%}",
                BlockTopKAttn(
                    keep=ramp, order="raster", remainder="summary", dense_layers=0,
                    dense_steps=0, block=BLOCK,
                ),
            )  # fmt: skip


def ramp_for(wanted: float, peak: float, steps: int) -> float | None:
    """The share of an early ramp whose mean over a run is as wanted; None if there is none."""
    low, high = 0.03, min(peak, 0.99)
    for _ in range(30):
        middle = (low + high) / 2
        ramp = early_ramp(middle, peak)
        if sum(ramp.at(step, steps) for step in range(steps)) / steps < wanted:
            low = middle
        else:
            high = middle
    return None if low < 0.031 or high > 0.98 * peak else round(high, 3)


def measure(name: str, method: Method, speed: str, held_out: HeldOut, pipe: Any, dense: Any) -> Row:
    """The figures of a candidate."""
    attachment = pipe.set_attn_processor(method)
    with counted(method) as shares:
        made = held_out.clips(pipe)
    pipe.set_attn_processor(None)
    sparse, all_calls = len(shares), attachment.sparse_calls + attachment.dense_calls
    summaries = getattr(method, "remainder", "drop") == "summary"
    pairs = sum(shares) + sparse * (1 / BLOCK if summaries else 0)
    work = (pairs + all_calls - sparse) / all_calls
    psnr_db = fmean(psnr(a, b) for a, b in zip(dense, made, strict=True))
    return Row(speed, False, name, method.to_dict(), work, psnr_db)


def large(method: dict[str, Any]) -> dict[str, Any]:
    """The same method for long sequences."""
    return {**method, "block": LARGE_BLOCK, "order": "morton"}


def table(rows: list[Row], best: list[Row]) -> str:
    lines = [HEADER]
    for row in rows:
        chosen = "chosen" if row in best else ""
        lines.append(
            f"| {RUNS[row.few_steps]} | {row.speed} | {row.name} | {row.work:.1%}"
            f" | {row.psnr_db:.2f} | {chosen} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--prompts", type=int, default=4, help="captions to generate")
    options = parser.parse_args()
    pipe: Any = WanPipeline.from_pretrained(MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    recipe = recipe_for(pipe)
    part = options.output / "auto.part.json"
    rows = [Row(**row) for row in json.loads(part.read_text())] if part.exists() else []
    for few, steps in RUNS.items():
        sampling = replace(Sampling(), steps=steps)
        held_out = HeldOut(pipe, recipe, 0, options.prompts, sampling)
        dense = held_out.clips(pipe)
        for speed in WORK:
            for name, method in candidates(speed, steps):
                made = method.to_dict()
                known = [(row.few_steps, row.speed, row.method) for row in rows]
                if (few, speed, made) in known:
                    continue
                row = measure(name, method, speed, held_out, pipe, dense)
                rows.append(replace(row, few_steps=few))
                print(rows[-1], flush=True)
                part.write_text(json.dumps([asdict(row) for row in rows]))
    best = [
        max(
            (row for row in rows if (row.speed, row.few_steps) == key),
            key=lambda row: row.psnr_db,
        )
        for key in dict.fromkeys((row.speed, row.few_steps) for row in rows)
    ]
    write(options, rows, best)
    part.unlink()


def write(options: argparse.Namespace, rows: list[Row], best: list[Row]) -> None:
    """Write the figures and the table, each whole or not at all."""
    about = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "diffattn": diffattn.__version__,
        "prompts": options.prompts,
    }
    lines = []
    for row in best:
        line = {name: value for name, value in asdict(row).items() if name != "name"}
        lines.append({**line, "tokens": 0})
        lines.append({**line, "tokens": LARGE, "method": large(row.method)})
    found = {"about": about, "rows": [asdict(row) for row in rows]}
    words = (
        (__doc__ or "")
        .replace("    python", "```\npython")
        .replace("\n\nwrites", "\n```\n\nwrites")
    )
    texts = {
        options.output / "auto.json": json.dumps(found, indent=1) + "\n",
        options.output / "auto.md": f"# The table of AutoAttn\n\n{words}\n{table(rows, best)}\n",
        TABLE: json.dumps({"about": about, "rows": lines}, indent=1) + "\n",
    }
    for path, text in texts.items():
        part = path.with_name(path.name + ".part")
        part.write_text(text, "utf-8")
        os.replace(part, path)


if __name__ == "__main__":
    main()
