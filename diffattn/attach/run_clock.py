"""The position in a denoising run, counted from the calls of its scheduler."""

from __future__ import annotations

import functools
import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from diffattn.methods.memory import RunMemory
from diffattn.schedule import Moment, is_dense_at


@dataclass
class RunClock:
    """The position in a denoising run, counted from the scheduler's calls.

    Attributes:
        step: 0-based index of the denoising step that the next model call belongs to.
        num_steps: length of the run; 0 before the scheduler was given its timesteps.
        always_dense: whether every step stays dense, whatever the methods say.
        has_begun: whether the first step of the run has been judged, and so the run's length is
            known.
        memory: what methods keep in the run.
    """

    step: int = 0
    num_steps: int = 0
    always_dense: bool = False
    has_begun: bool = False
    memory: RunMemory = field(default_factory=RunMemory, repr=False, compare=False)
    _taken: weakref.WeakKeyDictionary[Any, int] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    def start(self, num_steps: int) -> None:
        """Begin a run of `num_steps` denoising steps; 0 is the state outside a run."""
        self.step, self.num_steps, self.has_begun = 0, num_steps, False
        self._taken.clear()
        self.memory = RunMemory()

    def begin(self, skipped: int) -> None:
        """Begin the first step, and leave out the `skipped` timesteps before it.

        Video-to-video leaves out the first timesteps of its scheduler.
        """
        if not self.has_begun:
            self.num_steps, self.has_begun = self.num_steps - skipped, True

    @property
    def is_over(self) -> bool:
        """Whether every scheduler that takes part in the run has made all its steps."""
        return bool(self._taken) and min(self._taken.values()) >= self.num_steps

    def advance(self, scheduler: Any) -> None:
        """Count a step of a scheduler.

        Where several schedulers take turns, the scheduler with the most steps gives the position.
        When that scheduler has made its last step, others may still make steps: the position then
        stays at the last step.
        """
        self.has_begun = True
        self._taken[scheduler] = self._taken.get(scheduler, 0) + 1
        self.step = min(max(self.step, self._taken[scheduler]), max(self.num_steps - 1, 0))

    @property
    def moment(self) -> Moment:
        """The current position."""
        return Moment(self.step, self.num_steps) if self.num_steps else Moment()

    def is_dense_step(self, dense_steps: int | float, last_dense_steps: int | float) -> bool:
        """Whether the current step is among the dense steps at either end of the run."""
        return self.always_dense or is_dense_at(self.moment, dense_steps, last_dense_steps)


def skipped_timesteps(scheduler: Any, timestep: Any) -> int:
    """Number of timesteps that a scheduler leaves out when its first step is at `timestep`.

    Args:
        timestep: a number, or a tensor of numbers, of which the largest is of the tokens that are
            being denoised; None if unknown.
    """
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return begin
    if torch.is_tensor(timestep):
        timestep = timestep.max().to(scheduler.timesteps.device)
    if timestep is None:
        return 0
    found = (scheduler.timesteps == timestep).nonzero()
    return int(found[0]) if len(found) else 0


class Follower(Protocol):
    """An object that is informed of a scheduler's calls."""

    def started(self, scheduler: Any) -> None: ...

    def stepped(self, scheduler: Any, timestep: Any) -> None: ...

    def follower_of_copy(self, memo: dict[int, Any]) -> Follower: ...


# The methods of a scheduler whose calls tell the position in a run.
_COUNTED = ("set_timesteps", "step")


def is_followed(scheduler: Any, follower: Follower) -> bool:
    """Whether `follower` is informed of a scheduler's calls."""
    counted = vars(scheduler).get("step")
    return isinstance(counted, CountedMethod) and follower in counted.followers


def follow(scheduler: Any, follower: Follower) -> None:
    """Inform `follower` of a scheduler's calls from now on, beside others that are informed."""
    for name in _COUNTED:
        counted = vars(scheduler).get(name)
        if not isinstance(counted, CountedMethod):
            counted = CountedMethod(scheduler, name)
            # An instance attribute, over the method of the class.
            setattr(scheduler, name, counted)
        if follower not in counted.followers:
            counted.followers.append(follower)


def leave(scheduler: Any, follower: Follower) -> None:
    """Undo `follow`."""
    for name in _COUNTED:
        counted = vars(scheduler).get(name)
        if isinstance(counted, CountedMethod) and follower in counted.followers:
            counted.followers.remove(follower)
            if not counted.followers:
                delattr(scheduler, name)


class CountedMethod:
    """A replacement for a scheduler's `set_timesteps` or `step` that reports calls to followers.

    A copy of the scheduler gets replacements of its own, so that its calls are reported too. LTX-2
    steps its sound with a copy of the scheduler, and SkyReels-V2's diffusion forcing each frame.

    Attributes:
        followers: whom calls are reported to.
    """

    def __init__(self, scheduler: Any, name: str) -> None:
        method = getattr(type(scheduler), name)
        functools.update_wrapper(self, method.__get__(scheduler))
        self._scheduler, self._name, self._method = scheduler, name, method
        self.followers: list[Follower] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._method(self._scheduler, *args, **kwargs)
        for follower in list(self.followers):
            if self._name == "step":
                given = inspect.signature(self).bind(*args, **kwargs).arguments
                follower.stepped(self._scheduler, given.get("timestep"))
            else:
                follower.started(self._scheduler)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> CountedMethod:
        copied = CountedMethod(memo.get(id(self._scheduler), self._scheduler), self._name)
        copied.followers = [follower.follower_of_copy(memo) for follower in self.followers]
        return copied
