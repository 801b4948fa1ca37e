"""Whatever benchmarks/gpu.py compares: dense attention, this package, and other sparse kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_layouts import ALIGNED, Mask
from gpu_shapes import FORWARD, Shape
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffattn

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
OURS = "diffattn"
VARIANTS = ("plain", "tma", "tma_ws")


class UnavailableError(Exception):
    """A candidate cannot be measured here, or not on this mask; says why."""


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class Candidate:
    """One attention over one mask, ready to be called.

    Attributes:
        name: whose it is.
        mask: None for dense attention.
        attend: takes q, k, v as `arrange` leaves them.
        arrange: from `(batch, tokens, heads, head_dim)` to what the kernel wants; not timed.
        restore: the same for its output, back.
        backward: whether it has gradients.
        raster: whether it wants the tokens in the model's order instead of the tile order.
        context: what a call and its backward pass run under.
    """

    name: str
    mask: Mask | None
    attend: Attend
    arrange: Callable[[torch.Tensor], torch.Tensor] = _unchanged
    restore: Callable[[torch.Tensor], torch.Tensor] = _unchanged
    backward: bool = True
    raster: bool = False
    context: Callable[[], AbstractContextManager[object]] = nullcontext


Maker = Callable[[Shape, Mask, torch.dtype], Candidate]


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """A view, `(batch, tokens, heads, d)` to `(batch, heads, tokens, d)` or the way back."""
    return x.transpose(1, 2)


def dense(name: str) -> Candidate:
    """torch's dense attention by one of its backends and no other."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([DENSE[name]]):
            return F.scaled_dot_product_attention(q, k, v)

    return Candidate(name, None, attend, arrange=heads_first, restore=heads_first)


def public(shape: Shape, mask: Mask, dtype: torch.dtype) -> Candidate:
    """This package, through the function that users call."""
    return Candidate(OURS, mask, partial(diffattn.attention, mask=mask.layout))


def raw(shape: Shape, mask: Mask, dtype: torch.dtype) -> Candidate:
    """This package's operator without the function around it."""
    if mask.layout.device.type == "cpu":
        from diffattn.kernels.cpu import block_sparse_attention
    else:
        from diffattn.kernels.block_sparse import block_sparse_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layout = mask.layout
        return block_sparse_attention(
            q, k, v, *layout.tensors, block_q=layout.block_q, block_kv=layout.block_kv
        )[0]

    return Candidate("raw operator", mask, attend)


def forward_kernel(
    name: str, shape: Shape, mask: Mask, dtype: torch.dtype, **more: object
) -> Candidate:
    """One variant of the forward kernel, without falling back to another.

    Args:
        more: options of the kernel.
    """
    from diffattn.kernels.block_sparse import forward, hopper, variants

    run = {
        "plain": forward.forward,
        "tma": hopper.forward_tma,
        "tma_ws": hopper.forward_warp_specialized,
    }[name]
    layout = mask.layout
    options = {
        "block_q": layout.block_q,
        "block_kv": layout.block_kv,
        "scale": shape.head_dim**-0.5,
    }
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    q = torch.empty(size, device=layout.device, dtype=dtype)
    with mock.patch.dict(os.environ, {variants.VARIANT_VARIABLE: name}):
        takes = ["plain", *variants.variants_of(q, q, q, layout.tensors, None, **options)]
    if name not in takes:
        raise UnavailableError(f"{name} does not take {mask.kind} layouts of this shape and dtype")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return run(q, k, v, layout.tensors, None, **options, **more)[0]

    return Candidate(f"{OURS} {name}", mask, attend, backward=False)


def chosen_variant(q: torch.Tensor, mask: Mask) -> str:
    """The variant that a call takes by itself, unless it turns out not to compile."""
    from diffattn.kernels.block_sparse import variants

    layout = mask.layout
    names = variants.variants_of(
        q, q, q, layout.tensors, None,
        block_q=layout.block_q, block_kv=layout.block_kv, scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    return next(names, "plain")


def tiles(direction: str) -> list[Maker]:
    """The kernels with other tile sizes than those in their table."""
    from diffattn.kernels.block_sparse.configs import TileConfig
    from diffattn.kernels.block_sparse.launch import Problem

    def with_config(name: str, config: TileConfig) -> Maker:
        def make(shape: Shape, mask: Mask, dtype: torch.dtype) -> Candidate:
            candidate = forward_kernel(name, shape, mask, dtype, config=config)
            return replace(candidate, name=f"{candidate.name} {_sizes(config)}")

        return make

    shipped = Problem.tiles

    def in_backward(kernel: str, config: TileConfig) -> Maker:
        def chosen(problem: Problem, name: str) -> TileConfig:
            return config if name == kernel else shipped(problem, name)

        def make(shape: Shape, mask: Mask, dtype: torch.dtype) -> Candidate:
            label = f"{OURS} {kernel} {_sizes(config)}"
            context = partial(mock.patch.object, Problem, "tiles", chosen)
            return replace(raw(shape, mask, dtype), name=label, context=context)

        return make

    def configs(
        ms: tuple[int, ...], ns: tuple[int, ...], warps: tuple[int, ...]
    ) -> list[TileConfig]:
        return [TileConfig(m, n, w, s) for m in ms for n in ns for w in warps for s in (2, 3)]

    if direction == FORWARD:
        return [
            with_config(name, c)
            for name, ms, ns, warps in (
                ("plain", (64, 128), (64, 128), (4, 8)),
                ("tma", (128,), (64, 128), (8,)),
                ("tma_ws", (128,), (64, 128), (4,)),
            )
            for c in configs(ms, ns, warps)
        ]
    return [
        in_backward(kernel, c)
        for kernel, ms, ns in (
            ("queries", (64, 128), (32, 64)),
            ("keys", (32, 64), (64, 128)),
        )
        for c in configs(ms, ns, (4, 8))
    ]


def _sizes(config: object) -> str:
    return "{block_m}x{block_n} w{num_warps} s{num_stages}".format(**vars(config))


def flex(shape: Shape, mask: Mask, dtype: torch.dtype) -> Candidate:
    """torch's FlexAttention, compiled, under the same mask."""
    if mask.layout.device.type == "cpu":
        raise UnavailableError("flex_attention is compared on GPUs only")
    return flex_candidate(mask, _compiled_flex())


def flex_candidate(mask: Mask, attention: Callable[..., torch.Tensor]) -> Candidate:
    from diffattn.block_forms import to_block_mask

    block_mask = to_block_mask(mask.layout)
    return Candidate(
        "flex", mask, partial(attention, block_mask=block_mask),
        arrange=heads_first, restore=heads_first,
    )  # fmt: skip


def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation serves all masks of a shape from the second on: what differs is the length of
    # tables. In one graph or not at all: eager flex_attention would work out every token pair.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, fullgraph=True)


def flashinfer(shape: Shape, mask: Mask, dtype: torch.dtype) -> Candidate:
    """FlashInfer's block-sparse attention; planned outside of what is timed."""
    import flashinfer as package

    from diffattn.block_forms import to_flashinfer, to_flashinfer_variable

    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=mask.layout.device)
    heads = (shape.heads, shape.heads, shape.head_dim)
    dtypes = {"q_data_type": dtype, "kv_data_type": dtype}
    if mask.layout.partial_blocks:
        wrapper = package.BlockSparseAttentionWrapper(workspace)
        blocks = vars(to_flashinfer(mask.layout))
        wrapper.plan(
            *(blocks[name] for name in ("indptr", "indices", "M", "N", "R", "C")), *heads,
            mask=blocks["mask"], **dtypes,
        )  # fmt: skip
        return Candidate(
            "flashinfer", mask, wrapper.run, backward=False,
            arrange=lambda x: x[0], restore=lambda x: x[None],
        )  # fmt: skip
    wrapper = package.VariableBlockSparseAttentionWrapper(workspace)
    variable = to_flashinfer_variable(mask.layout, heads=shape.heads)
    wrapper.plan(*vars(variable).values(), *heads, **dtypes)
    return Candidate(
        "flashinfer", mask, wrapper.run, backward=False,
        arrange=lambda x: x[0].transpose(0, 1).contiguous(),
        restore=lambda x: x.transpose(0, 1)[None],
    )  # fmt: skip


def fastvideo(shape: Shape, mask: Mask, dtype: torch.dtype) -> Candidate:
    """FastVideo's VSA kernel: full blocks of 64 x 64, so a block of ours is four of its own."""
    from fastvideo_kernel.block_sparse_attn import block_sparse_attn

    if mask.layout.partial_blocks:
        raise UnavailableError("it computes whole blocks only")
    tokens, device = shape.tokens, mask.layout.device
    start = torch.arange(0, tokens, 64, device=device)
    # Whole blocks: what holds for their first tokens holds for all.
    block_map = mask.rule(start[:, None], start[None]).expand(1, shape.heads, -1, -1).contiguous()
    sizes = (tokens - start).clamp(max=64).to(torch.int32)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return block_sparse_attn(q, k, v, block_map, sizes)[0]

    padding = (0, 0, 0, -tokens % 64)
    return Candidate(
        "fastvideo", mask, attend,
        arrange=lambda x: F.pad(heads_first(x), padding).contiguous(),
        restore=lambda x: heads_first(x[:, :, :tokens]),
    )  # fmt: skip


def natten(shape: Shape, mask: Mask, dtype: torch.dtype) -> Candidate:
    """NATTEN's neighbourhood attention with the same window; it orders the tokens by itself."""
    import natten as package

    grid = shape.grid
    if mask.window is None:
        raise UnavailableError("its windows are over single tokens")
    if grid.tokens != grid.video_tokens:
        raise UnavailableError("its windows have no place for text tokens")
    sizes: tuple[int, ...] = (grid.frames, grid.height, grid.width)
    window: tuple[int, ...] = mask.window
    attention = package.na3d
    if grid.frames == 1:
        sizes, window, attention = sizes[1:], window[1:], package.na2d
    return Candidate(
        "natten", mask, partial(attention, kernel_size=window),
        arrange=lambda x: x.unflatten(1, sizes), restore=lambda x: x.flatten(1, len(sizes)),
        raster=True,
    )  # fmt: skip


OTHERS: dict[str, Maker] = {
    "flex": flex,
    "flashinfer": flashinfer,
    "fastvideo": fastvideo,
    "natten": natten,
}


def makers(direction: str, variants: list[str], sweep: bool) -> Iterator[tuple[str, Maker]]:
    """Names and makers of the sparse candidates, the most important first."""
    yield OURS, public
    if direction == FORWARD:
        for name in variants:
            yield f"{OURS} {name}", partial(forward_kernel, name)
    if sweep:
        for number, maker in enumerate(tiles(direction)):
            yield f"tiles {number}", maker
        return  # what others take does not depend on our tiles
    yield from OTHERS.items()


def masks_of(masks: list[Mask]) -> list[Mask]:
    """Masks to measure: at a density of 1 both kinds are the same one."""
    return [mask for mask in masks if mask.kind == ALIGNED or mask.asked < 1]
