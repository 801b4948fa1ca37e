"""`diffattn mask`: the density of a mask, its blocks, and a picture of both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffattn._checks import whole

from ..errors import UserError
from ..run.method_settings import MethodOptions, attention_settings, make_method
from ..run.model_shape import shape_of
from ..run.outputs import Outputs, check_writable, staged
from ..run.request import Request, check_option, option
from ..run.video import check_picture
from .grid_text import read_grid, read_place, with_references

if TYPE_CHECKING:
    from diffattn import TokenGrid
    from diffattn.draw import Image
    from diffattn.methods import Method, StaticMaskMethod

_SIZES = ("height", "width", "num_frames")
# What a grid without a model still has, for a method that selects by content.
_OF_A_GRID = ("layer", "seed")


@dataclass(frozen=True)
class RunOptions:
    """A model and its size; for a method that selects by content, a run and a call in the run.

    Attributes:
        prompt: of the run.
        settings: the model, and further settings of the run that the user gave, by the names of
            `Request`.
        call: those of `step`, `layer` and `head` that the user gave.
    """

    prompt: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, int] = field(default_factory=dict)


def draw_mask(
    options: MethodOptions,
    grid: str | None,
    references: tuple[str, ...],
    query: str | None,
    output: Path,
    run: RunOptions,
) -> Iterator[str]:
    """Write the picture of a mask, and yield lines about the mask.

    Args:
        options: the attention method.
        grid, references, query: as the user wrote them; without a query the middle of the grid is
            shown.
        output: the PNG file.
        run: the model whose mask is drawn, in place of the grid or beside the grid. For a method
            that selects by content, a prompt makes it the run to draw; without a prompt queries
            and keys are random.

    Raises:
        UserError: if the method, the grid, the model, the query, the run or the output is refused.
    """
    from diffattn import draw
    from diffattn.methods.call_selection import selects_by_content
    from diffattn.planning.plans import check_tokens

    made = make_method(attention_settings(options, None))
    output = output.expanduser()
    by_content = selects_by_content(made)
    if by_content and run.prompt is not None:
        if references:
            raise UserError(
                f"--reference: with a prompt, what {made.type} attends to is drawn in a run; a run"
                f" has the references that its pipeline is given"
            )
        yield from _draw_run(made, grid, query, output, run)
        return
    made, run = _at_step(made, run)
    variant, tokens = _place_of(made, grid, run, by_content)
    tokens = with_references(tokens, references)
    place = draw.middle(tokens) if query is None else read_place(query)
    _check_output(output)
    try:
        check_tokens(tokens)
        draw.check_query(tokens, place)
        if by_content:
            from .selection_picture import draw_random

            fitting = made.for_model(variant, tokens.alone)
            layer, seed = run.call.get("layer", 0), run.settings.get("seed", 0)
            write = partial(_write, output=output)
            yield from draw_random(fitting, tokens, place, layer, seed, write)
            return
        fitted = _static_method(made, variant, tokens)
        yield from _figures(fitted, tokens)
        image = draw.picture(fitted, tokens, place)
    except ValueError as error:
        raise UserError(error) from None
    yield str(_write(image, output))


def _at_step(made: Method, run: RunOptions) -> tuple[Method, RunOptions]:
    """The method of the step to draw, and the options without those that say the step."""
    if not made.differs_by_step:
        return made, run
    call, settings = dict(run.call), dict(run.settings)
    step, steps = call.pop("step", None), settings.pop("steps", None)
    if (step is None) != (steps is None):
        raise UserError(
            f"give --step and --steps: {made.type} differs from step to step, and the step to draw"
            f" is one of a run; without both the last step is drawn"
        )
    if step is not None and steps is not None:
        check_option("steps", steps, whole(1))
        check_option("step", step, whole(1, steps))
    try:
        at = made.at_step(0, 0) if step is None or steps is None else made.at_step(step - 1, steps)
    except ValueError as error:
        raise UserError(error) from None
    return at, replace(run, call=call, settings=settings)


def _place_of(
    method: Method, grid: str | None, run: RunOptions, by_content: bool
) -> tuple[str, TokenGrid]:
    """The model's name in tables of recommended settings, "" without a model, and the tokens."""
    model = run.settings.get("model")
    sizes = {name: run.settings[name] for name in _SIZES if name in run.settings}
    of_a_run = [
        *([] if run.prompt is None else ["prompt"]),
        *(name for name in run.settings if name != "model" and name not in sizes),
        *run.call,
    ]
    if by_content:
        of_a_run = [name for name in of_a_run if name not in _OF_A_GRID]
        if of_a_run:
            raise UserError(
                f"{option(of_a_run[0])} is of a run: give --prompt for a run to look into; without"
                f" a run {method.type} is drawn with random queries and keys of one head"
            )
    if of_a_run:
        raise UserError(
            f"{option(of_a_run[0])} is for methods that select by content, such as vmoba;"
            f" {method.type} is drawn on a --grid or for a --model"
        )
    if sizes and (model is None or grid is not None):
        raise UserError(
            f"{option(next(iter(sizes)))} is a size of a --model; a --grid says its own"
        )
    if model is None:
        if grid is None and by_content:
            raise UserError(
                f"{method.type} selects by what the tokens hold: give --prompt for a run to look"
                f" into, or --grid for a picture with random queries and keys"
            )
        if grid is None:
            raise UserError(f"give --grid, the tokens that {method.type} is drawn on, or --model")
        return "", read_grid(grid)
    shape = shape_of(model)
    for name, value in sizes.items():
        check_option(name, value, whole(1))
    try:
        method.check_family(shape.family)
        if grid is not None:
            return shape.variant, read_grid(grid)
        given = {"height": None, "width": None, "num_frames": None, **sizes}
        return shape.variant, shape.grid(**given, text=None)
    except ValueError as error:
        raise UserError(error) from None


def _draw_run(
    method: Method, grid: str | None, query: str | None, output: Path, run: RunOptions
) -> Iterator[str]:
    from .selection_picture import Call, draw_selection

    if grid is not None:
        raise UserError(
            f"--grid: a run has its own grid; leave out --prompt to draw {method.type} on a grid"
            " with random queries and keys, or --grid to look into a run"
        )
    place = None if query is None else read_place(query)
    _check_output(output)
    assert run.prompt is not None
    request = Request(run.prompt, **run.settings)
    write = partial(_write, output=output)
    yield from draw_selection(method, request, Call(**run.call), place, write)


def _write(image: Image, output: Path) -> Path:
    from diffattn import draw

    with staged(Outputs(output), []) as folder:
        file = folder / output.name
        file.write_bytes(draw.png(image))
        check_picture(file, (image.shape[1], image.shape[0]))
    return output


def _static_method(made: Method, variant: str, grid: TokenGrid) -> StaticMaskMethod:
    from diffattn.methods import StaticMaskMethod

    fitted = made.for_model(variant, grid.alone)
    if not isinstance(fitted, StaticMaskMethod):
        raise UserError(
            f"{made.type} has no mask that the grid alone decides, and cannot be drawn; a method "
            "that has one is gna"
        )
    return fitted


def _figures(method: StaticMaskMethod, grid: TokenGrid) -> Iterator[str]:
    import torch

    from diffattn.masks.base import allowed_pairs
    from diffattn.methods.words import reference_words

    start = time.perf_counter()
    layout = method.layout(grid, torch.device("cpu"), method.order(grid))
    seconds = time.perf_counter() - start
    visited = layout.full_blocks + layout.partial_blocks
    yield f"{grid}: {grid.tokens} tokens"
    if grid.references:
        yield f"references: {reference_words(method, grid)}"
    yield f"density: {allowed_pairs(layout) / grid.tokens**2:.4%} of the token pairs attend"
    extra = method.extra_keys(grid)
    if extra is None:
        yield "note: the method does more than attend under this mask"
    elif extra:
        share = grid.video_tokens * extra / grid.tokens**2
        who = "every token of the video" if grid.references else "every token but those of text"
        yield f"pooled keys: {extra} more for {who}, {share:.4%} as many pairs; not drawn"
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
