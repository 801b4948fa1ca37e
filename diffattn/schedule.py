"""Settings of denoising steps: how many stay dense, as a count or a fraction of the run."""

from __future__ import annotations

from diffattn._checks import is_number


def resolve_steps(setting: int | float, num_steps: int) -> int:
    """A count of steps, or a fraction of the run (rounded down), as a count.

    Args:
        setting: an int counts steps; a float from 0 to 1 is a fraction of the run.
        num_steps: length of the run in denoising steps; the result is at most this.
    """
    count = setting if isinstance(setting, int) else int(setting * num_steps)
    return min(count, num_steps)


def check_steps(name: str, setting: int | float) -> None:
    """Raise ValueError unless `setting` is a count of steps or a fraction of the run."""
    if not is_number(setting):
        raise ValueError(f"{name} is {setting!r}, but must be a number of steps or a fraction")
    if isinstance(setting, int) and setting < 0:
        raise ValueError(f"{name} is {setting}, but a number of steps cannot be negative")
    if isinstance(setting, float) and not 0 <= setting <= 1:
        raise ValueError(
            f"{name} is {setting}, but a fraction of the run is between 0.0 and 1.0;"
            f" for a number of steps write an integer"
        )
