"""The setting of a stage's process: a device, a timer, and the journal of its rows."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import torch
import triton

from diffattn.kernels.common.tuned import device_name
from diffattn.pipelines.bench.timing import DeviceTimer, HostTimer, Timer
from gpu_run.journal import Journal
from gpu_run.parent import SECONDS_VARIABLE
from gpu_run.shapes import SHAPES, Shape, tiny


@dataclass(frozen=True)
class Setting:
    """Where a stage runs.

    Attributes:
        dry: on the CPU, with tiny shapes and Triton's interpreter.
        dtype: of the calls that are timed.
        densities: densities of the masks whose rates are measured, 1 first.
        tuning: densities of the masks by which choices are tuned.
        compared: densities of the masks on which other libraries' kernels are measured.
        ends: when the process is killed, by the monotonic clock.
    """

    device: torch.device
    dry: bool
    dtype: torch.dtype
    timer: Timer
    journal: Journal
    densities: tuple[float, ...]
    tuning: tuple[float, ...]
    compared: tuple[float, ...]
    ends: float

    @staticmethod
    def make(journal: Journal, dry: bool) -> Setting:
        device = torch.device("cpu" if dry else f"cuda:{torch.cuda.current_device()}")
        return Setting(
            device=device,
            dry=dry,
            # Triton's interpreter has no bfloat16 products.
            dtype=torch.float16 if dry else torch.bfloat16,
            timer=HostTimer() if dry else DeviceTimer(device),
            journal=journal,
            densities=(1.0, 0.8) if dry else (1.0, 0.5, 0.2, 0.1),
            tuning=(1.0, 0.8) if dry else (1.0, 0.2),
            compared=(1.0, 0.8) if dry else (1.0, 0.2),
            ends=time.monotonic() + float(os.environ[SECONDS_VARIABLE]),
        )

    @property
    def left(self) -> float:
        """Seconds until the process is killed."""
        return self.ends - time.monotonic()

    def rounds(self, seconds: float) -> dict[str, float | int]:
        """How long to interleave calls, as `timing.interleave` takes it; not beyond the limit."""
        if self.dry:
            return {"least": 1, "most": 1, "seconds": 0.0}
        return {"least": 3, "most": 15, "seconds": max(0.0, min(seconds, 0.4 * self.left))}

    def shape(self, name: str) -> Shape:
        """One of `SHAPES`; in a dry run with few tokens and heads."""
        found = next(shape for shape in SHAPES if shape.name == name)
        return tiny(found) if self.dry else found

    def random(self, *size: int, seed: int) -> torch.Tensor:
        """Normal numbers of the dtype that is measured, the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, device=self.device, dtype=self.dtype, generator=generator)

    def inputs(self, shape: Shape, *, batch: int = 1) -> list[torch.Tensor]:
        """q, k, v and a gradient of the output."""
        size = (batch, shape.tokens, shape.heads, shape.head_dim)
        return [self.random(*size, seed=seed) for seed in range(4)]

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def facts(self) -> dict[str, object]:
        """The hardware and the versions that this process measures with."""
        facts: dict[str, object] = {
            "gpu": device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": sys.version.split()[0],
        }
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            facts |= {
                "multiprocessors": properties.multi_processor_count,
                "L2 MiB": properties.L2_cache_size / 2**20,
                "cuda": torch.version.cuda or f"hip {torch.version.hip}",
                "cudnn": torch.backends.cudnn.version(),
            }
        return facts
