"""Measured training steps of the bundled model beside their plans, on the CPU.

Writes lora_plan.json, and lora_plan.md beside it. The rate that plans are given is that of a large
matrix product in the same process. A step's time is the least of several, in turns with the other
cases, since other programs share the machine. Memory is what torch's allocator has out at most.

    python benchmarks/lora_plan.py --output benchmarks
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from diffattn.lora.recipes import recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.trainer import Trainer
from diffattn.pipelines.run.loading import load_model
from diffattn.pipelines.run.model_shape import shape_of
from diffattn.pipelines.run.request import BUNDLED_MODEL, Request
from diffattn.pipelines.train.estimate import estimate_for

SIDE, TURNS = 1024, 3
# Method, frames, gradient checkpointing, losses of comparison, storage.
CASES = (
    ("gna", 8, False, False, None),
    ("gna", 16, False, False, None),
    ("gna", 16, True, False, None),
    ("gna", 16, False, True, None),
    ("radial", 16, False, False, None),
    ("gna", 16, True, False, "int8"),
)


class Clips(list[dict[str, Any]]):
    """One encoded clip in memory."""

    keys = ("clip",)


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    folder = parser.parse_args().output
    torch.set_num_threads(1)
    rate = _rate()
    made = [_case(*case, rate) for case in CASES]
    turns = [_turn(made) for _ in range(TURNS)]
    seconds = [min(times) for times in zip(*turns, strict=True)]
    results = []
    for (entry, trainer), time_of_step in zip(made, seconds, strict=True):
        entry |= {"seconds": round(time_of_step, 3), "bytes": _peak(trainer)}
        results.append(entry)
    facts = {"threads": 1, "torch": torch.__version__, "tflops": round(rate, 4)}
    text = json.dumps({**facts, "cases": results}, indent=1) + "\n"
    (folder / "lora_plan.json").write_text(text, "utf-8")
    (folder / "lora_plan.md").write_text(_table(facts, results), "utf-8")


def _rate() -> float:
    """TFLOP/s of a large float32 matrix product."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times) / 1e12


def _case(
    method: str, frames: int, checkpointing: bool, compared: bool, base: str | None, rate: float
) -> tuple[dict[str, Any], Trainer]:
    pipe = load_model(Request("a", dtype="float32"), placed=False, base_dtype=base).pipe
    settings = TrainSettings(
        attention={"type": method, "dense_layers": 0, "dense_steps": 0},
        rank=16,
        steps=100,
        caption_dropout=0.0,
        prediction=0.5 if compared else None,
        gradient_checkpointing=checkpointing,
    )
    size = {"height": 96, "width": 96, "num_frames": frames}
    recipe = recipe_for(pipe)
    shape = shape_of(BUNDLED_MODEL)
    said = estimate_for(
        pipe, recipe, shape, size, settings, base, torch.float32, torch.device("cpu"), rate
    )
    assert said.work is not None
    need = said.footprint
    conditions = said.training.conditions
    clip = {
        "latents": torch.randn(said.training.latents),
        "conditions": {name: torch.ones(each) for name, each in conditions.items()},
        "key": "clip",
    }
    place = Path(tempfile.mkdtemp())
    trainer = Trainer(pipe, Clips([clip]), clip["conditions"], settings, place, recipe=recipe)
    return {
        "method": method,
        "frames": frames,
        "checkpointing": checkpointing,
        "prediction": compared,
        "base_dtype": base,
        "planned_seconds": round(said.work.seconds, 3),
        "planned_bytes": need.activations + need.gradients + need.unpacked,
    }, trainer


def _turn(made: list[tuple[dict[str, Any], Trainer]]) -> list[float]:
    return [trainer._make_step().seconds for _, trainer in made]


def _peak(trainer: Trainer) -> int:
    """The most bytes of the passes of a step."""
    for weight in trainer.model.parameters():
        weight.grad = None
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer._student.train()
        trainer._student(trainer._draw([0]))["loss"].backward()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _table(facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    lines = [
        "# Plans of training steps beside measured steps",
        "",
        f"The bundled model at 96x96, rank 16, batch 1, float32, one thread of a shared CPU; torch"
        f" {facts['torch']}; the plan's rate is that of a matrix product of side {SIDE},"
        f" {facts['tflops'] * 1000:.0f} GFLOP/s. Planned times are lower bounds. Written by"
        f" lora_plan.py.",
        "",
        "| method | frames | checkpointing | dense model compared | frozen weights | MiB planned |"
        " MiB measured | s planned | s measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        flags = ("yes" if each[name] else "no" for name in ("checkpointing", "prediction"))
        figures = (
            f"{each['planned_bytes'] / 2**20:.1f}",
            f"{each['bytes'] / 2**20:.1f}",
            f"{each['planned_seconds']:.2f}",
            f"{each['seconds']:.2f}",
        )
        cells = (each["method"], str(each["frames"]), *flags, each["base_dtype"] or "float32")
        lines.append("| " + " | ".join((*cells, *figures)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
