"""Clips and pictures as the trainer sees them."""

import math
import subprocess
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from diffattn.lora.clips import ClipError, find_clips, read_clip
from diffattn.lora.errors import LoraError

STEP = 10
"""Difference in brightness from one frame to the next."""


def grey_frames(count: int, height: int = 40, width: int = 60) -> list[np.ndarray]:
    """Frame i has brightness i * STEP all over."""
    return [np.full((height, width, 3), i * STEP, np.uint8) for i in range(count)]


def write_mp4(path: Path, frames: list[np.ndarray], fps: float, *options: str) -> Path:
    with imageio.get_writer(
        path, format="FFMPEG", fps=fps, macro_block_size=1, output_params=list(options)
    ) as writer:
        for frame in frames:
            writer.append_data(frame)
    return path


def write_gif(path: Path, frames: list[np.ndarray], delays: list[int]) -> Path:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=delays, loop=0)
    return path


def shown(clip: torch.Tensor) -> list[int]:
    """Which of grey frames each frame of a clip is."""
    levels = (clip.mean(dim=(0, 2, 3)) + 1) * 127.5
    return [round(float(level) / STEP) for level in levels]


class TestFrames:
    @pytest.mark.parametrize(
        ("source", "fps", "count"), [(8, 3, 7), (8, 8, 20), (12, 5, 8), (8, 24, 13), (24, 7.5, 6)]
    )
    def test_a_video_gives_the_frames_shown_at_the_times_asked_for(
        self, tmp_path, source, fps, count
    ):
        path = write_mp4(tmp_path / "a.mp4", grey_frames(20), source)
        clip = read_clip(path, 16, 32, count, fps)
        assert clip.shape == (3, count, 16, 32)
        # Frame i is shown from i / source to (i + 1) / source.
        expected = [math.floor(round(k * source / fps, 9)) for k in range(count)]
        assert shown(clip) == expected

    def test_a_video_with_frames_at_uneven_times_gives_those_shown(self, tmp_path):
        # Ten frames of 0.12 s, then five of 0.24 s, as a phone may take them.
        for index, frame in enumerate(grey_frames(15)):
            Image.fromarray(frame).save(tmp_path / f"{index:02d}.png")
        lasts = [0.12] * 10 + [0.24] * 5
        lines = [f"file '{i:02d}.png'\nduration {seconds}" for i, seconds in enumerate(lasts)]
        (tmp_path / "list.txt").write_text("\n".join(lines))
        path = tmp_path / "a.mp4"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-f", "concat", "-i", tmp_path / "list.txt"]
        subprocess.run(
            [*command, "-fps_mode", "vfr", "-c:v", "libx264", "-pix_fmt", "yuv420p", path],
            check=True,
            capture_output=True,
        )
        assert shown(read_clip(path, 16, 16, 15)) == list(range(15))
        # At 0.22 s and so on; 1.1 s is before frame 10, which comes at 1.2 s.
        assert shown(read_clip(path, 16, 16, 9, 1 / 0.22)) == [0, 1, 3, 5, 7, 9, 10, 11, 12]

    def test_without_a_rate_a_video_gives_every_frame(self, tmp_path):
        path = write_mp4(tmp_path / "a.mp4", grey_frames(11), 8)
        assert shown(read_clip(path, 16, 16, 7)) == list(range(7))
        assert shown(read_clip(path, 16, 16, 11)) == list(range(11))

    def test_a_gif_gives_each_frame_as_long_as_it_is_shown(self, tmp_path):
        # 0 s, 0.1 s, 0.4 s, 0.45 s, to 1.05 s
        path = write_gif(tmp_path / "a.gif", grey_frames(4), [100, 300, 50, 600])
        assert shown(read_clip(path, 16, 16, 10, 10)) == [0, 1, 1, 1, 2, 3, 3, 3, 3, 3]
        assert shown(read_clip(path, 16, 16, 4)) == [0, 1, 2, 3]

    def test_a_gif_without_delays_shows_ten_frames_a_second(self, tmp_path):
        path = write_gif(tmp_path / "a.gif", grey_frames(4), [0, 0, 0, 0])
        assert shown(read_clip(path, 16, 16, 2, 5)) == [0, 2]

    def test_a_picture_is_a_clip_of_one_frame(self, tmp_path):
        path = tmp_path / "a.png"
        Image.fromarray(grey_frames(4)[3]).save(path)
        for fps in (None, 24):
            clip = read_clip(path, 16, 32, 1, fps)
            assert clip.shape == (3, 1, 16, 32)
            assert shown(clip) == [3]


class TestSize:
    def test_what_is_too_wide_loses_its_sides_and_what_is_too_high_its_ends(self, tmp_path):
        bands = np.zeros((40, 80, 3), np.uint8)
        bands[:, :20, 0] = bands[:, 20:60, 1] = bands[:, 60:, 2] = 255
        for name, picture in (("wide", bands), ("high", bands.transpose(1, 0, 2))):
            path = tmp_path / f"{name}.png"
            Image.fromarray(picture).save(path)
            clip = read_clip(path, 16, 16)
            assert torch.equal(clip[0], torch.full((1, 16, 16), -1.0)), name
            assert torch.equal(clip[1], torch.full((1, 16, 16), 1.0)), name
            assert torch.equal(clip[2], torch.full((1, 16, 16), -1.0)), name

    @pytest.mark.parametrize("size", [(7, 13), (13, 7), (97, 101), (40, 61), (41, 60)])
    def test_any_size_is_covered(self, tmp_path, size):
        path = tmp_path / "a.bmp"
        Image.fromarray(grey_frames(6)[5]).save(path)
        clip = read_clip(path, *size)
        assert clip.shape == (3, 1, *size)
        assert clip.unique().tolist() == [pytest.approx(5 * STEP / 127.5 - 1)]

    def test_a_picture_is_turned_as_its_camera_says(self, tmp_path):
        picture = np.zeros((40, 40, 3), np.uint8)
        picture[:20] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by a quarter
        Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
        clip = read_clip(tmp_path / "a.png", 8, 8)
        assert (clip[..., :4] == -1).all()
        assert (clip[..., 4:] == 1).all()

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
    def test_every_kind_of_picture_becomes_colours(self, tmp_path, mode):
        Image.new("RGB", (20, 20), "white").convert(mode).save(tmp_path / "a.png")
        assert torch.equal(read_clip(tmp_path / "a.png", 8, 8), torch.ones(3, 1, 8, 8))


class TestUnusable:
    @pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "a.webm"])
    @pytest.mark.parametrize("content", [b"", b"this is no clip"])
    def test_files_that_are_none(self, tmp_path, capfd, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ClipError, match=r"^cannot read it: .+") as caught:
            read_clip(tmp_path / name, 16, 16)
        # Decoders say much more than why.
        assert len(str(caught.value)) < 200
        assert "\n" not in str(caught.value)
        assert capfd.readouterr().err == ""

    def test_files_that_were_cut_off(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (12, 40, 60, 3), dtype=np.uint8)
        frames = list(noise)
        clips = [
            write_mp4(tmp_path / "end.mp4", frames, 8),
            write_mp4(tmp_path / "front.mp4", frames, 8, "-movflags", "+faststart"),
            write_gif(tmp_path / "a.gif", frames, [100] * 12),
        ]
        Image.fromarray(frames[0]).save(tmp_path / "a.png")
        for path in (*clips, tmp_path / "a.png"):
            count = 1 if path.suffix == ".png" else 12
            read_clip(path, 16, 16, count)
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
            with pytest.raises(ClipError):
                read_clip(path, 16, 16, count)

    def test_a_file_that_is_gone(self, tmp_path):
        with pytest.raises(ClipError, match=r"cannot read it: .*No such file"):
            read_clip(tmp_path / "a.png", 16, 16)

    def test_clips_that_are_too_short(self, tmp_path):
        path = write_mp4(tmp_path / "a.mp4", grey_frames(8), 8)
        assert read_clip(path, 16, 16, 4, 4).shape[1] == 4
        message = r"it is over after 1.00 s, but the last of 5 frames at 4 a second is shown at 1.0"
        with pytest.raises(ClipError, match=message):
            read_clip(path, 16, 16, 5, 4)
        with pytest.raises(ClipError, match="it has 8 frames, but 9 are wanted"):
            read_clip(path, 16, 16, 9)
        Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg")
        for fps in (None, 4):
            with pytest.raises(ClipError, match="it is a picture, but 5 frames are wanted"):
                read_clip(tmp_path / "a.jpg", 16, 16, 5, fps)


class TestFolder:
    def test_clips_come_in_the_order_of_their_names_from_all_folders(self, tmp_path):
        names = ["b.mp4", "a.PNG", "sub/c.gif", "sub/deep/d.webm", "z.jpg"]
        others = ["a.txt", "notes.md", ".hidden.mp4", ".git/e.mp4", "sub/captions.csv"]
        for name in names + others:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "folder.mp4").mkdir()
        found = [path.relative_to(tmp_path).as_posix() for path in find_clips(tmp_path)]
        assert found == sorted(names)

    def test_a_hidden_folder_may_be_asked_for_itself(self, tmp_path):
        folder = tmp_path / ".data"
        folder.mkdir()
        (folder / "a.png").touch()
        assert find_clips(folder) == [folder / "a.png"]

    def test_a_folder_without_clips_and_what_is_no_folder_are_refused(self, tmp_path):
        (tmp_path / "a.txt").touch()
        with pytest.raises(LoraError, match=r"no clips in .*: none of its files ends in \.avi, .*"):
            find_clips(tmp_path)
        with pytest.raises(LoraError, match=r"a\.txt is a file; the data are a folder of clips"):
            find_clips(tmp_path / "a.txt")
        with pytest.raises(LoraError, match="none is not there; the data are a folder of clips"):
            find_clips(tmp_path / "none")
