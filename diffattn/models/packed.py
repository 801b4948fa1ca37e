"""Packed sequences, whose tokens of one kind stand at positions that an argument lists."""

from __future__ import annotations

import torch

from diffattn.models.position_ids import rectangles


def runs(positions: torch.Tensor, name: str) -> list[range]:
    """The runs of consecutive positions in a list of positions of tokens.

    Reading waits for the device; what was found is kept with the tensor, see `rectangles`.

    Args:
        positions: int64 (tokens,), growing inside of each run.
        name: what messages call the list.
    """
    found = rectangles(positions, name, joined=False, of_tokens=_places)
    firsts = [run.start + int(run.times[0]) for run in found]
    return [range(first, first + run.tokens) for first, run in zip(firsts, found, strict=True)]


def _places(positions: torch.Tensor) -> torch.Tensor:
    """Ids (tokens, 3) in which each run is a row.

    The time of a row is what its positions are ahead of their places in the list.
    """
    place = torch.arange(len(positions), device=positions.device)
    return torch.stack([positions - place, torch.zeros_like(positions), positions], dim=1)
