"""Video models with other tokens, compiled whole: as many graphs as stock, and the eager output."""

import pytest
import stock
import tiny_families as tiny
import torch

import diffattn


@pytest.mark.parametrize("name", ["cosmos-2", "minimax-h3-references", "ltx-2-key-frames"])
def test_one_graph_with_the_eager_output(name: str) -> None:
    case = tiny.CASES[name]
    model, inputs = case.build(), case.inputs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    diffattn.set_attn_processor(model, stock.IN_TILES)
    with torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = compiled(**inputs, return_dict=False)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
