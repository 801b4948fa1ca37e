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
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import DIRECTIONS, split_scenes
from .clips import FRAMES, SIZE, TRAVEL, draw_geometry, render
from .evaluate import Sampling
from .model import ModelSize, TrainingView, draw_noise_levels, make_transformer
from .text import make_text_encoder, make_tokenizer, tokenize
from .vae import PATCH, clip_latents, make_vae, train_decoder

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


DEFAULT_STAGES = (
    Stage(frames=4, batch=12, steps=4000),
    Stage(frames=8, batch=6, steps=600),
    Stage(frames=FRAMES, batch=4, steps=600),
)


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run.

    Attributes:
        stages: in turn.
        decay_steps: the learning rate falls linearly to zero over the last `decay_steps` steps.
        ema_decay: decay per step of the averaged weights.
        caption_drop: share of the clips that are shown with the empty caption.
        shifts: shifts of the noise levels in training, taken in turn. A clip has so few colours
            that the average of its latents shows them even through strong noise. Facts that only
            the caption tells are learnt above a noise level of 0.9, which the usual shift of 3
            hardly visits.
        path_weight: weight of the penalty on attention off the path of motion, see `PathGuide`.
        precision: "bf16" for autocast, or "fp32".
    """

    stages: tuple[Stage, ...] = DEFAULT_STAGES
    size: ModelSize = field(default_factory=ModelSize)
    seed: int = 0
    muon_rate: float = 6e-3
    adam_rate: float = 2e-3
    warmup_steps: int = 100
    decay_steps: int = 1000
    ema_decay: float = 0.998
    caption_drop: float = 0.1
    shifts: tuple[float, ...] = (3.0, 15.0)
    path_weight: float = 0.02
    precision: str = "bf16"

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage of step number `step`.

        Raises:
            IndexError: for a step behind the last stage.
        """
        end = 0
        for stage in self.stages:
            end += stage.steps
            if step < end:
                return stage
        raise IndexError(f"step {step} lies behind the last stage")

    def rate_at(self, step: int) -> float:
        """Learning-rate factor in [0, 1]: warm-up, plateau, linear decay."""
        warmup = (step + 1) / self.warmup_steps
        decay = (self.steps - step) / self.decay_steps
        return min(1.0, warmup, decay)


class Trainer:
    """State of a run: the two networks, their averages, the optimisers and the generators."""

    def __init__(self, settings: Settings, device: str = "cpu", compiled: bool = False) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.step = 0
        torch.manual_seed(settings.seed)
        self.tokenizer = make_tokenizer()
        self.transformer = make_transformer(settings.size).to(self.device)
        self.text_encoder = make_text_encoder(len(self.tokenizer)).to(self.device)
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
                adam, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
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
        """Make one step; give the flow-matching loss without and with the penalty, (2,)."""
        settings = self.settings
        self._set_rates(settings.rate_at(self.step))
        error, loss = self._loss(settings.stage_at(self.step))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, list(self.parameters), 1 - decay)
        self.step += 1
        return torch.stack([error.detach(), loss.detach()])

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "settings": asdict(self.settings),
            "step": self.step,
            "transformer": self.transformer.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "averages": self.averages,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "choices": self.choices.get_state(),
            "noise": self.noise.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state`.

        Raises:
            ValueError: if the state is of a model of another size.
        """
        saved = state["settings"]["size"]
        if saved != asdict(self.settings.size):
            raise ValueError(f"the checkpoint holds a model of size {saved}, not this run's")
        self.step = state["step"]
        self.transformer.load_state_dict(state["transformer"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        for average, saved_average in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved_average)
        for optimiser, saved_optimiser in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_optimiser)
        self.choices.set_state(state["choices"].cpu())
        self.noise.set_state(state["noise"].cpu())

    def use_averages(self) -> None:
        """Put the averaged weights into the networks; the run cannot go on afterwards."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.averages, strict=True):
                parameter.copy_(average)

    def _set_rates(self, factor: float) -> None:
        bases = (self.settings.muon_rate, self.settings.adam_rate)
        for optimiser, base in zip(self.optimisers, bases, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * factor

    def _loss(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """Flow-matching loss on freshly rendered clips, without and with the penalty."""
        settings, batch = self.settings, stage.batch
        picks = torch.randint(len(self.scenes), (batch,), generator=self.choices)
        frames = choose_frames(batch, stage.frames, self.choices).to(self.device)
        dropped = torch.rand(batch, generator=self.choices) < settings.caption_drop
        # Log-uniform between the shortest sensible length and the pipeline's default of 512.
        padded_length = 32 * 16 ** torch.rand(batch, generator=self.choices)

        scenes = [self.scenes[pick] for pick in picks.tolist()]
        clip = render(scenes, draw_geometry(batch, self.noise), frames)
        clean = clip_latents(clip)
        noise = torch.randn(clean.shape, generator=self.noise, device=self.device)
        sigma = draw_noise_levels(batch, settings.shifts, self.noise)
        mix = sigma.view(-1, 1, 1, 1, 1)

        rows = torch.where(dropped, len(self.scenes), picks).to(self.device)
        ids, mask = self.ids[rows], self.mask[rows]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
            predicted = self.view.velocity(
                (1 - mix) * clean + mix * noise,
                sigma,
                text,
                frames,
                padded_length.to(self.device),
                self.motion[rows] if settings.path_weight else None,
            )
        error = F.mse_loss(predicted.float(), noise - clean)
        penalty = self.view.paths.penalty
        return error, error if penalty is None else error + settings.path_weight * penalty


def choose_frames(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw sorted frame numbers (batch, count) that always hold the first and the last frame."""
    inner = torch.rand(batch, FRAMES - 2, generator=generator).argsort(dim=1)[:, : count - 2] + 1
    ends = torch.tensor([0, FRAMES - 1]).expand(batch, -1)
    return torch.cat([inner, ends], dim=1).sort(dim=1).values


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
        ValueError: if the checkpoint is of a model of another size.
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
    """Train up to step `until`; report the mean loss and the pace, yield after each report."""
    losses: list[Tensor] = []
    started = time.perf_counter()
    while trainer.step < until:
        stage = trainer.settings.stage_at(trainer.step)
        losses.append(trainer.train_step())
        if trainer.step % report_every == 0 or trainer.step == until:
            loss, penalised = torch.stack(losses).mean(dim=0).tolist()
            pace = len(losses) / (time.perf_counter() - started)
            report(
                f"step {trainer.step}/{trainer.settings.steps} tokens {stage.tokens} "
                f"loss {loss:.4f} penalised {penalised:.4f} {pace:.2f} it/s "
                f"{pace * stage.batch:.1f} clips/s"
            )
            losses, started = [], time.perf_counter()
            yield trainer.step


def export(trainer: Trainer, vae: nn.Module, folder: Path) -> None:
    """Write the pipeline with averaged weights, in fp16, but the small text encoder in fp32.

    transformers loads the text encoder in the type of its file, diffusers loads other models in
    fp32. With a file in fp32 all parts of the loaded pipeline have the same type.
    """
    copy = Trainer(trainer.settings)
    copy.load_state(trainer.state())
    copy.use_averages()
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


def trained_vae(path: Path, steps: int, device: str) -> nn.Module:
    """The VAE, with the decoder from `path` if there is one, else with a newly trained decoder."""
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
    parser.add_argument("--stages", type=parse_stages, default=DEFAULT_STAGES)
    parser.add_argument("--decay-steps", type=int, default=Settings.decay_steps)
    parser.add_argument("--adam-rate", type=float, default=Settings.adam_rate)
    parser.add_argument("--muon-rate", type=float, default=Settings.muon_rate)
    parser.add_argument("--shifts", type=float, nargs="+", default=Settings.shifts)
    parser.add_argument("--ema-decay", type=float, default=Settings.ema_decay)
    parser.add_argument("--path-weight", type=float, default=Settings.path_weight)
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
        decay_steps=options.decay_steps,
        ema_decay=options.ema_decay,
        path_weight=options.path_weight,
        shifts=tuple(options.shifts),
        precision=options.precision,
    )
    trainer = Trainer(settings, options.device, options.compile)
    checkpoint = options.work / "checkpoint.pt"
    if options.resume:
        load_checkpoint(trainer, checkpoint)
    print(json.dumps(asdict(settings)), flush=True)
    for step in run(trainer, settings.steps, report=_print_now):
        if step % options.checkpoint_every == 0 or step == settings.steps:
            save_checkpoint(trainer, checkpoint)
    if options.export:
        vae = trained_vae(options.work / "vae.pt", options.vae_steps, options.device)
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
