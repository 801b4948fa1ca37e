"""Which variant of the Triton kernel a call takes, and what happens where one does not compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from oracles import random_layout
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from diffattn.kernels.block_sparse import block_sparse_attention, variants
from diffattn.kernels.block_sparse.forward import forward as plain_forward

Results = tuple[torch.Tensor, torch.Tensor]
OPTIONS = {"block_q": 128, "block_kv": 64, "scale": 0.3}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variants.VARIANT_VARIABLE, raising=False)
    monkeypatch.setattr(variants, "_broken", set())
    monkeypatch.setattr(variants, "_warned", set())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_is_hopper", lambda device: True)


def call(
    device: str, *, partial: bool = False, head_dim: int = 16, dtype: torch.dtype = torch.float16
) -> tuple[Any, ...]:
    """Positional arguments of a forward pass."""
    layout = random_layout(140, 140, 128, 64, partial=partial).to(device)
    q, k, v = (torch.randn(1, 140, 1, head_dim).to(device, dtype) for _ in range(3))
    return q, k, v, layout.tensors, None


def names(arguments: tuple[Any, ...]) -> list[str]:
    return list(variants.variants_of(*arguments, **OPTIONS))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the variants that were run."""
    log: list[str] = []

    def spy(attribute: str, name: str) -> None:
        run = getattr(variants, attribute)

        def recording(*args: Any, **options: Any) -> Results:
            log.append(name)
            return run(*args, **options)

        monkeypatch.setattr(variants, attribute, recording)

    spy("plain_forward", "plain")
    spy("forward_tma", "tma")
    spy("forward_warp_specialized", "tma_ws")
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
    assert variants._is_hopper(torch.device("cuda", 1)) == expected
    assert not variants._is_hopper(torch.device("xpu"))
    assert not variants._is_hopper(torch.device("cpu"))


def test_amd_gpus_are_not_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI250 is a "cuda" device of capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not variants._is_hopper(torch.device("cuda"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param({}, ["tma_ws", "tma"], id="full"),
        pytest.param({"partial": True}, ["tma"], id="partial"),
        pytest.param({"dtype": torch.float32}, [], id="float32"),
        pytest.param({"head_dim": 20}, [], id="odd-head-dim"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_a_call_takes_what_suits_it(kind: dict[str, Any], expected: list[str], device: str) -> None:
    assert names(call(device, **kind)) == expected


def test_other_gpus_take_the_plain_variant(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_is_hopper", lambda device: False)
    assert names(call(device)) == []


@pytest.mark.parametrize(
    ("asked", "expected"), [("plain", []), ("tma", ["tma"]), ("tma_ws", ["tma_ws", "tma"])]
)
@pytest.mark.parametrize("is_hopper", [False, True])
def test_the_environment_decides(
    asked: str, expected: list[str], is_hopper: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "_is_hopper", lambda device: is_hopper)
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", asked)
    assert names(call(device)) == expected


def test_unknown_variant(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", "cuda")
    with pytest.raises(
        ValueError, match=r"^DIFFATTN_TRITON_VARIANT is 'cuda'; choose from plain, tma, tma_ws$"
    ):
        variants.forward(*call(device), **OPTIONS)


@pytest.mark.parametrize("asked", variants.VARIANTS)
def test_the_operator_runs_the_variant(
    asked: str, device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", asked)
    q, k, v, layout, _ = call(device)
    found = block_sparse_attention(q, k, v, *layout, **OPTIONS)
    assert ran == [asked]
    expected = plain_forward(q, k, v, layout, None, **OPTIONS)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


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


def break_variant(
    monkeypatch: pytest.MonkeyPatch, attribute: str, fail: Callable[[], None]
) -> list[int]:
    """Let a variant fail; the head_dim of every attempt."""
    attempts: list[int] = []

    def broken(q: torch.Tensor, *args: Any, **options: Any) -> Results:
        attempts.append(q.shape[-1])
        fail()
        raise AssertionError("did not fail")

    monkeypatch.setattr(variants, attribute, broken)
    return attempts


@pytest.mark.usefixtures("hopper")
def test_what_does_not_compile_is_replaced_with_one_warning(
    failure: tuple[Callable[[], None], str],
    device: str,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail, said = failure
    attempts = break_variant(monkeypatch, "forward_warp_specialized", fail)
    arguments = call(device)
    expected = plain_forward(*arguments, **OPTIONS)
    with pytest.warns(UserWarning, match=f"^the 'tma_ws' variant .* does not compile .* {said}"):
        found = variants.forward(*arguments, **OPTIONS)
    assert ran == ["tma"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        variants.forward(*arguments, **OPTIONS)
        variants.forward(*call(device, head_dim=24), **OPTIONS)
        variants.forward(*call(device, head_dim=24), **OPTIONS)
    assert attempts == [16, 24], "tried once for each kind of kernel"
    assert ran == ["tma"] * 4


@pytest.mark.usefixtures("hopper")
def test_the_plain_variant_is_left_when_none_compiles(
    device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for attribute in ("forward_warp_specialized", "forward_tma"):
        break_variant(monkeypatch, attribute, fail_to_parse)
    with pytest.warns(UserWarning, match="does not compile") as caught:
        variants.forward(*call(device), **OPTIONS)
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert [message.split("'")[1] for message in messages] == ["tma_ws", "tma"]
    assert "DIFFATTN_TRITON_VARIANT=plain" in messages[0]
    assert ran == ["plain"]


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
@pytest.mark.usefixtures("hopper")
def test_other_errors_are_not_swallowed(
    error: BaseException, device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    attempts = break_variant(monkeypatch, "forward_warp_specialized", fail)
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            variants.forward(*call(device), **OPTIONS)
        assert raised.value is error
    assert len(attempts) == 2, "and the variant is not given up"
    assert ran == []


def test_a_plain_kernel_that_does_not_compile_is_an_error(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFATTN_TRITON_VARIANT", "plain")
    break_variant(monkeypatch, "plain_forward", fail_to_parse)
    with pytest.raises(triton.CompilationError):
        variants.forward(*call(device), **OPTIONS)
