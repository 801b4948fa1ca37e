"""The settings of a training, as plain data that can be written to JSON and read back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from diffattn._checks import (
    FLAG,
    Allowed,
    check_fields,
    choice,
    did_you_mean,
    lists_to_tuples,
    number,
    whole,
)
from diffattn.lora.errors import LoraError
from diffattn.lora.optimizers import USUAL, is_schedule_free
from diffattn.methods import from_dict

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
# How processes may share each sample.
CONTEXT_PARALLEL = ("ulysses", "ring")
# How often the parts of a sampling run are trained: most often its middle, or all parts alike.
NOISE_LEVELS = ("logit-normal", "uniform")
USUAL_LEVELS = NOISE_LEVELS[0]


@dataclass(frozen=True)
class Advice:
    """The training settings of a method's paper.

    Attributes:
        rank, alpha: rank of the LoRA, and numerator of the LoRA's factor alpha / rank.
        objective, prediction, attention: weights of the losses, see `diffattn.lora.losses`.
        attention_every: the attention loss compares every n-th site for this n.
    """

    rank: int = 64
    alpha: float = 64
    objective: float = 1.0
    prediction: float = 0.0
    attention: float = 0.0
    attention_every: int = 1


# The settings by the method's type. The papers of all other methods train all weights on the
# model's own objective, or nothing.
ADVICE: Mapping[str, Advice] = {
    # The paper has rank 128. The alpha is FastVideo's, whose checkpoints the public code reads.
    "radial": Advice(rank=128, alpha=256),
    # These papers train the projections themselves, with the dense model as teacher.
    "clear": Advice(prediction=0.5, attention=0.5, attention_every=4),
    "linfusion": Advice(prediction=0.5, attention=0.5),
    # The paper does not give the weights of these two losses.
    "attention-tile": Advice(prediction=0.5, attention=0.5),
    # TurboDiffusion's training, with the dense model as teacher of the prediction alone.
    "sla": Advice(objective=0.0, prediction=1.0),
}


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a LoRA training.

    None in `rank`, `alpha`, `attention_every` and the weights of the losses takes the setting of
    the method's paper, see `ADVICE`.

    Attributes:
        attention: the `to_dict()` of the method.
        rank, alpha: rank of the LoRA, and numerator of the LoRA's factor alpha / rank (with rslora,
            alpha / sqrt(rank)).
        targets: names of the layers inside each attention site that get a LoRA.
        dropout: fraction of the LoRA's inputs to drop.
        dora, rslora: peft's variants of LoRA with these names.
        method_only: whether to train the method's own weights alone, with the LoRA left at nothing.
        method_weights: the folder of a training whose method's own weights to start from; None to
            start from those of an untrained method.
        denoiser: the pipeline's component to train; None for the first. "transformer_2" is the
            second expert of Wan 2.2.
        objective, prediction, attention_output: weights of the losses, see `diffattn.lora.losses`.
        attention_every: the attention loss compares every n-th site for this n.
        guidance: the guidance scale that a denoiser with guidance among its inputs (Flux-dev,
            HunyuanVideo) is told where it learns from the clips. None for 1, which clips of cameras
            have: another scale teaches the denoiser to undo the guidance of that scale. Clips made
            by a denoiser of this kind have the scale that they were made with.
        teacher_guidance: the scale that such a denoiser is told where it is compared with the dense
            model. None for the pipeline's default.
        init_lora: file or folder of a LoRA of any program to start from, for the same layers; its
            rank is the default.
        ema: the part of a moving average of the weights that each step keeps; the average is
            written beside the LoRA. None for no average.
        held_out: number of clips that are not learnt from; the loss on them, with fixed noise, is
            logged at the start and at each checkpoint. None for none.
        steps: number of optimiser steps.
        batch_size: samples of one process in one forward.
        accumulation: forwards per optimiser step.
        learning_rate: the largest learning rate.
        schedule: the learning rate after the warm-up: it stays ("constant"), or falls to zero along
            a line ("linear") or a cosine ("cosine").
        warmup_steps: number of steps in which the learning rate rises.
        weight_decay: weight decay of the optimiser.
        optimizer: the optimiser, "LIBRARY.CLASS" of torch, bitsandbytes, torchao or schedulefree,
            see `diffattn.lora.optimizers`.
        optimizer_args: further arguments of the optimiser by their names.
        max_grad_norm: norm that gradients are clipped to.
        shift: time shift of the noise levels; above 1 favours strong noise, for large videos. None
            for the steps of sampling: the scheduler's shift, by the clip's tokens if it depends on
            them, or Mochi's own steps.
        noise_levels: the distribution along these steps, one of `NOISE_LEVELS`; None for
            "logit-normal". "uniform" draws each level as often as sampling visits it.
        caption_dropout: fraction of the samples that are trained with the empty caption.
        seed: seed of everything random.
        context_parallel: "ulysses" or "ring" to have all processes share each sample, each with
            some of its tokens, see `diffattn.lora.together`. None for samples of their own.
        mixed_precision: no, bf16 or fp16; None for the setting of `accelerate launch`.
        gradient_checkpointing: whether to compute activations twice instead of keeping them.
        offload_activations: whether what gradient checkpointing keeps waits in main memory.
        swap_blocks: number of blocks whose frozen weights wait in main memory, see
            `diffattn.lora.swapping`; None for none.
        checkpoint_every: number of steps between checkpoints; the end of a run also has one.
        keep_checkpoints: number of checkpoints to keep.
        trackers: names of accelerate's trackers, such as tensorboard and wandb.
    """

    attention: Mapping[str, Any] = field(default_factory=lambda: {"type": "radial"})
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    method_only: bool = False
    method_weights: str | None = None
    denoiser: str | None = None
    objective: float | None = None
    prediction: float | None = None
    attention_output: float | None = None
    attention_every: int | None = None
    guidance: float | None = None
    teacher_guidance: float | None = None
    init_lora: str | None = None
    ema: float | None = None
    held_out: int | None = None
    steps: int = 1000
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    optimizer: str = USUAL
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    shift: float | None = None
    noise_levels: str | None = None
    caption_dropout: float = 0.1
    seed: int = 0
    context_parallel: str | None = None
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    swap_blocks: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lists_to_tuples(self, "targets", "trackers")
        check_fields(self, _ALLOWED, LoraError)
        if not self.targets:
            raise LoraError(
                f"targets is empty: name at least one layer, such as {', '.join(TARGETS)}"
            )
        try:
            method = from_dict(self.attention)
        except (ValueError, TypeError) as error:
            raise LoraError(error) from None
        if self.rank is None and self.alpha is not None:
            raise LoraError(
                f"alpha is {self.alpha:g}, but means nothing without a rank: give both or neither"
            )
        if method.type == "dense":
            raise LoraError(
                "the method is dense, which needs no adapting: choose a sparse one, such as radial"
            )
        if method.needs_figures:
            raise LoraError(
                f"the method is {method.type}, which may choose another method for another size,"
                f" while a LoRA belongs to one: name the method that `diffattn plan` prints for"
                f" {method.type}"
            )
        if self.warmup_steps > self.steps:
            raise LoraError(
                f"warmup_steps is {self.warmup_steps}, but the run has {self.steps} steps: give at"
                f" most as many"
            )
        self._check_optimizer()
        self._check_offloading()
        advice = self._advice()
        weights = (
            _or_else(self.objective, advice.objective),
            _or_else(self.prediction, advice.prediction),
            _or_else(self.attention_output, advice.attention),
        )
        if not any(weights):
            raise LoraError(
                "objective, prediction and attention_output are all 0: there is nothing to learn;"
                " give one of them a weight"
            )
        objective, *compared = weights
        for name, value, used, users in (
            ("guidance", self.guidance, objective, "objective is 0"),
            (
                "teacher_guidance",
                self.teacher_guidance,
                any(compared),
                "prediction and attention_output are 0",
            ),
        ):
            if value is not None and not used:
                raise LoraError(
                    f"{name} is {value:g}, but {users}, so that nothing is told it: leave it out"
                )

    def completed(self) -> Self:
        """The settings with None replaced by the settings of the method's paper, see `ADVICE`."""
        advice = self._advice()
        rank = _or_else(self.rank, advice.rank)
        # The user's rank keeps the paper's factor alpha / rank.
        alpha = rank * advice.alpha / advice.rank if self.alpha is None else self.alpha
        return dataclasses.replace(
            self,
            rank=rank,
            alpha=alpha,
            objective=_or_else(self.objective, advice.objective),
            prediction=_or_else(self.prediction, advice.prediction),
            attention_output=_or_else(self.attention_output, advice.attention),
            attention_every=_or_else(self.attention_every, advice.attention_every),
        )

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate

    def _check_optimizer(self) -> None:
        if not is_schedule_free(self.optimizer):
            return
        if self.schedule != "constant" or self.warmup_steps:
            raise LoraError(
                f"optimizer is {self.optimizer}, which needs no schedule: leave schedule and"
                f" warmup_steps out, or give optimizer_args its own warmup_steps"
            )
        if self.ema is not None:
            raise LoraError(
                f"optimizer is {self.optimizer}, whose result is an average already: leave ema out"
            )

    def _check_offloading(self) -> None:
        for name in ("offload_activations", "swap_blocks"):
            if getattr(self, name) and not self.gradient_checkpointing:
                raise LoraError(
                    f"{name} is {getattr(self, name)}, but gradient_checkpointing is off: without"
                    f" it a step keeps on the device what is to wait in main memory; turn it on"
                )
        if self.swap_blocks is not None and self.dora:
            raise LoraError(
                "dora reads the weights of layers while these wait in main memory: leave out dora"
                " or swap_blocks"
            )

    def _advice(self) -> Advice:
        return ADVICE.get(self.attention["type"], Advice())

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return dataclasses.asdict(self) | {
            "attention": dict(self.attention),
            "optimizer_args": dict(self.optimizer_args),
            "targets": list(self.targets),
            "trackers": list(self.trackers),
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The settings from the mapping that `to_dict` gives.

        Raises:
            LoraError: if a name is unknown or a value is not allowed.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise LoraError(
                    f"unknown setting {name!r}{did_you_mean(name, names, or_list=True)}"
                )
        return cls(**settings)


def _or_else(value: Any, advised: Any) -> Any:
    return advised if value is None else value


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, str) and one for one in value)


# The largest weight of a loss, and the like: larger numbers overflow float32 on their way.
_LARGEST = 1e6
# What the gradient's norm may be cut to; a larger number is infinite in float32.
_LARGEST_NORM = 1e30
_LARGEST_SEED = 2**64 - 1  # torch's
# More than any layer is wide, and more samples than any memory holds.
_LARGEST_RANK = _LARGEST_BATCH = 65_536
_WEIGHT = number(at_least=0, at_most=_LARGEST)

_NAMES = Allowed("a list of names", _are_names)
_ALLOWED: Mapping[str, Allowed] = {
    "attention": Allowed("a method's settings with its type", lambda it: isinstance(it, Mapping)),
    "rank": whole(1, _LARGEST_RANK),
    "alpha": number(above=0, at_most=_LARGEST),
    "targets": _NAMES,
    "dropout": number(at_least=0, below=1),
    "dora": FLAG,
    "rslora": FLAG,
    "method_only": FLAG,
    "method_weights": Allowed("the path of a folder", lambda it: isinstance(it, str) and it != ""),
    "denoiser": choice(("transformer", "transformer_2", "unet")),
    "objective": _WEIGHT,
    "prediction": _WEIGHT,
    "attention_output": _WEIGHT,
    "attention_every": whole(1),
    "guidance": _WEIGHT,
    "teacher_guidance": _WEIGHT,
    "init_lora": Allowed("a name", lambda it: isinstance(it, str) and it.strip() != ""),
    "ema": number(above=0, below=1),
    "held_out": whole(1),
    "steps": whole(1),
    "batch_size": whole(1, _LARGEST_BATCH),
    "accumulation": whole(1),
    "learning_rate": number(above=0, at_most=_LARGEST),
    "schedule": choice(SCHEDULES),
    "warmup_steps": whole(0),
    "weight_decay": _WEIGHT,
    "optimizer": Allowed("LIBRARY.CLASS", lambda it: isinstance(it, str) and it != ""),
    "optimizer_args": Allowed("arguments by their names", lambda it: isinstance(it, Mapping)),
    "max_grad_norm": number(above=0, at_most=_LARGEST_NORM),
    "shift": number(above=0, at_most=_LARGEST),
    "noise_levels": choice(NOISE_LEVELS),
    "caption_dropout": number(at_least=0, below=1),
    "seed": whole(0, _LARGEST_SEED),
    "context_parallel": choice(CONTEXT_PARALLEL),
    "mixed_precision": choice(PRECISIONS),
    "gradient_checkpointing": FLAG,
    "offload_activations": FLAG,
    "swap_blocks": whole(1),
    "checkpoint_every": whole(1),
    "keep_checkpoints": whole(1),
    "trackers": _NAMES,
}
