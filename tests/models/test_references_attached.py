"""Models whose sequences have references, under every policy: attached, compiled, permuted once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import stock
import tiny_edit_models
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import GNAAttn, TokenGrid, VMoBAAttn
from diffattn.attach.backend import Group
from diffattn.grid import Reference
from diffattn.methods import Method

CASE = tiny_edit_models.CASES["flux-kontext"]
GNA = GNAAttn(window=(1, 3, 3), dense_steps=0)
POLICIES = ("exact", "visible", "local")

pytestmark = pytest.mark.filterwarnings("ignore:references='local'")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def masked(model: Any, inputs: dict[str, Any], method: Any) -> torch.Tensor:
    """The stock model with the method's boolean mask."""
    with stock.masked(model, list(CASE.sites), CASE.grid_of, method):
        return forward(model, inputs)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_the_stock_model_with_its_mask(policy: str) -> None:
    model, inputs = CASE.build(), CASE.inputs()
    method = replace(GNA, references=policy)
    want = masked(model, inputs, method)
    diffattn.set_attn_processor(model, method)
    torch.testing.assert_close(forward(model, inputs), want, atol=1e-5, rtol=1e-4)


def test_policies_differ() -> None:
    model, inputs = CASE.build(), CASE.inputs()
    outputs = []
    for policy in POLICIES:
        diffattn.set_attn_processor(model, replace(GNA, references=policy))
        outputs.append(forward(model, inputs))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("small", [False, True], ids=["large references", "a small one at the end"])
def test_tokens_are_permuted_once_with_their_references(
    policy: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = CASE.build(), CASE.inputs()
    tiles = replace(stock.IN_TILES, references=policy)
    if small:
        # 6 x 9 tokens, a reference of that size, and one of 3 x 4 tokens: less than a block.
        ids = tiny_edit_models.ids((0, 6, 9), (1, 6, 9), (2, 3, 4))
        inputs |= {"img_ids": ids, "hidden_states": inputs["hidden_states"][:, : len(ids)]}
    diffattn.set_attn_processor(model, tiles)
    seen: list[Any] = []
    stock_site = Group.site

    def site(self: Group, tokens: int) -> Any:
        seen.append(stock_site(self, tokens))
        return seen[-1]

    monkeypatch.setattr(Group, "site", site)
    out = forward(model, inputs)
    assert seen
    assert all(site.order is not None for site in seen)
    assert len(seen[0].order.beside) == {"exact": 0}.get(policy, 1 if small else 2)
    with torch.enable_grad():  # gradients are taken: each call permutes for itself
        want = model(**inputs, return_dict=False)[0].detach()
    assert seen[-1].order is None
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "policy"),
    [(GNA, "exact"), (GNA, "local"), (stock.IN_TILES, "visible")],
    ids=["gna, exact", "gna, local", "in tiles, visible"],
)
def test_compiled_code_knows_references(method: Method, policy: str) -> None:
    method = replace(method, references=policy)
    eager, model = CASE.build(), CASE.build()
    diffattn.set_attn_processor(eager, method)
    diffattn.set_attn_processor(model, method)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = CASE.inputs()
    # As many tokens, of which other tokens are the references.
    others = inputs | {"img_ids": tiny_edit_models.ids((0, 6, 9), (1, 4, 5), (2, 6, 9))}
    alone = inputs | {"img_ids": tiny_edit_models.ids((0, 16, 8))}
    outputs = []
    for given in (inputs, others, alone, inputs):
        outputs.append(forward(compiled, given))
        torch.testing.assert_close(outputs[-1], forward(eager, given), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("policy", "apart"), [("visible", False), ("local", True)])
def test_gradients_of_compiled_code(policy: str, apart: bool) -> None:
    method = replace(GNA, references=policy)
    gradients = []
    for is_compiled in (False, True):
        model = CASE.build()
        diffattn.set_attn_processor(model, method)
        if is_compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        out = model(**CASE.inputs(), return_dict=False)[0]
        if apart:
            thread = threading.Thread(target=out.square().sum().backward)
            thread.start()
            thread.join()
        else:
            out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for found, want in zip(*reversed(gradients), strict=True):
        assert (found is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["vmoba", "linfusion", "agent"])
def test_other_methods_run_and_describe_the_policy(name: str) -> None:
    model, inputs = CASE.build(), CASE.inputs()
    (grid,) = CASE.grids
    dense, outputs = forward(model, inputs), []
    for policy in POLICIES:
        method = diffattn.methods.from_dict({"type": name, "references": policy, "dense_steps": 0})
        attachment = diffattn.set_attn_processor(model, replace(method, last_dense_steps=0))
        outputs.append(forward(model, inputs))
        assert outputs[-1].isfinite().all()
        assert f"references {policy}, 0 of 2 with pairs left out" in str(
            attachment.describe(grid, 10)
        )
    # These references have less than 128 tokens: they are treated as text is.
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], dense, atol=1e-3)


@pytest.mark.parametrize("policy", ["visible", "local"])
def test_compiled_selections_know_references(policy: str) -> None:
    side = TokenGrid(1, 12, 12, 0, 144, references=(Reference(144, 1, 12, 12),))
    inputs = tiny_edit_models.edit_inputs(
        side,
        (0, 1),
        pooled_projections=CASE.inputs()["pooled_projections"],
        guidance=torch.tensor([3.5, 3.5]),
    )
    method = VMoBAAttn(
        partitions=("2d",), chunk_2d=(4, 4), topk=3, references=policy, dense_steps=0
    )
    eager, model = CASE.build(), CASE.build()
    for attached in (eager, model):
        diffattn.set_attn_processor(attached, method)
    want = forward(eager, inputs)
    diffattn.set_attn_processor(eager, replace(method, references="exact"))
    assert not torch.allclose(forward(eager, inputs), want, atol=1e-3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(forward(compiled, inputs), want, atol=1e-5, rtol=1e-4)


def test_a_lora_trains_under_a_policy() -> None:
    from peft import LoraConfig

    model, inputs = CASE.build(), CASE.inputs()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    diffattn.set_attn_processor(model, replace(GNA, references="local"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(**inputs, return_dict=False)[0].square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_orders_beside_an_order_move_all_pictures() -> None:
    grid = TokenGrid(1, 4, 4, 3, 21, references=(Reference(22, 1, 4, 4),))
    order = replace(stock.IN_TILES, tile=(1, 2, 2)).order(grid)
    assert order is not None
    x = torch.randn(2, 3 + 16 + 21, 5)
    whole = order.to_tiles(x)
    assert torch.equal(order.to_tiles(x[:, 3:38]), whole[:, 3:38])
    assert torch.equal(order.from_tiles(whole[:, 3:38]), x[:, 3:38])
    with pytest.raises(ValueError, match="nor its 35 tokens of video and references"):
        order.to_tiles(x[:, :16])
