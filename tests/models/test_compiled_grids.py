"""Grids that only tensor values tell, in compiled code, which cannot read them."""

from collections.abc import Iterator

import pytest
import stock
import tiny_families as tiny
import torch

import diffattn


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_flux_compiled_for_one_shape_notices_another() -> None:
    case = tiny.CASES["flux"]
    model, inputs = case.build(), case.inputs()
    turned = inputs | {"img_ids": tiny.image_ids(9, 6)}
    diffattn.set_attn_processor(model, stock.NEARBY)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], want)
        with pytest.raises(RuntimeError, match=r"as many tokens .* but other rows and columns"):
            compiled(**turned, return_dict=False)
        want = model(**turned, return_dict=False)[0]
        torch.testing.assert_close(compiled(**turned, return_dict=False)[0], want)


def test_flux_compiled_before_its_first_call_says_what_to_do() -> None:
    inputs = tiny.CASES["flux"].inputs() | {
        "hidden_states": tiny.noise(2, 5 * 7, 16),
        "img_ids": tiny.image_ids(5, 7),
    }
    model = tiny.flux()
    diffattn.set_attn_processor(model, stock.NEARBY)
    with torch.no_grad(), pytest.raises(Exception, match="once before compiling it"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)
