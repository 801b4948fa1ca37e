"""Errors of methods by layer, step and head of a dense run."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import pytest
import tiny_wan
import torch
import torch.nn.functional as F

from diffattn import AgentAttn, BlockTopKAttn, DenseAttn, Method, TokenGrid
from diffattn.site_errors import site_errors

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Scaled(Method):
    """Dense attention whose heads are multiplied by factors."""

    type: ClassVar[str] = "scaled"
    factors: tuple[float, ...] = (1.0,)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        return replace(self, dense_layers=0, dense_steps=0)

    def attend(self, query: Any, key: Any, value: Any, site: Any, **_: Any) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out * out.new_tensor(self.factors)[:, None]


def run(pipe: Any, seen: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    pipe.scheduler.set_timesteps(STEPS)
    for timestep in pipe.scheduler.timesteps:
        with torch.no_grad():
            out = pipe.transformer(
                hidden_states=torch.randn(1, 16, 3, 8, 8, generator=generator),
                timestep=timestep[None].float(),
                encoder_hidden_states=torch.randn(1, 5, tiny_wan.TEXT_DIM, generator=generator),
                return_dict=False,
            )[0]
        seen.append(out)
        sample = torch.zeros(1, 16, 1, 2, 2)
        pipe.scheduler.step(sample, timestep, sample)


def test_errors_by_layer_step_and_head_of_a_run_that_stays_dense() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    heads = pipe.transformer.config.num_attention_heads
    factors = tuple(1 + 0.5 * (n == 0) for n in range(heads))
    top = BlockTopKAttn(keep=0.4, block=16, dense_layers=0, dense_steps=0)
    seen: list[torch.Tensor] = []
    candidates = [Scaled(factors=(0.5,) * heads), Scaled(factors=factors), DenseAttn(), top]
    errors = site_errors(pipe, lambda: run(pipe, seen), candidates, [4, 1])
    stock: list[torch.Tensor] = []
    run(pipe, stock)
    for measured, plain in zip(seen, stock, strict=True):
        torch.testing.assert_close(measured, plain)
    assert len(errors) == pipe.transformer.config.num_layers
    for layer in errors:
        assert len(layer) == 2
        for half, one_head, none, top_error in layer:
            assert sum(half) == pytest.approx(0.25, rel=1e-4)
            assert one_head[0] == pytest.approx(half[0], rel=1e-4)
            assert one_head[1:] == pytest.approx([0.0] * (heads - 1), abs=1e-9)
            assert sum(none) < 1e-9
            assert 1e-6 < sum(top_error) < 1
    assert errors[0][0] != errors[0][1]


def test_a_candidate_with_weights_is_refused() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    with pytest.raises(ValueError, match=r"^agent cannot be measured beside dense attention: it h"):
        site_errors(pipe, lambda: None, [AgentAttn()], [0])
