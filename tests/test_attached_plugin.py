"""The plugin that runs tests with a method attached, on test classes in diffusers' style."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import diffattn
from diffattn.testing.attached import parse_method

TESTS = Path(__file__).parent

# As in diffusers: a configuration of what is tested, mixins of tests, and old unittest classes.
STAND_IN = '''
import copy
import unittest

import diffusers
import pytest
import tiny_families
import tiny_wan
import torch
from tiny_modular import MODULAR
from tiny_pipelines import PIPELINES


class ModelTesterMixin:
    @torch.no_grad()
    def test_determinism(self):
        model = self.model_class(**self.get_init_dict()).eval()
        first = model(**self.get_dummy_inputs(), return_dict=False)[0]
        assert torch.equal(first, model(**self.get_dummy_inputs(), return_dict=False)[0])

    @torch.no_grad()
    def test_from_save_pretrained(self, tmp_path):
        model = self.model_class(**self.get_init_dict()).eval()
        model.save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path)
        first = model(**self.get_dummy_inputs(), return_dict=False)[0]
        second = loaded(**self.get_dummy_inputs(), return_dict=False)[0]
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)

    def test_training(self):
        model = self.model_class(**self.get_init_dict()).train()
        model(**self.get_dummy_inputs(), return_dict=False)[0].mean().backward()
        assert any(p.grad is not None for p in model.parameters())


class TestWanTransformer(ModelTesterMixin):
    model_class = diffusers.WanTransformer3DModel

    def get_init_dict(self):
        return dict(tiny_wan._CHANNELS, in_channels=16, out_channels=16, num_layers=2)

    def get_dummy_inputs(self):
        return {
            "hidden_states": tiny_families.noise(1, 16, 3, 8, 12),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": tiny_families.noise(1, 6, tiny_wan.TEXT_DIM),
        }


class Derived(diffusers.WanTransformer3DModel):
    """A class made after the plugin's hooks."""


class TestDerivedTransformer(TestWanTransformer):
    model_class = Derived


class TestPipeline:
    def get_pipeline(self):
        self.pipe = PIPELINES["ltx"].build()
        return self.pipe

    def test_inference(self):
        assert not hasattr(self, "pipe"), "each run has an instance of its own"
        latents = PIPELINES["ltx"].run(self.get_pipeline())
        want = torch.load(__file__ + ".want")
        torch.testing.assert_close(latents, want, atol=1e-4, rtol=1e-3)

    def test_values_of_another_machine(self):
        assert PIPELINES["ltx"].run(self.get_pipeline()).sum() == 12345

    @pytest.mark.skip(reason="needs an accelerator")
    def test_offload(self):
        raise AssertionError

    @pytest.mark.xfail(strict=True)
    def test_known_failure(self):
        assert PIPELINES["ltx"].run(self.get_pipeline()).sum() == 12345


def test_modular():
    case = MODULAR["wan"]
    assert case.run(case.build()).isfinite().all()


class OldTests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.pipe = PIPELINES["ltx"].build()

    def test_callback(self):
        assert PIPELINES["ltx"].run(self.pipe).isfinite().all()


@pytest.fixture(scope="module")
def shared():
    return tiny_wan.transformer()


def test_stock_processors(shared):
    """Models built in fixtures are apart, too. No attachment may be there without the method."""
    names = {type(p).__module__ for p in shared.attn_processors.values()}
    backends = {str(p._attention_backend) for p in shared.attn_processors.values()}
    assert names == {"diffusers.models.transformers.transformer_wan"}
    assert backends == {"None"}


def test_a_refused_model():
    diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=8, mlp_ratio=1.0,
    )


def test_random_numbers_are_the_same_in_both_runs(tmp_path_factory):
    file = tmp_path_factory.getbasetemp().parent / "drawn"
    drawn = str(torch.rand(()).item())
    assert not file.exists() or file.read_text() == drawn
    file.write_text(drawn)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in, and the value that its test of a pipeline expects."""
    from tiny_pipelines import PIPELINES

    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_stand_in.py").write_text(STAND_IN)
    (folder / "tmp").mkdir()
    want = PIPELINES["ltx"].run(PIPELINES["ltx"].build())
    torch.save(want, folder / "test_stand_in.py.want")
    return folder


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "diffattn.testing.attached"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--rootdir={folder}", "--basetemp=tmp/base",
         "-o", f"pythonpath={TESTS}", *options, "test_stand_in.py"],
        cwd=folder, text=True, capture_output=True, check=False,
    )  # fmt: skip


def outcomes(report: Path) -> dict[str, dict[str, Any]]:
    tests = json.loads(report.read_text("utf-8"))["tests"]
    return {entry["test"].split("::", 1)[1]: entry for entry in tests}


def test_a_full_mask_changes_no_outcome(folder: Path) -> None:
    report = folder / "full.json"
    done = run(folder, "--diffattn-report", str(report), "-rs", "-k", "not stock_processors")
    assert done.returncode == 0, done.stdout + done.stderr
    found = outcomes(report)
    assert json.loads(report.read_text("utf-8"))["regressions"] == []
    sparse = {name: entry["sparse_calls"] for name, entry in found.items()}
    for cls in ("TestWanTransformer", "TestDerivedTransformer"):
        assert sparse[f"{cls}::test_determinism"] == 2 * 2  # two forwards of two layers
        assert sparse[f"{cls}::test_from_save_pretrained"] == 2 * 2
        assert sparse[f"{cls}::test_training"] == 2
    # Two steps of two layers, prompts both in one batch; for Wan's guider one after the other.
    assert sparse["TestPipeline::test_inference"] == sparse["OldTests::test_callback"] == 2 * 2
    assert sparse["test_modular"] == 2 * 2 * 3
    assert found["TestPipeline::test_offload"]["attached"] == "skipped"
    assert found["TestPipeline::test_known_failure"]["attached"] == "skipped"
    other = found["TestPipeline::test_values_of_another_machine"]
    assert (other["stock"], other["attached"], other["attachments"]) == ("failed", None, 0)
    assert "12345" in other["message"]
    refused = found["test_a_refused_model"]
    assert (refused["attached"], refused["attachments"]) == ("passed", 0)
    assert "its self-attention is linear" in refused["refused"][0]
    assert "fails without diffattn too: assert" in done.stdout


def test_a_sparse_mask_is_listed_where_values_change(folder: Path) -> None:
    report = folder / "sparse.json"
    method = '{"type": "gna", "window": 3}'
    chosen = "test_inference or determinism or stock_processors"
    # In processes of their own, as large suites run.
    done = run(
        folder, "-n", "1", "--diffattn-method", method, "--diffattn-report", str(report),
        "-k", chosen,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads(report.read_text("utf-8"))
    assert content["method"]["window"] == 3
    assert content["method"]["dense_steps"] == content["method"]["dense_layers"] == 0
    failing = [
        "test_stand_in.py::TestPipeline::test_inference",
        "test_stand_in.py::test_stock_processors",
    ]
    assert content["regressions"] == failing
    assert "diffattn attached: GNAAttn(" in done.stdout
    assert "2 pass without diffattn, and fail attached" in done.stdout
    assert f"{failing[0]}: AssertionError: Tensor-likes are not close" in done.stdout
    assert all(outcomes(report)[name]["sparse_calls"] for name in (
        "TestPipeline::test_inference", "TestWanTransformer::test_determinism"
    ))  # fmt: skip


def test_methods_are_named_or_written_as_json() -> None:
    assert parse_method("full") == diffattn.DenseAttn(dense_layers=0, dense_steps=0)
    assert parse_method("gna") == diffattn.GNAAttn(dense_layers=0, dense_steps=0)
    given = parse_method('{"type": "radial", "dense_steps": 2}')
    assert (given.type, given.dense_steps, given.dense_layers) == ("radial", 2, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gnaa", "gnaa"),
        ('{"type": "gna", "windows": 3}', "has no parameter 'windows'"),
        ('{"type": ', "Expecting value"),
    ],
)
def test_methods_that_there_are_not(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--diffattn-method", "gnaa"), "--diffattn-method gnaa: "),
        (("--diffattn-report", "absent/report.json"), "there is no folder absent"),
    ],
)
def test_options_that_mean_nothing(folder: Path, options: tuple[str, ...], message: str) -> None:
    done = run(folder, *options)
    assert done.returncode == 4
    assert message in done.stderr
