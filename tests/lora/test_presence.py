"""A LoRA is on where its method attends; elsewhere the model is the one without it, to the bit."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_lora
import pytest
import tiny_wan
import torch
from made_lora import CELLS, NEARBY
from tiny_complete import COMPLETE

import diffattn
from diffattn import DenseAttn, GNAAttn
from diffattn.attach.denoiser import attached_to
from diffattn.lora import load_lora, load_method_weights, read_record
from diffattn.lora.presence import keep_everywhere, keep_under_method, under_method
from diffattn.methods import from_dict
from diffattn.models import denoisers

STEPS = 4
LINEAR = {"type": "linfusion"}
FEW = {"type": "vmoba", "dense_layers": 0, "dense_steps": 0}

# An attached model may put its tokens in another order, which rounds otherwise.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

Call = tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]


def wan() -> Any:
    return tiny_wan.PIPELINES["t2v"]()


def calls_of(pipe: Any, run: Callable[[Any], Any]) -> list[Call]:
    """The calls of a pipeline's denoiser in a run: arguments, and what it gave."""
    model = next(iter(denoisers(pipe).values()))
    calls: list[Call] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, copy.deepcopy(kwargs), first(output).clone()))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    try:
        run(pipe)
    finally:
        hook.remove()
    return calls


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def again(model: Any, call: Call) -> torch.Tensor:
    args, kwargs, _ = call
    with torch.no_grad():
        return first(model(*args, **copy.deepcopy(kwargs)))


def by_step(calls: list[Call]) -> list[list[Call]]:
    """The calls of each step; guidance may take two."""
    each = len(calls) // STEPS
    assert each * STEPS == len(calls)
    return [calls[step * each : (step + 1) * each] for step in range(STEPS)]


CASES = [
    ("wan", NEARBY),
    ("wan", CELLS),
    ("wan", LINEAR),
    ("wan", FEW),
    ("hunyuanvideo", NEARBY),
    ("hunyuanvideo", LINEAR),
    ("cogvideox-2b", NEARBY),
    ("ltx", CELLS),
    ("mochi", NEARBY),
    ("flux", CELLS),
    ("sdxl", LINEAR),
    ("sdxl", NEARBY),
]


@pytest.mark.parametrize(("name", "method"), CASES, ids=lambda it: getattr(it, "get", str)("type"))
def test_dense_steps_are_the_stock_model_to_the_bit(
    name: str, method: dict[str, Any], tmp_path: Path
) -> None:
    case = COMPLETE[name]
    made_lora.make(case.build(), tmp_path, method)
    pipe = case.build()
    diffattn.set_attn_processor(pipe, from_dict(method | {"dense_steps": 2, "last_dense_steps": 1}))
    record = load_lora(pipe, tmp_path)
    assert record is not None
    steps = by_step(calls_of(pipe, lambda p: case.run(p, "a cat", steps=STEPS)))

    stock = getattr(case.build(), record.denoiser)
    bare = case.build()
    bare.load_lora_weights(tmp_path)
    diffattn.set_attn_processor(bare, from_dict(method | {"dense_steps": 0}))
    load_method_weights(bare, tmp_path, record)
    sparse = getattr(bare, record.denoiser)
    for step, calls in enumerate(steps):
        for call in calls:
            of_stock, of_sparse = again(stock, call), again(sparse, call)
            assert (of_stock - of_sparse).abs().max() > 10 * CLOSE["atol"]
            if step == 2:
                torch.testing.assert_close(call[2], of_sparse, **CLOSE)
            elif name == "mochi":  # its processor is a twin of the stock one
                torch.testing.assert_close(call[2], of_stock, **CLOSE)
            else:
                assert torch.equal(call[2], of_stock), step


class TestWhereItIsOff:
    @pytest.fixture
    @staticmethod
    def folder(tmp_path: Path) -> Path:
        made_lora.make(wan(), tmp_path, NEARBY)
        return tmp_path

    def test_it_brings_its_method(self, folder: Path) -> None:
        pipe = wan()
        load_lora(pipe, folder)
        other = wan()
        other.set_attn_processor(from_dict(NEARBY))
        other.load_lora_weights(folder)
        torch.testing.assert_close(tiny_wan.run(pipe), tiny_wan.run(other), **CLOSE)

    def test_without_a_method_and_back(self, folder: Path) -> None:
        pipe, stock = wan(), wan()
        load_lora(pipe, folder)
        own = tiny_wan.run(pipe)
        pipe.set_attn_processor(None)
        assert torch.equal(tiny_wan.run(pipe), tiny_wan.run(stock))
        pipe.set_attn_processor(from_dict(NEARBY))
        assert torch.equal(tiny_wan.run(pipe), own)

    def test_under_another_method(self, folder: Path) -> None:
        pipe, other = wan(), wan()
        for each in (pipe, other):
            each.set_attn_processor(from_dict(CELLS))
        load_lora(pipe, folder)
        torch.testing.assert_close(tiny_wan.run(pipe), tiny_wan.run(other), **CLOSE)

    def test_in_layers_under_another_method(self, folder: Path) -> None:
        methods = {"blocks.1": DenseAttn(), "*": from_dict(NEARBY)}
        pipe, other = wan(), wan()
        for each in (pipe, other):
            each.set_attn_processor(methods)
        load_lora(pipe, folder)
        other.load_lora_weights(folder)
        everywhere = tiny_wan.run(other)
        with torch.no_grad():
            for name, weight in other.transformer.named_parameters():
                if "blocks.1." in name and "lora_B" in name:
                    weight.zero_()
        torch.testing.assert_close(tiny_wan.run(pipe), tiny_wan.run(other), **CLOSE)
        assert (tiny_wan.run(pipe) - everywhere).abs().max() > 1e-2

    def test_dense_layers_of_the_method_keep_it(self, folder: Path) -> None:
        pipe, other = wan(), wan()
        for each in (pipe, other):
            each.set_attn_processor(from_dict(NEARBY | {"dense_layers": 1}))
        load_lora(pipe, folder)
        other.load_lora_weights(folder)
        torch.testing.assert_close(tiny_wan.run(pipe), tiny_wan.run(other), **CLOSE)

    def test_everywhere_keeps_it_on(self, folder: Path) -> None:
        pipe, other = wan(), wan()
        for each in (pipe, other):
            each.set_attn_processor(from_dict(NEARBY | {"dense_steps": 1.0}))
        load_lora(pipe, folder, everywhere=True)
        other.load_lora_weights(folder)
        assert torch.equal(tiny_wan.run(pipe), tiny_wan.run(other))
        assert not torch.equal(tiny_wan.run(pipe), tiny_wan.run(wan()))

    def test_the_expert_that_it_was_not_trained_for(self, tmp_path: Path) -> None:
        made_lora.make(
            tiny_wan.PIPELINES["two experts"](), tmp_path, NEARBY, denoiser="transformer_2"
        )
        pipe = tiny_wan.PIPELINES["two experts"]()
        load_lora(pipe, tmp_path)
        assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())
        assert any("lora" in name for name, _ in pipe.transformer_2.named_parameters())

    def test_other_adapters_stay(self, folder: Path, tmp_path: Path) -> None:
        style = tmp_path / "style"
        made_lora.make(wan(), style, NEARBY)
        pipe, other = wan(), wan()
        for each in (pipe, other):
            each.set_attn_processor(from_dict(NEARBY | {"dense_steps": 1.0}))
            each.load_lora_weights(style, adapter_name="style")
        load_lora(pipe, folder)
        pipe.set_adapters(["style", "diffattn_gna"])
        assert torch.equal(tiny_wan.run(pipe), tiny_wan.run(other))
        layer = pipe.transformer.blocks[0].attn1.to_q
        assert layer.active_adapters == ["style", "diffattn_gna"]

    def test_unloaded_and_another_loaded(self, folder: Path) -> None:
        pipe, other = wan(), wan()
        for each in (pipe, other):
            each.set_attn_processor(from_dict(NEARBY | {"dense_steps": 1.0}))
        load_lora(pipe, folder)
        pipe.unload_lora_weights()
        assert torch.equal(tiny_wan.run(pipe), tiny_wan.run(other))
        load_lora(pipe, folder, everywhere=True)
        other.load_lora_weights(folder)
        assert torch.equal(tiny_wan.run(pipe), tiny_wan.run(other))

    def test_a_block_of_code(self, folder: Path) -> None:
        pipe = wan()
        pipe.load_lora_weights(folder, adapter_name="mine")
        on = tiny_wan.run(pipe)
        with under_method(pipe.transformer, "mine", "gna"):
            assert torch.equal(tiny_wan.run(pipe), tiny_wan.run(wan()))
        assert torch.equal(tiny_wan.run(pipe), on)
        keep_everywhere(pipe.transformer, "mine")  # twice is once


class TestStateOfACall:
    @pytest.fixture
    @staticmethod
    def pipe(tmp_path: Path) -> Any:
        """A pipeline whose every step is dense, with a LoRA."""
        made_lora.make(wan(), tmp_path, NEARBY)
        pipe = wan()
        pipe.set_attn_processor(from_dict(NEARBY | {"dense_steps": 1.0}))
        load_lora(pipe, tmp_path)
        return pipe

    def active(self, pipe: Any) -> list[str]:
        return pipe.transformer.blocks[0].attn1.to_q.active_adapters

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_forward_that_fails_leaves_nothing(
        self, pipe: Any, error: type[BaseException]
    ) -> None:
        def fail(*_: Any) -> None:
            raise error

        hook = pipe.transformer.blocks[1].register_forward_hook(fail)
        with pytest.raises(error):
            tiny_wan.run(pipe)
        hook.remove()
        assert torch.equal(tiny_wan.run(pipe), tiny_wan.run(wan()))
        assert self.active(pipe) == ["diffattn_gna"]

    def test_a_deep_copy_is_on_its_own(self, pipe: Any) -> None:
        copied = copy.deepcopy(pipe)
        keep_everywhere(pipe.transformer, "diffattn_gna")
        assert torch.equal(tiny_wan.run(copied), tiny_wan.run(wan()))
        assert not torch.equal(tiny_wan.run(pipe), tiny_wan.run(wan()))

    def test_threads_in_unlike_steps_are_refused(self, pipe: Any) -> None:
        model = pipe.transformer
        attached: Any = attached_to(model)
        attached.owner.leave_run()
        inputs = {
            "hidden_states": torch.zeros(1, 16, 3, 12, 8),
            "timestep": torch.tensor([900]),
            "encoder_hidden_states": torch.zeros(1, 6, tiny_wan.TEXT_DIM),
        }
        inside, done = threading.Event(), threading.Event()

        def wait(*_: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert done.wait(60)

        hook = model.blocks[1].register_forward_hook(wait)
        thread = threading.Thread(target=model, kwargs=inputs)
        thread.start()
        try:
            assert inside.wait(60)
            with torch.no_grad():
                model(**inputs)  # as the other: both have the LoRA on
            with attached.owner.dense(), pytest.raises(RuntimeError) as error:
                model(**inputs)
        finally:
            done.set()
            thread.join()
            hook.remove()
        assert str(error.value) == (
            "another thread is inside this WanTransformer3DModel in a step with its LoRA on, and"
            " this step needs the LoRA off: let the threads take turns, give each thread a copy"
            " (copy.deepcopy of the pipeline), or load the LoRA with everywhere=True"
        )
        with torch.no_grad():
            model(**inputs)

    def test_a_fused_one_is_reported(self, pipe: Any) -> None:
        pipe.fuse_lora()
        with pytest.warns(UserWarning, match=r"^LoRA 'diffattn_gna' is fused into the model's"):
            tiny_wan.run(pipe)
        pipe.unfuse_lora()
        torch.testing.assert_close(tiny_wan.run(pipe), tiny_wan.run(wan()), atol=1e-4, rtol=1e-4)

    def test_compiled(self, tmp_path: Path) -> None:
        made_lora.make(wan(), tmp_path / "lora", NEARBY)
        results = []
        for compiled in (False, True):
            pipe = wan()
            pipe.set_attn_processor(from_dict(NEARBY | {"dense_steps": 2}))
            load_lora(pipe, tmp_path / "lora")
            if compiled:
                torch._dynamo.reset()
                pipe.transformer.compile(backend="eager", fullgraph=True)
            results.append(tiny_wan.run(pipe, steps=4))
            assert self.active(pipe) == ["diffattn_gna"]
        torch.testing.assert_close(*results)


def test_a_layer_outside_of_the_sites_follows_the_steps(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = wan().transformer
    torch.manual_seed(3)
    model.add_adapter(
        LoraConfig(r=2, target_modules=["blocks.0.ffn.net.2"], init_lora_weights=False)
    )
    keep_under_method(model, "default", "gna")
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 12, 8),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 6, tiny_wan.TEXT_DIM),
    }
    with torch.no_grad():
        stock = wan().transformer(**inputs).sample
        assert torch.equal(model(**inputs).sample, stock)
        whole = GNAAttn(window="full", dense_layers=0, dense_steps=0)
        diffattn.set_attn_processor(model, whole)
        assert (model(**inputs).sample - stock).abs().max() > 1e-3


def test_the_record_is_returned(tmp_path: Path) -> None:
    made_lora.make(wan(), tmp_path, NEARBY)
    assert load_lora(wan(), tmp_path) == read_record(tmp_path)


def test_layers_that_a_policy_keeps_dense_keep_the_lora_while_others_are_sparse(
    tmp_path: Path,
) -> None:
    rules = [
        {"layers": [0], "method": {"type": "dense"}},
        {"phases": [{"method": {"type": "dense"}, "until": 2}, {"method": NEARBY}]},
    ]
    policy = {"type": "policy", "rules": rules, "recorded": {"model": "a/model"}}
    pipe = COMPLETE["wan"].build()
    made_lora.make(COMPLETE["wan"].build(), tmp_path, policy)
    record = load_lora(pipe, tmp_path)
    assert record is not None
    attached = attached_to(pipe.transformer)
    assert attached is not None
    loaded = attached.groups[0].chosen.described_as
    assert loaded == from_dict(policy)
    assert loaded.to_dict()["recorded"]["model"] == "a/model"
    steps = by_step(calls_of(pipe, lambda p: COMPLETE["wan"].run(p, "a cat", steps=STEPS)))

    stock = COMPLETE["wan"].build().transformer
    bare = COMPLETE["wan"].build()
    bare.load_lora_weights(tmp_path)
    sites = {"blocks.0": None, "blocks.*": from_dict(NEARBY | {"dense_steps": 0})}
    diffattn.set_attn_processor(bare.transformer, sites)
    for step, calls in enumerate(steps):
        for call in calls:
            of_stock, of_sparse = again(stock, call), again(bare.transformer, call)
            assert (of_stock - of_sparse).abs().max() > 10 * CLOSE["atol"]
            torch.testing.assert_close(call[2], of_stock if step < 2 else of_sparse, **CLOSE)
