"""Names of outputs, checks before the run, and all-or-none writing."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.outputs import (
    Outputs,
    check_outputs,
    check_writable,
    plan_outputs,
    slug,
    staged,
)

TWO = ["A red circle!", "a red circle"]
RECORDS = ["diffattn_record", "diffattn_upscale_record", "diffattn_picture_record"]


def names(output: str | None, prompts: list[str], several: bool, seed: int = 7) -> list[str]:
    return [str(planned.video) for planned in plan_outputs(output, prompts, several, seed)]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record_of(name: str, kind: str = "diffattn_record") -> str:
    return json.dumps({kind: 1, "settings": {}, "files": {"video": name}})


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
        assert names("new/", TWO, True) == [
            "new/01-a-red-circle-seed7.mp4",
            "new/02-a-red-circle-seed7.mp4",
        ]
        (tmp_path / "there").mkdir()
        assert names("there", ["x y"], False) == ["there/x-y-seed7.mp4"]

    def test_seeds_have_files_of_their_own_in_a_folder(self):
        assert names("sd/", ["x"], False, seed=1) == ["sd/x-seed1.mp4"]
        assert names("sd/", ["x"], False, seed=2**64 - 1) == [f"sd/x-seed{2**64 - 1}.mp4"]

    def test_without_a_name_nothing_is_overwritten(self, tmp_path):
        assert names(None, ["A cat."], False) == ["a-cat.mp4"]
        (tmp_path / "a-cat.mp4.json").touch()
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
            "a/out.png.json",
        ]
        records = {str(Outputs(Path(f"x.{end}")).sidecar) for end in ("mp4", "gif", "png")}
        assert records == {"x.mp4.json", "x.gif.json", "x.png.json"}


class TestClaims:
    """Runs that start together in one folder, without -o."""

    def test_living_runs_have_different_names(self, tmp_path):
        first, second, third = (plan_outputs(None, ["A cat."], False, 0)[0] for _ in range(3))
        assert [str(o.video) for o in (first, second, third)] == [
            "a-cat.mp4",
            "a-cat-2.mp4",
            "a-cat-3.mp4",
        ]
        with staged(second, []) as folder:
            (folder / "a-cat-2.mp4").touch()
        # The name is taken by the file now.
        assert names(None, ["A cat."], False) == ["a-cat-4.mp4"]
        del first, second, third
        gc.collect()
        assert names(None, ["A cat."], False) == ["a-cat.mp4"]
        gc.collect()
        assert listed(tmp_path) == ["a-cat-2.mp4"]

    def test_processes_started_together_have_different_names(self, tmp_path):
        program = (
            "from diffattn.pipelines.run.outputs import plan_outputs\n"
            "o = plan_outputs(None, ['A cat.'], False, 0)\n"
            "print(o[0].video, flush=True); input()"
        )
        runs = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        said = [run.stdout.readline().strip() for run in runs]
        assert sorted(said) == ["a-cat-2.mp4", "a-cat-3.mp4", "a-cat-4.mp4", "a-cat.mp4"]
        for run in runs[:2]:
            run.kill()
        for run in runs[2:]:
            run.communicate("\n")
        for run in runs:
            run.wait()
            run.stdin.close()
            run.stdout.close()
        # Claims of the killed runs stay until the next run.
        assert len(listed(tmp_path)) == 2
        check_writable(Path())
        assert listed(tmp_path) == []

    def test_one_claim_for_processes_that_make_one_video(self, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        other = plan_outputs(None, ["A cat."], False, 0)
        monkeypatch.setenv("RANK", "0")
        assert names(None, ["A cat."], False) == [str(other[0].video)] == ["a-cat.mp4"]


class TestLeftovers:
    def test_the_next_run_removes_those_of_killed_runs_alone(self, tmp_path):
        (tmp_path / ".diffattn-staging-abc").mkdir()
        (tmp_path / ".diffattn-staging-abc/out.mp4").write_text("half a video")
        (tmp_path / ".diffattn-name-a.mp4").touch()
        for other in (".diffattn-settings", "diffattn-staging-x"):
            (tmp_path / other).mkdir()
        (tmp_path / ".diffattn-name-notes").write_text("mine")
        with staged(Outputs(Path("out.mp4")), []) as folder:
            (folder / "out.mp4").touch()
            check_writable(Path())
            assert (folder / "out.mp4").exists()
        assert listed(tmp_path) == [
            ".diffattn-name-notes",
            ".diffattn-settings",
            "diffattn-staging-x",
            "out.mp4",
        ]

    def test_a_run_killed_while_it_writes(self, tmp_path):
        program = (
            "from pathlib import Path\n"
            "from diffattn.pipelines.run.outputs import Outputs, staged\n"
            "with staged(Outputs(Path('out.mp4')), []) as folder:\n"
            "    (folder / 'out.mp4').touch(); print(folder, flush=True); input()"
        )
        run = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with run:
            folder = Path(run.stdout.readline().strip())
            check_writable(Path())
            assert folder.is_dir()
            run.kill()
        check_writable(Path())
        assert listed(tmp_path) == []


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
        message = r"-o out.gif would overwrite out.gif.json, which is read"
        with pytest.raises(UserError, match=message):
            self.check("out.gif", inputs=[Path("../" + Path.cwd().name + "/out.gif.json")])

    @pytest.mark.parametrize(
        "text", ['{"mine":1}', "[1]", "", "not JSON", "\xff", "[" * 100_000, '{"settings": {}}']
    )
    def test_a_record_replaces_records_only(self, tmp_path, text):
        mine = tmp_path / "config.gif.json"
        mine.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError) as caught:
            self.check("config.gif")
        assert str(caught.value) == (
            "-o config.gif would overwrite config.gif.json, which is no record of diffattn: move"
            " it, or choose another name"
        )
        assert mine.read_bytes() == text.encode("latin-1")

    @pytest.mark.parametrize("kind", RECORDS)
    def test_records_of_every_command_are_replaced(self, tmp_path, kind):
        (tmp_path / "out.gif.json").write_text(record_of("out.gif", kind))
        self.check("out.gif")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("x" * 300 + ".mp4", f"-o {'x' * 60}... cannot be a path: File name too long"),
            ("sur\udcff.mp4", r"-o 'sur\udcff.mp4' is no UTF-8 text: choose another name"),
        ],
    )
    def test_names_that_no_file_can_have(self, name, message):
        with pytest.raises(UserError) as caught:
            names(name, ["x"], False)
        assert str(caught.value) == message

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

    def test_a_gif_has_a_limit_below(self):
        with pytest.raises(UserError, match=r"at most 655 s: --fps must be at least 0.0015, not 1"):
            self.check("out.gif", fps=1e-5)

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
            (folder / "out.mp4.json").write_text("{}")
            assert (tmp_path / "out.mp4").read_text() == "old"
        assert (tmp_path / "out.mp4").read_text() == "new"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.mp4.json"]
        assert kept == [Path("out.mp4")]

    def test_the_record_of_the_former_video_goes_with_it(self, tmp_path):
        (tmp_path / "out.mp4").write_text("old")
        (tmp_path / "out.mp4.json").write_text(record_of("out.mp4"))
        # As earlier versions named records.
        (tmp_path / "out.json").write_text(record_of("out.mp4"))
        with staged(Outputs(Path("out.mp4")), []) as folder:
            (folder / "out.mp4").write_text("new")
        assert listed(tmp_path) == ["out.mp4"]

    def test_other_files_beside_the_video_stay(self, tmp_path):
        (tmp_path / "out.json").write_text(record_of("out.gif"))
        (tmp_path / "out.gif.json").write_text(record_of("out.gif"))
        (tmp_path / "out.mp4.json").write_text('{"mine": 1}')
        with staged(Outputs(Path("out.mp4")), []) as folder:
            (folder / "out.mp4").write_text("new")
        assert listed(tmp_path) == ["out.gif.json", "out.json", "out.mp4", "out.mp4.json"]

    def test_a_foreign_record_that_appears_during_the_run_stays(self, tmp_path):
        def run() -> None:
            with staged(Outputs(Path("out.mp4")), []) as folder:
                (folder / "out.mp4").touch()
                (folder / "out.mp4.json").write_text("{}")
                (tmp_path / "out.mp4.json").write_text('{"mine": 1}')

        with pytest.raises(UserError, match="which is no record of diffattn"):
            run()
        assert listed(tmp_path) == ["out.mp4.json"]
        assert (tmp_path / "out.mp4.json").read_text() == '{"mine": 1}'

    def test_what_was_there_comes_back_if_a_file_cannot_move(self, tmp_path, monkeypatch):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/frame_0007.png").touch()
        (tmp_path / "out.png.json").write_text(record_of("out.png"))
        rename = Path.rename

        def refused(self: Path, target: Path) -> Path:
            if self.parent.name.startswith(".diffattn-staging-"):
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refused)

        def run() -> None:
            with staged(Outputs(Path("out.png")), []) as folder:
                (folder / "out").mkdir()
                (folder / "out.png.json").write_text(record_of("out.png"))

        with pytest.raises(UserError, match=r"cannot write out.png: \[Errno 5\]"):
            run()
        assert listed(tmp_path) == ["out", "out.png.json"]
        assert listed(tmp_path / "out") == ["frame_0007.png"]

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
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.mp4.json"]
        assert kept == [Path("out.mp4")]

    def test_a_full_disk_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot write out.mp4: \[Errno 28\] No space left"):
            self.write([], error=OSError(28, "No space left on device"))
        assert list(tmp_path.iterdir()) == []

    def write(self, kept: list[Path], error: BaseException | None = None) -> None:
        with staged(Outputs(Path("out.mp4")), kept) as folder:
            (folder / "out.mp4").touch()
            (folder / "out.mp4.json").touch()
            if error is not None:
                raise error
