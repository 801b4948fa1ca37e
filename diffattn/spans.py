"""Spans: the rectangles of a sequence that a method is sparse in, the video and its references.

A reference is seen through a `TokenGrid` of its own: the grid of the same sequence with the tokens
of the reference in the place of the video. So each rule, order and cut that knows the video of a
grid knows the references, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffattn.grid import Reference, RepeatedGrid, TokenGrid

# How the tokens of references attend, see `Method.references`.
POLICIES = ("exact", "visible", "local")


@dataclass(frozen=True)
class Span:
    """A rectangle of a sequence.

    Attributes:
        grid: the tokens of the sequence, with those of this rectangle as the video tokens.
        times: the time of each frame, in latent frames of the video.
        aligned: whether rows and columns are those of the video, see `Reference.aligned`.
    """

    grid: TokenGrid
    times: tuple[float, ...]
    aligned: bool = True

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens along each axis."""
        return self.grid.frames, self.grid.height, self.grid.width

    def may_see(self, other: Span) -> bool:
        """Whether rows and columns of both spans are the same places in the picture."""
        return self.aligned and other.aligned and self.sizes[1:] == other.sizes[1:]

    def in_step_with(self, other: Span) -> bool:
        """Whether both spans have the same frames, at the same times."""
        return self.times == other.times

    def distances(self, other: Span) -> torch.Tensor:
        """int64 `(frames, frames)`: latent frames from own frames to those of `other`, rounded."""
        own, others = (torch.tensor(span.times, dtype=torch.float64) for span in (self, other))
        return (own[:, None] - others[None, :]).abs().round().long()


def spans_of(grid: TokenGrid, smallest: int) -> tuple[Span, ...]:
    """The video of a grid, and the references that are no smaller than blocks of attention.

    Other references are treated as text is: their tokens see all tokens and are seen by all.

    Args:
        grid: the tokens of the sequence.
        smallest: tokens of a reference that is large enough; a reference of one row never is.
    """
    video = Span(replace(grid, references=()), tuple(map(float, range(grid.frames))))
    large = [r for r in grid.references if r.tokens >= smallest and r.frames * r.height > 1]
    return (video, *(_span_of(grid, reference) for reference in large))


def _span_of(grid: TokenGrid, reference: Reference) -> Span:
    times = reference.times or tuple(map(float, range(reference.frames)))
    if grid.frames == 1 == reference.frames:
        # Two pictures have no distance in time: the time of a picture is only its number.
        times = (0.0,)
    seen = TokenGrid(
        reference.frames,
        reference.height,
        reference.width,
        reference.start,
        grid.tokens - reference.stop,
    )
    return Span(seen, times, reference.aligned)


def repeated(spans: Sequence[Span]) -> TokenGrid:
    """One grid for spans of equal sizes: that of a single span, or else a `RepeatedGrid`."""
    if len(spans) == 1:
        return spans[0].grid
    starts = sorted(span.grid.text_before for span in spans)
    sizes = spans[0].sizes
    rest = spans[0].grid.tokens - starts[0] - spans[0].grid.video_tokens
    return RepeatedGrid(*sizes, starts[0], rest, starts=tuple(starts))


@dataclass(frozen=True)
class Division:
    """A sequence, divided into the tokens of some of its rectangles and all others.

    Attributes:
        grid: the tokens of the sequence.
        spans: the rectangles, in the order of the sequence.
    """

    grid: TokenGrid
    spans: tuple[Span, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the rectangles."""
        return sum(span.grid.video_tokens for span in self.spans)

    @property
    def others(self) -> int:
        """Tokens outside of the rectangles."""
        return self.grid.tokens - self.tokens

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of the rectangles in a sequence `(batch, tokens, ...)`."""
        parts = [x[:, span.grid.video] for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def outside(self, x: torch.Tensor) -> torch.Tensor:
        """All other tokens of a sequence `(batch, tokens, ...)`."""
        return torch.cat([x[:, gap] for gap in self._gaps], 1)

    def joined(self, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        """The sequence again, from the results of `inside` and `outside`."""
        pieces = inside.split([span.grid.video_tokens for span in self.spans], 1)
        others = outside.split([gap.stop - gap.start for gap in self._gaps], 1)
        pairs = zip(others, pieces, strict=False)
        return torch.cat([*(part for pair in pairs for part in pair), others[-1]], 1)

    @property
    def _gaps(self) -> list[slice]:
        ends = [0, *(x for span in self.spans for x in _ends(span)), self.grid.tokens]
        return [slice(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=True)]


def _ends(span: Span) -> tuple[int, int]:
    return span.grid.video.start, span.grid.video.stop


def division_of(grid: TokenGrid, spans: Sequence[Span]) -> Division:
    """A sequence divided into the tokens of some spans and all others."""
    if len(spans) == 1:  # Dynamo does not trace the sorting of objects
        return Division(grid, tuple(spans))
    return Division(grid, tuple(sorted(spans, key=_ends)))
