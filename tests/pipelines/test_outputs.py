"""Names of outputs, checks before the run, and all-or-none writing."""

import os
import signal
from pathlib import Path

import pytest

from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.outputs import Outputs, check_outputs, plan_outputs, slug, staged

TWO = ["A red circle!", "a red circle"]


def names(output: str | None, prompts: list[str], several: bool) -> list[str]:
    return [str(planned.video) for planned in plan_outputs(output, prompts, several)]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TestNames:
    def test_a_file_keeps_its_name(self):
        assert names("a/out.v2.gif", ["x"], False) == ["a/out.v2.gif"]

    def test_prompts_from_a_file_number_the_file(self):
        assert names("out.mp4", TWO, True) == ["out-01.mp4", "out-02.mp4"]
        assert names("out.mp4", ["x"], True) == ["out-01.mp4"]
        assert names("out.mp4", ["x"] * 100, True)[99] == "out-100.mp4"

    def test_a_folder_takes_numbered_prompts(self, tmp_path):
        assert names("new/", TWO, True) == ["new/01-a-red-circle.mp4", "new/02-a-red-circle.mp4"]
        (tmp_path / "there").mkdir()
        assert names("there", ["x y"], False) == ["there/x-y.mp4"]

    def test_without_a_name_nothing_is_overwritten(self, tmp_path):
        assert names(None, ["A cat."], False) == ["a-cat.mp4"]
        (tmp_path / "a-cat.json").touch()
        assert names(None, ["A cat."], False) == ["a-cat-2.mp4"]
        (tmp_path / "a-cat-2.compare.mp4").touch()
        assert names(None, ["A cat."], False) == ["a-cat-3.mp4"]

    def test_a_name_without_extension_is_refused(self):
        with pytest.raises(UserError, match=r"-o out has no extension: use .mp4, .gif, .png, or"):
            names("out", ["x"], False)

    def test_slugs(self):
        assert slug("  Ein Bär, 2_mal! ") == "ein-bär-2-mal"
        assert slug("../..") == "video"
        assert len(slug("word " * 50)) <= 40

    def test_side_files(self):
        outputs = Outputs(Path("a/out.png"))
        assert [str(path) for path in outputs.files(compare=True)] == [
            "a/out",
            "a/out.dense",
            "a/out.compare",
            "a/out.json",
        ]


class TestChecks:
    def check(self, name: str, inputs: list[Path] | None = None, fps: float | None = None) -> None:
        check_outputs([Outputs(Path(name))], True, fps, inputs or [])

    def test_missing_folders_are_made(self, tmp_path):
        self.check("a/b/out.gif")
        assert (tmp_path / "a/b").is_dir()
        assert list((tmp_path / "a/b").iterdir()) == []

    def test_a_folder_that_cannot_be_written_is_refused(self):
        with pytest.raises(UserError, match=r"cannot write to /proc/self: "):
            self.check("/proc/self/out.gif")

    def test_a_file_in_place_of_a_folder_is_refused(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write to file/deep"):
            self.check("file/deep/out.gif")

    def test_a_folder_in_place_of_the_file_is_refused(self, tmp_path):
        (tmp_path / "out.dense.gif").mkdir()
        with pytest.raises(UserError, match=r"cannot write out.dense.gif: it is a folder"):
            self.check("out.gif")

    def test_frames_do_not_replace_other_files(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/frame_0001.png").touch()
        self.check("out.png")
        (tmp_path / "out/holiday.png").touch()
        with pytest.raises(UserError, match="the folder holds other files"):
            self.check("out.png")

    def test_frames_do_not_replace_a_file(self, tmp_path):
        (tmp_path / "out").touch()
        with pytest.raises(UserError, match="to the folder out: it is a file"):
            self.check("out.png")

    def test_inputs_are_not_overwritten(self):
        with pytest.raises(UserError, match=r"-o out.gif would overwrite out.json, which is read"):
            self.check("out.gif", inputs=[Path("../" + Path.cwd().name + "/out.json")])

    @pytest.mark.parametrize(
        ("name", "hint"), [("out.avi", ""), ("out.mp3", "; did you mean '.mp4'?")]
    )
    def test_unknown_extensions_are_refused(self, name, hint):
        with pytest.raises(UserError) as caught:
            self.check(name)
        assert str(caught.value) == (
            f"cannot write {name}: the extension must be .mp4, .gif or .png{hint}"
        )

    def test_a_gif_has_a_limit(self):
        with pytest.raises(UserError, match=r"at most 50 frames a second, not --fps 60"):
            self.check("out.gif", fps=60)

    def test_no_ffmpeg_is_told_before_the_run(self, monkeypatch):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
        with pytest.raises(UserError, match="no working ffmpeg for MP4 files: pip install"):
            self.check("out.mp4")
        self.check("out.gif")


class TestStaging:
    def test_everything_moves_at_once(self, tmp_path):
        kept: list[Path] = []
        (tmp_path / "out.mp4").write_text("old")
        with staged(Outputs(Path("out.mp4")), kept) as folder:
            (folder / "out.mp4").write_text("new")
            (folder / "out.json").write_text("{}")
            assert (tmp_path / "out.mp4").read_text() == "old"
        assert (tmp_path / "out.mp4").read_text() == "new"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]
        assert kept == [Path("out.mp4")]

    def test_frames_replace_the_old_folder(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/frame_0007.png").touch()
        kept: list[Path] = []
        with staged(Outputs(Path("out.png")), kept) as folder:
            (folder / "out").mkdir()
            (folder / "out/frame_0000.png").touch()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["frame_0000.png"]
        assert kept == [Path("out")]

    def test_an_error_leaves_nothing(self, tmp_path):
        kept: list[Path] = []
        with pytest.raises(KeyboardInterrupt):
            self.write(kept, error=KeyboardInterrupt())
        assert list(tmp_path.iterdir()) == []
        assert kept == []

    def test_an_interrupt_while_files_move_waits(self, tmp_path, monkeypatch):
        rename = Path.rename

        def interrupted_rename(self: Path, target: Path) -> Path:
            os.kill(os.getpid(), signal.SIGINT)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", interrupted_rename)
        kept: list[Path] = []
        with pytest.raises(KeyboardInterrupt):
            self.write(kept)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]
        assert kept == [Path("out.mp4")]

    def test_a_full_disk_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot write out.mp4: \[Errno 28\] No space left"):
            self.write([], error=OSError(28, "No space left on device"))
        assert list(tmp_path.iterdir()) == []

    def write(self, kept: list[Path], error: BaseException | None = None) -> None:
        with staged(Outputs(Path("out.mp4")), kept) as folder:
            (folder / "out.mp4").touch()
            (folder / "out.json").touch()
            if error is not None:
                raise error
