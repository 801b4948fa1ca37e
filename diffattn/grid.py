"""TokenGrid: how the tokens of a self-attention call are laid out in time and space."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Reference:
    """A rectangle of tokens beside the video: a picture or a video that the model looks at.

    Reference pictures of an editing model, key frames, condition frames, histories and reference
    videos are references. Their tokens are frame by frame and row by row, as those of the video.

    Attributes:
        start: position of the first token in the sequence.
        frames, height, width: tokens along each axis.
        aligned: whether a row and a column of the reference are the same place in the picture as
            the row and the column of the video, provided that both have equally many.
        times: the time of each frame, in latent frames of the video; empty for 0, 1, 2 and so on.

    Raises:
        ValueError: for an axis below 1, a negative start, or another number of times than frames.
    """

    start: int
    frames: int
    height: int
    width: int
    aligned: bool = field(default=True, kw_only=True)
    times: tuple[float, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or self.start < 0:
            raise ValueError(
                f"a reference of {self.frames}x{self.height}x{self.width} tokens from position"
                f" {self.start} needs at least 1 along each axis, and a position from 0"
            )
        if self.times and len(self.times) != self.frames:
            raise ValueError(f"a reference of {self.frames} frames has {len(self.times)} times")

    @property
    def tokens(self) -> int:
        """Tokens of all frames."""
        return self.frames * self.height * self.width

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + self.tokens


@dataclass(frozen=True)
class TokenGrid:
    """Latent frames x height x width of video tokens, with other tokens before or after them.

    Every model that diffattn supports orders its video tokens frame by frame, row by row (t, h, w).
    An image is a grid of one frame. The video tokens are the tokens that the model denoises. Other
    tokens of the same sequence are text, padding, audio, or references: further pictures and videos
    that the model looks at.

    Attributes:
        frames, height, width: video tokens along each axis, after the VAE and the patch embedding.
        text_before, text_after: other tokens that stand before or after the video tokens in the
            same sequence; 0 where text has its own cross-attention.
        references: the rectangles among the other tokens, by their positions. Other tokens outside
            of them have no place in a picture.
        causal_frames: latent frames of the blocks of which none sees a later one; 0 where all
            frames may see all.

    Raises:
        ValueError: for an axis below 1, a negative number of other tokens or frames, or references
            that overlap, are out of order, or are not among the other tokens.
        TypeError: for a number that is no integer.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0
    references: tuple[Reference, ...] = field(default=(), kw_only=True)
    causal_frames: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "text_before", "text_after", "causal_frames"):
            value = getattr(self, name)
            # Sizes of compiled code are integers of torch's own.
            if not isinstance(value, int) and not hasattr(value, "__index__"):
                raise TypeError(f"{name} is {value!r}, but must be an integer")
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a grid needs at least 1")
        for name in ("text_before", "text_after", "causal_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but cannot be negative")
        end = 0
        for reference in self.references:
            inside_video = reference.start < self.video.stop and reference.stop > self.video.start
            if reference.start < end or reference.stop > self.tokens or inside_video:
                raise ValueError(
                    f"a reference at tokens {reference.start} to {reference.stop - 1} is not"
                    f" among the other tokens of {self}, or not after the reference before"
                )
            end = reference.stop

    @property
    def alone(self) -> TokenGrid:
        """The video tokens without all others."""
        return TokenGrid(self.frames, self.height, self.width)

    def beside(self, before: int = 0, after: int = 0) -> TokenGrid:
        """This grid with further tokens at the start and at the end of the sequence."""
        return replace(
            self,
            text_before=self.text_before + before,
            text_after=self.text_after + after,
            references=tuple(replace(r, start=r.start + before) for r in self.references),
        )

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        """Tokens of all latent frames."""
        return self.frames * self.frame_tokens

    @property
    def tokens(self) -> int:
        """Length of the sequence: video tokens and others."""
        return self.text_before + self.video_tokens + self.text_after

    @property
    def video(self) -> slice:
        """The positions of the video tokens in the sequence."""
        return slice(self.text_before, self.text_before + self.video_tokens)

    @property
    def pictures(self) -> slice:
        """The positions from the first to the last token of the video and its references."""
        ends = [self.video, *(slice(r.start, r.stop) for r in self.references)]
        return slice(min(end.start for end in ends), max(end.stop for end in ends))

    def is_text(self, token: torch.Tensor) -> torch.Tensor:
        """Whether each sequence position holds no video token: bool, in the shape of `token`."""
        return (token < self.text_before) | (token >= self.text_before + self.video_tokens)

    def coordinates(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(frame, row, column) of sequence positions, each in the shape of `token`.

        They mean nothing where `is_text`.
        """
        position = token - self.text_before
        place = position % self.frame_tokens
        return position // self.frame_tokens, place // self.width, place % self.width

    def places(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`coordinates`, where a token that is no video token has the place of some video token."""
        return self.coordinates(token.clamp(self.video.start, self.video.stop - 1))

    def __str__(self) -> str:
        text = self.text_before + self.text_after - sum(r.tokens for r in self.references)
        parts = [f"{self.frames}x{self.height}x{self.width}"]
        if text > 0:
            parts.append(f"{text} text")
        parts += [f"reference {r.frames}x{r.height}x{r.width}" for r in self.references]
        return "+".join(parts)


@dataclass(frozen=True)
class RepeatedGrid(TokenGrid):
    """A grid whose video stands several times in the sequence, as the video and as references.

    The first copy is the `video`. All copies count for `is_text`, `coordinates` and `places`: a
    token has the same place in every copy.

    Attributes:
        starts: the position of the first token of each copy, ascending.
    """

    starts: tuple[int, ...] = field(default=(), kw_only=True)

    def is_text(self, token: torch.Tensor) -> torch.Tensor:
        out = torch.ones_like(token, dtype=torch.bool)
        for start in self.starts:
            out &= (token < start) | (token >= start + self.video_tokens)
        return out

    def coordinates(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().coordinates(self._in_first_copy(token))

    def places(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().places(self._in_first_copy(token))

    def _in_first_copy(self, token: torch.Tensor) -> torch.Tensor:
        shift = torch.zeros_like(token)
        for start in self.starts[1:]:
            shift = torch.where(token >= start, start - self.starts[0], shift)
        return token - shift
