"""Pictures of masks and schedules, for people: numpy images, and PNG files of them.

No picture looks at every pair of tokens: large masks are sampled query by query.
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from diffattn.blocks import EMPTY, FULL, PARTIAL, BlockLayout
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask, allowed_pairs
from diffattn.methods.base import Method, StaticMaskMethod
from diffattn.methods.words import method_words, reference_words
from diffattn.schedule import Moment, is_dense_at

if TYPE_CHECKING:
    from diffattn.methods.call_selection import AttentionCall, CallSelection
    from diffattn.planning.by_steps import PlanBySteps
    from diffattn.planning.plans import Plan

Image: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]  # (height, width, 3), red, green, blue
Color: TypeAlias = tuple[int, int, int]
Place: TypeAlias = tuple[int, int, int]

# Colours: no pair attends; all pairs attend; a block that needs a mask; the query; keys that are
# seen only together with their block.
NONE, ALL, SOME, QUERY = (232, 236, 241), (23, 64, 140), (242, 150, 40), (214, 30, 40)
REST = (250, 224, 158)
FRAME_LINE, TEXT_LINE, REFERENCE_LINE = (120, 132, 150), (20, 140, 90), (150, 60, 170)
_PAPER, _INK, _FAINT = (255, 255, 255), (28, 32, 40), (96, 104, 118)

_PANEL = 600  # pixels of the square pictures
_GAP = 28
_LINE = 22  # pixels of a line of text
_SHEET = 640  # pixels that the frames of a neighbourhood may take in height
_MOST_REFERENCES = 4  # whose frames are drawn, too
_FRAME_GAP = 10
_FRAME_LABEL = 70  # pixels that `frame 99` takes in width
_LARGEST_TOKEN = 24  # pixels
_RAMP = np.linspace(0, 1, 140)[None].repeat(12, 0)  # of a legend
_PAIRS = 1 << 25  # token pairs looked at for one picture, unless one query per pixel needs more
_PAIRS_AT_ONCE = 1 << 22


def picture(method: StaticMaskMethod, grid: TokenGrid, query: Place | None = None) -> Image:
    """A picture of a method on a grid: mask, blocks, and the neighbourhood of one token.

    Args:
        method: parameters left at None take the values for models without a recommendation. A
            method that differs from step to step is drawn as in its last step; give
            `method.at_step(step, steps)` for another.
        grid: the tokens, text included.
        query: frame, row and column of the token whose neighbourhood is shown; the grid's middle
            when None.

    Raises:
        ValueError: if `query` is outside of the grid, or the method does not fit the grid.
    """
    query = middle(grid) if query is None else query
    check_query(grid, query)
    fitted = method.at_step(0, 0).for_model("", grid.alone)
    if not isinstance(fitted, StaticMaskMethod):
        raise ValueError(f"{fitted.type} has no mask that the grid alone decides")
    mask, order = fitted.mask(grid), fitted.order(grid)
    layout = fitted.layout(grid, torch.device("cpu"), order)
    tiles = "" if order is None else f" ({_by(order.tile)} tiles)"
    visited = layout.full_blocks + layout.partial_blocks
    density = allowed_pairs(layout) / grid.tokens**2
    beside = _extra_words(fitted, grid)
    if grid.references:
        beside += f" References: {reference_words(fitted, grid)}."
    width = 2 * _PANEL + _GAP
    title = _stacked(
        [
            _text(method_words(fitted), width, scale=0.7),
            _text(
                f"grid {_ascii(grid)}: {grid.tokens:,} tokens. {density:.2%} of the token pairs"
                f" attend.{beside}",
                width,
            ),
            _text(
                f"Blocks of {layout.block_q} tokens{tiles}: {visited:,} of"
                f" {layout.rows * layout.columns:,} are visited ({layout.density:.2%}):"
                f" {layout.full_blocks:,} full, {layout.partial_blocks:,} partial.",
                width,
            ),
        ],
        gap=4,
    )
    left = _stacked(
        [
            _text("All tokens: rows are queries, columns are keys", _PANEL, color=_INK),
            mask_image(mask, _PANEL),
            _ramp_legend(_PANEL, grid),
        ]
    )
    right = _stacked(
        [
            _text("Blocks, in the order that they are computed in", _PANEL, color=_INK),
            block_image(layout, _PANEL),
            _legend([(NONE, "empty"), (SOME, "partial"), (ALL, "full")], _PANEL),
        ]
    )
    return _framed(
        _stacked(
            [title, _beside(left, right), _neighbourhood(mask, query, width)],
            gap=_GAP,
        )
    )


def call_picture(
    method: Method, call: AttentionCall, *, head: int = 0, query: Place | None = None
) -> Image:
    """A picture of what a head selects in a call with real queries and keys.

    Args:
        method: the method, as `for_model` gives it; it selects by content.
        call: the arguments of `method.attend`. The last sample of the batch is drawn.
        head: the head, from 0.
        query: frame, row and column of the token whose neighbourhood is shown; the grid's middle
            when None.

    Raises:
        ValueError: if `query` is outside of the grid, or the method does not select by content.
    """
    from diffattn.methods.call_selection import selection_of_call

    check_query(call.site.grid, query or middle(call.site.grid))
    selection = selection_of_call(method, call, head=head)
    if selection is None:
        raise ValueError(
            f"{method.type} does not select token pairs by content; picture() draws methods whose"
            f" mask follows from the grid"
        )
    words = [method_words(method), f"Layer {call.site.layer} ({selection.blocks}), head {head}."]
    return selection_picture(selection, words, query)


def selection_picture(
    selection: CallSelection, words: list[str], query: Place | None = None
) -> Image:
    """A picture of a head's selection in one call: token pairs, blocks, one neighbourhood.

    Args:
        selection: the selection.
        words: lines of the title; the first line is larger.
        query: frame, row and column of the token whose neighbourhood is shown; the grid's middle
            when None.

    Raises:
        ValueError: if `query` is outside of the grid.
    """
    mask = selection.pairs
    grid = mask.grid
    query = middle(grid) if query is None else query
    check_query(grid, query)
    counts = mask.chosen[grid.video].sum(1)
    width = 2 * _PANEL + _GAP
    density = float(selection.key_counts().mean()) / grid.tokens
    title = [_text(line, width, scale=0.5 if n else 0.7) for n, line in enumerate(words)]
    rest = f" Every other key is seen {selection.rest_words}." if selection.rest else ""
    title.append(
        _text(
            f"grid {_ascii(grid)}: {grid.tokens:,} tokens. {density:.2%} of the token pairs attend."
            f" A query of the video attends to {int(counts.min())} to"
            f" {int(counts.max())} of {mask.chosen.shape[1]} blocks,"
            f" {float(counts.float().mean()):.1f} on average.{rest}",
            width,
        )
    )
    shares = selection.block_shares().numpy()
    empty = None if selection.rest is None else _tinted(np.ones_like(shares))
    left = _stacked(
        [
            _text("All tokens, in the model's order: rows are queries, columns keys", _PANEL),
            mask_image(mask, _PANEL, selection.rest),
            _ramp_legend(_PANEL, grid),
            *([] if selection.rest is None else [_rest_legend(selection, _PANEL)]),
        ]
    )
    right = _stacked(
        [
            _text("Blocks: share of a row's queries that select the column", _PANEL),
            _fitted(_shaded(shares, empty), _PANEL),
            _row([_label("none"), _shaded(_RAMP), _label("all of them")], _PANEL),
        ]
    )
    neighbourhood = _neighbourhood(mask, query, width, selection)
    return _framed(
        _stacked([_stacked(title, gap=4), _beside(left, right), neighbourhood], gap=_GAP)
    )


def schedule_picture(plan: Plan | PlanBySteps) -> Image:
    """A picture of the layers and steps of a run that stay dense.

    Raises:
        ValueError: for a plan without a number of steps.
    """
    if plan.steps is None:
        raise ValueError("a plan without a number of steps has no schedule: give plan() steps=")
    width = 2 * _PANEL + _GAP
    image = schedule_image(plan.method, plan.layers, plan.dense_layers, plan.steps)
    scale = max(1, min(width // image.shape[1], _PANEL // image.shape[0]))
    share = f"{plan.run_density:.1%}"
    return _framed(
        _stacked(
            [
                _text(method_words(plan.method), width, scale=0.7),
                _text(
                    f"{plan.steps} steps (across) of {plan.layers} attention layers (down):"
                    f" {share} of a dense run's attention is computed.",
                    width,
                ),
                _enlarged(image, scale),
                _legend([(ALL, "dense"), (SOME, "sparse")], width),
            ]
        )
    )


def schedule_image(method: Method, layers: int, dense_layers: int, steps: int) -> Image:
    """One pixel for each attention layer (down) and step (across): `ALL` if dense, else `SOME`."""
    image = np.empty((layers, steps, 3), np.uint8)
    image[:] = SOME
    image[:dense_layers] = ALL
    ends = method.dense_steps or 0, method.last_dense_steps
    for step in range(steps):
        by_value = method.differs_by_step and method.at_step(step, steps).is_dense
        if by_value or is_dense_at(Moment(step, steps), *ends):
            image[:, step] = ALL
    return image


def mask_image(mask: AttentionMask, size: int = _PANEL, rest: AttentionMask | None = None) -> Image:
    """The whole mask in at most `size` pixels a side, darker where more of the pairs attend.

    Pairs of `rest`, whose key is seen only together with its block, are tinted in `REST`. Masks of
    more tokens than pixels are sampled: all keys, and some queries of each row of pixels. Lines
    show where latent frames begin, in `TEXT_LINE` where text and video meet, and in
    `REFERENCE_LINE` where references begin and end.
    """
    grid = mask.grid
    per_pixel = -(-grid.tokens // size)
    empty = None if rest is None else _tinted(_sampled(rest, per_pixel))
    image = _shaded(_sampled(mask, per_pixel), empty)
    scale = max(1, size // len(image))
    image = _enlarged(image, scale)
    frame_pixels = grid.frame_tokens / per_pixel * scale
    lines = {}
    if frame_pixels >= 6:
        starts = range(grid.video.start + grid.frame_tokens, grid.video.stop, grid.frame_tokens)
        lines = dict.fromkeys(starts, (FRAME_LINE, 0.45))
    ends = (end for r in grid.references for end in (r.start, r.stop))
    lines |= dict.fromkeys(ends, (REFERENCE_LINE, 1.0))
    lines |= dict.fromkeys((grid.video.start, grid.video.stop), (TEXT_LINE, 1.0))
    for token, (color, strength) in lines.items():
        if 0 < token < grid.tokens:
            _blend_cross(image, int(token / per_pixel * scale), color, strength)
    return image


def block_image(layout: BlockLayout, size: int = _PANEL) -> Image:
    """The blocks of a layout in at most `size` pixels a side: `NONE`, `SOME` or `ALL`.

    Where blocks are smaller than a pixel their colours are mixed.
    """
    colors = np.array([NONE, SOME, ALL], np.uint8)
    return _fitted(colors[_states(layout)], size)


def frame_images(
    mask: AttentionMask, query: Place, scale: float = 1, rest: AttentionMask | None = None
) -> list[Image]:
    """An image of each latent frame: `ALL` where one token attends, `NONE` elsewhere.

    Where the token attends in `rest`, the frames are in `REST`.

    The token itself is marked in `QUERY`, with a ring around it where it is small.

    Args:
        query: frame, row and column of the token.
        scale: pixels along each side of a token; below 1, colours of neighbours are mixed.

    Raises:
        ValueError: if `query` is outside of the grid.
    """
    import cv2

    grid = mask.grid
    check_query(grid, query)
    seen = _levels(mask, query, rest)[grid.video].view(grid.frames, grid.height, grid.width)
    images = _images_of(seen, scale)
    image = images[query[0]]
    top, left = (int(place * scale) for place in query[1:])
    side = max(3, int(scale))
    image[top : top + side, left : left + side] = QUERY
    if side < 8:
        center = (left + side // 2, top + side // 2)
        cv2.circle(image, center, side + 5, QUERY, 2, cv2.LINE_AA)
    return images


def _images_of(seen: torch.Tensor, scale: float) -> list[Image]:
    """An image of each frame of the levels `(frames, rows, columns)`: see `_levels`."""
    import cv2

    colors = np.array([NONE, REST, ALL], np.uint8)
    images: list[Image] = []
    for frame in seen:
        image: Image = colors[frame.long().numpy()]
        if scale >= 1:
            image = _enlarged(image, int(scale))
        else:
            shape = [max(1, round(n * scale)) for n in reversed(frame.shape)]
            image = np.asarray(cv2.resize(image, shape, interpolation=cv2.INTER_AREA), np.uint8)
        images.append(image)
    return images


def png(image: Image) -> bytes:
    """The image as a PNG file."""
    import cv2

    return bytes(cv2.imencode(".png", image[..., ::-1])[1])


def middle(grid: TokenGrid) -> Place:
    """Frame, row and column of the token in the middle of a grid."""
    return grid.frames // 2, grid.height // 2, grid.width // 2


def check_query(grid: TokenGrid, query: Place) -> None:
    """Raise ValueError unless `query` is the frame, row and column of a token of `grid`."""
    names = ("frame", "row", "column")
    sizes = (grid.frames, grid.height, grid.width)
    for name, place, size in zip(names, query, sizes, strict=True):
        if not 0 <= place < size:
            raise ValueError(
                f"the query's {name} is {place}, but the grid {grid} has {name}s 0 to {size - 1}"
            )


def _extra_words(method: StaticMaskMethod, grid: TokenGrid) -> str:
    """A sentence about attention of a method that no picture shows; may be empty."""
    extra = method.extra_keys(grid)
    if extra is None:
        return " The method does more than attend under this mask."
    if not extra:
        return ""
    who = "Every token of the video" if grid.references else "Every token but those of text"
    return f" {who} also sees {extra:,} pooled keys, not drawn."


def _by(sides: Place) -> str:
    return "x".join(map(str, sides))


def _ascii(grid: TokenGrid) -> str:
    """The parts of the sequence in their order."""
    video = grid.video.start, grid.video.stop, _by((grid.frames, grid.height, grid.width))
    parts = [(r.start, r.stop, f"reference {_by((r.frames, r.height, r.width))}")
             for r in grid.references]  # fmt: skip
    words, at = [], 0
    for start, stop, name in (*sorted([*parts, video]), (grid.tokens, grid.tokens, "")):
        words += [f"{start - at} text"] * (start > at) + [name] * bool(name)
        at = stop
    return " + ".join(words)


def _seen_by(mask: AttentionMask, query: Place) -> torch.Tensor:
    """The keys that a video token sees, bool `(tokens,)`."""
    grid = mask.grid
    frame, row, column = query
    position = grid.video.start + (frame * grid.height + row) * grid.width + column
    return mask.allowed(torch.tensor([position]), torch.arange(grid.tokens)).expand(grid.tokens)


def _levels(mask: AttentionMask, query: Place, rest: AttentionMask | None) -> torch.Tensor:
    """How a video token sees the keys, int64 `(tokens,)`: 0 not, 1 by `rest`, 2 by `mask`."""
    seen = 2 * _seen_by(mask, query).long()
    return seen if rest is None else torch.maximum(seen, _seen_by(rest, query).long())


def _sampled(mask: AttentionMask, per_pixel: int) -> np.ndarray[Any, Any]:
    """Share of the pairs that attend in each square of `per_pixel` tokens a side, 0 to 1.

    All keys are looked at, and some queries of each square, evenly spread; see `_PAIRS`.
    """
    tokens = mask.grid.tokens
    pixels = -(-tokens // per_pixel)
    samples = max(1, min(per_pixel, _PAIRS // (pixels * tokens)))
    start = torch.arange(0, tokens, per_pixel)
    length = (tokens - start).clamp(max=per_pixel)
    sample = 2 * torch.arange(samples) + 1
    query = (start[:, None] + length[:, None] * sample // (2 * samples)).flatten()
    key = torch.arange(tokens)
    counts = []
    for part in query.split(max(1, _PAIRS_AT_ONCE // tokens)):
        seen = mask.allowed(part[:, None], key).expand(len(part), tokens)
        seen = torch.nn.functional.pad(seen, (0, -tokens % per_pixel))
        counts.append(seen.view(len(part), pixels, per_pixel).sum(2))
    return (torch.cat(counts).view(pixels, samples, pixels).sum(1) / (samples * length)).numpy()


def _shaded(density: np.ndarray[Any, Any], empty: np.ndarray[Any, Any] | None = None) -> Image:
    """Colours from `NONE` to `ALL`, by the root of the density, so that thin bands are visible.

    Args:
        density: share of the pairs that attend.
        empty: the colours of no pairs, (rows, columns, 3), in the place of `NONE`.
    """
    depth = np.sqrt(density)[..., None]
    light = np.array(NONE) if empty is None else empty
    return np.asarray(np.rint(light * (1 - depth) + np.array(ALL) * depth), np.uint8)


def _tinted(share: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Colours from `NONE` to `REST`, by the root of the share."""
    depth = np.sqrt(share)[..., None]
    return np.array(NONE) * (1 - depth) + np.array(REST) * depth


def _states(layout: BlockLayout) -> np.ndarray[Any, Any]:
    """(rows, columns): `EMPTY`, `PARTIAL` or `FULL`, of the first sample and head."""
    # An extra column takes the entries of the lists that mean nothing.
    states = torch.full((layout.rows, layout.columns + 1), EMPTY, dtype=torch.uint8)
    for name, state in (("full", FULL), ("partial", PARTIAL)):
        count = getattr(layout, f"{name}_count")[0, 0].cpu()
        index = getattr(layout, f"{name}_index")[0, 0].long().cpu()
        meant = torch.arange(index.shape[1]) < count[:, None]
        states.scatter_(1, index.where(meant, layout.columns), state)
        states[:, layout.columns] = EMPTY
    return states[:, : layout.columns].numpy()


def _neighbourhood(
    mask: AttentionMask, query: Place, width: int, selection: CallSelection | None = None
) -> Image:
    """The frames of a neighbourhood side by side, with a caption and a legend."""
    grid = mask.grid
    rest = None if selection is None else selection.rest
    seen, levels = _seen_by(mask, query), _levels(mask, query, rest)
    scale, columns = _sheet((grid.frames, grid.height, grid.width), width)
    rows = _rows_of_frames(frame_images(mask, query, scale, rest), columns)
    whole, place = "picture", f"row {query[1]}, column {query[2]}"
    if grid.frames > 1:
        whole, place = "video", f"frame {query[0]}, {place}"
    caption = (
        f"What the token at {place} sees: {int(seen[grid.video].sum()):,} of"
        f" {grid.video_tokens:,} tokens of the {whole}"
    )
    others = seen.clone()
    others[grid.video] = False
    text = grid.tokens - grid.video_tokens
    for number, reference in enumerate(grid.references, 1):
        own = slice(reference.start, reference.stop)
        caption += f", {int(seen[own].sum()):,} of {reference.tokens:,} of reference {number}"
        others[own] = False
        text -= reference.tokens
        if number <= _MOST_REFERENCES:
            sizes = reference.frames, reference.height, reference.width
            scale, columns = _sheet(sizes, width)
            images = _images_of(levels[own].view(sizes), scale)
            rows += [_text(f"Reference {number}", width), *_rows_of_frames(images, columns)]
    if text:
        caption += f", {int(others.sum()):,} of {text:,} of the text"
    entries = [(QUERY, "the token"), (ALL, "seen"), (NONE, "not seen")]
    if selection is not None and selection.rest is not None:
        entries[2:] = [(REST, f"seen {selection.rest_words}")]
    return _stacked([_text(caption, width), *rows, _legend(entries, width)])


def _rows_of_frames(images: list[Image], columns: int) -> list[Image]:
    """Images of the frames of a video, with their numbers, so many in a row."""
    if len(images) > 1:
        labels = [_label(f"frame {number}", _FAINT, 0.4) for number in range(len(images))]
        images = [_stacked([*pair], gap=0) for pair in zip(labels, images, strict=True)]
    starts = range(0, len(images), columns)
    return [_beside(*images[start : start + columns], gap=_FRAME_GAP) for start in starts]


def _sheet(sizes: tuple[int, int, int], width: int) -> tuple[float, int]:
    """Pixels per token, and frames in a row, at which all frames of a video fit."""
    frames, height, columns_of_tokens = sizes
    sides = [*range(_LARGEST_TOKEN, 0, -1), *(1 / n for n in range(2, 65))]
    for scale in sides:
        frame_width = max(columns_of_tokens * scale, _FRAME_LABEL) + _FRAME_GAP
        columns = int((width + _FRAME_GAP) // frame_width)
        if columns:
            rows = -(-frames // columns)
            if rows * (height * scale + _LINE + _FRAME_GAP) <= _SHEET:
                return scale, min(columns, frames)
    return scale, max(1, columns)


def _fitted(image: Image, size: int) -> Image:
    """The image in at most `size` pixels a side; where it is larger its colours are mixed."""
    import cv2

    scale = size // max(image.shape[:2])
    if scale:
        return _enlarged(image, scale)
    height, width = (max(1, n * size // max(image.shape[:2])) for n in image.shape[:2])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _enlarged(image: Image, scale: int) -> Image:
    return image.repeat(scale, 0).repeat(scale, 1)


def _blend_cross(image: Image, at: int, color: Color, strength: float) -> None:
    """Draw a row and a column of pixels over an image."""
    for line in (image[at], image[:, at]):
        line[:] = np.rint(line * (1 - strength) + np.array(color) * strength)


def _ramp_legend(width: int, grid: TokenGrid) -> Image:
    """A legend of the shades and the lines of `mask_image`."""
    entries = [_label("pairs that attend: none"), _shaded(_RAMP), _label("all")]
    if grid.frames > 1:
        entries += [_swatch(FRAME_LINE), _label("latent frames")]
    if grid.tokens > grid.video_tokens:
        name = "ends of the video" if grid.references else "text"
        entries += [_swatch(TEXT_LINE), _label(name)]
    if grid.references:
        entries += [_swatch(REFERENCE_LINE), _label("of references")]
    return _row(entries, width)


def _rest_legend(selection: CallSelection, width: int) -> Image:
    """A legend of the tint of keys that are seen only together with their block."""
    return _legend([(REST, f"key seen {selection.rest_words}")], width)


def _legend(entries: list[tuple[Color, str]], width: int) -> Image:
    parts = [part for color, name in entries for part in (_swatch(color), _label(name))]
    return _row(parts, width)


def _swatch(color: Color) -> Image:
    swatch = np.empty((12, 18, 3), np.uint8)
    swatch[:] = color
    return swatch


def _row(parts: list[Image], width: int) -> Image:
    """Parts side by side, centred in height."""
    row = _blank(_LINE, width)
    left = 0
    for part in parts:
        top = (_LINE - part.shape[0]) // 2
        end = min(left + part.shape[1], width)
        row[top : top + part.shape[0], left:end] = part[:, : end - left]
        left = end + 8
    return row


def _label(words: str, color: Color = _INK, scale: float = 0.45) -> Image:
    """An image of one line of text, as wide as the text."""
    import cv2

    font = cv2.FONT_HERSHEY_SIMPLEX
    label = _blank(_LINE, cv2.getTextSize(words, font, scale, 1)[0][0])
    cv2.putText(label, words, (0, int(_LINE * 0.7)), font, scale, color, 1, cv2.LINE_AA)
    return label


def _text(words: str, width: int, color: Color = _INK, scale: float = 0.5) -> Image:
    """An image of lines of text, broken to fit a width."""
    import cv2

    font = cv2.FONT_HERSHEY_SIMPLEX
    letter = cv2.getTextSize("n" * 50, font, scale, 1)[0][0] / 50
    lines = textwrap.wrap(words, max(8, int(width / letter)))
    height = math.ceil(_LINE * max(1.0, scale / 0.5))
    image = _blank(height * len(lines), width)
    for number, line in enumerate(lines):
        base = (0, number * height + int(height * 0.7))
        cv2.putText(image, line, base, font, scale, color, 1, cv2.LINE_AA)
    return image


def _blank(height: int, width: int) -> Image:
    image = np.empty((height, width, 3), np.uint8)
    image[:] = _PAPER
    return image


def _stacked(parts: list[Image], gap: int = 6) -> Image:
    width = max(part.shape[1] for part in parts)
    image = _blank(sum(part.shape[0] + gap for part in parts) - gap, width)
    top = 0
    for part in parts:
        image[top : top + part.shape[0], : part.shape[1]] = part
        top += part.shape[0] + gap
    return image


def _beside(*parts: Image, gap: int = _GAP) -> Image:
    """Parts side by side, aligned at the top."""
    return _stacked([part.swapaxes(0, 1) for part in parts], gap).swapaxes(0, 1)


def _framed(image: Image) -> Image:
    framed = _blank(image.shape[0] + 2 * _GAP, image.shape[1] + 2 * _GAP)
    framed[_GAP:-_GAP, _GAP:-_GAP] = image
    return framed
