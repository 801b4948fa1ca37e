"""The distance of attention outputs against its definition, and the memory that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_training
import tiny_wan
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffattn.lora import attention_distance
from diffattn.lora.attention_distance import attention_distances, attention_outputs
from diffattn.lora.draws import draw_batch


class Site(torch.nn.Module):
    """An attention module in form: a projection, and text tokens beside the video's."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = torch.nn.Linear(6, 6)
        self.joint = joint

    def forward(self, video: Tensor) -> Any:
        out = self.projection(video)
        return (out, video.new_full((2, 3), 7.0)) if self.joint else out


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(2, 5, 6, generator=generator).to(dtype) for _ in range(2))
    return one, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("part", [7, 1 << 22])
def test_values_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype, joint: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_distance, "_PART", part)
    sites = [Site(joint).to(dtype), Site(joint).to(dtype)]
    video, other = inputs(dtype)
    with torch.no_grad(), attention_outputs(sites) as references:
        for site in sites:
            site(other)
    expected = []
    for site, reference in zip(sites, list(references), strict=True):
        distance = F.mse_loss(site.projection(video).double(), reference.double())
        (gradient,) = torch.autograd.grad(0.3 * distance, site.projection.bias)
        expected.append((distance.detach(), gradient))
    with attention_distances(sites, references) as distances:
        for site in sites:
            site(video)
    assert not references
    (0.3 * torch.stack(distances).sum()).backward()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    )
    for site, distance, (value, gradient) in zip(sites, distances, expected, strict=True):
        assert distance.dtype == torch.float32
        torch.testing.assert_close(distance.double(), value, rtol=1e-5, atol=0)
        torch.testing.assert_close(site.projection.bias.grad, gradient, **tolerance)


def test_joint_attention_is_compared_on_the_video() -> None:
    site = Site(joint=True)
    with attention_outputs([site]) as kept:
        site(torch.ones(1, 4, 6))
    assert [tuple(output.shape) for output in kept] == [(1, 4, 6)]


def test_references_that_are_views_are_compared_as_they_are() -> None:
    site = Site(joint=False)
    video, other = inputs(torch.float32)
    whole = torch.stack([other, other]).transpose(1, 3)
    with attention_distances([site], [whole[0].transpose(0, 2)]) as distances:
        out = site(video)
    torch.testing.assert_close(distances[0], F.mse_loss(out, other))


def test_a_second_backward_pass_is_refused() -> None:
    site = Site(joint=False)
    video, other = inputs(torch.float32)
    with attention_distances([site], [other.clone()]) as distances:
        site(video)
    distances[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="distance of attention outputs can be differentiated"):
        distances[0].backward()


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, of those made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def count(self) -> int:
        return sum(size for ref, size in self._known.values() if not ref.expired())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_site_costs_one_tensor_of_its_output(
    dtype: torch.dtype, checkpointing: bool, tmp_path: Path
) -> None:
    """0.72 GiB for Wan 14B at 1280x720x81, of 75,600 tokens with 5,120 channels in bfloat16."""
    batch_size, size = 2, (5, 24, 16)
    tokens = size[0] * (size[1] // 2) * (size[2] // 2)
    kept = []
    for weight in (0.0, 0.5):
        pipe = tiny_wan.PIPELINES["t2v"]()
        pipe.transformer.to(dtype)
        made = tiny_training.trainer(
            tmp_path / str(weight),
            pipe=pipe,
            dropout=0.0,
            prediction=0.5,
            attention_output=weight,
            gradient_checkpointing=checkpointing,
        )
        clips = tiny_training.clips(2, (16, *size))
        batch = draw_batch(
            clips,
            tiny_training.EMPTY,
            made.recipe,
            pipe.scheduler,
            made.settings,
            range(batch_size),
        )
        with Live() as live:
            losses = made._student(batch)
            kept.append(live.count())
        losses["loss"].backward()
    channels = pipe.transformer.config.num_attention_heads
    channels *= pipe.transformer.config.attention_head_dim
    a_site = batch_size * tokens * channels * dtype.itemsize
    assert kept[1] - kept[0] == pytest.approx(tiny_wan.LAYERS * a_site, rel=0.01)
