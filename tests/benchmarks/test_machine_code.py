"""benchmarks/machine_code on listings written by hand: loops, products, the model, limits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
from machine_code.command import main
from machine_code.limits import SPILLED_IN_LOOP, problems, verdicts
from machine_code.model import (
    CHIPS,
    Estimate,
    estimate,
    ideal_cycles,
    product_cycles,
    programs_per_multiprocessor,
)
from machine_code.products import Product, hot_loops, product_of, products_of, shapes
from machine_code.rows import KernelRow, LoopRow, spilled_words
from machine_code.sass import Instruction, loops
from machine_code.table import as_json, lines, markdown

WGMMA_QK = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88"
WGMMA_PV = "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12].tnspB, R24"
LAST = ", gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP = "MUFU.EX2 R5, R5"


def listing(texts: Iterable[str]) -> list[Instruction]:
    """Instructions 16 bytes apart: "@P0 BRA 0x10"."""
    found = []
    for i, text in enumerate(texts):
        predicate = ""
        if text.startswith("@"):
            predicate, text = text[1:].split(" ", 1)
        opcode, _, operands = text.partition(" ")
        found.append(Instruction(16 * i, predicate, opcode, operands))
    return found


def in_loop(body: Iterable[str]) -> list[Instruction]:
    return listing(["MOV R1, R2", *body, "@P0 BRA 0x10", "EXIT"])


def test_a_branch_backwards_closes_a_loop() -> None:
    (loop,) = loops(in_loop(["FADD R1, R1, R2", "FADD R1, R1, R3"]))
    assert [x.kind for x in loop] == ["FADD", "FADD", "BRA"]


def test_the_retry_of_a_wait_at_the_end_of_the_code_is_no_loop_over_what_follows_the_wait() -> None:
    kernel = listing([
        "MOV R1, R2",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R3",  # 0x10
        "@!P1 BRA 0x70",
        WGMMA_QK + LAST,  # 0x30: where the retry comes back to
        WAIT,
        "@P0 BRA 0x10",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R3",  # 0x70
        "@!P1 BRA 0x70",
        "BRA 0x30",
    ])  # fmt: skip
    assert [(x[0].address, x[-1].address) for x in loops(kernel)] == [(0x10, 0x50), (0x70, 0x80)]
    assert [(x[0].address, x[-1].address) for x in hot_loops(kernel)] == [(0x10, 0x50)]


def test_code_that_an_indirect_branch_leads_to_has_no_other_loops() -> None:
    """Warps that are specialized start at places out of a table."""
    kernel = listing([
        "BRX R2 -0x10",
        "EXIT",  # 0x10: the table leads here
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R3",  # 0x20: and here
        "@!P1 BRA 0x80",
        WGMMA_QK + LAST,  # 0x40: where the retry comes back to
        WAIT,
        "@P0 BRA 0x20",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R3",  # 0x80
        "@!P1 BRA 0x80",
        "BRA 0x40",
    ])  # fmt: skip
    assert [(x[0].address, x[-1].address) for x in loops(kernel)] == [(0x20, 0x60), (0x80, 0x90)]
    assert [(x[0].address, x[-1].address) for x in hot_loops(kernel)] == [(0x20, 0x60)]


def test_an_indirect_branch_goes_nowhere_that_is_known() -> None:
    """It prints an offset, which is no address in the kernel."""
    indirect, direct = listing(["BRX R2 -0x10", "@P0 BRA 0x10"])
    assert indirect.target is None
    assert direct.target == 0x10


def test_only_the_innermost_loop_with_products_is_hot() -> None:
    kernel = listing([
        "MOV R1, R2",
        "FADD R1, R1, R2",  # 0x10: the outer loop
        WGMMA_QK + LAST,  # 0x20: the inner one
        WAIT,
        "@P1 BRA 0x20",
        "FADD R1, R1, R2",  # 0x50: another inner one, without products
        "@P2 BRA 0x50",
        "@P0 BRA 0x10",
        "EXIT",
    ])  # fmt: skip
    assert len(loops(kernel)) == 3
    assert [(x[0].address, x[-1].address) for x in hot_loops(kernel)] == [(0x20, 0x40)]


def test_products_outside_of_loops_are_those_of_the_whole_kernel() -> None:
    kernel = listing(["MOV R1, R2", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "EXIT"])
    assert hot_loops(kernel) == [tuple(kernel)]


def test_without_matrix_products_the_loops_that_multiply_are_hot() -> None:
    assert len(hot_loops(in_loop(["FFMA R1, R2, R3, R1"] * 64))) == 1
    assert not hot_loops(in_loop(["FFMA R1, R2, R3, R1"] * 8))


@pytest.mark.parametrize(
    ("text", "product", "macs_of_8_warps"),
    [
        (WGMMA_QK, Product("HGMMA", 64, 64, 16, False), 2 * 64 * 64 * 16),
        (WGMMA_PV, Product("HGMMA", 64, 128, 16, True), 2 * 64 * 128 * 16),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", Product("HMMA", 16, 8, 16, True), 8 * 2048),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", Product("HMMA", 16, 8, 8, True), 8 * 1024),
    ],
)
def test_the_shape_of_a_product(text: str, product: Product, macs_of_8_warps: int) -> None:
    found = product_of(*listing([text]))
    assert found == product
    assert found.macs(8) == macs_of_8_warps


def test_the_shape_of_tcgen05_is_what_its_register_was_last_set_to() -> None:
    kernel = listing([
        "UMOV UR29, 0x8210490",
        "UMOV UR29, 0x8100490",
        "UMOV UR2, 0x8200490",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR11], tmem[UR28], idesc[UR29], UPT",
        "EXIT",
    ])  # fmt: skip
    (product,) = products_of(tuple(kernel), kernel)
    assert product == Product("UTCHMMA", 128, 64, 16, False)
    assert product.macs(8) == product.macs(4) == 128 * 64 * 16
    assert shapes([product, product]) == "2 m128n64SS"


def test_tf32_is_8_deep_and_takes_twice_as_long() -> None:
    """The inputs' format is 2 from bit 7 on."""
    kernel = listing([
        "UMOV UR29, 0x8100910",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR11], tmem[UR28], idesc[UR29], UPT",
    ])  # fmt: skip
    (product,) = products_of(tuple(kernel), kernel)
    assert product == Product("UTCHMMA", 128, 64, 8, False)
    macs = 128 * 64 * 8
    found = estimate(tuple(kernel), [product], macs, CHIPS[100], warps=4, copies=1)
    assert found.cycles == 2 * macs / 4096
    assert found.share == 1


def test_a_tcgen05_product_of_unknown_shape_is_an_error() -> None:
    kernel = listing([
        "UMOV UR29, UR5",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR11], tmem[UR28], idesc[UR29], UPT",
    ])  # fmt: skip
    with pytest.raises(ValueError, match="is not set to a constant"):
        products_of(tuple(kernel), kernel)


def test_spilled_words_are_those_of_local_memory() -> None:
    kernel = listing(["STL [R1], R2", "LDL.64 R2, [R1]", "STL.128 [R1], R4", "STS [R1], R2"])
    assert spilled_words(kernel) == 1 + 2 + 4


def test_cycles_of_wgmma_are_limited_by_reading_short_operands() -> None:
    """128 bytes a cycle of shared memory: 64 x 16 of the first operand take 16 cycles of it."""
    assert product_cycles(Product("HGMMA", 64, 128, 16, True)) == 64
    assert product_cycles(Product("HGMMA", 64, 64, 16, False)) == 32
    assert product_cycles(Product("HGMMA", 64, 32, 16, False)) == 24
    assert product_cycles(Product("HGMMA", 64, 16, 16, False)) == 20


def test_programs_of_a_multiprocessor() -> None:
    hopper = CHIPS[90]
    assert programs_per_multiprocessor(hopper, registers=128, warps=8, shared=0) == 2
    assert programs_per_multiprocessor(hopper, registers=129, warps=8, shared=0) == 1
    assert programs_per_multiprocessor(hopper, registers=64, warps=4, shared=100 * 1024) == 2
    assert programs_per_multiprocessor(hopper, registers=32, warps=32, shared=0) == 2
    assert programs_per_multiprocessor(hopper, registers=255, warps=8, shared=228 * 1024) == 0


def estimated(body: list[str], *, copies: int = 1, macs: int = 64 * 64 * 16) -> Estimate:
    kernel = in_loop(body)
    (loop,) = hot_loops(kernel)
    products = products_of(loop, kernel)
    return estimate(loop, products, macs, CHIPS[90], warps=4, copies=copies)


def test_what_stands_between_a_product_and_its_wait_is_hidden() -> None:
    """32 cycles of product and 60 of waiting; an exp is 8 cycles of a quarter."""
    after = estimated([WGMMA_QK + LAST, WAIT, *[EXP] * 4])
    beside = estimated([WGMMA_QK + LAST, *[EXP] * 4, WAIT])
    assert (after.cycles, beside.cycles) == (60 + 32 + 4 * 8, 60 + 32 + 1)
    assert after.exposed is not None
    assert beside.exposed is not None
    assert (after.exposed["MUFU"], beside.exposed["MUFU"]) == (4, 0)
    assert beside.share == pytest.approx(32 / 93)


def test_more_than_a_product_can_hide_takes_its_own_time() -> None:
    assert estimated([WGMMA_QK + LAST, *[EXP] * 10, WAIT]).cycles == 60 + 10 * 8 + 1


def test_a_wait_for_all_but_one_leaves_the_last_product_running() -> None:
    """Of two products the first is waited for, 64 cycles; the second runs beside the exps."""
    wait_for_all_but_one = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    body = [WGMMA_PV + LAST, WGMMA_QK + LAST, wait_for_all_but_one, *[EXP] * 4, WAIT]
    found = estimated(body)
    assert found.exposed is not None
    assert found.exposed["MUFU"] == 0
    assert found.cycles == (64 + 60) + (32 + 60) + 1


def test_two_programs_fill_the_time_that_one_leaves_idle() -> None:
    """Alone 124 cycles for 32 useful ones: two take at best 124, without overlap 248."""
    body = [WGMMA_QK + LAST, WAIT, *[EXP] * 4]
    assert estimated(body).share == pytest.approx(32 / 124)
    assert estimated(body, copies=2).share == pytest.approx(32 / ((124 + 248) / 2 / 2))


def test_mma_sync_has_an_upper_bound_only() -> None:
    """128 products of 8 warps: 256 cycles each of 8 multiplications per quarter, on an A100."""
    kernel = in_loop(["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 128 + [EXP] * 16)
    (loop,) = hot_loops(kernel)
    products = products_of(loop, kernel)
    macs = 128 * 2048 * 8
    found = estimate(loop, products, macs, CHIPS[80], warps=8, copies=1)
    assert found.exposed is None
    assert found.cycles == ideal_cycles(macs, CHIPS[80]) == 2048
    assert found.share == 1


FULL = LoopRow(
    name="full", tile="128x64", instructions=400, spilled=0, exps=34, arithmetic=188,
    products="8 m64n64SS, 4 m64n128RS", duplicated=1.0, exposed_exps=0, exposed_arithmetic=80,
    cycles=1400.0, share=0.73,
)  # fmt: skip
GOOD = KernelRow(
    arch=90, family="block_sparse", kernel="forward", variant="tma",
    case="d128 bfloat16 128x128 partial ragged", warps=8, registers=200, shared=146 * 1024,
    programs=1, spilled=100, serialized=(), missing_warps=False, expected_loops=2,
    loops=(FULL, replace(FULL, name="partial", share=0.55)),
)  # fmt: skip


def test_a_good_kernel_has_no_problems() -> None:
    """Words that are spilled outside of the loops and a few inside are none."""
    few = replace(GOOD, loops=(FULL, replace(FULL, spilled=SPILLED_IN_LOOP)))
    assert problems([GOOD, few]) == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (replace(GOOD, shared=228 * 1024), "needs 228 KiB of shared memory: the chip has 227 KiB"),
        (replace(GOOD, missing_warps=True), "the compiler did not specialize warps"),
        (replace(GOOD, expected_loops=4), "has 2 loops with products, its source 4"),
        (replace(GOOD, serialized=("C7512",)), "wgmma products are serialized (ptxas C7512)"),
        (
            replace(GOOD, loops=(FULL, replace(FULL, spilled=SPILLED_IN_LOOP + 1))),
            f"spills {SPILLED_IN_LOOP + 1} words of registers in the 'full' loop",
        ),
        (
            replace(GOOD, loops=(FULL, replace(FULL, duplicated=1.5))),
            "computes its products 1.50 times in the 'full' loop",
        ),
    ],
)
def test_a_problem_is_told_with_its_kernel(bad: KernelRow, problem: str) -> None:
    (line,) = problems([GOOD, bad])
    assert line.startswith("sm_90 block_sparse forward tma d128 bfloat16 128x128 partial ragged: ")
    assert problem in line


def test_goals_are_reached_by_the_best_variant_that_is_run_unasked() -> None:
    slow = replace(GOOD, variant="plain", loops=(replace(FULL, share=0.6),))
    fast = replace(GOOD, variant="gluon", loops=(replace(FULL, share=0.9),))
    by_goal = {x.goal: x for x in verdicts([slow, GOOD, fast])}
    forward = by_goal["share of forward at head_dim 128, full blocks"]
    assert (forward.found, forward.passed) == (0.73, True)
    assert by_goal["share of forward at head_dim 128, partial blocks"].found == 0.55
    keys = by_goal["share of keys at head_dim 64, full blocks"]
    assert (keys.found, keys.passed) == (None, False)


def test_a_share_below_its_floor_and_a_product_too_many_fail() -> None:
    bad = replace(GOOD, loops=(replace(FULL, share=0.71, duplicated=1.5),))
    by_goal = {x.goal: x.passed for x in verdicts([bad])}
    assert not by_goal["share of forward at head_dim 128, full blocks"]
    assert not by_goal["multiplications / those needed, anywhere"]


def test_gather_is_compared_with_block_sparse() -> None:
    whole = replace(FULL, name="whole", share=0.4)
    gather = replace(
        GOOD, family="gather", variant="plain", case="d128 bfloat16", loops=(whole,)
    )  # fmt: skip
    goal = "share of gather's forward at head_dim 128 / that of block_sparse"
    (found,) = [x for x in verdicts([GOOD, gather]) if x.goal == goal]
    assert found.found == pytest.approx(0.4 / 0.73)
    assert not found.passed


def test_there_are_no_goals_without_kernels_for_hopper() -> None:
    assert verdicts([replace(GOOD, arch=80)]) == []


def test_the_table_has_a_line_per_loop() -> None:
    float32 = replace(
        GOOD, arch=80, loops=(LoopRow("full", "16x16", 800, 0, 10, 700),)
    )  # fmt: skip
    without = replace(GOOD, arch=80, kernel="row_sums", loops=())
    page = markdown([GOOD, float32, without], verdicts([GOOD]))
    assert page.index("PASS share of forward") < page.index("## sm_90") < page.index("## sm_80")
    assert (
        "| full | 128x64 | 8 | 200 | 146 | 1 | 0 / 100 | 8 m64n64SS, 4 m64n128RS | 1.00 |" in page
    )
    assert len(lines([GOOD, float32, without]).splitlines()) == 2 + 2 + 1 + 1
    cells = {line.count("|") for line in lines([GOOD, float32, without]).splitlines()}
    assert len(cells) == 1


def test_the_json_has_the_same() -> None:
    content = json.loads(as_json([GOOD], verdicts([GOOD]), ["a problem"]))
    assert content["kernels"][0]["loops"][1]["share"] == 0.55
    assert content["problems"] == ["a problem"]
    assert content["must_reach"][0]["passed"] is True


@pytest.mark.parametrize("tiles", ["128,64,8", "128,64,8,2,64,7", "128,64,8,x", "ahead"])
def test_malformed_tiles_are_refused(tiles: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tiles", tiles])
    assert "give queries,keys,warps,stages[,partial][,ahead]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kernel", "row_sums"],
        ["--family", "linear"],
        ["--family", "gather", "--kernel", "tangent"],
        ["--family", "gather", "tangent"],
    ],
)
def test_tiles_are_for_some_kernels_of_one_family(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--tiles", "64,64,4,2", *arguments])
    assert "--tiles takes" in capsys.readouterr().err
