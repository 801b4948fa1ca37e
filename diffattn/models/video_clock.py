"""Times of references in latent frames of the video, from times in any unit."""

from __future__ import annotations

from bisect import bisect_right


def frame_at(time: float, clock: tuple[float, ...]) -> float:
    """The latent frame, and fraction of one, at a time.

    Args:
        time: in the unit of `clock`.
        clock: the first moment of each latent frame of the video, growing.

    Returns:
        The last frame for all times after its first moment; negative numbers for times before the
        video. Numbers are rounded: clocks start anywhere, and equal layouts are to have equal
        grids.
    """
    last = len(clock) - 1
    frame = bisect_right(clock, time) - 1
    if frame == last:
        return float(last)
    if frame < 0:
        mean = (clock[last] - clock[0]) / last if last else 1.0
        return round((time - clock[0]) / mean, 3)
    return round(frame + (time - clock[frame]) / (clock[frame + 1] - clock[frame]), 3)
