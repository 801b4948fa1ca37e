"""Every setting of a training, as plain data that can be written down and read back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from diffattn.lora.errors import LoraError
from diffattn.methods import from_dict
from diffattn.methods.base import nearest

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Advice:
    """What a method's paper trains with.

    Attributes:
        rank, alpha: of the LoRA, whose factor is alpha / rank.
        objective, prediction, attention: weights of the losses, see `losses`.
        attention_every: the attention loss is over every so many layers.
    """

    rank: int = 64
    alpha: float = 64
    objective: float = 1.0
    prediction: float = 0.0
    attention: float = 0.0
    attention_every: int = 1


ADVICE: Mapping[str, Advice] = {
    # Its paper says rank 128; the alpha is that of FastVideo, whose checkpoint format it reads.
    "radial": Advice(rank=128, alpha=256),
    # These two train the projections themselves, with the dense model for a teacher.
    "clear": Advice(prediction=0.5, attention=0.5, attention_every=4),
    "linfusion": Advice(prediction=0.5, attention=0.5),
}
"""By the method's type; the others' papers train all weights on the model's own objective, or
nothing at all."""


@dataclass(frozen=True)
class TrainSettings:
    """How a LoRA is trained. `None` leaves a setting to the method's paper, see `ADVICE`.

    Attributes:
        attention: the method as its `to_dict()` gives it.
        rank, alpha: of the LoRA, whose factor is alpha / rank (alpha / sqrt(rank) with rslora).
        targets: the layers inside of each attention site that get a LoRA.
        dropout: of what goes into the LoRA.
        dora, rslora: the variants of LoRA that peft knows under these names.
        denoiser: the pipeline's component, the first where there are two; "transformer_2" is the
            second expert of Wan 2.2.
        objective, prediction, attention_output: weights of the losses, see `losses`.
        attention_every: the attention loss is over every so many sites.
        steps: optimiser steps.
        batch_size: samples of one process in one forward.
        accumulation: forwards per optimiser step.
        learning_rate: its largest value.
        schedule: what it does after the warm-up: stay ("constant"), or fall to zero along a line
            ("linear") or a cosine ("cosine").
        warmup_steps: steps in which it rises.
        weight_decay, max_grad_norm: of AdamW, and where gradients are clipped.
        shift: moves noise levels up for large videos; None for the scheduler's own.
        caption_dropout: fraction of the samples that are trained with the empty caption.
        seed: decides everything random.
        mixed_precision: no, bf16 or fp16; None for what `accelerate launch` was told.
        gradient_checkpointing: compute activations twice instead of keeping them.
        checkpoint_every: steps between checkpoints, and at the end; the last `keep_checkpoints`
            stay.
        trackers: names of accelerate's trackers, such as tensorboard and wandb.
    """

    attention: Mapping[str, Any] = field(default_factory=lambda: {"type": "radial"})
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    denoiser: str | None = None
    objective: float | None = None
    prediction: float | None = None
    attention_output: float | None = None
    attention_every: int | None = None
    steps: int = 1000
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    shift: float | None = None
    caption_dropout: float = 0.1
    seed: int = 0
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("targets", "trackers"):
            if isinstance(getattr(self, name), list):  # as JSON and TOML have it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if not (value is None and _DEFAULTS[name] is None):
                check(name, value)
        if self.rank is None and self.alpha is not None:
            raise LoraError(
                f"alpha is {self.alpha:g}, but means nothing without a rank: give both or neither"
            )
        if from_dict(self.attention).type == "dense":
            raise LoraError(
                "the method is dense, which needs no adapting: choose a sparse one, such as radial"
            )
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

    def completed(self) -> Self:
        """The same settings with every None that the method's paper answers replaced."""
        advice = self._advice()
        rank = _or_else(self.rank, advice.rank)
        # A rank of one's own comes with the factor that the paper's rank has.
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

    def _advice(self) -> Advice:
        return ADVICE.get(self.attention["type"], Advice())

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return dataclasses.asdict(self) | {
            "attention": dict(self.attention),
            "targets": list(self.targets),
            "trackers": list(self.trackers),
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; unknown names are refused."""
        names = [item.name for item in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise LoraError(f"unknown setting {name!r}: {nearest(name, names)}")
        return cls(**settings)


def _or_else(value: Any, advised: Any) -> Any:
    return advised if value is None else value


def _whole(least: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LoraError(f"{name} is {value!r}, but must be a whole number of at least {least}")

    return check


def _number(least: float, *, above: bool = False, most: float = math.inf) -> Callable[..., None]:
    allowed = f"above {least:g}" if above else f"of at least {least:g}"
    allowed += "" if most == math.inf else f" and below {most:g}"

    def check(name: str, value: Any) -> None:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not (least < value if above else least <= value) or not value < most:
            raise LoraError(f"{name} is {value!r}, but must be a number {allowed}")

    return check


def _choice(allowed: tuple[str, ...]) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value not in allowed:
            raise LoraError(f"{name} is {value!r}, but must be one of {', '.join(allowed)}")

    return check


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise LoraError(f"{name} is {value!r}, but must be true or false")


def _names(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(one, str) and one for one in value):
        raise LoraError(f"{name} is {value!r}, but must be a list of names")


def _some_names(name: str, value: Any) -> None:
    _names(name, value)
    if not value:
        raise LoraError(f"{name} is empty: name at least one layer, such as {', '.join(TARGETS)}")


def _method(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise LoraError(f"{name} is {value!r}, but must be a method's settings with its type")
    try:
        from_dict(value)
    except (ValueError, TypeError) as error:
        raise LoraError(error) from None


_DEFAULTS = {item.name: item.default for item in dataclasses.fields(TrainSettings)}

_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "attention": _method,
    "rank": _whole(1),
    "alpha": _number(0, above=True),
    "targets": _some_names,
    "dropout": _number(0, most=1),
    "dora": _flag,
    "rslora": _flag,
    "denoiser": _choice(("transformer", "transformer_2", "unet")),
    "objective": _number(0),
    "prediction": _number(0),
    "attention_output": _number(0),
    "attention_every": _whole(1),
    "steps": _whole(1),
    "batch_size": _whole(1),
    "accumulation": _whole(1),
    "learning_rate": _number(0, above=True),
    "schedule": _choice(SCHEDULES),
    "warmup_steps": _whole(0),
    "weight_decay": _number(0),
    "max_grad_norm": _number(0, above=True),
    "shift": _number(0, above=True),
    "caption_dropout": _number(0, most=1),
    "seed": _whole(0),
    "mixed_precision": _choice(PRECISIONS),
    "gradient_checkpointing": _flag,
    "checkpoint_every": _whole(1),
    "keep_checkpoints": _whole(1),
    "trackers": _names,
}
