"""The Hopper kernels: as right as the plain one, and given only what the chip can fetch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from oracles import assert_matches_eager, random_layout, stack_layouts
from triton.runtime import _allocation

from diffattn.blocks import EMPTY, FULL, BlockLayout, layout_from_states
from diffattn.kernels.block_sparse import hopper

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def on_hopper_or_interpreted(device: str) -> None:
    if device != "cpu" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")


def inputs(
    device: str, batch: int, tokens_q: int, tokens_kv: int, heads: int, head_dim: int,
    dtype: torch.dtype = torch.float16,
) -> list[torch.Tensor]:  # fmt: skip
    return [
        torch.randn(batch, tokens, heads, head_dim).to(device, dtype)
        for tokens in (tokens_q, tokens_kv, tokens_kv)
    ]


def check(
    form: Any, qkv: list[torch.Tensor], layout: BlockLayout, key_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = layout.to(qkv[0].device)
    out, lse = form(
        *qkv, layout.tensors, key_mask,
        block_q=layout.block_q, block_kv=layout.block_kv, scale=0.3,
    )  # fmt: skip
    assert_matches_eager(out, lse, *qkv, layout.dense(), scale=0.3, key_mask=key_mask)
    return out, lse


@dtypes
@pytest.mark.parametrize(
    ("batch", "tokens_q", "tokens_kv", "head_dim"),
    [
        pytest.param(1, 131, 197, 16, id="prime"),
        pytest.param(3, 65, 65, 24, id="one-over"),
        pytest.param(1, 1, 130, 64, id="one-query"),
        pytest.param(1, 65, 1, 40, id="text-of-length-1"),
        pytest.param(1, 128, 128, 72, id="whole-blocks"),
    ],
)
def test_full_and_partial_blocks(
    batch: int, tokens_q: int, tokens_kv: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    qkv = inputs(device, batch, tokens_q, tokens_kv, 2, head_dim, dtype)
    check(hopper.forward_tma, qkv, random_layout(tokens_q, tokens_kv, 64, 64))


def test_several_tiles_per_block(device: str) -> None:
    qkv = inputs(device, 1, 300, 200, 1, 16)
    check(hopper.forward_tma, qkv, random_layout(300, 200, 256, 128))


@dtypes
def test_key_mask_over_nan(dtype: torch.dtype, device: str) -> None:
    qkv = inputs(device, 2, 70, 135, 2, 24, dtype)
    key_mask = torch.rand(2, 135, device=device) < 0.7
    layout = random_layout(70, 135, 64, 64)
    expected = check(hopper.forward_tma, qkv, layout, key_mask)
    for x in qkv[1:]:
        x[~key_mask] = torch.nan
    layout = layout.to(device)
    found = hopper.forward_tma(
        *qkv, layout.tensors, key_mask, block_q=64, block_kv=64, scale=0.3
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@dtypes
@pytest.mark.parametrize(
    ("batch", "tokens_q", "tokens_kv", "block_kv", "head_dim"),
    [
        pytest.param(1, 131, 197, 64, 16, id="prime"),
        pytest.param(3, 129, 129, 128, 24, id="one-over"),
        pytest.param(1, 1, 130, 64, 64, id="one-query"),
        pytest.param(1, 129, 1, 128, 40, id="text-of-length-1"),
        pytest.param(1, 256, 128, 64, 72, id="whole-blocks"),
        pytest.param(1, 128, 300, 256, 136, id="several-tiles-per-block"),
    ],
)
def test_full_blocks_by_specialized_warps(
    batch: int, tokens_q: int, tokens_kv: int, block_kv: int, head_dim: int,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    qkv = inputs(device, batch, tokens_q, tokens_kv, 2, head_dim, dtype)
    layout = random_layout(tokens_q, tokens_kv, 128, block_kv, partial=False)
    check(hopper.forward_warp_specialized, qkv, layout)


@pytest.mark.parametrize("form", [hopper.forward_tma, hopper.forward_warp_specialized])
def test_rows_that_see_nothing(form: Any, device: str) -> None:
    states = torch.tensor([[EMPTY, EMPTY], [EMPTY, FULL], [FULL, EMPTY]], dtype=torch.uint8)
    layout = layout_from_states(
        states, None, tokens_q=260, tokens_kv=70, block_q=128, block_kv=64
    )  # fmt: skip
    out, lse = check(form, inputs(device, 1, 260, 70, 2, 16), layout)
    assert (out[:, :128] == 0).all()
    assert (lse[..., :128] == -torch.inf).all()
    assert (lse[..., 128:] > -torch.inf).all()


@pytest.mark.parametrize("form", [hopper.forward_tma, hopper.forward_warp_specialized])
def test_layouts_per_sample_and_per_head(form: Any, device: str) -> None:
    layouts = [random_layout(130, 150, 128, 64, partial=False) for _ in range(6)]
    qkv = inputs(device, 2, 130, 150, 3, 16)
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, (2, 3)).to(device)
    stacked = tuple(x.to(device) for x in stack_layouts(layouts, 2, 3))
    out, lse = form(*qkv, stacked, None, block_q=128, block_kv=64, scale=0.3)
    assert_matches_eager(out, lse, *qkv, mask, scale=0.3)


@pytest.mark.parametrize("form", [hopper.forward_tma, hopper.forward_warp_specialized])
def test_strides_of_models(form: Any, device: str) -> None:
    layout = random_layout(130, 130, 128, 64, partial=False)
    fused = torch.randn(2, 130, 3 * 2 * 24, dtype=torch.float16, device=device)
    slices = [x.unflatten(-1, (2, 24)) for x in fused.chunk(3, -1)]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in slices]
    for qkv in (slices, heads_first):
        assert not any(x.is_contiguous() for x in qkv)
        assert takes(qkv)
        check(form, qkv, layout)


def takes(qkv: list[torch.Tensor], **changed: Any) -> bool:
    return hopper.tma_takes(*qkv, **{"block_q": 128, "block_kv": 64, "scale": 0.3, **changed})


def test_takes_what_the_copy_engine_can_fetch(device: str) -> None:
    qkv = inputs(device, 2, 130, 130, 2, 24)
    assert takes(qkv)
    assert takes(qkv, block_q=64)
    assert not takes(qkv, block_q=32)
    assert not takes(qkv, block_kv=32)
    assert not takes(qkv, scale=-0.3)
    assert not takes(qkv, scale=0.0)
    assert not takes([x.float() for x in qkv])
    assert not takes([x[..., :20] for x in qkv]), "heads of the output would not be aligned"


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_takes_no_strides_that_the_copy_engine_cannot(which: int, device: str) -> None:
    def with_one(x: torch.Tensor) -> list[torch.Tensor]:
        qkv = inputs(device, 2, 130, 130, 2, 24)
        qkv[which] = x
        return qkv

    shape = (2, 130, 2, 24)
    memory = torch.zeros(2 * 130 * 2 * 32, dtype=torch.float16, device=device)
    assert takes(with_one(memory.as_strided(shape, (130 * 64, 64, 32, 1), 8)))
    assert not takes(with_one(memory.as_strided(shape, (130 * 64, 64, 32, 1), 4)))
    assert not takes(with_one(memory.as_strided(shape, (130 * 52, 52, 24, 1))))
    assert not takes(with_one(memory.as_strided(shape, (130 * 56, 56, 28, 1))))
    assert not takes(with_one(memory.as_strided(shape, (130 * 48 + 4, 48, 24, 1))))
    assert not takes(with_one(memory.as_strided(shape, (130 * 48, 48, 1, 2))))
    assert not takes(with_one(memory.as_strided(shape, (48, 0, 24, 1))))
    far = torch.empty_strided(shape, (48, 2**39, 24, 1), dtype=torch.float16, device="meta")
    assert not takes(with_one(far))
    near = torch.empty_strided(shape, (48, 2**38, 24, 1), dtype=torch.float16, device="meta")
    assert takes(with_one(near))


def test_specialized_warps_take_full_blocks_only(device: str) -> None:
    qkv = inputs(device, 1, 130, 130, 2, 24)
    full = random_layout(130, 130, 128, 64, partial=False).to(device)
    partial = random_layout(130, 130, 128, 64).to(device)
    key_mask = torch.ones(1, 130, dtype=torch.bool, device=device)

    def takes_it(*, layout: BlockLayout = full, mask: Any = None, **changed: Any) -> bool:
        options = {"block_q": 128, "block_kv": 64, "scale": 0.3, **changed}
        return hopper.warp_specialized_takes(*qkv, layout.tensors, mask, **options)

    assert takes_it()
    assert not takes_it(layout=partial)
    assert not takes_it(mask=key_mask)
    assert not takes_it(block_q=64)
    assert not takes_it(scale=-0.3)


def test_somebody_elses_allocator_stays_theirs() -> None:
    def theirs(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        raise AssertionError("not ours to use")

    before = _allocation._allocator.get()
    triton.set_allocator(theirs)
    try:
        during: list[Any] = []
        hopper._with_scratch(lambda: during.append(_allocation._allocator.get()))
        assert during == [hopper._allocate]
        assert _allocation._allocator.get() is theirs
    finally:
        triton.set_allocator(before)
