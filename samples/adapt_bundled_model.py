"""Adapt the bundled model to a sparse mask, in minutes on two cores.

    python -m diffattn.samples.adapt_bundled_model --output outputs/adapted

Every layer and every step is sparse here, under a mask that breaks the untrained model. The LoRA
learns the model's own objective and the predictions of the dense model, from rendered clips or,
with --teacher, from videos of the dense model. The script prints, before and after the training,
the loss on held-out clips and the PSNR of generated clips to those of the dense model.

This command uses the LoRA:

    diffattn generate --lora outputs/adapted "a red circle moving up on a blue background"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffattn.lora import LoraError, Trainer, TrainSettings, recipe_for, teach
from diffattn.lora.progress import shown
from diffattn.methods import from_dict

from .moving_shapes import MODEL_DIR
from .moving_shapes.adaptation import Figures, HeldOut, RenderedClips
from .moving_shapes.captions import split_scenes
from .moving_shapes.clips import FRAMES, SIZE
from .moving_shapes.evaluate import Sampling, load_pipeline

EVERYWHERE = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}
# Under this mask 15 % of the token pairs attend.
MASK = {"type": "gna", "window": [7, 7, 7], **EVERYWHERE}


def adapt(settings: TrainSettings, output: Path, prompts: int, teacher: int) -> tuple[Figures, ...]:
    """Train a LoRA, and measure the model before and after the training.

    Args:
        settings: of the training.
        output: folder for the LoRA; a run that was stopped in this folder goes on.
        prompts: held-out captions to generate.
        teacher: number of videos that the dense model makes for the LoRA to learn from; 0 for
            rendered clips instead.

    Returns:
        Figures of the dense model, of the sparse model, and of the sparse model with its LoRA.
    """
    # The pipeline warns of its own rounding of the number of frames.
    diffusers.utils.logging.set_verbosity_error()
    pipe = load_pipeline(MODEL_DIR)
    recipe = recipe_for(pipe)
    held_out = HeldOut(pipe, recipe, 16, prompts, Sampling(steps=10))
    dense, made = held_out.figures(pipe)
    clips: Any = (
        _taught(pipe, recipe, output, teacher) if teacher else RenderedClips(pipe, recipe, 1024)
    )
    trainer = Trainer(pipe, clips, clips.empty, settings, output, recipe=recipe, resume=True)
    # A resumed LoRA has learnt something: the sparse model is measured with the LoRA switched off.
    trainer.model.disable_adapters()
    sparse, _ = held_out.figures(pipe, trainer.attachment, made)
    trainer.model.enable_adapters()
    with shown(settings.steps, trainer.step) as show:
        trainer.train(report=show)
    adapted, _ = held_out.figures(pipe, trainer.attachment, made)
    return dense, sparse, adapted


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script with command-line arguments."""
    parser = argparse.ArgumentParser(description="Adapt the bundled model to a sparse mask.")
    parser.add_argument("--output", type=Path, default=Path("outputs/adapted"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--prompts", type=int, default=4, help="held-out captions to generate")
    parser.add_argument(
        "--teacher", type=int, default=0, metavar="VIDEOS",
        help="learn from so many videos of the dense model's, instead of rendered ones",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
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
        dense, sparse, adapted = adapt(settings, options.output, options.prompts, options.teacher)
    except LoraError as error:
        parser.error(str(error))
    _print("dense", dense)
    _print("sparse", sparse)
    _print("sparse + LoRA", adapted)
    recovered = (sparse.loss - adapted.loss) / (sparse.loss - dense.loss)
    print(f"the LoRA recovers {recovered:.0%} of the loss that the mask costs; it is in", end=" ")
    print(options.output)


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


def _print(name: str, figures: Figures) -> None:
    quality = "" if figures.psnr_db is None else f"   PSNR to dense {figures.psnr_db:.1f} dB"
    parts = ", ".join(f"{name} {part:.0%}" for name, part in figures.accuracy.items())
    right = f"   right: {parts}" if parts else ""
    print(f"{name:<14} loss {figures.loss:.4f}{quality}{right}")


if __name__ == "__main__":
    main()
