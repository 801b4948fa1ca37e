"""How much a LoRA recovers of the loss that a sparse mask adds to the bundled model.

    python benchmarks/lora.py --output benchmarks

writes each finished row into a file of benchmarks/lora/, and benchmarks/lora.md from all files in
that folder. An existing row is not made again, and a row that was stopped goes on from its last
checkpoint. So a run may be cut into parts, and several processes may share the run (--methods).

How the figures are made:

- The bundled model (16 x 12 x 12 tokens, 4 layers), with every layer and every step sparse: the
  default schedules of the methods keep some dense, which hides the cost of the mask.
- "loss" is flow matching on held-out clips at fixed noise levels with fixed noise, the same for
  every column. "recovered" is the share of the gap between sparse and dense that the LoRA closes.
- "distance" is the mean squared difference between the model's predictions for these clips and
  those of the dense model. The model's own training was short: a LoRA that continues this training
  lowers the loss, but not the distance.
- "PSNR" is the mean over generated clips, against the dense model's clip of the same caption and
  noise. "right" is the share of the colours, backgrounds and directions that the checker reads as
  the caption says.
- The LoRA is trained on rendered clips of other captions. The learning rate falls along a cosine.
- Density is the share of the token pairs that attend. Methods that select by content, or that have
  no pairs, have no density.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

import diffattn
from diffattn.lora.recipes import recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.trainer import Trainer
from diffattn.methods import METHODS, from_dict
from diffattn.methods.base import StaticMaskMethod
from diffattn.samples.moving_shapes import MODEL_DIR
from diffattn.samples.moving_shapes.adaptation import Figures, HeldOut, RenderedClips
from diffattn.samples.moving_shapes.evaluate import Sampling

GRID = diffattn.TokenGrid(16, 12, 12)
DENSE = "dense"
# Two settings of each method; the first lets more tokens attend.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "radial": ({}, {"sink": False, "first_distance_width": "half", "split_threshold": 48}),
    "gna": ({"window": (7, 7, 7)}, {"window": (5, 5, 5)}),
    "clear": (
        {"radius": 3, "frame_radius": 3},
        {"radius": 3, "frame_radius": 3, "first_frame": False},
    ),
    "freeswim": ({"native": (6, 6)}, {"native": (4, 4)}),
    "vmoba": ({}, {"topk": (2, 3, 4)}),
    "agent": ({"cell": (2, 4, 4)}, {}),
    "linfusion": ({}, {"mid_dim": -1}),
}
CLIPS = 1024
HEADER = (
    "| method | density | loss dense | sparse | + LoRA | recovered | distance sparse | + LoRA"
    " | PSNR sparse | + LoRA | right dense | sparse | + LoRA | steps | minutes |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Row:
    """A method with its parameters, before and after a training.

    Attributes:
        method: as its `to_dict()` gives it.
        density: share of the token pairs that attend; None where the data decide.
        dense, sparse, trained: figures of the dense model, under the method, and with the LoRA.
        settings: of the training.
        minutes: duration of the training.
    """

    method: dict[str, Any]
    density: float | None
    dense: Figures
    sparse: Figures
    trained: Figures
    settings: dict[str, Any]
    minutes: float

    @property
    def recovered(self) -> float:
        """The share of the loss gap that the LoRA closes."""
        return (self.sparse.loss - self.trained.loss) / (self.sparse.loss - self.dense.loss)


def load() -> Any:
    # The pipeline warns of its own rounding of the number of frames.
    diffusers.utils.logging.set_verbosity_error()
    pipe = WanPipeline.from_pretrained(MODEL_DIR, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cases(names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The first setting of every method, then the second: a part of a run is of use already."""
    return [(name, CASES[name][turn]) for turn in (0, 1) for name in names]


def method_settings(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The method's settings with every layer and every step sparse."""
    everywhere = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}
    method = from_dict({"type": name, **parameters, **everywhere})
    return json.loads(json.dumps(method.for_model("wan2.1", GRID).to_dict()))


def row_name(name: str, parameters: dict[str, Any]) -> str:
    turn = CASES[name].index(parameters) + 1
    return f"{name}-{turn}"


def density_of(settings: dict[str, Any]) -> float | None:
    method = from_dict(settings)
    return method.mask(GRID).density if isinstance(method, StaticMaskMethod) else None


def measure_dense(
    held_out: HeldOut, pipe: Any, work: Path
) -> tuple[Figures, list[NDArray[np.uint8]]]:
    """The dense model's figures and clips, made once and kept in `work`."""
    count = len(held_out.scenes)
    kept = work / f"dense-{count}.npz"
    if kept.is_file():
        with np.load(kept) as file:
            facts = json.loads(str(file["figures"]))
            return Figures(**facts), list(file["clips"])
    figures, clips = held_out.figures(pipe)
    partial = work / f".{kept.stem}-{os.getpid()}.npz"
    np.savez_compressed(partial, figures=json.dumps(asdict(figures)), clips=np.array(clips))
    partial.rename(kept)
    return figures, clips


def measure(
    settings: TrainSettings,
    folder: Path,
    held_out: HeldOut,
    dense: tuple[Figures, list[NDArray[np.uint8]]],
) -> Row:
    """Train under a method, and measure the model before and after the training."""
    pipe = load()
    recipe = recipe_for(pipe)
    clips = RenderedClips(pipe, recipe, CLIPS)
    trainer = Trainer(pipe, clips, clips.empty, settings, folder, recipe=recipe, resume=True)
    # A resumed run was measured before its first step; by now weights of the method are trained.
    before = folder / "sparse.json"
    if not before.is_file():
        trainer.model.disable_adapters()
        figures, _ = held_out.figures(pipe, trainer.attachment, dense[1])
        trainer.model.enable_adapters()
        before.write_text(json.dumps(asdict(figures)))
    sparse = Figures(**json.loads(before.read_text()))
    start = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    trained, _ = held_out.figures(pipe, trainer.attachment, dense[1])
    method = dict(settings.attention)
    return Row(
        method, density_of(method), dense[0], sparse, trained, settings.to_dict(), round(minutes, 2)
    )


def line(row: Row) -> str:
    def right(figures: Figures) -> str:
        values = list(figures.accuracy.values())
        return f"{np.mean(values):.0%}" if values else "-"

    def decibel(figures: Figures) -> str:
        return "-" if figures.psnr_db is None else f"{figures.psnr_db:.1f}"

    plain = method_settings(row.method["type"], {})
    given = ", ".join(f"{k}={v}" for k, v in row.method.items() if v != plain.get(k))
    cells = [
        f"{row.method['type']} {given}".strip(),
        "-" if row.density is None else f"{row.density:.0%}",
        *(f"{figures.loss:.4f}" for figures in (row.dense, row.sparse, row.trained)),
        f"{row.recovered:.0%}",
        *(f"{figures.distance:.4f}" for figures in (row.sparse, row.trained)),
        decibel(row.sparse),
        decibel(row.trained),
        *(right(figures) for figures in (row.dense, row.sparse, row.trained)),
        str(row.settings["steps"]),
        f"{row.minutes:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def read_rows(folder: Path) -> list[Row]:
    order = [row_name(name, parameters) for name, parameters in cases(list(CASES))]
    rows = []
    for path in sorted(folder.glob("*.json"), key=lambda path: order.index(path.stem)):
        entry = json.loads(path.read_text())["row"]
        figures = {name: Figures(**entry[name]) for name in ("dense", "sparse", "trained")}
        rows.append(Row(**entry | figures))
    return rows


def write(folder: Path, name: str, row: Row, facts: dict[str, Any]) -> None:
    """Write a row, and the table of all rows that exist."""
    rows = folder / "lora"
    rows.mkdir(parents=True, exist_ok=True)
    partial = rows / f".{name}.tmp"
    partial.write_text(json.dumps({**facts, "row": asdict(row)}, indent=1) + "\n")
    partial.rename(rows / f"{name}.json")
    found = read_rows(rows)
    about = (__doc__ or "").split("How the figures are made:")[1].strip()
    settings = found[0].settings
    told = ("rank", "alpha", "learning_rate", "batch_size", "objective", "prediction")
    training = ", ".join(f"{name} {settings[name]}" for name in told)
    table = "\n".join([HEADER, *map(line, found)])
    text = (
        f"# What a LoRA recovers\n\nWritten by benchmarks/lora.py; {facts['machine']},"
        f" {facts['date']}.\n\n{about}\n- Training: {training}, AdamW.\n\n{table}\n"
    )
    # Another process may be writing its own rows.
    partial = rows / f".{name}.md.tmp"
    partial.write_text(text)
    partial.replace(folder / "lora.md")


def environment() -> dict[str, Any]:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    here = Path(__file__).parent
    answer = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return {
        "revision": answer.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--objective", type=float, default=1.0)
    parser.add_argument("--prediction", type=float, default=1.0)
    parser.add_argument("--clips", type=int, default=16, help="held-out clips of the loss")
    parser.add_argument("--prompts", type=int, default=4, help="clips to generate")
    parser.add_argument("--sampling-steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("outputs/lora"), help="runs and LoRAs")
    parser.add_argument("--output", type=Path, help="folder for lora/ and lora.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    missing = [name for name in options.methods if name not in METHODS]
    if missing:
        parser.error(f"there is no method {missing[0]}")

    options.work.mkdir(parents=True, exist_ok=True)
    pipe = load()
    sampling = Sampling(steps=options.sampling_steps)
    held_out = HeldOut(pipe, recipe_for(pipe), options.clips, options.prompts, sampling)
    dense = measure_dense(held_out, pipe, options.work)
    print(HEADER)
    for name, parameters in cases(options.methods):
        key = row_name(name, parameters)
        if options.output and (options.output / "lora" / f"{key}.json").is_file():
            continue
        settings = TrainSettings(
            attention=method_settings(name, parameters),
            rank=options.rank,
            alpha=options.rank,
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            schedule="cosine",
            warmup_steps=min(10, options.steps // 2),
            objective=options.objective,
            prediction=options.prediction,
            attention_output=0.0,
            checkpoint_every=25,
            keep_checkpoints=1,
        )
        row = measure(settings, options.work / key, held_out, dense)
        print(line(row), flush=True)
        if options.output:
            write(options.output, key, row, environment())


if __name__ == "__main__":
    main()
