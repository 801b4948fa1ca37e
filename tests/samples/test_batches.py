from dataclasses import replace

import pytest
import torch

from diffattn.samples.moving_shapes.batches import LEAST_SWAP_LEVEL, Batch, Mixing, draw_batch
from diffattn.samples.moving_shapes.captions import SHAPES, Scene, split_scenes
from diffattn.samples.moving_shapes.clips import draw_geometry, render
from diffattn.samples.moving_shapes.vae import clip_latents

SCENES = split_scenes()[0]


def drawn(mixing: Mixing, batch: int = 24, frames: int = 3) -> Batch:
    choices, noise = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    return draw_batch(SCENES, batch, frames, mixing, choices, noise)


def clean_latents(batch: Batch, scenes: list[Scene]) -> torch.Tensor:
    geometry = draw_geometry(len(scenes), torch.Generator().manual_seed(2))
    return clip_latents(render(scenes, geometry, batch.frames))


def captioned(batch: Batch) -> list[Scene]:
    return [SCENES[pick] for pick in batch.picks.tolist()]


def distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first - second).abs().amax(dim=(1, 2, 3, 4))


@pytest.mark.parametrize("swap", [0.0, 0.5, 1.0])
def test_the_target_leads_to_the_captioned_shape(swap: float) -> None:
    batch = drawn(Mixing(swap=swap))
    level = batch.sigma.view(-1, 1, 1, 1, 1)
    clean = clean_latents(batch, captioned(batch))
    torch.testing.assert_close(batch.noisy - level * batch.target, clean, atol=1e-4, rtol=0)


def test_swapped_clips_show_another_shape_at_high_noise() -> None:
    batch, plain = drawn(Mixing(caption_drop=0.3, swap=1.0)), drawn(Mixing(0.3, swap=0.0))
    assert torch.equal(batch.picks, plain.picks)
    assert 0 < batch.dropped.sum() < len(batch.dropped)
    # The noise itself is the same, so the shown clips differ by the swap alone.
    level = batch.sigma.view(-1, 1, 1, 1, 1)
    gaussian = plain.target + clean_latents(plain, captioned(plain))
    shown = (batch.noisy - level * gaussian) / (1 - level)
    right = clean_latents(batch, captioned(batch))
    moved = distance(shown, right)
    assert bool((moved[batch.dropped] < 1e-3).all())
    assert torch.equal(batch.sigma[batch.dropped], plain.sigma[batch.dropped])
    assert bool((moved[~batch.dropped] > 0.01).all())
    assert bool((batch.sigma[~batch.dropped] >= LEAST_SWAP_LEVEL).all())
    # What is shown lies between the captioned shape and one of the other two.
    for turn in (1, 2):
        others = [
            replace(scene, shape=SHAPES[(SHAPES.index(scene.shape) + turn) % 3])
            for scene in captioned(batch)
        ]
        other = clean_latents(batch, others) - right
        share = ((shown - right) * other).sum(dim=(1, 2, 3, 4)) / other.square().sum(
            dim=(1, 2, 3, 4)
        )
        rest = distance(shown - right, share.view(-1, 1, 1, 1, 1) * other)
        matching = rest < 1e-2
        assert 0 < matching[~batch.dropped].sum() < (~batch.dropped).sum()
        assert bool((share[matching & ~batch.dropped] > 0).all())
        assert bool((share[matching] < 1.001).all())


def test_covers_tell_where_the_shapes_differ() -> None:
    batch = drawn(Mixing(), batch=6)
    white = [replace(s, colour="white", background="black") for s in captioned(batch)]
    for index, shape in enumerate(SHAPES):
        latents = clean_latents(batch, [replace(scene, shape=shape) for scene in white])[:, 0]
        low, high = latents.amin(), latents.amax()
        torch.testing.assert_close(
            batch.covers[:, index], (latents - low) / (high - low), atol=1e-4, rtol=0
        )
    contested = batch.contested
    assert contested.shape == (6, 3, 24, 24)
    assert float(contested.min()) == 0
    assert float(contested.max()) > 0.9
    # The middle of an object belongs to all shapes.
    assert 0 < contested.mean() < 0.5 * batch.covers.mean()


def test_batches_are_reproducible() -> None:
    first, second = drawn(Mixing()), drawn(Mixing())
    assert torch.equal(first.noisy, second.noisy)
    assert torch.equal(first.target, second.target)
