"""What a training needs: memory by parts, choices that fit a device, and the work of a step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffattn._checks import number
from diffattn.lora.errors import LoraError
from diffattn.lora.footprint import PARTS, Choice, Footprint, Training
from diffattn.lora.frozen import BASE_DTYPES
from diffattn.lora.recipes import Recipe, recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.unloaded import unloaded_pipeline
from diffattn.methods import from_dict
from diffattn.methods.attention_share import ATTENTION_RATE, LINEAR_RATE

from ..errors import UserError
from ..run.loading import find_model, read_defaults
from ..run.model_shape import shape_of
from ..run.request import BUNDLED_MODEL, check_option

if TYPE_CHECKING:
    from diffattn.planning.published import ModelShape

_GIB = 1 << 30
_TERA = 1e12
# Bytes a second from main memory, by a bus of 16 lanes of the fourth generation, as measured
# elsewhere: less than its 32 GB/s.
_BUS_RATE = 25e9
# A training's choices from the fastest to the one that needs least, without swapping.
_LADDER = (
    {"gradient_checkpointing": False, "offload_activations": False},
    {"gradient_checkpointing": True, "offload_activations": False},
    {"gradient_checkpointing": True, "offload_activations": True},
)


@dataclass(frozen=True)
class Work:
    """The work of a step.

    Attributes:
        linear: FLOPs of everything but video self-attention.
        attention: FLOPs of video self-attention, the dense model's included.
        dense_attention: the same, were the method dense.
        seconds: the least time, at the rates of large matrix products and of attention.
    """

    linear: float
    attention: float
    dense_attention: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a training needs.

    Attributes:
        model: name of the model.
        size: height, width and frames.
        tokens: the tokens of a sample.
        trained: number of trained weights.
        bytes_of_clip: bytes of an encoded clip on the disk.
        settings: the settings of the training.
        footprint: the memory with the given choice.
        work: the work of a step; None for a method whose cost is not known before it runs.
        training: gives the memory with other choices.
    """

    model: str
    size: tuple[int, int, int]
    tokens: int
    trained: int
    bytes_of_clip: int
    settings: TrainSettings
    footprint: Footprint
    work: Work | None
    training: Training


def estimate(
    model: str,
    size: Mapping[str, int | None],
    settings: TrainSettings,
    base_dtype: str | None,
    dtype: torch.dtype,
    device: torch.device,
    rate: float | None = None,
) -> Estimate:
    """Work out what a training needs; nothing is loaded.

    Args:
        model: folder of a pipeline, the bundled model's name, or the id of a well-known model.
        size: height, width and frames of a sample; None for the model's own.
        settings: the settings of the training.
        base_dtype: how frozen weights are stored; None for `dtype`.
        dtype: the dtype that layers compute in.
        device: the device of the training.
        rate: TFLOP/s of large matrix products on the device; None for an H200's.

    Raises:
        UserError: if the model is not known or cannot make the size, or its steps are not counted.
    """
    folder = Path(find_model(model)) if model == BUNDLED_MODEL else Path(model).expanduser()
    try:
        pipe = unloaded_pipeline(str(folder) if folder.is_dir() else model)
        length = read_defaults(model, folder).get("max_sequence_length")
        recipe = recipe_for(pipe, settings.denoiser, length)
    except (ValueError, LoraError) as error:
        raise UserError(error) from None
    shape = replace(shape_of(model), name=model)
    return estimate_for(pipe, recipe, shape, size, settings, base_dtype, dtype, device, rate)


def estimate_for(
    pipe: Any,
    recipe: Recipe,
    shape: ModelShape,
    size: Mapping[str, int | None],
    settings: TrainSettings,
    base_dtype: str | None,
    dtype: torch.dtype,
    device: torch.device,
    rate: float | None = None,
) -> Estimate:
    """Work out what a training of a pipeline needs, as `estimate`, without touching it.

    Args:
        pipe: the pipeline, loaded or not.
        recipe: its recipe.
        shape: the shape of its denoiser.
        size, settings, base_dtype, dtype, device, rate: as in `estimate`.

    Raises:
        UserError: as `estimate`.
    """
    try:
        recipe.check_settings(settings)
        open_text = None in (shape.text_before, shape.text_after)
        grid = shape.grid(**size, text=recipe.text_length if open_text else None)
        model = getattr(pipe, recipe.denoiser)
        training = Training(model, recipe, settings, grid, dtype, device)
        choice = Choice(
            base_dtype,
            settings.swap_blocks or 0,
            settings.gradient_checkpointing,
            settings.offload_activations,
        )
        if choice.swap_blocks > training.blocks:
            raise LoraError(
                f"swap_blocks is {choice.swap_blocks}, but {shape.name} has {training.blocks}"
                f" blocks: give at most as many"
            )
        footprint = training.footprint(choice)
    except (ValueError, LoraError) as error:
        raise UserError(error) from None
    whole = [value or getattr(shape, name) or 1 for name, value in size.items()]
    return Estimate(
        shape.name,
        (whole[0], whole[1], whole[2]),
        grid.tokens,
        training.trained,
        training.bytes_of_clip,
        settings,
        footprint,
        _work(shape, size, training, choice, settings, rate or LINEAR_RATE),
        training,
    )


def _work(
    shape: ModelShape,
    size: Mapping[str, int | None],
    training: Training,
    choice: Choice,
    settings: TrainSettings,
    rate: float,
) -> Work | None:
    import diffattn

    made = training.one_pass(choice.gradient_checkpointing, choice.offload_activations)
    try:
        # Training is sparse at all noise levels: dense steps are those of denoising runs.
        given: dict[str, Any] = dict(size)
        plan = diffattn.plan(replace(shape, steps=1), from_dict(settings.attention), **given)
    except ValueError:
        return None
    density = plan.sparse_forward_flops / plan.dense_forward_flops
    times = settings.accumulation
    linear = times * made.linear
    attention = times * (made.dense + density * made.sparse)
    seconds = linear / (rate * _TERA)
    seconds += attention / (rate * ATTENTION_RATE / LINEAR_RATE * _TERA)
    # Weights come for the forward, and once more for the backward pass; while others work.
    swapped = 2 * times * training.weights.waiting(choice) / _BUS_RATE
    return Work(linear, attention, times * (made.dense + made.sparse), max(seconds, swapped))


def fitting(made: Estimate, budget: int) -> Iterator[Footprint]:
    """The fastest choices that fit into a memory, one for each way of storing frozen weights.

    A way that does not fit yields the choice that needs least.

    Args:
        made: an estimate.
        budget: bytes of the device.
    """
    for base_dtype in (None, *BASE_DTYPES):
        yield _fastest(made.training, base_dtype, budget)


def _fastest(training: Training, base_dtype: str | None, budget: int) -> Footprint:
    found = training.footprint(Choice(base_dtype, 0, **_LADDER[0]))
    for step in _LADDER:
        found = training.footprint(Choice(base_dtype, 0, **step))
        if found.total <= budget:
            return found
        if not step["gradient_checkpointing"]:
            continue
        for count in range(1, training.blocks + 1):
            found = training.footprint(Choice(base_dtype, count, **step))
            if found.total <= budget:
                return found
    return found


def options_of(choice: Choice) -> str:
    """The options of `diffattn lora train` for a choice."""
    said = [
        f"--base-dtype {choice.base_dtype}" if choice.base_dtype else "",
        "--gradient-checkpointing" if choice.gradient_checkpointing else "",
        "--offload-activations" if choice.offload_activations else "",
        f"--swap-blocks {choice.swap_blocks}" if choice.swap_blocks else "",
    ]
    return " ".join(filter(None, said)) or "none"


def measured_rate(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large matrix product on a device, the best of a few."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times) / _TERA


def in_a_line(made: Estimate, free: int | None) -> str:
    """An estimate in one line, beside the memory that a device has free."""
    need = made.footprint
    there = "" if free is None else f"; {in_words(free)} are free"
    line = (
        f"memory: about {in_words(need.total)} (frozen weights"
        f" {in_words(need.weights + need.unpacked)}, activations {in_words(need.activations)},"
        f" trained weights with gradients and optimiser"
        f" {in_words(need.adapter + need.gradients + need.optimizer)}){there}"
    )
    if made.work is None:
        return line
    return f"{line}; {_of_attention(made.work)}, at least {made.work.seconds:,.2g} s here"


def in_words(size: int) -> str:
    """Bytes for people."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / (1 << 20):.2f} MiB"


def _of_attention(work: Work) -> str:
    share = work.attention / work.dense_attention
    return (
        f"a step: {_flops(work.linear)} outside of attention, {_flops(work.attention)} in it"
        f" ({share:.0%} of a dense step's)"
    )


def _flops(flops: float) -> str:
    for name, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:,.1f} {name}FLOP"
    return f"{flops / 1e6:,.1f} MFLOP"


_NAMES = {
    "weights": "frozen weights",
    "adapter": "trained weights",
    "gradients": "their gradients",
    "optimizer": "optimiser",
    "activations": "activations",
    "unpacked": "weights at work",
    "overhead": "driver, kernels",
}


def lines(made: Estimate, budget: int | None, rate: float | None) -> Iterator[str]:
    """An estimate for people.

    Args:
        made: the estimate.
        budget: bytes of the device; None to leave out what fits.
        rate: TFLOP/s of large matrix products on the device; None for an H200's.
    """
    height, width, frames = made.size
    method = made.settings.attention["type"]
    yield (
        f"{made.model}: {frames} frames {width}x{height}, {made.tokens:,} tokens, {method}, rank"
        f" {made.settings.completed().rank}, {made.trained:,} trained weights,"
        f" {made.settings.optimizer}"
    )
    yield f"options: {options_of(made.footprint.choice)}"
    yield ""
    need = made.footprint
    rows = [(_NAMES[name], getattr(need, name)) for name in PARTS]
    rows += [("total", need.total), ("in main memory", need.waiting)]
    for name, size in (*rows, ("a clip on the disk", made.bytes_of_clip)):
        yield f"{name:<18}{in_words(size):>14}"
    yield ""
    if made.work is None:
        yield f"the cost of {method} is not known before it runs: no time"
    else:
        whose = "an H200's; --tflops for another device" if rate is None else "--tflops"
        yield _of_attention(made.work)
        least = f"{made.work.seconds:,.2g} s a step"
        yield f"at least {least} at {rate or LINEAR_RATE:g} TFLOP/s ({whose})"
    if budget is None:
        return
    yield ""
    yield f"the fastest that fits {budget / _GIB:g} GiB, by the storage of frozen weights:"
    for found in fitting(made, budget):
        says = f"{in_words(found.total)}: {options_of(found.choice)}"
        kind = found.choice.base_dtype or "unchanged"
        if found.total > budget:
            says = f"does not fit: at least {in_words(found.total)}"
        yield f"  {kind:<10}{says}"


def as_json(made: Estimate, budget: int | None) -> dict[str, Any]:
    """An estimate as JSON types, sizes in bytes."""
    result: dict[str, Any] = {
        "model": made.model,
        **dict(zip(("height", "width", "num_frames"), made.size, strict=True)),
        "tokens": made.tokens,
        "trained_weights": made.trained,
        "bytes_of_clip": made.bytes_of_clip,
        "settings": made.settings.completed().to_dict(),
        "memory": _memory(made.footprint),
        "work": None if made.work is None else dataclasses.asdict(made.work),
    }
    if budget is not None:
        found = list(fitting(made, budget))
        result["vram"] = budget
        result["fitting"] = [_memory(one) | {"fits": one.total <= budget} for one in found]
    return result


def _memory(need: Footprint) -> dict[str, Any]:
    return dataclasses.asdict(need) | {"total": need.total}


def bytes_of(name: str, gib: float) -> int:
    """Bytes from GiB of an option.

    Raises:
        UserError: if the number is not above 0.
    """
    check_option(name, gib, number(above=0, at_most=1e6))
    return round(gib * _GIB)
