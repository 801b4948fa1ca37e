"""Guidance of attention along the path of motion, while training."""

import torch
from torch import Tensor

WIDTH = 0.8
"""Standard deviation of a path, in tokens."""

START = 5
"""Frames from which on a path is looked at: nearer by, all directions are within its width."""


class PathGuide:
    """Measures how much attention follows the path that the caption names.

    Rotary positions are relative and their logits a sum over the axes, so "one frame later, a step
    to the right" can only be learnt as two asymmetric profiles at once, one over time and one over
    space, each useless without the other: from a symmetric start the gradient of both is zero, and
    of 5750 steps none told left from right.  A penalty on attention off the path breaks the tie.
    Head 0 is to look ahead in time along the path, head 1 back.
    """

    def __init__(self) -> None:
        self.penalty: Tensor | None = None
        """Sum over the attentions since :meth:`follow`; None before the first."""
        self.motion: Tensor | None = None
        self.frames: Tensor | None = None
        self.side = 0

    def follow(self, frames: Tensor, motion: Tensor | None, side: int) -> None:
        """Set the paths of the next call.

        Args:
            frames: frame numbers (batch, frames).
            motion: (batch, 2), tokens per frame along x and y, zero where no caption tells; None
                to leave attention alone.
            side: tokens along the height and the width of a frame.
        """
        self.frames, self.motion, self.side, self.penalty = frames, motion, side, None

    def observe(self, weights: Tensor) -> None:
        """Add the penalty of attention weights (batch, heads, tokens, tokens).

        It is the mean of -log of the share of a token's attention that lies on its path.
        """
        assert self.frames is not None
        assert self.motion is not None
        motion = self.motion
        area = self.side**2
        place = torch.arange(area, device=weights.device).repeat(self.frames.shape[1])
        time = self.frames.repeat_interleave(area, dim=1).float()
        later = time[:, None, :] - time[:, :, None]
        off_x = (place % self.side)[None, :] - (place % self.side)[:, None]
        off_y = (place // self.side)[None, :] - (place // self.side)[:, None]
        off_x = off_x - later * motion[:, 0, None, None]
        off_y = off_y - later * motion[:, 1, None, None]
        near = torch.exp(-(off_x**2 + off_y**2) / (2 * WIDTH**2))
        told = motion.abs().amax(dim=1)[:, None] > 0
        penalty = weights.new_zeros((), dtype=torch.float32)
        sides = (later >= START, later <= -START)
        for found, side in zip(weights.unbind(1), sides, strict=False):
            path = near * side
            # A path that leaves the picture, or the clip, has no tokens to look at.
            exists = (path.sum(dim=-1) > 1) & told
            share = (found.float() * path).sum(dim=-1)
            misses = -torch.log(share + 1e-3) * exists
            penalty = penalty + misses.sum() / exists.sum().clamp(min=1)
        self.penalty = penalty if self.penalty is None else self.penalty + penalty
