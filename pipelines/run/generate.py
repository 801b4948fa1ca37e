"""The run: load, attach, render, compare, write."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunInterruptedError, UserError, one_line
from .advice import cautions, cost_words, estimated_cost
from .compare import psnr, side_by_side, ssim
from .loading import LoadedModel, load_model
from .machine import describe_device, quiet_libraries
from .memory import check_memory
from .outputs import Outputs, staged
from .pipeline_class import makes_pictures
from .processes import count, rank, spread, together
from .progress import LoopTimes, clock, watched
from .refusals import gave_nan, lacks, refusals
from .request import Request
from .sidecar import write_record
from .sizing import Run, call_arguments, complete
from .sources import read_sources
from .trained_lora import load_weights_of_method, where_all_are_on
from .video import write_picture, write_video
from .vocabulary import warn_of_words

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffattn.methods import Method

    from .job import Job

_WARM_UP = "timed after one untimed step of each"
_NO_SCHEDULE: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}


@dataclass(frozen=True)
class Rendering:
    """A video or a picture, and the time that its rendering took.

    Attributes:
        frames: (count, height, width, 3), uint8; one frame for a picture.
        audio: float32 (channels, samples) of the video's sound; None where the pipeline makes none.
        total_seconds: of the whole pipeline call: text encoding, denoising, decoding; without
            loading and writing.
        loop_seconds: of the denoising loop alone.
        step_seconds: of each denoising step.
    """

    frames: np.ndarray
    total_seconds: float
    loop_seconds: float
    step_seconds: list[float]
    audio: np.ndarray | None = None

    def timings(self) -> dict[str, Any]:
        """The times as the record holds them."""
        return {
            "total_seconds": round(self.total_seconds, 4),
            "loop_seconds": round(self.loop_seconds, 4),
            "step_seconds": [round(seconds, 4) for seconds in self.step_seconds],
        }


def generate(
    job: Job,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    *,
    memory_check: bool = True,
) -> list[Path]:
    """Render each request of a job into its outputs.

    Args:
        job: the videos to make, and the path of each.
        say: takes lines for the user.
        warn: takes one-line warnings.
        memory_check: whether to refuse what the device has too little memory for.

    Returns:
        The videos written.

    Raises:
        UserError: if the model, a size, the LoRA or an output is refused.
        RunInterruptedError: on Ctrl-C; the message names the finished videos, which are kept.
    """
    kept: list[Path] = []
    try:
        quiet_libraries()
        # Processes that share a video share its memory too.
        if memory_check and count() == 1:
            check_memory(job.requests[0])
        with together(job.requests[0]):
            _make_all(job, kept, say, warn)
    except KeyboardInterrupt:
        raise RunInterruptedError(kept) from None
    except UserError as error:
        if kept:
            raise UserError(f"{error} (kept: {', '.join(map(str, kept))})") from None
        raise
    return kept


def _make_all(
    job: Job,
    kept: list[Path],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Load the model and make the files of every video."""
    start = time.perf_counter()
    sources = read_sources(job.requests[0], say)
    loaded = load_model(job.requests[0], job.record)
    runs = [complete(request, loaded, sources, pictures=True) for request in job.requests]
    spread(loaded.pipe, runs[0].request, runs[0].grid)
    load_seconds = time.perf_counter() - start
    say(_headline(runs[0].request, loaded))
    warn, describe = _once(warn), _once(say)
    for run in runs:
        warn_of_words(loaded.pipe, run.request.prompt, warn)
    for number, (run, outputs) in enumerate(zip(runs, job.outputs, strict=True), start=1):
        if len(runs) > 1:
            say(f"[{number}/{len(runs)}] {run.request.prompt}")
        _make(run, loaded, outputs, load_seconds, kept, say, describe, warn)


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """A function that passes each line on once, for videos of several prompts."""
    said: set[str] = set()

    def tell_once(line: str) -> None:
        if line not in said:
            said.add(line)
            tell(line)

    return tell_once


def _make(
    run: Run,
    loaded: LoadedModel,
    outputs: Outputs,
    load_seconds: float,
    kept: list[Path],
    say: Callable[[str], None],
    describe: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Make the files of one video; `describe` takes the line about the method."""
    request, method = run.request, run.method
    with refusals(), attached(loaded.pipe, run) as attachment:
        attention = _describe(attachment, run, loaded.pipe, warn)
    describe(f"attention: {attention.pop('summary')}")
    if run.record is not None:
        dense_steps = attention.get("dense_steps", 0) + attention.get("last_dense_steps", 0)
        for line in where_all_are_on(
            method.type,
            request.lora,
            run.record,
            dense_steps,
            everywhere=request.lora_everywhere,
        ):
            describe(line)
    dense = None
    if request.compare:
        warm_up(run, loaded)
        dense = render(request, loaded, "dense", run.sources)
    with attached(loaded.pipe, run):
        sparse = render(request, loaded, method.type, run.sources)
    if rank():
        return  # The first process has the same frames and writes the files.
    if len(sparse.frames) != request.num_frames:
        warn(f"the model made {len(sparse.frames)} frames, not {request.num_frames}")
    height, width = sparse.frames.shape[1:3]
    if (height, width) != (request.height, request.width):
        warn(f"the model made {width}x{height} pixels, not {request.width}x{request.height}")

    facts: dict[str, Any] = {
        "files": {"picture" if outputs.picture else "video": outputs.video.name},
        "device": describe_device(loaded.device),
        "processes": count(),
        "attention": attention,
        "model_defaults": dict(loaded.defaults),
        "timings": {"load_seconds": round(load_seconds, 4), **sparse.timings()},
    }
    with staged(outputs, kept) as folder:
        _write(folder / outputs.video.name, sparse.frames, request.fps)
        if dense is not None:
            facts["files"] |= {"dense": outputs.dense.name, "compare": outputs.comparison.name}
            facts["comparison"] = _compare(dense, sparse)
            _write(folder / outputs.dense.name, dense.frames, request.fps)
            both = side_by_side(
                dense.frames,
                sparse.frames,
                f"dense {dense.total_seconds:.1f} s",
                f"{method.type} {sparse.total_seconds:.1f} s",
            )
            _write(folder / outputs.comparison.name, both, request.fps)
        write_record(folder / outputs.sidecar.name, request, facts)
    if dense is not None:
        for line in _comparison_lines(method.type, dense, sparse, facts["comparison"]):
            say(line)
    say(_summary(outputs, sparse, facts))


def _write(path: Path, frames: np.ndarray, fps: float | None) -> None:
    """Write a video, or a picture, which has no frames a second."""
    if fps is not None:
        write_video(path, frames, fps)
        return
    from PIL import Image

    write_picture(path, Image.fromarray(frames[0]))


def render(
    request: Request,
    loaded: LoadedModel,
    label: str,
    sources: Mapping[str, Any] = MappingProxyType({}),
    *,
    shown: bool = True,
) -> Rendering:
    """Call the pipeline, and time the call.

    Args:
        request: the complete request.
        loaded: the model.
        label: names the run on the screen.
        sources: arguments of the call: the pictures and the video to start from.
        shown: whether the screen shows the steps.

    Raises:
        UserError: if the pipeline refuses its arguments, runs out of memory or gives NaN.
    """
    with watched(loaded.pipe, label, shown=shown) as times:
        start = clock()
        arguments = call_arguments(request, loaded) | dict(sources)
        frames, audio = _call(loaded.pipe, arguments, request.seed, times)
        total = clock() - start
    if not np.isfinite(frames).all():
        raise UserError(gave_nan(loaded.dtype))
    pixels = (frames * 255).round().clip(0, 255).astype(np.uint8)
    return Rendering(pixels, total, times.loop_seconds, times.step_seconds, audio)


def _call(
    pipe: DiffusionPipeline, arguments: Mapping[str, Any], seed: int, times: LoopTimes
) -> tuple[np.ndarray, np.ndarray | None]:
    import torch

    # A generator on the CPU gives the same noise for every device.
    generator = torch.Generator("cpu").manual_seed(seed)
    try:
        with lacks():
            out = pipe(**arguments, generator=generator, output_type="np")
    except NameError as error:
        # Some pipelines of diffusers use a package that they import only if it is there.
        if error.name is None or importlib.util.find_spec(error.name) is not None:
            raise
        raise UserError(
            f"{type(pipe).__name__} needs the package {error.name}: pip install {error.name}"
        ) from error
    except ValueError as error:
        if times.step_seconds:
            raise
        raise UserError(f"{type(pipe).__name__} refuses: {one_line(error)}") from error
    frames = np.asarray(out.images if makes_pictures(type(pipe)) else out.frames[0])
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise UserError(
            f"{type(pipe).__name__} makes several layers, not one picture: call it from Python with"
            f" pipe.set_attn_processor(...)"
        )
    return frames, _sound(getattr(out, "audio", None))


def _sound(audio: Any) -> np.ndarray | None:
    """The sound of the first video that a call made, (channels, samples)."""
    if audio is None:
        return None
    import torch

    first = audio[0]
    samples = first.detach().float().cpu().numpy() if isinstance(first, torch.Tensor) else first
    return np.atleast_2d(np.asarray(samples, np.float32))


def warm_up(run: Run, loaded: LoadedModel) -> None:
    """Run one untimed step of dense and of sparse attention, so that neither pays for being first.

    The first call at a size fills allocator and kernel caches, and compiles kernels on a GPU.
    """
    step = dataclasses.replace(run.request, steps=1)
    render(step, loaded, "warming up (dense)", run.sources)
    sparse = sparse_throughout(run)
    with attached(loaded.pipe, dataclasses.replace(run, method=sparse)):
        render(step, loaded, f"warming up ({sparse.type})", run.sources)


def sparse_throughout(run: Run) -> Method:
    """The method of a run's last step, for runs of any length, with every step and layer sparse.

    A schedule that keeps the first steps dense would leave the sparse kernels cold.
    """
    steps = run.request.steps
    last = run.method.at_step(steps - 1, steps) if steps else run.method.at_step(0, 0)
    no_schedule: Any = _NO_SCHEDULE
    return dataclasses.replace(last, **no_schedule)


@contextmanager
def attached(pipe: DiffusionPipeline, run: Run) -> Iterator[Any]:
    """Attach a run's method to the pipeline while the block runs; dense is the untouched model.

    Weights of the method that were trained with the run's LoRA are loaded too.
    """
    import diffattn

    if run.method.type == "dense":
        yield None
        return
    with refusals():
        attachment = diffattn.set_attn_processor(pipe, run.method)
    try:
        if run.record is not None:
            load_weights_of_method(pipe, run.method, run.request.lora, run.record)
        yield attachment
    finally:
        diffattn.set_attn_processor(pipe, None)


def _describe(
    attachment: Any, run: Run, pipe: DiffusionPipeline, warn: Callable[[str], None]
) -> dict[str, Any]:
    """The attachment's cost and schedule as JSON types, with a summary in words.

    What the method costs in quality is said as a warning.
    """
    if attachment is None:
        return {
            "summary": "dense, the untouched model",
            "method": {"type": "dense"},
            "density": 1.0,
        }
    grid = run.grid
    description = attachment.describe(grid, run.request.steps)
    facts = {item.name: getattr(description, item.name) for item in dataclasses.fields(description)}
    facts["method"] = description.method.to_dict()
    facts["grid"] = [grid.frames, grid.height, grid.width]
    summary = str(description)
    cost = estimated_cost(pipe, run)
    if cost is not None:
        facts["share_of_dense_flops"] = cost.run_density
        summary += f"; {cost_words(cost)}"
    for caution in cautions(run, description):
        warn(caution)
    return {"summary": summary, **facts}


def _compare(dense: Rendering, sparse: Rendering) -> dict[str, Any]:
    ratio = psnr(dense.frames, sparse.frames)
    return {
        # JSON has no infinity: null means that the frames are equal.
        "psnr_db": None if math.isinf(ratio) else round(ratio, 3),
        "ssim": round(ssim(dense.frames, sparse.frames), 5),
        "speedup_loop": round(dense.loop_seconds / sparse.loop_seconds, 3),
        "speedup_total": round(dense.total_seconds / sparse.total_seconds, 3),
        "dense": dense.timings(),
        "warm_up": _WARM_UP,
    }


def _comparison_lines(
    name: str, dense: Rendering, sparse: Rendering, comparison: Mapping[str, Any]
) -> list[str]:
    width = max(len("dense"), len(name))
    quality = comparison["psnr_db"]
    closeness = "equal frames" if quality is None else f"PSNR {quality:.2f} dB"
    return [
        *(
            f"{label:{width}}  denoising {run.loop_seconds:.2f} s, total {run.total_seconds:.2f} s"
            for label, run in (("dense", dense), (name, sparse))
        ),
        f"{name} against dense: {closeness}, SSIM {comparison['ssim']:.4f}; speed-up "
        f"{comparison['speedup_loop']:.2f}x denoising, {comparison['speedup_total']:.2f}x total "
        f"({_WARM_UP})",
    ]


def _headline(request: Request, loaded: LoadedModel) -> str:
    device = describe_device(loaded.device)["name"]
    guidance = "" if request.guidance_scale is None else f", guidance {request.guidance_scale:g}"
    shared = "" if count() == 1 else f", {request.context_parallel} over {count()} processes"
    return (
        f"{request.model}: {type(loaded.pipe).__name__}, {loaded.dtype} on {loaded.device} "
        f"({device}){shared}; "
        f"{_size(request)}, {request.steps} steps"
        f"{guidance}, seed {request.seed}"
    )


def _size(request: Request) -> str:
    """The frames of a video and their size, or the size of a picture."""
    frames = "" if request.fps is None else f"{request.num_frames} frames "
    return f"{frames}{request.width}x{request.height}"


def _summary(outputs: Outputs, sparse: Rendering, facts: Mapping[str, Any]) -> str:
    path = outputs.on_disk(outputs.video)
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    count, height, width = sparse.frames.shape[:3]
    frames = "" if outputs.picture else f"{count} frames "
    step = sparse.loop_seconds / max(1, len(sparse.step_seconds))
    speedup = ""
    if "comparison" in facts:
        speedup = f", {facts['comparison']['speedup_total']:.2f}x as fast as dense"
    return (
        f"{path}: {frames}{width}x{height}, {size / 1024:.0f} KiB, "
        f"{sparse.total_seconds:.1f} s ({step:.2f} s/step){speedup}"
    )
