"""Time of a transformer call of Wan's shapes, dense and under each method.

    python benchmarks/model_step.py --output benchmarks/model_step.json

needs a machine with a GPU, and diffusers. The weights are random and bfloat16. A denoising step
with guidance is two such calls. Everything in the model counts: projections, feed-forward, norms,
text, and all that a method does beside its kernels. Methods attend sparsely in every layer, with
their own defaults. "dense" is the stock model with the attention that torch chooses, "dense-cudnn"
with cuDNN's. The models are called one after another, round after round; a ratio is the median of
the ratios of the rounds. Layers are alike, so that fewer layers give the same ratio, but for masks,
which all layers share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lora_gpu import TEXT, TEXT_DIM, clock, make_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffattn import set_attn_processor
from diffattn.methods import METHODS, from_dict

DENSE, CUDNN = "dense", "dense-cudnn"
EVERYWHERE = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}


def attach(pipe: Any, name: str) -> None:
    """Attach a method that attends sparsely in every layer, as far as the method has a say."""
    known = METHODS[name]().to_dict()
    everywhere = {key: value for key, value in EVERYWHERE.items() if key in known}
    set_attn_processor(pipe, from_dict({"type": name, **everywhere}))


def call(pipe: Any, name: str, inputs: dict[str, torch.Tensor]) -> float:
    """Milliseconds of one call of the transformer."""
    device = pipe.transformer.device
    only = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if name == CUDNN else nullcontext()
    start = clock(device)
    with torch.no_grad(), only:
        pipe.transformer(**inputs, return_dict=False)
    return 1000 * (clock(device) - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    methods = [name for name in METHODS if name != DENSE]
    parser.add_argument("--methods", nargs="+", choices=methods, default=["radial", "gna"])
    parser.add_argument(
        "--sizes", type=int, nargs=3, default=(21, 30, 52), help="frames, rows, columns of tokens"
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=12, help="12 is Wan 1.3B, 40 is Wan 14B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    pipe = make_pipeline(options.layers, options.heads, device)
    frames, height, width = options.sizes
    normal = torch.Generator(device).manual_seed(0)
    shape = (1, pipe.transformer.config.in_channels, frames, 2 * height, 2 * width)
    like = {"device": device, "dtype": torch.bfloat16, "generator": normal}
    inputs = {
        "hidden_states": torch.randn(shape, **like),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, TEXT, TEXT_DIM, **like),
    }
    names = [DENSE, *([CUDNN] if device.type == "cuda" else []), *options.methods]
    times: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for turn in range(options.rounds + 1):
        for name in names:
            if name in failed:
                continue
            try:
                if name in METHODS and name != DENSE:
                    attach(pipe, name)
                call(pipe, name, inputs)  # masks are built, kernels compiled
                ms = call(pipe, name, inputs)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[:300]
                print(json.dumps({"attention": name, "failed": failed[name]}), flush=True)
                continue
            finally:
                set_attn_processor(pipe, None)
            if turn:  # the first round warms up
                times[name].append(ms)
    rows = []
    for name in names:
        if name in failed:
            rows.append({"attention": name, "failed": failed[name]})
            continue
        ratios = [a / b for a, b in zip(times[DENSE], times[name], strict=True)]
        rows.append(
            {
                "attention": name,
                "ms": round(statistics.median(times[name]), 2),
                "rounds": [round(ms, 2) for ms in times[name]],
                "speed_up": round(statistics.median(ratios), 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        facts = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
            "date": time.strftime("%Y-%m-%d"),
            "layers": options.layers,
            "heads": options.heads,
            "tokens": frames * height * width,
        }
        options.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
