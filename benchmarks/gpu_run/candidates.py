"""What is tried on a GPU for each kernel, the most promising first.

Ranked by the static model of the machine code (registers, spills, the share of the tensor cores'
cycles that do useful work), which is a guide and no result. What ships is always among them.
"""

from __future__ import annotations

from diffattn.kernels.block_sparse.configs import Choice, TileConfig

# Of each kernel and head_dim, what ships included.
MOST = 8

# Forms that could hang, or whose compiler support is young: in processes of their own, and timed
# when everything else has been.
RISKY = ("tma_ws", "gluon", "one_pass")


def _choices(*rows: tuple[str, int, int, int, int, int | None]) -> tuple[Choice, ...]:
    return tuple(
        Choice(variant, TileConfig(m, n, warps, stages, partial))
        for variant, m, n, warps, stages, partial in rows
    )


# Columns: variant, queries and keys per tile, warps, stages, walked tokens in partial blocks.
RANKED: dict[tuple[str, int], tuple[Choice, ...]] = {
    ("forward", 128): _choices(
        ("tma", 128, 64, 8, 3, 64),
        ("gluon", 128, 128, 4, 2, None),
        ("tma", 128, 128, 8, 2, 64),
        ("tma", 128, 64, 8, 4, 64),
        ("tma_ws", 128, 128, 4, 2, None),
        ("tma", 64, 64, 4, 2, 64),
        ("plain", 128, 64, 8, 3, None),
    ),
    ("forward", 64): _choices(
        ("tma", 128, 128, 8, 2, 64),
        ("tma", 128, 64, 4, 2, 64),
        ("tma", 128, 64, 4, 3, 64),
        ("gluon", 128, 128, 4, 2, None),
        ("tma", 128, 64, 8, 2, 64),
        ("tma", 64, 128, 4, 2, 64),
        ("plain", 128, 128, 8, 2, None),
    ),
    ("queries", 128): _choices(
        ("tma", 128, 64, 8, 2, 64),
        ("tma", 128, 128, 8, 2, 64),
        ("tma", 128, 64, 8, 3, 64),
        ("tma", 64, 64, 4, 2, 64),
        ("plain", 128, 64, 8, 2, None),
    ),
    ("queries", 64): _choices(
        ("tma", 128, 128, 8, 2, 64),
        ("tma", 64, 128, 4, 2, 64),
        ("tma", 128, 64, 8, 3, 64),
        ("tma", 128, 64, 8, 2, 64),
        ("plain", 128, 64, 8, 2, None),
    ),
    ("keys", 128): _choices(
        ("tma", 64, 128, 8, 2, 64),
        ("tma", 64, 64, 4, 2, 64),
        ("tma", 64, 128, 8, 2, 32),
        ("tma", 32, 128, 8, 3, 32),
        ("one_pass", 64, 128, 8, 2, 64),
        ("tma", 32, 64, 4, 2, 32),
        ("plain", 32, 128, 8, 2, None),
    ),
    ("keys", 64): _choices(
        ("tma", 64, 64, 4, 2, 64),
        ("tma", 64, 64, 4, 3, 64),
        ("tma", 64, 128, 8, 2, 64),
        ("tma", 64, 128, 8, 3, 32),
        ("one_pass", 64, 128, 8, 2, 64),
        ("tma", 32, 64, 4, 2, 32),
        ("plain", 64, 64, 4, 2, None),
    ),
    ("gather_forward", 128): _choices(
        ("plain", 128, 64, 8, 3, None),
        ("plain", 128, 64, 8, 2, None),
        ("plain", 128, 128, 8, 2, None),
        ("plain", 64, 64, 4, 2, None),
    ),
    ("gather_queries", 128): _choices(
        ("plain", 128, 64, 8, 2, None),
        ("plain", 64, 64, 4, 2, None),
        ("plain", 64, 128, 4, 2, None),
    ),
    ("gather_keys", 128): _choices(
        ("plain", 32, 64, 4, 2, None),
        ("plain", 64, 64, 4, 2, None),
        ("plain", 32, 128, 8, 2, None),
        ("plain", 64, 128, 8, 2, None),
    ),
}


def ranked(kernel: str, head_dim: int, shipped: Choice) -> list[Choice]:
    """What to try of a kernel, without the risky forms at first, `MOST` at most.

    Args:
        shipped: what runs where nothing was tuned.
    """
    found = list(dict.fromkeys((shipped, *RANKED[kernel, head_dim])))[:MOST]
    return sorted(found, key=lambda choice: choice.variant in RISKY)


def label(choice: Choice) -> str:
    """A choice in a few letters."""
    tiles = choice.tiles
    text = f"{choice.variant} {tiles.block_m}x{tiles.block_n} w{tiles.num_warps}"
    text += f" s{tiles.num_stages}"
    return text if tiles.partial is None else f"{text} p{tiles.partial}"
