"""A launch of the kind of an earlier one gives the device what Triton would give.

The device is replaced: kernels are compiled for a Hopper GPU, and what a launch hands to the driver
is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from diffattn.kernels.common import launching
from diffattn.kernels.common.launching import launch


class Driver:
    """Stands in for a GPU's driver."""

    device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Launches(list[tuple[CompiledKernel, tuple[Any, ...]]]):
    """The compiled kernel and the arguments of every launch, and how often Triton looked it up."""

    looked_up = 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    log = Launches()
    driver = Driver()

    def record(self: CompiledKernel) -> None:
        self._run = lambda *args: log.append((self, args))

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        log.looked_up += 1
        return run(self, *args, **options)

    run = JITFunction.run
    monkeypatch.setattr(CompiledKernel, "_init_handles", record)
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(launching, "_RUN", counted)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_NVIDIA", True)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return log


def added(x_in, p_out, count, many, factor, SIZE: tl.constexpr, TWICE: tl.constexpr) -> None:
    if TWICE:
        tl.store(p_out + count * many, (tl.load(x_in) * factor).to(tl.bfloat16))


def described(x_in, p_out, count, many, factor, SIZE: tl.constexpr, TWICE: tl.constexpr) -> None:
    tl.store(p_out + count * many, factor.to(tl.bfloat16))


def by_triton(
    kernel: Any, programs: int, tensors: Any, numbers: Any, floats: Any = (), **constants: Any
) -> None:
    kernel[(programs,)](*tensors, *numbers, *floats, **constants)


def tensor(offset: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(64, dtype=dtype)[offset:]


_METADATA = 6  # place of a launch's metadata, an object of its own
CONSTANTS = {"SIZE": 32, "TWICE": True, "num_warps": 4, "enable_fp_fusion": True}


def test_a_second_launch_hands_over_what_triton_would(launches: Launches) -> None:
    kernel = JITFunction(added)
    x, y = tensor(), tensor()
    for function in (by_triton, launch, launch):
        function(kernel, 5, (x, y), (16, 1), (0.5,), **CONSTANTS)
    assert launches.looked_up == 2
    compiled, arguments = launches[0]
    assert arguments[:4] == (5, 1, 1, 7)
    for other, of_other in launches[1:]:
        assert other is compiled
        assert len(of_other) == len(arguments)
        assert of_other[_METADATA].get() == arguments[_METADATA].get()
        assert all(
            a is b or number == _METADATA or (not isinstance(a, torch.Tensor) and a == b)
            for number, (a, b) in enumerate(zip(arguments, of_other, strict=True))
        )


def test_programs_tensors_and_floats_may_change(launches: Launches) -> None:
    kernel = JITFunction(added)
    launch(kernel, 5, (tensor(), tensor()), (16, 1), (0.5,), **CONSTANTS)
    x, y = tensor(), tensor()
    launch(kernel, 6, (x, y), (16, 1), (0.25,), **CONSTANTS)
    assert launches.looked_up == 1
    (first, _), (second, arguments) = launches
    assert second is first
    assert arguments[0] == 6
    assert arguments[9] is x
    assert arguments[10] is y
    assert arguments[11:] == (16, 1, 0.25, 32, True)


Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, Change] = {
    "dtype": lambda call: call.update(x=tensor(dtype=torch.float32)),
    "alignment": lambda call: call.update(x=tensor(1)),
    "alignment-of-the-output": lambda call: call.update(y=tensor(4)),
    "divisibility": lambda call: call.update(numbers=(17, 1)),
    "one": lambda call: call.update(numbers=(16, 2)),
    "64-bits": lambda call: call.update(numbers=(2**40, 1)),
    "constant": lambda call: call["constants"].update(TWICE=False),
    "warps": lambda call: call["constants"].update(num_warps=8),
    "fusion": lambda call: call["constants"].update(enable_fp_fusion=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_launch_takes_the_kernel_that_triton_takes(
    change: str, launches: Launches
) -> None:
    kernel = JITFunction(added)
    call: dict[str, Any] = {
        "x": tensor(), "y": tensor(), "numbers": (16, 1), "constants": dict(CONSTANTS)
    }  # fmt: skip
    launch(kernel, 5, (call["x"], call["y"]), call["numbers"], (0.5,), **call["constants"])
    CHANGES[change](call)
    for function in (launch, launch, by_triton):
        function(kernel, 5, (call["x"], call["y"]), call["numbers"], (0.5,), **call["constants"])
    first, *others = (compiled for compiled, _ in launches)
    assert len(set(map(id, others))) == 1
    assert others[0] is not first


def test_kernels_and_devices_are_told_apart(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, other = JITFunction(added), JITFunction(described)
    call = (5, (tensor(), tensor()), (16, 1), (0.5,))
    for each in (kernel, other):
        launch(each, *call, **CONSTANTS)
    monkeypatch.setattr(Driver, "device", 1)
    for _ in range(2):
        launch(kernel, *call, **CONSTANTS)
    assert launches.looked_up == 3
    assert [arguments[3] for _, arguments in launches] == [7, 7, 8, 8]
    assert launches[2][0] is launches[3][0]
    assert len({id(compiled) for compiled, _ in launches}) == 3


def tiles(*block: int, tokens: int = 8) -> TensorDescriptor:
    x = torch.zeros(1, tokens, 2, 64, dtype=torch.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (tiles(1, 4, 1, 64), True),
        (tiles(1, 8, 1, 64), False),
        (tensor(), False),
    ],
)
def test_descriptors_of_other_tiles_are_told_apart(
    other: Any, same: bool, launches: Launches
) -> None:
    kernel = JITFunction(described)
    for x in (tiles(1, 4, 1, 64), other):
        launch(kernel, 5, (x, tensor()), (16, 1), (0.5,), **CONSTANTS)
    (first, _), (second, arguments) = launches
    assert (second is first) == same
    assert arguments[9] is other


def test_a_replaced_run_is_always_called(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools that compile without launching replace `JITFunction.run`."""
    kernel = JITFunction(added)
    call = (5, (tensor(), tensor()), (16, 1), (0.5,))
    launch(kernel, *call, **CONSTANTS)
    seen: list[Any] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: seen.append(args))
    launch(kernel, *call, **CONSTANTS)
    assert len(seen) == 1
    assert len(launches) == 1


def test_what_is_known_does_not_grow_without_bound(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_MOST_COMPILED", 3)
    kernel = JITFunction(added)
    for count in range(20, 30):
        launch(kernel, 5, (tensor(), tensor()), (count, 1), (0.5,), **CONSTANTS)
        assert len(launching._compiled) <= 3
    assert len(launches) == 10
