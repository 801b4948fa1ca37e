"""Wan-Animate-2: sparse where the model reads the driving video, untouched where it denoises."""

from typing import Any

import pytest
import stock
import torch
from tiny_case import make, noise
from torch.nn.attention import flex_attention

import diffattn
from diffattn import DenseAttn, TokenGrid
from diffattn.models import family_of

SITES = ["blocks.0.self_attn", "blocks.1.self_attn"]
GRID = TokenGrid(3, 4, 6)


def model() -> torch.nn.Module:
    return make(
        "WanAnimate2Transformer3DModel",
        text_len=7,
        in_dim=8,
        dim=48,
        ffn_dim=32,
        freq_dim=16,
        text_dim=16,
        out_dim=4,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )


def cache() -> Any:
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan_animate_2")
    return module.WanAnimate2KVCache(2)


def reading(kept: Any) -> dict[str, Any]:
    return {
        "hidden_states": [noise(4, 3, 8, 12)],
        "condition_latents": [noise(4, 3, 8, 12, seed=1)],
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": [noise(5, 16, seed=2)],
        "kv_cache": kept,
        "kv_cache_mode": "extract",
        "seq_len": 72,
        "offset_grid_sizes": torch.tensor([[3, 4, 6]]),
    }


def denoising(kept: Any) -> dict[str, Any]:
    return reading(kept) | {
        "hidden_states": [noise(4, 4, 8, 12, seed=3)],
        "condition_latents": [noise(4, 4, 8, 12, seed=4)],
        "kv_cache_mode": "cached",
        "seq_len": 96,
        "offset_grid_sizes": None,
        "reference_grid_sizes": torch.tensor([[3, 4, 6]]),
        "origin_len": 9,
        "origin_area": [64, 96],
    }


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0][0]


def test_reading_is_exact_and_sparse() -> None:
    plain = model()
    want = run(plain, reading(cache()))
    attachment = diffattn.set_attn_processor(plain, DenseAttn())
    torch.testing.assert_close(run(plain, reading(cache())), want)
    assert attachment.sparse_calls == len(SITES)
    diffattn.set_attn_processor(plain, None)
    with stock.masked(plain, SITES, lambda tokens: GRID, stock.NEARBY):
        masked = run(plain, reading(cache()))
    diffattn.set_attn_processor(plain, stock.NEARBY)
    sparse = run(plain, reading(cache()))
    torch.testing.assert_close(sparse, masked, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(sparse, want, atol=1e-3)
    diffattn.set_attn_processor(plain, None)
    assert torch.equal(run(plain, reading(cache())), want)


def test_a_pixel_arrives_at_the_token_that_the_grid_says() -> None:
    plain, recorder = model(), stock.Recording()
    diffattn.set_attn_processor(plain, recorder)
    run(plain, reading(cache()))
    inputs = reading(cache())
    inputs["hidden_states"][0][1, 2, 5, 8] += 0.5
    run(plain, inputs)
    (site, before), (_, after) = recorder.calls[0], recorder.calls[len(SITES)]
    assert site.grid == GRID
    moved = (after - before).flatten(2).norm(dim=2)[0]
    (token,) = (moved > 0.5 * moved.max()).nonzero().flatten().tolist()
    assert token == (2 * 4 + 2) * 6 + 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_denoising_keeps_the_models_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan_animate_2")

    def plain_block_mask(*args: Any, _compile: bool, **kwargs: Any) -> Any:
        return flex_attention.create_block_mask(*args, **kwargs)

    monkeypatch.setattr(module, "create_block_mask", plain_block_mask)
    plain, kept = model(), cache()
    run(plain, reading(kept))
    want = run(plain, denoising(kept))
    attachment = diffattn.set_attn_processor(plain, DenseAttn())
    run(plain, reading(kept))
    assert torch.equal(run(plain, denoising(kept)), want)
    assert (attachment.sparse_calls, attachment.dense_calls) == (len(SITES), 0)


def test_latents_of_several_sizes() -> None:
    inputs = reading(cache())
    inputs["hidden_states"].append(noise(4, 3, 12, 8))
    message = "has latents of sizes 3x12x8 and 3x8x12: call it once per size"
    with pytest.raises(ValueError, match=message):
        family_of(model()).grid(model(), (), inputs)
