"""A tiny model with random weights, and what a test has to know of the model."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

from diffattn import TokenGrid

BATCH = 2


@dataclass(frozen=True)
class Case:
    """A model with the inputs of a call.

    Attributes:
        build: makes the model.
        inputs: the arguments of its forward.
        grids: the video tokens of its sites' calls; several where they differ in size, of which
            the first is that of the sites with text.
        sites: the names of its sites in the order of their layers.
        text: where text tokens stand, and how many there are with the padding.
        pixel: index into the first input of a pixel in the token at (t, h, w). The first numbers
            are those of lists, if the input is a list.
        entry: name of the module that has this input; the model, unless other layers come between.
        reference_pixel: name of an input of the model, and index into the input of a pixel in the
            token at (t, h, w) of reference number n, from (n, t, h, w). None without references.
        queries: the positions of the queries of a site's call with so many queries and keys, where
            there are more keys; None for a model without such calls.
        checkpoints: whether gradient checkpointing of the class works in diffusers.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    grids: tuple[TokenGrid, ...]
    sites: tuple[str, ...]
    pixel: Callable[[int, int, int], tuple[int, ...]]
    text: tuple[str, int] | None = None
    entry: str = ""
    reference_pixel: Callable[[int, int, int, int], tuple[str, tuple[Any, ...]]] | None = None
    queries: Callable[[int, int], tuple[slice, ...]] | None = None
    checkpoints: bool = True

    def grid_of(self, tokens: int) -> TokenGrid:
        """The grid of an attention call over `tokens`, with its text."""
        for grid in self.grids:
            if grid.tokens == tokens:
                return grid
        assert self.text is not None
        grid = self.grids[0]
        count = tokens - grid.tokens
        assert 0 < count <= self.text[1]
        return grid.beside(**{self.text[0]: count})


def make(name: str, **config: Any) -> torch.nn.Module:
    """A model of diffusers with seeded weights that all matter (many start at zero)."""
    torch.manual_seed(0)
    cls = getattr(diffusers, name, None)
    if cls is None or config.keys() - inspect.signature(cls.__init__).parameters.keys():
        pytest.skip(f"diffusers {diffusers.__version__} has no such {name}")
    model = cls(**config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def valid_text(tokens: int, *lengths: int) -> torch.Tensor:
    """int64 (batch, tokens): 1 where the text is, 0 where it is padding."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def names(*patterns: tuple[str, int]) -> tuple[str, ...]:
    return tuple(pattern.format(i) for pattern, count in patterns for i in range(count))


def nudged(x: Any, pixel: tuple[Any, ...]) -> Any:
    """A copy of an input, a tensor or lists of tensors, with one pixel changed."""
    if isinstance(x, list):
        return [nudged(part, pixel[1:]) if i == pixel[0] else part for i, part in enumerate(x)]
    x = x.clone()
    x[pixel] += 0.5
    return x
