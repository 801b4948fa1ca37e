"""Selection of blocks in Triton, against the same selection in torch and against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from diffattn.blocks import unpack_bits
from diffattn.kernels.gather.best_blocks import MOST_BLOCKS, best_blocks, block_means
from diffattn.methods.vmoba.selection import Rule, select_blocks
from diffattn.routing.pools import best_in_pools
from diffattn.selected.key_blocks import KeyBlocks

# Rules as (together, topk, tau).
RULES = [(False, 3, None), (True, 3, None), (True, None, 0.25), (True, None, 0.9)]
rules = pytest.mark.parametrize("rule", RULES, ids=str)


def whole_numbers(seed: int, *shape: int, most: int = 3) -> torch.Tensor:
    """Small whole numbers: their products are exact in any order, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def expected(
    scores: torch.Tensor,
    own: torch.Tensor,
    ranked: torch.Tensor | None,
    rule: tuple[bool, int | None, float | None],
) -> torch.Tensor:
    """The rule in torch: bool (heads, queries, blocks) from the scores of a sample."""
    together, topk, tau = rule
    is_own = own[:, None] == torch.arange(scores.shape[-1])
    scope = "head" if together else "query"
    return best_in_pools(scores, is_own, scope=scope, ranked=ranked, topk=topk, tau=tau)


def check(
    query: torch.Tensor,
    means: torch.Tensor,
    own: torch.Tensor,
    rule: tuple[bool, int | None, float | None],
    device: str,
    *,
    counted: torch.Tensor | None = None,
    holds: torch.Tensor | None = None,
    before: int = 0,
    after: int = 0,
) -> torch.Tensor:
    """Compare with torch on the same scores, bit for bit."""
    video_blocks = means.shape[1]
    blocks = before + video_blocks + after
    args = [x if x is None else x.to(device) for x in (query, means, own, counted, holds)]
    bits = best_blocks(*args, before, blocks, *rule).cpu()
    assert bits.shape == (*query.shape[:1], query.shape[2], query.shape[1], -(-blocks // 32))
    chosen = unpack_bits(bits, bits.shape[-1] * 32)
    assert not chosen[..., blocks:].any(), "bits past the last block"
    assert chosen[..., :before].all()
    assert chosen[..., before + video_blocks : blocks].all()
    chosen = chosen[..., before : before + video_blocks]
    scores = query.float().transpose(1, 2) @ means.permute(0, 2, 3, 1)
    for sample, found in enumerate(chosen):
        ranked = None
        if counted is not None and holds is not None:
            ranked = counted[sample][:, None] & holds[sample]
        assert torch.equal(found, expected(scores[sample], own, ranked, rule))
    return chosen


@rules
@pytest.mark.parametrize(
    ("blocks", "head_dim", "dtype"),
    [(7, 16, torch.float32), (32, 40, torch.float16), (72, 24, torch.bfloat16)],
)
def test_equal_scores_are_taken_in_order(
    rule: tuple[bool, int | None, float | None],
    blocks: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    query = whole_numbers(0, 2, 71, 2, head_dim, most=1).to(dtype)
    means = whole_numbers(1, 2, blocks, 2, head_dim, most=1)
    check(query, means, torch.arange(71) % blocks, rule, device)


@rules
def test_padding_and_other_blocks(rule: tuple[bool, int | None, float | None], device: str) -> None:
    query, means = whole_numbers(2, 2, 70, 1, 16), whole_numbers(3, 2, 37, 1, 16)
    counted = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.7
    counted[:, 3:] |= torch.tensor([[True], [False]])
    holds = torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) < 0.7
    own = torch.arange(70) // 2
    check(query, means, own, rule, device, counted=counted, holds=holds, before=27, after=2)
    nothing = torch.zeros_like
    check(query, means, own, rule, device, counted=nothing(counted), holds=nothing(holds))


@pytest.mark.parametrize("rule", [(False, 1, None), (True, 1, None), (True, 40, None),
                                  (False, 40, None), (True, None, 1e-9)], ids=str)  # fmt: skip
def test_own_blocks_alone_and_all_blocks(
    rule: tuple[bool, int | None, float | None], device: str
) -> None:
    query, means = whole_numbers(4, 1, 40, 1, 16), whole_numbers(5, 1, 40, 1, 16)
    chosen = check(query, means, torch.arange(40), rule, device)
    is_all = rule[1] == 40
    assert torch.equal(chosen[0, 0], torch.ones_like(chosen[0, 0]) if is_all else torch.eye(40) > 0)


@rules
def test_equal_pools_and_numbers_that_are_none(
    rule: tuple[bool, int | None, float | None], device: str
) -> None:
    own = torch.arange(9) % 5
    check(torch.zeros(1, 9, 1, 16), torch.ones(1, 5, 1, 16), own, rule, device)
    broken = torch.ones(1, 9, 1, 16)
    broken[:, 4] = torch.nan
    args = (broken.to(device), torch.ones(1, 5, 1, 16, device=device), own.to(device), None, None)
    chosen = unpack_bits(best_blocks(*args, 0, 5, *rule).cpu(), 5)[0, 0]
    assert chosen[torch.arange(9), own].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_as_exact_as_float32(dtype: torch.dtype, device: str) -> None:
    """Blocks that lead by more than float32's rounding are selected."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 200, 1, 64, generator=generator).to(dtype)
    means = torch.randn(1, 48, 1, 64, generator=generator) * 1e-3
    own = torch.arange(200) % 48
    bits = best_blocks(
        query.to(device), means.to(device), own.to(device), None, None, 0, 48, False, 12, None
    )
    chosen = unpack_bits(bits.cpu(), 48)[0, 0]
    scores = query[0, :, 0].double() @ means[0, :, 0].double().T
    is_own = own[:, None] == torch.arange(48)
    assert torch.equal(chosen.sum(1), torch.full((200,), 12))
    lowest = scores.masked_fill(~chosen | is_own, torch.inf).amin(1)
    highest_left = scores.masked_fill(chosen, -torch.inf).amax(1)
    size = query[0, :, 0].double().abs() @ means[0, :, 0].double().abs().T
    slack = 64 * 2**-24 * size.amax(1) / math.sqrt(64)
    assert (lowest >= highest_left - slack).all()


@pytest.mark.gpu
def test_never_waits_for_the_device_and_gives_the_same_bits(device: str) -> None:
    query = torch.randn(1, 17160, 4, 128, device=device, dtype=torch.bfloat16)
    means = torch.randn(1, 72, 4, 128, device=device)
    own = torch.arange(17160, device=device) // 239
    for rule in RULES:
        first = best_blocks(query, means, own, None, None, 0, 72, *rule)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = best_blocks(query, means, own, None, None, 0, 72, *rule)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(first, again)


def test_limits_are_named(device: str) -> None:
    query, own = torch.ones(1, 4, 1, 16, device=device), torch.zeros(4, device=device).long()
    means = torch.ones(1, 300, 1, 16, device=device)
    with pytest.raises(ValueError, match=f"300 blocks, but registers for {MOST_BLOCKS}"):
        best_blocks(query, means, own, None, None, 0, 300, False, 2, None)
    with pytest.raises(ValueError, match="tau needs together=True"):
        best_blocks(query, means[:, :9], own, None, None, 0, 9, False, None, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_masked", [False, True])
def test_means_of_blocks(dtype: torch.dtype, is_masked: bool, device: str) -> None:
    key = whole_numbers(6, 2, 220, 3, 24).to(dtype)
    lengths = [5, 1, 130, 64, 13, 7]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    counted = None
    if is_masked:
        counted = torch.rand(2, 220, generator=torch.Generator().manual_seed(0)) < 0.6
        counted[1, 136:200] = False
        key[1, 136] = torch.nan
    means, holds = block_means(
        *(x if x is None else x.to(device) for x in (key, starts, counted)), 1, 4
    )
    for sample in range(2):
        for i in range(4):
            some = slice(int(starts[i + 1]), int(starts[i + 2]))
            keys = key[sample, some].double()
            keys = keys if counted is None else keys[counted[sample, some]]
            assert holds[sample, i].item() == (len(keys) > 0)
            want = keys.mean(0) if len(keys) else torch.zeros(3, 24).double()
            torch.testing.assert_close(means[sample, i].cpu().double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("text", [(0, 0), (3, 5)])
@rules
def test_the_method_selects_the_same_blocks_in_triton_and_in_torch(
    rule: tuple[bool, int | None, float | None],
    text: tuple[int, int],
    is_masked: bool,
    tile: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together, topk, tau = rule
    scope = "head" if together else "query"
    method_rule = Rule(scope, topk=topk, tau=tau, centre_keys=is_masked, tile=tile)
    # Means over powers of two are exact, also the mean of all blocks.
    blocks = KeyBlocks.of_lengths([8, 4, 4, 16], device, text_before=text[0], text_after=text[1])
    tokens = 32 + sum(text)
    query, key = whole_numbers(7, 2, tokens, 2, 16), whole_numbers(8, 2, tokens, 2, 16)
    key_mask = torch.ones(2, tokens, dtype=torch.bool)
    key_mask[1, text[0] : text[0] + 12] = not is_masked  # two whole blocks
    args = (query.to(device), key.to(device), blocks, method_rule)
    mask = key_mask.to(device) if is_masked else None
    found = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("DIFFATTN_BACKEND", backend)
        found[backend] = select_blocks(*args, key_mask=mask)
    assert torch.equal(found["triton"], found["reference"])


def test_selection_ends_tangents(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_BACKEND", "triton")
    blocks = KeyBlocks.of_lengths([8, 8, 8], device)
    query, key = (whole_numbers(i, 1, 24, 1, 16).to(device) for i in (9, 10))
    rule = Rule("query", topk=2)

    def bits(query: torch.Tensor) -> torch.Tensor:
        return query.sum() + select_blocks(query, key, blocks, rule).sum()

    _, tangent = torch.func.jvp(bits, (query,), (torch.ones_like(query),))
    assert tangent.item() == query.numel()
