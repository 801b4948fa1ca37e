"""Generate the held-out prompts and read the clips back.

`python -m diffattn.samples.moving_shapes.evaluate` prints how often each attribute is right.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

from . import MODEL_DIR
from .captions import Scene, split_scenes
from .checker import Reading, read_clip
from .clips import FRAMES, SIZE

ATTRIBUTES = ("colour", "background", "direction", "shape", "all")


@dataclass(frozen=True)
class Sampling:
    """Settings of the generation of clips; `attn` is "dense" or the name of a method."""

    steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    attn: str = "dense"


def load_pipeline(folder: Path = MODEL_DIR, attn: str = "dense") -> Any:
    """Load the pipeline offline, and attach the method named `attn` unless that is "dense"."""
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if attn != "dense":
        import diffattn
        from diffattn.methods import from_dict

        diffattn.set_attn_processor(pipeline, from_dict({"type": attn}))
    return pipeline


def generate(pipeline: Any, prompt: str, sampling: Sampling) -> NDArray[np.float32]:
    """Generate one clip, (frames, height, width, 3) in [0, 1]."""
    return pipeline(
        prompt,
        negative_prompt="",
        height=SIZE,
        width=SIZE,
        # Wan adds one frame where the VAE does not compress time.
        num_frames=FRAMES - 1,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=torch.Generator().manual_seed(sampling.seed),
        output_type="np",
    ).frames[0]


def accuracy(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    """Share of the clips with each attribute right, and with all four right."""
    agreements = [reading.agreement(scene) for scene, reading in zip(scenes, readings, strict=True)]
    return {name: float(np.mean([a[name] for a in agreements])) for name in ATTRIBUTES}


def evaluate(
    folder: Path, sampling: Sampling, scenes: Sequence[Scene], save_clips: Path | None = None
) -> dict[str, Any]:
    """Generate one clip per scene, clip i with seed `sampling.seed` + i, and read the clips."""
    pipeline = load_pipeline(folder, sampling.attn)
    clips, seconds = [], []
    for index, scene in enumerate(scenes):
        started = time.perf_counter()
        seeded = Sampling(sampling.steps, sampling.guidance, sampling.seed + index, sampling.attn)
        clips.append(generate(pipeline, scene.caption, seeded))
        seconds.append(time.perf_counter() - started)
    if save_clips is not None:
        np.savez_compressed(
            save_clips,
            clips=(np.stack(clips) * 255).round().astype(np.uint8),
            captions=[scene.caption for scene in scenes],
        )
    readings = [read_clip(clip) for clip in clips]
    return {
        "accuracy": accuracy(scenes, readings),
        "prompts": len(scenes),
        "sampling": asdict(sampling),
        "seconds_per_clip": {"median": float(np.median(seconds)), "max": max(seconds)},
        "revision": _revision(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "clips": [
            {"caption": scene.caption, "seed": sampling.seed + index, **asdict(reading)}
            for index, (scene, reading) in enumerate(zip(scenes, readings, strict=True))
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script with command-line arguments."""
    parser = argparse.ArgumentParser(description="Generate the held-out prompts and check them.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--seed", type=int, default=Sampling.seed)
    parser.add_argument("--attn", default="dense", help="dense, or the name of a sparse method")
    parser.add_argument("--every", type=int, default=1, help="only every n-th prompt")
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--save-clips", type=Path, help="npz file for the clips themselves")
    options = parser.parse_args(arguments)

    sampling = Sampling(options.steps, options.guidance, options.seed, options.attn)
    _, held_out = split_scenes()
    chosen = held_out[options.first :: options.every]
    result = evaluate(options.model, sampling, chosen, options.save_clips)
    for name, value in result["accuracy"].items():
        print(f"{name:<12}{value:6.1%}")
    print(f"{result['seconds_per_clip']['median']:.1f} s a clip, {result['prompts']} prompts")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def _revision() -> str | None:
    """Git revision of the checkout, marked if files differ; None outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
