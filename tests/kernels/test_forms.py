"""Every form of the block-sparse kernels: as right as the plain one, given only what it takes."""

from __future__ import annotations

import pytest
import torch
from forms import Forms, attend_by, forms
from oracles import assert_matches_eager, random_layout, stack_layouts

from diffattn.blocks import EMPTY, FULL, PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.block_sparse.backward import key_gradients, query_gradients
from diffattn.kernels.block_sparse.configs import fitted
from diffattn.kernels.block_sparse.forward_pass import forward
from diffattn.kernels.block_sparse.launch import Problem
from diffattn.kernels.common.row_sums import row_sums
from diffattn.kernels.common.tile_tables import Choice, TileConfig

# Tiles of several shapes, so that blocks are cut in both directions and partial ones otherwise than
# full ones.
FORMS = {
    "plain-ahead": forms("plain", ahead=True, partial=64),
    "tma": forms("tma", block_m=32, block_n=64),
    "tma-ahead": forms("tma", ahead=True, partial=64),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def on_hopper_or_interpreted(device: str) -> None:
    if device != "cpu" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")


def inputs(
    device: str, batch: int, tokens_q: int, tokens_kv: int, heads: int, head_dim: int,
    dtype: torch.dtype = torch.float16,
) -> list[torch.Tensor]:  # fmt: skip
    return [
        torch.randn(batch, tokens, heads, head_dim).to(device, dtype).requires_grad_()
        for tokens in (tokens_q, tokens_kv, tokens_kv)
    ]


def check(
    form: Forms, qkv: list[torch.Tensor], layout: BlockLayout, key_mask: torch.Tensor | None = None,
    *, scale: float = 0.3,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    layout = layout.to(qkv[0].device)
    options = {"block_q": layout.block_q, "block_kv": layout.block_kv, "scale": scale}
    out, lse = attend_by(form, *qkv, layout.tensors, key_mask, **options)
    assert_matches_eager(
        out, lse, *qkv, layout.dense(), scale=scale, key_mask=key_mask, backward=True
    )
    return out, lse


@every_form
@pytest.mark.parametrize(
    ("batch", "tokens_q", "tokens_kv", "head_dim", "dtype"),
    [
        pytest.param(1, 131, 197, 16, torch.bfloat16, id="prime"),
        pytest.param(3, 65, 65, 24, torch.float16, id="one-over"),
        pytest.param(1, 1, 130, 64, torch.bfloat16, id="one-query"),
        pytest.param(1, 65, 1, 40, torch.float16, id="text-of-length-1"),
        pytest.param(1, 128, 128, 56, torch.bfloat16, id="whole-blocks"),
    ],
)
def test_full_and_partial_blocks(
    form: Forms, batch: int, tokens_q: int, tokens_kv: int, head_dim: int, dtype: torch.dtype,
    device: str,
) -> None:  # fmt: skip
    qkv = inputs(device, batch, tokens_q, tokens_kv, 2 if batch == 1 else 1, head_dim, dtype)
    check(form, qkv, random_layout(tokens_q, tokens_kv, 64, 64))


@every_form
def test_blocks_of_two_sizes(form: Forms, device: str) -> None:
    check(form, inputs(device, 1, 300, 140, 1, 16), random_layout(300, 140, 256, 128))


@every_form
@pytest.mark.parametrize(
    "states",
    [
        pytest.param([[FULL] * 3] * 3, id="full"),
        pytest.param([[PARTIAL] * 3] * 3, id="partial"),
        pytest.param([[FULL, EMPTY, PARTIAL], [EMPTY] * 3, [PARTIAL, EMPTY, FULL]], id="mixed"),
        pytest.param([[EMPTY] * 3] * 3, id="empty"),
        pytest.param([[EMPTY, EMPTY, FULL]] * 3, id="short-column"),
    ],
)
def test_kinds_of_blocks(form: Forms, states: list[list[int]], device: str) -> None:
    def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return torch.rand(row.numel(), 64, 64) < 0.5

    layout = layout_from_states(
        torch.tensor(states, dtype=torch.uint8), bits,
        tokens_q=150, tokens_kv=161, block_q=64, block_kv=64,
    )  # fmt: skip
    check(form, inputs(device, 1, 150, 161, 1, 16), layout)


@every_form
def test_bits_past_the_end_of_the_sequence_hide_nothing_that_is_there(
    form: Forms, device: str
) -> None:
    """A bit mask that comes from elsewhere may have any bits where there are no keys."""
    states = torch.full((2, 2), PARTIAL, dtype=torch.uint8)
    layout = layout_from_states(
        states, lambda row, column: torch.rand(row.numel(), 64, 64) < 0.5,
        tokens_q=70, tokens_kv=75, block_q=64, block_kv=64,
    ).to(device)  # fmt: skip
    qkv = inputs(device, 1, 70, 75, 2, 16)
    options = {"block_q": 64, "block_kv": 64, "scale": 0.3}
    *lists, words = layout.tensors
    dirty = words.clone()
    last = lists[4][lists[3] == 1].unique().long()
    past = torch.tensor([-(1 << 11), -1], dtype=torch.int32, device=device)  # keys 75 .. 127
    dirty[last] |= past
    assert not torch.equal(dirty, words)
    out, lse = attend_by(form, *qkv, (*lists, dirty), **options)
    assert_matches_eager(out, lse, *qkv, layout.dense(), scale=0.3, backward=True)


@every_form
def test_full_blocks_in_any_order(form: Forms, device: str) -> None:
    states = torch.full((2, 3), FULL, dtype=torch.uint8)
    layout = layout_from_states(
        states, None, tokens_q=70, tokens_kv=140, block_q=64, block_kv=64
    ).to(device)
    qkv = inputs(device, 1, 70, 140, 2, 16)
    full_count, full_index, *rest = layout.tensors
    out, lse = attend_by(
        form, *qkv, (full_count, full_index.flip(-1).contiguous(), *rest),
        block_q=64, block_kv=64, scale=0.3,
    )  # fmt: skip
    assert_matches_eager(out, lse, *qkv, layout.dense(), scale=0.3, backward=True)


@every_form
def test_key_mask_over_nan(form: Forms, device: str) -> None:
    qkv = inputs(device, 2, 70, 135, 1, 24)
    key_mask = torch.rand(2, 135, device=device) < 0.7
    layout = random_layout(70, 135, 64, 64).to(device)
    check(form, qkv, layout, key_mask)
    weights = torch.randn_like(qkv[0])

    def results(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (qkv[0], k, v)]
        out, lse = attend_by(
            form, *leaves, layout.tensors, key_mask, block_q=64, block_kv=64, scale=0.3
        )
        return (out, lse, *torch.autograd.grad((out * weights).sum(), leaves))

    expected = results(*qkv[1:])
    holes = [x.detach().clone() for x in qkv[1:]]
    for x in holes:
        x[~key_mask] = torch.nan
    for a, b in zip(results(*holes), expected, strict=True):
        assert torch.equal(a, b)


@every_form
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(form: Forms, scale: float, device: str) -> None:
    check(form, inputs(device, 1, 130, 130, 1, 16), random_layout(130, 130, 64, 64), scale=scale)


@every_form
def test_rows_that_see_nothing(form: Forms, device: str) -> None:
    states = torch.tensor([[EMPTY, EMPTY], [EMPTY, FULL], [FULL, EMPTY]], dtype=torch.uint8)
    layout = layout_from_states(states, None, tokens_q=260, tokens_kv=70, block_q=128, block_kv=64)
    out, lse = check(form, inputs(device, 1, 260, 70, 2, 16), layout)
    assert (out[:, :128] == 0).all()
    assert (lse[..., :128] == -torch.inf).all()
    assert (lse[..., 128:] > -torch.inf).all()


@every_form
def test_layouts_per_sample_and_per_head(form: Forms, device: str) -> None:
    layouts = [random_layout(130, 130, 128, 64) for _ in range(4)]
    qkv = inputs(device, 2, 130, 130, 2, 16)
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, (2, 2)).to(device)
    stacked = tuple(x.to(device) for x in stack_layouts(layouts, 2, 2))
    out, lse = attend_by(form, *qkv, stacked, block_q=128, block_kv=64, scale=0.3)
    assert_matches_eager(out, lse, *qkv, mask, scale=0.3, backward=True)


@every_form
def test_strides_of_models(form: Forms, device: str) -> None:
    layout = random_layout(70, 70, 128, 64)
    fused = torch.randn(2, 70, 3 * 2 * 24, dtype=torch.float16, device=device)
    slices = [x.unflatten(-1, (2, 24)) for x in fused.chunk(3, -1)]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in slices]
    for qkv in (slices, heads_first):
        assert not any(x.is_contiguous() for x in qkv)
        assert takes(*qkv)
        check(form, [x.requires_grad_() for x in qkv], layout)


@every_form
def test_a_gradient_that_is_one_number_everywhere(form: Forms, device: str) -> None:
    """`out.sum()` gives a gradient without memory of its own: the copy engine cannot fetch it."""
    qkv = inputs(device, 1, 70, 70, 1, 16)
    grad = torch.ones((), dtype=torch.float16, device=device).expand(1, 70, 1, 16)
    layout = random_layout(70, 70, 64, 64).to(device).tensors
    options = {"block_q": 64, "block_kv": 64, "scale": 0.3}
    out, lse = forward(*qkv, layout, None, **options, choice=form.forward)
    sums = row_sums(out, grad, lse, None, block_q=64, wide=False)
    call = (*qkv, grad, sums, layout, None)
    query_gradients(*call, **options, choice=form.queries)
    if form.keys.variant == "plain":
        key_gradients(*call, **options, choice=form.keys)
    else:
        message = rf"^the '{form.keys.variant}' variant of 'keys' does not take this call$"
        with pytest.raises(ValueError, match=message):
            key_gradients(*call, **options, choice=form.keys)


def takes(*tensors: torch.Tensor, block_q: int = 128, block_kv: int = 64) -> bool:
    q = tensors[0]
    layout = random_layout(130, 130, block_q, block_kv).tensors
    return Problem.of(q, q, q, layout, None, block_q, block_kv, 0.3).tma_takes(*tensors)


def test_tma_takes_what_the_copy_engine_can_fetch(device: str) -> None:
    qkv = inputs(device, 2, 130, 130, 2, 24)
    assert takes(*qkv)
    assert takes(*qkv, block_q=64)
    assert not takes(*qkv, block_q=32)
    assert not takes(*qkv, block_kv=32)
    assert not takes(*(x.float() for x in qkv))


def test_tma_takes_no_strides_that_the_copy_engine_cannot(device: str) -> None:
    shape = (2, 130, 2, 24)
    memory = torch.zeros(2 * 130 * 2 * 32, dtype=torch.float16, device=device)
    assert takes(memory.as_strided(shape, (130 * 64, 64, 32, 1), 8))
    assert not takes(memory.as_strided(shape, (130 * 64, 64, 32, 1), 4)), "address"
    assert not takes(memory.as_strided(shape, (130 * 52, 52, 24, 1))), "tokens"
    assert not takes(memory.as_strided(shape, (130 * 56, 56, 28, 1))), "heads"
    assert not takes(memory.as_strided(shape, (130 * 48 + 4, 48, 24, 1))), "samples"
    assert not takes(memory.as_strided(shape, (130 * 48, 48, 1, 2))), "channels"
    assert not takes(memory.as_strided(shape, (130 * 48, 48, 0, 1))), "expanded heads"
    assert not takes(memory.as_strided(shape, (0, 48, 24, 1))), "expanded samples"
    one = (1, 130, 1, 24)
    assert takes(memory.as_strided(one, (1, 48, 3, 1))), "nothing to step over"
    far = torch.empty_strided(shape, (48, 2**39, 24, 1), dtype=torch.float16, device="meta")
    assert not takes(far)
    near = torch.empty_strided(shape, (48, 2**38, 24, 1), dtype=torch.float16, device="meta")
    assert takes(near)


@pytest.mark.parametrize("variant", ["plain", "tma"])
def test_strides_that_mean_nothing(variant: str, device: str) -> None:
    """A dimension of size 1 may have any stride, 0 and odd ones too."""
    memory = torch.randn(130 * 16 + 8, device=device).half()
    qkv = [memory.as_strided((1, 130, 1, 16), (1, 16, 0, 1)).requires_grad_() for _ in range(3)]
    check(forms(variant), qkv, random_layout(130, 130, 64, 64))


@pytest.mark.parametrize(
    ("kernel", "block_q", "block_kv", "expected"),
    [
        ("forward", 128, 128, (128, 64, 8, 64)),
        ("forward", 64, 128, (64, 64, 4, 64)),
        ("forward", 64, 32, (64, 32, 4, 32)),
        ("keys", 64, 128, (64, 64, 8, 64)),
        ("keys", 128, 32, (128, 32, 4, 64)),
        ("keys", 32, 128, (32, 64, 8, 32)),
    ],
)
def test_tiles_are_fitted_to_blocks(
    kernel: str, block_q: int, block_kv: int, expected: tuple[int, ...]
) -> None:
    config = fitted(kernel, TileConfig(128, 64, 8, 2, partial=64), block_q, block_kv)
    assert (config.block_m, config.block_n, config.num_warps, config.partial) == expected


def test_short_tiles_of_gluon_have_more_stages(device: str) -> None:
    q = torch.zeros(1, 256, 1, 128, device=device)
    for block_kv, expected in ((128, (128, 2)), (64, (64, 4)), (256, (128, 2))):
        layout = random_layout(256, 256, 128, block_kv).to(device).tensors
        problem = Problem.of(q, q, q, layout, None, 128, block_kv, 0.3)
        tiles = problem.tiles("forward", "gluon", TileConfig(128, 128, 4, 2))
        assert (tiles.block_n, tiles.num_stages) == expected


def test_a_choice_that_does_not_take_the_call_is_an_error(device: str) -> None:
    qkv = [x.detach().float() for x in inputs(device, 1, 70, 70, 1, 16)]
    layout = random_layout(70, 70, 64, 64).to(device)
    with pytest.raises(ValueError, match=r"^the 'tma' variant of 'forward' does not take"):
        forward(
            *qkv, layout.tensors, None, block_q=64, block_kv=64, scale=0.3,
            choice=Choice("tma", TileConfig(32, 32, 4, 2)),
        )  # fmt: skip
