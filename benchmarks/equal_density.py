"""How near to the dense model methods come at equal shares of the token pairs, untrained.

    python benchmarks/equal_density.py --output benchmarks

writes benchmarks/equal_density.json and benchmarks/equal_density.md.

How the figures are made:

- The bundled model (16 x 12 x 12 tokens, 4 layers), with every layer and every step sparse. The
  default schedules of the methods keep some dense, which hides the cost of the selection.
- "pairs" is the share of the token pairs that attend token by token. For methods that select by
  content the share is measured over all calls of the run. Summaries are not counted: "with means"
  adds the share that the products with them cost.
- "distance" is the mean squared difference between the model's predictions for held-out clips at
  fixed noise levels and those of the dense model.
- "PSNR" is the mean over generated clips of held-out captions, against the dense model's clip of
  the same caption and noise. "right" is the share of the colours, backgrounds and directions that
  the checker reads as the caption says.
- A parameter of each method is set so that its share is as near to the wanted one as its steps
  allow.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import WanPipeline

import diffattn
from diffattn import BlockTopKAttn, GNAAttn, Method, SolAttn, TokenGrid, VMoBAAttn
from diffattn.blocks import unpack_bits
from diffattn.lora.recipes import recipe_for
from diffattn.methods.base import StaticMaskMethod
from diffattn.methods.selected_blocks import SelectedBlocksMethod
from diffattn.methods.vmoba import method as vmoba_method
from diffattn.samples.moving_shapes import MODEL_DIR
from diffattn.samples.moving_shapes.adaptation import HeldOut
from diffattn.samples.moving_shapes.evaluate import Sampling

GRID = TokenGrid(16, 12, 12)
ALWAYS: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
# Blocks of 32 tokens: the model has 2,304 tokens, which are 36 blocks of 64 only.
SMALL: dict[str, Any] = {"block": 32}
CASES: dict[str, Method] = {
    "SolAttn": SolAttn(tau=0.81, neighbours=0, **SMALL, **ALWAYS),
    "SolAttn, nothing of the rest": SolAttn(
        tau=0.81, neighbours=0, remainder="drop", **SMALL, **ALWAYS
    ),
    "BlockTopKAttn (SubBlock)": BlockTopKAttn(keep=0.23, **SMALL, **ALWAYS),
    "BlockTopKAttn, raster order": BlockTopKAttn(keep=0.23, order="raster", **SMALL, **ALWAYS),
    "BlockTopKAttn with summaries": BlockTopKAttn(
        keep=0.23, remainder="summary", **SMALL, **ALWAYS
    ),
    "SolAttn, blocks of 16 in raster order": SolAttn(
        tau=0.78, neighbours=0, order="raster", block=16, **ALWAYS
    ),
    "BlockTopKAttn with summaries, blocks of 16 in raster order": BlockTopKAttn(
        keep=0.18, order="raster", remainder="summary", block=16, **ALWAYS
    ),
    "VMoBAAttn": VMoBAAttn(topk=(2, 9, 18), **ALWAYS),
    "GNAAttn": GNAAttn(window=(9, 8, 8), **ALWAYS),
}
HEADER = "| method | pairs | with means | distance | PSNR, dB | right |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """The figures of a method; those of the dense model have no distance.

    Attributes:
        method: its name in the table.
        parameters: as `Method.to_dict` gives them; empty for the dense model.
        pairs: share of the token pairs that attend token by token.
        with_means: `pairs`, and the products with summaries.
        distance, psnr_db, right: see the module.
    """

    method: str
    parameters: dict[str, Any]
    pairs: float
    with_means: float
    distance: float
    psnr_db: float | None
    right: float


@contextmanager
def counted(method: Method) -> Iterator[list[float]]:
    """The shares of pairs that the calls of a method select, for methods that select by content."""
    shares: list[float] = []
    if isinstance(method, SelectedBlocksMethod):
        choose = SelectedBlocksMethod._chosen

        def chosen(self: Any, *args: Any) -> Any:
            out = choose(self, *args)
            shares.append(float(out.float().mean()))
            return out

        with mock.patch.object(SelectedBlocksMethod, "_chosen", chosen):
            yield shares
    elif isinstance(method, VMoBAAttn):
        select = vmoba_method.select_blocks

        def selected(query: Any, key: Any, blocks: Any, *args: Any, **kwargs: Any) -> Any:
            bits = select(query, key, blocks, *args, **kwargs)
            lengths = blocks.starts.diff().float()
            part = unpack_bits(bits, blocks.blocks).float() @ (lengths / lengths.sum())
            shares.append(float(part.mean()))
            return bits

        with mock.patch.object(vmoba_method, "select_blocks", selected):
            yield shares
    else:
        assert isinstance(method, StaticMaskMethod)
        shares.append(method.for_model("wan2.1", GRID).mask(GRID).density)
        yield shares


def measure(name: str, method: Method, held_out: HeldOut, pipe: Any, dense: list[Any]) -> Row:
    """The figures of the bundled model under a method."""
    attachment = pipe.set_attn_processor(method)
    with counted(method) as shares:
        figures, _ = held_out.figures(pipe, attachment, dense)
    pipe.set_attn_processor(None)
    pairs = sum(shares) / len(shares)
    summaries = getattr(method, "remainder", "drop") == "summary"
    return Row(
        name,
        method.to_dict(),
        pairs,
        pairs + (1 / method.block if summaries else 0),  # type: ignore[attr-defined]
        figures.distance,
        figures.psnr_db,
        sum(figures.accuracy.values()) / len(figures.accuracy),
    )


def table(rows: list[Row]) -> str:
    lines = [HEADER]
    for row in rows:
        psnr = "" if row.psnr_db is None else f"{row.psnr_db:.1f}"
        lines.append(
            f"| {row.method} | {row.pairs:.1%} | {row.with_means:.1%} | {row.distance:.5f} | {psnr}"
            f" | {row.right:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--clips", type=int, default=8, help="held-out clips")
    parser.add_argument("--prompts", type=int, default=8, help="captions to generate")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    options = parser.parse_args()
    pipe: Any = WanPipeline.from_pretrained(MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    recipe = recipe_for(pipe)
    sampling = replace(Sampling(), steps=options.steps)
    held_out = HeldOut(pipe, recipe, options.clips, options.prompts, sampling)
    figures, dense = held_out.figures(pipe)
    right = sum(figures.accuracy.values()) / len(figures.accuracy)
    rows = [Row("dense", {}, 1, 1, 0, None, right)]
    for name, method in CASES.items():
        rows.append(measure(name, method, held_out, pipe, dense))
        print(rows[-1], flush=True)
    about = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "diffattn": diffattn.__version__,
        "clips": options.clips,
        "prompts": options.prompts,
        "steps": options.steps,
    }
    found = {"about": about, "rows": [asdict(row) for row in rows]}
    (options.output / "equal_density.json").write_text(json.dumps(found, indent=1) + "\n")
    words = (
        (__doc__ or "")
        .replace("    python", "```\npython")
        .replace("\n\nwrites", "\n```\n\nwrites")
    )
    (options.output / "equal_density.md").write_text(
        f"# Methods at equal shares of the token pairs\n\n{words}\n{table(rows)}\n"
    )


if __name__ == "__main__":
    main()
