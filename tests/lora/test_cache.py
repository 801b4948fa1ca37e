"""The encoded data: what is in it, when it is made again, and what a kill leaves."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_complete
import tiny_training
import torch
from PIL import Image

from diffattn.lora import cache
from diffattn.lora.cache import CachedClips, fingerprint
from diffattn.lora.captions import CaptionedClip
from diffattn.lora.clips import read_clip
from diffattn.lora.encoding import prepare
from diffattn.lora.errors import LoraError
from diffattn.lora.recipes import recipe_for

HEIGHT, WIDTH, TEXT = 32, 48, 9
CLIPS = 4


def make_clips(folder: Path) -> list[CaptionedClip]:
    """Pictures of noise, with captions."""
    generator = np.random.default_rng(0)
    out = []
    for index in range(CLIPS):
        path = folder / f"{index}.png"
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
        out.append(CaptionedClip(path, f"noise {index}"))
    return out


def prepared(clips: list[CaptionedClip], folder: Path, pipe=None, **changes) -> CachedClips:
    pipe = tiny_complete.wan() if pipe is None else pipe
    recipe = recipe_for(pipe, text_length=changes.pop("text_length", TEXT))
    size = {"height": HEIGHT, "width": WIDTH} | changes
    return prepare(pipe, recipe, clips, folder, **size)


def main() -> None:
    """Prepare the clips of a folder, and be killed in the middle of writing one."""
    folder, victim = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    sync, written = os.fsync, []

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        written.append(descriptor)
        if len(written) == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    prepared(make_clips(folder), folder / "cache")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Encodings:
    """Counts what is encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pipe) -> None:
        self.clips = self.prompts = 0
        encode, encode_prompt = pipe.vae.encode, pipe.encode_prompt

        def count_clip(pixels):
            self.clips += 1
            return encode(pixels)

        def count_prompt(*args, **kwargs):
            self.prompts += 1
            return encode_prompt(*args, **kwargs)

        monkeypatch.setattr(pipe.vae, "encode", count_clip)
        monkeypatch.setattr(pipe, "encode_prompt", count_prompt)


@pytest.fixture
def clips(tmp_path) -> list[CaptionedClip]:
    return make_clips(tmp_path)


class TestContent:
    def test_items_are_the_clips_and_captions_encoded(self, clips, tmp_path):
        pipe = tiny_complete.wan()
        recipe = recipe_for(pipe, text_length=TEXT)
        data = prepared(clips, tmp_path / "cache", pipe)
        assert len(data) == CLIPS
        for clip, item in zip(clips, data, strict=True):
            told = recipe.encode_prompt(pipe, [clip.caption])
            assert item["conditions"].keys() == told.keys()
            for name, value in told.items():
                assert torch.equal(item["conditions"][name], value[0])
            pixels = read_clip(clip.path, HEIGHT, WIDTH)[None]
            seed = int(item["key"][:8], 16)
            drawn = recipe.encode_clip(pipe, pixels, torch.Generator().manual_seed(seed))
            assert torch.equal(item["latents"], drawn[0])
        told = recipe.encode_prompt(pipe, [""])
        assert data.empty.keys() == told.keys()
        assert torch.equal(data.empty["prompt_embeds"], told["prompt_embeds"][0])
        assert data.facts == {"family": "wan", "size": [HEIGHT, WIDTH, 1], "fps": None}
        assert len({tuple(item["latents"].shape) for item in data}) == 1

    def test_a_loader_makes_batches_of_it(self, clips, tmp_path):
        data = prepared(clips, tmp_path / "cache")
        (batch,) = torch.utils.data.DataLoader(data, batch_size=CLIPS)
        assert batch["latents"].shape == (CLIPS, 16, 1, 4, 6)
        assert batch["conditions"]["prompt_embeds"].shape == (CLIPS, TEXT, 16)
        assert batch["key"] == data.keys

    def test_masks_and_half_precision_keep_their_types(self, clips, tmp_path):
        pipe = tiny_complete.COMPLETE["ltx"].build()
        pipe.text_encoder.to(torch.bfloat16)
        item = prepared(clips, tmp_path / "cache", pipe, width=64)[0]
        assert item["latents"].dtype == torch.float32
        assert item["conditions"]["prompt_embeds"].dtype == torch.bfloat16
        assert item["conditions"]["prompt_attention_mask"].dtype == torch.bool
        assert item["conditions"]["prompt_attention_mask"].shape == (TEXT,)


class TestMadeAgain:
    def test_what_is_there_is_not_made_again_wherever_it_lies(self, clips, tmp_path, monkeypatch):
        pipe = tiny_complete.wan()
        first = prepared(clips, tmp_path / "cache", pipe)
        before = files(tmp_path / "cache")
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
        counted = Encodings(monkeypatch, pipe)
        (tmp_path / "moved").mkdir()
        moved = [
            CaptionedClip(clip.path.rename(tmp_path / "moved" / clip.path.name), clip.caption)
            for clip in clips
        ]
        again = prepared(moved, tmp_path / "cache", pipe)
        assert (counted.clips, counted.prompts) == (0, 0)
        assert again.keys == first.keys
        assert files(tmp_path / "cache") == before
        assert {path: path.stat().st_mtime_ns for path in times} == times

    @pytest.mark.parametrize(
        "change", ["caption", "content", "size", "text length", "seed", "fps", "vae", "encoder"]
    )
    def test_what_depends_on_a_change_is_made_again_and_nothing_else(
        self, clips, tmp_path, monkeypatch, change
    ):
        pipe = tiny_complete.wan()
        former = prepared(clips, tmp_path / "cache", pipe).keys
        # Captions and files are one clip's own; the rest is shared.
        expected, changes = CLIPS, {}
        match change:
            case "caption":
                clips[1] = CaptionedClip(clips[1].path, "another")
                expected = 1
            case "content":
                Image.new("RGB", (20, 20), "red").save(clips[2].path)
                expected = 1
            case "size":
                changes["height"] = 48
            case "text length":
                changes["text_length"] = TEXT + 1
            case "seed":
                changes["seed"] = 1
            case "fps":
                changes["fps"] = 8.0
            case "vae":
                with torch.no_grad():
                    pipe.vae.quant_conv.bias[0] += 1e-3
            case "encoder":
                with torch.no_grad():
                    pipe.text_encoder.shared.weight[0] += 1e-3
        counted = Encodings(monkeypatch, pipe)
        data = prepared(clips, tmp_path / "cache", pipe, **changes)
        assert counted.clips == expected
        assert len(set(former) & set(data.keys)) == CLIPS - expected
        # The former data set is still there, should the change be undone.
        assert all((tmp_path / "cache" / f"{key}.safetensors").is_file() for key in former)

    def test_models_are_told_apart_by_any_tensor_and_setting(self):
        pipe = tiny_complete.wan()
        base = fingerprint(pipe.transformer, pipe.scheduler)
        assert base == fingerprint(
            *(getattr(tiny_complete.wan(), n) for n in ("transformer", "scheduler"))
        )
        assert base != fingerprint(pipe.scheduler, pipe.transformer)
        for name, value in list(pipe.transformer.state_dict().items())[::7]:
            stored = value.clone()
            value.mul_(1.01).add_(0.01)
            assert fingerprint(pipe.transformer, pipe.scheduler) != base, name
            value.copy_(stored)
        assert fingerprint(pipe.transformer, pipe.scheduler) == base
        pipe.scheduler.register_to_config(shift=4.0)
        assert fingerprint(pipe.transformer, pipe.scheduler) != base
        # Not by the folder that it came from.
        pipe.scheduler.register_to_config(shift=3.0, _name_or_path="elsewhere")
        assert fingerprint(pipe.transformer, pipe.scheduler) == base


class TestStopped:
    def test_a_kill_leaves_whole_files_and_the_next_run_makes_the_rest(self, tmp_path, monkeypatch):
        victim = 3
        command = [sys.executable, __file__, tmp_path, str(victim)]
        env = os.environ | tiny_training.own_path()
        killed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        folder = tmp_path / "cache"
        with pytest.raises(LoraError, match=r"it has no index\.json, which is written when all"):
            CachedClips(folder)
        left = files(folder)
        whole = {name for name in left if name.endswith(".safetensors") and name[0] != "."}
        assert len(whole) == victim - 1
        assert len(left) == victim  # and the one that was being written

        pipe = tiny_complete.wan()
        counted = Encodings(monkeypatch, pipe)
        data = prepared(make_clips(tmp_path), folder, pipe)
        assert counted.clips == CLIPS - len(whole)
        assert len(data) == CLIPS
        prepared(make_clips(tmp_path), tmp_path / "other", tiny_complete.wan())
        # Nothing half written, and the same as in a run that was not stopped, bit for bit.
        assert files(folder) == files(tmp_path / "other")

    def test_the_index_comes_last(self, clips, tmp_path, monkeypatch):
        pipe, folder = tiny_complete.wan(), tmp_path / "cache"

        def interrupted(self, *args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepared(clips, folder, pipe)
        assert len(files(folder)) == CLIPS + 1
        with pytest.raises(LoraError, match=r"it has no index\.json"):
            CachedClips(folder)
        counted = Encodings(monkeypatch, pipe)
        assert len(prepared(clips, folder, pipe)) == CLIPS
        assert (counted.clips, counted.prompts) == (0, 0)

    @pytest.mark.parametrize("damage", [b"", b"junk", None])
    def test_a_file_that_was_damaged_is_made_again(self, clips, tmp_path, damage):
        folder = tmp_path / "cache"
        keys = prepared(clips, folder).keys
        before = files(folder)
        for key in keys[1:3]:
            path = folder / f"{key}.safetensors"
            path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
        assert prepared(clips, folder).keys == keys
        assert files(folder) == before

    @pytest.mark.parametrize("victim", ["save_file", "fsync"])
    def test_a_full_disk_leaves_nothing_half_written(self, clips, tmp_path, monkeypatch, victim):
        folder = tmp_path / "cache"
        prepared(clips[:2], folder)
        before = files(folder)

        def full(*args, **kwargs):
            if victim == "save_file":
                Path(args[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(
            *((cache, "save_file") if victim == "save_file" else (os, "fsync")), full
        )
        with pytest.raises(
            LoraError, match=r"cannot write .*\.safetensors: .*No space left on dev"
        ):
            prepared(clips, folder)
        assert files(folder) == before
        assert len(CachedClips(folder)) == 2

    def test_a_folder_that_cannot_be_written_to(self, clips, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(LoraError, match=r"cannot write to .*file: "):
            prepared(clips, tmp_path / "file")


class TestUnusableClips:
    def test_they_are_told_and_skipped(self, clips, tmp_path):
        (tmp_path / "bad.png").write_bytes(b"none")
        given = [
            clips[0],
            CaptionedClip(tmp_path / "bad.png", "bad"),
            CaptionedClip(tmp_path / "gone.png", "gone"),
            clips[1],
        ]
        told: list[str] = []
        seen: list[tuple[int, int]] = []
        data = prepared(
            given,
            tmp_path / "cache",
            report=told.append,
            progress=lambda done, of: seen.append((done, of)),
        )
        assert len(data) == 2
        assert seen == [(i, 4) for i in range(1, 5)]
        assert [line.replace(str(tmp_path), "DATA").split(":")[0] for line in told] == [
            "skipped DATA/bad.png",
            "skipped DATA/gone.png",
        ]
        assert re.search("cannot read it: cannot identify image file", told[0])
        assert told[1].endswith("cannot read it: No such file or directory")

    def test_a_clip_that_the_vae_makes_nan_of_is_skipped(self, clips, tmp_path):
        pipe = tiny_complete.wan()
        real, calls = pipe.vae.encode, []

        def encode(pixels):
            calls.append(1)
            return real(pixels * (torch.inf if len(calls) == 2 else 1))

        pipe.vae.encode = encode
        told: list[str] = []
        data = prepared(clips, tmp_path / "cache", pipe, report=told.append)
        assert len(data) == CLIPS - 1
        assert told == [f"skipped {clips[1].path}: the VAE gives NaN or infinity for it in float32"]

    @pytest.mark.parametrize("caption", ["noise 2", ""])
    def test_a_caption_that_the_text_encoder_makes_nan_of_stops(self, clips, tmp_path, caption):
        pipe = tiny_complete.wan()
        real = pipe.encode_prompt

        def encode_prompt(prompt, **arguments):
            embeds, none = real(prompt, **arguments)
            return embeds.half() * (torch.inf if prompt in (caption, [caption]) else 1), none

        pipe.encode_prompt = encode_prompt
        message = (
            f"the text encoder gives NaN or infinity for the caption '{caption}', as"
            " prompt_embeds in float16: load it in float32 or bfloat16"
        )
        with pytest.raises(LoraError, match=message):
            prepared(clips, tmp_path / "cache", pipe)

    def test_without_one_that_can_be_used_there_is_no_data_set(self, clips, tmp_path):
        told: list[str] = []
        with pytest.raises(LoraError, match="none of the 4 clips can be used for 5 frames"):
            prepared(clips, tmp_path / "cache", num_frames=5, report=told.append)
        assert len(told) == CLIPS
        assert told[0].endswith("it is a picture, but 5 frames are wanted")
        with pytest.raises(LoraError, match=r"no index\.json"):
            CachedClips(tmp_path / "cache")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"height": 40}, r"height is 40, but this model needs a multiple of 16: try 32 or 48"),
            ({"num_frames": 6}, r"num_frames is 6, but this model needs 4 \* k \+ 1: try 5 or 9"),
            ({"fps": 0.0}, r"fps is 0, but must be above 0"),
        ],
    )
    def test_sizes_that_the_model_cannot_make(self, clips, tmp_path, changes, message):
        with pytest.raises(LoraError, match=message):
            prepared(clips, tmp_path / "cache", **changes)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("part", ["vae", "text encoder"])
    def test_a_pipeline_without_what_encodes(self, clips, tmp_path, part):
        pipe = tiny_complete.wan()
        setattr(pipe, part.replace(" ", "_"), None)
        what = "VAE" if part == "vae" else part
        with pytest.raises(LoraError, match=f"WanPipeline has no {what} to encode .* load it with"):
            prepared(clips, tmp_path / "cache", pipe)
        assert not (tmp_path / "cache").exists()


class TestOpening:
    def test_a_folder_without_a_data_set(self, tmp_path):
        for folder in (tmp_path, tmp_path / "none"):
            with pytest.raises(LoraError, match="there are no prepared clips in "):
                CachedClips(folder)

    def test_a_part_that_was_removed_or_damaged(self, clips, tmp_path):
        data = prepared(clips, tmp_path / "cache")
        path = tmp_path / "cache" / f"{data.keys[2]}.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(
            LoraError, match=r"cannot read .*; remove it and prepare the data again"
        ):
            CachedClips(tmp_path / "cache")[2]
        path.unlink()
        with pytest.raises(LoraError, match=f"1 of 4 clips are missing in .* is {data.keys[2]}"):
            CachedClips(tmp_path / "cache")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot read .*index"),
            ("[]", "is not the index of clips prepared by this version"),
            (json.dumps({"diffattn_clips": 0}), "is not the index of clips prepared by this"),
        ],
    )
    def test_an_index_of_something_else(self, tmp_path, content, message):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(LoraError, match=message):
            CachedClips(tmp_path)


def test_the_package_gives_functions_whatever_was_imported_before():
    import diffattn.lora

    # A module of the same name would take a function's place once it is imported.
    import diffattn.lora.teacher

    for name in diffattn.lora.__all__:
        assert callable(getattr(diffattn.lora, name)), name


if __name__ == "__main__":
    main()


class Refusing(torch.Tensor):
    """A quantised weight as torchao's: tensors behind a wrapper that refuses nearly everything."""

    numbers: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> "Refusing":
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{cls.__name__} refuses {func}")


class Flattening(Refusing):
    """As torchao's newer classes, with torch's protocol for wrappers."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None


class Noted(torch.nn.Parameter):
    """Plain storage with a note, as GGUF's weights."""

    note = "Q4"


@pytest.mark.parametrize("cls", [Refusing, Flattening])
def test_the_fingerprint_of_quantised_weights(cls: type[Refusing]) -> None:
    def model(numbers: int, scale: float) -> torch.nn.Module:
        made = torch.nn.Linear(8, 4, bias=False)
        quantised = cls(torch.full((4, 8), numbers, dtype=torch.int8), torch.full((4,), scale))
        made.weight = torch.nn.Parameter(quantised, requires_grad=False)
        made.config = {}
        return made

    prints = [fingerprint(model(*values)) for values in ((3, 0.5), (3, 0.5), (4, 0.5), (3, 0.6))]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_the_fingerprint_of_storage_with_a_note() -> None:
    made = torch.nn.Linear(8, 4, bias=False)
    made.config = {}
    plain = fingerprint(made)
    made.weight = Noted(made.weight.detach())
    assert fingerprint(made) == plain


# The sides of a clip, and of a tile; CogVideoX's own tiles are of 240 x 360 pixels.
SIZES = {
    "wan": (96, 64),
    "wan-ti2v-5b": (96, 64),
    "hunyuanvideo": (96, 64),
    "ltx": (96, 64),
    "mochi": (96, 64),
    "cogvideox-2b": (368, None),
    "flux": (48, 32),
    "flux.2": (96, 64),
    "qwen-image": (96, 64),
    "sd3": (48, 32),
    "sdxl": (48, 32),
}


class TestTiles:
    @pytest.mark.parametrize("name", SIZES)
    def test_large_clips_are_encoded_in_tiles_unless_that_is_off(self, name, clips, tmp_path):
        side, tile = SIZES[name]
        case = tiny_complete.COMPLETE[name]
        pipe = case.build()
        recipe = recipe_for(pipe, text_length=case.text_length)
        for setting in ("tile_sample_min_height", "tile_sample_min_width", "tile_sample_min_size"):
            if tile is not None and hasattr(pipe.vae, setting):
                setattr(pipe.vae, setting, tile)
        for setting in ("tile_sample_stride_height", "tile_sample_stride_width"):
            if tile is not None and hasattr(pipe.vae, setting):
                setattr(pipe.vae, setting, tile // 2)
        if hasattr(pipe.vae, "tile_latent_min_size"):
            pipe.vae.tile_latent_min_size = tile // pipe.vae_scale_factor
        tiles, in_tiles = [], "_tiled_encode"
        if not hasattr(pipe.vae, in_tiles):
            in_tiles = "tiled_encode"
        real = getattr(pipe.vae, in_tiles)

        def encode(*args, **kwargs):
            tiles.append(1)
            return real(*args, **kwargs)

        setattr(pipe.vae, in_tiles, encode)
        shapes = []
        for tiling, before in ((True, False), (False, True), (True, True)):
            pipe.vae.use_tiling = before
            folder = tmp_path / f"{tiling}-{before}"
            data = prepare(pipe, recipe, clips[:1], folder, side, side, tiling=tiling)
            shapes.append(data[0]["latents"].shape)
            assert data[0]["latents"].isfinite().all()
            assert bool(tiles) == tiling
            assert pipe.vae.use_tiling == before
            tiles.clear()
        assert len(set(shapes)) == 1

    def test_what_was_encoded_otherwise_is_encoded_again(self, clips, tmp_path):
        tiled = prepared(clips, tmp_path / "cache")
        whole = prepared(clips, tmp_path / "cache", tiling=False)
        assert not set(tiled.keys) & set(whole.keys)

    def test_a_vae_that_knows_no_tiles_is_left_alone(self, clips, tmp_path):
        pipe = tiny_complete.wan()
        del pipe.vae.use_tiling
        pipe.vae.enable_tiling = None
        with pytest.raises(AttributeError, match="use_tiling"):
            pipe.vae.encode(torch.zeros(1, 3, 1, 32, 48))
        pipe.vae._encode = lambda pixels: torch.zeros(1, 32, 1, 4, 6)
        assert len(prepared(clips, tmp_path / "cache", pipe)) == CLIPS
