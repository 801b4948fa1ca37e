"""The fastest form and tiles of each kernel, each kernel timed by itself.

Every choice is checked against float64 first, at the shape that is timed. The masks have full
blocks at two densities, and partial blocks at the lower density; `table` chooses among the choices
that take all masks. Forms that could hang are timed when all other forms have their rows. Every
round has the shipped choice in it, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice

import torch

from diffattn import VMoBAAttn
from diffattn.blocks import FULL, PARTIAL, layout_from_states, unpack_bits
from diffattn.kernels.common.tile_tables import Choice
from diffattn.methods.vmoba.selection import select_blocks
from diffattn.pipelines.bench.timing import Spread, describe, interleave, median_ratio
from gpu_run import adapter, smoke
from gpu_run.accuracy import Deviation, check_gradients, check_output, worst
from gpu_run.adapter import NotTakenError
from gpu_run.candidates import RANKED, RISKY, label, ranked
from gpu_run.masks import ALIGNED, BLOCK, EXACT, make_mask
from gpu_run.setting import Setting
from gpu_run.shapes import Shape

SHAPES = {128: "wan-1.3b-480p", 64: "cogvideox-5b"}
SECONDS = 4.0  # of the rounds on one mask
DRY_CHOICES = 2
GATHER = ("gather_forward", "gather_queries", "gather_keys")


@dataclass(frozen=True)
class Place:
    """A kernel over one mask.

    Attributes:
        name: of the mask.
        run: the call that is timed.
        check: how far the results of the call are off.
    """

    name: str
    run: Callable[[Choice], object]
    check: Callable[[Choice], dict[str, Deviation]]


def run(what: str, setting: Setting) -> None:
    """Time the choices of a kernel and a head_dim, "forward-128", or of the gather kernels."""
    name, _, size = what.partition("-")
    head_dim = int(size)
    shape = setting.shape(SHAPES[head_dim])
    for kernel in GATHER if name == "gather" else (name,):
        places = (
            gather_places(kernel, shape, setting)
            if kernel in GATHER
            else block_sparse_places(kernel, shape, setting)
        )
        for place in islice(places, 1) if setting.dry else places:
            unit = f"{kernel} {head_dim} {place.name}"
            if not setting.journal.is_finished(unit):
                _time(kernel, shape, place, setting)
                setting.journal.finish(unit)


def _time(kernel: str, shape: Shape, place: Place, setting: Setting) -> None:
    shipped = adapter.shipped(kernel, shape.head_dim)
    choices = ranked(kernel, shape.head_dim, shipped)
    if setting.dry:
        choices = choices[:DRY_CHOICES]

    def add(choice: Choice, **facts: object) -> None:
        setting.journal.add(
            "tune", kernel=kernel, head_dim=shape.head_dim, shape=shape.name, place=place.name,
            variant=choice.variant, tiles=asdict(choice.tiles), shipped=choice == shipped, **facts,
        )  # fmt: skip

    right = []
    for choice in choices:
        facts = _checked(kernel, shape.head_dim, choice, place, setting)
        if facts.get("right"):
            right.append(choice)
        else:
            add(choice, **facts)
    risky = [choice for choice in right if choice.variant in RISKY]
    for group in ([choice for choice in right if choice not in risky], *([one] for one in risky)):
        beside = [shipped] if shipped in right and shipped not in group else []
        calls = {label(choice): partial(place.run, choice) for choice in (*group, *beside)}
        times, failed = interleave(calls, setting.timer, **setting.rounds(SECONDS))
        reference = times.get(label(shipped))
        for choice in group:
            if label(choice) in failed:
                add(choice, error=failed[label(choice)])
                continue
            rounds = times[label(choice)]
            spread = Spread.of(rounds)
            add(
                choice, ms=spread.median, low=spread.low, high=spread.high, rounds=rounds,
                of_shipped=median_ratio(rounds, reference) if reference else None,
            )  # fmt: skip


def _checked(
    kernel: str, head_dim: int, choice: Choice, place: Place, setting: Setting
) -> dict[str, object]:
    """Whether a choice may be timed, and why not."""
    rows = [row for row in setting.journal.rows() if row["sources"] == setting.journal.sources]
    stage = "gather" if kernel in GATHER else smoke.form_of(kernel, choice)
    if not smoke.passed(rows, stage, head_dim):
        return {"error": f"the stage smoke:{stage} has not passed"}
    try:
        return worst(place.check(choice))
    except NotTakenError as error:
        return {"not_taken": str(error)}
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # nothing works any more in this process
        return {"error": describe(error)}


# ---------------------------------------------------------------- block-sparse kernels


def block_sparse_places(kernel: str, shape: Shape, setting: Setting) -> Iterator[Place]:
    q, k, v, grad = setting.inputs(shape)
    dense, sparse = setting.tuning
    for kind, density in ((ALIGNED, dense), (ALIGNED, sparse), (EXACT, sparse)):
        mask = make_mask(shape.grid, kind, density, setting.device)
        call = adapter.Call(q, k, v, mask.layout)
        yield _place(kernel, f"{kind} {density:g}", call, grad, mask.rule)


def _place(
    kernel: str,
    name: str,
    call: adapter.Call,
    grad: torch.Tensor,
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> Place:
    qkv = (call.q, call.k, call.v)
    if kernel == "forward":
        return Place(
            name,
            call.forward,
            lambda choice: check_output(lambda: call.forward(choice)[0], qkv, rule),
        )
    out, lse = call.forward(adapter.shipped("forward", call.q.shape[-1]))
    gradients = adapter.Gradients.of(call, grad, out, lse)

    def check(choice: Choice) -> dict[str, Deviation]:
        def of(grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            some = adapter.Gradients.of(call, grad, out, lse)
            if kernel == "keys":
                return (None, *some.keys(choice))
            return some.queries(choice), None, None

        return check_gradients(of, qkv, rule)

    return Place(name, gradients.keys if kernel == "keys" else gradients.queries, check)


# ---------------------------------------------------------------- gather


def gather_places(kernel: str, shape: Shape, setting: Setting) -> Iterator[Place]:
    """VMoBA's selection without training, in its patches and in its boxes."""
    q, k, v, grad = setting.inputs(shape)
    method = VMoBAAttn().for_model("", shape.grid)
    for layer, name in ((1, "2d"), (2, "3d")):
        partition, rule = method.partition(shape.grid, layer), method.rule(shape.grid, layer)
        blocks = partition.key_blocks(setting.device)
        bits = select_blocks(q, k, blocks, rule)
        gather = adapter.Gather(q, k, v, blocks.starts, bits)
        yield _gather_place(kernel, name, gather, grad)


def _gather_place(kernel: str, name: str, gather: adapter.Gather, grad: torch.Tensor) -> Place:
    qkv = (gather.q, gather.k, gather.v)
    if kernel == "gather_forward":
        return Place(
            name,
            gather.forward,
            lambda choice: check_output(lambda: gather.forward(choice)[0], qkv, allowed(gather)),
        )
    out, lse = gather.forward(adapter.shipped("gather_forward", gather.q.shape[-1]))

    def gradients(grad: torch.Tensor, choice: Choice) -> tuple[torch.Tensor | None, ...]:
        return gather.gradients(grad, out, lse, kernel, choice)

    return Place(
        name,
        partial(gradients, grad),
        lambda choice: check_gradients(lambda some: gradients(some, choice), qkv, allowed(gather)),
    )


def allowed(gather: adapter.Gather) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The rule of a selection, for the first and the last head."""
    lengths = gather.starts.diff().long()
    block_of = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    heads = sorted({0, gather.q.shape[2] - 1})
    chosen = unpack_bits(gather.bits[:, heads], len(lengths))

    def rule(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return chosen[:, :, query, block_of[key]]

    return rule


# ---------------------------------------------------------------- what is compiled beforehand


def launches(setting: Setting) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every choice of every kernel, with and without partial blocks, to be compiled."""
    for kernel, head_dim in RANKED:
        for choice in ranked(kernel, head_dim, adapter.shipped(kernel, head_dim)):
            for is_partial in (False, True):
                name = f"{kernel} {head_dim} {label(choice)}{' partial' * is_partial}"
                yield name, partial(_launch, kernel, head_dim, choice, is_partial, setting)


def _launch(
    kernel: str, head_dim: int, choice: Choice, is_partial: bool, setting: Setting
) -> object:
    """A call of few tokens, compiled as a call of the whole shape: only the heads must be equal."""
    heads = setting.shape(SHAPES[head_dim]).heads
    tokens = 4 * BLOCK - 8
    size = (1, tokens, heads, head_dim)
    q = torch.zeros(size, device=setting.device, dtype=torch.bfloat16)
    lse = torch.zeros(1, heads, tokens, device=setting.device)
    if kernel in GATHER:
        starts = torch.tensor([0, 200, tokens], dtype=torch.int32, device=setting.device)
        bits = torch.ones(1, heads, tokens, 1, dtype=torch.int32, device=setting.device)
        gather = adapter.Gather(q, q, q, starts, bits)
        if kernel == "gather_forward":
            return gather.forward(choice)
        return gather.gradients(q, q, lse, kernel, choice)
    states = torch.full((4, 4), FULL, dtype=torch.uint8)
    if is_partial:
        states[0, 1] = PARTIAL
    layout = layout_from_states(
        states, lambda row, column: torch.eye(BLOCK, dtype=torch.bool).expand(len(row), -1, -1),
        tokens_q=tokens, tokens_kv=tokens, block_q=BLOCK, block_kv=BLOCK,
    ).to(setting.device)  # fmt: skip
    call = adapter.Call(q, q, q, layout)
    if kernel == "forward":
        return call.forward(choice)
    gradients = adapter.Gradients.of(call, q, q, lse)
    return gradients.keys(choice) if kernel == "keys" else gradients.queries(choice)
