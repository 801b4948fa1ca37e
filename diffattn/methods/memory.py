"""Tensors that a method keeps from one denoising step to the next, of one site in one run.

A run owns its memory, so that a new run begins without any, and runs in several threads have one
each. Step caches leave calls out: what is kept may be of any earlier step of the run, or missing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

# Calls of a site in one step that have a memory. Guidance makes 2 or 3; a caller that never steps
# its scheduler makes any number.
_MOST_CALLS = 8


@dataclass
class _Place:
    """The memory of a site: the step of its last call, calls in that step, and what is kept."""

    step: int = -1
    calls: int = 0
    kept: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CallMemory:
    """What the calls with the same number in their steps keep, at one site in one run.

    Guidance calls the denoiser several times in a step; each of these calls has its own memory.
    """

    _kept: dict[int, Any]
    _number: int
    _is_last: bool

    def recall(self) -> Any:
        """What such a call of an earlier step has kept; None if there is none."""
        return self._kept.get(self._number)

    def keep(self, value: Any) -> None:
        """Keep a value for later steps. The last step of a run keeps nothing."""
        if self._is_last:
            self._kept.pop(self._number, None)
        else:
            self._kept[self._number] = value


class RunMemory:
    """The memories of all sites in one denoising run."""

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}
        self._lock = threading.Lock()

    def of_call(self, place: int, step: int, steps: int) -> CallMemory | None:
        """The memory of a call; None for a call that comes after too many others in its step.

        Args:
            place: the number of the site.
            step: index of the denoising step, from 0.
            steps: length of the run.
        """
        with self._lock:
            of_site = self._places.setdefault(place, _Place())
            if of_site.step != step:
                of_site.step, of_site.calls = step, 0
            number = of_site.calls
            of_site.calls += 1
        if number >= _MOST_CALLS:
            return None
        return CallMemory(of_site.kept, number, step + 1 >= steps)
