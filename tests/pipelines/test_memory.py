"""A run that the device has too little memory for is refused before its weights are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run import loading, memory
from diffattn.pipelines.run.memory import check_memory, free_memory, least_memory
from diffattn.pipelines.run.request import Request
from diffattn.samples.moving_shapes import MODEL_DIR

CPU = torch.device("cpu")
MIB = 1 << 20


def free(patch: pytest.MonkeyPatch, size: int | None) -> None:
    patch.setattr(memory, "free_memory", lambda device: size)


def test_weights_are_those_that_loading_puts_on_the_device() -> None:
    """But for a few small parts that Wan keeps in float32."""
    pipe = loading._from_pretrained(MODEL_DIR, Request("x", model="moving-shapes"), torch.bfloat16)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    sizes = [sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts]
    need = least_memory(Request("x", dtype="bfloat16"), CPU)
    assert need is not None
    assert 0.95 * sum(sizes) < need.weights <= sum(sizes)
    largest = least_memory(Request("x", dtype="bfloat16", offload="model"), CPU)
    assert largest is not None
    assert 0.95 * max(sizes) < largest.weights <= max(sizes)
    group = least_memory(Request("x", dtype="bfloat16", offload="group"), CPU)
    assert group is not None
    assert group.weights == 0


def test_activations_grow_with_tokens_and_shrink_with_the_dtype() -> None:
    small = least_memory(Request("x", height=96, width=96, num_frames=16), CPU)
    large = least_memory(Request("x", height=192, width=96, num_frames=16), CPU)
    half = least_memory(Request("x", height=192, width=96, num_frames=16, dtype="float16"), CPU)
    assert small is not None
    assert large is not None
    assert half is not None
    assert large.tokens == 2 * small.tokens
    assert large.activations == 2 * small.activations == 2 * half.activations
    assert large.video == 2 * small.video == 2 * 3 * 4 * 16 * 192 * 96
    doubled = least_memory(
        Request("x", height=96, width=96, num_frames=16), CPU, lambda size: (2 * size[0], size[1])
    )
    assert doubled == large


@pytest.mark.parametrize("model", ["moving-shapes", str(MODEL_DIR)])
def test_a_run_without_sizes_is_of_the_models_own(model: str) -> None:
    assert least_memory(Request("x", model=model), CPU) == least_memory(
        Request("x", height=96, width=96, num_frames=16), CPU
    )


def test_what_does_not_fit_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("x", height=96, width=96, num_frames=16, device="cpu")
    need = least_memory(request, CPU)
    assert need is not None
    free(monkeypatch, need.total)
    check_memory(request)
    free(monkeypatch, need.total - 1)
    with pytest.raises(UserError) as error:
        check_memory(request)
    said = str(error.value)
    assert said.startswith(
        f"{need.tokens:,} tokens need at least 0.0 GiB of memory (weights 0.0 GiB"
    )
    assert said.endswith(
        "but cpu has 0.0 GiB free: try fewer frames or a smaller size, --dtype bfloat16, or go on"
        " anyway by --no-memory-check"
    )


def test_what_is_not_known_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, None)
    check_memory(Request("x", device="cpu"))
    free(monkeypatch, 0)
    check_memory(Request("x", height=97, width=96, device="cpu"))  # loading refuses the size


def test_integers_keep_their_size_and_variants_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    tensors = {"a": torch.zeros(10, 3), "b": torch.zeros(7, dtype=torch.int8)}
    save_file(tensors, folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(5)}, folder / "diffusion_pytorch_model-00002-of-00002.safetensors")
    save_file({"d": torch.zeros(99)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    assert list(memory._parts(tmp_path, "bfloat16")) == [2 * 35 + 7]


def test_free_memory_of_this_machine() -> None:
    found = free_memory(CPU)
    assert found is None or MIB < found < 1 << 46
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "x", "-o", "{}/a.mp4"],
        ["upscale", "x", "-o", "{}/a.mp4"],
        ["lora", "train", "--prompts", "{}/prompts.txt", "--output", "{}/run"],
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_before_loading(
    command: list[str],
    diffattn: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise UserError("the weights are loaded")

    (tmp_path / "prompts.txt").write_text("a red circle moving right\n")
    free(monkeypatch, 1000)
    monkeypatch.setattr(loading, "_from_pretrained", loads)
    arguments = [part.format(tmp_path) for part in command] + ["--device", "cpu"]
    refused = diffattn(*arguments)
    assert refused.code == 2
    assert "tokens need at least" in refused.err
    gone_on = diffattn(*arguments, "--no-memory-check")
    assert gone_on.code == 2
    assert "the weights are loaded" in gone_on.err
    assert not (tmp_path / "a.mp4").exists()
