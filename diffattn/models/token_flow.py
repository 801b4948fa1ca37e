"""TokenFlow: how to put the video tokens of a denoiser in another order while its blocks run.

Between the first and the last block, most models treat each video token by itself, except in
attention. Such a model gives the same result for tokens in any order, if position embeddings and
timesteps of single tokens come in the same order. Permuting once per forward then replaces
permuting queries, keys, values and output in every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffattn.orders import TileOrder


@dataclass(frozen=True)
class TokenFlow:
    """The places where video tokens, and embeddings of tokens, enter and leave a denoiser's blocks.

    The dimension of a place is the dimension of the tokens in its tensor. If tokens have several
    dimensions, such as frames, rows and columns, the dimension is the last of these. The dimension
    may also hold the text of the same sequence. References stand beside the video in all places.

    Attributes:
        model_class: name of the diffusers class. Subclasses may do more and are left out.
        arguments: position, name and dimension of the arguments of forward with tokens. An argument
            without tokens in a call (None, or one timestep for all tokens) stays as it is.
        outputs: names of the modules whose outputs have tokens, with the dimension.
        leave: name of the module whose output is the last tensor with tokens, in dimension 1.
        text: position and name of the argument whose dimension 1 is the text in the sequence of a
            site; None if the sequence has no text.
        interrupted: function of the denoiser and the arguments of a call: whether the call has
            tensors between the blocks that depend on the place of a token. None for never.
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
        """The positional and keyword arguments of a call with their tokens in `order`."""
        values, named = list(args), dict(kwargs)
        for position, name, dim in self.arguments:
            if position < len(values):
                values[position] = _reordered(order, values[position], dim, optional=True)
            elif name in named:
                named[name] = _reordered(order, named[name], dim, optional=True)
        return tuple(values), named

    @property
    def places(self) -> tuple[tuple[str, int, bool], ...]:
        """Modules whose outputs have tokens: name, dimension, and whether tokens enter there."""
        entries = ((name, dim, True) for name, dim in self.outputs.items())
        return (*entries, (self.leave, 1, False))


def in_order(order: TileOrder, x: Any, dim: int) -> Any:
    """A tensor, or a tuple of tensors, with the tokens along `dim` put in `order`."""
    return _reordered(order, x, dim)


def _reordered(order: TileOrder, x: Any, dim: int, *, optional: bool = False) -> Any:
    """A tensor, or a tuple of tensors, with the tokens along `dim` in `order`.

    Args:
        optional: whether to leave alone a tensor without tokens along `dim`; otherwise such a
            tensor is an error.
    """
    if isinstance(x, tuple | list):
        return tuple(_reordered(order, part, dim, optional=optional) for part in x)
    grid = order.grid
    if optional and (x is None or x.ndim <= dim or x.shape[dim] not in _lengths(order)):
        return x
    dim %= x.ndim
    tokens = x.shape[dim] if x.shape[dim] in _lengths(order) else grid.video_tokens
    return order.to_tiles(x.reshape(-1, tokens, *x.shape[dim + 1 :])).reshape(x.shape)


def _lengths(order: TileOrder) -> tuple[int, int]:
    pictures = order.grid.pictures
    return order.grid.tokens, pictures.stop - pictures.start
