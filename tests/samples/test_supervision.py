from dataclasses import replace
from typing import Any

import pytest
import torch

from diffattn.samples.moving_shapes.batches import Batch, Mixing, draw_batch
from diffattn.samples.moving_shapes.captions import Scene, split_scenes
from diffattn.samples.moving_shapes.model import ModelSize, make_transformer
from diffattn.samples.moving_shapes.supervision import DeepSupervision, _word_numbers

SCENES = split_scenes()[0]
SIZE = ModelSize(heads=1, head_dim=24, layers=3, ffn_dim=32)


def drawn(caption_drop: float = 0.0) -> tuple[Batch, list[Scene]]:
    choices, noise = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    batch = draw_batch(SCENES, 12, 2, Mixing(caption_drop), choices, noise)
    return batch, [SCENES[pick] for pick in batch.picks.tolist()]


def call(transformer: Any, batch: Batch) -> None:
    text = torch.zeros(len(batch.sigma), 4, 64)
    transformer(batch.noisy, batch.sigma * 1000, text, return_dict=False)


def test_the_last_block_but_one_is_read() -> None:
    transformer = make_transformer(SIZE)
    supervision = DeepSupervision(transformer)
    seen: list[torch.Tensor] = []
    transformer.blocks[1].register_forward_hook(lambda block, inputs, out: seen.append(out))
    call(transformer, drawn()[0])
    assert supervision.hidden is seen[0]


def test_supervision_before_the_first_call_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not been called yet"):
        DeepSupervision(make_transformer(SIZE)).losses(*drawn(), contested_weight=0.0)


def test_outlines_lie_in_the_order_of_the_tokens() -> None:
    transformer = make_transformer(SIZE)
    supervision = DeepSupervision(transformer)
    maps = torch.randn(2, 3, 4, 8, 6)
    with torch.no_grad():
        weight = transformer.patch_embedding.weight.zero_()
        transformer.patch_embedding.bias.zero_()
        for kind in range(3):
            for row in range(2):
                for column in range(2):
                    weight[4 * kind + 2 * row + column, kind, 0, row, column] = 1
        # The transformer's own way from latents to tokens.
        expected = transformer.patch_embedding(maps).flatten(2).transpose(1, 2)[..., :12]
    torch.testing.assert_close(supervision._tokens(maps).flatten(2), expected)


def test_right_outlines_cost_nothing_and_contested_latents_cost_more() -> None:
    supervision = DeepSupervision(make_transformer(SIZE))
    batch, scenes = drawn()
    tokens = supervision._tokens(batch.covers)
    supervision.hidden = torch.zeros(*tokens.shape[:2], 24)
    with torch.no_grad():
        supervision.outlines.weight.zero_()
        supervision.outlines.bias.zero_()
    _, plain = supervision.losses(batch, scenes, contested_weight=0.0)
    assert plain.item() == pytest.approx(batch.covers.square().mean().item(), rel=1e-5)
    _, weighted = supervision.losses(batch, scenes, contested_weight=1.0)
    extra = (batch.covers.square() * batch.contested[:, None]).mean()
    assert weighted.item() == pytest.approx((plain + extra).item(), rel=1e-5)


def test_words_are_learnt_from_hidden_states_that_hold_them() -> None:
    torch.manual_seed(0)
    supervision = DeepSupervision(make_transformer(SIZE))
    batch, scenes = drawn()
    numbers = _word_numbers(scenes, torch.device("cpu"))
    codes = torch.randn(4, 6, 24)
    held = sum(codes[word][numbers[word]] for word in range(4))
    supervision.hidden = held[:, None].expand(-1, 5, -1)
    batch_of_five = batch_with_tokens(batch)
    optimiser = torch.optim.Adam(supervision.words.parameters(), lr=0.05)
    for _ in range(200):
        words, _ = supervision.losses(batch_of_five, scenes, 0.0)
        optimiser.zero_grad()
        words.backward()
        optimiser.step()
    assert words < 0.05
    # Another caption is then read as wrong.
    wrong, _ = supervision.losses(batch_of_five, scenes[::-1], 0.0)
    assert wrong > 1


def batch_with_tokens(batch: Batch) -> Batch:
    """The batch with covers of five tokens a clip."""
    return replace(batch, covers=batch.covers[..., :1, :2, :10])


def test_clips_without_a_caption_ask_for_no_words() -> None:
    torch.manual_seed(0)
    transformer = make_transformer(SIZE)
    supervision = DeepSupervision(transformer)
    batch, scenes = drawn(caption_drop=1.0)
    call(transformer, batch)
    words, outlines = supervision.losses(batch, scenes, 0.0)
    assert words == 0
    assert outlines > 0
