"""``diffattn generate --lora A:0.8 --lora B``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import made_lora
import numpy as np
import pytest
from diffusers import WanPipeline
from made_lora import NEARBY

from diffattn.lora.loading import Lora
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.trained_lora import loras_of, with_path

from .conftest import Result

LOCAL = {"type": "gna", "window": [1, 1, 1], "dense_layers": 0, "dense_steps": 0}


def frames(folder: str) -> np.ndarray:
    return np.stack([imageio.imread(path) for path in sorted(Path(folder).glob("*.png"))])


@pytest.fixture
def lora(tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)

    def make(name: str, method: dict[str, Any] = NEARBY, **more: Any) -> Path:
        made_lora.make(WanPipeline.from_pretrained(tiny_wan), Path(name), method, **more)
        return Path(name)

    return make


class TestSpecifications:
    def test_paths_scales_and_experts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert loras_of(None) == []
        assert loras_of("a") == [Lora("a")]
        assert loras_of(("a:0.8", "high=b", "low=c/d:-2")) == [
            Lora("a", 0.8),
            Lora("b", 1.0, "transformer"),
            Lora("c/d", -2.0, "transformer_2"),
        ]
        # A name that is no number is part of the path.
        assert loras_of(r"C:\loras\a") == [Lora(r"C:\loras\a")]

    def test_what_exists_is_a_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a:0.5", "high=a", "b:2"):
            Path(name).mkdir()
        assert loras_of(("a:0.5", "high=a", "high=b:2")) == [
            Lora("a:0.5"),
            Lora("high=a"),
            Lora("b:2", 1.0, "transformer"),
        ]

    @pytest.mark.parametrize("scale", ["nan", "inf", "101", "-1e9"])
    def test_scales_that_make_no_sense(self, scale: str) -> None:
        with pytest.raises(UserError) as error:
            loras_of(f"a:{scale}")
        assert str(error.value) == (
            f"--lora a:{scale}: the scale is {scale}, but must be a number from -100 to 100"
        )

    def test_another_path(self) -> None:
        assert with_path("low=a:0.5", lambda path: f"/x/{path}") == "low=/x/a:0.5"
        assert with_path("a", str.upper) == "A"


class TestGenerate:
    def test_both_count_and_the_run_can_be_repeated(
        self,
        lora: Callable[..., Path],
        generate: Callable[..., Result],
        diffattn: Callable[..., Result],
        record: Callable[[str], Any],
    ) -> None:
        lora("a"), lora("b", rank=3)
        two = ["--lora", "a:0.8", "--lora", "b:-0.5"]
        result = generate("a cat", "-o", "two.png", *two)
        assert result.code == 0, result.err
        assert "the LoRA was trained under gna (" in result.out
        kept = record("two.json")["settings"]["lora"]
        assert kept == [f"{Path('a').resolve()}:0.8", f"{Path('b').resolve()}:-0.5"]
        assert generate("a cat", "-o", "one.png", "--lora", "a:0.8").code == 0
        assert (frames("two") != frames("one")).any()
        assert diffattn("generate", "--from", "two.png.json", "-o", "again.png").code == 0
        assert (frames("two") == frames("again")).all()

    def test_a_scale_of_zero_is_no_lora(
        self, lora: Callable[..., Path], generate: Callable[..., Result]
    ) -> None:
        lora("a")
        assert generate("a cat", "-o", "zero.png", "--lora", "a:0").code == 0
        method = Path("method.json")
        method.write_text(json.dumps(NEARBY))
        assert generate("a cat", "-o", "none.png", "--attn-config", method).code == 0
        assert (frames("zero") == frames("none")).all()

    def test_methods_that_differ(
        self, lora: Callable[..., Path], generate: Callable[..., Result]
    ) -> None:
        lora("a"), lora("b", LOCAL)
        two = ["--lora", "a", "--lora", "b"]
        error = generate("a cat", "-o", "two.png", *two).error
        assert "were trained with window=[3, 3, 3] and window=[1, 1, 1], and a run has" in error
        result = generate("a cat", "-o", "two.png", *two, "--attn", "radial")
        assert result.code == 0, result.err
        for name in ("a", "b"):
            place = Path(name).resolve()
            assert f"the LoRA {place} is off in this run, which attends by radial" in result.out

    def test_an_expert_that_the_model_lacks(
        self, lora: Callable[..., Path], generate: Callable[..., Result]
    ) -> None:
        lora("a")
        error = generate("a cat", "-o", "x.png", "--lora", "low=a").error
        assert error.endswith(
            "was trained for the transformer, not for the transformer_2: give it to the other"
            " expert, or to none by name"
        )

    def test_a_lora_that_is_missing(
        self, lora: Callable[..., Path], generate: Callable[..., Result]
    ) -> None:
        lora("a")
        assert generate("x", "-o", "x.png", "--lora", "a", "--lora", "b:0.5").error == (
            "there is no LoRA at b"
        )
