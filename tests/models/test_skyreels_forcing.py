"""SkyReels-V2 with diffusion forcing: blocks of frames that see no later ones."""

import threading
from typing import Any

import diffusers
import pytest
import stock
import tiny_families as tiny
import torch
from tiny_pipelines import PipelineCase, _pipeline, _prompts

import diffattn
from diffattn import CLEARAttn, DenseAttn, GNAAttn, TokenGrid, VMoBAAttn, _compat
from diffattn.methods.base import Method

SITES = ["blocks.0.attn1", "blocks.1.attn1"]
GRID = TokenGrid(4, 4, 6, causal_frames=2)


def model(frames: int = 2) -> torch.nn.Module:
    return tiny.wan_shaped("SkyReelsV2Transformer3DModel", num_frame_per_block=frames)


def inputs(frames: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": tiny.noise(2, 4, frames, 8, 12),
        "timestep": torch.arange(2 * frames).view(2, frames) * 100,
        "encoder_hidden_states": tiny.noise(2, 7, 16, seed=1),
        "enable_diffusion_forcing": True,
    }


def run(model: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def test_a_dense_method_is_the_models_own_mask() -> None:
    plain = model()
    want = run(plain, inputs())
    attachment = diffattn.set_attn_processor(plain, DenseAttn())
    torch.testing.assert_close(run(plain, inputs()), want, atol=1e-5, rtol=1e-4)
    assert (attachment.sparse_calls, attachment.dense_calls) == (2, 0)
    diffattn.set_attn_processor(plain, None)
    assert torch.equal(run(plain, inputs()), want)
    free = run(model(1), inputs())
    assert not torch.allclose(free, want, atol=1e-3), "the model's mask should matter"


@pytest.mark.parametrize(
    "method",
    [stock.NEARBY, stock.IN_TILES, GNAAttn(window=(3, 3, 3), dense_steps=0, dense_layers=0)],
    ids=["nearby", "in tiles", "gna"],
)
def test_a_sparse_method_is_the_stock_model_with_both_masks(method: Method) -> None:
    plain = model()
    dense = run(plain, inputs())
    # The model's own mask comes with its calls, the method's from a grid without blocks of frames.
    with stock.masked(plain, SITES, lambda tokens: TokenGrid(4, 4, 6), method):
        want = run(plain, inputs())
    diffattn.set_attn_processor(plain, method)
    torch.testing.assert_close(run(plain, inputs()), want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(want, dense, atol=1e-3)
    attached = diffattn.attach.attached_to(plain)
    assert attached is not None
    assert attached.grid == GRID


def test_pipelines_change_the_blocks_after_attaching() -> None:
    plain, other = model(1), model(1)
    diffattn.set_attn_processor(plain, DenseAttn())
    attached = diffattn.attach.attached_to(plain)
    assert attached is not None
    for frames, causal in ((1, 0), (2, 2), (4, 4), (1, 0)):
        plain._set_ar_attention(frames)
        other._set_ar_attention(frames)
        want = run(other, inputs())
        torch.testing.assert_close(run(plain, inputs()), want, atol=1e-5, rtol=1e-4)
        assert attached.grid == TokenGrid(4, 4, 6, causal_frames=causal)


def test_dense_steps_keep_the_models_own_mask() -> None:
    plain = model()
    want = run(plain, inputs())
    attachment = diffattn.set_attn_processor(
        plain, GNAAttn(window=3, dense_layers=9, dense_steps=0)
    )
    assert torch.equal(run(plain, inputs()), want)
    assert (attachment.sparse_calls, attachment.dense_calls) == (0, 2)


@pytest.mark.parametrize(
    "method", [CLEARAttn(radius=2, down_factor=2), VMoBAAttn(topk=2, dense_steps=0)], ids=repr
)
def test_methods_that_are_more_than_a_mask(method: Method) -> None:
    plain = model()
    diffattn.set_attn_processor(plain, method)
    message = (
        f"no block of 2 latent frames see a later one, which {method.type} .*causal_block_size=1"
    )
    with pytest.raises(ValueError, match=message):
        run(plain, inputs())


def test_compiled_code_and_gradients_keep_the_rule() -> None:
    """Autograd runs in a thread of its own, which knows no running call."""
    gradients = []
    for compiled in (False, True):
        plain = model()
        diffattn.set_attn_processor(plain, stock.IN_TILES)
        call = torch.compile(plain, backend="aot_eager") if compiled else plain
        out = call(**inputs(), return_dict=False)[0]
        thread = threading.Thread(target=out.square().mean().backward)
        thread.start()
        thread.join()
        gradients.append([p.grad for p in plain.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager, atol=1e-5, rtol=1e-3)


def test_context_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model()
    diffattn.set_attn_processor(plain, stock.NEARBY)
    monkeypatch.setattr(_compat, "context_parallel", lambda config: object())
    with pytest.raises(NotImplementedError, match="cannot be cut for context parallelism: pass"):
        run(plain, inputs())


def pipeline() -> Any:
    return _pipeline(
        "SkyReelsV2DiffusionForcingPipeline",
        transformer=model(1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )


@pytest.mark.parametrize(("ar_step", "calls"), [(0, 8), (1, 10)])
def test_a_run_with_blocks_of_frames(ar_step: int, calls: int) -> None:
    """With ar_step, one block after the other begins: the run has a model call more per block."""
    pipe = pipeline()
    given = {"prompt": None, "causal_block_size": 2, "ar_step": ar_step}
    case = PipelineCase(pipeline, lambda: _prompts(7, 7, mask=None) | given, size=(64, 96, 13))
    want = case.run(pipe, steps=4)
    dense = diffattn.set_attn_processor(pipe, DenseAttn())
    torch.testing.assert_close(case.run(pipe, steps=4), want, atol=1e-4, rtol=1e-3)
    assert (dense.sparse_calls, dense.dense_calls) == (calls * len(SITES), 0)
    method = GNAAttn(window=3, dense_steps=1, dense_layers=0)
    sparse = diffattn.set_attn_processor(pipe, method)
    assert not torch.allclose(case.run(pipe, steps=4), want, atol=1e-3)
    # Prompt and negative prompt.
    assert (sparse.sparse_calls, sparse.dense_calls) == ((calls - 2) * len(SITES), 2 * len(SITES))
    attached = diffattn.attach.attached_to(pipe.transformer)
    assert attached is not None
    assert attached.grid == GRID
