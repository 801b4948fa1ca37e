"""AutoAttn: a method chosen by the model, the size, the number of steps and the wanted speed."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import check_fields, choice
from diffattn.grid import TokenGrid
from diffattn.methods.attention_share import ModelFigures, share_in
from diffattn.methods.auto.table import FEW_STEPS, SPEEDS, recommendations, recommended
from diffattn.methods.base import Method, Site
from diffattn.methods.by_step import forget_oldest
from diffattn.methods.dense import DenseAttn
from diffattn.methods.registry import from_dict
from diffattn.methods.words import method_words
from diffattn.schedule import Moment

logger = logging.getLogger(__name__)

_ALLOWED = {"speed": choice(SPEEDS)}
# Below this bound of the speed-up of the whole model a sparse method only costs quality.
_WORTHWHILE = 1.25


@dataclass(frozen=True, kw_only=True)
class AutoAttn(Method):
    """The recommended method for a model, a size and a number of steps.

    At the first call the method is looked up in a table that `benchmarks/auto.py` measures, by
    `speed`, the number of tokens, and whether the run has few steps, as those of distilled models.
    A line of the log, at level WARNING, says what was chosen and why. Where attention takes so
    small a share of the time that the whole model could not become 1.25 times as fast, every call
    stays dense, and the line says so.

    A size or a run of another length is looked up anew. `dense_layers`, `dense_steps` and
    `last_dense_steps` replace those of the table where they are given.

    Attributes:
        speed: "fast", "balanced" or "faithful".

    Raises:
        ValueError: for a parameter out of range.
    """

    type: ClassVar[str] = "auto"
    paper: ClassVar[str] = "benchmarks/auto.md"
    needs_figures: ClassVar[bool] = True
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(
        ("speed", "dense_layers", "references")
    )

    speed: str = field(default="balanced", metadata={"help": "fast, balanced or faithful"})
    _figures: ModelFigures | None = field(default=None, init=False, repr=False, compare=False)
    _moment: Moment = field(default=Moment(), init=False, repr=False, compare=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)

    @property
    def differs_by_step(self) -> bool:
        return True

    @property
    def dense_layers_at_most(self) -> int:
        lines = [from_dict(line.method) for line in recommendations() if line.speed == self.speed]
        return max(self.dense_layers or 0, *(line.dense_layers_at_most for line in lines))

    def on_model(self, figures: ModelFigures | None) -> Self:
        return self._with(_figures=figures)

    def at_step(self, step: int, steps: int) -> Self:
        moment = Moment(step, steps)
        if moment not in self._of_steps:
            self._of_steps[moment] = self._with(_moment=moment)
            forget_oldest(self._of_steps)
        return self._of_steps[moment]  # type: ignore[return-value]

    def _with(self, **changes: Any) -> Self:
        changed = copy.copy(self)
        kept = {"_figures": self._figures, "_moment": self._moment, "_said": self._said}
        for name, value in (kept | changes).items():
            object.__setattr__(changed, name, value)
        return changed

    def for_run(self, family: str, grid: TokenGrid | None, steps: int | None) -> Method:
        """The chosen method, with its schedules; dense where no method is worth its loss."""
        return self._choice(grid, steps or 0)[0]

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Method:  # type: ignore[override]
        """The chosen method with its parameters for the step and the model."""
        step, steps = self._moment
        chosen, why = self._choice(grid, steps)
        if grid is not None and steps and why not in self._said:
            self._said.add(why)
            logger.warning("%s", why)
        return chosen.at_step(step, steps).for_model(family, grid)

    def _choice(self, grid: TokenGrid | None, steps: int) -> tuple[Method, str]:
        """The method for a run of so many steps, 0 where that is not known, and the reason."""
        share = self.attention_share(grid)
        if grid is not None and share is not None and 1 / (1 - share) < _WORTHWHILE:
            return DenseAttn(references=self.references), (
                f"auto stays dense: at {grid.tokens:,} tokens attention is {share:.0%} of the time:"
                f" at most {1 / (1 - share):.1f}x"
            )
        tokens = None if grid is None else grid.video_tokens
        line = recommended(self.speed, 0 < steps <= FEW_STEPS, tokens)
        chosen = replace(from_dict(line.method), **self._given())
        at = "" if tokens is None else f" for {tokens:,} tokens"
        of_time = "" if share is None else f", where attention is {share:.0%} of the time"
        why = (
            f"auto ({self.speed}) takes {method_words(chosen)}{at}{of_time}: {line.psnr_db:.1f} dB"
            f" to dense with {line.work:.0%} of the attention work, on the bundled model"
        )
        return chosen, why

    def _given(self) -> dict[str, Any]:
        """The parameters of the user that replace the table's."""
        given: dict[str, Any] = {"references": self.references}
        for name in ("dense_layers", "dense_steps"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        if self.last_dense_steps:
            given["last_dense_steps"] = self.last_dense_steps
        return given

    def attention_share(self, grid: TokenGrid | None) -> float | None:
        """Attention's share of the time of the dense model; None without a model or a grid."""
        if self._figures is None or grid is None:
            return None
        return share_in(self._figures, grid.tokens)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: Site,
        *,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        chosen = self.for_model(site.family, site.grid.alone)
        return chosen.attend(query, key, value, site, scale=scale, key_mask=key_mask)
