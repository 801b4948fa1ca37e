"""The recommended methods, as measured by benchmarks/auto.py, which writes table.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Speed = Literal["fast", "balanced", "faithful"]
SPEEDS = ("fast", "balanced", "faithful")
# Runs of so many steps at most are those of few-step models: distilled ones.
FEW_STEPS = 8


@dataclass(frozen=True)
class Recommendation:
    """A line of the table.

    Attributes:
        speed: "fast", "balanced" or "faithful".
        few_steps: whether the line is for runs of at most `FEW_STEPS` steps.
        tokens: the line is for calls over at least so many tokens of video.
        method: the method with its parameters, as `Method.to_dict` gives it.
        work: the attention FLOPs of the measured run, relative to the dense run.
        psnr_db: mean PSNR in dB of the measured clips to the dense model's.
    """

    speed: str
    few_steps: bool
    tokens: int
    method: dict[str, Any]
    work: float
    psnr_db: float


@cache
def recommendations() -> tuple[Recommendation, ...]:
    """All lines of the table."""
    text = (files("diffattn.methods.auto") / "table.json").read_text("utf-8")
    return tuple(Recommendation(**row) for row in json.loads(text)["rows"])


def recommended(speed: str, few_steps: bool, tokens: int | None) -> Recommendation:
    """The line for a call; that for long sequences where the number of tokens is not known."""
    lines = [
        line
        for line in recommendations()
        if (line.speed, line.few_steps) == (speed, few_steps)
        and (tokens is None or line.tokens <= tokens)
    ]
    return max(lines, key=lambda line: line.tokens)
