"""Every family in a whole pipeline: exact, complete, restored, and on the grid foretold."""

from typing import Any

import pytest
import stock
import torch
from tiny_pipelines import PIPELINES, PipelineCase

from diffattn import DenseAttn
from diffattn.models import denoisers, family_of, pipeline_grid, size_rules

STEPS = 2


@pytest.fixture(params=PIPELINES)
def case(request: pytest.FixtureRequest) -> PipelineCase:
    return PIPELINES[request.param]


def only_denoiser(pipe: Any) -> torch.nn.Module:
    (model,) = denoisers(pipe).values()
    return model


def test_pipelines_are_exact_and_complete(case: PipelineCase) -> None:
    pipe = case.build()
    model = only_denoiser(pipe)
    want = case.run(pipe)
    calls = STEPS * case.forwards * len(family_of(model).layers(model))

    dense = pipe.set_attn_processor(DenseAttn())
    torch.testing.assert_close(case.run(pipe), want, atol=1e-4, rtol=1e-3)
    assert dense.sparse_calls == calls

    sparse = pipe.set_attn_processor(stock.NEARBY)
    assert not torch.allclose(case.run(pipe), want, atol=1e-3)
    assert sparse.sparse_calls == calls
    assert sparse.dense_calls == 0

    pipe.set_attn_processor(None)
    assert torch.equal(case.run(pipe), want)


def test_pipeline_grid_is_the_grid_of_the_call(case: PipelineCase) -> None:
    pipe = case.build()
    recorder = stock.Recording()
    pipe.set_attn_processor(recorder)
    for factor in (1, 2):
        height, width, frames = case.size
        size = (height, width * factor, frames)
        recorder.calls.clear()
        case.run(pipe, size=size)
        seen = {(s.grid.frames, s.grid.height, s.grid.width) for s, _ in recorder.calls}
        grid = pipeline_grid(pipe, *size)
        assert max(seen) == (grid.frames, grid.height, grid.width)


def test_sizes_between_are_refused(case: PipelineCase) -> None:
    pipe = case.build()
    height, width, frames = case.size
    with pytest.raises(ValueError, match=r"height is .* but this model needs a multiple of"):
        pipeline_grid(pipe, height + 4, width, frames)
    if size_rules(pipe).frame_stride == 1:
        with pytest.raises(ValueError, match="num_frames is 0"):
            pipeline_grid(pipe, height, width, 0)
    elif frames == 1:
        with pytest.raises(ValueError, match="num_frames is 2, but this model makes images"):
            pipeline_grid(pipe, height, width, 2)
    else:
        with pytest.raises(ValueError, match=rf"num_frames is {frames + 2}, .* or"):
            pipeline_grid(pipe, height, width, frames + 2)
