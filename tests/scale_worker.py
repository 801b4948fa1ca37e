"""Trainings that two processes share in the ways of `test_scale`; a script and a module.

As a script: scale_worker.py FOLDER, with RANK and WORLD_SIZE in the environment, makes every run
of `RUNS` into a folder of its name, and writes what was refused into FOLDER/RANK.json.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_training
import tiny_wan
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from diffattn.lora.errors import LoraError
from diffattn.lora.sharded import whole
from diffattn.lora.trainer import Trainer

STEPS = 3
# Without dropout, which is seeded by forward.
ALIKE: Mapping[str, Any] = {"dropout": 0.0, "learning_rate": 1e-3, "steps": STEPS}
VMOBA = {"type": "vmoba", "dense_layers": 0, "dense_steps": 0}
# Has weights of its own, which a dense layer leaves without gradients.
VSA = {"type": "vsa", "coarse": True, "keep": 0.5, "dense_layers": 1, "dense_steps": 0}


@dataclass(frozen=True)
class Run:
    """A training of two processes.

    Attributes:
        fsdp: whether FSDP spreads the weights.
        changes: the settings beside `ALIKE`.
        attention: the method's settings.
        dtype: of the frozen model; the LoRA is float32.
    """

    fsdp: bool
    changes: Mapping[str, Any]
    attention: Mapping[str, Any] = field(default_factory=lambda: tiny_training.ATTENTION)
    dtype: torch.dtype = torch.float32

    def pipe(self) -> Any:
        return tiny_wan.PIPELINES["t2v"]().to(self.dtype)

    @property
    def settings(self) -> dict[str, Any]:
        return {**ALIKE, **self.changes, "attention": self.attention}


# With twice the processes, half the batch.
FSDP: Mapping[str, Any] = {"batch_size": 1, "gradient_checkpointing": True}
RUNS: Mapping[str, Run] = {
    "fsdp": Run(True, FSDP),
    "fsdp, weights of the method": Run(True, FSDP, VSA),
    "fsdp, bfloat16": Run(True, FSDP, dtype=torch.bfloat16),
    "ulysses": Run(False, {"context_parallel": "ulysses"}),
    "ring": Run(False, {"context_parallel": "ring"}),
    "fsdp and ulysses": Run(True, {"context_parallel": "ulysses"}),
}
REFUSED: Mapping[str, Run] = {
    "vmoba on a ring": Run(False, {"context_parallel": "ring"}, VMOBA),
    "all heads under ulysses": Run(
        False, {"context_parallel": "ulysses"}, VMOBA | {"scope": "unpublished-all"}
    ),
    "weights of the method under ulysses": Run(False, {"context_parallel": "ulysses"}, VSA),
    "ema under fsdp": Run(True, {"ema": 0.9}),
}


def accelerator(fsdp: bool, **plugin: Any) -> Accelerator:
    """An accelerator on the CPU; FSDP on the CPU is what accelerate does on accelerators only."""
    AcceleratorState._reset_state()
    known = PartialState._shared_state
    if "distributed_type" in known:
        known["distributed_type"] = DistributedType.MULTI_CPU
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if not fsdp:
        return Accelerator(cpu=True)
    options = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "cpu_ram_efficient_loading": False,
    }
    chosen = FullyShardedDataParallelPlugin(**options | plugin)
    made = Accelerator(cpu=True, fsdp_plugin=chosen)
    made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, chosen
    known["distributed_type"] = DistributedType.FSDP
    return made


def trainer(folder: Path, run: Run, resume: bool = False) -> Trainer:
    return Trainer(
        run.pipe(),
        tiny_training.clips(),
        tiny_training.EMPTY,
        tiny_training.settings(**run.settings),
        folder,
        accelerator=accelerator(run.fsdp),
        resume=resume,
    )


def watch_norms(made: Trainer) -> list[float]:
    """The gradients' norms before they are clipped, step by step; the list grows."""
    norms: list[float] = []
    clip = made.accelerator.clip_grad_norm_

    def watched(parameters: Any, largest: float) -> torch.Tensor:
        norm = clip(parameters, largest)
        norms.append(float(whole(norm)))
        return norm

    made.accelerator.clip_grad_norm_ = watched
    return norms


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    facts: dict[str, Any] = {}
    # On a torch without accelerators diffusers 0.42 divides by their number, 0.
    with (
        mock.patch.object(torch.accelerator, "device_count", return_value=1),
        # The end of a training parts its processes, which here make several.
        mock.patch.object(Accelerator, "end_training"),
    ):
        for name, run in RUNS.items():
            made = trainer(folder / name, run)
            weights = list(made.model.parameters())
            held = sum(getattr(w, "_local_tensor", w).numel() for w in weights)
            norms = watch_norms(made)
            made.train()
            facts[name] = {"held": held / sum(w.numel() for w in weights), "norms": norms}
        # From the checkpoint of step 2 to the same end.
        part = folder / "resumed"
        trainer(part, RUNS["fsdp"]).train(until=2)
        trainer(part, RUNS["fsdp"], resume=True).train()
        for name, run in REFUSED.items():
            try:
                trainer(folder / name, run).train()
            except LoraError as error:
                facts[name] = str(error)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
