"""What test_parallel runs in several processes, and in one to compare; a script and a module.

As a script: parallel_worker.py FOLDER RANK PROCESSES runs every case for so many processes and
leaves what came out in FOLDER/RANK.pt.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import tiny_families
import tiny_wan
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.hooks import context_parallel
from stock import IN_TILES, NEARBY, Nearby

import diffattn
from diffattn import (
    AgentAttn,
    BlockTopKAttn,
    GNAAttn,
    LinFusionAttn,
    PerStep,
    RadialAttn,
    TokenGrid,
    VMoBAAttn,
)
from diffattn.methods import DenseAttn, Method, Site

SECONDS_TO_WAIT = 60
WINDOWS = GNAAttn(
    window=PerStep((1, 1, 1), (3, 3, 3), (1, 3, 3)), stride=1, dense_layers=0, dense_steps=0
)
SHARES = BlockTopKAttn(keep=[1, 0.5, 0.2], block=16, dense_layers=0, dense_steps=0)

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MoreThanAMask(Nearby):
    """A method whose attention is its own."""

    type: ClassVar[str] = "own"

    def attend(self, *call: Any, **options: Any) -> torch.Tensor:
        return super().attend(*call, **options)


@dataclass(frozen=True, kw_only=True)
class Halves(Method):
    """Not a mask at all: the first heads see the first half, the others see everything."""

    type: ClassVar[str] = "halves"
    paper: ClassVar[str] = ""

    def for_model(self, family: str, grid: TokenGrid | None = None) -> "Halves":
        return self

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        site: Site,
        *,
        scale: Any = None,
        key_mask: Any = None,
    ) -> torch.Tensor:
        half = site.grid.tokens // 2
        return diffattn.attention(query, key[:, :half], value[:, :half], scale=scale)


def run(
    build: Callable[[], torch.nn.Module],
    inputs: Callable[[], dict[str, Any]],
    config: dict[str, Any],
    parallel: bool,
    *,
    method: Method = NEARBY,
    enable_first: bool = False,
    detach: bool = False,
    gradients: bool = False,
    compiled: bool = False,
) -> Result:
    """The output of one model call."""
    model: Any = build()
    if parallel and enable_first:
        model.enable_parallelism(config=ContextParallelConfig(**config))
    attachment = diffattn.set_attn_processor(model, method)
    if parallel and not enable_first:
        model.enable_parallelism(config=ContextParallelConfig(**config))
    if detach:
        diffattn.set_attn_processor(model, None)
    if compiled and parallel:
        model.compile_repeated_blocks(backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        out = model(**inputs(), return_dict=False)[0]
    assert attachment is not None
    result: Result = {}
    if not compiled:  # Compiled code does not count its calls.
        result["calls"] = (attachment.sparse_calls, attachment.dense_calls)
    if gradients:
        (out * tiny_families.noise(*out.shape, seed=9)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if parallel:
            for grad in grads:
                dist.all_reduce(grad)
        result["gradients"] = torch.cat([grad.flatten() for grad in grads])
    return result | {"out": out.detach()}


def run_pipeline(
    parallel: bool,
    *,
    method: Method | None = None,
    config: dict[str, Any] | None = None,
) -> Result:
    """Latents of three steps of two branches each; the first step and layer are dense."""
    pipe = tiny_wan.PIPELINES["t2v"]()
    method = method or Nearby(dense_layers=1, dense_steps=1)
    attachment = diffattn.set_attn_processor(pipe, method)
    if parallel:
        pipe.transformer.enable_parallelism(
            config=ContextParallelConfig(**config or {"ulysses_degree": 2})
        )
    out = tiny_wan.run(pipe, steps=3)
    assert attachment is not None
    return {"out": out, "calls": (attachment.sparse_calls, attachment.dense_calls)}


def wan(heads: int = 2) -> WanTransformer3DModel:
    return tiny_wan.transformer(num_attention_heads=heads)


def wan_inputs(frames: int = 3, height: int = 4, width: int = 6) -> dict[str, Any]:
    return {
        "hidden_states": tiny_families.noise(2, 16, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": tiny_families.noise(2, 5, tiny_wan.TEXT_DIM, seed=1),
    }


def chronoedit_inputs() -> dict[str, Any]:
    return {
        "hidden_states": tiny_families.noise(2, 4, 3, 8, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": tiny_families.noise(2, 8, 16, seed=1),
    }


def flux_inputs(height: int = 6, width: int = 8, text: int = 8) -> dict[str, Any]:
    return {
        "hidden_states": tiny_families.noise(2, height * width, 16),
        "encoder_hidden_states": tiny_families.noise(2, text, 16, seed=1),
        "pooled_projections": tiny_families.noise(2, 8, seed=2),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": tiny_families.image_ids(height, width),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }


def kontext_inputs(height: int = 6, width: int = 8, text: int = 8) -> dict[str, Any]:
    """A target and a reference of its size, and a smaller reference."""
    sizes = ((height, width), (height, width), (4, 6))
    ids = [tiny_families.image_ids(*size) for size in sizes]
    for number, of_picture in enumerate(ids):
        of_picture[:, 0] = number
    tokens = sum(map(len, ids))
    return flux_inputs(height, width, text) | {
        "hidden_states": tiny_families.noise(2, tokens, 16),
        "img_ids": torch.cat(ids),
    }


def flux2_inputs() -> dict[str, Any]:
    ids = torch.nn.functional.pad(tiny_families.image_ids(6, 8), (0, 1))
    return {
        "hidden_states": tiny_families.noise(2, 48, 16),
        "encoder_hidden_states": tiny_families.noise(2, 8, 16, seed=1),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": ids.expand(2, -1, -1),
        "txt_ids": torch.zeros(2, 8, 4),
        "guidance": torch.tensor([3.5, 3.5]),
    }


def qwen_inputs(*lengths: int) -> dict[str, Any]:
    return {
        "hidden_states": tiny_families.noise(2, 48, 16),
        "encoder_hidden_states": tiny_families.noise(2, 8, 16, seed=1),
        "encoder_hidden_states_mask": tiny_families.valid_text(8, *lengths),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_shapes": [[(1, 6, 8)]] * 2,
    }


def ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": tiny_families.noise(2, 3 * 4 * 6, 8),
        "encoder_hidden_states": tiny_families.noise(2, 8, 16, seed=1),
        "encoder_attention_mask": None,  # diffusers itself fails with one under Ulysses
        "timestep": torch.tensor([900.0, 400.0]),
        "num_frames": 3,
        "height": 4,
        "width": 6,
    }


def masked_ltx_inputs() -> dict[str, Any]:
    return ltx_inputs() | {"encoder_attention_mask": tiny_families.valid_text(8, 8, 4)}


VMOBA = VMoBAAttn(topk=2, dense_steps=0)
ULYSSES = {"ulysses_degree": 2}
RING = {"ring_degree": 2}
ANY_ULYSSES = {"ulysses_degree": 2, "ulysses_anything": True}
ANY_RING = {"ring_degree": 2, "ring_anything": True}
UNIFIED = {"ulysses_degree": 2, "ring_degree": 2}

_UNEVEN_WAN = partial(wan_inputs, 3, 5, 5)
_LONGER_WAN = partial(wan_inputs, 6, 5, 8)
RADIAL = RadialAttn(rule="paper", sink=False, dense_layers=1, dense_steps=0)
_QWEN = (tiny_families.qwen_image, partial(qwen_inputs, 8, 8))
_PADDED_QWEN = (tiny_families.qwen_image, partial(qwen_inputs, 8, 3))
_TILES = {"method": IN_TILES}
_LOCAL = {"method": GNAAttn(window=(1, 3, 3), references="local", dense_steps=0)}
_KONTEXT = (tiny_families.flux, kontext_inputs)
_UNEVEN_KONTEXT = (tiny_families.flux, partial(kontext_inputs, 5, 5, 7))
_AGENTS = {"method": AgentAttn(cell=(1, 2, 2), last_dense_steps=0)}
_ONE_DENSE_LAYER = {"method": Nearby(dense_layers=1, dense_steps=0)}

# Runs that must give the same in several processes (parallel=True) and in one.
RUNS: dict[int, dict[str, Callable[[bool], Result]]] = {
    2: {
        "wan ulysses": partial(run, wan, wan_inputs, ULYSSES),
        "wan ulysses, gradients": partial(run, wan, wan_inputs, ULYSSES, gradients=True),
        "wan ulysses, dense layer": partial(
            run, wan, wan_inputs, ULYSSES, gradients=True, **_ONE_DENSE_LAYER
        ),
        "wan ulysses, enabled first": partial(run, wan, wan_inputs, ULYSSES, enable_first=True),
        "wan ulysses, detached": partial(run, wan, wan_inputs, ULYSSES, detach=True),
        "wan ulysses, not a mask": partial(run, wan, wan_inputs, ULYSSES, method=Halves()),
        "wan ulysses, vmoba": partial(run, wan, wan_inputs, ULYSSES, method=VMOBA, gradients=True),
        "flux ulysses, vmoba": partial(run, tiny_families.flux, flux_inputs, ULYSSES, method=VMOBA),
        "wan ulysses, linfusion": partial(
            run, wan, wan_inputs, ULYSSES, method=LinFusionAttn(), gradients=True
        ),
        "wan any ulysses, linfusion": partial(
            run, partial(wan, 3), _UNEVEN_WAN, ANY_ULYSSES, method=LinFusionAttn()
        ),
        "wan ulysses, radial": partial(run, wan, _LONGER_WAN, ULYSSES, method=RADIAL),
        "wan any ulysses": partial(run, partial(wan, 3), _UNEVEN_WAN, ANY_ULYSSES, gradients=True),
        "wan ring": partial(run, wan, wan_inputs, RING),
        "wan ring, gradients": partial(run, wan, wan_inputs, RING, gradients=True),
        "wan ring, dense layer": partial(
            run, wan, wan_inputs, RING, gradients=True, **_ONE_DENSE_LAYER
        ),
        "wan ring, dense method": partial(run, wan, wan_inputs, RING, method=DenseAttn()),
        "wan ring, radial": partial(run, wan, _LONGER_WAN, RING, method=RADIAL),
        "wan any ring": partial(run, partial(wan, 3), _UNEVEN_WAN, ANY_RING, gradients=True),
        "wan ulysses, in tiles": partial(run, wan, wan_inputs, ULYSSES, **_TILES),
        "wan any ulysses, in tiles": partial(
            run, partial(wan, 3), _UNEVEN_WAN, ANY_ULYSSES, gradients=True, **_TILES
        ),
        "wan ring, in tiles": partial(run, wan, wan_inputs, RING, **_TILES),
        "wan ulysses, compiled, in tiles": partial(
            run, wan, wan_inputs, ULYSSES, compiled=True, **_TILES
        ),
        "wan pipeline": run_pipeline,
        "wan ulysses, masks by step": partial(run_pipeline, method=WINDOWS, config=ULYSSES),
        "wan ulysses, shares by step": partial(run_pipeline, method=SHARES, config=ULYSSES),
        "wan ring, masks by step": partial(run_pipeline, method=WINDOWS, config=RING),
        "flux ulysses": partial(run, tiny_families.flux, flux_inputs, ULYSSES),
        "flux ulysses, agents": partial(run, tiny_families.flux, flux_inputs, ULYSSES, **_AGENTS),
        "flux ulysses, dense layer": partial(
            run, tiny_families.flux, flux_inputs, ULYSSES, **_ONE_DENSE_LAYER
        ),
        "flux any ulysses": partial(
            run, tiny_families.flux, partial(flux_inputs, 5, 5, 7), ANY_ULYSSES
        ),
        "flux ulysses, in tiles": partial(run, tiny_families.flux, flux_inputs, ULYSSES, **_TILES),
        "flux ring, in tiles": partial(run, tiny_families.flux, flux_inputs, RING, **_TILES),
        "flux ring": partial(run, tiny_families.flux, flux_inputs, RING, gradients=True),
        "kontext ulysses": partial(run, *_KONTEXT, ULYSSES, gradients=True, **_LOCAL),
        "kontext ulysses, in tiles": partial(run, *_KONTEXT, ULYSSES, **_TILES),
        "kontext any ulysses": partial(run, *_UNEVEN_KONTEXT, ANY_ULYSSES, **_LOCAL),
        "kontext ulysses, agents": partial(run, *_KONTEXT, ULYSSES, **_AGENTS),
        "kontext ring": partial(run, *_KONTEXT, RING, **_LOCAL),
        "kontext any ring": partial(run, *_UNEVEN_KONTEXT, ANY_RING, **_TILES),
        "flux ring, dense layer": partial(
            run, tiny_families.flux, flux_inputs, RING, **_ONE_DENSE_LAYER
        ),
        "flux any ring": partial(run, tiny_families.flux, partial(flux_inputs, 5, 5, 7), ANY_RING),
        "qwen ulysses": partial(run, *_QWEN, ULYSSES),
        "qwen ulysses, padded": partial(run, *_PADDED_QWEN, ULYSSES, **_ONE_DENSE_LAYER),
        "qwen ring, padded": partial(run, *_PADDED_QWEN, RING, **_ONE_DENSE_LAYER),
        "ltx ulysses": partial(run, tiny_families.ltx, ltx_inputs, ULYSSES),
        "flux.2 ulysses": partial(run, tiny_families.flux2, flux2_inputs, ULYSSES),
        "flux.2 ring": partial(run, tiny_families.flux2, flux2_inputs, RING),
        "chronoedit ring": partial(
            run,
            partial(tiny_families.wan_shaped, "ChronoEditTransformer3DModel"),
            chronoedit_inputs,
            RING,
        ),
        "wan ulysses, compiled": partial(run, wan, wan_inputs, ULYSSES, compiled=True),
        "wan ring, compiled": partial(run, wan, wan_inputs, RING, compiled=True),
        "flux ring, compiled": partial(run, tiny_families.flux, flux_inputs, RING, compiled=True),
    },
    4: {
        "wan unified": partial(run, wan, wan_inputs, UNIFIED, gradients=True),
        "flux unified, in tiles": partial(run, tiny_families.flux, flux_inputs, UNIFIED, **_TILES),
        "wan unified, dense layer": partial(run, wan, wan_inputs, UNIFIED, **_ONE_DENSE_LAYER),
        "flux unified": partial(run, tiny_families.flux, flux_inputs, UNIFIED, gradients=True),
        "qwen unified, padded": partial(run, *_PADDED_QWEN, UNIFIED),
        "wan ulysses over a part": partial(run, partial(wan, 4), wan_inputs, {"ulysses_degree": 4}),
    },
}

# Runs that must be refused.
REFUSED: dict[int, dict[str, Callable[[bool], Result]]] = {
    2: {
        "no plan, hunyuanvideo": partial(run, tiny_families.hunyuanvideo, dict, ULYSSES),
        "no plan, vace": partial(run, tiny_wan.vace_transformer, dict, ULYSSES),
        "heads": partial(run, partial(wan, 3), wan_inputs, ULYSSES),
        "tokens": partial(run, wan, _UNEVEN_WAN, RING),
        # The text's cross-attention has a mask for all heads where a process has some: a bug of
        # diffusers 0.36 to 0.42, with or without diffattn.
        "ltx ulysses, masked text": partial(run, tiny_families.ltx, masked_ltx_inputs, ULYSSES),
        "ltx ulysses, masked text, detached": partial(
            run, tiny_families.ltx, masked_ltx_inputs, ULYSSES, detach=True
        ),
        "ring, vmoba": partial(run, wan, wan_inputs, RING, method=VMOBA),
        "ulysses, heads together": partial(
            run, wan, wan_inputs, ULYSSES, method=replace(VMOBA, scope="unpublished-all")
        ),
        "ring, more than a mask": partial(run, wan, wan_inputs, RING, method=MoreThanAMask()),
        "flux ulysses, linfusion": partial(
            run, tiny_families.flux, flux_inputs, ULYSSES, method=LinFusionAttn()
        ),
    },
    4: {
        "too few heads": partial(
            run, wan, wan_inputs, {"ulysses_degree": 4, "ulysses_anything": True}
        )
    },
}


def gather_uneven(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """What diffusers gathers uneven parts with, which it does in a way that gloo cannot."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor.detach(), group)
    return torch.cat(parts, dim)


def main(folder: Path, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=SECONDS_TO_WAIT),
    )
    results: dict[str, Result] = {}
    with (
        # On a torch without accelerators diffusers 0.42 divides by their number, 0.
        mock.patch.object(torch.accelerator, "device_count", return_value=1),
        mock.patch.object(context_parallel, "_all_gather_anything", gather_uneven),
    ):
        for name, call in (RUNS[processes] | REFUSED[processes]).items():
            try:
                results[name] = call(True)
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
                if name in RUNS[processes]:
                    # The others wait for this one in vain.
                    torch.save(results, folder / f"{rank}.pt")
                    raise
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
