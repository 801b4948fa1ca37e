"""SVG2Attn goes on from the clusters of the step before, in a run and nowhere else."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import tiny_wan
import torch
from cluster_truth import SMALL, truth
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import SVG2Attn, TokenGrid
from diffattn.methods import svg2
from diffattn.methods.base import Site
from diffattn.methods.memory import RunMemory
from diffattn.routing.clusters import k_means

METHOD = SVG2Attn(**SMALL, dense_layers=0, dense_steps=0)
GRID = TokenGrid(3, 5, 7, text_before=5, text_after=9)


class Watched:
    """The numbers of iterations of the calls of k-means."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.iterations: list[int] = []
        real = k_means

        def watched(x: Any, start: Any, iterations: int, counted: Any = None) -> Any:
            self.iterations.append(iterations)
            return real(x, start, iterations, counted)

        monkeypatch.setattr(svg2, "k_means", watched)

    def taken(self) -> list[int]:
        """The iterations of the calls since the last look."""
        out, self.iterations = self.iterations, []
        return out


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def site(memory: RunMemory, step: int, grid: TokenGrid = GRID, steps: int = 9) -> Site:
    return Site("wan", 5, 10, grid, memory=memory.of_call(0, step, steps))


@pytest.mark.parametrize("remainder", ["drop", "summary"])
@pytest.mark.parametrize("references", ["visible", "local"])
def test_a_later_step_starts_from_the_clusters_before(remainder: str, references: str) -> None:
    torch.manual_seed(0)
    method = replace(METHOD, remainder=remainder, references=references)
    grid = TokenGrid(3, 5, 8, 5, 90, references=(diffattn.Reference(5 + 120 + 4, 2, 5, 8),))
    memory = RunMemory()
    first = torch.randn(3, 2, grid.tokens, 2, 8)
    later = first + torch.randn_like(first) / 10
    out = method.attend(*first, site(memory, 3, grid))
    torch.testing.assert_close(out, method.attend(*first, Site("wan", 5, 10, grid)))
    cold = method.selection(*first, Site("wan", 5, 10, grid))
    # Two steps later: a step cache has left one out.
    out = method.attend(*later, site(memory, 5, grid))
    pools = method._pools_of(grid, torch.device("cpu"))
    kept = svg2._Kept(grid, cold.centroids)
    clustered = method._clustered(later[0], later[1], pools, None, kept)
    pairs = clustered.pairs(method._chosen(later[1], later[2], pools, clustered, None)[0])
    for number, pool in enumerate(pools):
        for x, start, labels, offset in (
            (later[0], cold.centroids[2 * number], pairs.query_labels, pool.queries.start),
            (later[1], cold.centroids[2 * number + 1], pairs.key_labels, pool.keys.start),
        ):
            want = k_means(x[:, pool.places], start, 2).labels
            assert torch.equal(labels[:, :, pool.places] - offset, want)
    want = truth(*later, pairs, remainder == "summary")
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)
    assert not torch.equal(
        pairs.key_labels, method.selection(*later, Site("wan", 5, 10, grid)).key_labels
    )


def test_clusters_that_have_converged_stay(watched: Watched) -> None:
    torch.manual_seed(0)
    method, memory = replace(METHOD, iterations=60), RunMemory()
    x = torch.randn(3, 1, GRID.tokens, 2, 8)
    outs = [method.attend(*x, site(memory, step)) for step in range(3)]
    assert watched.taken() == [60, 60, 2, 2, 2, 2]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2])


def test_each_call_of_guidance_has_its_own(watched: Watched) -> None:
    torch.manual_seed(0)
    both = torch.randn(2, 3, 1, GRID.tokens, 2, 8)

    def run(calls: list[int]) -> list[torch.Tensor]:
        memory = RunMemory()
        return [
            METHOD.attend(*(both[n] * (1 + step / 10)), site(memory, step))
            for step in range(3)
            for n in calls
        ]

    together = run([0, 1])
    assert watched.taken() == [4] * 4 + [2] * 8
    assert all(map(torch.equal, together[::2], run([0])))
    assert all(map(torch.equal, together[1::2], run([1])))


@pytest.mark.parametrize(
    "other",
    [
        {"grid": TokenGrid(3, 7, 5, 5, 9)},
        {"grid": replace(GRID, text_before=4, text_after=10)},
        {"batch": 2},
        {"heads": 3},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_other_tensors_start_anew(other: dict[str, Any], watched: Watched) -> None:
    memory = RunMemory()
    METHOD.attend(*torch.randn(3, 1, GRID.tokens, 2, 8), site(memory, 0))
    shape = {"batch": 1, "heads": 2, "head_dim": 8, "grid": GRID} | other
    grid = shape["grid"]
    x = torch.randn(3, shape["batch"], grid.tokens, shape["heads"], shape["head_dim"])
    METHOD.attend(*x, site(memory, 1, grid))
    assert watched.taken() == [4] * 4
    METHOD.attend(*x, site(memory, 2, grid))
    assert watched.taken() == [2] * 2


def test_without_warm_iterations_nothing_is_kept(watched: Watched) -> None:
    memory, cold = RunMemory(), replace(METHOD, warm_iterations=0)
    for step in range(2):
        cold.attend(*torch.randn(3, 1, GRID.tokens, 2, 8), site(memory, step))
    assert watched.taken() == [4] * 4
    assert memory.of_call(0, 2, 9).recall() is None
    with pytest.raises(ValueError, match="warm_iterations is -1, but must be an integer of at lea"):
        SVG2Attn(warm_iterations=-1)


def test_what_is_kept_has_the_dtype_of_the_tokens_and_goes_with_the_last_step() -> None:
    memory = RunMemory()
    x = torch.randn(3, 1, GRID.tokens, 2, 8).bfloat16()
    METHOD.attend(*x, site(memory, 0, steps=3))
    kept = memory.of_call(0, 1, 3).recall()
    assert {part.dtype for part in kept.centroids} == {torch.bfloat16}
    assert not any(part.requires_grad for part in kept.centroids)
    METHOD.attend(*x, site(memory, 2, steps=3))
    assert memory.of_call(0, 3, 9).recall() is None


def test_a_caller_that_never_steps_its_scheduler_fills_no_memory() -> None:
    memory = RunMemory()
    made = [memory.of_call(0, 0, 9) for _ in range(100)]
    assert sum(call is not None for call in made) == 8


def attached(method: SVG2Attn = METHOD) -> Any:
    pipe = tiny_wan.PIPELINES["t2v"]()
    pipe.set_attn_processor(method)
    return pipe


def test_a_run_goes_on_and_the_next_run_starts_anew(watched: Watched) -> None:
    pipe = attached()
    first = tiny_wan.run(pipe, steps=3)
    # Two calls of guidance at each site, and k-means of queries and of keys in each.
    of_step = tiny_wan.LAYERS * 2 * 2
    assert watched.taken() == [4] * of_step + [2] * 2 * of_step
    other = tiny_wan.run(pipe, steps=3, num_frames=5)
    assert watched.taken() == [4] * of_step + [2] * 2 * of_step
    assert torch.equal(tiny_wan.run(pipe, steps=3), first)
    assert torch.equal(tiny_wan.run(attached(), steps=3, num_frames=5), other)
    copied = copy.deepcopy(pipe)
    assert torch.equal(tiny_wan.run(copied, steps=3), first)
    cold = attached(replace(METHOD, warm_iterations=0))
    assert not torch.equal(tiny_wan.run(cold, steps=3), first)


def test_parameters_that_differ_by_step_go_on_from_the_same_clusters(watched: Watched) -> None:
    pipe = attached(replace(METHOD, top_p=[0.4, 0.5, 0.6]))
    tiny_wan.run(pipe, steps=3, guidance_scale=1.0)
    of_step = tiny_wan.LAYERS * 2
    assert watched.taken() == [4] * of_step + [2] * 2 * of_step


def test_dense_steps_come_before_the_first_clusters(watched: Watched) -> None:
    tiny_wan.run(attached(replace(METHOD, dense_steps=1)), steps=3, guidance_scale=1.0)
    of_step = tiny_wan.LAYERS * 2
    assert watched.taken() == [4] * of_step + [2] * of_step


def test_outside_of_a_run_and_in_training_each_call_starts_anew(watched: Watched) -> None:
    pipe = attached()
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 12, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, tiny_wan.TEXT_DIM),
    }
    with torch.no_grad():
        for _ in range(2):
            pipe.transformer(**inputs)
    assert set(watched.taken()) == {4}
    pipe.scheduler.set_timesteps(3)
    pipe.transformer.enable_gradient_checkpointing()
    for _ in range(2):
        pipe.transformer(**inputs).sample.square().mean().backward()
    assert set(watched.taken()) == {4}


@pytest.mark.parametrize("how", ["whole", "repeated blocks"])
def test_compiled_code_remembers_and_is_not_compiled_anew(how: str, watched: Watched) -> None:
    want = tiny_wan.run(attached(), steps=4)
    runs = watched.taken()
    counts = []
    for method in (None, METHOD):
        pipe = tiny_wan.PIPELINES["t2v"]()
        if method is not None:
            pipe.set_attn_processor(method)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        options = {"fullgraph": True, "dynamic": True, "backend": counter}
        if how == "whole":
            pipe.transformer.compile(**options)
        else:
            pipe.transformer.compile_repeated_blocks(**options)
        out = tiny_wan.run(pipe, steps=4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(tiny_wan.run(pipe, steps=4), out)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    assert watched.taken() == runs * 2
    torch.testing.assert_close(out, want)


def test_runs_in_threads_do_not_mix() -> None:
    sizes = [(96, 64, 9), (64, 96, 9), (64, 64, 13)]
    pipe = attached()
    alone = [tiny_wan.run(pipe, *size, steps=3) for size in sizes]

    def render(size: tuple[int, int, int]) -> torch.Tensor:
        # A pipeline has one scheduler, the denoiser is shared.
        other = type(pipe)(
            **{**pipe.components, "scheduler": copy.copy(tiny_wan.PIPELINES["t2v"]().scheduler)}
        )
        return tiny_wan.run(other, *size, steps=3)

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(render, sizes))
    assert all(map(torch.equal, together, alone))


def test_taking_the_method_off_leaves_no_trace() -> None:
    pipe = attached()
    tiny_wan.run(pipe, steps=2)
    pipe.set_attn_processor(None)
    for module in pipe.transformer.modules():
        assert not any("diffattn" in name for name in vars(module))
