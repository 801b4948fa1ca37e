"""Launches of the passes of k-means."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffattn.kernels.clusters.triton_errors import span_sums
from diffattn.kernels.clusters.triton_passes import TritonPasses

from .launches import HEADS, Constants, Launch, Tile, Work

_TOKENS = 640
_CLUSTERS = 90
_TILE = 64


def shipped(arch: int) -> Iterator[Launch]:
    """Every configuration for Hopper; the largest two for other chips, and one in float32.

    The kernels have one table of tiles for all chips.
    """
    for head_dim in (64, 80, 128, 256) if arch == 90 else (128, 256):
        yield from _launches(head_dim, torch.bfloat16)
    if arch == 80:
        yield from _launches(128, torch.float32)


def _launches(head_dim: int, dtype: torch.dtype) -> Iterator[Launch]:
    """All passes, with centroids that are in the dtype of the tokens, and with means."""
    x = torch.zeros(1, _TOKENS, HEADS, head_dim, dtype=dtype)
    passes = TritonPasses(x, None)
    means = torch.zeros(1, HEADS, _CLUSTERS, head_dim)
    labels = torch.zeros(1, HEADS, x.shape[1], dtype=torch.int64)
    tiles = labels[:, :, ::_TILE].contiguous()
    factor = torch.zeros(1, HEADS)
    case = f"d{head_dim} {str(dtype).removeprefix('torch.')}"
    for name, centroids in {"means": means, "tokens": means.to(dtype)}.items():
        if dtype == torch.float32 and name == "tokens":
            continue
        yield Launch(
            "clusters", "plain", f"{case} {name}",
            lambda centroids=centroids: passes.nearest(centroids), _work,
        )  # fmt: skip
    yield Launch("clusters", "plain", case, passes.largest, _work)
    yield Launch("clusters", "plain", case, lambda: passes.sums(labels, _CLUSTERS, factor), _work)
    yield Launch(
        "clusters", "plain", case, lambda: span_sums(means, x, x, means, tiles, tiles, 0.1), _work
    )  # fmt: skip


def _work(function: str, constants: Constants) -> Work | None:
    if function == "span_sums_kernel":
        rows, keys = constants["BLOCK_M"], constants["BLOCK_N"]
        macs = constants["PARTS"] * rows * keys * constants["BLOCK_D"]
        return Work("span_sums", (Tile("all", f"{rows}x{keys}", macs),))
    if function != "nearest_kernel":
        return None
    tokens, clusters = constants["BLOCK_T"], constants["BLOCK_C"]
    macs = constants["PARTS"] * tokens * clusters * constants["BLOCK_D"]
    return Work("nearest", (Tile("all", f"{tokens}x{clusters}", macs),))
