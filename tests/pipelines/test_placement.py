"""Which parts of a pipeline are on the device, counted on a machine that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_complete import COMPLETE

from diffattn.lora.captions import CaptionedClip
from diffattn.lora.encoding import prepare
from diffattn.lora.recipes import recipe_for
from diffattn.lora.teacher import teach
from diffattn.pipelines.train import placement
from diffattn.pipelines.train.placement import on_demand, parts_of

CASE = COMPLETE["wan-two-experts"]
DEVICE = torch.device("cpu")
ENCODERS = {"vae", "text_encoder"}


@pytest.fixture
def pipe() -> Any:
    return CASE.build()


@pytest.fixture
def seen(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The parts that are on the device together, at each time when a part comes to it."""
    names = {id(part): name for name, part in parts_of(pipe).items()}
    there: set[str] = set()
    seen: list[set[str]] = [there]

    def move(part: torch.nn.Module, device: object) -> bool:
        name = names[id(part)]
        was = name in there
        if device == "host":
            there.discard(name)
            return was
        there.add(name)
        seen.append(set(there))
        return not was

    monkeypatch.setattr(placement, "_HOST", "host")
    monkeypatch.setattr(placement, "move", move)
    return seen


def check_over(pipe: Any, seen: list[set[str]], resident: str | None = None) -> None:
    """The first set is that of the parts that are there now."""
    assert seen[0] == ({resident} - {None})
    assert not any(hasattr(part, "_hf_hook") for part in parts_of(pipe).values())


def test_one_part_at_a_time(pipe: Any, seen: list[set[str]]) -> None:
    with on_demand(pipe, DEVICE):
        found = CASE.run(pipe, "a cat")
    assert all(len(parts) == 1 for parts in seen[1:])
    assert set.union(*seen[1:]) == {"text_encoder", "transformer", "transformer_2", "vae"}
    check_over(pipe, seen)
    assert np.array_equal(found, CASE.run(CASE.build(), "a cat"))


def test_the_trained_part_stays(pipe: Any, seen: list[set[str]]) -> None:
    seen[0].add("transformer_2")
    with on_demand(pipe, DEVICE, resident="transformer_2"):
        CASE.run(pipe, "a cat")
    assert all("transformer_2" in parts and len(parts) <= 2 for parts in seen[1:])
    assert set.union(*seen[1:]) == {"text_encoder", "transformer", "transformer_2", "vae"}
    check_over(pipe, seen, "transformer_2")


def test_no_denoiser_is_there_while_clips_are_encoded(
    pipe: Any, seen: list[set[str]], tmp_path: Path
) -> None:
    height, width, num_frames = CASE.size
    frames = [Image.new("RGB", (width, height), (40 * i, 0, 0)) for i in range(num_frames)]
    for name in ("a", "b"):
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
    clips = [CaptionedClip(tmp_path / f"{name}.gif", f"clip {name}") for name in ("a", "b")]
    with on_demand(pipe, DEVICE, together=ENCODERS):
        prepare(pipe, recipe_for(pipe), clips, tmp_path / "out", height, width, num_frames)
    assert seen[-1] == ENCODERS
    assert all(parts <= ENCODERS for parts in seen[1:])
    check_over(pipe, seen)


def test_nothing_comes_for_clips_that_are_encoded_already(
    pipe: Any, seen: list[set[str]], tmp_path: Path
) -> None:
    height, width, num_frames = CASE.size

    def make() -> None:
        with on_demand(pipe, DEVICE):
            teach(pipe, recipe_for(pipe), ["a cat"], tmp_path, height, width, num_frames, steps=2)

    make()
    assert all(len(parts) == 1 for parts in seen[1:])
    assert {"transformer", "text_encoder"} <= set.union(*seen[1:])
    del seen[1:]
    make()
    assert seen == [set()]


def test_a_part_that_is_elsewhere_comes_back_after_an_error(
    pipe: Any, seen: list[set[str]]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), on_demand(pipe, DEVICE):
        CASE.run(pipe, "a cat")
    check_over(pipe, seen)


def test_parts_move_for_real() -> None:
    part = torch.nn.Linear(2, 2)
    assert not placement.move(part, DEVICE)
    assert placement.move(part, torch.device("meta"))
    assert part.weight.device.type == "meta"
    assert not placement.move(torch.nn.Identity(), DEVICE)
