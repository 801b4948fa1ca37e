"""Contact sheets: what a training learns is what is shown."""

from collections.abc import Callable
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from diffattn.lora.captions import CaptionedClip
from diffattn.lora.clips import read_clip
from diffattn.lora.preview import FRAMES, draw_sheet, rows_of
from diffattn.pipelines import cli

CAPTION = "a square that becomes brighter"


def clip(file: Path, count: int = 9, height: int = 48, width: int = 64) -> Path:
    """A video whose frame i is grey of 10 i, beside its caption."""
    frames = np.stack([np.full((height, width, 3), 10 * i, np.uint8) for i in range(count)])
    imageio.imwrite(file, frames, fps=8, codec="libx264", pixelformat="yuv444p")
    file.with_suffix(".txt").write_text(CAPTION)
    return file


def test_rows_hold_the_frames_that_training_reads(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    (row,) = rows_of([CaptionedClip(path, CAPTION)], 32, 32, 7, None)
    read = read_clip(path, 32, 32, 7)
    assert row.caption == CAPTION
    assert row.title == "a.mp4: 64x48, 8 frames a second, frames 1 to 7"
    assert len(row.frames) == FRAMES
    for frame, index in zip(row.frames, (0, 2, 4, 6), strict=True):
        assert frame.shape == (32, 32, 3)
        expected = (read[:, index].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(frame - expected).max() <= 0.5


def test_few_frames_are_shown_once(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    for count in (1, 2, 3):
        (row,) = rows_of([CaptionedClip(path, CAPTION)], 32, 32, count, None)
        assert len(row.frames) == count


def test_clips_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good, short = clip(tmp_path / "a.mp4"), clip(tmp_path / "b.mp4", count=3)
    broken = tmp_path / "c.mp4"
    broken.write_bytes(b"no video")
    said: list[str] = []
    clips = [CaptionedClip(path, CAPTION) for path in (good, short, broken)]
    assert len(rows_of(clips, 32, 32, 5, None, said.append)) == 1
    assert said[0] == f"skipped {short}: it has 3 frames, but 5 are wanted"
    assert said[1].startswith(f"skipped {broken}: cannot read it")


def test_the_sheet_shows_frames_and_captions(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    rows = rows_of([CaptionedClip(path, CAPTION)] * 2, 32, 64, 9, None)
    sheet = np.asarray(draw_sheet(rows)).astype(int)
    half = sheet.shape[0] // 2
    assert np.array_equal(sheet[:half], sheet[half:])
    width = sheet.shape[1] // FRAMES
    for number, frame in enumerate(rows[0].frames):
        middle = sheet[60, number * width + width // 2]
        assert np.abs(middle - frame[16, 32]).max() <= 1
    # Ink below the frames.
    assert (sheet[half - 50 : half] < 128).any()
    plain = np.asarray(draw_sheet([rows[0]])).astype(int)
    other = rows_of([CaptionedClip(path, "another caption " * 40)], 32, 64, 9, None)
    assert np.asarray(draw_sheet(other)).shape[0] > plain.shape[0]


@pytest.mark.parametrize("caption", ["many words " * 60, "ohneleerzeichen" * 40])
def test_long_captions_stay_on_the_sheet(caption: str, tmp_path: Path) -> None:
    rows = rows_of([CaptionedClip(clip(tmp_path / "a.mp4"), caption)], 32, 64, 9, None)
    sheet = np.asarray(draw_sheet(rows)).astype(int)
    below = sheet[130:]
    assert (below < 128).any()
    assert (below[:, -3:] == 255).all()


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `diffattn lora preview` in a folder with three clips."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in "abc":
        clip(Path("data", f"{name}.mp4"), count=20)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(["lora", "preview", "--data", "data", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


class TestCommand:
    def test_it_takes_the_size_of_the_model(self, run: Callable[..., tuple[int, str, str]]) -> None:
        code, out, err = run()
        assert (code, err) == (0, "")
        assert out == "preview.png: 3 clips, 16 frames 96x96\n"
        whole = Image.open("preview.png").size
        code, out, _ = run("--clips", "2", "-o", "two.png", "--num-frames", "4")
        assert out == "two.png: 2 of 3 clips, 4 frames 96x96\n"
        two = Image.open("two.png").size
        assert 3 * two[1] == 2 * whole[1]

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (("-o", "sheet.jpg"), "--output sheet.jpg must end in .png"),
            (("-o", "data"), "--output data must end in .png"),
            (("--height", "95"), "height is 95"),
            (("--clips", "0"), "--clips must be a whole number of at least 1, not 0"),
            (("--fps", "0"), "--fps must be a number of at least 0.01"),
            (("--num-frames", "64"), "none of the 3 clips can be used for 64 frames 96x96"),
            (("--captions", "none.csv"), "none.csv"),
            (("--data", "nowhere"), "nowhere is not there; the data are a folder of clips"),
        ],
    )
    def test_what_is_refused(
        self, run: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], error: str
    ) -> None:
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        line = err.splitlines()[-1]
        assert line.startswith("diffattn: ")
        assert error in line
        assert not Path("preview.png").exists()
