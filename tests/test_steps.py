"""Parameters and methods that differ from step to step of a denoising run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import pytest
import tiny_wan
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import (
    BlockTopKAttn,
    DenseAttn,
    GNAAttn,
    LVSAAttn,
    Method,
    RadialAttn,
    SolAttn,
    TokenGrid,
)
from diffattn.schedule import PerStep

ALL_SPARSE: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
GRID = TokenGrid(5, 6, 5)
TOP = BlockTopKAttn(keep=[1, 0.5, 0.5, 0.2], block=16, **ALL_SPARSE)
WINDOW = GNAAttn(window=PerStep((5, 5, 5), (3, 3, 3), (5, 5, 5), (1, 3, 3)), stride=1, **ALL_SPARSE)
RADIAL = RadialAttn(
    decay_factor=[1.0, 0.0, 1.0, 0.0], split_threshold=8, block_size=4, **ALL_SPARSE
)
ROTATING = LVSAAttn(window=1, first_frames=1, period=2, phase="rotate", **ALL_SPARSE)


@dataclass(frozen=True, kw_only=True)
class InTurns(Method):
    """Another class of method in each step."""

    type: ClassVar[str] = "in-turns"
    chosen: ClassVar[tuple[Method, ...]] = (
        DenseAttn(),
        GNAAttn(window=(3, 3, 3), stride=1, **ALL_SPARSE),
        BlockTopKAttn(keep=0.2, block=16, **ALL_SPARSE),
        SolAttn(tau=0.5, block=16, **ALL_SPARSE),
    )
    differs_by_step: ClassVar[bool] = True  # type: ignore[assignment]

    def at_step(self, step: int, steps: int) -> Method:
        return self.chosen[step if steps else -1]

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        return replace(self, **ALL_SPARSE)

    def attend(self, *_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("the method of a step attends")


METHODS = {
    "content": TOP, "mask": WINDOW, "radial": RADIAL, "rotating": ROTATING,
    "classes": InTurns(**ALL_SPARSE),
}  # fmt: skip


def inputs(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(2, 16, 5, 12, 10, generator=generator),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }


def pipeline() -> Any:
    return tiny_wan.PIPELINES["t2v"]()


def walk(pipe: Any, call: Callable[[int], Any], steps: int = 4) -> list[Any]:
    """A run of `steps` steps; `call` is called with the number of each, as by a pipeline."""
    pipe.scheduler.set_timesteps(steps)
    out = []
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        out.append(call(step))
        sample = torch.zeros(1, 16, 1, 2, 2)
        pipe.scheduler.step(sample, timestep, sample)
    return out


def alone(method: Method, step: int, steps: int = 4) -> torch.Tensor:
    """The denoiser's output under the method of a step, attached to the denoiser alone."""
    model = tiny_wan.transformer()
    of_step = method.at_step(step, steps)
    if not of_step.is_dense:
        diffattn.set_attn_processor(model, of_step)
    with torch.no_grad():
        return model(**inputs(step))[0]


@pytest.mark.parametrize("name", METHODS)
def test_each_step_of_a_run_has_its_own_values(name: str) -> None:
    pipe = pipeline()
    pipe.set_attn_processor(METHODS[name])
    for _ in range(2):  # the second run begins anew
        with torch.no_grad():
            got = walk(pipe, lambda step: pipe.transformer(**inputs(step))[0])
        for step, out in enumerate(got):
            torch.testing.assert_close(out, alone(METHODS[name], step), rtol=1e-5, atol=1e-5)


def test_two_calls_of_a_step_see_one_step() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(TOP)
    seen = walk(
        pipe,
        lambda step: [
            (pipe.transformer(**inputs(step)), attachment.models["transformer"].groups[0].method)[1]
            for _ in range(2)
        ],
    )
    assert [first is second for first, second in seen] == [True] * 4
    assert [first.keep for first, _ in seen] == [1, 0.5, 0.5, 0.2]


def test_a_share_of_1_is_a_dense_step() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(TOP)
    walk(pipe, lambda step: pipe.transformer(**inputs(step)))
    assert attachment.dense_calls == tiny_wan.LAYERS
    assert attachment.sparse_calls == 3 * tiny_wan.LAYERS


def test_dense_steps_are_combined_with_the_list() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(replace(TOP, dense_steps=2, last_dense_steps=1))
    walk(pipe, lambda step: pipe.transformer(**inputs(step)))
    assert attachment.sparse_calls == tiny_wan.LAYERS


def test_outside_of_a_run_the_last_value_holds() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(TOP)
    assert attachment is not None
    attachment.leave_run()
    with torch.no_grad():
        out = pipe.transformer(**inputs(3))[0]
    torch.testing.assert_close(out, alone(TOP, 3), rtol=1e-5, atol=1e-5)


def test_a_list_for_another_number_of_steps_is_refused_before_any_attention() -> None:
    pipe = pipeline()
    attachment = pipe.set_attn_processor(replace(TOP, dense_steps=1))
    with pytest.raises(
        ValueError, match="keep has 4 values, one a step, but the run has 7 steps: give 7 values"
    ):
        walk(pipe, lambda step: pipe.transformer(**inputs(step)), steps=7)
    assert attachment.dense_calls == attachment.sparse_calls == 0


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("name", METHODS)
def test_compiled_code_serves_all_steps(name: str, how: str) -> None:
    torch._dynamo.reset()
    pipe = pipeline()
    pipe.set_attn_processor(METHODS[name])
    counter = CompileCounterWithBackend("aot_eager")
    call: Any = pipe.transformer
    if how == "whole":
        call = torch.compile(call, fullgraph=True, backend=counter)
    else:
        call.compile_repeated_blocks(fullgraph=True, backend=counter)
    with torch.no_grad():
        got = walk(pipe, lambda step: call(**inputs(step))[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            again = walk(pipe, lambda step: call(**inputs(step))[0])
    dense_steps = any(METHODS[name].at_step(step, 4).is_dense for step in range(4))
    assert counter.frame_count == 1 + dense_steps
    for step, out in enumerate(got):
        torch.testing.assert_close(out, alone(METHODS[name], step), rtol=1e-5, atol=1e-5)
        assert torch.equal(out, again[step])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["content", "mask", "classes"])
def test_gradients_are_those_of_the_step_of_their_forward(
    name: str, checkpointing: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    pipe = pipeline()
    pipe.set_attn_processor(METHODS[name])
    call: Any = pipe.transformer
    if checkpointing:
        call.enable_gradient_checkpointing()
        call.train()
    if compiled:
        call.compile_repeated_blocks(backend="aot_eager")
    # Step 1 is run, the clock moves on, and then the gradients are asked for.
    arguments = inputs(1)
    arguments["hidden_states"].requires_grad_()
    out = walk(pipe, lambda step: call(**arguments)[0] if step == 1 else None)[1]
    out.sum().backward()
    got = arguments["hidden_states"].grad

    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, METHODS[name].at_step(1, 4))
    arguments = inputs(1)
    arguments["hidden_states"].requires_grad_()
    model(**arguments)[0].sum().backward()
    torch.testing.assert_close(got, arguments["hidden_states"].grad, rtol=1e-4, atol=1e-4)
