"""Train the moving-shapes pipeline and export it.

The run is a list of stages. Early stages show the transformer only a few frames of each clip, at
their true rotary positions: the spatial layout is that of the final grid from the first step on, at
a fraction of the cost. The last stages show whole clips. The first and the last frame of a clip are
always shown, because rotary positions are relative: without both ends the place of a frame in the
clip would be unknown.

All random numbers come from two seeded generators that are part of the checkpoint, so a resumed run
continues as if it had never stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor, nn

from .batches import Mixing, draw_batch
from .captions import DIRECTIONS, split_scenes
from .clips import FRAMES, SIZE, TRAVEL
from .evaluate import Sampling
from .model import ModelSize, TrainingView, make_transformer
from .supervision import DeepSupervision
from .text import make_text_encoder, make_tokenizer, tokenize
from .vae import PATCH, make_vae, train_decoder

# Motion of a shape in tokens per frame.
MOTION = TRAVEL * (SIZE // PATCH // 2) / (FRAMES - 1)

# Frames a second that a clip is shown at.
_FPS = 8

# Time shift of the exported scheduler.
SCHEDULER_SHIFT = 3.0


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps on `batch` clips of `frames` frames each."""

    frames: int
    batch: int
    steps: int

    def __post_init__(self) -> None:
        """Raise ValueError for a stage that cannot be drawn."""
        if not 2 <= self.frames <= FRAMES:
            raise ValueError(f"a stage shows 2 to {FRAMES} frames, not {self.frames}")
        if self.batch < 1 or self.steps < 1:
            raise ValueError(f"batch and steps must be positive, not {self.batch} and {self.steps}")

    @property
    def tokens(self) -> int:
        """Video tokens of one clip."""
        return self.frames * (SIZE // PATCH // 2) ** 2


# For a large GPU. The last stage is the longest: only whole clips show what strong noise leaves.
DEFAULT_STAGES = (
    Stage(frames=4, batch=64, steps=4000),
    Stage(frames=8, batch=48, steps=2500),
    Stage(frames=FRAMES, batch=32, steps=6000),
)


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run.

    Attributes:
        stages: in turn.
        minutes: time budget; None for as long as the steps take. Where the steps would take
            longer, the run moves along its schedule faster than step by step, so that all stages
            are shown and the learning rate has fallen to zero at the end.
        decay_steps: the learning rate falls linearly to zero over the last `decay_steps` steps.
        ema_decay: decay per step of the averaged weights.
        mixing: how clips are made noisy.
        path_weight: weight of the penalty on attention off the path of motion, see `PathGuide`;
            whole clips have no penalty.
        word_weight, outline_weight: weights of the two losses of `DeepSupervision`.
        contested_weight: additional weight of the latents at which the shapes differ. They are a
            small share of a clip, and blobs cost little without the weight.
        precision: "bf16" for autocast, or "fp32".
    """

    stages: tuple[Stage, ...] = DEFAULT_STAGES
    minutes: float | None = None
    size: ModelSize = field(default_factory=ModelSize)
    seed: int = 0
    muon_rate: float = 6e-3
    adam_rate: float = 2e-3
    warmup_steps: int = 100
    decay_steps: int = 3000
    ema_decay: float = 0.998
    mixing: Mixing = field(default_factory=Mixing)
    path_weight: float = 0.02
    word_weight: float = 0.05
    outline_weight: float = 2.0
    contested_weight: float = 3.0
    precision: str = "bf16"

    def __post_init__(self) -> None:
        """Raise ValueError for a budget that is no time."""
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"the time budget must be positive, not {self.minutes} minutes")

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: float) -> Stage:
        """The stage at a position in the schedule.

        Raises:
            IndexError: for a position behind the last stage.
        """
        end = 0
        for stage in self.stages:
            end += stage.steps
            if step < end:
                return stage
        raise IndexError(f"step {step} lies behind the last stage")

    def rate_at(self, step: float) -> float:
        """Learning-rate factor in [0, 1]: warm-up, plateau, linear decay."""
        warmup = (step + 1) / self.warmup_steps
        decay = (self.steps - step) / self.decay_steps
        return min(1.0, warmup, decay)

    def position_after(self, position: float, seconds: float) -> float:
        """The position in the schedule one step behind `position`, after `seconds` of training."""
        due = 0.0 if self.minutes is None else self.steps * seconds / (60 * self.minutes)
        return max(position + 1, due)


class Trainer:
    """State of a run: the two networks, their averages, the optimisers and the generators.

    Attributes:
        step: steps made.
        position: place in the schedule, in steps; above `step` where time is short.
        seconds: time that the steps took.
    """

    def __init__(self, settings: Settings, device: str = "cpu", compiled: bool = False) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.step = 0
        self.position = 0.0
        self.seconds = 0.0
        torch.manual_seed(settings.seed)
        self.tokenizer = make_tokenizer()
        self.transformer = make_transformer(settings.size).to(self.device)
        self.text_encoder = make_text_encoder(len(self.tokenizer)).to(self.device)
        self.supervision = DeepSupervision(self.transformer).to(self.device)
        self.view = TrainingView(self.transformer)
        if compiled:
            self.view.forward = torch.compile(self.view.forward)

        muon, adam = _split_parameters(self.transformer, self.text_encoder)
        self.parameters = muon + adam
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                muon, lr=settings.muon_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                [*adam, *self.supervision.parameters()],
                lr=settings.adam_rate,
                betas=(0.9, 0.98),
                weight_decay=0.0,
                fused=True,
            ),
        ]
        self.choices = torch.Generator().manual_seed(settings.seed + 1)
        self.noise = torch.Generator(self.device).manual_seed(settings.seed + 2)

        self.scenes, _ = split_scenes()
        captions = [scene.caption for scene in self.scenes]
        # The empty caption is the last; padding makes all captions equally long.
        ids, mask = tokenize(self.tokenizer, [*captions, ""])
        self.ids, self.mask = ids.to(self.device), mask.to(self.device)
        steps = [DIRECTIONS[scene.direction] for scene in self.scenes]
        # Tokens per frame; the empty caption names no motion.
        self.motion = torch.tensor([*steps, (0, 0)], device=self.device) * MOTION

    def train_step(self) -> Tensor:
        """Make one step; give the flow-matching loss alone and all losses together, (2,)."""
        settings = self.settings
        started = time.perf_counter()
        self._set_rates(settings.rate_at(self.position))
        error, loss = self._loss(settings.stage_at(self.position))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, list(self.parameters), 1 - decay)
        self.step += 1
        self.seconds += time.perf_counter() - started
        self.position = settings.position_after(self.position, self.seconds)
        return torch.stack([error.detach(), loss.detach()])

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "settings": asdict(self.settings),
            "device": self.device.type,
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "transformer": self.transformer.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "supervision": self.supervision.state_dict(),
            "averages": self.averages,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "choices": self.choices.get_state(),
            "noise": self.noise.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state`.

        Raises:
            ValueError: if the state is of a model of another size, or of a run on another kind of
                device: a generator's state means nothing to a generator of another kind.
        """
        saved = state["settings"]["size"]
        if saved != asdict(self.settings.size):
            raise ValueError(f"the checkpoint holds a model of size {saved}, not this run's")
        if state["device"] != self.device.type:
            raise ValueError(
                f"the checkpoint is of a run on {state['device']!r}, this run is on "
                f"{self.device.type!r}: go on with --device {state['device']}"
            )
        self.step = state["step"]
        self.position, self.seconds = state["position"], state["seconds"]
        self.transformer.load_state_dict(state["transformer"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.supervision.load_state_dict(state["supervision"])
        for average, saved_average in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved_average)
        for optimiser, saved_optimiser in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_optimiser)
        self.choices.set_state(state["choices"].cpu())
        self.noise.set_state(state["noise"].cpu())

    def start_from(self, folder: Path) -> None:
        """Take the weights of an exported pipeline; all else starts anew.

        Raises:
            ValueError: if the pipeline's transformer has another size.
        """
        pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
        config = pipeline.transformer.config
        saved = ModelSize(
            config.num_attention_heads, config.attention_head_dim, config.num_layers, config.ffn_dim
        )
        if saved != self.settings.size:
            raise ValueError(f"{folder} holds a model of size {asdict(saved)}, not this run's")
        self.transformer.load_state_dict(pipeline.transformer.state_dict())
        self.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                average.copy_(parameter)

    def averaged(self) -> Trainer:
        """A trainer on the CPU whose networks have this one's averaged weights, for export."""
        copy = Trainer(self.settings)
        copy.transformer.load_state_dict(self.transformer.state_dict())
        copy.text_encoder.load_state_dict(self.text_encoder.state_dict())
        with torch.no_grad():
            for parameter, average in zip(copy.parameters, self.averages, strict=True):
                parameter.copy_(average)
        return copy

    def _set_rates(self, factor: float) -> None:
        bases = (self.settings.muon_rate, self.settings.adam_rate)
        for optimiser, base in zip(self.optimisers, bases, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * factor

    def _loss(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """Flow-matching loss on freshly rendered clips, alone and with all other losses."""
        settings = self.settings
        batch = draw_batch(
            self.scenes, stage.batch, stage.frames, settings.mixing, self.choices, self.noise
        )
        scenes = [self.scenes[pick] for pick in batch.picks.tolist()]
        rows = torch.where(batch.dropped, len(self.scenes), batch.picks).to(self.device)
        ids, mask = self.ids[rows], self.mask[rows]
        guided = settings.path_weight > 0 and stage.frames < FRAMES
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
            predicted = self.view.velocity(
                batch.noisy,
                batch.sigma,
                text,
                batch.frames,
                batch.padded_length,
                self.motion[rows] if guided else None,
            )
        squared = (predicted.float() - batch.target).square()
        weight = 1 + settings.contested_weight * batch.contested[:, None]
        words, outlines = self.supervision.losses(batch, scenes, settings.contested_weight)
        loss = (squared * weight).mean()
        loss = loss + settings.word_weight * words + settings.outline_weight * outlines
        penalty = self.view.paths.penalty
        return squared.mean(), loss if penalty is None else loss + settings.path_weight * penalty


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write the trainer's state; `path` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(trainer.state(), temporary)
    os.replace(temporary, path)


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    """Continue from a checkpoint of `save_checkpoint`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the checkpoint is of a model of another size, or of another kind of device.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    trainer.load_state(torch.load(path, map_location=trainer.device, weights_only=True))


def run(
    trainer: Trainer,
    until: int,
    report_every: int = 50,
    report: Callable[[str], None] = print,
) -> Iterator[int]:
    """Train up to step `until`, at most to the end of the schedule.

    The mean loss and the pace are reported at times; the number of steps is yielded behind each
    report.
    """
    losses: list[Tensor] = []
    started = time.perf_counter()
    settings = trainer.settings
    while trainer.step < until and trainer.position < settings.steps:
        stage = settings.stage_at(trainer.position)
        losses.append(trainer.train_step())
        ended = trainer.step == until or trainer.position >= settings.steps
        if trainer.step % report_every == 0 or ended:
            flow, loss = torch.stack(losses).mean(dim=0).tolist()
            pace = len(losses) / (time.perf_counter() - started)
            report(
                f"step {trainer.step} at {trainer.position:.0f}/{settings.steps} "
                f"tokens {stage.tokens} flow {flow:.4f} loss {loss:.4f} {pace:.2f} it/s "
                f"{pace * stage.batch:.1f} clips/s"
            )
            losses, started = [], time.perf_counter()
            yield trainer.step


def export(trainer: Trainer, vae: nn.Module, folder: Path) -> None:
    """Write the pipeline with averaged weights, in fp16, but the small text encoder in fp32.

    transformers loads the text encoder in the type of its file, diffusers loads other models in
    fp32. With a file in fp32 all parts of the loaded pipeline have the same type.
    """
    copy = trainer.averaged()
    copy.view.restore()
    pipeline = WanPipeline(
        tokenizer=copy.tokenizer,
        text_encoder=copy.text_encoder.eval(),
        vae=vae.to(dtype=torch.float16),
        transformer=copy.transformer.eval().to(dtype=torch.float16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
    )
    pipeline.save_pretrained(folder)
    _use_old_tokenizer_name(folder)
    (folder / "generation.json").write_text(json.dumps(_recommended(), indent=2) + "\n")


def _recommended() -> dict[str, Any]:
    """The settings that the model was trained with and is tested with, for `diffattn generate`."""
    return {
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "num_inference_steps": Sampling.steps,
        "guidance_scale": Sampling.guidance,
        # The model knows only the words of its captions.
        "negative_prompt": "",
        "fps": _FPS,
    }


def _use_old_tokenizer_name(folder: Path) -> None:
    """Name the tokenizer's class so that transformers 4 finds it too.

    transformers 5 writes the new name, and knows the old name.
    """
    for file in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        text = file.read_text()
        file.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Read stages written as `FRAMESxBATCHxSTEPS,...`.

    Raises:
        argparse.ArgumentTypeError: for another form, or numbers out of range.
    """
    stages = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
            raise argparse.ArgumentTypeError(
                f"stage {part!r} is not FRAMESxBATCHxSTEPS, for instance 4x12x4000"
            )
        try:
            stages.append(Stage(*map(int, numbers)))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return tuple(stages)


def trained_vae(path: Path, steps: int, device: str, start: Path | None = None) -> nn.Module:
    """The VAE of the pipeline in `start`, or with the decoder from `path`, or newly trained."""
    if start is not None:
        return AutoencoderKLWan.from_pretrained(start, subfolder="vae", local_files_only=True)
    vae = make_vae()
    if path.is_file():
        vae.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return vae.eval()
    train_decoder(vae, steps=steps, batch=8, seed=0, device=device)
    vae.to("cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(vae.state_dict(), temporary)
    os.replace(temporary, path)
    return vae.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write checkpoints, and export."""
    parser = argparse.ArgumentParser(description="Train the moving-shapes pipeline and export it.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--export", type=Path, help="folder to write the pipeline to at the end")
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        help="folder of an exported pipeline to start from: its VAE is kept, the rest trained on",
    )
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default=DEFAULT_STAGES,
        help="FRAMESxBATCHxSTEPS,...; the default is for a large GPU",
    )
    parser.add_argument(
        "--minutes", type=float, help="time budget; the schedule is shortened to fit it"
    )
    parser.add_argument("--warmup-steps", type=int, default=Settings.warmup_steps)
    parser.add_argument("--decay-steps", type=int, default=Settings.decay_steps)
    parser.add_argument("--adam-rate", type=float, default=Settings.adam_rate)
    parser.add_argument("--muon-rate", type=float, default=Settings.muon_rate)
    parser.add_argument("--shifts", type=float, nargs="+", default=Mixing.shifts)
    parser.add_argument("--swap", type=float, default=Mixing.swap)
    parser.add_argument("--ema-decay", type=float, default=Settings.ema_decay)
    parser.add_argument("--path-weight", type=float, default=Settings.path_weight)
    parser.add_argument("--word-weight", type=float, default=Settings.word_weight)
    parser.add_argument("--outline-weight", type=float, default=Settings.outline_weight)
    parser.add_argument("--contested-weight", type=float, default=Settings.contested_weight)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile the transformer")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps")
    options = parser.parse_args(arguments)

    settings = Settings(
        stages=options.stages,
        seed=options.seed,
        muon_rate=options.muon_rate,
        adam_rate=options.adam_rate,
        minutes=options.minutes,
        warmup_steps=options.warmup_steps,
        decay_steps=options.decay_steps,
        ema_decay=options.ema_decay,
        mixing=Mixing(shifts=tuple(options.shifts), swap=options.swap),
        path_weight=options.path_weight,
        word_weight=options.word_weight,
        outline_weight=options.outline_weight,
        contested_weight=options.contested_weight,
        precision=options.precision,
    )
    trainer = Trainer(settings, options.device, options.compile)
    checkpoint = options.work / "checkpoint.pt"
    if options.resume:
        load_checkpoint(trainer, checkpoint)
    elif options.start is not None:
        trainer.start_from(options.start)
    print(json.dumps(asdict(settings)), flush=True)
    for step in run(trainer, settings.steps, report=_print_now):
        if step % options.checkpoint_every == 0 or trainer.position >= settings.steps:
            save_checkpoint(trainer, checkpoint)
    if options.export:
        vae = trained_vae(options.work / "vae.pt", options.vae_steps, options.device, options.start)
        export(trainer, vae, options.export)


def _print_now(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def _split_parameters(
    transformer: Any, text_encoder: Any
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks, for Muon, which is meant for hidden matrices; and all others."""
    muon = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in muon}
    others = [*transformer.parameters(), *text_encoder.parameters()]
    return muon, [p for p in others if p.requires_grad and id(p) not in chosen]


if __name__ == "__main__":
    main()
