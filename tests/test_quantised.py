"""Models whose weights are packed in bytes, as those of bitsandbytes and GGUF.

What reads a weight's dtype, width or values must not take the storage for the weight. The fake
packs without loss, so that every result equals that of the plain model.
"""

import copy
from typing import Any

import pytest
import stock
import tiny_wan
import torch
import torch.nn.functional as F
from peft import LoraConfig

import diffattn
from diffattn import CLEARAttn, LinFusionAttn, SLA2Attn, SLAAttn
from diffattn.lora.cache import fingerprint
from diffattn.methods.base import Method


class PackedLinear(torch.nn.Linear):
    """A linear layer whose float32 weight is stored as bytes: uint8 (out, 4 x in)."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        packed = plain.weight.detach().clone().view(torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.view(torch.float32), self.bias)


def packed(model: torch.nn.Module) -> Any:
    """A copy of a model with packed linear layers in its blocks."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(module, torch.nn.Linear):
            model.set_submodule(name, PackedLinear(module))
    return model


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 16, 5, 12, 10, generator=generator),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }


METHODS = [
    stock.IN_TILES,
    LinFusionAttn(mid_dim=4),
    CLEARAttn(radius=2, down_factor=2, dense_layers=0, dense_steps=0),
    SLAAttn(block_q=16, block_kv=16, keep=0.3),
    SLA2Attn(block_q=16, block_kv=16, keep=0.3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.type)
def test_inference_training_copies_and_taking_off(method: Method) -> None:
    plain: Any = tiny_wan.transformer()
    models = [plain, packed(plain)]
    stock_out = plain(**inputs())[0].detach()
    outs, grads = [], []
    for model in models:
        diffattn.set_attn_processor(model, method)
        own = [p for name, p in model.named_parameters() if f".{method.type}." in name]
        assert all(p.dtype == torch.float32 for p in own)
        with torch.no_grad():
            outs.append(model(**inputs())[0])
            assert torch.equal(copy.deepcopy(model)(**inputs())[0], outs[-1])
        model.requires_grad_(False)
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.add_adapter(config, "x")
        model(**inputs())[0].square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        model.delete_adapters("x")
        diffattn.set_attn_processor(model, None)
        with torch.no_grad():
            assert torch.equal(model(**inputs())[0], stock_out)
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], stock_out)
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_the_fingerprint_is_of_the_packed_values() -> None:
    model, other = packed(tiny_wan.transformer()), packed(tiny_wan.transformer())
    assert fingerprint(model) == fingerprint(other)
    other.blocks[1].attn1.to_q.weight.data[0] ^= 1
    assert fingerprint(model) != fingerprint(other)
