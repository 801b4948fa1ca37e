"""The position in a denoising run, counted from the calls of its scheduler."""

from __future__ import annotations

import functools
import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffattn.schedule import resolve_steps


@dataclass
class RunClock:
    """The position in a denoising run, counted from the scheduler's calls.

    Attributes:
        step: 0-based index of the denoising step that the next model call belongs to.
        num_steps: length of the run; 0 before the scheduler was given its timesteps.
        always_dense: whether every step stays dense, whatever the methods say.
    """

    step: int = 0
    num_steps: int = 0
    always_dense: bool = False
    _taken: weakref.WeakKeyDictionary[Any, int] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    def start(self, num_steps: int) -> None:
        """Begin a run of `num_steps` denoising steps; 0 is the state outside a run."""
        self.step, self.num_steps = 0, num_steps
        self._taken.clear()

    @property
    def has_stepped(self) -> bool:
        """Whether a scheduler has made a step of this run."""
        return bool(self._taken)

    def leave_out(self, skipped: int) -> None:
        """Shorten the run by the first `skipped` timesteps, which video-to-video leaves out."""
        self.num_steps -= skipped

    def advance(self, scheduler: Any) -> None:
        """Count a step of a scheduler.

        Where several schedulers take turns, the scheduler with the most steps gives the position.
        When that scheduler has made its last step, others may still make steps: the position then
        stays at the last step.
        """
        self._taken[scheduler] = self._taken.get(scheduler, 0) + 1
        self.step = min(max(self.step, self._taken[scheduler]), max(self.num_steps - 1, 0))

    def is_dense_step(self, dense_steps: int | float, last_dense_steps: int | float) -> bool:
        """Whether the current step is among the dense steps at either end of the run."""
        if self.always_dense:
            return True
        if self.num_steps == 0:
            return False
        first = resolve_steps(dense_steps, self.num_steps)
        last = resolve_steps(last_dense_steps, self.num_steps)
        return self.step < first or self.step >= self.num_steps - last


def skipped_timesteps(scheduler: Any, timestep: Any) -> int:
    """Number of timesteps that a scheduler leaves out when its first step is at `timestep`."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return begin
    found = (scheduler.timesteps == timestep).nonzero()
    return int(found[0]) if len(found) else 0


class Follower(Protocol):
    """An object that is informed of a scheduler's calls."""

    def started(self, scheduler: Any) -> None: ...

    def stepped(self, scheduler: Any, timestep: Any) -> None: ...

    def follower_of_copy(self, memo: dict[int, Any]) -> Follower: ...


class CountedMethod:
    """A replacement for a scheduler's `set_timesteps` or `step` that reports calls to a follower.

    A copy of the scheduler gets replacements of its own, so that its calls are reported too. LTX-2
    steps its sound with a copy of the scheduler, and SkyReels-V2's diffusion forcing each frame.
    """

    def __init__(self, scheduler: Any, name: str, follower: Follower) -> None:
        method = getattr(type(scheduler), name)
        functools.update_wrapper(self, method.__get__(scheduler))
        self._scheduler, self._name, self._method = scheduler, name, method
        self._follower = follower

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._method(self._scheduler, *args, **kwargs)
        if self._name == "step":
            given = inspect.signature(self).bind(*args, **kwargs).arguments
            self._follower.stepped(self._scheduler, given.get("timestep"))
        else:
            self._follower.started(self._scheduler)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> CountedMethod:
        scheduler = memo.get(id(self._scheduler), self._scheduler)
        return CountedMethod(scheduler, self._name, self._follower.follower_of_copy(memo))
