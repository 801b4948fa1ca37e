"""`diffattn mask`: the density of a mask, its blocks, and a picture of both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..run.method_settings import make_method, read_arguments
from ..run.outputs import Outputs, check_writable, staged
from ..run.request import Request, option
from .grid_text import read_grid, read_place

if TYPE_CHECKING:
    from diffattn import TokenGrid
    from diffattn.draw import Image
    from diffattn.methods import Method, StaticMaskMethod, VMoBAAttn


@dataclass(frozen=True)
class RunOptions:
    """The options for a method that selects by content: a run, and the attention call to draw.

    Attributes:
        prompt: of the run.
        settings: further settings of the run that the user gave, by the names of `Request`.
        call: those of `step`, `layer` and `head` that the user gave.
    """

    prompt: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, int] = field(default_factory=dict)


def draw_mask(
    method: str,
    arguments: Sequence[str],
    grid: str | None,
    query: str | None,
    output: Path,
    run: RunOptions,
) -> Iterator[str]:
    """Write the picture of a mask, and yield lines about the mask.

    Args:
        method: name of the method.
        arguments: parameters of the method, each as "name=value".
        grid, query: as the user wrote them; without a query the middle of the grid is shown.
        output: the PNG file.
        run: the run to draw for a method that selects by content, in place of the grid.

    Raises:
        UserError: if the method, the grid, the query, the run or the output is refused.
    """
    from diffattn import draw
    from diffattn.methods.vmoba.method import VMoBAAttn
    from diffattn.planning.plans import check_tokens

    made = make_method({"type": method} | read_arguments(arguments, "--arg", "--method"))
    output = output.expanduser()
    if isinstance(made, VMoBAAttn):
        yield from _draw_run(made, grid, query, output, run)
        return
    given = [*([] if run.prompt is None else ["prompt"]), *run.settings, *run.call]
    if given:
        raise UserError(
            f"{option(given[0])} is for methods that select by content, such as vmoba; {method} is "
            "drawn on a --grid"
        )
    if grid is None:
        raise UserError(f"Missing option '--grid': the tokens that {method} is drawn on")
    tokens = read_grid(grid)
    place = draw.middle(tokens) if query is None else read_place(query)
    _check_output(output)
    try:
        check_tokens(tokens)
        draw.check_query(tokens, place)
        fitted = _static_method(made, tokens)
        yield from _figures(fitted, tokens)
        image = draw.picture(fitted, tokens, place)
    except ValueError as error:
        raise UserError(error) from None
    yield str(_write(image, output))


def _draw_run(
    method: VMoBAAttn, grid: str | None, query: str | None, output: Path, run: RunOptions
) -> Iterator[str]:
    from .selection_picture import Call, draw_selection

    if grid is not None:
        raise UserError(
            f"--grid: what {method.type} attends to depends on the video; give --prompt, and "
            "--model for another model than the bundled one"
        )
    if run.prompt is None:
        raise UserError(
            f"{method.type} selects by what the tokens hold: give --prompt for a run to look into"
        )
    place = None if query is None else read_place(query)
    _check_output(output)
    request = Request(run.prompt, **run.settings)
    write = partial(_write, output=output)
    yield from draw_selection(method, request, Call(**run.call), place, write)


def _write(image: Image, output: Path) -> Path:
    from diffattn import draw

    with staged(Outputs(output), []) as folder:
        (folder / output.name).write_bytes(draw.png(image))
    return output


def _static_method(made: Method, grid: TokenGrid) -> StaticMaskMethod:
    from diffattn.methods import StaticMaskMethod

    fitted = made.for_model("", replace(grid, text_before=0, text_after=0))
    if not isinstance(fitted, StaticMaskMethod):
        raise UserError(
            f"{made.type} has no mask that the grid alone decides, and cannot be drawn; a method "
            "that has one is gna"
        )
    return fitted


def _figures(method: StaticMaskMethod, grid: TokenGrid) -> Iterator[str]:
    import torch

    from diffattn.masks.base import allowed_pairs

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
            f"pooled keys: {extra} more for every token but those of text, {share:.4%} as many"
            f" pairs; not drawn"
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
