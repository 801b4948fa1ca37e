"""Qwen-Image 2.1: text and images to edit see what is before them; the target has the method."""

import copy
import inspect
from typing import Any

import pytest
import stock
import torch
from tiny_case import make, noise

import diffattn
from diffattn import DenseAttn, TokenGrid, VMoBAAttn
from diffattn.models import family_of
from diffattn.models.twins import dispatching

EXACT = {"atol": 1e-5, "rtol": 1e-4}
SITES = ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
# 3 tokens of text, an image of 2 x 4 tokens, and 2 of text stand before the target.
TARGET = TokenGrid(1, 6, 10)
GRID = TARGET.beside(before=13)


@pytest.fixture
def model() -> torch.nn.Module:
    return make(
        "QwenImage21Transformer2DModel",
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def inputs(*, padded: bool = False, **more: Any) -> dict[str, Any]:
    slots = [[0, 0, 0, 1, 1, 0, 0] + [1] * 15]
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, -1] = False
    return {
        "hidden_states": noise(2, 8 + 60, 16),
        "encoder_hidden_states": noise(2, 7, 8, seed=1),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 4), (1, 6, 10)]] * 2,
        "img_mask": torch.tensor(slots * 2).bool(),
        "encoder_hidden_states_mask": valid if padded else None,
    } | more


def run(model: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0][:, -60:]


def cached(model: torch.nn.Module, given: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs of a step that fills the cache and of one that takes keys from there."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
    kept = module.QwenImage21KVCache(2)
    return [
        run(model, given | {"kv_cache": kept, "kv_cache_mode": mode})
        for mode in ("extract", "cached")
    ]


def masked(model: torch.nn.Module) -> Any:
    """The stock model with the boolean mask in the calls of the target."""
    mask = stock.NEARBY.mask(GRID).dense()[13:]

    def attention(plain: Any, site: str, q: Any, k: Any, v: Any, own: Any, **kwargs: Any) -> Any:
        if q.shape[-2] == 60:
            own = mask if own is None else mask & own
        return plain(q, k, v, attn_mask=own, **kwargs)

    return stock.attending_by(attention, model, SITES, some_queries=True)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_exact_sparse_and_restored(model: torch.nn.Module, padded: bool) -> None:
    given = inputs(padded=padded)
    want = [run(model, given), *cached(model, given)]
    with masked(model):
        sparse = [run(model, given), *cached(model, given)]
    before = [block.attn.processor for block in model.transformer_blocks]

    attachment = diffattn.set_attn_processor(model, DenseAttn())
    for got, expected in zip([run(model, given), *cached(model, given)], want, strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
    assert (attachment.sparse_calls, attachment.dense_calls) == (6, 0)

    attachment = diffattn.set_attn_processor(model, stock.NEARBY)
    for got, expected in zip([run(model, given), *cached(model, given)], sparse, strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
    assert (attachment.sparse_calls, attachment.dense_calls) == (6, 0)
    assert not torch.allclose(sparse[0], want[0], atol=1e-3)

    diffattn.set_attn_processor(model, None)
    assert [block.attn.processor for block in model.transformer_blocks] == before
    assert torch.equal(run(model, given), want[0])


def test_selecting_everything_is_exact(model: torch.nn.Module) -> None:
    want = cached(model, inputs())
    diffattn.set_attn_processor(model, VMoBAAttn(topk=10**6, dense_steps=0))
    for got, expected in zip(cached(model, inputs()), want, strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


def test_a_pixel_arrives_at_the_token_that_the_grid_says(model: torch.nn.Module) -> None:
    recorder = stock.Recording()
    diffattn.set_attn_processor(model, recorder)
    run(model, inputs())
    site, before = recorder.calls[0]
    assert site.grid == GRID
    for t, h, w in ((0, 0, 1), (0, 3, 0), (0, 5, 8)):
        given = copy.deepcopy(inputs())
        given["hidden_states"][0, 8 + h * 10 + w] += 0.5
        recorder.calls.clear()
        run(model, given)
        moved = (recorder.calls[0][1] - before).flatten(2).norm(dim=2)[0]
        (token,) = (moved > 0.5 * moved.max()).nonzero().flatten().tolist()
        assert tuple(int(x) for x in site.grid.coordinates(torch.tensor(token))) == (t, h, w)


def test_the_processor_for_flex_attention_has_the_same_twin(model: torch.nn.Module) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
    want = run(model, inputs())
    for block in model.transformer_blocks:
        block.attn.set_processor(module.QwenImage21FlexAttnProcessor())
    diffattn.set_attn_processor(model, DenseAttn())
    torch.testing.assert_close(run(model, inputs()), want, **EXACT)


@pytest.mark.parametrize("name", ["QwenImage21AttnProcessor", "QwenImage21FlexAttnProcessor"])
def test_the_twin_takes_what_the_stock_processors_take(name: str) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
    processor = getattr(module, name)()
    twin = dispatching("x", processor)
    assert type(twin).__name__ == "QwenImage21Twin"
    named = [list(inspect.signature(p.__call__).parameters) for p in (twin, processor)]
    assert named[0] == named[1]


def test_gradients(model: torch.nn.Module) -> None:
    gradients = []
    for ours in (False, True):
        model.zero_grad()
        if ours:
            diffattn.set_attn_processor(model, stock.NEARBY)
            model(**inputs(), return_dict=False)[0][:, -60:].square().mean().backward()
        else:
            with masked(model):
                model(**inputs(), return_dict=False)[0][:, -60:].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, atol=1e-5, rtol=1e-3, msg=name)


def test_several_layouts_in_a_batch_are_refused(model: torch.nn.Module) -> None:
    shapes = [[(1, 2, 4), (1, 6, 10)], [(1, 4, 2), (1, 6, 10)]]
    with pytest.raises(ValueError, match="QwenImage21Transformer2DModel has images of several sh"):
        family_of(model).grid(model, (), inputs(img_shapes=shapes))
