"""The twins beyond what whole models show: their signatures, and when they are not used."""

import inspect
from typing import Any

import pytest
import tiny_families as tiny
import torch
from diffusers.models import attention_processor
from diffusers.models.transformers import (
    transformer_cogview4,
    transformer_cosmos,
    transformer_easyanimate,
    transformer_hidream_image,
    transformer_lumina2,
)

import diffattn
from diffattn.models import twins

HOMES = (
    attention_processor,
    transformer_cogview4,
    transformer_cosmos,
    transformer_easyanimate,
    transformer_hidream_image,
    transformer_lumina2,
)
STOCK = [
    "AllegroAttnProcessor2_0",
    "AttnProcessor2_0",
    "AuraFlowAttnProcessor2_0",
    "CogView4AttnProcessor",
    "CogVideoXAttnProcessor2_0",
    "CosmosAttnProcessor2_0",
    "EasyAnimateAttnProcessor2_0",
    "HiDreamAttnProcessor",
    "HunyuanAttnProcessor2_0",
    "JointAttnProcessor2_0",
    "Lumina2AttnProcessor2_0",
    "LuminaAttnProcessor2_0",
    "MochiAttnProcessor2_0",
]


@pytest.mark.parametrize("name", STOCK)
def test_signatures_name_what_the_stock_processors_name(name: str) -> None:
    stock = next(getattr(home, name)() for home in HOMES if hasattr(home, name))
    twin = twins.dispatching("x", stock)
    assert _named(twin) == _named(stock)


def _named(processor: Any) -> list[str]:
    parameters = inspect.signature(processor.__call__).parameters
    return [n for n, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD]


def test_processors_that_use_the_dispatch_are_kept() -> None:
    # What diffusers plans for these classes.
    moved = type("JointAttnProcessor2_0", (), {"_attention_backend": None})()
    got = twins.dispatching("x", moved)
    assert type(got) is type(moved)
    assert got is not moved


def test_each_site_has_a_twin_of_its_own() -> None:
    model = tiny.sd3()
    diffattn.set_attn_processor(model, diffattn.DenseAttn())
    processors = [block.attn.processor for block in model.transformer_blocks]
    assert len({id(processor) for processor in processors}) == len(processors)


@pytest.mark.parametrize(
    "name",
    [
        "cogvideox-5b",
        "mochi",
        "allegro",
        "sd3.5",
        "sdxl",
        "easyanimate",
        "cosmos-2",
        "hidream-wide",
        "lumina-2",
        "lumina-next",
        "cogview-4",
        "auraflow",
    ],
)
def test_bfloat16(name: str) -> None:
    """Twins round where the stock processors round: the same bits but for the attention itself."""
    case = tiny.CASES[name]
    model = case.build().to(torch.bfloat16)
    inputs = {key: _cast(value) for key, value in case.inputs().items()}
    with torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        diffattn.set_attn_processor(model, diffattn.DenseAttn(dense_layers=99))
        attached = diffattn.attach.attached_to(model)
        assert attached is not None
        got = model(**inputs, return_dict=False)[0]
    assert attached.sparse_calls == 0
    assert attached.dense_calls == len(case.sites)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def _cast(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cast(x) for key, x in value.items()}
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if is_float else value
