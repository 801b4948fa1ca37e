"""The run of `diffattn lora train`: settings, model, data, training."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffattn._checks import (
    FLAG,
    Allowed,
    choice,
    did_you_mean,
    lists_to_tuples,
    number,
    refused,
    whole,
)
from diffattn._locks import alone, lock_existing

from ..errors import RunInterruptedError, UserError
from ..run.job import check_output_name
from ..run.loading import LoadedModel, choose_device, load_model
from ..run.machine import quiet_libraries
from ..run.memory import check_memory, free_memory
from ..run.method_settings import MethodOptions, attention_settings
from ..run.processes import rank
from ..run.prompts import read_prompts as lines_of
from ..run.refusals import lacks, refusals
from ..run.request import BASE_DTYPES, BUNDLED_MODEL, DTYPES, TEXT, Request, check_option, option
from ..run.video import check_format

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from diffattn.lora.cache import CachedClips
    from diffattn.lora.recipes import Recipe
    from diffattn.lora.settings import TrainSettings
    from diffattn.lora.trainer import StepReport, Trainer

    from .validation import Validation

# Folder of encoded clips in the output folder, unless --cache names another folder.
_CLIPS = "clips"
_SIZE = ("height", "width", "num_frames")
_NO_MEMORY = (
    "out of memory: try --gradient-checkpointing, --offload-activations, --base-dtype int8,"
    " --swap-blocks, fewer frames, a smaller size, a smaller --batch-size or --rank, or --dtype"
    " bfloat16; `diffattn lora plan --vram` says what fits"
)


@dataclass(frozen=True)
class TrainJob:
    """The data that a LoRA is trained on. `None` leaves a setting to the model or the machine.

    Attributes:
        model: pipeline folder or hub id.
        data: folder of clips and pictures.
        captions: table of file names and captions of `data`.
        prompts: file of prompts from which the dense model makes the clips, instead of `data`.
        cache: folder of the encoded clips.
        height, width: of the clips in pixels.
        num_frames: frames of a clip.
        fps: frames a second to take of a clip.
        vae_tiling: whether the VAE encodes large clips, and decodes large validation videos, in
            overlapping tiles; None for True.
        samples: videos of each prompt; None for one.
        teacher_steps: denoising steps of each such video.
        validate_every: optimiser steps between validation videos.
        validation_prompts: prompts of the validation videos.
        validation_prompts_file: file with more of these, one a line.
        validation_steps: denoising steps of the validation videos.
        lora_everywhere: whether the LoRA stays on in the dense steps of validation videos.
        dtype: of the frozen model, and of what it computes.
        base_dtype: how the frozen weights of blocks are stored, see `diffattn.lora.frozen`; None
            for `dtype`.
        device: "cpu", or the type of the accelerator.
    """

    model: str = BUNDLED_MODEL
    data: str | None = None
    captions: str | None = None
    prompts: str | None = None
    cache: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    vae_tiling: bool | None = None
    samples: int | None = None
    teacher_steps: int | None = None
    validate_every: int | None = None
    validation_prompts: tuple[str, ...] = ()
    validation_prompts_file: str | None = None
    validation_steps: int | None = None
    lora_everywhere: bool = False
    dtype: str | None = None
    base_dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError for settings of a wrong type, or that contradict each other."""
        lists_to_tuples(self, "validation_prompts")
        for name in refused(self, _ALLOWED):  # a config file may hold any type
            check_option(name, getattr(self, name), _ALLOWED[name])
        if (self.data is None) == (self.prompts is None):
            raise UserError(
                "give either --data, a folder of clips, or --prompts, a file of prompts of which"
                " the dense model makes them"
            )
        if self.captions is not None and self.data is None:
            raise UserError("--captions are those of the clips of --data, which is not given")
        if self.vae_tiling is not None and self.data is None and self.validate_every is None:
            raise UserError(
                "--vae-tiling is about the clips of --data and the videos of --validate-every,"
                " neither of which is given: the videos of --prompts are not encoded"
            )
        for name in ("samples", "teacher_steps"):
            if getattr(self, name) is not None and self.prompts is None:
                raise UserError(
                    f"{option(name)} is about the videos that the dense model makes of --prompts,"
                    f" which is not given"
                )
        if self.validation_prompts_file is not None:
            more = lines_of(Path(self.validation_prompts_file).expanduser()).prompts
            object.__setattr__(self, "validation_prompts", (*self.validation_prompts, *more))
            object.__setattr__(self, "validation_prompts_file", None)
        if bool(self.validation_prompts) != (self.validate_every is not None):
            raise UserError("--validate-every and --validation-prompt go together")
        for name in ("lora_everywhere", "validation_steps"):
            if getattr(self, name) and self.validate_every is None:
                raise UserError(
                    f"{option(name)} is about the videos of --validate-every, which is not given"
                )

    def request(self, prompt: str = "a video") -> Request:
        """A request for one video of the model, as `diffattn generate` takes it."""
        return Request(
            prompt,
            model=self.model,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            dtype=self.dtype,
            device=self.device,
        )


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(map(TEXT.holds, value))


_ALLOWED: Mapping[str, Allowed] = {
    **dict.fromkeys(
        ("model", "data", "captions", "prompts", "cache", "device", "validation_prompts_file"), TEXT
    ),
    **dict.fromkeys(("height", "width", "num_frames"), whole(1)),
    **dict.fromkeys(("teacher_steps", "validate_every", "validation_steps"), whole(1)),
    # The list of the videos is made at once.
    "samples": whole(1, 1_000_000),
    "fps": number(at_least=0.01, at_most=1000),
    "validation_prompts": Allowed("a list of prompts", _are_texts),
    "lora_everywhere": FLAG,
    "vae_tiling": FLAG,
    "dtype": choice(DTYPES),
    "base_dtype": choice(BASE_DTYPES),
}


def train_lora(
    given: Mapping[str, Any],
    method: MethodOptions,
    output: str,
    config: str | None,
    *,
    resume: bool,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    memory_check: bool = True,
) -> None:
    """Check the settings, prepare the data, train, and write the LoRA.

    Args:
        given: settings that the user gave, by the names of `TrainJob` and `TrainSettings`.
        method: the attention method.
        output: folder of the run.
        config: file with more settings, which `given` overrides.
        resume: go on from the last checkpoint in `output`.
        say: takes lines for the user.
        warn: takes one-line warnings.
        memory_check: whether to refuse what the device has too little memory for, even without
            gradients.

    Raises:
        UserError: if a setting, the data, the model or the output folder is refused.
        RunInterruptedError: on Ctrl-C; the message names the checkpoint of the last step, which is
            written before.
    """
    check_output_name(output)
    folder = Path(output)
    settings = ({} if config is None else read_config(config)) | dict(given)
    attention = attention_settings(method, settings.pop("attention", None))
    names = [item.name for item in dataclasses.fields(TrainJob)]
    job = TrainJob(**{name: settings.pop(name) for name in names if name in settings})

    from diffattn.lora.checkpoint import checkpoints
    from diffattn.lora.errors import LoraError
    from diffattn.lora.settings import TrainSettings

    def nowhere(line: str) -> None:
        """Drop a line that the first process says already."""

    try:
        training = TrainSettings.from_dict({**settings, "attention": attention})
        quiet_libraries()
        # The check knows weights in the dtype of the model, on one side of the bus.
        if memory_check and job.base_dtype is None and training.swap_blocks is None:
            check_memory(_one_part_at_a_time(job.request()))
        with lacks(_NO_MEMORY):
            _run(
                job,
                training,
                folder,
                resume,
                nowhere if rank() else say,
                nowhere if rank() else warn,
            )
    except LoraError as error:
        raise UserError(error) from None
    except KeyboardInterrupt:
        made = checkpoints(folder)[-1:]
        if made:
            raise RunInterruptedError(made, "go on from there with --resume") from None
        clips = _clips_folder(job, folder)
        raise RunInterruptedError([clips] if clips.exists() else []) from None


def _one_part_at_a_time(request: Request) -> Request:
    """A request that needs the memory of a training: an accelerator holds no two parts at once."""
    on_cpu = choose_device(request.device).type == "cpu"
    return request if on_cpu else dataclasses.replace(request, offload="model")


def read_config(name: str) -> dict[str, Any]:
    """Read a TOML or JSON file of settings.

    Raises:
        UserError: if the file cannot be read, or holds an unknown name or no method as "attention".
    """
    from diffattn.lora.settings import TrainSettings

    check_option("config", name, TEXT)
    path = Path(name)
    try:
        text = path.read_text("utf-8")
        settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"--config {path} is not {kind}: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must hold an object, not {type(settings).__name__}")
    known = [item.name for cls in (TrainJob, TrainSettings) for item in dataclasses.fields(cls)]
    for name in settings:
        if name not in known:
            raise UserError(f"--config {path}: unknown setting {name!r}{did_you_mean(name, known)}")
    attention = settings.get("attention", "")
    if not isinstance(attention, str | Mapping):
        raise UserError(
            f"--config {path}: attention is {attention!r}, but must be a method's name or a table"
            f" with its type"
        )
    return settings


def _run(
    job: TrainJob,
    settings: TrainSettings,
    output: Path,
    resume: bool,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    from diffattn.lora.checkpoint import alone_in, checkpoints
    from diffattn.lora.trainer import check_output

    is_new = not output.exists()
    if resume and is_new:
        raise UserError(
            f"--resume: there is no run in {output}, which does not exist; leave --resume out to"
            f" start one"
        )
    check_output(output, resume)
    if resume and not checkpoints(output):
        say(f"{output} has no checkpoint to go on from: the training starts at its first step")
    try:
        # The first process speaks for all processes of a run.
        with contextlib.nullcontext() if rank() else alone_in(output):
            _run_alone(job, settings, output, resume, say, warn)
    finally:
        if is_new and not rank():
            # A run that was refused leaves no empty folder.
            with contextlib.suppress(OSError):
                output.rmdir()


def _run_alone(
    job: TrainJob,
    settings: TrainSettings,
    output: Path,
    resume: bool,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Make the run in a folder that no other run writes into."""
    from diffattn.lora.adapter import SECOND_EXPERT, check_adapter, place_of
    from diffattn.lora.errors import LoraError
    from diffattn.lora.initial import read_initial, with_its_rank
    from diffattn.lora.progress import shown
    from diffattn.lora.recipes import recipe_for
    from diffattn.lora.swapping import swap_blocks
    from diffattn.lora.trainer import Trainer, make_accelerator

    from .placement import drop_all_but

    accelerator = make_accelerator(settings, output, on_cpu=job.device == "cpu")
    kind = accelerator.device.type
    if job.device not in (None, "cpu", kind):
        raise UserError(f"--device is {job.device!r}, but here it must be cpu or left out ({kind})")
    _check_storage(job, settings, accelerator.device)
    if job.validate_every is not None:
        _check_whole(accelerator, settings)
    request = dataclasses.replace(job.request(), device=str(accelerator.device))
    loaded = load_model(request, placed=False, base_dtype=job.base_dtype)
    job = _complete(job, loaded)
    try:
        text_length = loaded.defaults.get("max_sequence_length")
        plain = recipe_for(loaded.pipe, settings.denoiser, text_length)
    except ValueError as error:
        raise LoraError(error) from None
    recipe = plain.at_rate(job.fps).at_guidance(loaded.defaults.get("guidance_scale"))
    if job.prompts is not None and job.fps is not None and plain.at_rate(job.fps) is plain:
        raise UserError(
            f"--fps is the rate at which the clips of --data are read: {type(loaded.pipe).__name__}"
            f" makes the videos of --prompts without one"
        )
    if job.prompts is not None and settings.guidance is None and settings.completed().objective:
        # The clips are the dense model's at this scale.
        settings = dataclasses.replace(settings, guidance=recipe.guidance)
    if recipe.edits and job.validate_every is not None:
        raise UserError(
            f"--validate-every renders prompts alone, but {type(loaded.pipe).__name__} edits"
            f" pictures: leave it out, and try a checkpoint by diffattn generate --image"
        )
    # Encoding may take hours: what can be refused is refused before.
    recipe.check_settings(settings)
    settings = with_its_rank(settings, read_initial(settings, recipe.family))
    check_adapter(getattr(loaded.pipe, recipe.denoiser), settings)
    density = _check_method(loaded.pipe, recipe.denoiser, settings, job, accelerator.num_processes)
    _say_estimate(job, settings, loaded, recipe, accelerator.device, say)
    if settings.swap_blocks is not None and job.prompts is not None:
        # The dense model that makes the clips has its blocks come and go, too.
        swap_blocks(getattr(loaded.pipe, recipe.denoiser), settings.swap_blocks, accelerator.device)
    # The first process encodes the clips; the other processes find them in the folder.
    with accelerator.main_process_first(), _preparing(_clips_folder(job, output), say):
        clips = _prepare(job, loaded, recipe, output, accelerator.device, say, warn)
    if job.validate_every is None:
        drop_all_but(loaded.pipe, recipe.denoiser)
    say(f"{len(clips)} clips, {job.num_frames} frames {job.width}x{job.height}")
    say(recipe.about_times(loaded.pipe.scheduler, clips[0]["latents"].shape[1:], settings))
    trainer = Trainer(
        loaded.pipe,
        clips,
        clips.empty,
        settings,
        output,
        recipe=recipe,
        accelerator=accelerator,
        resume=resume,
        density=density,
    )
    validation = _validation(job, loaded, trainer, say)
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    start = f"from step {trainer.step} on" if trainer.step else f"{settings.steps} steps"
    processes = accelerator.num_processes
    if processes == 1 and _several_were_asked_for(os.environ):
        warn(
            "accelerate launch has started one process only: on the CPU it starts several by MPI"
            " alone (--mpirun_hostfile); this does without: torchrun --nproc-per-node 2 -m"
            " diffattn.pipelines lora train ... --device cpu"
        )
    say(
        f"training {count:,} weights under {settings.attention['type']} attention, {start}, in"
        f" {processes} process{'es' if processes > 1 else ''}"
    )
    unsaid: list[OSError] = []
    with shown(settings.steps, trainer.step) as show, _interrupts_wait() as interrupted:

        def report(made: StepReport) -> None:
            # Whoever reads the progress may have left: the steps made are kept before the end.
            try:
                show(made)
            except OSError as error:
                unsaid.append(error)

        trainer.train(
            report=report,
            between=lambda step: _look(validation, step, warn),
            stop=lambda: interrupted() or bool(unsaid),
        )
    if unsaid:
        raise unsaid[0]
    if trainer.step < settings.steps:
        raise KeyboardInterrupt
    say(f"{output}: trained for {trainer.step} steps; use it by diffattn generate --lora {output}")
    if recipe.denoiser == SECOND_EXPERT:
        say(
            f"in stock diffusers: pipe.load_lora_weights({str(place_of(output, SECOND_EXPERT))!r},"
            f" load_into_{SECOND_EXPERT}=True)"
        )


def _check_storage(job: TrainJob, settings: TrainSettings, device: torch.device) -> None:
    """Refuse an optimiser, and ways of storage, that cannot be: before anything is made."""
    import torch

    from diffattn.lora.errors import LoraError
    from diffattn.lora.frozen import check_available
    from diffattn.lora.optimizers import make_optimizer

    make_optimizer(
        [torch.nn.Parameter(torch.zeros(1, 1))],
        settings.optimizer,
        settings.learning_rate,
        settings.weight_decay,
        settings.optimizer_args,
    )
    if job.base_dtype is not None:
        check_available(job.base_dtype, device)
        if settings.dora:
            raise LoraError(
                f"dora reads frozen weights in full, but base_dtype is {job.base_dtype}: leave out"
                f" dora or base_dtype"
            )
    for name in ("swap_blocks", "offload_activations"):
        value = getattr(settings, name)
        if value and device.type == "cpu":
            raise UserError(
                f"{option(name)} moves what waits to main memory, but the device is cpu, where all"
                f" is: leave it out"
            )


def _say_estimate(
    job: TrainJob,
    settings: TrainSettings,
    loaded: LoadedModel,
    recipe: Recipe,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Say what memory and work the training needs, where that can be worked out."""
    import torch

    from diffattn.planning.folder import pipeline_shape

    from .estimate import estimate_for, in_a_line, measured_rate

    size = {name: getattr(job, name) for name in _SIZE}
    try:
        shape = pipeline_shape(loaded.pipe, job.model)
        dtype = getattr(torch, loaded.dtype)
        rate = measured_rate(dtype, device)
        made = estimate_for(
            loaded.pipe, recipe, shape, size, settings, job.base_dtype, dtype, device, rate
        )
    except (UserError, ValueError) as error:
        say(f"memory: not known beforehand: {error}")
        return
    say(in_a_line(made, free_memory(device)))


def _several_were_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher was asked for several processes, and made no group of them.

    For several processes it names their meeting point, whether or not it starts them.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    return launched and "WORLD_SIZE" not in environment


def _look(validation: Validation | None, step: int, warn: Callable[[str], None]) -> None:
    """Make the validation videos that are due; a failure does not end the training."""
    if validation is None:
        return
    try:
        validation.look(step)
    except UserError as error:
        warn(f"step {step}: no validation video: {error}")


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back while the block runs; the second one interrupts.

    Yields:
        A function that says whether Ctrl-C was pressed.
    """
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        if not rank():
            # A stream of Python's may be in use at this moment.
            line = "stopping after this step with a checkpoint; Ctrl-C again stops at once\n"
            if sys.__stderr__ is not None:
                with contextlib.suppress(OSError):
                    os.write(sys.__stderr__.fileno(), line.encode())

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _clips_folder(job: TrainJob, output: Path) -> Path:
    """The folder of the encoded clips."""
    return output / _CLIPS if job.cache is None else Path(job.cache)


@contextlib.contextmanager
def _preparing(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Have one run at a time write into a folder of encoded clips, which runs may share."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    lock = lock_existing(folder)
    if lock is None:
        say(f"waiting for another run, which prepares clips in {folder}")
    else:
        lock.release()
    try:
        with alone(folder):
            yield
    finally:
        if is_new:
            # A folder with clips in it stays.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _complete(job: TrainJob, loaded: LoadedModel) -> TrainJob:
    """Fill in the size from the model's recommendations, else from the call's defaults.

    Raises:
        UserError: if a size is missing, or the model cannot make the size.
    """
    from diffattn.models import pipeline_grid

    parameters = inspect.signature(type(loaded.pipe).__call__).parameters
    filled: dict[str, Any] = {}
    for name in _SIZE:
        if getattr(job, name) is not None:
            continue
        default = parameters[name].default if name in parameters else 1
        value = loaded.defaults.get(name, default)
        if value is None:
            raise UserError(
                f"{type(loaded.pipe).__name__} leaves it to its caller: give"
                f" --{name.replace('_', '-')}"
            )
        filled[name] = value
    full = dataclasses.replace(job, **filled)
    size: dict[str, Any] = {name: getattr(full, name) for name in _SIZE}
    try:
        pipeline_grid(loaded.pipe, **size)
    except ValueError as error:
        raise UserError(error) from None
    return full


def _check_method(
    pipe: Any, denoiser: str, settings: TrainSettings, job: TrainJob, processes: int
) -> float | None:
    """The part of the token pairs that the method keeps, for a method with a mask of its own.

    Raises:
        UserError: if the method does not fit the model or the size of the clips, or the processes
            cannot share the samples under the method as the settings say.
    """
    import torch

    import diffattn
    from diffattn.lora.together import check_together
    from diffattn.methods import from_dict
    from diffattn.models import pipeline_grid

    method = from_dict(settings.attention)
    size: dict[str, Any] = {name: getattr(job, name) for name in _SIZE}
    # Weights of the method may start from random numbers, and start anew in the training.
    with refusals(), torch.random.fork_rng():
        attachment = diffattn.set_attn_processor(pipe, method)
        try:
            assert attachment is not None
            grid = pipeline_grid(pipe, **size)
            if settings.context_parallel is not None:
                model, way = getattr(pipe, denoiser), settings.context_parallel
                check_together(model, way, method, processes, tokens=grid.tokens)
            return attachment.describe(grid, 1).density
        finally:
            diffattn.set_attn_processor(pipe, None)


def _prepare(
    job: TrainJob,
    loaded: LoadedModel,
    recipe: Recipe,
    output: Path,
    device: torch.device,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> CachedClips:
    """Encode the clips, or have the dense model make them; clips in the folder are kept."""
    from diffattn.lora.captions import captioned_clips, read_prompts
    from diffattn.lora.clips import find_clips, find_others
    from diffattn.lora.encoding import prepare
    from diffattn.lora.sources import apart_from_sources, with_sources
    from diffattn.lora.swapping import is_swapped
    from diffattn.lora.teacher import teach
    from diffattn.models import denoisers

    from .placement import on_demand, parts_of

    assert job.height is not None
    assert job.width is not None
    assert job.num_frames is not None
    size = job.height, job.width, job.num_frames
    folder = _clips_folder(job, output)
    if job.data is not None:
        data = Path(job.data).expanduser()
        table = None if job.captions is None else Path(job.captions).expanduser()
        paths = find_clips(data)
        if others := find_others(data, paths):
            warn(
                f"{len(others)} files in {data} are left out, since by their names they are neither"
                f" clips nor captions of clips, such as {others[0].relative_to(data)}"
            )
        sources: list[Path] = []
        if recipe.edits:
            paths, sources = apart_from_sources(data, paths)
        clips, left_out = captioned_clips(data, paths, table)
        if recipe.edits:
            clips, unused = with_sources(data, clips, sources)
            if unused:
                warn(f"{len(unused)} sources belong to no clip, such as {unused[0].name}")
        if left_out:
            warn(f"{len(left_out)} clips are not in {table}, such as {left_out[0].name}")
        say(f"encoding {len(clips)} clips of {data} into {folder}")
        # Clip by clip the VAE and the text encoders take turns; denoisers never work.
        encoders = parts_of(loaded.pipe).keys() - denoisers(loaded.pipe).keys()
        with on_demand(loaded.pipe, device, together=encoders):
            return prepare(
                loaded.pipe,
                recipe,
                clips,
                folder,
                *size,
                fps=job.fps,
                tiling=job.vae_tiling is not False,
                report=warn,
            )
    assert job.prompts is not None
    prompts = read_prompts(Path(job.prompts).expanduser())
    samples = 1 if job.samples is None else job.samples
    say(f"the dense model makes {len(prompts) * samples} videos into {folder}")
    extra: dict[str, Any] = {
        name: value
        for name, value in loaded.defaults.items()
        if name in ("guidance_scale", "negative_prompt")
    }
    call = inspect.signature(type(loaded.pipe).__call__).parameters
    steps = loaded.defaults.get("num_inference_steps", call["num_inference_steps"].default)
    loaded.pipe.set_progress_bar_config(disable=True)
    waiting = recipe.denoiser if is_swapped(getattr(loaded.pipe, recipe.denoiser)) else None
    with on_demand(loaded.pipe, device, resident=waiting):
        return teach(
            loaded.pipe,
            recipe,
            prompts,
            folder,
            *size,
            samples=samples,
            steps=steps if job.teacher_steps is None else job.teacher_steps,
            **extra,
        )


def _validation(
    job: TrainJob, loaded: LoadedModel, trainer: Trainer, say: Callable[[str], None]
) -> Validation | None:
    if job.validate_every is None:
        return None
    from .validation import Validation

    check_format(Path("video.mp4"), None)
    requests = [
        dataclasses.replace(job.request(prompt), steps=job.validation_steps)
        for prompt in job.validation_prompts
    ]
    return Validation(
        loaded,
        trainer,
        requests,
        job.validate_every,
        say,
        lora_everywhere=job.lora_everywhere,
        tiling=job.vae_tiling is not False,
    )


def _check_whole(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Refuse validation where a call of the model takes all processes."""
    if settings.context_parallel is not None:
        raise UserError(
            "--validate-every calls the model in one process, but --context-parallel spreads its"
            " calls over all: leave it out, and use the checkpoints with diffattn generate --lora"
        )
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED"):
        raise UserError(
            f"--validate-every calls the model in one process, but {kind} spreads it over all:"
            f" leave it out, and use the checkpoints with diffattn generate --lora"
        )
