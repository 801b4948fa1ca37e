"""Time and memory of a LoRA step on a model of Wan 2.1 1.3B's shape, dense and sparse.

    python benchmarks/lora_gpu.py --output benchmarks/lora_gpu.json

needs a machine with a GPU, diffusers and peft. The weights are random and bfloat16. The LoRA is
float32 of rank 128 on q, k, v and o. Gradient checkpointing is on, the loss is the model's own, and
a step is forward, backward and AdamW on one sample. 81 frames of 480 x 832 are 32,760 tokens. The
first step of each method is not counted; the time is the median of the other steps, the memory the
peak of allocated memory. Methods attend sparsely in every layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from diffattn import TokenGrid, set_attn_processor
from diffattn.lora.adapter import add_adapter
from diffattn.lora.losses import Batch, Student
from diffattn.lora.recipes import recipe_for
from diffattn.lora.settings import TrainSettings
from diffattn.lora.trainer import memory_in_use
from diffattn.methods import METHODS, from_dict
from diffattn.methods.base import StaticMaskMethod

# The sizes of Wan 2.1 1.3B, see its transformer/config.json.
HEADS, HEAD_DIM, FFN, LAYERS, TEXT_DIM, TEXT = 12, 128, 8960, 30, 4096, 512
DENSE = "dense"


def make_pipeline(layers: int, heads: int, device: torch.device) -> Any:
    with device:
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=HEAD_DIM,
            ffn_dim=FFN * heads // HEADS,
            num_layers=layers,
            text_dim=TEXT_DIM,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=model.to(torch.bfloat16),
    )


def measure(
    name: str, pipe: Any, sizes: tuple[int, int, int], steps: int, rank: int
) -> dict[str, Any]:
    """Step time in ms, memory in MiB and density under a method, or of the dense model."""
    frames, height, width = sizes
    model, device = pipe.transformer, pipe.transformer.device
    everywhere = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}
    attention = {"type": "radial" if name == DENSE else name, **everywhere}
    settings = TrainSettings(attention=attention, rank=rank, objective=1.0, prediction=0.0,
                             attention_output=0.0)  # fmt: skip
    attachment = set_attn_processor(pipe, from_dict(attention))
    assert attachment is not None
    attachment.clock.always_dense = name == DENSE
    trained = add_adapter(model, settings)
    model.enable_gradient_checkpointing()
    student = Student(model, recipe_for(pipe), pipe.scheduler, attachment, settings).train()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    shape = 1, model.config.in_channels, frames, 2 * height, 2 * width
    batch = Batch(
        normal(*shape),
        normal(*shape),
        torch.full((1,), 0.5, device=device),
        {"prompt_embeds": normal(1, TEXT, TEXT_DIM)},
    )
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    times = []
    for _ in range(steps + 1):
        start = clock(device)
        student(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (clock(device) - start))
    grid = TokenGrid(frames, height, width)
    method = from_dict(attention).for_model("wan2.1", grid)
    static = isinstance(method, StaticMaskMethod) and name != DENSE
    memory = memory_in_use() / 2**20
    set_attn_processor(pipe, None)
    model.unload_lora()
    return {
        "attention": name,
        "tokens": grid.tokens,
        "density": method.mask(grid).density if static else None,
        "step_ms": round(statistics.median(times[1:]), 1),
        "memory_mib": round(memory),
        "calls": {"sparse": attachment.sparse_calls, "dense": attachment.dense_calls},
    }


def clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    masks = [name for name in METHODS if name != DENSE]
    parser.add_argument("--methods", nargs="+", choices=masks, default=["radial", "gna"])
    parser.add_argument(
        "--sizes", type=int, nargs=3, default=(21, 30, 52), help="frames, rows, columns of tokens"
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    pipe = make_pipeline(options.layers, options.heads, device)
    rows = []
    for name in (DENSE, *options.methods):
        rows.append(measure(name, pipe, tuple(options.sizes), options.steps, options.rank))
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        facts = {"torch": torch.__version__, "device": str(device), "layers": options.layers}
        if device.type == "cuda":
            facts["device"] = torch.cuda.get_device_name()
        options.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
