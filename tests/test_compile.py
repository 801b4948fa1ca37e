"""torch.compile: as many graphs as the stock model, and the same output and gradients."""

import copy
import functools
import gc
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny_wan
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import scheduler
from torch._inductor.utils import is_cudagraph_unsafe_op
from triton_device import triton_device

import diffattn
from diffattn import (
    AgentAttn,
    FullMask,
    LinFusionAttn,
    RadialAttn,
    TokenGrid,
    VMoBAAttn,
    attention,
)
from diffattn.attach.compiled import move_tokens, remember, traced_attention, traced_method
from diffattn.kernels.cpu import block_sparse as cpu_kernel
from diffattn.kernels.reference import reference_attention
from diffattn.operator import BACKEND_VARIABLE

SPARSE = RadialAttn(
    decay_factor=0.0, split_threshold=8, block_size=4, dense_layers=0, dense_steps=0
)


def inputs(frames: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 16, frames, 12, 10, generator=generator),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_wan.TEXT_DIM, generator=generator),
        "return_dict": False,
    }


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def graphs(model: torch.nn.Module, how: str) -> tuple[int, torch.Tensor]:
    """Number of graphs of two calls, and the output."""
    counter = CompileCounterWithBackend("aot_eager")
    if how == "whole":
        call: Any = torch.compile(model, fullgraph=True, backend=counter)
    else:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        call = model
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(**inputs())
        out = call(**inputs())[0]
    return counter.frame_count, out


# Frames, rows and columns of latents: equal numbers would share a symbol. Some are each other's
# transpose, of as many tokens.
SIZES = [
    (3, 8, 14), (7, 12, 22), (9, 24, 10), (3, 14, 8), (7, 22, 12), (11, 10, 18),
    (4, 20, 12), (9, 10, 24), (13, 8, 20), (6, 18, 14), (8, 12, 26), (10, 18, 8),
]  # fmt: skip
METHODS = {
    "mask": SPARSE,
    "permuted once": stock.IN_TILES,
    "content": VMoBAAttn(topk=1, dense_layers=0, dense_steps=0),
}


def of_size(frames: int, height: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(2, 16, frames, height, width, generator=generator)
    return inputs() | {"hidden_states": hidden}


def graphs_over_sizes(
    model: torch.nn.Module, how: str, dynamic: bool | None
) -> tuple[list[int], list[torch.Tensor]]:
    """Number of graphs after each size, and the outputs; sizes that come back compile nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    options = {"fullgraph": True, "dynamic": dynamic, "backend": counter}
    if how == "whole":
        call: Any = torch.compile(model, **options)
    else:
        model.compile_repeated_blocks(**options)
        call = model
    counts, outputs = [], []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for size in SIZES:
            outputs.append(call(**of_size(*size))[0])
            counts.append(counter.frame_count)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size, want in zip(SIZES, outputs, strict=True):
                assert torch.equal(call(**of_size(*size))[0], want)
    assert counter.frame_count == counts[-1]
    return counts, outputs


@functools.cache
def graphs_of_stock(how: str, dynamic: bool | None) -> list[int]:
    return graphs_over_sizes(tiny_wan.transformer(), how, dynamic)[0]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("how", ["whole", "repeated blocks"])
@pytest.mark.parametrize("name", METHODS)
def test_as_many_graphs_over_all_sizes_as_stock(name: str, how: str, dynamic: bool | None) -> None:
    eager, model = tiny_wan.transformer(), tiny_wan.transformer()
    for each in (eager, model):
        diffattn.set_attn_processor(each, METHODS[name])
    counts, outputs = graphs_over_sizes(model, how, dynamic)
    # Blocks of VMoBA are of three kinds.
    kinds = 3 if (name, how) == ("content", "repeated blocks") else 1
    assert counts == [kinds * count for count in graphs_of_stock(how, dynamic)]
    with torch.no_grad():
        for size, out in zip(SIZES, outputs, strict=True):
            torch.testing.assert_close(out, eager(**of_size(*size))[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "how"),
    [("linfusion", "repeated blocks"), ("agent", "repeated blocks"), ("agent", "whole")],
)
def test_methods_that_are_no_mask_need_no_more_graphs(name: str, how: str) -> None:
    """LinFusion has weights in each block; hooks give them to the method."""
    method = {
        "linfusion": LinFusionAttn(mid_dim=3),
        "agent": AgentAttn(cell=(2, 2, 2), dense_steps=0, last_dense_steps=0),
    }[name]
    eager, model = tiny_wan.transformer(), tiny_wan.transformer()
    for each in (eager, model):
        diffattn.set_attn_processor(each, method)
        torch.manual_seed(3)
        for key, weight in each.named_parameters():
            if ".linfusion." in key:
                torch.nn.init.normal_(weight, std=0.1)
    counts, outputs = graphs_over_sizes(model, how, dynamic=True)
    assert counts == graphs_of_stock(how, dynamic=True)
    with torch.no_grad():
        for size, out in zip(SIZES, outputs, strict=True):
            torch.testing.assert_close(out, eager(**of_size(*size))[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["whole", "repeated blocks"])
def test_a_run_with_dense_steps_has_a_graph_of_each_kind_for_all_sizes(how: str) -> None:
    sizes = [(96, 160, 9), (160, 224, 13), (160, 96, 9)]
    counts = []
    for method in (None, replace(SPARSE, dense_steps=1)):
        pipe = tiny_wan.PIPELINES["t2v"]()
        pipe.set_attn_processor(method)
        want = [tiny_wan.run(pipe, *size, steps=2) for size in sizes]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        options = {"fullgraph": True, "dynamic": True, "backend": counter}
        if how == "whole":
            pipe.transformer.compile(**options)
        else:
            pipe.transformer.compile_repeated_blocks(**options)
        counts.append([])
        for size, expected in zip(sizes, want, strict=True):
            torch.testing.assert_close(tiny_wan.run(pipe, *size, steps=2), expected)
            counts[-1].append(counter.frame_count)
    assert counts[1] == [2 * count for count in counts[0]]


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in METHODS), ("mask", True)]
)
def test_compiled_blocks_train_on_all_sizes(name: str, checkpointing: bool) -> None:
    """The backward pass may run in a thread of its own, after a forward of another size."""
    gradients = []
    for compiled in (False, True):
        model = tiny_wan.transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        diffattn.set_attn_processor(model, METHODS[name])
        if compiled:
            torch._dynamo.reset()
            model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="aot_eager")
        found = []
        for size in SIZES[:3]:
            loss = model(**of_size(*size))[0].square().mean()
            if not checkpointing:
                with torch.no_grad():
                    model(**of_size(*SIZES[3]))
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
        gradients.append(found)
    for plain, through in zip(*gradients, strict=True):
        assert any(grad.any() for grad in plain)
        for want, got in zip(plain, through, strict=True):
            torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-4)


def lora(folder: Path, name: str, seed: int) -> Path:
    """A file with a LoRA, also for the modules where tokens enter and leave."""
    model = tiny_wan.transformer()
    torch.manual_seed(seed)
    targets = ["to_q", "to_v", "proj_out", "patch_embedding"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "x")
    model.save_lora_adapter(folder / name, adapter_name="x")
    return folder / name


@pytest.mark.parametrize("how", ["whole", "repeated blocks"])
def test_loras_are_swapped_without_compiling_again(how: str, tmp_path: Path) -> None:
    files = [lora(tmp_path, "one", 5), lora(tmp_path, "two", 6)]
    load = {"adapter_name": "x", "prefix": None, "use_safetensors": True}
    wanted = []
    for file in files:
        eager = tiny_wan.transformer()
        eager.load_lora_adapter(file, **load)
        diffattn.set_attn_processor(eager, stock.NEARBY)
        with torch.no_grad():
            wanted.append([eager(**of_size(*size))[0] for size in SIZES[:4]])
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, stock.IN_TILES)
    model.load_lora_adapter(files[0], **load)
    counter = CompileCounterWithBackend("eager")
    options = {"fullgraph": True, "dynamic": True, "backend": counter}
    if how == "whole":
        model.compile(**options)
    else:
        model.compile_repeated_blocks(**options)
    for number, file in enumerate(files):
        if number:
            model.load_lora_adapter(file, **load, hotswap=True)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=bool(number)):
            for size, want in zip(SIZES, wanted[number], strict=False):
                torch.testing.assert_close(model(**of_size(*size))[0], want, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["whole", "repeated blocks"])
def test_as_many_graphs_as_stock(how: str) -> None:
    stock, _ = graphs(tiny_wan.transformer(), how)
    torch._dynamo.reset()
    eager = tiny_wan.transformer()
    diffattn.set_attn_processor(eager, SPARSE)
    with torch.no_grad():
        want = eager(**inputs())[0]
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, SPARSE)
    count, out = graphs(model, how)
    assert count == stock
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["whole", "repeated blocks"])
def test_attaching_to_another_model_compiles_nothing_again(how: str) -> None:
    """Servers attach while they serve: attach, call, drop, copy and take off."""
    model, other = tiny_wan.transformer(), tiny_wan.transformer()
    diffattn.set_attn_processor(model, SPARSE)
    if how == "whole":
        model.compile(fullgraph=True, backend="eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch.no_grad():
        want = model(**inputs())[0]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for method in (SPARSE, VMoBAAttn(topk=1, dense_layers=1), None, stock.IN_TILES):
            diffattn.set_attn_processor(other, method)
            other(**inputs())
            assert torch.equal(model(**inputs())[0], want)
        copied = copy.deepcopy(other)
        assert torch.equal(model(**inputs())[0], want)
        del other, copied
        gc.collect()
        diffattn.set_attn_processor(tiny_wan.transformer(), SPARSE)
        assert torch.equal(model(**inputs())[0], want)


def test_compiled_attention_trains() -> None:
    grid = TokenGrid(5, 3, 4)
    generator = torch.Generator().manual_seed(0)
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=4)
    serial = remember(method)
    leaves = [torch.randn(2, grid.tokens, 3, 8, generator=generator) for _ in range(3)]
    weight = torch.randn(2, grid.tokens, 3, 8, generator=generator)
    key_mask = torch.rand(2, grid.tokens, generator=generator) < 0.8
    layout = method.layout(grid, torch.device("cpu"))

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, layout, key_mask=key_mask)

    def traced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return traced_attention(q, k, v, grid, serial, key_mask=key_mask)

    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    results = []
    for function in (eager, traced, compiled):
        copies = [x.clone().requires_grad_() for x in leaves]
        out = function(*copies)
        (out * weight).sum().backward()
        results.append([out, *(x.grad for x in copies)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_operator_is_a_good_citizen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=16)
    q, k, v = (torch.randn(1, 24, 2, 8, requires_grad=True, device=device) for _ in range(3))
    torch.library.opcheck(
        torch.ops.diffattn.static_mask_attention.default,
        (q, k, v, None, [3, 2, 4, 0, 0], remember(method), 0.35, backend),
    )


def test_the_other_operators_are_good_citizens_too() -> None:
    """Gradients of attention under a mask, and attention by any method with its gradients."""
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=16)
    size, serial = [3, 2, 4, 0, 0], remember(method)
    used = torch.tensor([*size, 0, 0, 0])
    q, k, v, out, grad = (torch.randn(1, 24, 2, 8) for _ in range(5))
    key_mask = torch.arange(24)[None] < 20
    operators = torch.ops.diffattn
    torch.library.opcheck(
        operators.static_mask_attention_backward.default,
        (grad, q, k, v, out, torch.randn(1, 2, 24), used, key_mask, serial, 0.35, "cpu"),
    )
    source = Whole()  # found for as long as it lives
    whole = remember(source)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        operators.method_attention.default, (*leaves, key_mask, size, whole, None)
    )
    torch.library.opcheck(
        operators.method_attention_backward.default, (grad, q, k, v, used, key_mask, whole, None)
    )
    x = torch.randn(1, 24, 8, requires_grad=True)
    torch.library.opcheck(operators.move_tokens.default, (x, serial, 1, True))


def test_operators_that_look_up_the_running_call_are_kept_out_of_cuda_graphs() -> None:
    names = "static_mask_attention method_attention move_tokens"
    backward = "static_mask_attention_backward method_attention_backward"
    for name in f"{names} {backward}".split():
        operator = getattr(torch.ops.diffattn, name).default
        assert torch.Tag.cudagraph_unsafe in operator.tags


def test_inductor_itself_cuts_a_cuda_graph_at_the_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inductor asks of each kernel whether a graph may hold it; on a CPU the answer is not used."""
    unsafe: dict[str, bool] = {}

    def asked(self: Any, node: Any) -> str:
        operator = getattr(node.node, "op_overload", None)
        if operator is not None:
            unsafe[str(operator)] = is_cudagraph_unsafe_op(node.node)
        return "the CPU has no graphs"

    monkeypatch.setattr(scheduler.Scheduler, "should_partition", asked)
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=4)
    grid, masked, whole = TokenGrid(5, 3, 4), remember(method), Whole()
    serial = remember(whole)

    def attend(q: torch.Tensor) -> torch.Tensor:
        out = traced_attention(q.sin(), q, q, grid, masked)
        out = traced_method(out, q, q, grid, serial)
        return move_tokens(out.flatten(2), serial, 1, True).cos()

    options = {"graph_partition": True, "fx_graph_cache": False}
    q = torch.randn(2, 60, 3, 8)
    torch.compile(attend, fullgraph=True, options=options)(q)
    names = ("static_mask_attention", "method_attention", "move_tokens")
    assert unsafe == {f"diffattn.{name}.default": True for name in names}


class Whole:
    """Attends to every token of a grid."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: TokenGrid,
        *,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return attention(query, key, value, FullMask(grid), scale=scale, key_mask=key_mask)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_gradients_come_from_the_backend_of_the_output(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the device's own kernel was used")

    monkeypatch.setattr(cpu_kernel, "block_sparse_attention", wrong)
    monkeypatch.setattr(cpu_kernel, "block_sparse_attention_gradients", wrong)
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    grid = TokenGrid(3, 4, 4)
    method = RadialAttn(decay_factor=0.0, split_threshold=8, block_size=16)
    serial = remember(method)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, grid.tokens, 2, 8, generator=generator) for _ in range(3)]
    leaves = [x.to(device).requires_grad_() for x in leaves]
    compiled = torch.compile(
        lambda q, k, v: traced_attention(q, k, v, grid, serial),
        fullgraph=True,
        backend="aot_eager",
    )
    out = compiled(*leaves)
    # Compiled code keeps to its backend, so that gradients are those of the output.
    monkeypatch.delenv(BACKEND_VARIABLE)
    weight = torch.randn(out.shape, generator=generator).to(device)
    found = torch.autograd.grad(out, leaves, weight)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want, _ = reference_attention(*exact, method.mask(grid).dense(device))
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    for got, truth in zip(found, torch.autograd.grad(want, exact, weight.double()), strict=True):
        torch.testing.assert_close(got.double(), truth, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_attention_compiles_in_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(monkeypatch) if backend == "triton" else "cpu"
    grid = TokenGrid(3, 4, 4)
    layout = RadialAttn(decay_factor=0.0, split_threshold=8).mask(grid).blocks(16, device=device)
    q, k, v = (torch.randn(1, grid.tokens, 2, 8, device=device) for _ in range(3))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, layout, backend=backend) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
