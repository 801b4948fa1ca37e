"""Tables of measured kernel forms: which one counts, and what malformed ones say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton

from diffattn.kernels.common import tuned
from diffattn.kernels.common.tile_tables import Choice, TileConfig
from diffattn.kernels.common.tuned import TABLE_VARIABLE, read_table, tuned_choice

GPU = "NVIDIA H100 80GB HBM3"

FORWARD: dict[str, Any] = {
    "kernel": "forward", "head_dim": 128, "variant": "tma",
    "block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3, "partial": 64, "ahead": True,
    "shape": "wan-1.3b-480p", "ms": {"block-aligned 1": 13.0}, "shipped_ms": {},
}  # fmt: skip
KEYS = FORWARD | {"kernel": "keys", "variant": "plain", "partial": None}
TABLE: dict[str, Any] = {
    "gpu": GPU, "triton": triton.__version__, "torch": "2.11.0", "revision": "abc",
    "date": "2026-12-01", "choices": [FORWARD, KEYS],
}  # fmt: skip
FASTEST = Choice("tma", TileConfig(128, 64, 8, 3, 64, True))

Write = Callable[[object], Path]


@pytest.fixture(autouse=True)
def on_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "device_name", lambda: GPU)
    monkeypatch.delenv(TABLE_VARIABLE, raising=False)
    tuned._choices.cache_clear()


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a table and names it in the environment."""

    def write(record: object) -> Path:
        path = tmp_path / "table.json"
        path.write_text(record if isinstance(record, str) else json.dumps(record))
        monkeypatch.setenv(TABLE_VARIABLE, str(path))
        tuned._choices.cache_clear()
        return path

    return write


def changed(**entry: object) -> dict[str, Any]:
    return TABLE | {"choices": [FORWARD | entry]}


def test_a_named_table_counts(named: Write) -> None:
    named(TABLE)
    assert tuned_choice("forward", 128) == FASTEST
    assert tuned_choice("keys", 128) == Choice("plain", TileConfig(128, 64, 8, 3, ahead=True))
    assert tuned_choice("forward", 64) is None
    assert tuned_choice("queries", 128) is None


def test_tables_in_the_folder_count_for_their_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    other = TABLE | {"gpu": "NVIDIA A100", "choices": [FORWARD | {"variant": "plain"}]}
    (tmp_path / "a.json").write_text(json.dumps(other))
    (tmp_path / "h.json").write_text(json.dumps(TABLE))
    assert tuned_choice("forward", 128) == FASTEST


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"gpu": "NVIDIA H200"}, id="gpu"),
        pytest.param({"triton": "2.1.0"}, id="triton"),
    ],
)
def test_a_table_of_another_gpu_or_triton_does_not_count(
    other: dict[str, str], named: Write
) -> None:
    named(TABLE | other)
    assert tuned_choice("forward", 128) is None


def test_patches_of_triton_make_no_difference(named: Write) -> None:
    major, minor, *_ = triton.__version__.split(".")
    named(TABLE | {"triton": f"{major}.{minor}.99"})
    assert tuned_choice("forward", 128) == FASTEST


def test_without_a_gpu_nothing_is_tuned(named: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    named("not even read")
    monkeypatch.setattr(tuned, "device_name", lambda: None)
    assert tuned_choice("forward", 128) is None


def test_a_named_table_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TABLE_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json cannot be read \(No such file.*be unset"):
        tuned_choice("forward", 128)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"table\.json is not JSON: Expecting"),
        ([], r"malformed: the table must be an object; got \[\]"),
        ({"gpu": GPU}, "the table lacks 'choices', 'date', 'revision', 'torch', 'triton'"),
        (TABLE | {"more": 1}, "the table has an unknown key 'more'"),
        (TABLE | {"gpu": 7}, "gpu must be text; got 7"),
        (TABLE | {"choices": {}}, "choices must be a list; got {}"),
        (TABLE | {"choices": [1]}, "choice 0 must be an object; got 1"),
        (TABLE | {"choices": [{}]}, "choice 0 lacks 'ahead', 'block_m', 'block_n', 'head_dim'"),
        (changed(kernel="sideways"), "choice 0: kernel is 'sideways'; may be 'forward', 'queries'"),
        (changed(variant="one_pass"), "variant is 'one_pass'; may be 'plain', 'tma', 'gluon'"),
        (changed(head_dim=80), "head_dim is 80; may be 16, 32, 64, 128, 256"),
        (changed(block_m=48), "block_m is 48; may be 16, 32, 64, 128, 256"),
        (changed(block_n="64"), "block_n is '64'; may be 16"),
        (changed(num_warps=3), "num_warps is 3; may be 1, 2, 4, 8, 16"),
        (changed(num_stages=True), "num_stages is True; may be 1, 2"),
        (changed(num_stages=9), "num_stages is 9; may be 1, 2"),
        (changed(partial=0), "partial is 0; may be None, 16"),
        (changed(ahead=1), "ahead is 1; may be true or false"),
        (changed(block_m=[128]), r"block_m is \[128\]; may be 16"),
        (changed(blocks=1), "choice 0 has an unknown key 'blocks'"),
        (TABLE | {"choices": [FORWARD] * 2}, "choice 1 is a second one for forward, head_dim 128"),
    ],
)
def test_malformed_tables(record: object, message: str, named: Write) -> None:
    named(record)
    with pytest.raises(ValueError, match=message):
        tuned_choice("forward", 128)


def test_the_committed_tables_are_sound() -> None:
    tables = [read_table(path) for path in tuned.FOLDER.glob("*.json")]
    places = [(table.gpu, *table.triton.split(".")[:2]) for table in tables]
    assert len(places) == len(set(places))
