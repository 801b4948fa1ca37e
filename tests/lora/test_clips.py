"""Clips and pictures as the trainer sees them."""

import itertools
import math
import subprocess
from fractions import Fraction
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from diffattn.lora.clips import ClipError, find_clips, find_others, read_clip, read_shot
from diffattn.lora.errors import LoraError
from diffattn.lora.frames import VIDEOS

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


def encode(path: Path, frames: list[np.ndarray], fps: str, *options: str) -> Path:
    """A video file made by ffmpeg with any options."""
    height, width = frames[0].shape[:2]
    form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps]
    ffmpeg([*form, "-i", "-", *options, path], b"".join(frame.tobytes() for frame in frames))
    return path


def ffmpeg(arguments: list[object], data: bytes = b"") -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(command, check=True, input=data, capture_output=True)


def shown(clip: torch.Tensor, step: int = STEP) -> list[int]:
    """Which of grey frames each frame of a clip is."""
    levels = (clip.mean(dim=(0, 2, 3)) + 1) * 127.5
    return [round(float(level) / step) for level in levels]


H264 = ("-c:v", "libx264", "-qp", "4", "-pix_fmt", "yuv420p")
VP8 = ("-c:v", "libvpx", "-deadline", "realtime", "-crf", "4", "-b:v", "2M")
# A container and its options; the names say the time scale.
CONTAINERS = {
    "mp4": ("a.mp4", *H264),
    "mp4 90000": ("a.mp4", *H264, "-video_track_timescale", "90000"),
    "mp4 12800": ("a.mp4", *H264, "-video_track_timescale", "12800"),
    "mp4 1000": ("a.mp4", *H264, "-video_track_timescale", "1000"),
    "mp4 100": ("a.mp4", *H264, "-bf", "0", "-video_track_timescale", "100"),
    "mov 600": ("a.mov", *H264, "-video_track_timescale", "600"),
    "m4v": ("a.m4v", *H264),
    "mkv": ("a.mkv", *H264),
    "webm": ("a.webm", *VP8),
    "avi": ("a.avi", *H264, "-bf", "2"),
    "avi mpeg4": ("a.avi", "-c:v", "mpeg4", "-q:v", "1"),
}
RATES = ["8", "12.5", "15", "16", "24000/1001", "24", "25", "30000/1001", "30", "50", "60"]


class TestRates:
    """Times in files are rounded to ticks, which no rate has to keep."""

    @pytest.mark.parametrize("container", CONTAINERS)
    def test_a_clip_at_its_own_rate_gives_exactly_its_frames(self, tmp_path, container):
        name, *options = CONTAINERS[container]
        frames = [np.full((32, 32, 3), 5 * i, np.uint8) for i in range(48)]
        for rate in RATES:
            path = encode(tmp_path / name, frames, rate, *options)
            fps = float(Fraction(rate))
            every = list(range(48))
            assert shown(read_clip(path, 16, 16, 48), 5) == every, rate
            assert shown(read_clip(path, 16, 16, 48, fps), 5) == every, rate
            # As people and other programs write the rate.
            assert shown(read_clip(path, 16, 16, 48, round(fps, 2)), 5) == every, rate

    @pytest.mark.parametrize(("source", "fps"), [(24, 8), (24, 12), (30, 10), (60, 15), (30, 12.5)])
    @pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.avi"])
    def test_a_slower_rate_gives_the_frames_shown_at_its_times(self, tmp_path, name, source, fps):
        path = encode(tmp_path / name, grey_frames(25), str(source), *H264)
        count = math.floor(24 * fps / source) + 1
        expected = [math.floor(Fraction(k * source) / Fraction(fps)) for k in range(count)]
        assert shown(read_clip(path, 16, 16, count, fps)) == expected

    @pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv"])
    def test_av1(self, tmp_path, name):
        codec = ("-c:v", "libaom-av1", "-cpu-used", "8", "-crf", "5")
        path = encode(tmp_path / name, grey_frames(12), "24", *codec)
        assert shown(read_clip(path, 16, 16, 12, 24)) == list(range(12))

    # What each kind of file usually holds.
    @pytest.mark.parametrize("suffix", VIDEOS)
    def test_every_kind_of_file_that_is_looked_for_is_read(self, tmp_path, suffix):
        codecs = {
            ".flv": ("-c:v", "flv", "-q:v", "1"),
            ".mpeg": ("-c:v", "mpeg2video", "-q:v", "1"),
            ".mpg": ("-c:v", "mpeg1video", "-q:v", "1"),
            ".webm": VP8,
            ".wmv": ("-c:v", "wmv2", "-q:v", "1"),
        }
        path = encode(tmp_path / f"a{suffix}", grey_frames(12), "24", *codecs.get(suffix, H264))
        path = path.rename(path.with_suffix(suffix.upper()))
        assert find_clips(tmp_path) == [path]
        assert shown(read_clip(path, 16, 16, 12, 24)) == list(range(12))

    def test_24_is_not_24000_1001(self, tmp_path):
        frames = [np.full((16, 16, 3), 200 * (i == 1001), np.uint8) for i in range(1010)]
        path = encode(tmp_path / "a.mp4", frames, "24", *H264)
        # After 1001 frames the slower rate has fallen behind by one frame.
        clip = read_clip(path, 16, 16, 1002, 24000 / 1001)
        assert [float(clip[0, k].mean()) > 0 for k in (999, 1000, 1001)] == [False, True, False]

    def test_a_clip_that_was_cut_out_of_another(self, tmp_path):
        whole = encode(tmp_path / "a.mkv", grey_frames(25), "24", *H264, "-g", "5")
        ffmpeg(["-ss", "0.4", "-i", whole, "-c", "copy", "-copyts", tmp_path / "b.mkv"])
        every = shown(read_clip(tmp_path / "b.mkv", 16, 16, 12))
        assert every[0] in (5, 10)
        assert every == list(range(every[0], every[0] + 12))
        assert shown(read_clip(tmp_path / "b.mkv", 16, 16, 12, 24)) == every

    def test_the_rate_of_the_frames_is_given(self, tmp_path):
        def rate(path: Path, count: int, fps: float | None = None) -> float | None:
            return read_shot(path, 16, 16, count, fps).rate

        film = encode(tmp_path / "a.mkv", grey_frames(25), "24000/1001", *H264)
        assert rate(film, 25) == pytest.approx(24000 / 1001, abs=1e-9)
        assert rate(film, 2) == pytest.approx(24000 / 1001, abs=1e-9)
        assert rate(film, 8, 8) == 8
        assert rate(film, 1) is None
        uneven = write_gif(tmp_path / "a.gif", grey_frames(4), [100, 300, 200, 70])
        # Three frames in the 0.6 s from the start of the first to that of the last.
        assert rate(uneven, 4) == pytest.approx(5)
        Image.fromarray(grey_frames(1)[0]).save(tmp_path / "a.png")
        assert rate(tmp_path / "a.png", 1) is None

    def test_the_size_of_the_file_and_the_crop_are_given(self, tmp_path):
        for rows, columns, crop in ((40, 60, (0, 4)), (90, 40, (10, 0)), (16, 16, (0, 0))):
            path = tmp_path / f"{rows}.png"
            Image.fromarray(grey_frames(1, rows, columns)[0]).save(path)
            shot = read_shot(path, 16, 16)
            # Scaled to 16 x 24, 36 x 16 and 16 x 16.
            assert (shot.size, shot.crop) == ((rows, columns), crop)

    def test_a_gif_at_its_own_rate(self, tmp_path):
        # 15 frames a second, in whole hundredths.
        ends = [round(100 * i / 15) for i in range(25)]
        delays = [10 * (b - a) for a, b in itertools.pairwise(ends)]
        path = write_gif(tmp_path / "a.gif", grey_frames(24), delays)
        assert shown(read_clip(path, 16, 16, 24, 15)) == list(range(24))


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


class TestShown:
    """What the file says about how its pixels are shown."""

    def picture(self) -> np.ndarray:
        """Four fields of different brightness, (64, 64, 3)."""
        fields = np.array([[30, 90], [150, 210]], np.uint8).repeat(32, 0).repeat(32, 1)
        return np.repeat(fields[..., None], 3, 2)

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
    @pytest.mark.parametrize("ratio", ["2/1", "1/2"])
    def test_pixels_that_are_not_square(self, tmp_path, name, ratio):
        square = self.picture()
        stored = square[:, ::2] if ratio == "2/1" else square[::2]
        path = encode(tmp_path / name, [stored] * 3, "8", "-vf", f"setsar={ratio}", *H264)
        clip = read_clip(path, 64, 64, 3)
        expected = torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1)
        assert (clip[:, 0] - expected).abs().mean() < 0.1

    @pytest.mark.parametrize("turn", [90, 180, 270])
    def test_a_video_that_is_to_be_turned(self, tmp_path, turn):
        wide = self.picture().repeat(2, 1)  # (64, 128, 3)
        encode(tmp_path / "a.mp4", [wide] * 3, "8", "-vf", "setsar=1/2", *H264)
        path = tmp_path / "b.mp4"
        ffmpeg(["-display_rotation", turn, "-i", tmp_path / "a.mp4", "-c", "copy", path])
        clip = read_clip(path, 64, 64, 3)
        # The number is counter-clockwise.
        expected = np.rot90(self.picture(), turn // 90).copy()
        turned = torch.from_numpy(expected / 127.5 - 1).permute(2, 0, 1)
        assert (clip[:, 1] - turned).abs().mean() < 0.1

    @pytest.mark.parametrize("name", ["a.png", "a.webp"])
    def test_colours_under_transparent_areas_are_not_seen(self, tmp_path, name):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
        pixels[..., 3] = 0
        pixels[8:24, 8:24] = (200, 40, 40, 255)
        pixels[12:20, 12:20] = (0, 0, 0, 51)
        Image.fromarray(pixels).save(tmp_path / name, lossless=True, exact=True)
        said: list[str] = []
        clip = ((read_clip(tmp_path / name, 32, 32, note=said.append) + 1) * 127.5).round()
        assert said == ["transparent areas are shown on white"]
        assert (clip[:, 0, :8] == 255).all()
        assert clip[:, 0, 9, 9].tolist() == [200, 40, 40]
        # A fifth of black, the rest white.
        assert clip[:, 0, 15, 15].tolist() == [204, 204, 204]

    def test_a_palette_with_a_transparent_colour(self, tmp_path):
        picture = Image.new("P", (16, 16), 1)
        picture.putpalette([0, 0, 0, 90, 90, 90])
        picture.paste(0, (0, 0, 8, 16))
        picture.save(tmp_path / "a.png", transparency=1)
        said: list[str] = []
        clip = read_clip(tmp_path / "a.png", 16, 16, note=said.append)
        assert (clip[..., :8] == -1).all()
        assert (clip[..., 8:] == 1).all()
        assert len(said) == 1

    def test_an_opaque_picture_with_an_alpha_channel_says_nothing(self, tmp_path):
        Image.new("RGBA", (16, 16), (10, 20, 30, 255)).save(tmp_path / "a.png")
        read_clip(tmp_path / "a.png", 16, 16, note=pytest.fail)

    def test_a_video_with_transparent_areas(self, tmp_path):
        frames = [np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)] * 3
        frames[0][..., 3] = 0
        form = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", "32x32", "-r", "8", "-i", "-"]
        path = tmp_path / "a.mov"
        ffmpeg([*form, "-c:v", "qtrle", "-pix_fmt", "argb", path], b"".join(map(bytes, frames)))
        said: list[str] = []
        assert (read_clip(path, 32, 32, 3, note=said.append) == 1).all()
        assert said == ["transparent areas are shown on white"]

    @pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
    def test_transparency_that_is_a_second_video(self, tmp_path, codec):
        """VP8 and VP9 have no fourth channel: WebM keeps one beside them."""
        frame = np.empty((32, 48, 4), np.uint8)
        frame[:, :24] = 40, 160, 220, 128
        frame[:, 24:] = 200, 30, 90, 0
        form = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", "48x32", "-r", "8", "-i", "-"]
        encoding = ["-c:v", codec, "-pix_fmt", "yuva420p", "-auto-alt-ref", "0", "-crf", "4"]
        path = tmp_path / "a.webm"
        ffmpeg([*form, *encoding, "-b:v", "2M", path], frame.tobytes() * 3)
        said: list[str] = []
        clip = (read_clip(path, 32, 48, 3, note=said.append) + 1) * 127.5
        half = torch.tensor([148.0, 208.0, 238.0])
        assert (clip[..., 4:20].mean(dim=(1, 2, 3)) - half).abs().max() <= 4
        assert (clip[..., 28:44] - 255).abs().max() <= 4
        assert said == ["transparent areas are shown on white"]

    def test_sixteen_bits(self, tmp_path):
        ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
        Image.fromarray(np.tile(ramp, (32, 1))).save(tmp_path / "a.png")
        clip = read_clip(tmp_path / "a.png", 32, 256)
        assert abs(float(clip.mean())) < 0.01
        assert torch.allclose(clip[0, 0, 5], torch.linspace(-1, 1, 256), atol=1e-3)

    @pytest.mark.parametrize("name", ["a.webp", "a.png"])
    def test_animated_pictures(self, tmp_path, name):
        first, *rest = [Image.fromarray(frame) for frame in grey_frames(10)]
        lossless = {"lossless": True} if name == "a.webp" else {}
        path = tmp_path / name
        first.save(path, save_all=True, append_images=rest, duration=125, **lossless)
        assert shown(read_clip(path, 16, 16, 10)) == list(range(10))
        assert shown(read_clip(path, 16, 16, 5, 4)) == [0, 2, 4, 6, 8]
        assert shown(read_clip(path, 16, 16)) == [0]
        with pytest.raises(ClipError, match="it has 10 frames, but 11 are wanted"):
            read_clip(path, 16, 16, 11)

    def test_colours_as_the_file_states_them(self, tmp_path):
        colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (40, 160, 220)]
        for matrix, tag in (("bt709", "bt709"), ("bt601", "smpte170m")):
            for colour in colours:
                filters = f"scale=out_color_matrix={matrix}:out_range=tv,format=yuv420p"
                filters += f",setparams=colorspace={tag}:range=tv"
                frame = np.full((32, 32, 3), colour, np.uint8)
                path = encode(tmp_path / "a.mp4", [frame] * 2, "8", "-vf", filters, *H264)
                read = (read_clip(path, 32, 32, 2).mean(dim=(1, 2, 3)) + 1) * 127.5
                assert (read - torch.tensor(colour)).abs().max() <= 4, (matrix, colour)

    @pytest.mark.parametrize("container", ["mp4", "mkv", "webm", "avi"])
    @pytest.mark.parametrize(
        ("size", "matrix"),
        [
            ("64x64", "bt601"),
            ("1024x576", "bt601"),
            ("64x720", "bt709"),
            ("1280x64", "bt709"),
            ("1920x1080", "bt709"),
        ],
    )
    def test_colours_of_a_file_that_states_none_are_those_of_its_size(
        self, tmp_path, container, size, matrix
    ):
        name, *options = CONTAINERS[container]
        if container == "webm":
            # The header of VP8 states BT.601 at every size.
            options = ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-crf", "4", "-b:v", "2M"]
        filters = f"scale=out_color_matrix={matrix}:out_range=tv,format=yuv420p"
        filters += ",setparams=colorspace=unknown:range=tv"
        form = ["-f", "lavfi", "-i", f"color=0x28a0dc:s={size}:r=8:d=0.25,format=rgb24"]
        path = tmp_path / name
        ffmpeg([*form, "-vf", filters, *options, path])
        read = (read_clip(path, 32, 32, 2).mean(dim=(1, 2, 3)) + 1) * 127.5
        assert (read - torch.tensor([40, 160, 220])).abs().max() <= 4


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
        with pytest.raises(
            LoraError, match=r"no clips in .*: none of its files ends in \.3gp, \.avi, .*"
        ):
            find_clips(tmp_path)
        with pytest.raises(LoraError, match=r"a\.txt is a file; the data are a folder of clips"):
            find_clips(tmp_path / "a.txt")
        with pytest.raises(LoraError, match="none is not there; the data are a folder of clips"):
            find_clips(tmp_path / "none")


def test_files_that_are_no_clips_are_known(tmp_path):
    for name in (
        "a.mp4", "a.txt", "sub/b.PNG", "sub/b.txt", "captions.csv", "meta.jsonl", ".hidden/c.vob",
        "d.vob", "d.txt", "sub/b.md",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clips = find_clips(tmp_path)
    assert [path.name for path in clips] == ["a.mp4", "b.PNG"]
    others = [path.relative_to(tmp_path).as_posix() for path in find_others(tmp_path, clips)]
    assert others == ["d.txt", "d.vob", "sub/b.md"]
