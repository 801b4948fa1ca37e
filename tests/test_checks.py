"""What settings may be, and the words in which they are refused."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from diffattn import methods
from diffattn._checks import (
    FLAG,
    Allowed,
    check,
    check_fields,
    choice,
    count,
    did_you_mean,
    is_number,
    is_whole,
    lists_to_tuples,
    number,
    refused,
    sides,
    whole,
)
from diffattn.kernels.linear import linear_attention
from diffattn.lora.errors import LoraError
from diffattn.lora.settings import TrainSettings
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.request import Request, check_option
from diffattn.selected.attention import selected_attention

NO_NUMBERS = (True, False, None, "1", "", [1], (1,), {}, 1j, math.nan, math.inf, -math.inf)
HUGE = 10**400  # no float can hold it


@pytest.mark.parametrize(
    ("allowed", "words", "good", "bad"),
    [
        (FLAG, "true or false", (True, False), (0, 1, None, "true", 1.0)),
        (whole(1), "a whole number of at least 1", (1, HUGE), (0, -1, 1.0, *NO_NUMBERS)),
        (whole(0, 7), "a whole number from 0 to 7", (0, 7), (-1, 8, 7.0, HUGE, *NO_NUMBERS)),
        (count(2), "an integer of at least 2", (2, 3), (1, 2.0, *NO_NUMBERS)),
        (number(), "a finite number", (0, -1.5, 1e300, HUGE), NO_NUMBERS),
        (number(above=0), "a number above 0", (1, 5e-324), (0, 0.0, -1, *NO_NUMBERS)),
        (number(at_least=0), "a number of at least 0", (0, 0.0, 2), (-5e-324, *NO_NUMBERS)),
        (
            number(at_least=0, below=1),
            "a number of at least 0 and below 1",
            (0, 0.999),
            (1, 1.0, -1, *NO_NUMBERS),
        ),
        (
            number(above=0, at_most=1),
            "a number above 0 and at most 1",
            (1, 1.0, 0.5),
            (0, 1.001, *NO_NUMBERS),
        ),
        (choice(("a", "b")), "one of a, b", ("a", "b"), ("c", "", "a, b", None, ["a"], 0)),
        (
            sides(2),
            "rows and columns of tokens: two integers of at least 1",
            ((1, 9),),
            (1, (1,), (1, 2, 3), (0, 1), (1, True), (1, 2.0), [1, 2], "12", None),
        ),
        (
            sides(3),
            "frames, rows and columns of tokens: three integers of at least 1",
            ((1, 2, 3),),
            (3, (1, 2), (1, -2, 3), (1, "2", 3), [1, 2, 3]),
        ),
    ],
    ids=lambda value: value.words if isinstance(value, Allowed) else "",
)
def test_what_is_allowed(
    allowed: Allowed, words: str, good: tuple[Any, ...], bad: tuple[Any, ...]
) -> None:
    for value in good:
        check("size", value, allowed)
    for value in bad:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            check("size", value, allowed)
        said = f"size is {value!r}, but must be {words}" if value != HUGE else str(error.value)
        assert str(error.value) == said


def test_numbers_are_finite_and_no_bools() -> None:
    assert all(is_number(value) for value in (0, -3, 0.5, 1e300, HUGE))
    assert not any(is_number(value) for value in NO_NUMBERS)
    assert is_whole(HUGE)
    assert not any(is_whole(value) for value in (1.0, *NO_NUMBERS))


@dataclass(frozen=True)
class Settings:
    size: int = 1
    scale: float | None = None
    names: tuple[str, ...] = ()
    also: tuple[str, ...] = field(default=())


RULES = {"scale": number(above=0), "size": whole(1)}


def test_fields_are_refused_in_the_order_of_the_rules() -> None:
    assert list(refused(Settings(), RULES)) == []
    assert list(refused(Settings(size=0, scale=0), RULES)) == ["scale", "size"]
    with pytest.raises(LoraError, match=r"^scale is 0, but must be a number above 0$"):
        check_fields(Settings(size=0, scale=0), RULES, LoraError)


def test_none_is_for_fields_whose_default_it_is() -> None:
    assert list(refused(Settings(scale=None), RULES)) == []
    assert list(refused(Settings(size=None), RULES)) == ["size"]  # type: ignore[arg-type]


def test_lists_become_tuples_where_they_are_named() -> None:
    settings = Settings(names=["a"], also=["b"])  # type: ignore[arg-type]
    lists_to_tuples(settings, "names", "size")
    assert settings == Settings(names=("a",), also=["b"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "known", "ending"),
    [
        ("radail", ["gna", "radial"], "; did you mean 'radial'?"),
        ("decay", ["sink", "decay_factor"], "; did you mean 'decay_factor'?"),
        (".mp3", (".mp4", ".gif"), "; did you mean '.mp4'?"),
        (".avi", (".mp4", ".gif"), ""),
        ("x", [], ""),
    ],
)
def test_the_nearest_name_is_suggested(word: str, known: Any, ending: str) -> None:
    assert did_you_mean(word, known) == ending
    assert did_you_mean(word, iter(known)) == ending


def test_all_names_are_listed_where_none_is_near() -> None:
    assert did_you_mean("QQ", {"b": 1, "a": 2}, or_list=True) == "; choose from a, b"
    assert did_you_mean("bb", {"bbb": 1, "a": 2}, or_list=True) == "; did you mean 'bbb'?"


def test_each_front_has_its_own_exception_and_form() -> None:
    """The same rule: methods raise ValueError, LoRA LoraError, the command line UserError."""
    with pytest.raises(
        ValueError, match=r"^block_size is True, but must be an integer of at least"
    ):
        methods.from_dict({"type": "radial", "block_size": True})
    with pytest.raises(
        LoraError, match=r"^rank is True, but must be a whole number from 1 to 65536$"
    ):
        TrainSettings(rank=True)
    with pytest.raises(
        UserError, match=r"^--steps must be a whole number of at least 1, not True$"
    ):
        Request("a fox", steps=True)
    with pytest.raises(
        UserError, match=r"^--dtype must be .*, not 'float61'; did you mean 'float1"
    ):
        check_option("dtype", "float61", choice(("float16",)))


@pytest.mark.parametrize("name", methods.METHODS)
def test_no_method_takes_a_bool_for_a_number(name: str) -> None:
    # AutoAttn becomes the method that it chooses.
    settled = methods.METHODS[name]().for_model("wan2.1")
    numbers = [
        key
        for key, value in settled.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    assert {"dense_layers", "dense_steps", "last_dense_steps"} <= set(numbers)
    for key in numbers:
        with pytest.raises(ValueError, match=f"^{key} is True, but must be "):
            methods.from_dict({"type": settled.type, key: True})


@pytest.mark.parametrize("name", methods.METHODS)
def test_tuples_of_a_method_may_come_as_the_lists_of_json(name: str) -> None:
    method = methods.METHODS[name]().for_model("wan2.1")
    read = methods.from_dict(json.loads(json.dumps(method.to_dict())))
    assert read == method
    assert hash(read) == hash(method)


def test_operators_name_what_is_no_tensor() -> None:
    x: Any = torch.ones(1, 8, 1, 4)
    with pytest.raises(TypeError, match=r"^key is NoneType, but must be a torch\.Tensor$"):
        selected_attention(x, None, x, blocks=x, bits=x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^query is list, but must be a torch\.Tensor$"):
        selected_attention([1.0], x, x, blocks=x, bits=x)  # type: ignore[arg-type]
    message = r"^v is ndarray, but must be a torch\.Tensor; torch\.as_tensor\(v\) makes one of it$"
    with pytest.raises(TypeError, match=message):
        linear_attention(x, x, x.numpy())
