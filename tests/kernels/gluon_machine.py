"""A machine that runs a Gluon kernel's functions as Python: protocol and numbers, on a CPU.

Triton's interpreter does not know Gluon. Here every partition of a program is a thread, and one of
them runs at a time, until it waits. Barriers have arrivals, bytes and the parity of their phase, as
the PTX manual has them. Copies and products are asynchronous: what they read and write is theirs
until somebody waits for them. An access to shared memory that no chain of barriers orders after
the one before it is a `RaceError`, whatever the order was this time; partitions that all wait for
each other are a `DeadlockError`. Layouts, registers and warps are not modelled: the compiler checks
those. Of PTX the machine knows what the kernels have.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental.gluon import language as real
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real_mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# What a masked load gives where nothing was asked for: no index, no number.
POISON = 2**30 + 12345


class DeadlockError(Exception):
    """Every partition waits for another one."""


class RaceError(Exception):
    """An access to shared memory that nothing orders after an earlier one."""


class MisuseError(Exception):
    """Something that the hardware leaves undefined."""


class Value(torch.Tensor):
    """What registers hold; scalars have no dimension."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Any:
        return self.view(dtype) if bitcast else super().to(dtype)

    def __iadd__(self, other: Any) -> Any:  # a name gets a new value, other names keep theirs
        return self + other

    def __isub__(self, other: Any) -> Any:
        return self - other

    def __imul__(self, other: Any) -> Any:
        return self * other

    @staticmethod
    def of(x: Any, dtype: torch.dtype | None = None) -> Value:
        return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


@dataclass(frozen=True)
class Pointer:
    """Elements of a contiguous tensor in global memory."""

    memory: torch.Tensor
    offset: Any = 0

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + Value.of(other).to(torch.int64))

    def elements(self, mask: Any) -> tuple[Value, Value]:
        """Places in memory and which of them are meant, checked."""
        offset = Value.of(self.offset)
        mask = Value.of(True if mask is None else mask).expand(offset.shape)
        wrong = mask & ((offset < 0) | (offset >= self.memory.numel()))
        if wrong.any():
            raise MisuseError(f"an access outside of memory: {offset[wrong].tolist()}")
        return offset, mask


@dataclass
class Region:
    """A part of shared memory that is accessed as a whole.

    Attributes:
        writes, reads: accesses since and including the last write, by number.
        unfenced: whether it was written by threads, and not yet shown to the copy engine.
    """

    data: torch.Tensor
    writes: set[int] = field(default_factory=set)
    reads: set[int] = field(default_factory=set)
    unfenced: bool = False


@dataclass(frozen=True)
class View:
    """A shared memory descriptor."""

    data: torch.Tensor
    regions: Sequence[Region]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: Any) -> View:
        i = int(i)
        if not 0 <= i < len(self.data):
            raise MisuseError(f"buffer {i} of {len(self.data)}")
        return View(self.data[i], [self.regions[i]])

    def reshape(self, shape: Sequence[int]) -> View:
        return View(self.data.view(*shape), self.regions)

    def permute(self, order: Sequence[int]) -> View:
        return View(self.data.permute(*order), self.regions)

    def store(self, value: Value) -> None:
        assert value.shape == self.data.shape
        assert value.dtype == self.data.dtype
        me = _partition()
        access = me.write(self.regions)
        me.known.add(access)
        for region in self.regions:
            region.unfenced = True
        self.data.copy_(value)


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    arrivals: int | None = None
    missing: int = 0
    bytes: int = 0
    parity: int = 0
    coming: set[int] = field(default_factory=set)
    known: set[int] = field(default_factory=set)

    def arrive(self, known: set[int], arrivals: int = 1, more: int = 0) -> None:
        if self.arrivals is None:
            raise MisuseError("a barrier that was not initialised")
        if arrivals > self.missing:
            raise MisuseError("more arrivals in a phase than the barrier was initialised for")
        self.missing -= arrivals
        self.bytes += more
        self.coming |= known
        if self.missing == 0 and self.bytes == 0:
            self.missing = self.arrivals
            self.parity ^= 1
            self.known |= self.coming
            self.coming = set()


@dataclass(frozen=True)
class Barriers:
    all: Sequence[Barrier]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


@dataclass
class Pending:
    """A product that runs: no number yet."""

    value: Value
    access: int
    done: bool = False


@dataclass
class Partition:
    """A thread of the machine, which stands for a warp or a group of them.

    Attributes:
        known: accesses that have happened before whatever the partition does next.
        products: those in flight, in order.
        stores: copies to global memory that may still read.
    """

    machine: Machine
    known: set[int]
    products: list[Pending] = field(default_factory=list)
    stores: int = 0

    def write(self, regions: Sequence[Region]) -> int:
        for region in regions:
            if not (region.writes | region.reads) <= self.known:
                raise RaceError("shared memory is written while it may still be in use")
        access = next(self.machine.accesses)
        for region in regions:
            region.writes, region.reads = {access}, set()
        return access

    def read(self, regions: Sequence[Region]) -> int:
        for region in regions:
            if not region.writes:
                raise RaceError("shared memory is read that nobody has written")
            if not region.writes <= self.known:
                raise RaceError(
                    "shared memory is read before what was written is known to be there"
                )
            if region.unfenced:
                raise RaceError("shared memory written by threads is read without a fence")
        access = next(self.machine.accesses)
        for region in regions:
            region.reads.add(access)
        return access


_local = threading.local()


def _partition() -> Partition:
    return _local.partition


class Machine:
    """Runs one program.

    Args:
        program, programs: its number, and how many there are.
        late: whether copies end as late as they can, or at once.
        order: chooses which of the partitions that can run goes on.
    """

    def __init__(self, program: int, programs: int, late: bool, order: random.Random) -> None:
        self.program = program
        self.programs = programs
        self.late = late
        self.order = order
        self.accesses = count()
        self.regions: list[Region] = []
        self.copies: list[Callable[[], None]] = []
        self.turn = threading.Condition()
        self.waiting: dict[Partition, Callable[[], bool]] = {}
        self.running: Partition | None = None
        self.failure: BaseException | None = None

    def run(self, kernel: Callable[[], None]) -> None:
        _local.partition = Partition(self, set())
        try:
            kernel()
        finally:
            del _local.partition

    def specialize(self, functions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        parent = _partition()
        partitions = [_Hashable(self, set(parent.known)) for _ in functions]
        self.waiting = {p: lambda: True for p in partitions}
        threads = [
            threading.Thread(target=self._partition_main, args=(p, *f), daemon=True)
            for p, f in zip(partitions, functions, strict=True)
        ]
        for thread in threads:
            thread.start()
        with self.turn:
            self._pass_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        if self.copies:
            raise MisuseError("a copy into shared memory that nobody waited for")

    def wait(self, ready: Callable[[], bool]) -> None:
        """Let others run until `ready`."""
        me = _partition()
        with self.turn:
            self.waiting[me] = ready
            self._pass_on()
            self._await(me)

    def _partition_main(
        self, me: Partition, function: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        _local.partition = me
        torch.set_num_threads(1)
        with suppress(_Stopped):
            try:
                with self.turn:
                    self._await(me)
                function(*args)
                if me.products:
                    raise MisuseError("a partition ends with products in flight")
                if me.stores:
                    raise MisuseError("a partition ends while a copy still reads its shared memory")
            except _Stopped:
                raise
            except BaseException as error:
                self.failure = self.failure or error
        with self.turn:
            self._pass_on()

    def _await(self, me: Partition) -> None:
        while self.running is not me and self.failure is None:
            self.turn.wait()
        if self.failure is not None:
            raise _Stopped

    def _pass_on(self) -> None:
        """Choose who runs next. Copies end when nobody can, if they are late."""
        self.running = None
        while self.failure is None and self.waiting:
            able = [p for p, ready in self.waiting.items() if ready()]
            if able:
                self.running = self.order.choice(able)
                del self.waiting[self.running]
                break
            if not self.copies:
                self.failure = DeadlockError(f"{len(self.waiting)} partitions wait for each other")
                break
            self.copies.pop(self.order.randrange(len(self.copies)))()
        self.turn.notify_all()


class _Stopped(BaseException):
    """Another partition has failed."""


class _Hashable(Partition):
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__  # type: ignore[assignment]


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor, as the copy engine reads it."""

    tensor: torch.Tensor
    shape: Sequence[int]
    block: Sequence[int]
    layout: Any

    @staticmethod
    def of(x: TensorDescriptor) -> Descriptor:
        width = x.base.element_size()
        assert x.base.data_ptr() % 16 == 0
        assert all(0 < s < 2**40 / width and s * width % 16 == 0 for s in x.strides[:-1])
        assert x.strides[-1] == 1
        assert all(0 < n <= 256 for n in x.block_shape)
        tensor = x.base.as_strided(x.shape, x.strides)
        return Descriptor(tensor, x.shape, x.block_shape, x.layout)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def block_type(self) -> Any:
        size = self.tensor.element_size()
        for n in self.block:
            size *= n
        return SimpleNamespace(nbytes=size)

    def part(self, coordinates: Sequence[Any]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """What of a block there is in the tensor, and where in the block that is."""
        first = [int(c) for c in coordinates]
        assert len(first) == len(self.shape)
        assert min(first) >= 0
        sizes = [
            max(0, min(n - c, b)) for c, n, b in zip(first, self.shape, self.block, strict=True)
        ]
        inside = tuple(slice(0, n) for n in sizes)
        place = tuple(slice(c, c + n) for c, n in zip(first, sizes, strict=True))
        return self.tensor[place], inside


def _fetch(tensor: Descriptor, coordinates: Any, barrier: Barrier, result: View) -> None:
    assert tuple(result.data.shape) == tuple(tensor.block)
    assert result.dtype == tensor.dtype
    me = _partition()
    access = me.write(result.regions)
    known = me.known | {access}
    part, inside = tensor.part(coordinates)
    result.data.fill_(torch.nan)

    def arrives() -> None:
        result.data.zero_()
        result.data[inside] = part
        barrier.arrive(known, 0, -tensor.block_type.nbytes)

    if me.machine.late:
        me.machine.copies.append(arrives)
    else:
        arrives()


def _write(tensor: Descriptor, coordinates: Any, source: View) -> None:
    me = _partition()
    me.read(source.regions)
    part, inside = tensor.part(coordinates)
    part.copy_(source.data[inside])
    me.stores += 1


def _store_wait(pendings: int) -> None:
    _partition().stores = min(_partition().stores, pendings)


def _fence() -> None:
    for region in _partition().machine.regions:
        region.unfenced = False


def _product(a: Any, b: View, acc: Value, *, use_acc: bool = True, is_async: bool = False) -> Any:
    me = _partition()
    regions = [*(a.regions if isinstance(a, View) else ()), *b.regions]
    access = me.read(regions)
    left = (a.data if isinstance(a, View) else a).to(torch.float32)
    value = Value.of(left.as_subclass(torch.Tensor) @ b.data.float())
    assert acc.shape == value.shape
    pending = Pending(acc + value if use_acc else value, access)
    me.products.append(pending)
    return pending if is_async else _product_wait(0, (pending,))


def _product_wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    me = _partition()
    while len(me.products) > num_outstanding:
        product = me.products.pop(0)
        product.done = True
        me.known.add(product.access)
    results = []
    for x in deps:
        if isinstance(x, Pending):
            if not x.done:
                raise MisuseError("the result of a product that still runs")
            x = x.value
        results.append(x)
    return results[0] if len(results) == 1 else tuple(results)


def _init(barrier: Barrier, count: int) -> None:
    barrier.arrivals = barrier.missing = count


def _expect(barrier: Barrier, size: int) -> None:
    barrier.arrive(_partition().known, 1, size)


def _arrive(barrier: Barrier) -> None:
    barrier.arrive(_partition().known)


def _wait(barrier: Barrier, phase: Any) -> None:
    me = _partition()
    if barrier.arrivals is None:
        raise MisuseError("a barrier that was not initialised")
    parity = int(phase)
    assert parity in (0, 1)
    me.machine.wait(lambda: barrier.parity != parity)
    me.known |= barrier.known


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
    if isinstance(layout, real_mbarrier.MBarrierLayout):
        return Barriers([Barrier() for _ in range(shape[0])])
    data = torch.full(tuple(shape), torch.nan).to(dtype)
    regions = [Region(part) for part in data]
    _partition().machine.regions += regions
    return View(data, regions)


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
    place, meant = pointer.elements(mask)
    rest = Value.of(POISON if other is None else other)
    if not meant.any():
        found = torch.zeros(place.shape, dtype=pointer.memory.dtype).as_subclass(Value)
    else:
        found = pointer.memory[torch.where(meant, place, place[meant].min())].as_subclass(Value)
    return torch.where(meant, found, rest.to(found.dtype))


def _store(pointer: Pointer, value: Value, mask: Any = None) -> None:
    place, meant = pointer.elements(mask)
    pointer.memory[place[meant]] = value.to(pointer.memory.dtype)[meant]


def _prmt(low: torch.Tensor, high: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """Four bytes of two words, or the signs of such bytes, as four digits select them."""
    result = torch.zeros_like(selector)
    for place in range(4):
        digit = selector >> 4 * place & 15
        byte = torch.where(digit & 4 > 0, high, low) >> 8 * (digit & 3) & 0xFF
        byte = torch.where(digit & 8 > 0, torch.where(byte > 127, 0xFF, 0), byte)
        result |= byte << 8 * place
    return result


def _lop3(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Bit by bit the entry of a table of eight bits that the bits of three words number."""
    result = torch.zeros_like(a)
    for bit in range(32):
        entry = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        result |= (table >> entry & 1) << bit
    return result


def _cvt(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Rounds two words, float32 each, to 16 bits: the halves of a word."""

    def round_to_16_bits(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        rounded = [x.int().view(torch.float32).to(dtype).view(torch.int16) for x in (high, low)]
        return rounded[0].long() << 16 & 0xFFFF0000 | rounded[1].long() & 0xFFFF

    return round_to_16_bits


def _shl(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return x << by.clamp(max=32) & 0xFFFFFFFF


_PTX = {
    "shl.b32": _shl,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "cvt.rn.bf16x2.f32": _cvt(torch.bfloat16),
    "cvt.rn.f16x2.f32": _cvt(torch.float16),
}


def _inline_asm(
    asm: str, constraints: str, args: Sequence[Value], dtype: torch.dtype, is_pure: bool, pack: int
) -> Value:
    """What a block of PTX makes of each element: words of 32 bits, in straight lines."""
    assert is_pure
    assert pack == 1
    assert constraints.split(",") == ["=r"] + ["r"] * len(args)
    registers = {
        f"${i}": (x.view(torch.int32) if x.is_floating_point() else x).long() & 0xFFFFFFFF
        for i, x in enumerate((x.as_subclass(torch.Tensor) for x in args), 1)
    }
    for statement in asm.strip("{}").split(";"):
        operation, *operands = statement.replace(",", " ").split() or [".reg"]
        if operation == ".reg":
            continue
        to, *sources = operands
        words = [
            registers[x] if x in registers else torch.tensor(int(x, 0)) for x in sources
        ]  # fmt: skip
        registers[to] = _PTX[operation](*torch.broadcast_tensors(*words))
    return Value.of(registers["$0"].int().view(dtype))


def _pair(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Value]:
    return lambda a, b: function(Value.of(a), Value.of(b)).as_subclass(Value)


_language = SimpleNamespace(
    constexpr=lambda x: x,
    static_range=range,
    int16=torch.int16, int32=torch.int32, int64=torch.int64,
    float32=torch.float32, bfloat16=torch.bfloat16,
    NVMMADistributedLayout=real.NVMMADistributedLayout,
    DotOperandLayout=real.DotOperandLayout,
    SliceLayout=real.SliceLayout,
    BlockedLayout=real.BlockedLayout,
    SwizzledSharedLayout=real.SwizzledSharedLayout,
    program_id=lambda axis: Value.of(_partition().machine.program, torch.int32),
    num_programs=lambda axis: Value.of(_partition().machine.programs, torch.int32),
    arange=lambda start, end, layout: Value.of(torch.arange(start, end, dtype=torch.int32)),
    full=lambda shape, x, dtype, layout: Value.of(torch.full(shape, x, dtype=dtype)),
    zeros=lambda shape, dtype, layout: Value.of(torch.zeros(shape, dtype=dtype)),
    convert_layout=lambda x, layout: x,
    split=lambda x: x.unbind(-1), join=lambda a, b: torch.stack([a, b], -1),
    load=_load, store=_store,
    where=lambda c, a, b: torch.where(Value.of(c), a, b),
    minimum=_pair(torch.minimum), maximum=_pair(torch.maximum),
    max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis),
    sum=lambda x, axis: x.sum(axis),
    exp2=torch.exp2, log2=torch.log2,
    inline_asm_elementwise=_inline_asm,
    allocate_shared_memory=_allocate,
    warp_specialize=lambda functions, warps, registers: _partition().machine.specialize(functions),
)  # fmt: skip

_STAND_INS = {
    "gl": _language,
    "tma": SimpleNamespace(store_wait=_store_wait),
    "mbarrier": SimpleNamespace(
        MBarrierLayout=real_mbarrier.MBarrierLayout,
        init=_init, expect=_expect, arrive=_arrive, wait=_wait,
    ),
    "warpgroup_mma": _product,
    "warpgroup_mma_wait": _product_wait,
    "fence_async_shared": _fence,
    "fetch": _fetch,
    "write": _write,
    "barrier": lambda: None,
}  # fmt: skip


@dataclass(frozen=True)
class Launcher:
    """Stands in for a Gluon kernel: `launcher[grid](*args)` runs all programs.

    Attributes:
        kernel: the kernel's function, on the stand-ins.
        late, seed: as `Machine`, for the order.
    """

    kernel: Callable[..., None]
    late: bool
    seed: int

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **options: self._run(grid[0], args, options)

    def _run(self, programs: int, args: Sequence[Any], options: dict[str, Any]) -> None:
        order = random.Random(self.seed)
        constants = {name: x for name, x in options.items() if name.isupper()}
        converted = [_argument(x) for x in args]
        for program in range(programs):
            Machine(program, programs, self.late, order).run(
                lambda: self.kernel(*converted, **constants)
            )


def stand_in(
    kernel: Any,
    edits: Mapping[str, tuple[str, str]] | None = None,
    late: bool = False,
    seed: int = 0,
) -> Launcher:
    """What runs `kernel`, a Gluon kernel, here.

    Args:
        edits: for functions beside the kernel, text and what to put in its place.
    """
    beside = {**kernel.fn.__globals__, kernel.fn.__name__: kernel}
    names: dict[str, Any] = {
        name: x.value for name, x in beside.items() if isinstance(x, tl.constexpr)
    }
    names.update(_STAND_INS)
    edits = edits or {}
    for name, x in beside.items():
        if isinstance(x, triton.JITFunction):
            source = inspect.getsource(x.fn)
            source = source[source.index("def ") :]
            old, new = edits.get(name, ("", ""))
            assert old in source, f"{name} does not have {old!r}"
            exec(source.replace(old, new, 1), names)
    return Launcher(names[kernel.fn.__name__], late, seed)


def _argument(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return Descriptor.of(x)
    if isinstance(x, torch.Tensor):
        return Pointer(x.view(-1))
    return x
