"""Grids that only tensor values tell, in compiled code, which cannot read them."""

from collections.abc import Iterator

import pytest
import stock
import tiny_families as tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn


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
