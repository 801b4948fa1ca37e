"""TokenFlow: how the video tokens of a denoiser can be in another order while its blocks run.

Where all that a model does between its first block and its last treats video tokens one by one,
attention excepted, it gives the same for tokens in any order, if what belongs to them (position
embeddings, timesteps of their own) comes in that order too. Permuting once per forward replaces
permuting queries, keys, values and output in every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from diffattn.orders import TileOrder


@dataclass(frozen=True)
class TokenFlow:
    """Where a denoiser's video tokens, and what belongs to them, enter its blocks and leave them.

    A dimension is the one along which tokens lie; where several do, such as frames, rows and
    columns, it is the last of them. It may hold the text of the same sequence as well.

    Attributes:
        model_class: the class of diffusers this holds for, and for no subclass, which may do more.
        arguments: position, name and dimension of the arguments of forward that have tokens. In a
            call where one has not (None, or one timestep for all tokens) it is left as it is.
        outputs: names of modules whose outputs have tokens, with the dimension.
        leave: name of the module whose output, dimension 1, is the last thing with tokens.
        text: position and name of the argument whose dimension 1 is the text that stands in the
            sequence of a site.
        interrupted: whether a call has something in between that knows the tokens by their place.
    """

    model_class: str
    arguments: tuple[tuple[int, str, int], ...] = ()
    outputs: Mapping[str, int] = field(default_factory=dict)
    leave: str = "proj_out"
    text: tuple[int, str] | None = None
    interrupted: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], bool] | None = None

    def enter(
        self, order: TileOrder, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with their tokens in `order`."""
        values, named = list(args), dict(kwargs)
        for position, name, dim in self.arguments:
            if position < len(values):
                values[position] = _reordered(order, values[position], dim, optional=True)
            elif name in named:
                named[name] = _reordered(order, named[name], dim, optional=True)
        return tuple(values), named

    def follow(self, order: TileOrder, model: torch.nn.Module) -> list[RemovableHandle]:
        """Hook into the modules where tokens enter and leave, for one call of the model."""

        def enter(dim: int) -> Callable[..., Any]:
            return lambda module, args, output: _reordered(order, output, dim)

        def leave(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return order.from_tiles(output)

        hooks = [
            model.get_submodule(name).register_forward_hook(enter(dim))
            for name, dim in self.outputs.items()
        ]
        return [*hooks, model.get_submodule(self.leave).register_forward_hook(leave)]


def _reordered(order: TileOrder, x: Any, dim: int, *, optional: bool = False) -> Any:
    """A tensor, or a tuple of them, with the tokens along `dim` in `order`.

    Args:
        optional: leave alone what has no tokens there, where otherwise it is an error.
    """
    if isinstance(x, tuple | list):
        return tuple(_reordered(order, part, dim, optional=optional) for part in x)
    grid = order.grid
    if optional and (x is None or x.ndim <= dim or x.shape[dim] not in _lengths(order)):
        return x
    dim %= x.ndim
    tokens = grid.tokens if x.shape[dim] == grid.tokens else grid.video_tokens
    return order.to_tiles(x.reshape(-1, tokens, *x.shape[dim + 1 :])).reshape(x.shape)


def _lengths(order: TileOrder) -> tuple[int, int]:
    return order.grid.tokens, order.grid.video_tokens
