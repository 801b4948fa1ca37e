"""ByHeadAttn: some heads attend by one method, other heads by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import is_whole
from diffattn.grid import TokenGrid
from diffattn.masks.base import allowed_pairs
from diffattn.methods.base import Compiled, Method, Site, StaticMaskMethod, Work
from diffattn.methods.dense import DenseAttn
from diffattn.methods.registry import from_dict
from diffattn.spans import Span

Part = tuple[Method, int]

# Layers take turns among fewer variants than this.
_MOST_KINDS = 1000


@dataclass(frozen=True, kw_only=True)
class ByHeadAttn(Method):
    """Methods by head: the heads of each attention call are divided among several methods.

    Dense heads take a `DenseAttn()`. Methods with weights of their own, methods that change the
    model, and methods that look at all heads together cannot be parts. Parts may differ from step
    to step. Dense layers and steps are those of the whole: a call is dense for all heads or for
    none. Where `dense_layers` or `dense_steps` is None, or `last_dense_steps` is 0, the largest of
    the parts holds. `references` holds for parts that leave it at "visible".

    Attributes:
        parts: pairs of a method and its number of heads, in the order of the heads. In JSON a
            method is its `to_dict()`. Without parts all heads are dense.

    Raises:
        ValueError: for a part that is no such pair, or a method that cannot be a part.
    """

    type: ClassVar[str] = "by-head"
    paper: ClassVar[str] = "methods divided by head"
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(("parts",))

    parts: tuple[Part, ...] = field(
        default=(), metadata={"help": "pairs of a method and its number of heads"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.parts, list | tuple):
            raise ValueError(f"parts is {self.parts!r}, but must be pairs of a method and a number")
        object.__setattr__(self, "parts", tuple(map(_part, self.parts)))

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of the parts."""
        return tuple(method for method, _ in self.parts)

    def _with(self, methods: list[Method], **changes: Any) -> Self:
        heads = (heads for _, heads in self.parts)
        return replace(self, parts=tuple(zip(methods, heads, strict=True)), **changes)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the recommended values of each part, and the most dense layers of all.

        Raises:
            ValueError: if `dense_steps` is None, and some parts have counts and others fractions.
        """
        settled = [
            replace(m, references=self.references) if m.references == "visible" else m
            for m in (method.for_model(family, grid) for method in self.methods)
        ]
        layers = max((m.dense_layers or 0 for m in settled), default=0)
        steps = self.dense_steps
        if steps is None:
            steps = _longest("dense_steps", [m.dense_steps or 0 for m in settled])
        return self._with(
            settled,
            dense_layers=layers if self.dense_layers is None else self.dense_layers,
            dense_steps=steps,
            last_dense_steps=self.last_dense_steps
            or _longest("last_dense_steps", [m.last_dense_steps for m in settled]),
        )

    def at_step(self, step: int, steps: int) -> Method:
        own = super().at_step(step, steps)
        assert isinstance(own, ByHeadAttn)
        methods = [method.at_step(step, steps) for method in own.methods]
        if all(m is n for m, n in zip(methods, own.methods, strict=True)):
            return own
        known = ("parts", own.by_step, *map(id, methods), id(own))
        if known not in self._of_steps:
            # The method that is kept holds its parts, and so their identities.
            self._of_steps[known] = own._with(methods)
        return self._of_steps[known]

    @property
    def differs_by_step(self) -> bool:
        return bool(self.by_step) or any(method.differs_by_step for method in self.methods)

    @property
    def is_dense(self) -> bool:
        return all(method.is_dense for method in self.methods)

    @property
    def kept_bytes(self) -> int:
        return sum(method.kept_bytes for method in self.methods)

    @property
    def dense_layers_at_most(self) -> int:
        if self.dense_layers is not None:
            return super().dense_layers_at_most
        return max((method.dense_layers_at_most for method in self.methods), default=0)

    @property
    def heads_apart(self) -> bool:
        # Of a process with some of the heads nobody knows which these are.
        return not self.parts

    def compiled_as(self, family: str) -> Compiled:
        return "operator"

    def check_family(self, family: str) -> None:
        for method in self.methods:
            method.check_family(family)

    def layer_kind(self, layer: int) -> int:
        return reduce(lambda kind, m: kind * _MOST_KINDS + m.layer_kind(layer), self.methods, 0)

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        return max((m.spans(grid) for m in self.methods), key=len, default=super().spans(grid))

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
        parts = self.parts or ((DenseAttn(), query.shape[2]),)
        heads = [heads for _, heads in parts]
        if sum(heads) != query.shape[2]:
            raise ValueError(
                f"the parts of {self.type} have {' + '.join(map(str, heads))} = {sum(heads)} heads,"
                f" but the attention of this model has {query.shape[2]}"
            )
        groups = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (key, value))
        outs, first = [], 0
        for method, many in parts:
            q, k, v = (x[:, :, first : first + many].contiguous() for x in (query, key, value))
            outs.append(method.attend(q, k, v, site, scale=scale, key_mask=key_mask))
            first += many
        return torch.cat(outs, dim=2)

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work | None:
        found = []
        for method, many in self.parts or ((DenseAttn(), heads),):
            work = work_of(method, grid, layer, many, head_dim)
            if work is None:
                return None
            found.append((work, many))
        total = sum(many for _, many in found)
        if total != heads and self.parts:
            raise ValueError(
                f"the parts of {self.type} have {total} heads, but the model's attention has"
                f" {heads}"
            )
        densities = [work.density for work, _ in found]
        known = [density for density in densities if density is not None]
        return Work(
            flops=sum(work.flops for work, _ in found),
            density=sum(d * many for d, (_, many) in zip(known, found, strict=True)) / total
            if len(known) == len(found)
            else None,
            selection_flops=sum(work.selection_flops for work, _ in found),
            is_exact=all(work.is_exact for work, _ in found),
        )

    def to_dict(self) -> dict[str, Any]:
        parts = [[method.to_dict(), heads] for method, heads in self.parts]
        return super().to_dict() | {"parts": parts}


def work_of(method: Method, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work | None:
    """The cost of a sparse call of any method, as `Method.work`; a mask's by its visited blocks."""
    if method.is_dense:
        return Work(flops=4 * grid.tokens**2 * heads * head_dim, density=1.0)
    if not isinstance(method, StaticMaskMethod):
        return method.work(grid, layer, heads, head_dim)
    extra_keys = method.extra_keys(grid)
    if extra_keys is None:
        return None
    layout = method.layout(grid, torch.device("cpu"), method.order(grid))
    per_pair = 4 * heads * head_dim
    flops = per_pair * (layout.density * grid.tokens**2 + grid.video_tokens * extra_keys)
    return Work(flops=flops, density=allowed_pairs(layout) / grid.tokens**2)


def _longest(name: str, settings: list[int | float]) -> int | float:
    given = [setting for setting in settings if setting]
    if len({isinstance(setting, int) for setting in given}) > 1:
        counts = next(s for s in given if isinstance(s, int))
        fractions = next(s for s in given if not isinstance(s, int))
        raise ValueError(
            f"{name} is {counts} for some parts and {fractions} for others, a count and a"
            f" fraction of the run, of which either may be more: give {name} for the whole"
        )
    return max(given, default=0)


def _part(value: Any) -> Part:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(
            f"a part is {value!r}, but must be a pair of a method and its number of heads, such as"
            f" (RadialAttn(), 6)"
        )
    method, heads = value
    if isinstance(method, Mapping):
        method = from_dict(method)
    if not isinstance(method, Method):
        raise ValueError(f"the method of a part is {method!r}, but must be a method of diffattn")
    if not is_whole(heads) or heads < 1:
        raise ValueError(
            f"the number of heads of {method.type} is {heads!r}, but must be an integer of at"
            f" least 1"
        )
    if method.changes_the_model:
        raise ValueError(
            f"{method.type} cannot attend for some heads alone: it has weights of its own or"
            f" changes the model"
        )
    if not method.heads_apart:
        raise ValueError(
            f"{method.type} with these parameters looks at all heads together, and cannot attend"
            f" for some heads alone"
        )
    return method, heads
