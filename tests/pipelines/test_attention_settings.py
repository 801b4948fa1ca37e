"""From --attn-arg to the parameters of a method."""

from typing import Any

import pytest

from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.method_settings import MethodOptions, attention_settings


def read(*arguments: str) -> dict[str, Any]:
    return attention_settings(MethodOptions("gna", arguments, None), None)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("24", 24),
        ("0.5", 0.5),
        ("full", "full"),
        ("7,15,15", (7, 15, 15)),
        ("(7, 15, 15)", (7, 15, 15)),
        ("[7, 15, 15]", (7, 15, 15)),
        ("full,0.5,16", ("full", 0.5, 16)),
        ('["full", 16]', ("full", 16)),
    ],
)
def test_values_of_a_parameter_that_may_differ_by_axis(text: str, want: Any) -> None:
    assert read(f"window={text}")["window"] == want


def test_words_of_json_between_commas() -> None:
    assert read("is_causal=true,false,False")["is_causal"] == (True, False, False)


def test_a_value_that_is_not_allowed_is_named_with_its_axis() -> None:
    with pytest.raises(UserError, match="stride along width is 'x', but must be an integer"):
        read("stride=2, 2, x")
