"""What is drawn for a sample: the shares that the settings say, whatever else is drawn."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_training
import torch

from diffattn.lora.draws import draw_batch
from diffattn.lora.losses import Batch
from diffattn.lora.recipes import Recipe

# The rule of a recipe without one of its own.
TOLD: Any = partial(Recipe.told, None)  # type: ignore[arg-type]
TEXT = tiny_training.EMPTY["prompt_embeds"].shape


def drawn(caption_dropout: float, numbers: range, **changes: Any) -> Batch:
    """Samples of small clips, whose text is 1 in its first number."""
    clips = tiny_training.clips(3, (2, 1, 2, 2))
    for clip in clips:
        clip["conditions"]["prompt_embeds"][0, 0] = 1
    recipe: Any = SimpleNamespace(
        sample_times=lambda scheduler, count, generator, size, shift, levels: torch.rand(
            count, generator=generator
        ),
        told=TOLD,
    )
    settings = tiny_training.settings(caption_dropout=caption_dropout, **changes)
    return draw_batch(clips, tiny_training.EMPTY, recipe, None, settings, numbers)


def is_dropped(batch: Batch) -> torch.Tensor:
    text = batch.conditions["prompt_embeds"]
    assert text.shape[1:] == TEXT
    dropped = (text == 0).flatten(1).all(1)
    assert torch.equal(dropped, text[:, 0, 0] != 1), "a caption is there as a whole or not at all"
    return dropped


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_as_many_captions_are_dropped_as_the_settings_say(share: float) -> None:
    dropped = is_dropped(drawn(share, range(2000)))
    # Four standard deviations of a binomial distribution.
    deviation = (share * (1 - share) / len(dropped)) ** 0.5
    assert dropped.double().mean().item() == pytest.approx(share, abs=4 * deviation)


def test_no_caption_is_dropped_unasked() -> None:
    assert not is_dropped(drawn(0, range(2000))).any()


def test_a_dropped_caption_changes_nothing_else() -> None:
    with_text, without = drawn(0, range(20)), drawn(0.9, range(20))
    assert is_dropped(without).any()
    for name in ("latents", "noise", "times"):
        assert torch.equal(getattr(with_text, name), getattr(without, name))


def test_a_sample_is_the_same_in_any_batch() -> None:
    whole = is_dropped(drawn(0.5, range(40)))
    parts = [is_dropped(drawn(0.5, range(start, start + 8))) for start in range(0, 40, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(is_dropped(drawn(0.5, range(40), seed=5)), whole)


def test_a_dropped_caption_leaves_the_rate_of_its_clip() -> None:
    clips = tiny_training.clips(3, (2, 1, 2, 2))
    for number, clip in enumerate(clips):
        clip["conditions"]["frame_rate"] = torch.tensor(10.0 + number)
    recipe: Any = SimpleNamespace(sample_times=lambda *_: torch.zeros(1), told=TOLD)
    settings = tiny_training.settings(caption_dropout=0.5)
    batch = draw_batch(clips, tiny_training.EMPTY, recipe, None, settings, range(300))
    dropped = (batch.conditions["prompt_embeds"] == 0).flatten(1).all(1)
    rates = batch.conditions["frame_rate"]
    assert 100 < dropped.sum() < 200
    # Each clip is a third of the samples.
    for part in (rates[dropped], rates[~dropped]):
        assert set(part.tolist()) == {10.0, 11.0, 12.0}
