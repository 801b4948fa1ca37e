"""What is compared: a method with its parameters, or the dense model computed in another way."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffattn._checks import did_you_mean

from ..errors import UserError, shortened
from ..run.method_settings import make_method, read_arguments
from ..run.request import Request

DENSE = "dense"
PRECISION_FLOOR = "floor: precision"
KERNEL_FLOOR = "floor: kernel"
FLEX_FLOOR = "floor: FlexAttention"
FLOORS = (PRECISION_FLOOR, KERNEL_FLOOR)
RESERVED = (DENSE, *FLOORS)

# The floating-point type that the floor of a model computes in, by the model's own type. Half
# precision stays half: a large model would not fit in float32.
_OTHER_DTYPE = {"float32": "bfloat16", "bfloat16": "float16", "float16": "bfloat16"}

_PLAIN: Mapping[str, Any] = {"type": "dense"}
# The entries of a case in a file, beside the method itself.
_ENTRIES = ("attention", "lora", "lora_everywhere", "cache", "groups")


@dataclass(frozen=True)
class Case:
    """One way to make each sample.

    Attributes:
        name: names the case in tables; no two cases have the same.
        attention: the method, as its `to_dict()` gives it.
        dtype: the type of the model where it is not that of the comparison.
        other_kernel: whether dense attention runs by another kernel than torch would choose.
        flex_of: the case of the same method, where torch's FlexAttention computes this one: it is
            compared with that case, not with the dense model.
        lora: file or folder of a LoRA, or of several, in the place of the comparison's own; None
            for that one.
        lora_everywhere: as `Request.lora_everywhere`.
        cache: a step cache, see `caches`; None for none.
        groups: the parts of a study that the case belongs to.
    """

    name: str
    attention: Mapping[str, Any] = field(default_factory=lambda: dict(_PLAIN))
    dtype: str | None = None
    other_kernel: bool = False
    flex_of: str | None = None
    lora: str | tuple[str, ...] | None = None
    lora_everywhere: bool = False
    cache: str | None = None
    groups: tuple[str, ...] = ()

    @property
    def is_floor(self) -> bool:
        """Whether the case is the dense model, or another case, computed in another way."""
        return self.name in FLOORS or self.flex_of is not None

    @property
    def loads(self) -> tuple[str | None, str | tuple[str, ...] | None, bool]:
        """What cases have in common that a loaded model serves: type, LoRA, where it is on."""
        return self.dtype, self.lora, self.lora_everywhere

    def request(self, base: Request, prompt: str, seed: int) -> Request:
        """The request of one sample of the case."""
        settings = base.to_dict() | {
            "attention": dict(self.attention),
            "prompt": prompt,
            "seed": seed,
            "dtype": self.dtype or base.dtype,
        }
        if self.lora is not None:
            settings |= {"lora": self.lora, "lora_everywhere": self.lora_everywhere}
        return Request.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """The case as JSON types, without what it leaves open."""
        found = {
            "attention": json.loads(json.dumps(dict(self.attention))),
            "dtype": self.dtype,
            "other_kernel": self.other_kernel,
            "flex_of": self.flex_of,
            "lora": self.lora,
            "lora_everywhere": self.lora_everywhere,
            "cache": self.cache,
            "groups": list(self.groups),
        }
        return {name: value for name, value in found.items() if value or name == "attention"}


def dense_and_floors(dtype: str) -> tuple[Case, Case, Case]:
    """The dense model, and the same in another precision and by another kernel.

    Args:
        dtype: the type of the model in the comparison.
    """
    return (
        Case(DENSE),
        Case(PRECISION_FLOOR, dtype=_OTHER_DTYPE[dtype]),
        Case(KERNEL_FLOOR, other_kernel=True),
    )


def flex_floor(case: Case) -> Case:
    """The same case by torch's FlexAttention, which computes the same mask by another kernel.

    Raises:
        UserError: if the method does more than attend under a mask, or is computed by
            FlexAttention in any case.
    """
    from diffattn.methods.base import attends_by_mask_throughout
    from diffattn.operator import asked_backend

    method = make_method(case.attention)
    if not attends_by_mask_throughout(method):
        raise UserError(
            f"--flex {case.name!r}: FlexAttention computes methods that are a mask and nothing"
            f" else, such as gna and radial, not {method.type} with these parameters"
        )
    if asked_backend() == "flex":
        raise UserError(
            f"--flex {case.name!r}: DIFFATTN_BACKEND is 'flex', so that the case itself is computed"
            f" by FlexAttention: unset the variable"
        )
    return replace(case, name=f"{FLEX_FLOOR}, {case.name}", flex_of=case.name)


def flex_floors(cases: Sequence[Case], names: Iterable[str]) -> list[Case]:
    """The cases of these names, by FlexAttention.

    Raises:
        UserError: for a name that is none or comes twice, and as `flex_floor`.
    """
    by_name = {case.name: case for case in cases}
    found: list[Case] = []
    for name in names:
        if name not in by_name:
            hint = did_you_mean(name, by_name)
            raise UserError(f"--flex {name!r} is no case of this run{hint}")
        found.append(flex_floor(by_name[name]))
        if found.count(found[-1]) > 1:
            raise UserError(f"--flex {name!r} is given twice")
    return found


def case_of_words(words: str) -> Case:
    """The case that an option names by words, such as "gna window=9,8,8 dense_steps=0".

    Raises:
        UserError: if the words are not a method and its parameters.
    """
    try:
        name, *arguments = shlex.split(words)
    except ValueError:
        raise UserError(
            f"--attn takes a method and its parameters, such as 'gna window=5,7,7', not"
            f" {shortened(repr(words))}"
        ) from None
    settings = {"type": name} | read_arguments(arguments, f"--attn {name!r}")
    return Case(" ".join([name, *arguments]), make_method(settings).to_dict())


def case_of_file(path: Path) -> Case:
    """The case of a method that a file holds as JSON; the name is the file's.

    Raises:
        UserError: if the file holds no method.
    """
    return Case(path.stem, _method(_read_json(path, "--attn-config"), str(path)))


def cases_of_file(path: Path) -> list[Case]:
    """The cases of a JSON file: an object with a method for each name.

    A method is its name, its `to_dict()`, or an object with the entry "attention" for the method
    and further entries: "lora" and "cache".

    Raises:
        UserError: if the file holds something else.
    """
    found = _read_json(path, "--cases")
    if not isinstance(found, dict):
        raise UserError(
            f'--cases {path} must hold an object of names and methods, such as {{"small":'
            f' {{"type": "gna", "window": [5, 7, 7]}}}}'
        )
    return [_case(str(name), value, path) for name, value in found.items()]


def check_cases(cases: Sequence[Case]) -> None:
    """Refuse cases that nobody could tell apart.

    Raises:
        UserError: if there is no case, or two cases have the same name or the same settings.
    """
    if not cases:
        raise UserError("nothing to compare: give --attn, --attn-config or --cases")
    names: set[str] = set()
    for case in cases:
        if case.name in names:
            raise UserError(f"the case {case.name!r} is given twice: leave one out")
        if case.name in RESERVED:
            raise UserError(
                f"{case.name!r} is in every comparison: leave the case out, or rename it"
            )
        names.add(case.name)
    known: dict[str, str] = {}
    for case in [*dense_and_floors("float32")[:1], *cases]:
        settings = json.dumps(case.to_dict() | {"groups": []}, sort_keys=True)
        if settings in known:
            raise UserError(
                f"the cases {known[settings]!r} and {case.name!r} have the same settings: leave one"
                f" out"
            )
        known[settings] = case.name


def chosen(cases: Sequence[Case], names: Iterable[str]) -> list[Case]:
    """The cases of some names or groups; all cases without names.

    Raises:
        UserError: for a name that is neither.
    """
    wanted = list(names)
    groups = dict.fromkeys(group for case in cases for group in case.groups)
    known = [*(case.name for case in cases), *groups]
    for name in wanted:
        if name not in known:
            raise UserError(f"--only {name!r} is no case of this run{did_you_mean(name, known)}")
    return [case for case in cases if not wanted or {case.name, *case.groups} & set(wanted)]


def _case(name: str, value: Any, path: Path) -> Case:
    where = f"--cases {path}: {name!r}"
    if not name.strip():
        raise UserError(f"--cases {path}: a case has a blank name")
    if not isinstance(value, dict) or "attention" not in value:
        return Case(name, _method(value, where))
    for entry in value:
        if entry not in _ENTRIES:
            raise UserError(f"{where} has the entry {entry!r}{did_you_mean(entry, _ENTRIES)}")
    groups = value.get("groups", [])
    if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
        raise UserError(f"{where}: 'groups' must be a list of text, not {shortened(groups)}")
    lora = value.get("lora")
    several = tuple(lora) if isinstance(lora, list) else () if lora is None else (lora,)
    for entry, texts in (("lora", several), ("cache", (value.get("cache", ""),))):
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: {entry!r} must be text, not {shortened(value[entry])}")
    return Case(
        name,
        _method(value["attention"], where),
        lora=several if isinstance(lora, list) else lora,
        lora_everywhere=value.get("lora_everywhere") is True,
        cache=value.get("cache"),
        groups=tuple(groups),
    )


def _method(value: Any, where: str) -> dict[str, Any]:
    settings = {"type": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("type"), str):
        raise UserError(
            f'{where} must be a method: its name, or an object with a "type", not'
            f" {shortened(value)}"
        )
    try:
        return make_method(settings).to_dict()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _read_json(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise UserError(f"cannot read {option} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} {path} is not JSON: {error}") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; Python would keep the last of two entries of one name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found
