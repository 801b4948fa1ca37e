"""Every family on a whole tiny model: exact, complete, and without a trace afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import stock
import torch
from tiny_case import nudged
from tiny_families import CASES, Case

import diffattn
from diffattn import AgentAttn, DenseAttn, GNAAttn, SLA2Attn, SLAAttn, VMoBAAttn

EXACT = {"atol": 1e-5, "rtol": 1e-4}


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def masked(case: Case, model: torch.nn.Module) -> contextlib.AbstractContextManager[list[int]]:
    """The stock model with the boolean mask of `stock.NEARBY`."""
    return stock.masked(model, list(case.sites), case.grid_of, stock.NEARBY, case.queries)


def attached_sites(model: torch.nn.Module) -> list[str]:
    attached = diffattn.attach.attached_to(model)
    assert attached is not None
    return list(attached.sites)


def test_dense_method_gives_the_models_own_output(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    want = forward(model, inputs)
    attachment = diffattn.set_attn_processor(model, DenseAttn())
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    assert sorted(attached_sites(model)) == sorted(case.sites)
    assert attachment.sparse_calls == len(case.sites)


def test_content_method_that_selects_everything_gives_the_models_own_output(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    want = forward(model, inputs)
    method = VMoBAAttn(topk=10**6, dense_steps=0)
    attachment = diffattn.set_attn_processor(model, method)
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    assert attachment.sparse_calls == len(case.sites)
    diffattn.set_attn_processor(model, VMoBAAttn(topk=1, dense_steps=0))
    out = forward(model, inputs)
    assert out.isfinite().all()
    assert not torch.allclose(out, want, atol=1e-3), "the selection should matter"


def test_own_weights_add_nothing_before_training_and_matter_after(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    want = forward(model, inputs)
    attachment = diffattn.set_attn_processor(model, SLAAttn(keep=1))
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    assert attachment.sparse_calls == len(case.sites)
    layers = [p for name, p in model.named_parameters() if ".sla.proj_l." in name]
    assert len(layers) == 2 * len(case.sites)
    for parameter in layers:
        torch.nn.init.normal_(parameter)
    out = forward(model, inputs)
    assert out.isfinite().all()
    assert not torch.allclose(out, want, atol=1e-3), "linear attention should matter"


def test_a_router_that_sees_every_block_gives_the_models_own_output(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    want = forward(model, inputs)
    attachment = diffattn.set_attn_processor(model, SLA2Attn(keep=1))
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    assert attachment.sparse_calls == len(case.sites)
    diffattn.set_attn_processor(model, SLA2Attn(keep=0.1, block_q=16, block_kv=16))
    out = forward(model, inputs)
    assert out.isfinite().all()
    assert not torch.allclose(out, want, atol=1e-3), "the selection should matter"


def test_sparse_method_is_the_stock_model_with_that_mask(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    dense = forward(model, inputs)
    with masked(case, model) as calls:
        want = forward(model, inputs)
    assert len(calls) >= len(case.sites)
    assert not torch.allclose(want, dense, atol=1e-3), "the mask should matter"
    attachment = diffattn.set_attn_processor(model, stock.NEARBY)
    torch.testing.assert_close(forward(model, inputs), want, **EXACT)
    assert attachment.sites == len(case.sites)
    assert attachment.sparse_calls == len(case.sites)
    assert attachment.dense_calls == 0


def test_none_restores_objects_and_bits(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    want = forward(model, inputs)
    before = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    hooks = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    diffattn.set_attn_processor(model, stock.NEARBY)
    changed = {n for n, processor in before.items() if processor is not _processor(model, n)}
    assert changed == set(case.sites)
    diffattn.set_attn_processor(model, None)
    assert all(processor is _processor(model, name) for name, processor in before.items())
    assert hooks == {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    assert not any("diffattn" in name for name in vars(model))
    assert torch.equal(forward(model, inputs), want)


def _processor(model: torch.nn.Module, name: str) -> Any:
    return model.get_submodule(name).processor


@contextlib.contextmanager
def perturbed(module: torch.nn.Module, pixel: tuple[Any, ...]) -> Iterator[None]:
    """Change one pixel of a module's first input."""

    def change(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else next(iter(kwargs))
        pixels = nudged(args[0] if name is None else kwargs[name], pixel)
        return ((pixels, *args[1:]), kwargs) if name is None else (args, kwargs | {name: pixels})

    hook = module.register_forward_pre_hook(change, with_kwargs=True)
    yield
    hook.remove()


def test_a_pixel_arrives_at_the_token_that_the_grid_says(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    recorder = stock.Recording()
    diffattn.set_attn_processor(model, recorder)
    frames, height, width = (getattr(case.grids[0], n) for n in ("frames", "height", "width"))
    places = {(0, 0, 1), (frames - 1, height // 2, 0), (frames // 2, height - 1, width - 2)}
    forward(model, inputs)
    site, before = recorder.calls[0]
    for place in places:
        recorder.calls.clear()
        with perturbed(model.get_submodule(case.entry), case.pixel(*place)):
            forward(model, inputs)
        now, after = recorder.calls[0]
        assert now == site
        moved = (after - before).flatten(2).norm(dim=2)[0]
        (token,) = (moved > 0.5 * moved.max()).nonzero().flatten().tolist()
        assert not site.grid.is_text(torch.tensor(token))
        assert tuple(int(x) for x in site.grid.coordinates(torch.tensor(token))) == place


@pytest.mark.parametrize(
    "name",
    [n for n in CASES if CASES[n].reference_pixel],
)
def test_a_pixel_of_a_reference_arrives_at_the_token_that_the_grid_says(name: str) -> None:
    case = CASES[name]
    model = case.build()
    recorder = stock.Recording()
    diffattn.set_attn_processor(model, recorder)
    forward(model, case.inputs())
    # The first site that sees them all, where some see a part.
    seen = [len(site.grid.references) for site, _ in recorder.calls]
    first = seen.index(max(seen))
    site, before = recorder.calls[first]
    assert site.grid.references
    assert case.reference_pixel is not None
    for number, reference in enumerate(site.grid.references):
        frames, height, width = reference.frames, reference.height, reference.width
        for t, h, w in {(0, 0, 1), (frames - 1, height // 2, 0), (frames // 2, height - 1, 1)}:
            inputs = case.inputs()
            argument, pixel = case.reference_pixel(number, t, h, w)
            inputs[argument] = nudged(inputs[argument], pixel)
            recorder.calls.clear()
            forward(model, inputs)
            moved = (recorder.calls[first][1] - before).flatten(2).norm(dim=2)[0]
            (token,) = (moved > 0.5 * moved.max()).nonzero().flatten().tolist()
            assert token == reference.start + (t * height + h) * width + w


def test_sites_know_their_layer_and_tokens(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    recorder = stock.Recording()
    diffattn.set_attn_processor(model, dict.fromkeys(case.sites, recorder))
    layers = diffattn.models.family_of(model).layers(model)
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in case.sites))
    assert layers == {name: blocks.index(name.rpartition(".")[0]) for name in case.sites}
    forward(model, inputs)
    assert len(recorder.calls) == len(case.sites)
    text = 0 if case.text is None else case.text[1]
    others = {grid.tokens - grid.video_tokens for grid in case.grids}
    for site, query in recorder.calls:
        assert site.layers == len(blocks)
        assert site.grid == case.grid_of(query.shape[1])
        assert site.grid.text_before + site.grid.text_after in others | {o + text for o in others}
    assert {g.grid.alone for g, _ in recorder.calls} == {grid.alone for grid in case.grids}


def test_gradients_through_checkpoints_are_those_of_the_stock_model(case: Case) -> None:
    gradients = []
    for ours in (False, True):
        model, inputs = case.build(), case.inputs()
        if case.checkpoints:
            model.enable_gradient_checkpointing()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if ours:
            diffattn.set_attn_processor(model, stock.NEARBY)
            out = model(**inputs, return_dict=False)[0]
            out.square().mean().backward()
        else:
            with masked(case, model):
                out = model(**inputs, return_dict=False)[0]
                out.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, atol=1e-5, rtol=1e-3, msg=name)


def test_families_of_images_have_grids_of_one_frame(case: Case) -> None:
    model = case.build()
    family = diffattn.models.family_of(model)
    layers = getattr(model.config, "use_layer3d_rope", False)  # as frames of one grid
    assert family.images == (layers or all(grid.frames == 1 for grid in case.grids))
    assert diffattn.models.makes_images(family.name) == family.images


def test_methods_agree_on_which_families_make_images() -> None:
    for family in diffattn.models.FAMILIES:
        image = family.images
        assert (AgentAttn().for_model(family.name).cell == (1, 4, 4)) == image, family.name
        assert (GNAAttn().for_model(family.name).dense_steps == 0.325) == image, family.name
    assert not diffattn.models.makes_images("a model of nobody's")
