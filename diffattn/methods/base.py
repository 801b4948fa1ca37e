"""The base of every attention method: a frozen dataclass of parameters with an `attend`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch

from diffattn._checks import check_fields, choice, count
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.masks.base import BLOCK, AttentionMask, TextMask
from diffattn.masks.frame_causal import FrameCausalMask
from diffattn.masks.several_grids import Rule, SeveralGridsMask
from diffattn.methods.attention_share import ModelFigures
from diffattn.methods.by_step import (
    as_json,
    check_lengths,
    check_run,
    forget_oldest,
    schedules_in,
    tried_moments,
    value_at,
)
from diffattn.methods.memory import CallMemory
from diffattn.operator import attention
from diffattn.orders import TileOrder, joined_order
from diffattn.schedule import Moment, StepValue, check_steps, is_dense_at
from diffattn.spans import POLICIES, Span, repeated, spans_of

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from diffattn.methods.agent.merging import Merging


@dataclass(frozen=True)
class Site:
    """The origin of an attention call: model family, layer and tokens.

    Attributes:
        family: the model family's name, as in `diffattn.models.FAMILIES`.
        layer: index of the block among the model's blocks, from 0. Blocks that a method treats
            alike form a group and have the index of the group's first block.
        layers: number of blocks.
        grid: the tokens of this call.
        order: the order of the tokens if the model's forward has permuted them; None for the
            grid's own order. Only methods with `is_mask_alone` meet permuted tokens.
        weights: the weights that `Method.site_weights` or `Method.layer_weights` made for the
            module; None if neither made any.
        rotary: the cosines and sines that the model rotated queries and keys by, in the model's
            own format; None without `weights` and where the model rotated nothing.
        merging: how the tokens of this call were merged; None if they were not. The grid of merged
            tokens is one row, 1 x 1 x tokens.
        memory: what the method keeps of the site from step to step of a denoising run; None unless
            the method `remembers`, in training, and outside of a run.
    """

    family: str
    layer: int
    layers: int
    grid: TokenGrid
    order: TileOrder | None = None
    weights: SiteWeights | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, compare=False)
    merging: Merging | None = field(default=None, compare=False)
    memory: CallMemory | None = field(default=None, compare=False)


# Other dtypes are storage formats: nothing can be trained in them.
_TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SiteWeights(torch.nn.Module):
    """Trainable weights that a method adds to an attention module."""

    def place_beside(self, module: torch.nn.Module) -> None:
        """Move to the device and the dtype of another module's weights."""
        for other in module.parameters():
            if other.dtype in _TRAINABLE:
                # Offloading leaves a "meta" tensor in place of weights that it has moved away.
                self.to("cpu" if other.is_meta else other.device, other.dtype)
                break

    def trained(self) -> Iterable[torch.nn.Parameter]:
        """The weights that a training changes: all of them, unless a method says otherwise."""
        return self.parameters()

    def leave(self, module: torch.nn.Module) -> None:
        """Undo every change of `module` that these weights needed, as they are about to go."""


class SiteState(Protocol):
    """The state of an attached site in the forward of its denoiser that is running.

    Attributes:
        merging: how the tokens of the current call were merged; None if they were not.
    """

    merging: Merging | None

    @property
    def method(self) -> Method:
        """The attached method, with the recommended values for the model and the size."""

    @property
    def video(self) -> TokenGrid | None:
        """The video tokens of the current call; None before the first call."""

    @property
    def sparse(self) -> bool:
        """Whether the method computes the next calls; if not, the model's own attention does."""


class AttachedSites(Protocol):
    """The sites of a denoiser while methods are attached."""

    @property
    def step(self) -> int:
        """The denoising step that the next call belongs to, from 0."""

    def group_at(self, name: str) -> SiteState | None:
        """The state of the site called `name`; None if nothing is attached there."""


class Adaptation(Protocol):
    """A change of a denoiser outside its attention sites, in force while a method is attached."""

    def apply(self, sites: AttachedSites) -> None: ...

    def undo(self) -> None: ...


@dataclass(frozen=True)
class Work:
    """The cost of one sparse attention call of a method that is no mask.

    Attributes:
        flops: all floating-point operations; a multiplication and an addition count as two.
        density: share of the token pairs that attend, text included; None for a method that does
            not choose token pairs.
        selection_flops: the part of `flops` that selects the token pairs.
        is_exact: whether the cost is the same for all data; if not, it is an estimate.
    """

    flops: float
    density: float | None = None
    selection_flops: float = 0
    is_exact: bool = True


# How compiled code calls `Method.attend`.
#   operator: as one operator, which needs nothing but its tensors and the grid.
#   traced: as code that is compiled, once for each grid.
#   row: as code that is compiled once for all grids, with the tokens as a row, 1 x 1 x tokens.
#   outside: as code that is not compiled. The graph breaks before and after the call.
Compiled = Literal["operator", "traced", "row", "outside"]

# What methods with weights, or with changes of the model, define.
_BESIDE_ATTENDING = ("site_weights", "layer_weights", "site_processor", "adaptation")
_ALLOWED = {"dense_layers": count(0), "references": choice(POLICIES)}


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """An attention method with its parameters.

    Instances are immutable, may be attached to several pipelines at once, and are written out by
    `to_dict` and `repr`. A parameter left at None takes the value that the paper or its code
    recommends for the model, see `for_model`.

    A parameter may differ from step to step of a denoising run: as a list with one value for each
    step, or as a schedule such as `ramp(1.3, 0.8)` (`diffattn.schedule`). Parameters whose values
    are sequences take `PerStep(...)` in place of a list. The method itself has the value of the
    last step, which also holds outside of a run, and `at_step` gives the method of another step.
    `dataclasses.replace` with a value that differs from the one that the method has ends the
    schedule of the parameter.

    Attributes:
        dense_layers: number of blocks at the start of the model that keep dense attention.
        dense_steps: denoising steps at the start of a run that stay dense: a count, or a fraction
            of the run such as 0.25.
        last_dense_steps: denoising steps at the end of a run that stay dense: a count or a
            fraction.
        references: how references attend, the further pictures and videos in the sequence of some
            models. "exact": their tokens see all tokens and are seen by all. "visible": among
            themselves, the tokens of a reference attend by the method's rule; all other pairs with
            a reference attend. "local": a reference of the video's rows and columns is more of the
            same picture, and the rule also holds between the reference and the video. A method
            without a rule between two grids warns, and takes "visible". References of less than a
            kernel's block, or of one row, are always "exact". A method that is no mask says in its
            own description what it does. "local" is the cheapest, and is not known to keep the
            quality of models that were not trained for it.
        by_step: the schedules of parameters that differ from step to step, by name. Not to be
            given: the parameters themselves take schedules.
    """

    type: ClassVar[str]
    paper: ClassVar[str] = ""
    # The largest number of dense layers that `for_model` recommends for any model or video size.
    most_dense_layers: ClassVar[int] = 0
    # Whether `attend` needs nothing but its tensors and the grid. Compiled code then calls `attend`
    # as one operator, and the code inside `attend` need not be traceable.
    traced_whole: ClassVar[bool] = False
    # Whether `attend` uses `Site.memory`. Such a method must be `traced_whole`.
    remembers: ClassVar[bool] = False
    # Whether `on_model` reads the figures of the model.
    needs_figures: ClassVar[bool] = False
    # Parameters that cannot differ from step to step, because they decide about weights or about
    # the model's structure.
    same_in_every_step: ClassVar[frozenset[str]] = frozenset()
    # What instances keep for later calls, by the name of the field, with the parameters that decide
    # about it. Methods that are equal in these share it.
    shared_between_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    dense_layers: int | None = field(
        default=None, metadata={"help": "blocks at the start of the model that stay dense"}
    )
    dense_steps: int | float | None = field(
        default=None,
        metadata={"help": "steps at the start of a run that stay dense (count or fraction)"},
    )
    last_dense_steps: int | float = field(
        default=0,
        metadata={"help": "steps at the end of a run that stay dense (count or fraction)"},
    )
    references: str = field(
        default="visible",
        metadata={"help": "exact, visible or local: how reference pictures and videos attend"},
    )
    by_step: tuple[tuple[str, StepValue], ...] = ()
    _of_steps: dict[tuple[Any, ...], Method] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self._take_schedules()
        check_fields(self, _ALLOWED)
        if self.dense_steps is not None:
            check_steps("dense_steps", self.dense_steps)
        check_steps("last_dense_steps", self.last_dense_steps)

    def _take_schedules(self) -> None:
        """Move the schedules among the parameters to `by_step`; leave the last step's values."""
        given = schedules_in(self)
        for name, schedule in self.by_step:
            # Another value than the last step's was given in place of the schedule.
            if name not in given and getattr(self, name) == value_at(
                type(self), name, schedule, 0, 0
            ):
                given[name] = schedule
        check_lengths(given)
        for name, schedule in given.items():
            object.__setattr__(self, name, value_at(type(self), name, schedule, 0, 0))
        object.__setattr__(self, "by_step", tuple(sorted(given.items(), key=lambda item: item[0])))
        tried = set()
        for step, steps in tried_moments(given) if given else ():
            values = self._values_at(step, steps)
            if values in tried:
                continue
            tried.add(values)
            try:
                replace(self, by_step=(), **dict(values))
            except ValueError as error:
                raise ValueError(f"in step {step + 1} of a run of {steps}: {error}") from None

    def _values_at(self, step: int, steps: int) -> tuple[tuple[str, Any], ...]:
        cls = type(self)
        return tuple((name, value_at(cls, name, s, step, steps)) for name, s in self.by_step)

    @property
    def differs_by_step(self) -> bool:
        """Whether `at_step` may give other methods than this one."""
        return bool(self.by_step)

    def at_step(self, step: int, steps: int) -> Method:
        """The method of one denoising step, which is the same object for equal values.

        Args:
            step: index of the step, from 0.
            steps: length of the run; 0 outside of a run, as in training, where the values of the
                last step hold.

        Raises:
            ValueError: if a list has another number of values than the run has steps.
        """
        if not self.by_step:
            return self
        check_run(dict(self.by_step), steps)
        values = self._values_at(step, steps)
        found = self._of_steps.get(values)
        if found is None:
            found = replace(self, by_step=(), **dict(values))
            found.share(self)
            self._of_steps[values] = found
            forget_oldest(self._of_steps)
        return found

    def at_layer(self, layer: int, layers: int) -> Method:
        """The method of one block, which is the same object for blocks with the same method.

        Args:
            layer: index of the block, from 0.
            layers: number of blocks of the denoiser.

        Raises:
            ValueError: if the method names a block that the denoiser lacks.
        """
        return self

    @property
    def described_as(self) -> Method:
        """The method that the method of a block is a part of; the method itself if it is whole."""
        return self

    def misfit(
        self, denoiser: str, variant: str, model: str, grid: TokenGrid | None, steps: int
    ) -> str | None:
        """A warning about a run that the method was not found for; None for no warning.

        Args:
            denoiser, variant, model: class, variant and name of the model; "" where not known.
            grid: the tokens of the video; None where not known.
            steps: length of the run; 0 where not known.
        """
        return None

    def in_run(self, family: str, grid: TokenGrid | None, steps: int) -> list[Method | None]:
        """The method of each step of a run, with the recommended values; None for a dense step.

        Args:
            family, grid: as for `for_model`.
            steps: length of the run.

        Raises:
            ValueError: if a list has another number of values.
        """
        found: list[Method | None] = []
        for step in range(steps):
            method = self.at_step(step, steps).for_model(family, grid)
            ends = method.dense_steps or 0, method.last_dense_steps
            is_dense = is_dense_at(Moment(step, steps), *ends)
            is_dense |= self.differs_by_step and method.is_dense
            found.append(None if is_dense else next((m for m in found if m == method), method))
        return found

    def with_dense_ends(self, family: str, grid: TokenGrid | None) -> Self:
        """The same method with the recommended dense layers and dense steps, and its schedules.

        Args:
            family, grid: as for `for_model`.
        """
        last = self.at_step(0, 0).for_model(family, grid)
        return replace(
            self,
            dense_layers=last.dense_layers,
            dense_steps=last.dense_steps,
            last_dense_steps=last.last_dense_steps,
        )

    def share(self, other: Method) -> None:
        """Keep what another method keeps for later calls, where that is the same for both."""
        if type(other) is type(self):
            for kept, parameters in self.shared_between_steps.items():
                if all(getattr(self, name) == getattr(other, name) for name in parameters):
                    object.__setattr__(self, kept, getattr(other, kept))

    @property
    def kept_bytes(self) -> int:
        """Memory of the block lists that the method keeps for later calls."""
        return 0

    @property
    def is_dense(self) -> bool:
        """Whether the method is dense attention and nothing else, whatever the tokens hold."""
        return False

    @property
    def dense_layers_at_most(self) -> int:
        """The number of blocks at the start of the model that may stay dense in any step."""
        schedule = dict(self.by_step).get("dense_layers")
        if schedule is not None:
            moments = tried_moments({"dense_layers": schedule})
            values = [value_at(type(self), "dense_layers", schedule, *at) for at in moments]
        else:
            values = [self.dense_layers]
        return max(self.most_dense_layers if value is None else value for value in values)

    def on_model(self, figures: ModelFigures | None) -> Method:
        """The method for a denoiser of certain figures, before it is attached to the denoiser.

        Args:
            figures: None where they are not known.
        """
        return self

    def for_run(self, family: str, grid: TokenGrid | None, steps: int | None) -> Method:
        """The method that a run of `steps` steps uses, with its schedules.

        Args:
            family, grid: as for `for_model`.
            steps: length of the run; None where it is not known.
        """
        return self

    @abstractmethod
    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The same method with every None replaced by the recommended value.

        Args:
            family: the name of a family in `diffattn.models.FAMILIES`, or of a variant of a family.
            grid: the tokens of the video, for recommendations that depend on the size.
        """

    @abstractmethod
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
        """Attention of one call.

        Args:
            query, key, value: (batch, tokens, heads, head_dim), after normalisation and RoPE, text
                tokens included.
            site: the layer and the tokens of the call.
            scale: factor of the scores; 1 / sqrt(head_dim) when None.
            key_mask: bool (batch, tokens): False for padded keys.

        Returns:
            (batch, tokens, heads, head_dim).
        """

    def site_weights(self, module: torch.nn.Module, joint: bool) -> SiteWeights | None:
        """New trainable weights for an attention module; None if the method needs none.

        While the method is attached, the weights are a submodule of `module`, named by the method's
        `type`: optimizers, `state_dict` and `to` find them there. `Site.weights` gives them to
        `attend`.

        Args:
            module: the attention module.
            joint: whether text tokens stand in the module's sequence.
        """
        return None

    def layer_weights(self, layer: int) -> SiteWeights | None:
        """Weights that differ from block to block, for a method without `site_weights`.

        Args:
            layer: index of the block, from 0; `Site.layer` is the same for a whole group of blocks.
        """
        return None

    def site_processor(self, processor: Any, state: SiteState) -> Any:
        """The processor for a site's calls: `processor` itself, changed or not.

        Args:
            processor: a copy of the site's processor, for this site alone.
            state: the state of the site.

        Returns:
            A processor of the class of `processor` or of a subclass.
        """
        return processor

    def adaptation(self, model: torch.nn.Module) -> Adaptation | None:
        """The change that the method makes to a denoiser beside its attention; None for no change.

        Several methods on one denoiser may give equal adaptations, which are applied once;
        different adaptations are refused.

        Raises:
            ValueError: if the method cannot be attached to `model`.
        """
        return None

    def compiled_as(self, family: str) -> Compiled:
        """How code that is compiled calls `attend` in models of a family, see `Compiled`.

        Args:
            family: the name of a family in `diffattn.models.FAMILIES`.
        """
        return "operator" if self.traced_whole else "traced"

    def check_family(self, family: str) -> None:
        """Check that the method can be attached to models of a family, before there is a model.

        Args:
            family: the name of a family in `diffattn.models.FAMILIES`; "" for no model.

        Raises:
            ValueError: if the method cannot.
        """
        return

    def caution(self, grid: TokenGrid) -> str | None:
        """The quality that a model loses under the method unless it was trained for the method.

        Args:
            grid: the video tokens of a call.

        Returns:
            A clause for a warning; None if the paper keeps the quality without training.
        """
        return None

    @property
    def changes_the_model(self) -> bool:
        """Whether the method has weights of its own or changes the model, beside attending."""
        own = type(self)
        return any(getattr(own, name) is not getattr(Method, name) for name in _BESIDE_ATTENDING)

    @property
    def heads_apart(self) -> bool:
        """Whether each head attends independently of the other heads."""
        return True

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work | None:
        """The cost of a sparse call of a method that is no mask; None if the cost is unknown.

        Args:
            grid: the tokens of the call, text included.
            layer: index of the block.
            heads, head_dim: number of heads, and channels of a head.
        """
        return None

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        """The rectangles of `grid` in which the method does not just attend to all tokens.

        The video comes first, and references after it. All other tokens are treated as text is.
        """
        return spans_of(grid, grid.tokens + 1)

    def layer_kind(self, layer: int) -> int:
        """The index of a layer's variant where layers take turns; 0 if all layers do the same."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Parameters and `type`, ready for JSON; `diffattn.methods.from_dict` reads it back."""
        parameters = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, schedule in parameters.pop("by_step"):
            parameters[name] = as_json(type(self), name, schedule)
        return {"type": self.type} | parameters

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle carries the parameters only, and derives everything else anew.
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, parameters: dict[str, Any]) -> None:
        self.__init__(**parameters)  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class StaticMaskMethod(Method):
    """A method whose token pairs depend on the grid alone.

    Attributes:
        any_order: whether the number of blocks to visit is the same in every order of the tokens.
        by_place: whether the mask of `video_mask` knows tokens by `grid.is_text`, `grid.places` and
            `grid.coordinates` alone. The mask then serves a grid that stands several times in a
            sequence, too.
    """

    any_order: ClassVar[bool] = False
    by_place: ClassVar[bool] = False

    _masks: dict[TokenGrid, AttentionMask] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _orders: dict[TokenGrid, TileOrder | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _spans: dict[TokenGrid, tuple[Span, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend over `grid`, text included; the method keeps the mask.

        Raises:
            TypeError: if `grid` is no TokenGrid.
        """
        if not isinstance(grid, TokenGrid):
            raise TypeError(
                f"grid is {grid!r}, but must be a TokenGrid, such as TokenGrid(frames=21,"
                f" height=30, width=52)"
            )
        if grid not in self._masks:
            spans = self.spans(grid)
            if len(spans) > 1:
                mask: AttentionMask = self._joint_mask(grid, spans)
            else:
                mask = self.video_mask(grid)
                if grid.text_before or grid.text_after:
                    mask = TextMask(grid) | mask
            if grid.causal_frames:
                mask = FrameCausalMask(grid) & mask
            self._masks[grid] = mask
        return self._masks[grid]

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        if self.references == "exact" or not grid.references:
            return super().spans(grid)
        if grid not in self._spans:
            video, *references = spans_of(grid, self.block_size_on(grid))
            self._spans[grid] = (video, *filter(self._fits, references))
        return self._spans[grid]

    def _fits(self, span: Span) -> bool:
        try:
            self.video_mask(span.grid)
        except ValueError as error:
            warnings.warn(
                f"a reference of {'x'.join(map(str, span.sizes))} tokens attends to all tokens,"
                f" because {self.type} with these parameters does not fit it: {error}",
                stacklevel=2,
            )
            return False
        return True

    def _joint_mask(self, grid: TokenGrid, spans: tuple[Span, ...]) -> SeveralGridsMask:
        is_local = self.references == "local"
        rules, between = [], 0
        for group in self._alike(spans):
            pairs = [(n, n) for n in group]
            if is_local:
                sees = [(q, k) for q in group for k in group if spans[q].may_see(spans[k])]
                pairs = list(dict.fromkeys(pairs + sees))
                between += len(pairs) - len(group)
            rules.append(Rule(tuple(pairs), self.video_mask(repeated([spans[n] for n in group]))))
        ruled = {pair for rule in rules for pair in rule.pairs}
        for q, query in enumerate(spans):
            for k, key in enumerate(spans):
                if is_local and (q, k) not in ruled and query.may_see(key):
                    mask = self.mask_between(query, key)
                    if mask is not None:
                        rules.append(Rule(((q, k),), mask))
                        between += 1
        if is_local and not between:
            warnings.warn(
                f"references='local' is references='visible' here: {self.type} has no rule between"
                f" these grids. A rule needs references with the rows and columns of the video, and"
                f" for most methods with its frames",
                stacklevel=3,
            )
        return SeveralGridsMask(grid, tuple(span.grid for span in spans), tuple(rules))

    def _alike(self, spans: tuple[Span, ...]) -> list[list[int]]:
        """The numbers of the spans, grouped by spans that one mask serves."""
        groups: list[list[int]] = []
        for n, span in enumerate(spans):
            for group in groups if self.by_place else ():
                first = spans[group[0]]
                if first.sizes == span.sizes and first.in_step_with(span):
                    group.append(n)
                    break
            else:
                groups.append([n])
        return groups

    @abstractmethod
    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend among the video tokens of `grid`; text pairs are ignored.

        For a sequence with references the mask is asked for once for each of them, on a grid whose
        video tokens are the reference's.
        """

    def mask_between(self, query: Span, key: Span) -> AttentionMask | None:
        """The rule from the queries of one grid of a sequence to the keys of another, for "local".

        Grids of equal sizes and times that one mask serves (`by_place`) are not asked about.

        Args:
            query, key: two grids with equal rows and columns, the same places of the picture.

        Returns:
            A mask over the tokens of the sequence, of which only these pairs are read. None if the
            method has no such rule: all these pairs then attend.
        """
        return None

    def block_size_on(self, grid: TokenGrid) -> int:
        """Tokens per block for attention under this method on `grid`."""
        return BLOCK

    def order_on(self, grid: TokenGrid) -> TileOrder | None:
        """The order in which the tokens of `grid` form blocks; None for the grid's own order."""
        return None

    @property
    def kept_bytes(self) -> int:
        return sum(mask.kept_bytes for mask in self._masks.values())

    @property
    def is_mask_alone(self) -> bool:
        """Whether the method does nothing but attend under its mask."""
        return type(self).attend is StaticMaskMethod.attend

    def extra_keys(self, grid: TokenGrid) -> int | None:
        """Number of keys that every video token of `grid` sees in addition to the tokens' own keys.

        None for a method that does more than attend under its mask and to such keys.
        """
        return 0 if self.is_mask_alone else None

    def score_scale(self, grid: TokenGrid, head_dim: int, scale: float | None) -> float | None:
        """The factor of the scores of a call over `grid`.

        Args:
            grid: the tokens of the call, text included.
            head_dim: channels of a head.
            scale: the factor that the model asks for.

        In `scale` and in the result, None is 1 / sqrt(head_dim).
        """
        return scale

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
        scale = self.score_scale(site.grid, query.shape[-1], scale)
        order = site.order or self.order(site.grid)
        layout = self.layout(site.grid, query.device, order)
        if site.order is not None:
            order = None  # the tensors are in this order already
        return attention(query, key, value, layout, order=order, scale=scale, key_mask=key_mask)

    def order(self, grid: TokenGrid) -> TileOrder | None:
        """The result of `order_on`, kept together with its permutation for the next call."""
        if grid not in self._orders:
            spans = self.spans(grid)
            if len(spans) > 1:
                self._orders[grid] = joined_order(grid, self._orders_of(spans))
            else:
                self._orders[grid] = self.order_on(grid)
        return self._orders[grid]

    def _orders_of(self, spans: tuple[Span, ...]) -> list[TileOrder | None]:
        out: list[TileOrder | None] = [None] * len(spans)
        for group in self._alike(spans):
            order = self.order_on(spans[group[0]].grid)
            for n in group:
                out[n] = None if order is None else TileOrder(spans[n].grid, order.tile)
        return out

    def layout(
        self, grid: TokenGrid, device: torch.device, order: TileOrder | None = None
    ) -> BlockLayout:
        """The blocks of a call over `grid` with the tokens in `order`; kept for the next call."""
        return self.mask(grid).blocks(self.block_size_on(grid), device=device, order=order)


def attends_by_mask_throughout(method: Method) -> bool:
    """Whether the method is a `StaticMaskMethod` with `is_mask_alone` in every step."""
    schedules = dict(method.by_step)
    if not schedules:
        return attends_by_mask_alone(method) and not method.differs_by_step
    return all(attends_by_mask_alone(method.at_step(*at)) for at in tried_moments(schedules))


def attends_by_mask_alone(method: Method) -> TypeIs[StaticMaskMethod]:
    """Whether the method is a `StaticMaskMethod` with `is_mask_alone`."""
    return isinstance(method, StaticMaskMethod) and method.is_mask_alone
