"""Errors of methods at each layer, step and head of a dense run: statistics for calibration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from diffattn.attach.attachment import set_attn_processor
from diffattn.grid import TokenGrid
from diffattn.methods.agent.agents import dense_attention
from diffattn.methods.base import Method, Site, SiteWeights
from diffattn.methods.dense import DenseAttn

# By layer, step, candidate and head.
Errors = list[list[list[list[float]]]]


def site_errors(
    target: Any, run: Callable[[], object], candidates: Sequence[Method], steps: Collection[int]
) -> Errors:
    """How far the outputs of methods are from dense attention, in some steps of a dense run.

    Attention stays dense, so that each layer is measured on the activations of the dense model. In
    the calls of the measured steps the methods attend as well, one after the other, and only sums
    are kept. The error is the sum of the squared differences over all tokens and calls, divided by
    the sum of the squares of the layer's dense output: the errors of the heads add up to that of
    the layer. An attachment that `target` had before is removed.

    Args:
        target: a diffusers pipeline.
        run: calls `target`, at the size that the methods are to be used at.
        candidates: methods without weights of their own.
        steps: indices of the steps to measure, from 0.

    Returns:
        For each layer, for each of `steps` in order, for each candidate, the errors of the heads;
        none for a layer without a call.

    Raises:
        ValueError: for a candidate with weights of its own or a change of the model.
    """
    for method in candidates:
        if method.changes_the_model:
            raise ValueError(
                f"{method.type} cannot be measured beside dense attention: it has weights of its"
                f" own or changes the model"
            )
    order = tuple(sorted(steps))
    attachment = set_attn_processor(
        target, _Measuring(candidates=tuple(candidates), measured=order, dense_steps=0)
    )
    assert attachment is not None
    try:
        run()
        total: dict[int, _Sums] = {}
        for model in attachment.models.values():
            for site in model.sites.values():
                assert site.weights is not None
                sums: Any = site.module.get_submodule(site.weights)
                if sums.layer in total:
                    total[sums.layer].add(sums)
                else:
                    total[sums.layer] = sums
    finally:
        set_attn_processor(target, None)
    return [total[layer].relative().tolist() for layer in sorted(total)]


class _Sums(SiteWeights):
    """Sums over the calls of a site.

    Attributes:
        layer: index of the block.
        difference: float64 (steps, candidates, heads), squared differences from the dense output.
        square: float64 (steps,), squares of the dense output.
    """

    difference: torch.Tensor
    square: torch.Tensor

    def __init__(self, layer: int, steps: int, candidates: int) -> None:
        super().__init__()
        self.layer = layer
        # The number of heads is known from the first call.
        self.difference = torch.zeros(steps, candidates, 0, dtype=torch.float64)
        self.square = torch.zeros(steps, dtype=torch.float64)

    def add(self, other: _Sums) -> None:
        for own, its in ((self, other), (other, self)):
            own.expect(its.difference.shape[-1])
        self.difference += other.difference
        self.square += other.square

    def expect(self, heads: int) -> None:
        """Be prepared for sums by head."""
        if not self.difference.shape[-1]:
            self.difference = self.difference.new_zeros(*self.difference.shape[:2], heads)

    def relative(self) -> torch.Tensor:
        """float64 (steps, candidates, heads)."""
        return (self.difference / self.square[:, None, None]).nan_to_num(nan=0.0)


@dataclass(frozen=True, kw_only=True)
class _Measuring(Method):
    """Dense attention that also sums up the errors of methods in some steps."""

    type: ClassVar[str] = "measuring"
    differs_by_step: ClassVar[bool] = True

    candidates: tuple[Method, ...] = ()
    measured: tuple[int, ...] = ()
    number: int | None = None
    _dense: DenseAttn = field(default_factory=DenseAttn, init=False, repr=False, compare=False)

    def at_step(self, step: int, steps: int) -> Method:
        if not steps or step not in self.measured:
            return self._dense
        number = self.measured.index(step)
        if (number,) not in self._of_steps:
            self._of_steps[number,] = replace(self, number=number)
        return self._of_steps[number,]

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        settled = tuple(method.for_model(family, grid) for method in self.candidates)
        return replace(self, candidates=settled, dense_layers=0, dense_steps=0)

    def layer_weights(self, layer: int) -> SiteWeights:
        return _Sums(layer, len(self.measured), len(self.candidates))

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
        own_scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = dense_attention(query, key, value, own_scale, key_mask)
        sums: Any = site.weights
        assert self.number is not None
        goal = out.float()
        sums.expect(query.shape[2])
        sums.square[self.number] += _squares(goal).sum()
        for index, method in enumerate(self.candidates):
            other = method.attend(query, key, value, site, scale=scale, key_mask=key_mask)
            sums.difference[self.number, index] += _squares(other.float() - goal)
        return out


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each head, (heads,), of (batch, tokens, heads, head_dim)."""
    return (x * x).sum(dim=(0, 1, 3)).cpu().double()
