"""The training loop on accelerate; one process or many draw the same random numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers

from diffattn.attach.attachment import Attachment, set_attn_processor
from diffattn.lora.adapter import (
    LORA_FILE,
    LoraRecord,
    adapter_weights,
    add_adapter,
    place_of,
    save_adapter,
    start_from,
)
from diffattn.lora.average import FOLDER as EMA_FOLDER
from diffattn.lora.average import MovingAverage
from diffattn.lora.cache import fingerprint
from diffattn.lora.card import write_card
from diffattn.lora.checkpoint import (
    WEIGHTS,
    Progress,
    checkpoints,
    keep_trained_only,
    load_checkpoint,
    replace_files,
    save_checkpoint,
)
from diffattn.lora.describe import figures_of, read_log
from diffattn.lora.draws import Clips, draw_batch, sample_numbers, seed_dropout
from diffattn.lora.errors import LoraError
from diffattn.lora.held_out import DRAWS, hold_out
from diffattn.lora.initial import initialise, read_initial, with_its_rank
from diffattn.lora.losses import Batch, Student
from diffattn.lora.optimizers import at_result, make_optimizer, set_rate
from diffattn.lora.plot import plot_losses
from diffattn.lora.recipes import Recipe, recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.sharded import (
    check_launch,
    check_sharding,
    check_weights,
    is_sharded,
    load_sharded,
    save_sharded,
    whole,
)
from diffattn.lora.swapping import is_swapped, move_added, swap_blocks, tensors_of
from diffattn.lora.together import check_together, share_samples, shared_loss
from diffattn.methods import Method, from_dict

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LOG_FILE = "losses.jsonl"
HELD_OUT_FILE = "held-out.jsonl"
PLOT_FILE = "losses.png"
SETTINGS_FILE = "settings.json"

# Settings that may change when a run is resumed. A falling learning rate also depends on `steps`.
_FREE = (
    "steps", "checkpoint_every", "keep_checkpoints", "trackers", "gradient_checkpointing",
    "offload_activations", "swap_blocks",
)  # fmt: skip


@dataclass(frozen=True)
class StepReport:
    """The result of an optimiser step.

    Attributes:
        step: number of optimiser steps made, this step included.
        steps: number of steps of the whole run.
        losses: the losses by name, without their weights; "loss" is the weighted sum.
        learning_rate: the learning rate of the step.
        seconds: the duration of the step.
        memory: the most bytes in use so far, on the accelerator, or by the process on a CPU.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    learning_rate: float
    seconds: float
    memory: int


class Trainer:
    """A pipeline whose LoRA is being trained.

    Attributes:
        pipe: the pipeline with the method and the LoRA, ready to be called between steps.
        settings: the settings, without a None that the method's paper replaces.
        output: the folder of the run.
        accelerator: the accelerator of the run.
        recipe: the recipe of the pipeline.
        model: the denoiser.
        attachment: the attached method.
        step: number of optimiser steps made.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        clips: Clips,
        empty: Mapping[str, torch.Tensor],
        settings: TrainSettings,
        output: Path,
        *,
        recipe: Recipe | None = None,
        accelerator: Accelerator | None = None,
        resume: bool = False,
        density: float | None = None,
    ) -> None:
        """Attach the method, add the LoRA, and load the last checkpoint if there is one.

        Args:
            pipe: a stock pipeline; accelerate chooses the denoiser's device.
            clips: the training data.
            empty: the conditions of the empty caption, without batch axis.
            settings: the settings of the training.
            output: folder for the LoRA, the checkpoints and the log.
            recipe: the recipe of the pipeline; the result of `recipe_for` when None.
            accelerator: the accelerator of the run; made from the settings when None.
            resume: whether to continue a run in `output`; otherwise such a run is an error.
            density: the part of the token pairs that the method keeps, for the record.

        Raises:
            LoraError: if the pipeline cannot be trained with these settings, there are no clips,
                `output` holds a run and `resume` is False, or the run in `output` has other
                settings or data.
        """
        self.pipe, self.output = pipe, output
        self.step = 0
        # The step of the last look at held-out clips.
        self._looked_at: int | None = None
        self._empty, self._density = empty, density
        if getattr(pipe, "scheduler", None) is None:
            raise LoraError(
                f"{type(pipe).__name__} has no scheduler, which says how noise is added: load it"
                f" with its scheduler/scheduler_config.json"
            )
        if not hasattr(pipe, "save_lora_weights"):
            raise LoraError(f"{type(pipe).__name__} takes no LoRA in diffusers")
        if not len(clips):
            raise LoraError("there are no clips to learn from")
        self._clips, self._held_out = hold_out(clips, settings.held_out or 0, settings.seed)
        check_output(output, resume)
        self.accelerator = accelerator or make_accelerator(settings, output)
        check_sharding(self.accelerator, os.environ)
        try:
            self.recipe = recipe or recipe_for(pipe, settings.denoiser)
            self.recipe.check_settings(settings)
            initial = read_initial(settings, self.recipe.family)
            settings = with_its_rank(settings, initial)
            self.settings = settings.completed()
            self.model: Any = getattr(pipe, self.recipe.denoiser)
            # The fingerprint comes before the method adds weights, which may start at random.
            self._base = fingerprint(self.model)
            swapped = self._swap_blocks()
            self.attachment = self._attach()
        except (ValueError, TypeError) as error:
            raise LoraError(error) from None
        if settings.method_weights is not None:
            start_from(pipe, Path(settings.method_weights), self.recipe.denoiser)
        self._trained = add_adapter(self.model, self.settings)
        if initial is not None:
            initialise(self.model, self._trained, initial)
        if settings.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if is_sharded(self.accelerator):
            check_weights(self.model, self.settings.optimizer)
        self._share_samples()
        student = Student(self.model, self.recipe, pipe.scheduler, self.attachment, self.settings)
        if swapped is not None:
            move_added(self.model, swapped, self.accelerator.device)
        optimizer = make_optimizer(
            list(self._trained.values()),
            settings.optimizer,
            settings.learning_rate,
            settings.weight_decay,
            settings.optimizer_args,
        )
        self._student, self._optimizer = self.accelerator.prepare(
            student.eval(), optimizer, device_placement=[swapped is None, True]
        )
        # FSDP has put other parameters in their place.
        self._trained = {name: self.model.get_parameter(name) for name in self._trained}
        keep_trained_only(self.accelerator, self._trained)
        found = checkpoints(output)
        if found:
            self.step = load_checkpoint(found[-1], self._identity(), self._read_state)
        self._average = self._start_average(found[-1] if found else None)
        if self.accelerator.is_main_process:
            self._write_settings()

    def train(
        self,
        until: int | None = None,
        report: Callable[[StepReport], None] = lambda _: None,
        between: Callable[[int], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make the remaining steps with their checkpoints, and write the LoRA.

        Args:
            until: the last step to make, counted from the start of the run; None for all steps.
            report: called in the main process after every step, with the step's report.
            between: called in the main process after every step and its checkpoint, with the number
                of steps made.
            stop: asked in every process after every step. If any process answers True, all write a
                checkpoint and return, without the LoRA of the end.

        Raises:
            LoraError: if the loss is not finite, or a file cannot be written.
        """
        last = self.settings.steps if until is None else min(until, self.settings.steps)
        if self.step == 0:
            self._look_at_held_out()
        while self.step < last:
            made = self._make_step()
            if self._average is not None:
                self._average.update(self._trained, self.step)
            if self.accelerator.is_main_process:
                self._log(made)
                report(made)
            stopped = self._any(stop()) and self.step < last
            if self.step % self.settings.checkpoint_every == 0 or self.step == last or stopped:
                self.save_checkpoint()
                self._look_at_held_out()
                self._plot()
            if stopped:
                self.accelerator.end_training()
                return
            if self.accelerator.is_main_process:
                between(self.step)
            self.accelerator.wait_for_everyone()
        self.save()
        self.accelerator.end_training()

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step."""
        save_checkpoint(
            self.accelerator,
            self.output,
            Progress(self.step, self._identity()),
            self._write_state,
            self.settings.keep_checkpoints,
        )

    def save(self) -> Path:
        """Write the LoRA into the output folder.

        Returns:
            The LoRA's file.
        """
        place = place_of(self.output, self.recipe.denoiser)
        with self.at_result():
            weights = self._weights()
            if self.accelerator.is_main_process:
                replace_files(place, lambda folder: self._write(folder, place, weights))
        if self._average is not None and self.accelerator.is_main_process:
            average, there = {**weights, **self._average.weights}, place / EMA_FOLDER
            replace_files(there, lambda folder: self._write(folder, there, average))
        self.accelerator.wait_for_everyone()
        return place / LORA_FILE

    @contextlib.contextmanager
    def at_result(self) -> Iterator[None]:
        """Have the trained weights as the training so far leaves them, while the block runs."""
        trained = list(self._trained.values())
        with at_result(self._optimizer.optimizer, trained, self.settings.optimizer):
            yield

    def loss(self, numbers: Sequence[int]) -> dict[str, float]:
        """The losses of the samples with these numbers, by name, without a training step."""
        with torch.no_grad(), self.at_result():
            losses = self._student(self._draw(numbers))
        return {name: float(loss) for name, loss in losses.items()}

    def _make_step(self) -> StepReport:
        start = time.perf_counter()
        settings, accelerator = self.settings, self.accelerator
        # accelerate keeps this number for all trainings of a process.
        accelerator.gradient_accumulation_steps = settings.accumulation
        self._student.train()
        rate = settings.rate_at(self.step)
        set_rate(self._optimizer, rate)
        totals: dict[str, torch.Tensor] = {}
        for part in range(settings.accumulation):
            numbers = sample_numbers(settings, self.step, part, *self._place())
            batch = self._draw(numbers)
            seed_dropout(settings, numbers)
            with accelerator.accumulate(self._student):
                losses = self._student(batch)
                accelerator.backward(self._driving(losses))
                if accelerator.sync_gradients:
                    # Frozen parameters are passed, too: accelerate recognises a model that FSDP has
                    # spread by all of the model's parameters, which FSDP has replaced.
                    accelerator.clip_grad_norm_(self._student.parameters(), settings.max_grad_norm)
                self._optimizer.step()
                self._optimizer.zero_grad()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / settings.accumulation
        # Between steps the pipeline may be called, without dropout.
        self._student.eval()
        means = accelerator.reduce(torch.stack(list(totals.values())).float(), "mean").tolist()
        self.step += 1
        named = dict(zip(totals, means, strict=True))
        if not math.isfinite(named["loss"]):
            raise LoraError(
                f"the loss is {named['loss']} at step {self.step}: try a smaller learning_rate than"
                f" {settings.learning_rate:g}, or mixed_precision bf16 or no"
            )
        seconds = time.perf_counter() - start
        return StepReport(self.step, settings.steps, named, rate, seconds, memory_in_use())

    def _share_samples(self) -> None:
        """Have all processes share each sample, if the settings say so."""
        way, processes = self.settings.context_parallel, self.accelerator.num_processes
        if way is None:
            return
        check_together(self.model, way, from_dict(self.settings.attention), processes)
        share_samples(self.model, way, processes)

    def _place(self) -> tuple[int, int]:
        """The number of this process among those with samples of their own, and their number."""
        if self.settings.context_parallel is not None:
            return 0, 1
        return self.accelerator.process_index, self.accelerator.num_processes

    def _driving(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss whose gradients, averaged over processes, make the step."""
        if self.settings.context_parallel is None:
            return losses["loss"]
        weight = self.settings.attention_output or 0.0
        return shared_loss(losses, weight, self.accelerator.num_processes)

    def _any(self, answer: bool) -> bool:
        """Whether any process answers True."""
        if self.accelerator.num_processes == 1:
            return answer
        flag = torch.tensor(float(answer), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _draw(self, numbers: Sequence[int]) -> Batch:
        batch = draw_batch(
            self._clips, self._empty, self.recipe, self.pipe.scheduler, self.settings, numbers
        )
        return self._on_device(batch)

    def _on_device(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        return Batch(
            batch.latents.to(device),
            batch.noise.to(device),
            batch.times.to(device),
            {name: tensor.to(device) for name, tensor in batch.conditions.items()},
        )

    def _swap_blocks(self) -> set[int] | None:
        """Put the denoiser onto the device, but for blocks that wait in main memory.

        Returns:
            The denoiser's tensors, see `move_added`; None if no block waits.
        """
        if self.settings.swap_blocks is None:
            return None
        accelerator = self.accelerator
        kind = accelerator.distributed_type.value
        if kind != "NO":
            raise LoraError(
                f"swap_blocks is {self.settings.swap_blocks}, but works in one process on one"
                f" device, and this run is {kind}: leave it out"
            )
        if not is_swapped(self.model):
            swap_blocks(self.model, self.settings.swap_blocks, accelerator.device)
        return tensors_of(self.model)

    def _attach(self) -> Attachment:
        attachment = set_attn_processor(self.pipe, from_dict(self.settings.attention))
        assert attachment is not None
        return attachment

    def _weights(self) -> Mapping[str, torch.Tensor]:
        """The weights that training leaves by name, gathered if they are spread over processes."""
        return {name: whole(weight) for name, weight in adapter_weights(self.model).items()}

    def _read_state(self, folder: Path) -> None:
        """Put the run into the state that a checkpoint's folder holds."""
        if is_sharded(self.accelerator):
            load_sharded(
                self.accelerator, self._student, self._optimizer, self._trained, folder, WEIGHTS
            )
        else:
            self.accelerator.load_state(str(folder))

    def _write_state(self, folder: Path) -> None:
        """Write the state of the run, and the LoRA of the step, into a checkpoint's folder."""
        if is_sharded(self.accelerator):
            save_sharded(
                self.accelerator, self._student, self._optimizer, self._trained, folder, WEIGHTS
            )
        else:
            self.accelerator.save_state(str(folder))
        with self.at_result():
            weights = self._weights()
            if self.accelerator.is_main_process:
                place = place_of(folder, self.recipe.denoiser)
                save_adapter(self.pipe, self._record(), place, weights)
        if self._average is not None and self.accelerator.is_main_process:
            self._average.save(folder)

    def _write(self, folder: Path, place: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the LoRA and its card into a folder, which is then moved to a place."""
        record = self._record()
        save_adapter(self.pipe, record, folder, weights)
        write_card(folder, place, record, figures_of(self.output))

    def _start_average(self, checkpoint: Path | None) -> MovingAverage | None:
        """The moving average of the weights, where the last checkpoint left it."""
        if self.settings.ema is None:
            return None
        kind = self.accelerator.distributed_type.value
        if kind in ("FSDP", "DEEPSPEED"):
            raise LoraError(
                f"ema needs the trained weights whole in each process, but {kind} spreads them over"
                f" all: leave it out"
            )
        average = MovingAverage(self._trained, self.settings.ema)
        if checkpoint is not None:
            average.load(checkpoint)
        return average

    def _look_at_held_out(self) -> None:
        """Log the loss on held-out clips, with the same noise at every look."""
        if self._held_out is None or self._looked_at == self.step:
            return
        self._looked_at = self.step
        settings = dataclasses.replace(self.settings, caption_dropout=0.0)
        totals: dict[str, float] = {}
        draws = max(DRAWS, len(self._held_out))
        for number in range(draws):
            batch = draw_batch(
                self._held_out,
                self._empty,
                self.recipe,
                self.pipe.scheduler,
                settings,
                [number],
            )
            with torch.no_grad(), self.at_result():
                losses = self._student(self._on_device(batch))
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + float(loss) / draws
        if self.accelerator.is_main_process:
            self._append(HELD_OUT_FILE, {"step": self.step, **totals})
            if self.settings.trackers:
                named = {f"held_out_{name}": value for name, value in totals.items()}
                self.accelerator.log(named, step=self.step)

    def _plot(self) -> None:
        """Draw the losses so far; a picture that cannot be drawn does not end the training."""
        if not self.accelerator.is_main_process:
            return
        losses, held_out = (
            [
                (entry["step"], entry["loss"])
                for entry in read_log(self.output / name)
                if {"step", "loss"} <= entry.keys()
            ]
            for name in (LOG_FILE, HELD_OUT_FILE)
        )
        temporary = self.output / f".{PLOT_FILE}"
        with contextlib.suppress(OSError):
            plot_losses(losses, held_out, temporary)
            temporary.replace(self.output / PLOT_FILE)

    def _record(self) -> LoraRecord:
        return LoraRecord(
            method=from_dict(self.settings.attention).to_dict(),
            denoiser=self.recipe.denoiser,
            steps=self.step,
            latents=tuple(self._clips[0]["latents"].shape),
            settings=self.settings.to_dict(),
            family=self.recipe.family,
            model=_origin(self.pipe),
            density=self._density,
            clips=len(self._clips),
        )

    def _identity(self) -> dict[str, Any]:
        settings = self.settings.to_dict()
        shape = {} if settings["schedule"] == "constant" else {"steps": settings["steps"]}
        identity = {
            **{name: value for name, value in settings.items() if name not in _FREE},
            **shape,
            "model": self._base,
            "processes": self.accelerator.num_processes,
            "clips": hashlib.sha256("\n".join(self._clips.keys).encode()).hexdigest()[:16],
        }
        # The identity in a checkpoint went through JSON, which has no tuples.
        return json.loads(json.dumps(identity))

    def _write_settings(self) -> None:
        """Write the settings of the run, and cut the log after the last step made."""
        log = self.output / LOG_FILE
        lines = log.read_text("utf-8").splitlines(keepends=True) if log.is_file() else []
        kept = lines[: self.step]
        # A run that starts anew has looked at nothing.
        looks = [
            json.dumps(entry) + "\n"
            for entry in read_log(self.output / HELD_OUT_FILE)
            if 0 < self.step >= entry.get("step", 0)
        ]
        text = json.dumps(self.settings.to_dict(), indent=1) + "\n"

        def write(folder: Path) -> None:
            (folder / SETTINGS_FILE).write_text(text, "utf-8")
            (folder / LOG_FILE).write_text("".join(kept), "utf-8")
            if (self.output / HELD_OUT_FILE).is_file():
                (folder / HELD_OUT_FILE).write_text("".join(looks), "utf-8")

        replace_files(self.output, write)

    def _log(self, made: StepReport) -> None:
        entry = {"step": made.step, **made.losses, "learning_rate": made.learning_rate}
        self._append(LOG_FILE, entry)
        if self.settings.trackers:
            values = {name: value for name, value in entry.items() if name != "step"}
            self.accelerator.log(values, step=made.step)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Write a line of a log."""
        try:
            with (self.output / name).open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise LoraError(f"cannot write to {self.output / name}: {error.strerror}") from None


def _origin(pipe: Any) -> str | None:
    """Where a pipeline was loaded from: an id of the Hub, or a folder's name without its path."""
    name = getattr(pipe, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    return Path(name).resolve().name if Path(name).exists() else name


def check_output(output: Path, resume: bool) -> None:
    """Make the folder of a run.

    Args:
        output: the folder.
        resume: whether the folder may hold a run to continue.

    Raises:
        LoraError: if the folder holds a run and `resume` is False, or the folder cannot be made.
    """
    found = checkpoints(output)
    if found and not resume:
        raise LoraError(
            f"{output} holds a run with a checkpoint, {found[-1].name}: resume it, or give another"
            f" output folder"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoraError(f"cannot write to {output}: {error.strerror}") from None


def make_accelerator(settings: TrainSettings, output: Path, *, on_cpu: bool = False) -> Accelerator:
    """Make the accelerator of a run, from the settings and the options of `accelerate launch`.

    Args:
        settings: the settings of the training.
        output: the folder for the trackers' files.
        on_cpu: whether to run on the CPU even if there is a GPU.

    Raises:
        LoraError: if a tracker is unknown or not installed, accelerate refuses the settings, or
            DeepSpeed or FSDP 1 are asked for, or FSDP where there is none.
    """
    available = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in settings.trackers:
        if name not in available:
            raise LoraError(
                f"tracker {name!r} is not installed (pip install diffattn[tensorboard] or"
                f" diffattn[wandb]); installed are: {', '.join(available) or 'none'}"
            )
    check_launch(os.environ)
    method = from_dict(settings.attention)
    # The method's own weights have no gradient in layers that stay dense.
    unused = type(method).site_weights is not Method.site_weights and method.dense_layers != 0
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=settings.accumulation,
            mixed_precision=settings.mixed_precision,
            cpu=on_cpu,
            log_with=list(settings.trackers) or None,
            project_dir=str(output),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
    except (ValueError, RuntimeError) as error:
        raise LoraError(f"accelerate refuses: {error}") from None
    check_sharding(accelerator, os.environ)
    if settings.trackers:
        flat = {name: str(value) for name, value in dataclasses.asdict(settings).items()}
        accelerator.init_trackers("diffattn-lora", config=flat)
    return accelerator


def memory_in_use() -> int:
    """The most bytes in use so far, on the accelerator, or by this process on a CPU."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
