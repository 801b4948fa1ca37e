"""A training of a tiny Wan under a mask that can be felt; a module, and a script to be killed.

As a script: tiny_training.py FOLDER [STEP] trains to the end, in as many processes as it is started
in, and kills itself in the middle of writing the checkpoint of that step.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny_wan
import torch

from diffattn.lora import checkpoint
from diffattn.lora.settings import TrainSettings
from diffattn.lora.trainer import Trainer

ATTENTION = {"type": "gna", "window": [3, 3, 3], "dense_layers": 0, "dense_steps": 0}
LATENTS = (16, 3, 12, 8)
EMPTY = {"prompt_embeds": torch.zeros(6, tiny_wan.TEXT_DIM)}
STEPS = 5


class Clips(list[dict[str, Any]]):
    """Encoded clips in memory."""

    @property
    def keys(self) -> list[str]:
        return [clip["key"] for clip in self]


def clips(count: int = 5, latents: tuple[int, ...] = LATENTS) -> Clips:
    """Random latents with random text."""
    generator = torch.Generator().manual_seed(7)
    return Clips(
        {
            "latents": torch.randn(latents, generator=generator),
            "conditions": {"prompt_embeds": torch.randn(6, tiny_wan.TEXT_DIM, generator=generator)},
            "key": f"clip-{index}",
        }
        for index in range(count)
    )


def settings(**changes: Any) -> TrainSettings:
    """A short training with everything on that has a state: dropout, both halves of AdamW."""
    return TrainSettings(
        **{
            "attention": ATTENTION,
            "rank": 2,
            "steps": STEPS,
            "learning_rate": 1e-2,
            "batch_size": 2,
            "dropout": 0.1,
            "weight_decay": 0.01,
            "prediction": 0.5,
            "attention_output": 0.5,
            "caption_dropout": 0.3,
            "checkpoint_every": 2,
        }
        | changes
    )


def trainer(output: Path, resume: bool = False, pipe: Any = None, **changes: Any) -> Trainer:
    """What trains the tiny Wan, or `pipe`, into a folder."""
    pipe = tiny_wan.PIPELINES["t2v"]() if pipe is None else pipe
    return Trainer(pipe, clips(), EMPTY, settings(**changes), output, resume=resume)


def trained(made: Trainer) -> dict[str, torch.Tensor]:
    """The trained parameters by name."""
    return {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}


def own_path() -> dict[str, str]:
    """The environment in which a process imports this module, and the diffattn of this process."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    changes = {"checkpoint_every": 1}
    if len(sys.argv) > 2:
        _die_in_checkpoint(f".step-{int(sys.argv[2]):06d}.tmp")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # With twice the processes, half the batch; dropout is seeded by forward.
        changes |= {"batch_size": 1, "dropout": 0.0, "learning_rate": 1e-3}
    trainer(folder, resume=True, **changes).train()


def _die_in_checkpoint(name: str) -> None:
    """Have the process killed when all files of a checkpoint are written but it has no name yet."""
    real = checkpoint.to_disk

    def to_disk(folder: Path) -> None:
        real(folder)
        if folder.name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.to_disk = to_disk


if __name__ == "__main__":
    main()
