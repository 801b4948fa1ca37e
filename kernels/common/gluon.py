"""Shared by kernels in Gluon: rings of tiles that a warp fills, and steps of the groups that read.

Importing the module fails where Triton lacks the parts of Gluon that the module names: see
`variants.has_gluon`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton renamed these three functions after 3.6.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
write = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

GROUPS = gl.constexpr(2)  # of four warps that multiply
ROWS = gl.constexpr(64)  # queries of a group: the rows of one matrix product on Hopper


@gluon.jit
def make_rings(keys, values, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Rings of tiles of keys and of values, and the barriers of both: tiles are full, or empty."""
    k_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, 1, BLOCK_N, 1, D], keys.layout)
    v_tiles = gl.allocate_shared_memory(values.dtype, [STAGES, 1, BLOCK_N, 1, D], values.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    return k_tiles, v_tiles, k_full, k_empty, v_full, v_empty


@gluon.jit
def make_sums():
    """Room for a number of each row of each group."""
    return gl.allocate_shared_memory(
        gl.float32, [GROUPS, ROWS],
        gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]),
    )  # fmt: skip


@gluon.jit
def fetch_keys_and_values(keys, values, rings, i, i_b, i_h, start_n, STAGES: gl.constexpr):
    """Fetch tile `i` into both rings as soon as both groups have read what its place held."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    s = i % STAGES
    phase = (i // STAGES) & 1
    mbarrier.wait(k_empty.index(s), phase ^ 1)
    mbarrier.expect(k_full.index(s), keys.block_type.nbytes)
    fetch(keys, [i_b, start_n, i_h, 0], k_full.index(s), k_tiles.index(s))
    mbarrier.wait(v_empty.index(s), phase ^ 1)
    mbarrier.expect(v_full.index(s), values.block_type.nbytes)
    fetch(values, [i_b, start_n, i_h, 0], v_full.index(s), v_tiles.index(s))


@gluon.jit
def softmax_step(b_s, b_max, b_sum, scale, MASKED: gl.constexpr):
    """One step of the online softmax in powers of 2; hidden scores are -inf. `scale` > 0."""
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale)
    b_base = b_new
    if MASKED:  # a query that has seen nothing yet has a maximum of -inf, and -inf - -inf is NaN
        b_base = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * scale - b_base[:, None])
    b_old = gl.exp2(b_max - b_base)
    return b_p, b_new, b_sum * b_old + gl.sum(b_p, 1), b_old
