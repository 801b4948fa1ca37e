"""Grids that only tensor values tell, in compiled code, which cannot read them."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import stock
import tiny_families as tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import CLEARAttn, LinFusionAttn
from diffattn.methods.base import Method


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("method", [stock.NEARBY, stock.IN_TILES], ids=lambda method: method.type)
def test_flux_compiled_for_one_shape_is_right_for_another_of_as_many_tokens(method) -> None:
    case = tiny.CASES["flux"]
    model, inputs = case.build(), case.inputs()
    turned = inputs | {"img_ids": tiny.image_ids(9, 6)}
    eager = case.build()
    diffattn.set_attn_processor(eager, method)
    diffattn.set_attn_processor(model, method)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outputs = []
    with torch.no_grad():
        for given in (inputs, turned, inputs):
            outputs.append(compiled(**given, return_dict=False)[0])
            want = eager(**given, return_dict=False)[0]
            torch.testing.assert_close(outputs[-1], want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert counter.frame_count == 1


# Rows and columns of latents; no number is a number of channels.
UNET_SIZES = [(12, 20), (20, 12), (28, 36), (36, 28), (44, 12)]


def unet_outputs(method: Method | None, how: str) -> tuple[list[int], list[torch.Tensor]]:
    """The output of a U-Net for each size, and the number of graphs so far."""
    torch._dynamo.reset()
    case = tiny.CASES["sd1.5"]
    model: Any = case.build()
    diffattn.set_attn_processor(model, method)
    torch.manual_seed(3)
    for key, weight in model.named_parameters():
        if ".linfusion." in key:
            torch.nn.init.normal_(weight, std=0.1)
    counter = CompileCounterWithBackend("eager")
    if how == "whole":
        model.compile(backend=counter, fullgraph=True, dynamic=True)
    elif how == "repeated blocks":
        model.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=True)
    counts, outputs = [], []
    with torch.no_grad():
        for rows, columns in UNET_SIZES:
            latents = tiny.noise(2, 4, rows, columns)
            outputs.append(model(**case.inputs() | {"sample": latents}, return_dict=False)[0])
            counts.append(counter.frame_count)
    return counts, outputs


@functools.cache
def unet_graphs(how: str) -> list[int]:
    return unet_outputs(None, how)[0]


@pytest.mark.parametrize(
    ("method", "how"),
    [
        (stock.NEARBY, "whole"),
        (stock.NEARBY, "repeated blocks"),
        (LinFusionAttn(mid_dim=3), "repeated blocks"),
    ],
    ids=lambda value: getattr(value, "type", value),
)
def test_unets_have_as_many_graphs_over_all_sizes_as_stock(method: Method, how: str) -> None:
    """Their levels have grids of their own, which share the graphs of blocks of equal widths."""
    counts, outputs = unet_outputs(method, how)
    assert counts == unet_graphs(how)
    _, eager = unet_outputs(method, "")
    for out, want in zip(outputs, eager, strict=True):
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method",
    [LinFusionAttn(mid_dim=3), CLEARAttn(radius=2, down_factor=2)],
    ids=lambda method: method.type,
)
def test_methods_with_weights_beside_text_have_graphs_for_all_sizes(method: Method) -> None:
    """Compiled code breaks around them, and the code between is the same for all sizes."""
    case = tiny.CASES["flux"]
    eager, model = case.build(), case.build()
    for each in (eager, model):
        diffattn.set_attn_processor(each, method)
    counter = CompileCounterWithBackend("eager")
    model.single_transformer_blocks[0].compile(backend=counter, dynamic=True)
    counts = []
    with torch.no_grad():
        for rows, columns in ((9, 6), (6, 9), (10, 7), (7, 12)):
            given = case.inputs() | {
                "hidden_states": tiny.noise(2, rows * columns, model.config.in_channels),
                "img_ids": tiny.image_ids(rows, columns),
            }
            out = model(**given, return_dict=False)[0]
            counts.append(counter.frame_count)
            torch.testing.assert_close(
                out, eager(**given, return_dict=False)[0], atol=1e-5, rtol=1e-4
            )
    assert counts == counts[:1] * 4
