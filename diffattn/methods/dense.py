"""Dense attention as a method, for layers that no sparse method is to change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask, FullMask
from diffattn.methods.base import StaticMaskMethod


@dataclass(frozen=True, kw_only=True)
class DenseAttn(StaticMaskMethod):
    """Full attention, computed by diffattn's own operator, for layers that are to stay dense."""

    type: ClassVar[str] = "dense"
    paper: ClassVar[str] = "arXiv 1706.03762"
    any_order: ClassVar[bool] = True

    @property
    def is_dense(self) -> bool:
        return True

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        return replace(self, dense_layers=self.dense_layers or 0, dense_steps=self.dense_steps or 0)

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        return FullMask(grid)
