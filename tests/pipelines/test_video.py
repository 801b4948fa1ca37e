"""The three formats, read back; and a writer that does nothing, or something else."""

import subprocess
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from diffattn.lora.frames import read_frames
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.video import check_format, write_picture, write_video

COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (40, 160, 220),
    (255, 255, 255),
    (0, 0, 0),
    (200, 120, 90),
    (128, 128, 128),
]
# The luma weights of red and blue, and how ffmpeg names the matrix, by size.
SIZES = {
    (96, 96): ((0.299, 0.114), "smpte170m"),
    (576, 1024): ((0.299, 0.114), "smpte170m"),
    (720, 1280): ((0.2126, 0.0722), "bt709"),
    (1088, 608): ((0.2126, 0.0722), "bt709"),
}


@pytest.fixture
def clip() -> np.ndarray:
    """Seven frames in which a light square moves right, (7, 32, 48, 3)."""
    frames = np.full((7, 32, 48, 3), (20, 40, 160), np.uint8)
    for index, frame in enumerate(frames):
        frame[8:24, 4 * index : 4 * index + 16] = (240, 200, 40)
    return frames


def test_mp4_keeps_frames_size_and_rate(tmp_path, clip):
    path = tmp_path / "out.mp4"
    write_video(path, clip, 12)
    read = iio.imread(path, plugin="FFMPEG")
    assert read.shape == clip.shape
    assert np.abs(read.astype(int) - clip).mean() < 6
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 12


def test_mp4_of_odd_sides_is_padded_not_scaled(tmp_path, clip):
    path = tmp_path / "out.mp4"
    write_video(path, clip[:, :31, :47], 12)
    assert iio.imread(path, plugin="FFMPEG").shape == clip.shape


def test_gif_keeps_frames_size_and_rate(tmp_path, clip):
    path = tmp_path / "out.gif"
    write_video(path, clip, 10)
    with Image.open(path) as image:
        assert image.n_frames == 7
        assert image.size == (48, 32)
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0


def test_png_frames_are_exact_and_in_order(tmp_path, clip):
    write_video(tmp_path / "out.png", clip, 10)
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == [f"frame_{i:04d}.png" for i in range(7)]
    assert (np.stack([iio.imread(path) for path in files]) == clip).all()


def test_capitals_in_the_extension_do_not_matter(tmp_path, clip):
    write_video(tmp_path / "OUT.MP4", clip, 10)
    assert iio.imread(tmp_path / "OUT.MP4", plugin="FFMPEG").shape == clip.shape


def test_one_frame_is_a_video(tmp_path, clip):
    for name in ("out.mp4", "out.gif", "out.png"):
        write_video(tmp_path / name, clip[:1], 10)
    assert iio.imread(tmp_path / "out.mp4", plugin="FFMPEG").shape == (1, 32, 48, 3)


def patches(height: int, width: int) -> np.ndarray:
    """Two frames (2, height, width, 3) of vertical stripes, one of each colour."""
    stripe = width // len(COLOURS)
    frame = np.zeros((height, width, 3), np.uint8)
    for index, colour in enumerate(COLOURS):
        frame[:, index * stripe : (index + 1) * stripe] = colour
    return np.stack([frame, frame])


def at_patches(frame: np.ndarray) -> np.ndarray:
    """The pixels in the middle of the stripes, (colours, 3)."""
    stripe = frame.shape[1] // len(COLOURS)
    return frame[frame.shape[0] // 2, stripe // 2 :: stripe][: len(COLOURS)]


class TestColours:
    @pytest.mark.parametrize("size", SIZES)
    def test_they_are_those_of_the_size_and_the_file_says_so(self, tmp_path, size):
        (red, blue), tag = SIZES[size]
        path = tmp_path / "out.mp4"
        write_video(path, patches(*size), 8)
        program = imageio_ffmpeg.get_ffmpeg_exe()
        told = subprocess.run([program, "-i", path], capture_output=True, text=True, check=False)
        primaries = tag if tag == "bt709" else "smpte170m/bt709/bt709"
        assert f"yuv420p(tv, {primaries}" in told.stderr
        # The stored values, converted by the definition of the matrix.
        form = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"]
        command = [program, "-loglevel", "error", "-i", path, *form]
        data = subprocess.run(command, capture_output=True, check=True).stdout
        stored = np.frombuffer(data, np.uint8)
        height, width = size
        luma = stored[: height * width].reshape(height, width)
        halves = stored[height * width :].reshape(2, height // 2, width // 2).astype(float)
        cb, cr = halves.repeat(2, 1).repeat(2, 2)
        y, b, r = (luma - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
        reds, blues = y + 2 * (1 - red) * r, y + 2 * (1 - blue) * b
        greens = (y - red * reds - blue * blues) / (1 - red - blue)
        decoded = 255 * np.stack([reds, greens, blues], -1)
        assert np.abs(at_patches(decoded) - COLOURS).max() <= 4

    @pytest.mark.parametrize("size", SIZES)
    def test_they_survive_being_written_and_read_again(self, tmp_path, size):
        frames = patches(*size)
        for turn in range(3):
            path = tmp_path / f"{turn}.mp4"
            write_video(path, frames, 8)
            frames = np.stack([frame.pixels for frame in read_frames(path)])
            assert np.abs(at_patches(frames[1]).astype(int) - COLOURS).max() <= 4, turn
        other = iio.imread(path, plugin="FFMPEG")
        assert np.abs(at_patches(other[1]).astype(int) - COLOURS).max() <= 4


class TestTiming:
    @pytest.mark.parametrize("fps", [7.5, 8, 12, 15, 16, 23.976, 24, 29.97, 30, 48, 50])
    def test_a_gif_plays_at_its_rate(self, tmp_path, fps):
        frames = np.stack([np.full((8, 8, 3), i, np.uint8) for i in range(100)])
        write_video(tmp_path / "out.gif", frames, fps)
        with Image.open(tmp_path / "out.gif") as image:
            assert image.n_frames == 100
            delays = []
            for number in range(100):
                image.seek(number)
                delays.append(image.info["duration"])
        assert np.mean(delays) == pytest.approx(1000 / fps, rel=0.01)
        assert max(delays) - min(delays) <= 10
        read = list(read_frames(tmp_path / "out.gif"))
        assert 1 / read[0].interval == pytest.approx(fps, rel=0.01)

    def test_a_gif_of_equal_frames_lasts_as_long(self, tmp_path):
        write_video(tmp_path / "out.gif", np.zeros((30, 8, 8, 3), np.uint8), 24)
        with Image.open(tmp_path / "out.gif") as image:
            assert image.info["duration"] == 1250

    def test_a_gif_that_would_last_too_long(self, tmp_path):
        with pytest.raises(UserError, match=r"a GIF cannot show frames at 0\.01 a second"):
            write_video(tmp_path / "out.gif", np.zeros((8, 8, 8, 3), np.uint8), 0.01)

    @pytest.mark.parametrize("fps", [0.5, 7.5, 16, 23.976, 24000 / 1001, 29.97, 60])
    def test_an_mp4_has_the_rate_that_was_asked_for(self, tmp_path, clip, fps):
        write_video(tmp_path / "out.mp4", clip, fps)
        read = list(read_frames(tmp_path / "out.mp4"))
        assert len(read) == 7
        assert 1 / read[0].interval == pytest.approx(fps, rel=1e-4)


# Shell scripts in place of ffmpeg; "$real" is ffmpeg. The first call encodes, the second decodes.
ENCODING = 'case "$*" in *rawvideo*) {} ;; *) exec "$real" "$@" ;; esac'
CUT = """"$real" "$@"; for last; do :; done; f="${last#file:}"
    head -c 900 "$f" > "$f.cut"; mv "$f.cut" "$f"; exit 0"""
SMALLER = """"$real" "$@"; for last; do :; done; f="${last#file:}"
    "$real" -loglevel error -i "$f" -s 24x32 "$f.mp4"; mv "$f.mp4" "$f"; exit 0"""
BROKEN = {
    "reads all and fails": (
        "cat > /dev/null; echo \"[libx264 @ 0x1] Unknown encoder 'libx264'\" >&2; exit 1",
        "ffmpeg failed: Unknown encoder 'libx264' (exit code 1)",
    ),
    "reads some and fails": ("head -c 99 > /dev/null; exit 3", "ffmpeg failed: exit code 3"),
    "is killed": ("kill -9 $$", "ffmpeg failed: ended by SIGKILL"),
    "has no room": (
        ENCODING.format('ulimit -f 8; exec "$real" "$@"'),
        "ffmpeg failed: ended by SIGXFSZ",
    ),
    "does nothing": ("cat > /dev/null; exit 0", "ffmpeg made 0 frames "),
    "leaves out frames": (
        ENCODING.format('exec "$real" -t 0.2 "$@"'),
        "ffmpeg made 2 frames 48x32 instead of 7 frames 48x32",
    ),
    "makes another size": (
        ENCODING.format(SMALLER),
        "instead of 7 frames 48x32",
    ),
    "cuts the file": (ENCODING.format(CUT), "ffmpeg failed: "),
}


class TestFailures:
    """Nothing is reported as written that was not."""

    @pytest.mark.parametrize("way", BROKEN)
    def test_an_ffmpeg_that(self, tmp_path, fake_ffmpeg, way):
        script, message = BROKEN[way]
        fake_ffmpeg(script)
        noise = np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), dtype=np.uint8)
        with pytest.raises(UserError) as caught:
            write_video(tmp_path / "out.mp4", noise, 10)
        assert str(caught.value).startswith("cannot write out.mp4: ")
        assert message in str(caught.value)
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("way", ["reads all and fails", "is killed"])
    def test_it_is_noticed_before_the_run(self, fake_ffmpeg, way):
        script, message = BROKEN[way]
        fake_ffmpeg(script)
        with pytest.raises(UserError) as caught:
            check_format(Path("out.mp4"), None)
        assert str(caught.value) == (
            "no working ffmpeg for MP4 files: pip install imageio-ffmpeg, point"
            " IMAGEIO_FFMPEG_EXE at one, or write .gif or .png"
            f" ({message.removeprefix('ffmpeg failed: ')})"
        )

    @pytest.mark.parametrize("name", ["out.gif", "out.png", "picture.png", "picture.webp"])
    def test_files_that_come_out_cut(self, tmp_path, monkeypatch, clip, name):
        save = Image.Image.save

        def cut(image: Image.Image, file: Path, **options: object) -> None:
            save(image, file, **options)
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2])

        monkeypatch.setattr(Image.Image, "save", cut)
        path, picture = tmp_path / name, Image.fromarray(clip[0])
        is_clip = name.startswith("out")
        with pytest.raises(UserError, match=r"^cannot write \S+: it "):
            write_video(path, clip, 10) if is_clip else write_picture(path, picture)
