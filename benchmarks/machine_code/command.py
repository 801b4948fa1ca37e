"""The command line."""

from __future__ import annotations

import argparse

import torch

from diffattn.kernels.block_sparse.configs import TileConfig

from .cases import Case, block_sparse, shipped
from .model import CHIPS
from .rows import rows_of
from .table import markdown

DEFAULT_ARCHITECTURES = (80, 90, 100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=DEFAULT_ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--variant", default="plain")
    parser.add_argument("--tiles", nargs="+")
    parser.add_argument("--full-only", action="store_true")
    arguments = parser.parse_args()
    for arch in arguments.arch:
        launches = list(shipped(arch))
        if arguments.kernel:
            launches = [x for x in launches if x.kernel in arguments.kernel]
        if arguments.tiles:
            case = Case(arguments.head_dim, torch.bfloat16, partial=not arguments.full_only)
            launches = [
                block_sparse(case, kernel, arguments.variant, TileConfig(*map(int, t.split(","))))
                for kernel in arguments.kernel
                for t in arguments.tiles
            ]
        print(markdown(rows_of(launches, arch)), flush=True)
    return 0
