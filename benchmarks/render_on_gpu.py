"""Render the bundled model under every method on a GPU, and compare the frames with the CPU's.

    python benchmarks/render_on_gpu.py --output render_on_gpu.json

needs a machine with a GPU, and diffusers. The noise is drawn on the CPU, so that both devices start
from the same latents. In float32 a mask gives the same picture but for rounding. A method that
chooses by content may choose another block where two scores are nearly equal. Frames must be the
same bits twice on the GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

from diffattn import set_attn_processor
from diffattn.methods import METHODS, from_dict
from diffattn.samples.moving_shapes import MODEL_DIR
from diffattn.samples.moving_shapes.clips import FRAMES, SIZE

PROMPT = "a red circle moving right on a blue background"


def render(
    name: str, device: str, dtype: torch.dtype, steps: int, times: int
) -> tuple[list[NDArray[np.float32]], list[float]]:
    """Frames and seconds of some renders with the same seed."""
    pipe = WanPipeline.from_pretrained(MODEL_DIR, local_files_only=True, torch_dtype=dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if name != "dense":
        set_attn_processor(pipe, from_dict({"type": name}))
    frames, seconds = [], []
    for _ in range(times):
        start = time.perf_counter()
        frames.append(
            pipe(
                PROMPT, negative_prompt="", height=SIZE, width=SIZE, num_frames=FRAMES - 1,
                num_inference_steps=steps, guidance_scale=3.0,
                generator=torch.Generator().manual_seed(0), output_type="np",
            ).frames[0]
        )  # fmt: skip
        seconds.append(round(time.perf_counter() - start, 3))
    return frames, seconds


def psnr(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Decibels between frames in [0, 1]; infinite for equal frames."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = []
    for name in options.methods:
        row: dict[str, Any] = {"method": name}
        try:
            (expected,), _ = render(name, "cpu", torch.float32, options.steps, 1)
            for dtype in (torch.float32, torch.bfloat16):
                (first, second), seconds = render(name, options.device, dtype, options.steps, 2)
                row[str(dtype).removeprefix("torch.")] = {
                    "psnr_to_cpu": round(psnr(first, expected), 2),
                    "same_bits": bool((first == second).all()),
                    "seconds": seconds,
                }
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.output:
        facts = {"torch": torch.__version__, "device": options.device, "steps": options.steps}
        if torch.cuda.is_available():
            facts["device"] = torch.cuda.get_device_name()
        options.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
