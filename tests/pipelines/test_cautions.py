"""Lost quality and saved nothing are said by the program, in one line, before the run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from diffattn import (
    AgentAttn,
    CLEARAttn,
    GNAAttn,
    LinFusionAttn,
    RadialAttn,
    SLAAttn,
    TokenGrid,
    VMoBAAttn,
)

from .conftest import SIZE, Result

PROMPT = "a cat"


def warnings_of(result: Result) -> list[str]:
    assert result.code == 0, result.err
    return [line for line in result.err.splitlines() if line.startswith("warning: ")]


class TestOfMethods:
    GRIDS = (TokenGrid(1, 8, 8), TokenGrid(21, 30, 52), TokenGrid(33, 45, 80))

    @pytest.mark.parametrize("method", [RadialAttn(), GNAAttn(), VMoBAAttn()])
    def test_training_free_methods_have_none(self, method: RadialAttn) -> None:
        assert [method.caution(grid) for grid in self.GRIDS] == [None] * 3

    @pytest.mark.parametrize("method", [LinFusionAttn(), CLEARAttn(), SLAAttn()])
    def test_methods_that_need_training(self, method: LinFusionAttn) -> None:
        assert all("without" in (method.caution(grid) or "") for grid in self.GRIDS)

    def test_few_agents(self) -> None:
        said = AgentAttn().caution(TokenGrid(16, 12, 12))
        assert said == (
            "54 agents for 2304 tokens are few, and details are lost; the paper has 256 or more"
        )
        assert AgentAttn().caution(TokenGrid(21, 30, 52)) is None
        # Agents that would save nothing are not used.
        assert AgentAttn(cell=(1, 1, 1)).caution(TokenGrid(1, 8, 8)) is None


class TestOfRuns:
    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("linfusion", "linfusion: without trained weights pictures lose their composition"),
            ("clear", "clear: without fine-tuned weights pictures lose quality"),
        ],
    )
    def test_an_untrained_method(
        self, method: str, words: str, generate: Callable[..., Result]
    ) -> None:
        said = warnings_of(generate(PROMPT, "-o", "a.gif", "--attn", method))
        assert said[0] == (
            f"warning: {words}; train the model for the method (`diffattn lora train --attn"
            f" {method}`, then --lora), or choose another method"
        )

    @pytest.mark.parametrize("method", ["freeswim", "clear"])
    def test_a_window_that_covers_everything(
        self, method: str, generate: Callable[..., Result]
    ) -> None:
        said = warnings_of(generate(PROMPT, "-o", "a.gif", "--attn", method))
        assert said[-1].startswith(
            f"warning: {method} attends to 100.0% of the token pairs of 2x2x"
        )
        assert "nothing is saved on a grid this small" in said[-1]

    def test_several_prompts_are_told_once(
        self, generate: Callable[..., Result], tmp_path: Path
    ) -> None:
        (tmp_path / "prompts.txt").write_text("one\ntwo\n")
        run = ["--prompts-file", "prompts.txt", "-o", "all/", "--attn", "clear"]
        result = generate(*run, "--steps", 1)
        assert len(warnings_of(result)) == 2
        assert result.out.count("\nattention: clear attention") == 1

    def test_a_window_that_does_not(self, generate: Callable[..., Result]) -> None:
        window = ["--attn", "gna", "--attn-arg", "window=1,full,full"]
        assert warnings_of(generate(PROMPT, "-o", "a.gif", *window)) == []

    def test_dense_attention_is_no_surprise(self, generate: Callable[..., Result]) -> None:
        assert warnings_of(generate(PROMPT, "-o", "a.gif", "--attn", "dense")) == []

    @pytest.mark.parametrize("method", ["vmoba", "linfusion", "agent"])
    def test_a_method_without_a_mask_says_its_cost(
        self, method: str, generate: Callable[..., Result], record: Callable[[str], dict]
    ) -> None:
        result = generate(PROMPT, "-o", "a.gif", "--attn", method)
        assert result.code == 0, result.err
        (line,) = [line for line in result.out.splitlines() if line.startswith("attention: ")]
        assert "of dense attention's FLOPs in a sparse call" in line
        share = record("a.json")["attention"]["share_of_dense_flops"]
        assert f"{share:.1%} over the run" in line
        if method == "vmoba":
            assert "of the token pairs attend, " in line

    @pytest.mark.parametrize("method", ["radial", "gna", "clear", "freeswim"])
    def test_a_mask_says_its_density(self, method: str, generate: Callable[..., Result]) -> None:
        result = generate(PROMPT, "-o", "a.gif", "--attn", method)
        assert f"attention: {method} attention: " in result.out
        assert "% of the token pairs attend, " in result.out


class TestOfUpscaling:
    @pytest.fixture
    def upscale(
        self,
        diffattn: Callable[..., Result],
        tiny_wan: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Callable[..., Result]:
        monkeypatch.chdir(tmp_path)
        size = dict(zip(SIZE[::2], SIZE[1::2], strict=True))
        base = ["--base-height", size["--height"], "--base-width", size["--width"]]
        base += ["--num-frames", size["--num-frames"], "--base-steps", 1]
        return lambda *rest: diffattn("upscale", PROMPT, "--model", tiny_wan, *base, *rest)

    @pytest.mark.parametrize(("steps", "strength", "least"), [(2, 0.3, 4), (1, 0.99, 2)])
    def test_no_step_is_left(
        self, steps: int, strength: float, least: int, upscale: Callable[..., Result]
    ) -> None:
        result = upscale("--steps", steps, "--strength", strength, "-o", "a.gif")
        assert result.error == (
            f"--strength {strength} of {steps} steps leaves no step, and the video would only be"
            f" stretched: give --steps {least} or more, or a larger --strength"
        )
        assert not Path("a.gif").exists()

    @pytest.mark.parametrize("size", [(32, 48), (16, 48)])
    def test_a_size_that_is_no_larger(
        self, size: tuple[int, int], upscale: Callable[..., Result]
    ) -> None:
        large = ["--height", size[0], "--width", size[1], "--steps", 2]
        said = warnings_of(upscale(*large, "-o", "a.gif"))
        assert said[-1].startswith(
            f"warning: the large video is {size[1]}x{size[0]}, no larger than the 48x32 that it is"
        )
