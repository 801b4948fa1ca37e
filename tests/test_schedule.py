"""Counts and fractions of steps, and the clock of a run."""

import pytest

from diffattn.attach.run_clock import RunClock
from diffattn.schedule import check_steps, resolve_steps


class Scheduler:
    """Something that makes steps."""


@pytest.mark.parametrize(
    ("setting", "num_steps", "count"),
    [(0.25, 50, 12), (0.275, 40, 11), (0.25, 8, 2), (0.25, 4, 1), (3, 50, 3), (9, 4, 4), (0, 5, 0),
     (1.0, 7, 7), (1, 7, 1)],
)  # fmt: skip
def test_counts_and_fractions(setting: float, num_steps: int, count: int) -> None:
    assert resolve_steps(setting, num_steps) == count


def test_a_run_is_dense_at_both_ends() -> None:
    clock, scheduler = RunClock(), Scheduler()
    assert not clock.is_dense_step(1.0, 0), "outside of a run there are no steps"
    clock.start(8)
    dense = []
    for _ in range(8):
        dense.append(clock.is_dense_step(0.25, 1))
        clock.advance(scheduler)
    assert dense == [True, True, False, False, False, False, False, True]
    clock.start(4)
    assert clock.step == 0
    assert clock.is_dense_step(1, 0)


def test_of_several_schedulers_the_one_ahead_counts() -> None:
    clock, first, second = RunClock(), Scheduler(), Scheduler()
    clock.start(3)
    steps = []
    for scheduler in (first, second, second, first, first):
        clock.advance(scheduler)
        steps.append(clock.step)
    assert steps == [1, 1, 2, 2, 2], "the last step goes on"
    assert not clock.is_dense_step(1, 0)
    assert clock.is_dense_step(1, 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (-1, "cannot be negative"),
        (1.5, "a fraction of the run is between 0.0 and 1.0"),
        (True, "must be a number of steps or a fraction"),
        ("x", "must be a number of steps or a fraction"),
    ],
)
def test_bad_settings(setting: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"dense_steps is {setting!r}, but .*{message}"):
        check_steps("dense_steps", setting)  # type: ignore[arg-type]
