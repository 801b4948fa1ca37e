"""Guidance of attention along the path of motion, while training."""

from __future__ import annotations

import torch
from torch import Tensor

# Standard deviation of a path, in tokens.
WIDTH = 0.8

# Least distance in frames to a token on a path. In nearer frames all directions are within WIDTH.
START = 5


class PathGuide:
    """Measures how much attention follows the path that the caption names.

    Rotary positions are relative, and their logits are a sum over the axes. So the model can learn
    "one frame later, a step to the right" only as two asymmetric profiles at once, over time and
    over space. Each profile is useless without the other: from a symmetric start the gradient of
    both is zero, and 5750 steps did not teach the model left from right. A penalty on attention off
    the path breaks the tie. Head 0 shall look ahead in time along the path, head 1 back.

    Attributes:
        penalty: sum over the attention calls since `follow`; None before the first call.
        motion: tokens per frame, (batch, 2), see `follow`.
        frames: frame numbers, (batch, frames).
        side: tokens along the height and the width of a frame.
    """

    def __init__(self) -> None:
        self.penalty: Tensor | None = None
        self.motion: Tensor | None = None
        self.frames: Tensor | None = None
        self.side = 0

    def follow(self, frames: Tensor, motion: Tensor | None, side: int) -> None:
        """Set the paths of the next call.

        Args:
            frames: frame numbers (batch, frames).
            motion: (batch, 2), tokens per frame along x and y, zero for an empty caption; None for
                no guidance.
            side: tokens along the height and the width of a frame.
        """
        self.frames, self.motion, self.side, self.penalty = frames, motion, side, None

    def observe(self, weights: Tensor) -> None:
        """Add the penalty of attention weights (batch, heads, tokens, tokens).

        The penalty is the mean of -log of the share of a token's attention on the token's path.
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
            # A path that leaves the picture or the clip has no tokens to attend to.
            exists = (path.sum(dim=-1) > 1) & told
            share = (found.float() * path).sum(dim=-1)
            misses = -torch.log(share + 1e-3) * exists
            penalty = penalty + misses.sum() / exists.sum().clamp(min=1)
        self.penalty = penalty if self.penalty is None else self.penalty + penalty
