"""The picture of the blocks that a case computed, from the last call of its first sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffattn.counting import PairCount
from diffattn.draw import ALL, NONE, block_image, mask_image, png
from diffattn.grid import TokenGrid
from diffattn.methods.base import Method, StaticMaskMethod

_SIZE = 256


def write_mask(path: Path, pairs: PairCount, method: Method, grid: TokenGrid) -> None:
    """Draw the mask of a method, or the blocks of the latest call, unless the picture is there.

    A method without a mask whose calls list no blocks has no picture.

    Args:
        path: the file.
        pairs: what a run computed.
        method: with every parameter settled.
        grid: the tokens of the video.
    """
    if path.exists():
        return
    image = _image(pairs, method, grid)
    if image is None:
        return
    part = path.with_name(f".part-{path.name}")
    part.write_bytes(png(image))
    part.replace(path)


def _image(pairs: PairCount, method: Method, grid: TokenGrid) -> np.ndarray | None:
    if isinstance(method, StaticMaskMethod):
        return mask_image(method.mask(grid), _SIZE)
    shares = pairs.shares
    if shares is not None:
        depth = shares.cpu().sqrt().numpy()[..., None]
        image = np.rint(np.array(NONE) * (1 - depth) + np.array(ALL) * depth).astype(np.uint8)
        factor = max(1, _SIZE // len(image))
        return image.repeat(factor, 0).repeat(factor, 1)
    return None if pairs.layout is None else _filled(block_image(pairs.layout, _SIZE))


def _filled(image: np.ndarray) -> np.ndarray:
    """The part of a picture of blocks that holds queries.

    Clusters are filled up to tiles, of which there are as many as any clusters might need. Rows
    after the last tile see nothing, and their keys are seen by nobody.
    """
    rows, columns = ((image != np.array(NONE)).any((axis, 2)) for axis in (1, 0))
    if not rows.any() or rows[-1]:
        return image
    return image[: rows.nonzero()[0][-1] + 1, : columns.nonzero()[0][-1] + 1]
