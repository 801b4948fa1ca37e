"""Every shipped configuration of every Triton kernel."""

from __future__ import annotations

from collections.abc import Iterator

from . import block_sparse, clusters, gather, linear, selection, summary, tangent
from .launches import Launch

FAMILIES = {
    "block_sparse": block_sparse.shipped,
    "clusters": clusters.shipped,
    "gather": gather.shipped,
    "linear": linear.shipped,
    "selection": selection.shipped,
    "summary": summary.shipped,
    "tangent": tangent.shipped,
}


def shipped(arch: int) -> Iterator[Launch]:
    """The launches of all families for one architecture."""
    for launches in FAMILIES.values():
        yield from launches(arch)
