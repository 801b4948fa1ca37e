"""``diffattn mask``: the density of a mask, its blocks, and a picture of both."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .attention_settings import make_method, read_arguments
from .errors import UserError
from .grid_text import read_grid, read_place
from .outputs import Outputs, check_writable, staged

if TYPE_CHECKING:
    from diffattn import TokenGrid
    from diffattn.methods import StaticMaskMethod


def draw_mask(
    method: str, arguments: Sequence[str], grid: str, query: str | None, output: Path
) -> Iterator[str]:
    """Write the picture, and say what the mask holds.

    Args:
        method: its name.
        arguments: its parameters, each as "name=value".
        grid, query: as the user wrote them; without a query the middle of the grid is shown.
        output: the PNG file.
    """
    from diffattn import draw
    from diffattn.planning import check_tokens

    tokens = read_grid(grid)
    place = draw.middle(tokens) if query is None else read_place(query)
    output = output.expanduser()
    _check_output(output)
    try:
        check_tokens(tokens)
        draw.check_query(tokens, place)
        fitted = _static_method(method, arguments, tokens)
        yield from _figures(fitted, tokens)
        image = draw.picture(fitted, tokens, place)
    except ValueError as error:
        raise UserError(error) from None
    with staged(Outputs(output), []) as folder:
        (folder / output.name).write_bytes(draw.png(image))
    yield str(output)


def _static_method(method: str, arguments: Sequence[str], grid: "TokenGrid") -> "StaticMaskMethod":
    from diffattn.methods import StaticMaskMethod

    made = make_method({"type": method} | read_arguments(arguments, "--arg", "--method"))
    fitted = made.for_model("", replace(grid, text_before=0, text_after=0))
    if not isinstance(fitted, StaticMaskMethod):
        raise UserError(
            f"{method} has no mask that the grid alone decides: its token pairs depend on what the "
            "tokens hold, and cannot be drawn"
        )
    return fitted


def _figures(method: "StaticMaskMethod", grid: "TokenGrid") -> Iterator[str]:
    import torch

    from diffattn.mask import allowed_pairs

    start = time.perf_counter()
    layout = method.layout(grid, torch.device("cpu"), method.order(grid))
    seconds = time.perf_counter() - start
    visited = layout.full_blocks + layout.partial_blocks
    yield f"{grid}: {grid.tokens} tokens"
    yield f"density: {allowed_pairs(layout) / grid.tokens**2:.4%} of the token pairs attend"
    extra = method.extra_keys(grid)
    if extra is None:
        yield "note: the method does more than attend under this mask"
    elif extra:
        share = grid.video_tokens * extra / grid.tokens**2
        yield (
            f"pooled keys: {extra} that every token of the video sees besides, not drawn; they add"
            f" {share:.4%} as many pairs"
        )
    yield (
        f"blocks: {visited} of {layout.rows * layout.columns} visited ({layout.density:.2%}), "
        f"{layout.full_blocks} full and {layout.partial_blocks} partial, of {layout.block_q} tokens"
    )
    yield f"built in {seconds:.2f} s, {layout.nbytes / 2**10:,.0f} KiB"


def _check_output(output: Path) -> None:
    if output.suffix.lower() != ".png":
        raise UserError(f"-o {output}: pictures of masks are PNG files; use a name that ends .png")
    if output.is_dir():
        raise UserError(f"cannot write {output}: it is a folder")
    check_writable(output.parent)
