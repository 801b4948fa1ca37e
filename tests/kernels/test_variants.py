"""Which variant of the Triton kernels a call takes, and what happens where one does not compile."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from oracles import assert_matches_eager, random_layout
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from diffattn.kernels.block_sparse import (
    backward,
    block_sparse_attention,
    forward_pass,
    gluon_forward,
)
from diffattn.kernels.block_sparse.launch import Problem
from diffattn.kernels.common import tuned, variants
from diffattn.kernels.common.launch import is_hopper
from diffattn.kernels.common.tile_tables import Choice, TileConfig
from diffattn.kernels.gather.launch import SelectionProblem

Results = tuple[torch.Tensor, torch.Tensor]
OPTIONS = {"block_q": 128, "block_kv": 64, "scale": 0.3}
KERNELS = ("forward", "queries", "keys")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variants.VARIANT_VARIABLE, raising=False)
    monkeypatch.setattr(variants, "_compiled", set())
    monkeypatch.setattr(variants, "_broken", set())
    monkeypatch.setattr(variants, "_warned", set())
    monkeypatch.setattr(variants, "_found", {})
    is_hopper.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "is_hopper", lambda device: True)


def call(
    device: str, *, partial: bool = False, head_dim: int = 16, dtype: torch.dtype = torch.float16
) -> tuple[Any, ...]:
    """Positional arguments of a forward pass."""
    layout = random_layout(140, 140, 128, 64, partial=partial).to(device)
    q, k, v = (torch.randn(1, 140, 1, head_dim).to(device, dtype) for _ in range(3))
    return q, k, v, layout.tensors, None


def tried(kernel: str, arguments: tuple[Any, ...]) -> list[str]:
    """Names of the variants that would be tried for a call, the best first."""
    problem = Problem.of(*arguments, **OPTIONS)
    return [choice.variant for choice in variants.choices(kernel, problem)]


class Ran(list[tuple[str, str]]):
    """Kernels and variants that were run, and how one of them fails."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, Callable[[], None]] = {}
        self.attempts: list[int] = []

    def run(self, kernel: str, variant: str, problem: Problem) -> None:
        if variant in self.failures:
            self.attempts.append(problem.head_dim)
            self.failures[variant]()
            raise AssertionError("did not fail")
        self.append((kernel, variant))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    log = Ran()

    def spy(module: Any, attribute: str, kernel: str) -> None:
        run = getattr(module, attribute)

        def recording(problem: Problem, *args: Any, **options: Any) -> Results:
            form = "tma" if options.get("tma") else "plain"
            log.run(kernel, form, problem)
            return run(problem, *args, **options)

        monkeypatch.setattr(module, attribute, recording)

    spy(forward_pass, "forward_by_tiles", "forward")
    spy(backward, "queries_gradient", "queries")
    spy(backward, "keys_gradient", "keys")
    return log


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)],
)
def test_hopper_is_told_by_its_capability(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert is_hopper(torch.device("cuda", 1)) == expected
    assert not is_hopper(torch.device("xpu"))
    assert not is_hopper(torch.device("cpu"))


def test_amd_gpus_are_not_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI250 is a "cuda" device of capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not is_hopper(torch.device("cuda"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.usefixtures("hopper")
def test_hopper_gpus_take_the_fastest_variant_first(kernel: str, device: str) -> None:
    assert tried(kernel, call(device)) == [
        *(["gluon"] if kernel == "forward" else []),
        "tma",
        "plain",
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param({}, "tma", id="full"),
        pytest.param({"partial": True}, "tma", id="partial"),
        pytest.param({"dtype": torch.float32}, "plain", id="float32"),
        pytest.param({"head_dim": 20}, "plain", id="odd-head-dim"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_a_call_takes_what_suits_it(
    kind: dict[str, Any], expected: str, device: str, ran: Ran
) -> None:
    forward_pass.forward(*call(device, **kind), **OPTIONS)
    assert ran == [("forward", expected)]


def test_other_gpus_take_the_plain_variant(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "is_hopper", lambda device: False)
    for kernel in KERNELS:
        assert tried(kernel, call(device)) == ["plain"]


@pytest.mark.parametrize(
    ("asked", "forward", "queries", "keys"),
    [
        ("plain", ["plain"], ["plain"], ["plain"]),
        ("tma", ["tma", "plain"], ["tma", "plain"], ["tma", "plain"]),
        ("gluon", ["gluon", "tma", "plain"], ["tma", "plain"], ["tma", "plain"]),
    ],
)
@pytest.mark.parametrize("on_hopper", [False, True])
def test_the_environment_decides(
    asked: str, forward: list[str], queries: list[str], keys: list[str], on_hopper: bool,
    device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(variants, "is_hopper", lambda device: on_hopper)
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", asked)
    arguments = call(device)
    assert [tried(kernel, arguments) for kernel in ("forward", "queries", "keys")] == [
        forward, queries, keys,
    ]  # fmt: skip


def test_choices_are_found_once_for_a_kind_of_call_in_an_environment(
    device: str, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    choices = variants.choices

    def counted(kernel: str, of: Problem) -> list[Choice]:
        found.append(of.head_dim)
        return choices(kernel, of)

    monkeypatch.setattr(variants, "choices", counted)
    for head_dim, asked in ((16, "tma"), (16, "tma"), (32, "tma"), (16, "plain"), (16, "tma")):
        monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", asked)
        forward_pass.forward(*call(device, head_dim=head_dim), **OPTIONS)
    assert found == [16, 32, 16]
    assert ran == [("forward", form) for form in ("tma", "tma", "tma", "plain", "tma")]


def test_unknown_variant(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", "cuda")
    with pytest.raises(
        ValueError,
        match=(
            r"^DIFFATTN_TRITON_VARIANT is 'cuda';"
            r" choose from plain, tma, gluon$"
        ),
    ):
        forward_pass.forward(*call(device), **OPTIONS)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("plain", ["plain", "plain", "plain"]),
        ("tma", ["tma", "tma", "tma"]),
    ],
)
def test_the_operator_runs_the_variant(
    asked: str, expected: list[str], device: str, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", asked)
    layout = random_layout(140, 140, 128, 64, partial=False).to(device)
    qkv = [torch.randn(1, 140, 1, 16).to(device).half().requires_grad_() for _ in range(3)]
    out, lse = block_sparse_attention(*qkv, layout.tensors, **OPTIONS)
    assert_matches_eager(out, lse, *qkv, layout.dense(), scale=0.3, backward=True)
    assert [variant for _, variant in ran] == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_was_measured_on_a_gpu_is_taken_first(
    kernel: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = TileConfig(64, 256, 4, 3)
    form = {"forward": "tma", "queries": "plain", "keys": "plain"}[kernel]
    measured = {(kernel, 64): Choice(form, tiles)}
    monkeypatch.setattr(tuned, "tuned_choice", lambda *key: measured.get(key))
    monkeypatch.setattr(variants, "is_hopper", lambda device: True)

    def first(**kind: Any) -> Choice:
        problem = Problem.of(*call(device, **kind), **OPTIONS)
        return variants.choices(kernel, problem)[0]

    found = first(head_dim=64)
    assert found.variant == form
    assert found.tiles.block_n == 64, "fitted to the block"
    assert found.tiles.num_stages == 3
    unmeasured = variants.KERNELS[kernel][-1]
    assert first(head_dim=128).variant == unmeasured, "not measured"
    assert first(head_dim=48).variant == unmeasured, "padded"
    assert first(head_dim=64, dtype=torch.float32).variant == unmeasured, "measured for 16 bits"


def test_a_measured_table_reaches_the_kernel(
    device: str, tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("the table is of the interpreter")
    entry = {
        "kernel": "forward", "head_dim": 16, "variant": "tma", "block_m": 128, "block_n": 32,
        "num_warps": 4, "num_stages": 2, "partial": None, "ahead": False,
    }  # fmt: skip
    table = {
        "gpu": "Triton's interpreter", "triton": triton.__version__, "torch": torch.__version__,
        "revision": "none", "date": "2026-01-01", "choices": [entry],
    }  # fmt: skip
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    monkeypatch.setenv("DIFFATTN_TUNED_TABLE", str(path))
    forward_pass.forward(*call(device), **OPTIONS)
    assert ran == [("forward", "tma")]


def wrong_program() -> None:
    """No Triton function: it does not know the name."""
    unknown_to_triton  # noqa: B018, F821


def fail_to_parse() -> None:
    source = ASTSource(JITFunction(wrong_program), signature={})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))


def fail_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_ttgir(*args: Any) -> None:
        raise RuntimeError("PassManager::run failed\nand much more")

    def nothing() -> None: ...

    monkeypatch.setattr(CUDABackend, "make_ttgir", make_ttgir)
    triton.compile(ASTSource(JITFunction(nothing), signature={}), target=GPUTarget("cuda", 90, 32))


def too_large() -> None:
    raise OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture(params=["parser", "pass", "resources"])
def failure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Something that fails as compiling a kernel can, and what is said of it."""
    return {
        "parser": (fail_to_parse, r"\(CompilationError: at 3:4:\)"),
        "pass": (lambda: fail_in_a_pass(monkeypatch), r"\(RuntimeError: PassManager::run failed\)"),
        "resources": (too_large, r"\(OutOfResources: out of resource: shared memory, .*\)"),
    }[request.param]


def close(found: Results, expected: Results) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


@pytest.fixture
def asks_for_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", "tma")


@pytest.mark.usefixtures("asks_for_tma")
def test_what_does_not_compile_is_replaced_with_one_warning(
    failure: tuple[Callable[[], None], str], device: str, ran: Ran
) -> None:
    fail, said = failure
    arguments = call(device)
    expected = forward_pass.forward(*arguments, **OPTIONS)
    ran.clear()
    ran.failures["tma"] = fail
    with pytest.warns(UserWarning, match=f"^the 'tma' variant .* does not compile .* {said}"):
        found = forward_pass.forward(*arguments, **OPTIONS)
    assert ran == [("forward", "plain")]
    close(found, expected)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        forward_pass.forward(*arguments, **OPTIONS)
        forward_pass.forward(*call(device, head_dim=24), **OPTIONS)
        forward_pass.forward(*call(device, head_dim=24), **OPTIONS)
    assert ran.attempts == [16, 24], "tried once for each kind of kernel"
    assert ran == [("forward", "plain")] * 4


@pytest.mark.usefixtures("asks_for_tma")
def test_what_the_compiler_dumps_is_not_shown(
    device: str, ran: Ran, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        os.write(2, b"#loc = hundreds of lines of MLIR")
        fail_to_parse()

    ran.failures["tma"] = fail
    with pytest.warns(UserWarning, match="does not compile"):
        forward_pass.forward(*call(device), **OPTIONS)
    assert "MLIR" not in capfd.readouterr().err


@pytest.mark.usefixtures("asks_for_tma")
def test_what_is_said_while_a_kernel_compiles_is_shown(
    device: str, ran: Ran, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = forward_pass.forward_by_tiles

    def chatty(*args: Any, **options: Any) -> Results:
        os.write(2, b"something of interest")
        return run(*args, **options)

    monkeypatch.setattr(forward_pass, "forward_by_tiles", chatty)
    forward_pass.forward(*call(device), **OPTIONS)
    assert "something of interest" in capfd.readouterr().err
    assert ran == [("forward", "tma")]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("no such thing"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.usefixtures("asks_for_tma")
def test_other_errors_are_not_swallowed(error: BaseException, device: str, ran: Ran) -> None:
    def fail() -> None:
        raise error

    ran.failures["tma"] = fail
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            forward_pass.forward(*call(device), **OPTIONS)
        assert raised.value is error
    assert len(ran.attempts) == 2, "and the variant is not given up"
    assert ran == []


def test_a_plain_kernel_that_does_not_compile_is_an_error(
    device: str, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", "plain")
    ran.failures["plain"] = fail_to_parse
    with pytest.raises(triton.CompilationError):
        forward_pass.forward(*call(device), **OPTIONS)


def test_a_choice_alone_is_tried_and_its_failure_raised(device: str, ran: Ran) -> None:
    ran.failures["tma"] = fail_to_parse
    with pytest.raises(triton.CompilationError):
        forward_pass.forward(
            *call(device), **OPTIONS, choice=Choice("tma", TileConfig(64, 64, 4, 2))
        )
    assert ran == []


@pytest.mark.usefixtures("hopper")
def test_gluon_is_left_alone_where_triton_lacks_it(
    device: str, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", "gluon")
    monkeypatch.setattr(gluon_forward, "available", lambda: False)
    forward_pass.forward(*call(device, head_dim=64), **OPTIONS)
    assert ran == [("forward", "tma")]


@pytest.mark.usefixtures("hopper")
def test_a_form_that_no_gpu_has_run_must_be_named(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "tuned_choice", lambda *_: None)
    assert tuned.NAMED_ONLY == ("gather_forward",)
    q = torch.zeros(1, 40, 1, 128, device=device, dtype=torch.float16)
    starts = torch.tensor([0, 40], dtype=torch.int32, device=device)
    problem = SelectionProblem.of(q, q, q, starts, None)

    def names() -> list[str]:
        return [choice.variant for choice in variants.choices("gather_forward", problem)]

    assert names() == ["plain"]
    monkeypatch.setenv(variants.VARIANT_VARIABLE, "tma")
    assert names() == ["plain"], "another kernel's"
    monkeypatch.setenv(variants.VARIANT_VARIABLE, "gluon")
    assert names() == ["gluon", "plain"]
    measured = Choice("gluon", TileConfig(128, 64, 4, 3))
    monkeypatch.delenv(variants.VARIANT_VARIABLE)
    monkeypatch.setattr(tuned, "tuned_choice", lambda *_: measured)
    assert variants.choices("gather_forward", problem)[0] == measured
