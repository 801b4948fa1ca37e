"""Adapt the bundled model to a sparse mask, in 12 minutes of one core's time.

    python -m diffattn.samples.adapt_bundled_model --output outputs/adapted

Every layer and every step is sparse here, under a Radial mask that breaks the untrained model: 35 %
of the token pairs attend, and shapes fall apart. The LoRA learns the model's own objective and the
predictions of the dense model, from rendered clips or, with --teacher, from videos of the dense
model.

The script measures the dense model, the sparse model before the training, and the sparse model with
its LoRA: on held-out clips, and on videos of held-out captions. It prints the figures with a
judgement, and writes them to `summary.txt` in the output folder. The videos are in `videos`, all
three side by side in a file for each caption: look at them.

A stopped run goes on from its last checkpoint. This command uses the LoRA:

    diffattn generate --lora outputs/adapted "a red circle moving up on a blue background"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffattn.lora import LoraError, Trainer, TrainSettings, recipe_for, teach
from diffattn.lora.checkpoint import alone_in
from diffattn.lora.progress import shown
from diffattn.lora.trainer import check_output
from diffattn.methods import from_dict
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.compare import in_columns
from diffattn.pipelines.run.machine import quiet_libraries
from diffattn.pipelines.run.outputs import slug
from diffattn.pipelines.run.video import check_format, write_video

from .moving_shapes import MODEL_DIR
from .moving_shapes.adaptation import HeldOut, RenderedClips
from .moving_shapes.captions import split_scenes
from .moving_shapes.clips import FRAMES, SIZE
from .moving_shapes.evaluate import Sampling, load_pipeline
from .moving_shapes.summary import summary

EVERYWHERE = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}
# Under this mask 35 % of the token pairs attend.
MASK = {
    "type": "radial",
    "sink": False,
    "first_distance_width": "half",
    "split_threshold": 48,
    **EVERYWHERE,
}
SUMMARY_FILE = "summary.txt"
VIDEO_FOLDER = "videos"

_CLIPS = 16
_SAMPLING_STEPS = 10
_FPS = 8


def adapt(settings: TrainSettings, output: Path, prompts: int, teacher: int) -> str:
    """Train a LoRA, measure the model before and after the training, and write the videos.

    Args:
        settings: of the training.
        output: folder for the LoRA, the videos and the summary; a run that was stopped in this
            folder goes on.
        prompts: held-out captions to generate, from 1 to 50.
        teacher: number of videos that the dense model makes for the LoRA to learn from; 0 for
            rendered clips instead.

    Returns:
        The summary, see `moving_shapes.summary`.

    Raises:
        LoraError: if the settings or the folder are refused, or the training fails.
        UserError: if no video can be written.
    """
    check_format(Path("video.mp4"), _FPS)
    check_output(output, resume=True)
    with alone_in(output):
        return _adapt(settings, output, prompts, teacher)


def _adapt(settings: TrainSettings, output: Path, prompts: int, teacher: int) -> str:
    quiet_libraries()
    pipe = load_pipeline(MODEL_DIR)
    recipe = recipe_for(pipe)
    print(f"measuring the dense model: {_CLIPS} clips, {prompts} videos", flush=True)
    held_out = HeldOut(pipe, recipe, _CLIPS, prompts, Sampling(steps=_SAMPLING_STEPS))
    dense, dense_videos = held_out.figures(pipe)
    clips: Any = (
        _taught(pipe, recipe, output, teacher) if teacher else RenderedClips(pipe, recipe, 1024)
    )
    trainer = Trainer(pipe, clips, clips.empty, settings, output, recipe=recipe, resume=True)
    # A resumed LoRA has learnt something: the sparse model is measured with the LoRA switched off.
    trainer.model.disable_adapters()
    print("measuring the sparse model before its training", flush=True)
    sparse, sparse_videos = held_out.figures(pipe, trainer.attachment, dense_videos)
    trainer.model.enable_adapters()
    print(f"training from step {trainer.step} to {settings.steps}", flush=True)
    with shown(settings.steps, trainer.step) as show:
        trainer.train(report=show)
    print("measuring the sparse model with its LoRA", flush=True)
    adapted, adapted_videos = held_out.figures(pipe, trainer.attachment, dense_videos)
    for number, scene in enumerate(held_out.scenes):
        columns = [
            ("dense", dense_videos[number]),
            ("sparse, untrained", sparse_videos[number]),
            ("sparse + LoRA", adapted_videos[number]),
        ]
        _write(output / VIDEO_FOLDER / f"{number:02d}-{slug(scene.caption)}.mp4", columns)
    text = summary(dense, sparse, adapted, len(held_out.scenes))
    (output / SUMMARY_FILE).write_text(text + "\n", "utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script with command-line arguments.

    Returns:
        The exit code: 2 for settings that are refused, 130 for a run that Ctrl-C has stopped.
    """
    training, held_out = (len(scenes) for scenes in split_scenes())
    parser = argparse.ArgumentParser(description="Adapt the bundled model to a sparse mask.")
    parser.add_argument("--output", type=Path, default=Path("outputs/adapted"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--prompts", type=int, default=16, help="held-out captions to generate")
    parser.add_argument(
        "--teacher", type=int, default=0, metavar="VIDEOS",
        help="learn from so many videos of the dense model's, instead of rendered ones",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        _check("prompts", options.prompts, 1, held_out)
        _check("teacher", options.teacher, 0, training)
        settings = TrainSettings(
            attention=from_dict(MASK).to_dict(),
            rank=options.rank,
            alpha=options.rank,
            steps=options.steps,
            learning_rate=options.learning_rate,
            schedule="cosine",
            warmup_steps=min(10, options.steps // 2),
            objective=1.0,
            prediction=1.0,
            checkpoint_every=50,
        )
        text = adapt(settings, options.output, options.prompts, options.teacher)
    except (LoraError, UserError) as error:
        print(f"adapt_bundled_model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "adapt_bundled_model: interrupted: the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    print(f"\n{text}\n")
    print(
        f"{options.output}: the LoRA, {SUMMARY_FILE}, and the videos to look at in {VIDEO_FOLDER}"
    )
    return 0


def _check(name: str, value: int, at_least: int, at_most: int) -> None:
    if not at_least <= value <= at_most:
        raise UserError(f"--{name} is {value}, but must be from {at_least} to {at_most}")


def _write(path: Path, columns: list[tuple[str, NDArray[np.uint8]]]) -> None:
    """Write videos of one caption beside each other; the file is complete or missing."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".tmp.mp4")
    write_video(partial, in_columns(columns), _FPS)
    partial.replace(path)


def _taught(pipe: Any, recipe: Any, output: Path, videos: int) -> Any:
    """Encoded videos that the dense model makes from training captions."""
    training, _ = split_scenes()
    chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:videos]
    prompts = [training[index].caption for index in chosen.tolist()]
    return teach(
        pipe,
        recipe,
        prompts,
        output / "clips",
        SIZE,
        SIZE,
        FRAMES,
        steps=Sampling.steps,
        guidance_scale=Sampling.guidance,
        negative_prompt="",
    )


if __name__ == "__main__":
    sys.exit(main())
