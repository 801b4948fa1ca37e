"""Devices and offloading, as far as a machine without an accelerator can tell."""

from pathlib import Path

import pytest
import torch

from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run import loading


class FakePipe:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name):
        return lambda *arguments, **options: self.calls.append((name, arguments, options))


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


class TestDevice:
    @pytest.mark.usefixtures("two_gpus")
    def test_the_accelerator_is_the_default(self):
        assert loading.choose_device(None) == torch.device("cuda")
        assert loading.choose_device("cuda:1") == torch.device("cuda:1")
        assert loading.choose_device("cpu:0") == torch.device("cpu")

    @pytest.mark.usefixtures("two_gpus")
    def test_a_device_beyond_the_last(self):
        with pytest.raises(UserError, match="--device cuda:2: there are 2 cuda devices, from 0"):
            loading.choose_device("cuda:2")

    @pytest.mark.usefixtures("two_gpus")
    def test_another_kind_of_accelerator(self):
        with pytest.raises(UserError, match=r"sees no such device here \(there is: cpu, cuda\)"):
            loading.choose_device("xpu")


class TestOffload:
    @pytest.mark.parametrize(
        ("offload", "method"),
        [
            ("none", "to"),
            ("model", "enable_model_cpu_offload"),
            ("group", "enable_group_offload"),
        ],
    )
    def test_each_choice_is_one_call(self, offload, method):
        pipe = FakePipe()
        loading._place(pipe, torch.device("cuda:1"), offload)
        (call,) = pipe.calls
        assert call[0] == method
        assert torch.device("cuda:1") in (*call[1], *call[2].values())


class TestDtype:
    def test_the_vae_stays_in_float32(self, tiny_wan: Path):
        from diffattn.pipelines.run.request import Request

        request = Request("x", model=str(tiny_wan), dtype="bfloat16", device="cpu")
        loaded = loading.load_model(request)
        assert loaded.pipe.transformer.dtype == torch.bfloat16
        assert loaded.pipe.text_encoder.dtype == torch.bfloat16
        assert loaded.pipe.vae.dtype == torch.float32
        assert (loaded.dtype, loaded.device) == ("bfloat16", "cpu")
