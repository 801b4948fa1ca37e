"""The judgement of an adaptation."""

from dataclasses import replace

import pytest

from diffattn.samples.moving_shapes.adaptation import Figures
from diffattn.samples.moving_shapes.summary import judgement, summary

ALL = {"colour": 1.0, "background": 1.0, "direction": 1.0}
DENSE = Figures(0.045, 0.0, None, ALL)
SPARSE = Figures(0.2117, 0.1701, 11.1, ALL | {"direction": 0.25})
ADAPTED = Figures(0.0820, 0.0366, 15.0, ALL)
VIDEOS = 16

NO_USE = "The LoRA is NOT of use, worse than without it:"
OF_USE = "Nothing that is measured here is worse with the LoRA than without it."


def test_a_lora_that_makes_the_motion_worse_is_not_called_good() -> None:
    # Figures of benchmarks/lora/gna-1.json, where all but the direction is better.
    adapted = replace(ADAPTED, accuracy=ALL | {"direction": 0.0})
    assert judgement(DENSE, SPARSE, adapted, VIDEOS) == [
        NO_USE,
        "- direction right in 0 of 16 videos, was 4 of 16",
        "Of the distance that the mask makes, 22% is left.",
        "Not restored:",
        "- direction is right in 0 of 16 videos, in the dense model's 16 of 16",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"loss": 0.3}, "- loss 0.3000, was 0.2117"),
        ({"distance": 0.2}, "- distance 0.2000, was 0.1701"),
        ({"psnr_db": 10.96}, "- PSNR to dense 11.0 dB, was 11.1 dB"),
        ({"accuracy": ALL | {"colour": 0.9375}}, "- colour right in 15 of 16 videos, was 16 of 16"),
    ],
)
def test_nor_is_one_that_makes_anything_else_worse(change: dict, line: str) -> None:
    said = judgement(DENSE, SPARSE, replace(ADAPTED, **change), VIDEOS)
    assert said[:2] == [NO_USE, line]


def test_one_that_restores_everything() -> None:
    assert judgement(DENSE, SPARSE, ADAPTED, VIDEOS) == [
        OF_USE,
        "Of the distance that the mask makes, 22% is left.",
    ]


def test_what_is_better_but_still_wrong_is_named() -> None:
    adapted = replace(ADAPTED, accuracy=ALL | {"direction": 0.8125})
    said = judgement(DENSE, SPARSE, adapted, VIDEOS)
    assert said[0] == OF_USE
    assert said[-2:] == [
        "Not restored:",
        "- direction is right in 13 of 16 videos, in the dense model's 16 of 16",
    ]


def test_one_that_changes_nothing() -> None:
    said = judgement(DENSE, SPARSE, SPARSE, VIDEOS)
    assert said[0] == "The LoRA changes nothing that is measured here."
    assert "Of the distance that the mask makes, 100% is left." in said


def test_the_table_has_every_figure_of_every_state() -> None:
    lines = summary(DENSE, SPARSE, ADAPTED, VIDEOS).splitlines()
    cells = {line[:24].strip(): line[24:].split() for line in lines[1:7]}
    assert cells == {
        "loss": ["0.0450", "0.2117", "0.0820"],
        "distance to dense": ["0.0000", "0.1701", "0.0366"],
        "PSNR to dense, dB": ["-", "11.1", "15.0"],
        "colour right": ["16", "of", "16"] * 3,
        "background right": ["16", "of", "16"] * 3,
        "direction right": ["16", "of", "16", "4", "of", "16", "16", "of", "16"],
    }
    assert lines[-2:] == judgement(DENSE, SPARSE, ADAPTED, VIDEOS)
