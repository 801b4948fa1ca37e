"""The command line of the package.

    python benchmarks/machine_code [--arch 80 90 100] [--kernel keys ...] [--output FOLDER]

prints a line per loop of every shipped configuration, then the problems, and writes both as
Markdown and as JSON if asked. For kernels of one family with other tiles:

    python benchmarks/machine_code --arch 90 --kernel keys --variant tma --head-dim 128 \
        --tiles 64,128,8,2,64 32,128,8,2

with queries, keys, warps, stages, and, if wanted, tokens per tile of partial blocks and "ahead".
Compiled kernels are kept in Triton's cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import triton

from diffattn.kernels.common.tile_tables import TileConfig

from . import block_sparse, gather, tangent
from .block_sparse import PRODUCTS, Case
from .cases import FAMILIES, shipped
from .launches import Launch
from .limits import problems, verdicts
from .model import CHIPS
from .rows import KernelRow, rows_of
from .table import as_json, lines, markdown, verdict

DEFAULT_ARCHITECTURES = (80, 90, 100)
_TRIED = {"block_sparse": tuple(PRODUCTS), "gather": tuple(PRODUCTS), "tangent": ("tangent",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 if one of its kernels has a problem."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.tiles and len(options.family or ["one"]) != 1:
        parser.error("--tiles takes one --family")
    rows: list[KernelRow] = []
    wrong: list[str] = []
    for arch in options.arch:
        launches = _tried(parser, options) if options.tiles else _chosen(shipped(arch), options)
        found, failed = rows_of(launches, arch)
        rows += [row for row in found if not options.kernel or row.kernel in options.kernel]
        wrong += failed
    wrong += problems(rows)
    goals = verdicts(rows) if not options.kernel and not options.family else []
    print(lines(rows), *map(verdict, goals), sep="")
    if options.output:
        stem = "triton-" + ".".join(triton.__version__.split(".")[:2])
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{stem}.md").write_text(markdown(rows, goals))
        (options.output / f"{stem}.json").write_text(as_json(rows, goals, wrong))
    print(f"{len(rows)} kernels with Triton {triton.__version__}, {len(wrong)} problems")
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", type=int, nargs="+", choices=CHIPS, default=DEFAULT_ARCHITECTURES)
    add("--family", nargs="+", choices=FAMILIES, help="all by default")
    add("--kernel", nargs="+", help="those of these names: forward, queries, keys, ...")
    add("--variant", nargs="+", help="those of these variants: plain, tma, ...")
    add("--head-dim", type=int, nargs="+", help="those of these head dimensions")
    add("--tiles", nargs="+", type=_tiles, help="tiles to try, of one --family")
    add("--full-only", action="store_true", help="without partial blocks, with --tiles")
    add("--output", type=Path, help="folder for the table, as Markdown and as JSON")
    return parser


def _tiles(text: str) -> TileConfig:
    *numbers, last = text.split(",")
    ahead = last == "ahead"
    if not ahead:
        numbers.append(last)
    if not 4 <= len(numbers) <= 5 or not all(x.isdecimal() for x in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give queries,keys,warps,stages[,partial][,ahead], as 128,64,8,3,64,ahead"
        )
    queries, keys, warps, stages, *partial = map(int, numbers)
    return TileConfig(queries, keys, warps, stages, partial[0] if partial else None, ahead)


def _tried(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Launch]:
    (family,) = options.family or ["block_sparse"]
    kernels = _TRIED.get(family, ())
    unknown = set(options.kernel or ()).difference(kernels)
    if unknown or not kernels:
        parser.error(
            f"--tiles takes {' '.join(PRODUCTS)} of --family block_sparse or gather, or tangent of"
            f" --family tangent; got {' '.join(unknown)} of {family}"
        )
    return [
        _launch(family, kernel, head_dim, variant, tiles, options.full_only)
        for head_dim in options.head_dim or [128]
        for kernel in options.kernel or kernels
        for variant in options.variant or ["plain"]
        for tiles in options.tiles
    ]


def _launch(
    family: str, kernel: str, head_dim: int, variant: str, tiles: TileConfig, full_only: bool
) -> Launch:
    if family == "gather":
        return gather.launch(gather.Case(head_dim, torch.bfloat16), kernel, tiles)
    case = Case(head_dim, torch.bfloat16, partial=not full_only, ragged=not full_only)
    if family == "tangent":
        return tangent.launch(case, tiles)
    return block_sparse.launch(case, kernel, variant, tiles)


def _chosen(launches: Iterable[Launch], options: argparse.Namespace) -> list[Launch]:
    return [
        x
        for x in launches
        if (not options.family or x.family in options.family)
        and (not options.variant or x.variant in options.variant)
        and (not options.head_dim or any(x.case.startswith(f"d{d} ") for d in options.head_dim))
    ]
