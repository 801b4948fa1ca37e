"""Context parallelism in real processes, compared with one process."""

import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from parallel_worker import REFUSED, RUNS, SECONDS_TO_WAIT, MoreThanAMask
from stock import NEARBY

from diffattn import RadialAttn, TokenGrid, _compat
from diffattn.attach.context_parallel import _rows_of, _sort_parts, _unsort_parts, attend_queries
from diffattn.methods import Site

DEADLINE = 120 + SECONDS_TO_WAIT  # far more than it takes on idle processors

EACH_RUN = [(processes, name) for processes in RUNS for name in RUNS[processes]]


def launch(processes: int, folder: Path) -> list[dict[str, Any]]:
    """What each process found out."""
    worker = Path(parallel_worker.__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    logs = [folder / f"{rank}.log" for rank in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, worker, folder, str(rank), str(processes)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + DEADLINE
    try:
        codes = [process.wait(max(0, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-2000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of processes, what each found out."""
    return {n: launch(n, tmp_path_factory.mktemp(f"{n}-processes")) for n in RUNS}


@cache
def in_one_process(processes: int, name: str) -> dict[str, Any]:
    return RUNS[processes][name](False)


class TestSeveralProcesses:
    @pytest.mark.parametrize(("processes", "name"), EACH_RUN)
    def test_equal_one(self, outcomes: Any, processes: int, name: str) -> None:
        expected = in_one_process(processes, name)
        for outcome in outcomes[processes]:
            torch.testing.assert_close(outcome[name]["out"], expected["out"], atol=2e-5, rtol=0)
            assert outcome[name].keys() == expected.keys()
            assert outcome[name].get("calls") == expected.get("calls")
            if "gradients" in expected:
                torch.testing.assert_close(
                    outcome[name]["gradients"], expected["gradients"], atol=2e-4, rtol=1e-4
                )

    def test_methods_do_what_dense_attention_does_not(self) -> None:
        dense = in_one_process(2, "wan ulysses, detached")["out"]
        for name in ("wan ulysses", "wan ring", "wan ulysses, dense layer"):
            assert (in_one_process(2, name)["out"] - dense).abs().max() > 1e-3
        mask = parallel_worker.RADIAL.mask(TokenGrid(6, 5, 8))
        assert mask.density < 0.9

    @pytest.mark.parametrize(
        ("processes", "name", "message"),
        [
            (2, "no plan, hunyuanvideo", "ValueError: `cp_plan` must be provided"),
            (2, "no plan, vace", "ValueError: `cp_plan` must be provided"),
            (2, "tokens", "AssertionError: Tensor size .* must be divisible by mesh size"),
            (2, "heads", r"ValueError: 3 attention heads cannot be divided among 2 processes: cho"),
            (4, "too few heads", "ValueError: 2 attention heads are too few for 4 processes"),
            (2, "ltx ulysses, masked text", "RuntimeError: output with shape .* doesn't match the"),
            (2, "ltx ulysses, masked text, detached", "RuntimeError: output with shape .*"),
            (2, "ring, vmoba", "NotImplementedError: vmoba attention .*; use Ulysses"),
            (
                2,
                "ulysses, heads together",
                "NotImplementedError: vmoba attention with these parameters looks at all heads tog",
            ),
            (2, "ring, more than a mask", "NotImplementedError: own attention .*; use Ulysses"),
            (2, "flux ulysses, linfusion", "NotImplementedError: this call has 1 of 2 heads: linf"),
        ],
    )
    def test_refuse(self, outcomes: Any, processes: int, name: str, message: str) -> None:
        assert name in REFUSED[processes]
        for outcome in outcomes[processes]:
            assert re.match(message, outcome[name]["error"])


@pytest.mark.parametrize("method", [NEARBY, RadialAttn(rule="paper", sink=False)])
@pytest.mark.parametrize("text", [(0, 0), (9, 0), (0, 21)])
@pytest.mark.parametrize(
    "queries",
    [
        (range(0, 150),),
        (range(0, 1),),
        (range(16, 48),),
        (range(37, 101),),
        (range(149, 150),),
        (range(3, 7), range(20, 75)),
        (range(5, 9), range(9, 12)),
    ],
)
def test_some_queries_are_rows_of_the_whole(
    method: Any, text: tuple[int, int], queries: tuple[range, ...]
) -> None:
    grid = TokenGrid(5, 5, 6, *text)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, grid.tokens, 3, 8, generator=generator)
    key_mask = torch.rand(2, grid.tokens, generator=generator) < 0.8
    site = Site("wan", 0, 1, grid)
    rows = torch.cat([torch.arange(part.start, part.stop) for part in queries])
    query.requires_grad_()
    options = {"scale": 0.3, "key_mask": key_mask}
    expected = method.attend(query, key, value, site, **options)[:, rows]
    out = attend_queries(method, query[:, rows], key, value, site, queries, **options)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    weight = torch.randn(expected.shape, generator=generator)
    gradients = [torch.autograd.grad((x * weight).sum(), query)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_the_rows_of_a_layout_are_kept_for_the_next_call() -> None:
    layout = NEARBY.layout(TokenGrid(3, 4, 6), torch.device("cpu"))
    assert _rows_of(layout, (range(5, 20),)) is _rows_of(layout, (range(5, 20),))


def test_a_method_that_is_more_than_a_mask_cannot_be_cut() -> None:
    grid = TokenGrid(1, 2, 2)
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(NotImplementedError, match="own attention cannot be computed for a part"):
        attend_queries(MoreThanAMask(), x, x, x, Site("wan", 0, 1, grid), (range(4),))


@pytest.mark.parametrize("parts", [[(2, 3), (2, 3)], [(3, 2), (2, 2), (2, 2)], [(0, 4), (0, 3)]])
def test_the_order_of_ranks_is_sorted_and_put_back(parts: list[tuple[int, int]]) -> None:
    # Tokens are numbered by part and then by rank: sorted, they ascend.
    owner = [part * 10 + rank for rank, both in enumerate(parts) for part in (0, 1)]
    sizes = [size for both in parts for size in both]
    tokens = torch.tensor(owner).repeat_interleave(torch.tensor(sizes))[None]
    arranged = _sort_parts(tokens, parts)
    assert (arranged.diff() >= 0).all()
    assert torch.equal(_unsort_parts(arranged, parts), tokens)


def degrees(ring: int, ulysses: int) -> _compat.ContextParallel:
    return _compat.ContextParallel(None, None, None, ring, ulysses, 0, 0, False)


@pytest.mark.parametrize(
    ("ring", "ulysses", "backend", "masked", "exceeds"),
    [
        (1, 2, None, False, False),
        (1, 2, "native", False, False),
        (1, 2, "native", True, True),
        (1, 2, "flex", False, True),
        (2, 1, "native", False, True),
        (2, 2, AttentionBackendName.NATIVE, False, True),
        (2, 1, "flash", False, False),
        (2, 1, "flash", True, True),
    ],
)
def test_what_diffusers_own_path_can_do(
    ring: int, ulysses: int, backend: Any, masked: bool, exceeds: bool
) -> None:
    assert degrees(ring, ulysses).exceeds(backend, masked) == exceeds


class TestContract:
    """What is relied on in diffusers' private names."""

    def test_backends_of_ours_count_as_parallel(self) -> None:
        member = _compat.register_backend(lambda query, key, value, **_: query)
        assert _AttentionBackendRegistry._is_context_parallel_available(member)
        _compat.unregister_backend(member)
        assert isinstance(_AttentionBackendRegistry._supports_context_parallel, set)

    def test_processors_carry_their_parallelism(self) -> None:
        source, target = WanAttnProcessor(), WanAttnProcessor()
        _compat.share_parallelism(source, target)
        assert "_parallel_config" not in vars(target)
        source._parallel_config = object()
        _compat.share_parallelism(source, target)
        assert target._parallel_config is source._parallel_config
        _compat.share_parallelism(source, object())

    def test_models_have_plans(self) -> None:
        assert _compat.has_parallel_plan(WanTransformer3DModel)
        assert not _compat.has_parallel_plan(WanVACETransformer3DModel)
