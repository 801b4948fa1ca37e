"""The adaptation script from its arguments to its files."""

from pathlib import Path

import imageio.v3 as imageio
import pytest

from diffattn.lora.adapter import LORA_FILE, read_record
from diffattn.lora.checkpoint import alone_in
from diffattn.lora.trainer import Trainer
from diffattn.samples import adapt_bundled_model as script


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "_CLIPS", 1)
    monkeypatch.setattr(script, "_SAMPLING_STEPS", 1)


@pytest.mark.usefixtures("_short")
def test_it_writes_videos_and_a_judgement_and_goes_on_after_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(trainer: Trainer, **_: object) -> None:
        trainer._make_step()
        trainer.save_checkpoint()
        raise KeyboardInterrupt

    arguments = ["--output", str(tmp_path), "--steps", "2", "--prompts", "1", "--rank", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", interrupted)
        assert script.main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "adapt_bundled_model: interrupted: the same command goes on from the last checkpoint"
    )
    assert script.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "training from step 1 to 2" in printed
    text = (tmp_path / script.SUMMARY_FILE).read_text()
    assert text in printed
    assert "direction right" in text
    assert "Of the distance that the mask makes, " in text
    (video,) = (tmp_path / script.VIDEO_FOLDER).iterdir()
    assert video.name == "00-a-red-circle-moving-up-on-a-blue-backgro.mp4"
    frames = imageio.imread(video)
    # Three videos of 96 x 96 pixels, three times as large, under their labels.
    assert len(frames) == 16
    assert frames.shape[2] > 3 * 288 > 2.5 * frames.shape[1]
    record = read_record(tmp_path / LORA_FILE)
    assert record is not None
    assert record.method["type"] == "radial"
    assert (record.method["dense_layers"], record.method["dense_steps"]) == (0, 0)


def test_the_mask_is_as_dense_as_the_script_says() -> None:
    import diffattn
    from diffattn.methods import from_dict

    grid = diffattn.TokenGrid(16, 12, 12)
    mask = from_dict(script.MASK).for_model("wan2.1", grid).mask(grid)
    assert f"{mask.density:.0%}" == "35%"
    assert "35 %" in (script.__doc__ or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "--prompts is 0, but must be from 1 to 50"),
        (["--prompts", "51"], "--prompts is 51, but must be from 1 to 50"),
        (["--teacher", "-1"], "--teacher is -1, but must be from 0 to 310"),
        (["--steps", "0"], "steps is 0, but must be a whole number of at least 1"),
        (["--learning-rate", "nan"], "learning_rate is nan, but must be a number above 0"),
        (["--output", "a_file"], "cannot write to a_file: File exists"),
    ],
)
def test_bad_settings_are_one_line_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    monkeypatch.setattr(script, "load_pipeline", None)
    assert script.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"adapt_bundled_model: {message}")


def test_a_folder_in_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "load_pipeline", None)
    with alone_in(tmp_path):
        assert script.main(["--output", str(tmp_path)]) == 2
    assert "is in use: process " in capsys.readouterr().err
