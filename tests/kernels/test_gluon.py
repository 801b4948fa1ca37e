"""The Gluon forward: numbers and protocol on a stand-in machine.

On a Hopper GPU the numbers are those of the kernel itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from oracles import assert_matches_eager, random_layout, stack_layouts

from diffattn.blocks import EMPTY, FULL, PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.block_sparse import gluon_forward
from diffattn.kernels.block_sparse.configs import fitted, tile_config
from diffattn.kernels.block_sparse.forward_pass import forward
from diffattn.kernels.block_sparse.launch import Problem
from diffattn.kernels.common.tile_tables import Choice, TileConfig

if not triton.__version__.startswith(gluon_forward.TRITON_VERSIONS):
    pytest.skip("a Triton that the Gluon kernel was not compiled with", allow_module_level=True)

from gluon_machine import DeadlockError, MisuseError, RaceError, stand_in

from diffattn.kernels.block_sparse import gluon_kernel

KERNEL = gluon_kernel.forward_kernel
SCALE = 0.3
Use = Callable[..., None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Puts the stand-in machine in the kernel's place; options as `stand_in`."""

    def put(**options: Any) -> None:
        monkeypatch.setattr(gluon_forward, "is_hopper", lambda device: True)
        monkeypatch.setattr(gluon_kernel, "forward_kernel", stand_in(KERNEL, **options))

    return put


@pytest.fixture
def place(device: str, use: Use) -> str:
    """Where the kernel runs: a Hopper GPU, or the machine on the CPU."""
    if device == "cpu":
        use()
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    return device


def inputs(
    place: str, batch: int, tokens_q: int, tokens_kv: int, heads: int, head_dim: int,
    dtype: torch.dtype = torch.float16,
) -> list[torch.Tensor]:  # fmt: skip
    return [
        torch.randn(batch, tokens, heads, head_dim).to(place, dtype)
        for tokens in (tokens_q, tokens_kv, tokens_kv)
    ]


def attend(
    qkv: list[torch.Tensor], lists: tuple[torch.Tensor, ...], block_q: int, block_kv: int,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output and LSE by the kernel, with the shipped tiles unless others are given.

    Bits of masks are unpacked in two ways; both give the same results, bit for bit.
    """
    if config is None:
        shipped = tile_config("forward", "gluon", qkv[0].shape[-1], torch.float16, masked=False)
        config = fitted("forward", shipped, block_q, block_kv)
    options = {"block_q": block_q, "block_kv": block_kv, "scale": SCALE}
    first, second = (
        forward(*qkv, lists, None, **options, choice=Choice("gluon", replace(config, ahead=ahead)))
        for ahead in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return first


def check(
    qkv: list[torch.Tensor], layout: BlockLayout, config: TileConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = layout.to(qkv[0].device)
    out, lse = attend(qkv, layout.tensors, layout.block_q, layout.block_kv, config)
    assert_matches_eager(out, lse, *qkv, layout.dense(), scale=SCALE)
    return out, lse


def layout_of(
    rows: list[list[int]], tokens_q: int, tokens_kv: int, density: float = 0.5
) -> BlockLayout:
    """Blocks of 128 x 128 in the given states, partial ones with random bits."""
    return layout_from_states(
        torch.tensor(rows, dtype=torch.uint8),
        lambda row, column: torch.rand(row.numel(), 128, 128) < density,
        tokens_q=tokens_q, tokens_kv=tokens_kv, block_q=128, block_kv=128,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("batch", "tokens_q", "tokens_kv", "head_dim"),
    [
        pytest.param(1, 131, 453, 64, id="prime"),
        pytest.param(2, 129, 513, 128, id="one-over"),
        pytest.param(1, 1, 130, 64, id="one-query"),
        pytest.param(1, 200, 1, 64, id="one-key"),
        pytest.param(1, 256, 384, 128, id="whole-blocks"),
    ],
)
def test_matches_float64(
    batch: int, tokens_q: int, tokens_kv: int, head_dim: int, dtype: torch.dtype, place: str
) -> None:
    qkv = inputs(place, batch, tokens_q, tokens_kv, 2, head_dim, dtype)
    check(qkv, random_layout(tokens_q, tokens_kv, 128, 128))
    check(qkv, random_layout(tokens_q, tokens_kv, 128, 128, partial=False))


@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 64), (128, 256), (256, 256), (384, 128)])
@pytest.mark.parametrize("tokens", [100, 460])
def test_blocks(block_q: int, block_kv: int, tokens: int, place: str) -> None:
    qkv = inputs(place, 1, tokens, tokens + 1, 1, 64)
    check(qkv, random_layout(tokens, tokens + 1, block_q, block_kv))


@pytest.mark.parametrize(
    "config",
    [TileConfig(128, 64, 4, 2), TileConfig(128, 64, 4, 5), TileConfig(128, 128, 4, 4)],
    ids=str,
)
def test_tiles(config: TileConfig, place: str) -> None:
    check(inputs(place, 1, 250, 700, 1, 64), random_layout(250, 700, 128, 128), config)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param([EMPTY] * 4, id="empty"),
        pytest.param([FULL, EMPTY, EMPTY, EMPTY], id="one-full"),
        pytest.param([EMPTY, PARTIAL, EMPTY, EMPTY], id="one-partial"),
        pytest.param([EMPTY, EMPTY, EMPTY, FULL], id="one-short"),
        pytest.param([EMPTY, EMPTY, EMPTY, PARTIAL], id="one-partial-short"),
        pytest.param([PARTIAL] * 4, id="partial"),
        pytest.param([FULL] * 4, id="full"),
        pytest.param([PARTIAL, PARTIAL, FULL, FULL], id="both-and-short"),
    ],
)
@pytest.mark.parametrize("tokens_kv", [401, 512])
def test_rows(row: list[int], tokens_kv: int, place: str) -> None:
    # The row before and the one after take other ways through the kernel.
    layout = layout_of([[FULL, PARTIAL, EMPTY, FULL], row, [PARTIAL] * 4], 300, tokens_kv)
    out, lse = check(inputs(place, 1, 300, tokens_kv, 1, 64), layout)
    if not any(row):
        assert (out[:, 128:256] == 0).all()
        assert (lse[..., 128:256] == -torch.inf).all()


def test_queries_that_see_nothing_yet(place: str) -> None:
    """Most queries see nothing of most tiles, and some nothing at all."""
    layout = layout_of([[PARTIAL] * 5, [PARTIAL, PARTIAL, FULL, PARTIAL, PARTIAL]], 256, 600, 0.002)
    out, lse = check(inputs(place, 1, 256, 600, 2, 64), layout)
    blind = lse == -torch.inf
    assert 0 < blind.sum() < blind[..., :128].numel()
    assert (out.transpose(1, 2)[blind] == 0).all()


def test_bits_of_keys_past_the_end_are_not_believed(place: str) -> None:
    layout = layout_of([[PARTIAL, PARTIAL]], 128, 200, 1.1).to(place)
    *lists, bit_masks = layout.tensors
    qkv = inputs(place, 1, 128, 200, 1, 64)
    out, lse = attend(qkv, (*lists, torch.full_like(bit_masks, -1)), 128, 128)
    assert_matches_eager(out, lse, *qkv, layout.dense(), scale=SCALE)


def test_nan_where_no_row_looks(place: str) -> None:
    """An empty row reads no key, and a row none of the blocks it does not visit."""
    layout = layout_of([[EMPTY, EMPTY], [EMPTY, FULL]], 256, 256)
    qkv = inputs(place, 1, 256, 256, 1, 64)
    for x in qkv[1:]:
        x[:, :128] = torch.nan
    out, _ = attend(qkv, layout.to(place).tensors, 128, 128)
    assert out.isfinite().all()
    assert (out[:, :128] == 0).all()


def mixed_up(layout: BlockLayout, place: str, short: int) -> tuple[torch.Tensor, ...]:
    """The lists of a layout of one row in random order, the last full block at `short`."""
    count, index, partial_count, partial_index, mask, bits = layout.tensors
    order = torch.randperm(int(count))
    at = int(order.argmax())
    order[[at, short]] = order[[short, at]]
    partial = torch.randperm(int(partial_count))
    lists = (count, index[..., order], partial_count, partial_index[..., partial])
    return tuple(x.to(place) for x in (*lists, mask[..., partial], bits))


@pytest.mark.parametrize("short", [0, 2, 4])
def test_lists_in_any_order(short: int, place: str) -> None:
    """The short block at the end of the sequence is wherever in a list it happens to be."""
    layout = layout_of([[FULL, FULL, PARTIAL, FULL, FULL, PARTIAL, FULL]], 128, 800)
    qkv = inputs(place, 1, 128, 800, 1, 64)
    lists = mixed_up(layout, place, short)
    out, lse = attend(qkv, lists, 128, 128)
    assert_matches_eager(out, lse, *qkv, layout.dense().to(place), scale=SCALE)


def test_layouts_per_sample_and_per_head(place: str) -> None:
    layouts = [random_layout(130, 450, 128, 128) for _ in range(6)]
    qkv = inputs(place, 2, 130, 450, 3, 64)
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, (2, 3)).to(place)
    stacked = tuple(x.to(place) for x in stack_layouts(layouts, 2, 3))
    out, lse = attend(qkv, stacked, 128, 128)
    assert_matches_eager(out, lse, *qkv, mask, scale=SCALE)


def test_strides_of_models(place: str) -> None:
    layout = random_layout(130, 130, 128, 64)
    fused = torch.randn(2, 130, 3 * 2 * 64, dtype=torch.float16, device=place)
    slices = [x.unflatten(-1, (2, 64)) for x in fused.chunk(3, -1)]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in slices]
    # A stride over the only head, or sample, may be anything.
    alone = [x[:1, :, :1].as_strided((1, 130, 1, 64), (3, x.stride(1), 5, 1)) for x in slices]
    for qkv in (slices, heads_first, alone):
        check(qkv, layout)


def test_more_tiles_than_come_first(place: str) -> None:
    """Some tiles of every head come before, and the others head by head."""
    check(inputs(place, 2, 1200, 140, 2, 64), random_layout(1200, 140, 128, 128))


def test_two_launches_give_the_same_bits(place: str) -> None:
    qkv = inputs(place, 1, 300, 700, 2, 64)
    layout = random_layout(300, 700, 128, 128)
    first, second = check(qkv, layout), check(qkv, layout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Whatever follows is about the machine or the compiler: no GPU is asked.


@pytest.mark.parametrize("late", [False, True], ids=["eager-copies", "late-copies"])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_in_every_order(seed: int, stages: int, late: bool, use: Use) -> None:
    use(late=late, seed=seed)
    layout = layout_of([[FULL] * 3 + [PARTIAL] * 2 + [FULL], [EMPTY] * 6], 250, 700)
    check(inputs("cpu", 1, 250, 700, 1, 64), layout, TileConfig(128, 128, 4, stages))


# What is changed, in which function, and how the machine sees that.
SABOTAGE: dict[str, tuple[str, str, str, Any]] = {
    "keys-kept": ("_attend", "mbarrier.arrive(k_empty.index(s_k))", "pass", DeadlockError),
    "values-kept": ("_attend", "mbarrier.arrive(v_empty.index(s_v))", "pass", DeadlockError),
    "first-keys-kept": ("_consume", "mbarrier.arrive(k_empty.index(0))", "pass", DeadlockError),
    "values-given-back-in-use": (
        "_attend",
        "b_acc, b_p = warpgroup_mma_wait(0, deps=(products, b_p))\n"
        "    mbarrier.arrive(v_empty.index(s_v))",
        "mbarrier.arrive(v_empty.index(s_v))\n"
        "    b_acc, b_p = warpgroup_mma_wait(0, deps=(products, b_p))",
        RaceError,
    ),
    "product-not-waited-for": (
        "_attend", "warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,", MisuseError,
    ),
    "keys-not-there": (
        "_attend", "mbarrier.wait(k_full.index(s_k), (i // STAGES) & 1)", "pass", RaceError,
    ),
    "values-not-there": (
        "_attend", "mbarrier.wait(v_full.index(s_v), (j // STAGES) & 1)", "pass", RaceError,
    ),
    "queries-not-there": ("_consume", "mbarrier.wait(q_full.index(0), 0)", "pass", RaceError),
    "last-values-not-there": (
        "_consume", "mbarrier.wait(v_full.index(j % STAGES), (j // STAGES) & 1)", "pass", RaceError,
    ),
    "wrong-phase": ("_attend", "(i // STAGES) & 1", "0", (RaceError, DeadlockError)),
    "keys-overwritten": (
        "fetch_keys_and_values", "mbarrier.wait(k_empty.index(s), phase ^ 1)", "pass", RaceError,
    ),
    "values-overwritten": (
        "fetch_keys_and_values", "mbarrier.wait(v_empty.index(s), phase ^ 1)", "pass", RaceError,
    ),
    "wrong-first-phase": (
        "fetch_keys_and_values", "v_empty.index(s), phase ^ 1", "v_empty.index(s), phase",
        DeadlockError,
    ),
    "too-few-bytes": (
        "fetch_keys_and_values", "keys.block_type.nbytes", "keys.block_type.nbytes // 2",
        DeadlockError,
    ),
    "bytes-of-one-group": (
        "_produce", "GROUPS * queries.block_type", "queries.block_type",
        (DeadlockError, RaceError),
    ),
    "one-group-suffices": (
        "make_rings", "k_empty.index(s), count=GROUPS", "k_empty.index(s), count=1",
        (RaceError, MisuseError, DeadlockError),
    ),
    "nothing-for-empty-rows": (
        "forward_kernel", "n_masked = 1", "pass", (DeadlockError, RaceError),
    ),
    "no-fence": ("_consume", "fence_async_shared()", "pass", RaceError),
    "left-while-storing": ("_consume", "tma.store_wait(0)", "pass", MisuseError),
    "minus-infinity": (
        "softmax_step", 'gl.where(b_new == float("-inf"), 0.0, b_new)', "b_new", AssertionError,
    ),
    "keys-past-the-end": ("_hide", "(words[i] & seen)", "words[i]", AssertionError),
    "bits-of-another-word": ("_words", "o_m * WORDS + i", "o_m * WORDS", AssertionError),
    "short-block-unmasked": (
        "forward_kernel", "(i_last == i_rest).to(gl.int32)", "(i_last < -1).to(gl.int32)",
        AssertionError,
    ),
    "words-of-the-next-tile": ("_consume", "j + AHEAD", "j + 1", AssertionError),
    "words-of-the-tile-before": ("_consume", "j + AHEAD", "j", AssertionError),
    "mask-of-the-tile-before": ("_consume", "_entry(j + 2,", "_entry(j + 1,", AssertionError),
    "block-of-the-next-tile": ("_consume", "i_block = i_next", "pass", AssertionError),
    "words-of-the-second-masked-tile": (
        "_consume", "i = first_masked - n_unmasked", "i = first_masked + 1 - n_unmasked",
        AssertionError,
    ),
    "part-of-a-sign": ("_hide", "0x8888,", "0x0888,", AssertionError),
    "bits-of-the-column-before": ("_hide", "7 - o_n % 8", "6 - o_n % 8 % 7", AssertionError),
    "no-rescaling": ("_attend", "b_acc = b_acc *", "_ = b_acc *", AssertionError),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_machine_finds(name: str, use: Use) -> None:
    """The lines of the protocol are needed, and so are those for odd ends."""
    function, right, wrong, failure = SABOTAGE[name]
    use(edits={function: (right, wrong)})
    with pytest.raises(failure):
        odd_ends()


def test_the_machine_finds_nothing_wrong(use: Use) -> None:
    use()
    odd_ends()


def odd_ends() -> None:
    """A call that needs every line of the kernel: its rows have all there is, or little."""
    rows = [[FULL, PARTIAL, FULL, PARTIAL, FULL], [EMPTY] * 5, [PARTIAL] * 4 + [FULL]]
    layout = layout_of(rows, 300, 514, 0.01)
    count, index, *rest = layout.tensors
    # The short block is the first of a list.
    index = torch.cat([index[..., :1, :].flip(-1), index[..., 1:, :]], -2)
    qkv = inputs("cpu", 1, 300, 514, 1, 64)
    out, lse = attend(qkv, (count, index, *rest), 128, 128)
    assert_matches_eager(out, lse, *qkv, layout.dense(), scale=SCALE)


def takes(
    qkv: list[torch.Tensor], key_mask: torch.Tensor | None = None, *,
    block_q: int = 128, block_kv: int = 64, scale: float = SCALE,
) -> bool:  # fmt: skip
    layout = random_layout(130, 130, block_q, block_kv).tensors
    problem = Problem.of(*qkv, layout, key_mask, block_q, block_kv, scale)
    return gluon_forward.takes(problem, *qkv)


def test_takes(use: Use) -> None:
    qkv = inputs("cpu", 2, 130, 130, 2, 64)
    assert not takes(qkv), "not a Hopper GPU"
    use()
    assert takes(qkv)
    assert takes([x.bfloat16() for x in qkv])
    assert takes(qkv, block_q=256, block_kv=256)
    assert not takes(qkv, block_q=64)
    assert not takes(qkv, block_kv=32)
    assert not takes(qkv, scale=0.0)
    assert not takes(qkv, scale=-SCALE)
    assert not takes(qkv, torch.ones(2, 130, dtype=torch.bool))
    assert not takes([x.float() for x in qkv])
    for head_dim in (32, 80, 256):
        assert not takes(inputs("cpu", 2, 130, 130, 2, head_dim))


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_takes_no_strides_that_the_copy_engine_cannot(which: int, use: Use) -> None:
    use()

    def with_one(x: torch.Tensor) -> list[torch.Tensor]:
        qkv = inputs("cpu", 2, 130, 130, 2, 64)
        qkv[which] = x
        return qkv

    shape = (2, 130, 2, 64)
    memory = torch.zeros(2 * 130 * 2 * 80, dtype=torch.float16)
    assert takes(with_one(memory.as_strided(shape, (130 * 144, 144, 72, 1), 8)))
    assert not takes(with_one(memory.as_strided(shape, (130 * 144, 144, 72, 1), 4)))
    assert not takes(with_one(memory.as_strided(shape, (130 * 136, 136, 68, 1))))
    assert not takes(with_one(memory.as_strided(shape, (130 * 128 + 4, 128, 64, 1))))
    assert not takes(with_one(memory.as_strided(shape, (130 * 128, 128, 1, 2))))
    assert not takes(with_one(memory.as_strided(shape, (0, 128, 64, 1))))
    far = torch.empty_strided(shape, (128, 2**39, 64, 1), dtype=torch.float16, device="meta")
    assert not takes(with_one(far))


def test_tiles_that_the_kernel_cannot_have(use: Use) -> None:
    use()
    qkv = inputs("cpu", 1, 130, 130, 2, 64)
    layout = random_layout(130, 130, 128, 128).tensors
    for config, message in (
        (TileConfig(64, 128, 4, 2), "have 128 queries, 4 warps"),
        (TileConfig(128, 128, 8, 2), "have 128 queries, 4 warps"),
        (TileConfig(128, 128, 4, 1), "2 or more stages"),
        (TileConfig(128, 32, 4, 2), "64 or 128 keys"),
        (TileConfig(128, 128, 4, 7), "7 stages of 128 keys at head_dim 64 take 246784 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(qkv, layout, 128, 128, config)


def test_not_available_where_gluon_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise AttributeError("module has no attribute 'async_load'")

    gluon_forward.available.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "4.0.1")
        assert not gluon_forward.available()
    gluon_forward.available.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(gluon_forward, "_kernel_module", broken)
        assert not gluon_forward.available()
    gluon_forward.available.cache_clear()
    assert gluon_forward.available()
