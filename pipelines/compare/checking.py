"""Whether a clip of the bundled model shows what its prompt says."""

from __future__ import annotations

from dataclasses import dataclass

from .clip import Clip


@dataclass(frozen=True)
class Accuracy:
    """Reads a clip back by the checker of `samples.moving_shapes`.

    Attributes:
        whole: whether the clip counts only if shape, colour, direction and background are all
            right; else each counts a quarter.
    """

    whole: bool

    def value(self, dense: Clip, other: Clip) -> float:
        """The accuracy of a clip, 0 to 1."""
        from diffattn.samples.moving_shapes.captions import parse_caption
        from diffattn.samples.moving_shapes.checker import read_clip

        found = read_clip(other.frames).agreement(parse_caption(other.prompt))
        everything = found.pop("all")
        return float(everything) if self.whole else sum(found.values()) / len(found)

    def lacking(self, clip: Clip) -> str | None:
        """Why the checker cannot read a clip; None if it can."""
        from diffattn.samples.moving_shapes.captions import parse_caption

        if not clip.bundled:
            return "no checker for this model"
        try:
            parse_caption(clip.prompt)
        except ValueError:
            return "no checker for this prompt"
        return None


right_share = Accuracy(whole=False)
whole_right = Accuracy(whole=True)
