"""The choices to try on a GPU for each kernel, the most promising first.

Choices are those that were fast on an H200, and new choices in the order of the static model of the
machine code (registers, spills, the useful share of the tensor cores' cycles, see
benchmarks/machine_code), which is a guide and no result. The shipped choice is always among them.
"""

from __future__ import annotations

from diffattn.kernels.common.tile_tables import Choice, TileConfig

# The most choices per kernel and head_dim, the shipped choice included.
MOST = 6

# Forms that could hang, or whose compiler support is young. They run in processes of their own, and
# are timed after everything else.
RISKY = ("gluon",)

AHEAD = "ahead"  # see TileConfig


def _choices(*rows: str) -> tuple[Choice, ...]:
    """Choices from texts as `label` writes them."""
    return tuple(map(_choice, rows))


def _choice(text: str) -> Choice:
    variant, sizes, *rest = text.split()
    block_m, block_n = map(int, sizes.split("x"))
    numbers = {part[0]: int(part[1:]) for part in rest if part != AHEAD}
    tiles = TileConfig(
        block_m, block_n, numbers["w"], numbers["s"], numbers.get("p"), AHEAD in rest
    )
    return Choice(variant, tiles)


def label(choice: Choice) -> str:
    """A choice as text.

    Form, queries and keys per tile, warps, stages, walked tokens in partial blocks, ahead.
    """
    tiles = choice.tiles
    text = f"{choice.variant} {tiles.block_m}x{tiles.block_n} w{tiles.num_warps}"
    text += f" s{tiles.num_stages}"
    if tiles.partial is not None:
        text += f" p{tiles.partial}"
    return f"{text} {AHEAD}" if tiles.ahead else text


RANKED: dict[tuple[str, int], tuple[Choice, ...]] = {
    ("forward", 128): _choices(
        "gluon 128x128 w4 s2",
        "gluon 128x128 w4 s2 ahead",
        "tma 128x64 w8 s3 p64 ahead",
        "tma 64x64 w4 s2 p64 ahead",
        "plain 128x64 w8 s3 p64 ahead",
    ),
    ("forward", 64): _choices(
        "gluon 128x128 w4 s3",
        "gluon 128x128 w4 s3 ahead",
        "tma 128x64 w4 s3 p64 ahead",
        "tma 64x128 w4 s2 p64 ahead",
        "plain 128x64 w8 s3 p64 ahead",
    ),
    ("queries", 128): _choices(
        "tma 128x64 w8 s3 p64",
        "tma 64x64 w4 s2 p64",
        "tma 128x128 w8 s2 p64",
        "plain 128x64 w8 s2",
    ),
    ("queries", 64): _choices(
        "tma 64x128 w4 s2 p64",
        "tma 64x64 w4 s2 p64 ahead",
        "tma 128x128 w8 s2 p64 ahead",
        "plain 128x64 w8 s2",
    ),
    ("keys", 128): _choices(
        "tma 64x64 w4 s2 p32",
        "tma 64x64 w4 s2 p64",
        "tma 32x64 w4 s2 p32",
        "plain 32x128 w8 s2",
    ),
    ("keys", 64): _choices(
        "tma 64x64 w4 s3 p64",
        "tma 64x128 w8 s3 p32",
        "tma 32x64 w4 s2 p32",
        "plain 64x64 w4 s2",
    ),
    ("gather_forward", 128): _choices(
        "gluon 128x128 w4 s2",
        "gluon 128x64 w4 s3",
        "plain 128x64 w8 s3",
        "plain 64x64 w4 s2",
    ),
    ("gather_queries", 128): _choices(
        "plain 128x64 w8 s2",
        "plain 64x64 w4 s2",
    ),
    ("gather_keys", 128): _choices(
        "plain 32x64 w4 s2",
        "plain 32x128 w8 s2",
    ),
}


def ranked(kernel: str, head_dim: int, shipped: Choice) -> list[Choice]:
    """The choices to try of a kernel, at most `MOST`, with the risky forms last.

    Args:
        shipped: the choice that runs where nothing was tuned.
    """
    found = list(dict.fromkeys((shipped, *RANKED[kernel, head_dim])))[:MOST]
    return sorted(found, key=lambda choice: choice.variant in RISKY)
