"""The measurements of benchmarks/gpu.py: groups of candidates, in order, while there is time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from gpu_accuracy import errors
from gpu_candidates import (
    DENSE,
    OTHERS,
    OURS,
    Candidate,
    UnavailableError,
    chosen_variant,
    dense,
    makers,
    masks_of,
    public,
    raw,
    tiles,
)
from gpu_layouts import (
    ALIGNED,
    KINDS,
    Mask,
    Places,
    attended_pairs,
    make_mask,
    tile_order,
    window_layout,
)
from gpu_report import CallRow, LeftOut, MaskRow, Results, Row, best_dense
from gpu_shapes import BACKWARD, FORWARD, Group, Shape
from gpu_timing import (
    Budget,
    Prepare,
    Spread,
    Timer,
    describe,
    host_microseconds,
    interleave,
    median_ratio,
    synchronize,
)

LEAST_ROUNDS = 3
# For a first guess of what a group takes; corrected by those that are done.
ASSUMED_FLOPS = {"cuda": 350e12, "cpu": 20e9}
SETUP_SECONDS = {("cuda", FORWARD): 20.0, ("cuda", BACKWARD): 30.0}


@dataclass
class Run:
    """What a run keeps between its groups."""

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    budget: Budget
    results: Results
    densities: tuple[float, ...]
    variants: list[str]
    sweep: bool
    rounds: int
    group_seconds: float
    masks: dict[str, list[Mask]] = field(default_factory=dict)
    pace: float = 1.0  # time that groups took over the time they were expected to take


def expected_seconds(group: Group, run: Run) -> float:
    """What a group takes at the fewest rounds, set-up included, at the pace of those before."""
    shape = group.shape
    others = len(tiles(group.direction)) if run.sweep else len(OTHERS) / 2
    candidates = 1 + len(run.variants) + others
    dense_passes = len(DENSE) + candidates * sum(2 * d for d in run.densities)
    flops = shape.flops(shape.tokens**2, FORWARD)
    if group.direction == BACKWARD:
        flops += shape.flops(shape.tokens**2, BACKWARD)
    rate = ASSUMED_FLOPS[run.device.type]
    setup = SETUP_SECONDS.get((run.device.type, group.direction), 1.0)
    # Two rounds' worth of first calls and checks.
    return run.pace * (setup + (LEAST_ROUNDS + 2) * dense_passes * flops / rate)


def run_groups(
    todo: list[Group], run: Run, measure: Callable[[Group, Run], None], save: Callable[[], None]
) -> None:
    """Measure groups in order for as long as there is time; those that do not fit are listed."""
    for group in todo:
        expected = expected_seconds(group, run)
        if expected > run.budget.left:
            why = (
                f"would take about {expected:.0f} s of the {max(0.0, run.budget.left):.0f} s left"
                f" of {run.budget.minutes:g} minutes"
            )
            run.results.left_out.append(LeftOut(group.name, why))
        else:
            before = run.budget.spent
            measure(group, run)
            needed = run.budget.spent - before - run.group_seconds
            # Never faster than guessed: a group whose candidates all failed says nothing.
            run.pace = max(1.0, run.pace * needed / expected)
        save()


def masks_for(shape: Shape, run: Run) -> list[Mask]:
    """The masks of a shape, made once; their cost goes to the results."""
    if shape.name not in run.masks:
        run.masks.clear()  # of the shape before: gigabytes on the device
        run.masks[shape.name] = []
        for density in run.densities:
            for kind in KINDS:
                mask = make_mask(shape.grid, kind, density, run.device)
                run.masks[shape.name].append(mask)
                if mask in masks_of([mask]):
                    run.results.masks.append(mask_row(shape, mask, run.device))
    return masks_of(run.masks[shape.name])


def mask_row(shape: Shape, mask: Mask, device: torch.device) -> MaskRow:
    def build() -> None:
        if mask.window is None:
            make_mask(shape.grid, mask.kind, mask.asked, device)
        else:
            window_layout(shape.grid, Places.of(shape.grid, mask.window, device))

    peak = None
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    build()
    synchronize(device)
    took = time.perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    layout = mask.layout
    return MaskRow(
        shape=shape.name,
        kind=mask.kind,
        asked=mask.asked,
        density=layout.density,
        attended=attended_pairs(layout) / shape.tokens**2,
        window=mask.window,
        full_blocks=layout.full_blocks,
        partial_blocks=layout.partial_blocks,
        bit_masks=layout.bit_masks.shape[0],
        build_ms=1000 * took,
        nbytes=layout.nbytes,
        peak_bytes=peak,
    )


def random_inputs(shape: Shape, run: Run) -> list[tuple[torch.Tensor, ...]]:
    """Sets of q, k, v and the gradient of the output, together well beyond the L2 cache."""
    size = 4 * shape.tokens * shape.heads * shape.head_dim * run.dtype.itemsize
    generator = torch.Generator(run.device).manual_seed(0)
    return [
        tuple(
            torch.randn(
                1, shape.tokens, shape.heads, shape.head_dim,
                device=run.device, dtype=run.dtype, generator=generator,
            )
            for _ in range(4)
        )
        for _ in range(2 if size > 256 << 20 else 4)
    ]  # fmt: skip


def prepared(candidate: Candidate, sets: list[tuple[torch.Tensor, ...]], backward: bool) -> Prepare:
    """Makes the call of a round: the forward pass, or the backward pass after one not timed."""

    def prepare(round_: int) -> Callable[[], object]:
        *inputs, grad = (candidate.arrange(x) for x in sets[round_ % len(sets)])
        if not backward:

            def forward() -> object:
                with torch.no_grad(), candidate.context():
                    return candidate.attend(*inputs)

            return forward
        leaves = [x.detach().requires_grad_() for x in inputs]
        with candidate.context():
            out = candidate.attend(*leaves)

        def gradients() -> object:
            with candidate.context():
                return torch.autograd.grad(out, leaves, grad)

        return gradients

    return prepare


@dataclass(frozen=True)
class Ready:
    """A candidate that works: what its first call took, how far it is off, what it warned of."""

    candidate: Candidate
    first_call_s: float
    error: float | None
    note: str


def ready(
    make: Callable[[], Candidate], group: Group, sets: list[tuple[torch.Tensor, ...]], run: Run
) -> Ready:
    """Make a candidate and call it once; raises whatever is wrong with it."""
    backward = group.direction == BACKWARD
    q, k, v, _ = sets[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        try:
            candidate = make()
            if backward and not candidate.backward:
                raise UnavailableError("it has no backward pass")
            found = errors(candidate, group.shape, q, k, v, backward=backward)
        except Exception as error:
            for warning in caught:
                error.add_note(str(warning.message))
            raise
        synchronize(run.device)
        took = time.perf_counter() - start
    notes = sorted({str(w.message).splitlines()[0] for w in caught})
    if candidate.name == OURS and run.device.type != "cpu" and candidate.mask:
        notes.insert(0, f"variant {chosen_variant(q, candidate.mask)}")
    worst = max(found.values(), key=lambda x: (x != x, x))
    return Ready(candidate, took, worst, "; ".join(notes))


def candidates_of(
    group: Group, masks: list[Mask], run: Run
) -> Iterator[tuple[str, str, Callable[[], Candidate]]]:
    """(key, name, maker) of everything to measure in a group, the most important first."""
    for name in DENSE:
        yield name, name, partial(dense, name)
    for name, make in makers(group.direction, run.variants, run.sweep):
        for mask in masks:
            yield (
                f"{name} {mask.kind} {mask.asked:g}",
                name,
                partial(make, group.shape, mask, run.dtype),
            )


def measure_group(group: Group, run: Run) -> None:
    """Add a group's rows, and what is around the kernel, to the results."""
    shape, backward = group.shape, group.direction == BACKWARD
    if run.device.type == "cuda":
        torch.compiler.reset()  # what was compiled for other shapes only adds guards
    masks = masks_for(shape, run)
    sets = random_inputs(shape, run)
    working: dict[str, Ready] = {}
    absent: dict[str, str] = {}
    for key, name, make in candidates_of(group, masks, run):
        what = f"{group.name} {key}"
        if name in absent:
            continue
        if run.budget.left < 0 and name not in (OURS, *DENSE):
            run.results.left_out.append(LeftOut(what, "the minutes are spent"))
            continue
        try:
            working[key] = ready(make, group, sets, run)
        except ImportError as error:
            absent[name] = describe(error)
            run.results.left_out.append(LeftOut(f"{group.name} {name}", absent[name]))
        except Exception as error:
            run.results.left_out.append(LeftOut(what, describe(error)))
    times, failed = interleave(
        {key: prepared(r.candidate, sets, backward) for key, r in working.items()},
        run.timer,
        least=LEAST_ROUNDS,
        most=run.rounds,
        seconds=min(run.group_seconds, max(0.0, run.budget.left / 2)),
    )
    run.results.left_out += [LeftOut(f"{group.name} {key}", why) for key, why in failed.items()]
    run.results.rows += rows_of(group, times, working)
    if not backward:
        densest = [mask for mask in masks if mask.kind == ALIGNED]
        run.results.calls.append(call_row(shape, densest[-1], sets, run))


def rows_of(group: Group, times: dict[str, list[float]], working: dict[str, Ready]) -> list[Row]:
    shape, best = group.shape, best_dense(times)
    rows = []
    for key, rounds in times.items():
        candidate, mask = working[key].candidate, working[key].candidate.mask
        pairs = attended_pairs(mask.layout) if mask else shape.tokens**2
        attended = pairs / shape.tokens**2
        spread = Spread.of(rounds)

        def of(
            name: str | None, rounds: list[float] = rounds, part: float = attended
        ) -> float | None:
            if name is None or not times.get(name):
                return None
            return part * median_ratio(times[name], rounds)

        rows.append(
            Row(
                shape=shape.name,
                direction=group.direction,
                candidate=candidate.name,
                head_dim=shape.head_dim,
                tokens=shape.tokens,
                kind=mask.kind if mask else "dense",
                asked=mask.asked if mask else 1.0,
                density=mask.layout.density if mask else 1.0,
                attended=attended,
                ms=spread.median,
                low=spread.low,
                high=spread.high,
                tflops=shape.flops(pairs, group.direction) / spread.median / 1e9,
                of_cudnn=of("cudnn"),
                of_best=of(best),
                first_call_s=working[key].first_call_s,
                error=working[key].error,
                rounds=rounds,
                note=working[key].note,
            )
        )
    return rows


def call_row(shape: Shape, mask: Mask, sets: list[tuple[torch.Tensor, ...]], run: Run) -> CallRow:
    """The public function beside the raw operator, and the permutation of all four tensors."""
    order = tile_order(shape.grid, run.device)
    back = order.argsort()
    functions = {make.__name__: make(shape, mask, run.dtype).attend for make in (public, raw)}

    def permute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        tiled = [x.index_select(1, order) for x in (q, k, v)]
        return [*tiled, q.index_select(1, back)]

    def in_turn(function: Callable[..., object]) -> Prepare:
        return lambda round_: partial(function, *sets[round_ % len(sets)][:3])

    calls = {name: in_turn(f) for name, f in {**functions, "permute": permute}.items()}
    with torch.no_grad():
        times, _ = interleave(calls, run.timer, least=5, most=5, seconds=0)
        host = {
            name: host_microseconds(
                partial(f, *sets[0][:3]), run.device, 20 if run.device.type == "cuda" else 2
            )
            for name, f in functions.items()
        }
    return CallRow(
        shape=shape.name,
        asked=mask.asked,
        public_us=host["public"],
        raw_us=host["raw"],
        public_ms=Spread.of(times["public"]).median,
        raw_ms=Spread.of(times["raw"]).median,
        permute_ms=Spread.of(times["permute"]).median,
        of_sparse=median_ratio(times["permute"], times["public"]),
    )
