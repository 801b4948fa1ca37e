"""Attention to summary keys in Triton, forward and backward, beside dense attention by cuDNN.

There is a summary for each block of 64 tokens, and a quarter of the summaries is hidden from each
block of queries, as under block top-k with summaries.
"""

from __future__ import annotations

from functools import partial

import torch

from diffattn.blocks import pack_bits
from diffattn.kernels.summary import summary_attention
from diffattn.pipelines.bench.timing import Call, Spread, interleave, median_ratio
from gpu_run.rates import dense
from gpu_run.setting import Setting
from gpu_run.shapes import BACKWARD, BACKWARD_FLOPS, FORWARD, Shape

SHAPES = ("wan-1.3b-480p", "wan-14b-720p")
BLOCK = 64
HIDDEN = 0.25


def run(what: str, setting: Setting) -> None:
    for name in SHAPES[:1] if setting.dry else SHAPES:
        for direction in (FORWARD, BACKWARD):
            unit = f"{name} {direction}"
            if not setting.journal.is_finished(unit):
                _measure(setting.shape(name), direction, setting)
                setting.journal.finish(unit)


def _measure(shape: Shape, direction: str, setting: Setting) -> None:
    query, key, value, grad = setting.inputs(shape)
    blocks = -(-shape.tokens // BLOCK)
    means = [x[:, :: max(1, shape.tokens // blocks)][:, :blocks] for x in (key, value)]
    bias = torch.zeros(1, 1, blocks, device=setting.device)
    chance = torch.rand(1, shape.heads, blocks, blocks, device=setting.device)
    hidden = pack_bits(chance < HIDDEN)
    reference = dense("flash" if setting.dry else "cudnn")

    def prepared(attend: Call, leaves: list[torch.Tensor], grad: torch.Tensor) -> Call:
        if direction == FORWARD:
            return attend
        out = attend()
        out = out[0] if isinstance(out, tuple) else out
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    with torch.set_grad_enabled(direction == BACKWARD):
        leaves, whole = (
            [x.detach().requires_grad_(direction == BACKWARD) for x in some]
            for some in ((query, *means), (query, key, value))
        )
        firsts = [reference.arrange(x).detach().requires_grad_(x.requires_grad) for x in whole]
        summaries = partial(
            summary_attention, *leaves, bias, hidden, block_q=BLOCK, backend="triton"
        )
        calls = {
            "dense": prepared(partial(reference.attend, *firsts), firsts, reference.arrange(grad)),
            "summary": prepared(summaries, leaves, grad),
        }
        for call in calls.values():
            call()
        times, failed = interleave(calls, setting.timer, **setting.rounds(2.0))
    facts = {"shape": shape.name, "direction": direction, "tokens": shape.tokens}
    if failed:
        setting.journal.add("summary", **facts, failed="; ".join(failed.values()))
        return
    ms = Spread.of(times["summary"]).median
    flops = 4.0 * shape.heads * shape.head_dim * shape.tokens * blocks
    flops *= 1 if direction == FORWARD else BACKWARD_FLOPS
    setting.journal.add(
        "summary", **facts, ms=ms, dense_ms=Spread.of(times["dense"]).median,
        tflops=flops / ms / 1e9, of_dense=median_ratio(times["summary"], times["dense"]),
    )  # fmt: skip
