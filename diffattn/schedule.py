"""Settings of denoising steps: how many stay dense, and values that differ from step to step."""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, NamedTuple

from diffattn._checks import choice, is_number


class Moment(NamedTuple):
    """A position in a denoising run.

    Attributes:
        step: 0-based index of the denoising step.
        steps: length of the run; 0 outside of a run.
    """

    step: int = 0
    steps: int = 0


class StepValue(ABC):
    """The values of a parameter over the steps of a denoising run."""

    # The name in JSON, in the one-key object {word: arguments}.
    word: ClassVar[str]

    @property
    def length(self) -> int | None:
        """The only number of steps that the values fit; None if they fit every run."""
        return None

    @abstractmethod
    def at(self, step: int, steps: int) -> Any:
        """The value of a step, counted from 0, in a run of `steps` steps.

        With `steps=0`, outside of a run: the value of the last step of a long run.
        """

    def to_json(self) -> Any:
        """An object of JSON that `step_value_of` reads back."""
        arguments = [list(value) if isinstance(value, tuple) else value for value in astuple(self)]  # type: ignore[call-overload]
        return {self.word: arguments}


@dataclass(frozen=True)
class PerStep(StepValue):
    """One value for each step of a run, in order. A parameter also takes a plain list of values.

    `PerStep` is for parameters whose values are themselves sequences, such as the window of GNA.

    Attributes:
        values: as many values as the run has steps.

    Raises:
        ValueError: without values.
    """

    values: tuple[Any, ...]
    word: ClassVar[str] = "per_step"

    def __init__(self, *values: Any) -> None:
        if not values:
            raise ValueError("an empty list gives no step a value: give one value for each step")
        object.__setattr__(self, "values", tuple(map(_frozen, values)))
        try:
            hash(self.values)
        except TypeError:
            raise ValueError(f"{values!r} is no list of values for the steps of a run") from None

    def __repr__(self) -> str:
        return f"PerStep({', '.join(map(repr, self.values))})"

    @property
    def length(self) -> int:
        return len(self.values)

    def at(self, step: int, steps: int) -> Any:
        return self.values[step] if steps else self.values[-1]

    def to_json(self) -> Any:
        return {self.word: [list(v) if isinstance(v, tuple) else v for v in self.values]}


@dataclass(frozen=True)
class Ramp(StepValue):
    """Numbers that go evenly from the first step to the last; see `ramp`."""

    first: float
    last: float
    word: ClassVar[str] = "ramp"

    def __post_init__(self) -> None:
        _check_numbers(self.word, first=self.first, last=self.last)

    def __repr__(self) -> str:
        return f"ramp({self.first!r}, {self.last!r})"

    def at(self, step: int, steps: int) -> float:
        if not steps:
            return self.last
        return self.first + (self.last - self.first) * step / max(1, steps - 1)


@dataclass(frozen=True)
class EarlyRamp(StepValue):
    """Shares that fall from a peak in the first steps; see `early_ramp`."""

    share: float
    peak: float = 0.5
    word: ClassVar[str] = "early_ramp"

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("peak", self.peak)):
            if not (is_number(value) and 0 < value <= 1):
                raise ValueError(
                    f"{self.word}: {name} is {value!r}, but must be a number above 0 and at most 1"
                )

    def __repr__(self) -> str:
        return f"early_ramp({self.share!r}, {self.peak!r})"

    def at(self, step: int, steps: int) -> float:
        extra = max(self.share, self.peak) - self.share
        if not steps or not extra:
            return self.share
        total = max(min(_EXTRA_SHARE * steps, extra * steps), extra)
        length = min(steps, max(1, math.ceil(2 * total / extra) - 1))
        if step >= length:
            return self.share
        least = 2 * total / length - extra
        return self.share + extra - (extra - least) * step / max(1, length - 1)


# What an early ramp adds to a share, on average over the steps of a run.
_EXTRA_SHARE = 0.12


@dataclass(frozen=True)
class Hold(StepValue):
    """Other numbers at the ends of a run; see `hold`."""

    value: float
    first: float
    first_steps: int | float = 4
    shape: str = "hold"
    last: float | None = None
    last_steps: int | float = 0
    word: ClassVar[str] = "hold"

    def __post_init__(self) -> None:
        last = {} if self.last is None else {"last": self.last}
        _check_numbers(self.word, value=self.value, first=self.first, **last)
        check_steps(f"{self.word}: first_steps", self.first_steps)
        check_steps(f"{self.word}: last_steps", self.last_steps)
        if not choice(_SHAPES).holds(self.shape):
            raise ValueError(
                f"{self.word}: shape is {self.shape!r}, but must be one of {', '.join(_SHAPES)}"
            )
        if self.last_steps and self.last is None:
            raise ValueError(
                f"{self.word}: last_steps is {self.last_steps}, but no value is given for them:"
                f" give last, too"
            )

    def __repr__(self) -> str:
        return f"hold({', '.join(map(repr, astuple(self)))})"

    def at(self, step: int, steps: int) -> float:
        first = resolve_steps(self.first_steps, steps)
        is_last = step >= steps - resolve_steps(self.last_steps, steps)
        found = []
        if step < first:
            part = step / first if self.shape == "ramp" else 0
            found.append(self.first * (1 - part) + self.value * part)
        if steps and is_last and self.last is not None:
            found.append(self.last)
        return max(found, default=self.value)


_SHAPES = ("hold", "ramp")


@dataclass(frozen=True)
class Jenga(StepValue):
    """Shares kept under the drop rates of Jenga; see `jenga`."""

    first: float
    second: float
    word: ClassVar[str] = "jenga"

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("second", self.second)):
            if not (is_number(value) and 0 <= value < 1):
                raise ValueError(
                    f"{self.word}: {name} is {value!r}, but must be a number of at least 0 and"
                    f" below 1, the share that is dropped"
                )

    def __repr__(self) -> str:
        return f"jenga({self.first!r}, {self.second!r})"

    def at(self, step: int, steps: int) -> float:
        if not steps:
            return 1 - self.second
        rate = self.first if step <= steps // 2 else self.second
        return 1 - min(rate, 10 * step / max(1, steps - 1) * rate)


@dataclass(frozen=True)
class Counting(StepValue):
    """The number of the step: 0, 1, 2, ...; 0 outside of a run. The phase "rotate" of LVSA."""

    word: ClassVar[str] = "counting"

    def __repr__(self) -> str:
        return "'rotate'"

    def at(self, step: int, steps: int) -> int:
        return step if steps else 0

    def to_json(self) -> Any:
        return "rotate"


def ramp(first: float, last: float) -> Ramp:
    """A parameter that goes evenly from `first` in the first step to `last` in the last.

    Parameters that are whole numbers are rounded. A run of one step has `first`.

    Raises:
        ValueError: if an end is no finite number.
    """
    return Ramp(first, last)


def early_ramp(share: float, peak: float = 0.5) -> EarlyRamp:
    """A share that falls evenly from `peak` to `share`: denser early, for runs of any length.

    The ramp is as long as adds 0.12 to the share on average over the run, and at least one step
    long. A `peak` below `share` does nothing.

    Raises:
        ValueError: if a share is not above 0 and at most 1.
    """
    return EarlyRamp(share, peak)


def hold(
    value: float,
    first: float,
    first_steps: int | float = 4,
    *,
    shape: str = "hold",
    last: float | None = None,
    last_steps: int | float = 0,
) -> Hold:
    """A parameter with another value in the first steps of a run, and perhaps in the last.

    Args:
        value: the value of the steps between.
        first: the value of the first steps.
        first_steps: number of first steps: a count, or a fraction of the run such as 0.25.
        shape: "hold" to keep `first`, "ramp" to go evenly from `first` to `value`.
        last: the value of the last steps. A step that is among both has the larger value.
        last_steps: number of last steps, as `first_steps`.

    Raises:
        ValueError: for values that are no finite numbers, unknown shapes, and `last_steps` without
            `last`.
    """
    return Hold(value, first, first_steps, shape, last, last_steps)


def jenga(first: float, second: float) -> Jenga:
    """The share of blocks kept under Jenga's rates of dropped blocks.

    The share falls from 1 over the first tenth of the run.

    Args:
        first, second: share that is dropped in the first and in the second half of a run.

    Raises:
        ValueError: if a rate is not from 0 to below 1.
    """
    return Jenga(first, second)


_BY_WORD: dict[str, type[StepValue]] = {
    cls.word: cls for cls in (PerStep, Ramp, EarlyRamp, Hold, Jenga)
}


def step_value_of(value: Any) -> StepValue | None:
    """A schedule from its object in JSON, such as {"ramp": [1.3, 0.8]}; None for other values.

    Raises:
        ValueError: if the name is known, but the arguments do not fit.
    """
    if isinstance(value, StepValue):
        return value
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in _BY_WORD:
        return None
    [(word, arguments)] = value.items()
    if not isinstance(arguments, list | tuple):
        raise ValueError(f"{word} is {arguments!r}, but must be a list of its arguments")
    try:
        return _BY_WORD[word](*arguments)
    except TypeError:
        raise ValueError(
            f"{word} does not take the {len(arguments)} arguments {arguments!r}"
        ) from None


def spelled(schedule: StepValue) -> str:
    """A schedule as `read_schedule` and the command line read it, such as "1.3..0.8"."""
    if isinstance(schedule, Ramp):
        return f"{schedule.first}..{schedule.last}"
    if not isinstance(schedule, PerStep):
        arguments = schedule.to_json()
        if isinstance(arguments, str):
            return arguments
        given = [value for value in arguments[schedule.word] if value is not None]
        return f"{schedule.word}:{','.join(map(str, given))}"
    if any(isinstance(value, tuple) for value in schedule.values):
        return "/".join(",".join(map(str, v)) if isinstance(v, tuple) else str(v)
                        for v in schedule.values)  # fmt: skip
    runs = [(value, len(list(equal))) for value, equal in itertools.groupby(schedule.values)]
    return ",".join(str(value) if many == 1 else f"{value}x{many}" for value, many in runs)


def read_schedule(text: str, read: Callable[[str], Any]) -> StepValue | None:
    """A schedule as people write it; None for other text.

    "1.3..0.8" is a ramp, "1x2,0.55,0.1x5" a list in which 1 comes twice and 0.1 five times,
    "5,9,9/3,5,5" a list of values that are sequences, and "early_ramp:0.15" a schedule by its name
    and its arguments.

    Args:
        text: the words.
        read: reads a value, and returns text that is none.

    Raises:
        ValueError: if a schedule is named, but its arguments do not fit.
    """
    name, colon, arguments = text.partition(":")
    if colon and name in _BY_WORD:
        return step_value_of({name: [read(part) for part in arguments.split(",")]})
    first, dots, last = text.partition("..")
    if dots and all(is_number(read(end)) for end in (first, last)):
        return Ramp(read(first), read(last))
    if "/" in text:
        values = [read(part) for part in text.split("/")]
        return None if any(isinstance(value, str) for value in values) else PerStep(*values)
    if "," not in text or not _REPEATED.search(text):
        return None
    values = []
    for part in text.split(","):
        value, _, many = part.partition("x")
        if not is_number(read(value)) or (many and not many.strip().isdecimal()):
            return None
        values += [read(value)] * int(many or 1)
    return PerStep(*values)


_REPEATED = re.compile(r"x\d")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _check_numbers(word: str, **values: object) -> None:
    for name, value in values.items():
        if not is_number(value):
            raise ValueError(f"{word}: {name} is {value!r}, but must be a finite number")


def resolve_steps(setting: int | float, num_steps: int) -> int:
    """A count of steps, or a fraction of the run (rounded down), as a count.

    Args:
        setting: an int counts steps; a float from 0 to 1 is a fraction of the run.
        num_steps: length of the run in denoising steps; the result is at most this.
    """
    count = setting if isinstance(setting, int) else int(setting * num_steps)
    return min(count, num_steps)


def is_dense_at(moment: Moment, dense_steps: int | float, last_dense_steps: int | float) -> bool:
    """Whether a step is among the dense steps at either end of its run; never outside of a run."""
    if moment.steps == 0:
        return False
    first = resolve_steps(dense_steps, moment.steps)
    last = resolve_steps(last_dense_steps, moment.steps)
    return moment.step < first or moment.step >= moment.steps - last


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
