"""TokenGrid: how the tokens of a self-attention call are laid out in time and space."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenGrid:
    """Latent frames x height x width of video tokens, with text tokens before or after them.

    Every model that diffattn supports orders its video tokens frame by frame, row by row (t, h, w).
    An image is a grid of one frame.

    Attributes:
        frames, height, width: video tokens along each axis, after the VAE and the patch embedding.
        text_before, text_after: text tokens that stand before or after the video tokens in the same
            sequence (joint attention); 0 where text has its own cross-attention.

    Raises:
        ValueError: for an axis below 1 or a negative number of text tokens.
        TypeError: for a number that is no integer.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "text_before", "text_after"):
            value = getattr(self, name)
            # Sizes of compiled code are integers of torch's own.
            if not isinstance(value, int) and not hasattr(value, "__index__"):
                raise TypeError(f"{name} is {value!r}, but must be an integer")
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a grid needs at least 1")
        for name in ("text_before", "text_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but cannot be negative")

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
        """Length of the sequence: video and text."""
        return self.text_before + self.video_tokens + self.text_after

    @property
    def video(self) -> slice:
        """The positions of the video tokens in the sequence."""
        return slice(self.text_before, self.text_before + self.video_tokens)

    def text_of(self, x: torch.Tensor) -> torch.Tensor:
        """The text tokens of a sequence `(batch, tokens, ...)`, before the video and after it."""
        return torch.cat([x[:, : self.video.start], x[:, self.video.stop :]], 1)

    def is_text(self, token: torch.Tensor) -> torch.Tensor:
        """Whether each sequence position holds text: bool, in the shape of `token`."""
        return (token < self.text_before) | (token >= self.text_before + self.video_tokens)

    def coordinates(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(frame, row, column) of sequence positions, each in the shape of `token`.

        They mean nothing where `is_text`.
        """
        position = token - self.text_before
        place = position % self.frame_tokens
        return position // self.frame_tokens, place // self.width, place % self.width

    def __str__(self) -> str:
        text = self.text_before + self.text_after
        return f"{self.frames}x{self.height}x{self.width}" + (f"+{text} text" if text else "")
