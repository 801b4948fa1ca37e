"""What is measured: the shape of an attention call, and a method at a block of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial

import torch

from diffattn import TokenGrid, plan
from diffattn.methods import Method, Site, VSAAttn
from diffattn.methods.base import StaticMaskMethod

from ..errors import UserError
from .timing import Call

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORWARD, BACKWARD = "forward", "backward"
# Times a forward pass: five matrix products instead of two.
BACKWARD_FLOPS = 2.5

# Blocks of a grid without a model, among which layers that take turns are looked for.
LAYERS_OF_A_GRID = 64


@dataclass(frozen=True)
class Shape:
    """The tensors of an attention call.

    Attributes:
        grid: the tokens.
        heads, head_dim, batch: sizes.
        dtype: a name in `DTYPES`.
    """

    grid: TokenGrid
    heads: int
    head_dim: int
    batch: int
    dtype: str

    @property
    def numbers(self) -> int:
        """Numbers of one tensor."""
        return self.batch * self.grid.tokens * self.heads * self.head_dim

    @property
    def dense_flops(self) -> float:
        """Operations of a dense forward pass."""
        return 4.0 * self.numbers * self.grid.tokens


@dataclass(frozen=True)
class Case:
    """A method at a block of a model.

    Attributes:
        method: settled for the model and the grid.
        family: the model's family; "" for a grid without a model.
        layer: index of the block.
        layers: number of blocks.
        label: the method, with the parameters that the user chose, for tables.
    """

    method: Method
    family: str
    layer: int
    layers: int
    label: str


@dataclass(frozen=True)
class Bound:
    """What `diffattn plan` says of a case.

    Attributes:
        density: share of the blocks that are visited, or of the token pairs that attend where a
            method is no mask; None if the method does not choose token pairs.
        speed_up: the most that attention can gain over dense attention; None if not known.
    """

    density: float | None
    speed_up: float | None


def cases_of(method: Method, variant: str, family: str, grid: TokenGrid, layers: int) -> list[Case]:
    """A case for each kind of block that the method has, with the first sparse block of the kind.

    Args:
        method: as the user wrote it.
        variant, family: of the model; "" for none.
        grid: the tokens.
        layers: number of the model's blocks.

    Raises:
        UserError: if the method does not fit the model or the grid, or does not act in attention
            alone there.
    """
    if method.type == "agent" and family == "unet":
        raise UserError(
            "agent merges tokens of a U-Net before attention, which is not measured here: take a"
            " transformer or --grid"
        )
    try:
        method.check_family(family)
        fitted = method.for_model(variant, grid.alone)
        if isinstance(fitted, StaticMaskMethod):
            fitted.mask(grid)
    except ValueError as error:
        raise UserError(error) from None
    first = fitted.dense_layers or 0
    kinds: dict[int, int] = {}
    for layer in range(min(first, layers - 1), layers):
        kinds.setdefault(fitted.layer_kind(layer), layer)
    label = describe_method(method)
    return [
        Case(fitted, family, layer, layers, label if len(kinds) == 1 else f"{label}, block {layer}")
        for layer in kinds.values()
    ]


def describe_method(method: Method) -> str:
    """The name of a method and its parameters without the defaults, as --attn takes them."""
    words = [method.type]
    for parameter in fields(method):
        value = getattr(method, parameter.name)
        if parameter.init and (parameter.default is MISSING or value != parameter.default):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"{parameter.name}={shown}")
    return " ".join(words)


def bound_of(case: Case, shape: Shape) -> Bound:
    """The density and the bound of the speed-up of a case."""
    grid, heads, head_dim = shape.grid, shape.heads, shape.head_dim
    if isinstance(case.method, StaticMaskMethod):
        try:
            cost = plan(grid, case.method, heads=heads, head_dim=head_dim)
        except ValueError:  # the method does more than plans count
            return Bound(None, None)
        return Bound(getattr(cost, "block_density", None), cost.attention_speedup)
    work = case.method.work(grid, case.layer, heads, head_dim)
    if work is None:
        return Bound(None, None)
    return Bound(work.density, 4 * grid.tokens**2 * heads * head_dim / work.flops)


def attention_call(
    case: Case, shape: Shape, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The attention of a case as an attached model calls it: order, selection and all.

    Projections that a method adds to those of the model are no part of attention.

    Returns:
        A function of q, k and v, (batch, tokens, heads, head_dim).
    """
    method = case.method
    if isinstance(method, VSAAttn) and method.coarse:
        # The gate of a model's own processor.
        gate = torch.ones(
            shape.batch, shape.grid.tokens, shape.heads, shape.head_dim,
            device=device, dtype=DTYPES[shape.dtype],
        )  # fmt: skip
        return lambda q, k, v: method.attend_gated(q, k, v, gate, shape.grid)
    return partial(_attend, method, site_of(case, shape, device))


def selection_call(case: Case, shape: Shape, qkv: list[torch.Tensor]) -> Call | None:
    """The selection of a case alone; None for a method that does not select by content."""
    selection = getattr(case.method, "selection", None)
    if selection is None:
        return None
    site = site_of(case, shape, qkv[0].device)
    takes_values = "value" in inspect.signature(selection).parameters
    return partial(selection, *(qkv if takes_values else qkv[:2]), site)


def site_of(case: Case, shape: Shape, device: torch.device) -> Site:
    """The site of a case, with weights as they are before training."""
    module = _Projections(shape, device)
    joint = shape.grid.tokens != shape.grid.video_tokens
    weights = case.method.site_weights(module, joint) or case.method.layer_weights(case.layer)
    return Site(case.family, case.layer, case.layers, shape.grid, weights=weights)


def _attend(
    method: Method, site: Site, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return method.attend(q, k, v, site)


class _Projections(torch.nn.Module):
    """An attention module, as far as methods look at one to make their weights."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        channels = shape.heads * shape.head_dim
        self.heads, self.head_dim = shape.heads, shape.head_dim
        # A parameter on the device, which weights are placed beside.
        self.marker = torch.nn.Parameter(torch.zeros(1, device=device, dtype=DTYPES[shape.dtype]))
        self.to_q = torch.nn.Linear(channels, channels, bias=False, device="meta")
        self.to_k = torch.nn.Linear(channels, channels, bias=False, device="meta")
