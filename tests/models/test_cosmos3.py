"""Cosmos 3: text attends to itself, causally; video and sound attend to all, by the method."""

from types import SimpleNamespace
from typing import Any

import pytest
import stock
import torch
from tiny_case import make, noise

import diffattn
from diffattn import CLEARAttn, DenseAttn, GNAAttn, TokenGrid
from diffattn.grid import Reference
from diffattn.methods.base import Method
from diffattn.models import family_of, pipeline_grid

SITES = ["layers.0.self_attn", "layers.1.self_attn"]
TEXT, SOUND = 5, 4
SHAPES = {"video": [(3, 4, 6)], "control": [(2, 4, 6), (3, 4, 6)]}


def model() -> torch.nn.Module:
    return make(
        "Cosmos3OmniTransformer",
        dtype="float32",
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        vocab_size=32,
        sound_dim=5,
        sound_gen=True,
        rope_axes_dim=(2, 3, 3),
    )


def inputs(kind: str) -> dict[str, Any]:
    """A call with the video alone, or with a video that controls the video before it."""
    shapes = SHAPES[kind]
    sizes = [f * h * w for f, h, w in shapes]
    end = TEXT + sum(sizes)
    target = torch.arange(end - 72, end)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(end + SOUND).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": end + SOUND,
        "vision_tokens": [noise(1, 4, f, 2 * h, 2 * w, seed=f) for f, h, w in shapes],
        "vision_token_shapes": shapes,
        "vision_sequence_indexes": torch.arange(TEXT, end),
        "vision_mse_loss_indexes": target,
        "vision_timesteps": torch.full((72,), 500.0),
        "vision_noisy_frame_indexes": [
            *[torch.arange(0) for _ in shapes[:-1]],
            torch.arange(3),
        ],
        "sound_tokens": [noise(5, SOUND, seed=7)],
        "sound_token_shapes": [(SOUND, 1, 1)],
        "sound_sequence_indexes": torch.arange(end, end + SOUND),
        "sound_mse_loss_indexes": torch.arange(end, end + SOUND),
        "sound_timesteps": torch.full((SOUND,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(SOUND)],
    }


GRIDS = {
    "video": TokenGrid(3, 4, 6, TEXT, SOUND),
    "control": TokenGrid(3, 4, 6, TEXT + 48, SOUND, references=(Reference(TEXT, 2, 4, 6),)),
}


def run(model: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        video, sound, _ = model(**given, return_dict=False)
    return torch.cat([video[-1].flatten(), sound[0].flatten()])


def last(queries: int, keys: int) -> tuple[range, ...]:
    return (range(keys - queries, keys),)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(
    "method",
    [
        stock.NEARBY,
        GNAAttn(window=(2, 3, 3), dense_steps=0, dense_layers=0),
        CLEARAttn(radius=2, frame_radius=2),
    ],
    ids=["nearby", "gna", "clear"],
)
def test_a_sparse_method_is_the_stock_model_with_that_mask(kind: str, method: Method) -> None:
    plain, given = model(), inputs(kind)
    dense = run(plain, given)
    with stock.masked(plain, SITES, lambda tokens: GRIDS[kind], method, last):
        want = run(plain, given)
    assert not torch.allclose(want, dense, atol=1e-3)
    attachment = diffattn.set_attn_processor(plain, method)
    torch.testing.assert_close(run(plain, given), want, atol=1e-5, rtol=1e-4)
    # The text's calls are causal.
    assert (attachment.sparse_calls, attachment.dense_calls) == (len(SITES), len(SITES))
    diffattn.set_attn_processor(plain, DenseAttn())
    torch.testing.assert_close(run(plain, given), dense, atol=1e-5, rtol=1e-4)
    diffattn.set_attn_processor(plain, None)
    assert torch.equal(run(plain, given), dense)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_pixel_arrives_at_the_token_that_the_grid_says(kind: str) -> None:
    plain, recorder = model(), stock.Recording()
    diffattn.set_attn_processor(plain, recorder)
    places = {"video": (-1, 0, 2, 3, 5), "control": (0, 0, 1, 2, 4)}
    run(plain, inputs(kind))
    given = inputs(kind)
    item, batch, frame, row, column = places[kind]
    given["vision_tokens"][item][batch, 1, frame, 2 * row, 2 * column] += 0.5
    run(plain, given)
    (site, before), (_, after) = recorder.calls[0], recorder.calls[len(SITES)]
    assert site.grid == GRIDS[kind]
    moved = (after - before).flatten(2).norm(dim=2)[0]
    (token,) = (moved > 0.5 * moved.max()).nonzero().flatten().tolist()
    start = {"video": site.grid.video.start, "control": TEXT}[kind]
    assert token == start + (frame * 4 + row) * 6 + column


def grid_of(**changes: Any) -> TokenGrid:
    plain = model()
    return family_of(plain).grid(plain, (), inputs("control") | changes)


def test_noise_in_several_items_or_none() -> None:
    for frames, found in ((torch.arange(1), 2), (torch.arange(0), 0)):
        message = f"has noise in {found} of its 2 vision items, by vision_noisy_frame_indexes"
        with pytest.raises(ValueError, match=message):
            grid_of(vision_noisy_frame_indexes=[frames, frames])


def test_items_apart_from_one_another() -> None:
    """Positions say where items are, also with other tokens between."""
    positions = torch.cat([torch.arange(TEXT, TEXT + 48), torch.arange(60, 60 + 72)])
    grid = grid_of(vision_sequence_indexes=positions, sequence_length=140)
    assert grid == TokenGrid(3, 4, 6, 60, 8, references=(Reference(TEXT, 2, 4, 6),))


def test_positions_that_contradict_the_shapes() -> None:
    message = (
        "vision_sequence_indexes of Cosmos3.* contradict vision_token_shapes: they place 100 tokens"
        " in 1 runs, but the shapes are 2x4x6, 3x4x6"
    )
    with pytest.raises(ValueError, match=message):
        grid_of(vision_sequence_indexes=torch.arange(TEXT, TEXT + 100))


def test_sizes_fill_half_a_patch() -> None:
    pipe = SimpleNamespace(
        transformer=model(), vae_scale_factor_spatial=16, vae_scale_factor_temporal=4
    )
    assert pipeline_grid(pipe, 720, 1280, 189) == TokenGrid(48, 23, 40)
    with pytest.raises(ValueError, match="height is 724, but this model needs a multiple of 16"):
        pipeline_grid(pipe, 724, 1280, 189)
