"""What every attention method is: a frozen dataclass of parameters that knows its attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch

from diffattn._checks import check_fields, count
from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.masks.base import BLOCK, AttentionMask, TextMask
from diffattn.operator import attention
from diffattn.orders import TileOrder
from diffattn.schedule import check_steps

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from diffattn.methods.agent.merging import Merging


@dataclass(frozen=True)
class Site:
    """Where an attention call comes from.

    Attributes:
        family: the model family's name, as in `diffattn.models.FAMILIES`.
        layer: index of the block among the model's blocks, from 0.
        layers: number of blocks.
        grid: the tokens of this call.
        order: the order they come in where the model's forward has put them in another than the
            grid's; only methods that are no more than a mask meet it.
        weights: what `Method.site_weights` has made for the module that calls.
        rotary: cosines and sines that the model has rotated queries and keys by, as it has them;
            only where there are weights, and None where nothing was rotated.
        merging: how the tokens of this call were merged; `grid` is a row of what is left then.
    """

    family: str
    layer: int
    layers: int
    grid: TokenGrid
    order: TileOrder | None = None
    weights: SiteWeights | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, compare=False)
    merging: Merging | None = field(default=None, compare=False)


# Others are storage formats, which nothing can be trained in.
_TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SiteWeights(torch.nn.Module):
    """Trainable weights of a method's own at an attention module."""

    def place_beside(self, module: torch.nn.Module) -> None:
        """Move to the device and the dtype of another module's weights."""
        for other in module.parameters():
            if other.dtype in _TRAINABLE:
                # Weights that offloading has moved elsewhere are "meta" where they were.
                self.to("cpu" if other.is_meta else other.device, other.dtype)
                break

    def leave(self, module: torch.nn.Module) -> None:
        """Undo what was done to the module on their account: they are taken off."""


class SiteState(Protocol):
    """What may be asked of a site between its calls.

    Attributes:
        method: the method that is attached, settled for the model.
        video: the video tokens of the current call; None before a call.
        sparse: whether calls go to the method now; if not they are the model's own.
        merging: how the tokens of the current call were merged; None where they were not.
    """

    method: Method
    video: TokenGrid | None
    sparse: bool
    merging: Merging | None


class AttachedSites(Protocol):
    """The sites of a denoiser while methods are attached."""

    @property
    def step(self) -> int:
        """The denoising step that the next call belongs to, from 0."""

    def group_at(self, name: str) -> SiteState | None:
        """The state of the site of a name; None where nothing is attached."""


class Adaptation(Protocol):
    """A change of a denoiser outside of its attention sites, while a method is attached."""

    def apply(self, sites: AttachedSites) -> None: ...

    def undo(self) -> None: ...


@dataclass(frozen=True)
class Work:
    """What one sparse attention call costs, of a method that is no mask.

    Attributes:
        flops: all of them; a multiplication and an addition are two.
        density: share of the token pairs that attend, text included; None if that is not what the
            method does.
        selection_flops: those of `flops` that decide what attends.
        is_exact: whether the data change nothing of it.
    """

    flops: float
    density: float | None = None
    selection_flops: float = 0
    is_exact: bool = True


_ALLOWED = {"dense_layers": count(0)}


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """An attention method with its parameters.

    Instances are immutable, may be attached to several pipelines at once, and are written out by
    `to_dict` and `repr`. A parameter left at None takes the value that the paper or its code
    recommends for the model it is attached to, see `for_model`.

    Attributes:
        dense_layers: number of blocks at the start of the model that keep dense attention.
        dense_steps: denoising steps at the start of a run that stay dense: a count, or a fraction
            of the run such as 0.25.
        last_dense_steps: the same at the end of the run.
    """

    type: ClassVar[str]
    paper: ClassVar[str] = ""
    # The largest number of dense layers that `for_model` recommends for any model or video size.
    most_dense_layers: ClassVar[int] = 0
    # Whether `attend` needs nothing but its tensors and the grid, so that compiled code may call it
    # as one operator; its own parts need not be traceable then.
    traced_whole: ClassVar[bool] = False

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

    def __post_init__(self) -> None:
        check_fields(self, _ALLOWED)
        if self.dense_steps is not None:
            check_steps("dense_steps", self.dense_steps)
        check_steps("last_dense_steps", self.last_dense_steps)

    @abstractmethod
    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The same method with every None replaced by the recommended value.

        Args:
            family: a name from `diffattn.models.FAMILIES`, or of one of its variants.
            grid: the size of the video, where recommendations depend on it.
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
        """Attention of one call. Tensors are (batch, tokens, heads, head_dim), before and after.

        Args:
            query, key, value: after normalisation and RoPE, text tokens included.
            site: which layer of which model calls, over which tokens.
            scale: factor of the scores; 1 / sqrt(head_dim) when None.
            key_mask: bool (batch, tokens): False for padded keys.
        """

    def site_weights(self, module: torch.nn.Module, joint: bool) -> SiteWeights | None:
        """Trainable weights of the method's own at an attention module; None if it has none.

        As long as the method is attached they are a submodule of `module` with the method's `type`
        for a name, where optimizers, `state_dict` and `to` find them, and come in `Site.weights`.

        Args:
            joint: whether text tokens stand in the module's sequence.
        """
        return None

    def layer_weights(self, layer: int) -> SiteWeights | None:
        """The same for what differs from block to block; only where there are no `site_weights`.

        Args:
            layer: index of the block, as `Site.layer` would be if each block had its own.
        """
        return None

    def site_processor(self, processor: Any, state: SiteState) -> Any:
        """What is to do a site's calls: `processor`, a copy of its own, unless more is to change.

        It must be of the class of `processor`, or derived from it.
        """
        return processor

    def adaptation(self, model: torch.nn.Module) -> Adaptation | None:
        """What is to be changed in a denoiser besides its attention; None if nothing is.

        Those of several methods attached to one denoiser must be equal.

        Raises:
            ValueError: if this cannot be done to `model`.
        """
        return None

    @property
    def heads_apart(self) -> bool:
        """Is what a head attends to no matter of the other heads?"""
        return True

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work | None:
        """What a sparse call costs, of a method that is no mask; None if it cannot tell.

        Args:
            grid: the tokens of the call, text included.
            layer: index of the block.
            heads, head_dim: of the attention.
        """
        return None

    def layer_kind(self, layer: int) -> int:
        """Which of the things that layers do by turns this one does; 0 if all do the same."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Parameters and `type`, ready for JSON; `diffattn.methods.from_dict` reads it back."""
        parameters = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {"type": self.type} | parameters

    def __getstate__(self) -> dict[str, Any]:
        # What is derived is worked out again: a copy or a pickle carries the parameters only.
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, parameters: dict[str, Any]) -> None:
        self.__init__(**parameters)  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class StaticMaskMethod(Method):
    """A method whose token pairs depend on the grid alone.

    Attributes:
        any_order: whether its blocks are as good in one order of the tokens as in another.
    """

    any_order: ClassVar[bool] = False

    _masks: dict[TokenGrid, AttentionMask] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _orders: dict[TokenGrid, TileOrder | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend over `grid`, text included; kept for the next call."""
        if grid not in self._masks:
            mask = self.video_mask(grid)
            if grid.text_before or grid.text_after:
                mask = TextMask(grid) | mask
            self._masks[grid] = mask
        return self._masks[grid]

    @abstractmethod
    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        """The method's rule among the video tokens of `grid`; what it says of text is ignored."""

    def block_size_on(self, grid: TokenGrid) -> int:
        """Tokens per block that attention under this method is computed in on `grid`."""
        return BLOCK

    def order_on(self, grid: TokenGrid) -> TileOrder | None:
        """The order in which the tokens of `grid` are cut into blocks; None is the grid's own."""
        return None

    @property
    def is_mask_alone(self) -> bool:
        """Is attention by this method attention under its mask, and nothing else?"""
        return type(self).attend is StaticMaskMethod.attend

    def extra_keys(self, grid: TokenGrid) -> int | None:
        """Keys that every video token of `grid` sees besides those of the tokens.

        None where the method does more than attend under its mask and to such keys.
        """
        return 0 if self.is_mask_alone else None

    def score_scale(self, grid: TokenGrid, head_dim: int, scale: float | None) -> float | None:
        """The factor of the scores of a call over `grid` for which the model asks for `scale`.

        None is 1 / sqrt(head_dim).
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
            order = None  # the tensors come in it
        return attention(query, key, value, layout, order=order, scale=scale, key_mask=key_mask)

    def order(self, grid: TokenGrid) -> TileOrder | None:
        """What `order_on` says, kept for the next call with the permutation it stands for."""
        if grid not in self._orders:
            self._orders[grid] = self.order_on(grid)
        return self._orders[grid]

    def layout(
        self, grid: TokenGrid, device: torch.device, order: TileOrder | None = None
    ) -> BlockLayout:
        """The blocks of a call over `grid` with its tokens in `order`; kept for the next call."""
        return self.mask(grid).blocks(self.block_size_on(grid), device=device, order=order)


def attends_by_mask_alone(method: Method) -> TypeIs[StaticMaskMethod]:
    """Is the method a static mask, with `is_mask_alone`?"""
    return isinstance(method, StaticMaskMethod) and method.is_mask_alone
