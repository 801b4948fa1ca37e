"""Bad input: one clear line on stderr, exit code 2, no traceback, and no file left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffattn.pipelines import cli
from diffattn.pipelines.run.loading import read_defaults
from diffattn.pipelines.run.refusals import gave_nan
from diffattn.pipelines.run.request import LARGEST_SEED
from diffattn.samples.moving_shapes import MODEL_DIR
from diffattn.samples.moving_shapes.train import _recommended

PROMPT = "a red circle"
# Without the warning that the default method saves nothing on so small a grid.
DENSE = ["--attn", "dense"]


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path):
    before = set(tmp_path.rglob("*"))
    yield
    made = set(tmp_path.rglob("*")) - before
    assert not [path for path in made if path.suffix in {".mp4", ".gif"} or path.name[0] == "."]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--steps", "0"], "--steps must be a whole number of at least 1, not 0"),
            (["--height", "-16"], "--height must be a whole number of at least 1, not -16"),
            (["--seed", "-1"], f"--seed must be a whole number from 0 to {LARGEST_SEED}, not -1"),
            (["--fps", "0"], "--fps must be a number of at least 0.01 and at most 1000, not 0.0"),
            (["--fps", "inf"], "--fps must be a number of at least 0.01 and at most 1000, not inf"),
            (["--guidance-scale", "nan"], "--guidance-scale must be a finite number, not nan"),
            (
                ["--dtype", "float61"],
                "--dtype must be one of float32, bfloat16, float16, not 'float61'; "
                "did you mean 'float16'?",
            ),
            (["--offload", "disk"], "--offload must be one of none, model, group, not 'disk'"),
            (["--lora", " "], "--lora must be text, not ' '"),
            (
                ["--lora-everywhere"],
                "--lora-everywhere is about the LoRA of --lora, which is not given",
            ),
        ],
    )
    def test_values_out_of_range(self, generate, options, message):
        assert generate(PROMPT, "-o", "out.mp4", *options).error == message

    def test_seeds_beyond_64_bits(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--seed", LARGEST_SEED + 1).error
        assert error.startswith("--seed must be a whole number from 0 to")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--steps", "many"], "Invalid value for '--steps'"),
            (["--stepz", "3"], "No such option: --stepz"),
            (["--steps"], "Option '--steps' requires an argument"),
            (["another"], "unexpected extra argument"),
        ],
    )
    def test_misspelt_options(self, generate, options, message):
        assert message in generate(PROMPT, "-o", "out.mp4", *options).error

    def test_an_unknown_command(self, diffattn):
        assert "No such command 'render'" in diffattn("render").error

    def test_a_prompt_is_needed_and_only_one_source_of_it(self, generate, tmp_path):
        (tmp_path / "prompts.txt").write_text("one\n")
        message = "give exactly one of PROMPT, --prompts-file and --from"
        assert generate("-o", "out.mp4").error == message
        assert generate(PROMPT, "--from", "out.json").error == message
        assert generate(PROMPT, "--prompts-file", "prompts.txt").error == message
        assert generate("--prompts-file", "prompts.txt", "--from", "out.json").error == message

    def test_an_empty_prompt(self, generate):
        assert generate(" ", "-o", "out.mp4").error == "the prompt must be text, not ' '"

    def test_comparing_dense_with_dense(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--compare", "--attn", "dense").error
        assert error == "--compare needs a sparse method to compare with dense, not --attn dense"

    def test_prompt_files(self, generate, tmp_path):
        path = tmp_path / "prompts.txt"
        run = ["--prompts-file", "prompts.txt", "-o", "out.mp4"]
        assert generate(*run).error == (
            "cannot read prompt file prompts.txt: No such file or directory"
        )
        path.write_text("\n \n")
        assert generate(*run).error == "prompt file prompts.txt holds no prompt"
        path.write_bytes(b"fine\ncaf\xe9\n")
        assert generate(*run).error == (
            "prompt file prompts.txt is not UTF-8: byte 0xe9 at offset 8 (line 2)"
        )


class TestMethod:
    def test_an_unknown_method(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--attn", "radail").error
        assert error == "unknown method 'radail'; did you mean 'radial'?"

    def test_an_unknown_parameter(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--attn-arg", "decay_facto=1").error
        assert error == "radial has no parameter 'decay_facto'; did you mean 'decay_factor'?"

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("decay_factor=much", "decay_factor is 'much', but must be a number"),
            ("decay_factor=NaN", "decay_factor is nan, but must be a number"),
            ("decay_factor=", "decay_factor is '', but must be a number"),
            ('decay_factor={"a": 1}', "decay_factor is {'a': 1}, but must be a number"),
            ("sink=2", "sink is 2, but must be true or false"),
            ("rule=radial", "rule is 'radial', but must be one of block, paper"),
            ("dense_steps=1.5", "dense_steps is 1.5, but a fraction"),
            ("dense_steps=half", "dense_steps is 'half', but must be a number"),
            ("block_size=0", "block_size is 0, but must be an integer of at least 1"),
            ("decay_factor", "--attn-arg takes name=value, not 'decay_factor'"),
            ("=1", "--attn-arg takes name=value, not '=1'"),
            ("type=dense", "--attn-arg cannot change the method; use --attn"),
        ],
    )
    def test_wrong_values(self, generate, argument, message):
        error = generate(PROMPT, "-o", "out.mp4", "--attn-arg", argument).error
        assert error.startswith(message)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "--attn-config method.json is not JSON: "),
            ("[1]", "--attn-config method.json must give the method as its name"),
            ('{"decay_factor": 1}', "--attn-config method.json must give the method as its name"),
            ('{"type": "radial", "sinks": true}', "radial has no parameter 'sinks'"),
            ('{"type": "radial", "sink": 3}', "sink is 3, but must be true or false"),
        ],
    )
    def test_configurations(self, generate, tmp_path, text, message):
        (tmp_path / "method.json").write_text(text)
        error = generate(PROMPT, "-o", "out.mp4", "--attn-config", "method.json").error
        assert error.startswith(message)

    def test_a_missing_configuration(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--attn-config", "none.json").error
        assert error == "cannot read --attn-config none.json: No such file or directory"

    def test_two_methods(self, generate, tmp_path):
        (tmp_path / "method.json").write_text('{"type": "radial"}')
        both = ["--attn", "radial", "--attn-config", "method.json"]
        assert generate(PROMPT, "-o", "out.mp4", *both).error == (
            "give --attn or --attn-config, not both"
        )


class TestSize:
    @pytest.mark.parametrize("name", ["height", "width"])
    def test_sides_that_do_not_fit(self, generate, name):
        error = generate(PROMPT, "-o", "out.mp4", f"--{name}", "100").error
        assert error == f"{name} is 100, but this model needs a multiple of 16: try 96 or 112"

    def test_a_side_below_the_smallest(self, generate):
        assert generate(PROMPT, "-o", "out.mp4", "--width", "5").error.endswith("16: try 16")

    def test_a_number_of_frames_that_does_not_fit(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--num-frames", "7").error
        assert error == "num_frames is 7, but this model needs 4 * k + 1: try 5 or 9"

    def test_what_the_pipeline_itself_refuses(self, generate, monkeypatch):
        from diffusers import WanPipeline

        def check_inputs(*arguments):
            raise ValueError("not on\nSundays")

        monkeypatch.setattr(WanPipeline, "check_inputs", check_inputs)
        error = generate(PROMPT, "-o", "out.mp4", *DENSE).error
        assert error == "WanPipeline refuses: not on Sundays"


class TestRun:
    def test_too_little_memory(self, generate, monkeypatch):
        from diffusers import WanPipeline

        def check_inputs(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB.")

        monkeypatch.setattr(WanPipeline, "check_inputs", check_inputs)
        error = generate(PROMPT, "-o", "out.mp4", *DENSE).error
        assert error.startswith("out of memory: try fewer frames, a smaller size")

    def test_frames_that_are_no_numbers(self, generate, monkeypatch):
        from diffusers import FlowMatchEulerDiscreteScheduler

        step = FlowMatchEulerDiscreteScheduler.step
        monkeypatch.setattr(
            FlowMatchEulerDiscreteScheduler,
            "step",
            lambda *arguments, **options: (step(*arguments, **options)[0] * torch.nan,),
        )
        # The bars of the steps are on stdout, so that the error is alone.
        error = generate(PROMPT, "-o", "out.mp4", *DENSE).error
        assert error == (
            "the model gave NaN in float32: its weights or its LoRA hold NaN, or a setting such as"
            " --guidance-scale is too large"
        )
        for dtype, words in (
            ("bfloat16", "try --dtype float32"),
            ("float16", "try --dtype float32 or --dtype bfloat16"),
        ):
            assert gave_nan(dtype) == f"the model gave NaN in {dtype}: {words}"

    def test_a_later_prompt_that_fails_keeps_the_earlier(self, generate, tmp_path, monkeypatch):
        from diffusers import WanPipeline

        def check_inputs(self, prompt, *arguments):
            if prompt == "two":
                raise ValueError("no")

        monkeypatch.setattr(WanPipeline, "check_inputs", check_inputs)
        (tmp_path / "prompts.txt").write_text("one\ntwo\n")
        error = generate("--prompts-file", "prompts.txt", "-o", "out.png", *DENSE).error
        assert error == "WanPipeline refuses: no (kept: out-01)"


class TestModel:
    @pytest.fixture
    def broken(self, tiny_wan, tmp_path):
        return Path(shutil.copytree(tiny_wan, tmp_path / "broken"))

    @pytest.mark.parametrize(
        "name", ["./nowhere", "/no/where/at/all", "nowhere", "~/no/where", "a b/c"]
    )
    def test_a_missing_folder(self, generate, name):
        error = generate(PROMPT, "-o", "out.mp4", "--model", name).error
        assert error == f"there is no model folder {name}"

    def test_the_bundled_model_misspelt(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--model", "moving-shape").error
        assert error == "there is no model folder moving-shape; did you mean 'moving-shapes'?"

    def test_a_folder_that_is_no_pipeline(self, generate, tmp_path):
        error = generate(PROMPT, "-o", "out.mp4", "--model", tmp_path).error
        assert error == (
            f"{tmp_path} is not a diffusers pipeline: there is no model_index.json in it"
        )

    def test_one_part_of_a_pipeline(self, generate, tiny_wan):
        part = tiny_wan / "transformer"
        error = generate(PROMPT, "-o", "out.mp4", "--model", part).error
        assert error == f"{part} holds a single model: there is no model_index.json in it"

    def test_a_file(self, generate, tiny_lora):
        error = generate(PROMPT, "-o", "out.mp4", "--model", tiny_lora).error
        assert error == f"{tiny_lora} is a file; --model takes a pipeline's folder"

    def test_a_family_without_a_row(self, generate, broken):
        index = broken / "model_index.json"
        text = index.read_text().replace("WanTransformer3DModel", "SanaTransformer2DModel")
        index.write_text(text.replace("WanPipeline", "SanaPipeline"))
        error = generate(PROMPT, "-o", "out.mp4", "--model", broken).error
        assert error.startswith(
            f"{broken} (SanaPipeline) is of no known model family; there are: Wan 2.1"
        )

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_a_damaged_index(self, generate, broken, text):
        (broken / "model_index.json").write_text(text)
        error = generate(PROMPT, "-o", "out.mp4", "--model", broken).error
        assert error.startswith(f"{broken}: ")
        assert "model_index.json" in error

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"hight": 32}', "generation.json: WanPipeline does not take 'hight'"),
            (
                '{"fps": "fast"}',
                "--fps must be a number of at least 0.01 and at most 1000, not 'fast'",
            ),
            ("[]", "generation.json holds no JSON object"),
        ],
    )
    def test_damaged_defaults(self, generate, broken, text, message):
        (broken / "generation.json").write_text(text)
        assert generate(PROMPT, "-o", "out.mp4", "--model", broken).error.endswith(message)

    def test_missing_weights(self, generate, broken):
        shutil.rmtree(broken / "vae")
        error = generate(PROMPT, "-o", "out.mp4", "--model", broken).error
        assert error.startswith(f"cannot load {broken}: ")

    @pytest.mark.parametrize("part", ["transformer", "vae"])
    def test_weights_that_are_not_there(self, generate, broken, part):
        for path in (broken / part).glob("*.safetensors*"):
            path.unlink()
        error = generate(PROMPT, "-o", "out.mp4", "--model", broken).error
        assert error == (
            f"cannot load {broken}: there is no diffusion_pytorch_model.safetensors in"
            f" {broken / part}"
        )

    def test_damaged_weights(self, generate, broken):
        for path in (broken / "transformer").glob("*.safetensors"):
            path.write_bytes(b"no weights")
        error = generate(PROMPT, "-o", "out.mp4", "--model", broken).error
        assert error.startswith(f"cannot load {broken}: ")

    def test_a_pipeline_that_needs_more_than_a_prompt(self, generate, tiny_wan_image):
        error = generate(PROMPT, "-o", "out.mp4", "--model", tiny_wan_image).error
        assert error.startswith(
            "WanImageToVideoPipeline needs a picture to start from: give --image"
        )

    def test_a_hub_id_offline(self, generate, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        error = generate(PROMPT, "-o", "out.mp4", "--model", "diffattn-tests/none").error
        assert error == (
            "diffattn-tests/none is neither a folder here nor in the local cache of the Hugging "
            "Face hub, and HF_HUB_OFFLINE is set"
        )

    def test_a_hub_id_without_network(self, generate, monkeypatch):
        def model_info(*arguments, **options):
            raise OSError("[Errno -2] Name or service not known")

        monkeypatch.setattr("huggingface_hub.model_info", model_info)
        error = generate(PROMPT, "-o", "out.mp4", "--model", "diffattn-tests/none").error
        assert error == (
            "diffattn-tests/none is neither a folder here nor in the local cache of the Hugging "
            "Face hub, and the hub cannot be reached: [Errno -2] Name or service not known"
        )

    def test_what_is_no_hub_id_either(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--model", "bad..id/-x-").error
        assert error.startswith("bad..id/-x- is neither a folder here nor")


class TestDevice:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--device", "cuda").error
        assert error == "--device cuda: torch sees no such device here (there is: cpu)"

    def test_no_device_at_all(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--device", "gpu").error
        assert error == "--device 'gpu' is no device; try cpu, cuda or cuda:1"

    def test_offload_without_an_accelerator(self, generate):
        options = ["--device", "cpu", "--offload", "group"]
        error = generate(PROMPT, "-o", "out.mp4", *options).error
        assert error == "--offload group needs an accelerator, but the device is cpu"


class TestOutput:
    def test_an_unknown_extension(self, generate):
        assert generate(PROMPT, "-o", "out.avi").error == (
            "cannot write out.avi: the extension must be .mp4, .gif or .png"
        )

    def test_no_extension(self, generate):
        assert generate(PROMPT, "-o", "out").error.startswith("-o out has no extension")

    def test_a_folder_that_cannot_be_written(self, generate):
        error = generate(PROMPT, "-o", "/proc/self/out.mp4").error
        assert error.startswith("cannot write to /proc/self: ")

    def test_no_ffmpeg(self, generate, monkeypatch):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
        error = generate(PROMPT, "-o", "out.mp4").error
        assert error.startswith("no working ffmpeg for MP4 files: pip install imageio-ffmpeg")

    def test_the_configuration_as_output(self, generate, tmp_path):
        (tmp_path / "out.mp4.json").write_text('{"type": "radial"}')
        error = generate(PROMPT, "-o", "out.mp4", "--attn-config", "out.mp4.json").error
        assert error == "-o out.mp4 would overwrite out.mp4.json, which is read here"
        assert (tmp_path / "out.mp4.json").read_text() == '{"type": "radial"}'


class TestLora:
    def test_a_missing_one(self, generate):
        error = generate(PROMPT, "-o", "out.mp4", "--lora", "none.safetensors").error
        assert error == "there is no LoRA at none.safetensors"

    def test_a_file_of_something_else(self, generate, tmp_path):
        path = tmp_path / "lora.safetensors"
        path.write_bytes(b"not a LoRA at all")
        error = generate(PROMPT, "-o", "out.mp4", "--lora", path).error
        assert error.startswith(f"cannot read LoRA {path}: ")

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
    def test_a_pickled_one(self, generate, tmp_path, suffix):
        path = tmp_path / f"lora{suffix}"
        torch.save({"a": torch.zeros(1)}, path)
        for given in (path, tmp_path):
            error = generate(PROMPT, "-o", "out.mp4", "--lora", given).error
            assert error.startswith(f"LoRA {path} is a pickled file ({suffix}), which can run code")

    def test_half_of_one(self, generate, tmp_path):
        path = tmp_path / "lora.safetensors"
        name = "transformer.blocks.0.attn1.to_q.lora_A.weight"
        safetensors.torch.save_file({name: torch.zeros(2, 32)}, path)
        error = generate(PROMPT, "-o", "out.mp4", "--lora", path).error
        assert error.startswith(f"LoRA {path} is half a LoRA: 1 of its 1 tensors have no")

    def test_one_of_nan(self, generate, tiny_lora, tmp_path):
        path = tmp_path / "lora.safetensors"
        tensors = safetensors.torch.load_file(tiny_lora)
        broken = {name: weight * float("nan") for name, weight in tensors.items()}
        safetensors.torch.save_file(broken, path)
        error = generate(PROMPT, "-o", "out.mp4", "--lora", path).error
        assert error.startswith(f"LoRA {path} holds NaN or infinity in ")

    def test_a_broken_header(self, generate, tmp_path):
        path = tmp_path / "lora.safetensors"
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"diffattn": "{no"})
        error = generate(PROMPT, "-o", "out.mp4", "--lora", path).error
        assert error.startswith(
            f"LoRA {path} has a damaged header: its entry 'diffattn' is no JSON"
        )

    def test_a_folder_without_one(self, generate, tmp_path):
        error = generate(PROMPT, "-o", "out.mp4", "--lora", tmp_path).error
        assert error.startswith(f"cannot read LoRA {tmp_path}: ")

    def test_one_of_another_width(self, generate, wide_lora):
        error = generate(PROMPT, "-o", "out.mp4", "--lora", wide_lora).error
        assert error == (
            f"LoRA {wide_lora} does not fit WanTransformer3DModel: blocks.0.attn1.to_k has "
            "in_features 32, the LoRA is for 64"
        )

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (
                "transformer.blocks.7.attn1.to_q",
                "does not fit WanTransformer3DModel: it has no layer blocks.7.attn1.to_q",
            ),
            ("unet.down.attn1.to_q", "does not fit: none of its 2 tensors is for the transformer"),
        ],
    )
    def test_one_of_another_model(self, generate, tmp_path, layer, message):
        path = tmp_path / "lora.safetensors"
        factors = {"A": torch.zeros(2, 32), "B": torch.zeros(32, 2)}
        tensors = {f"{layer}.lora_{side}.weight": value for side, value in factors.items()}
        safetensors.torch.save_file(tensors, path)
        error = generate(PROMPT, "-o", "out.mp4", "--lora", path).error
        assert error == f"LoRA {path} {message}"

    def test_weights_that_are_no_lora(self, generate, tmp_path):
        path = tmp_path / "lora.safetensors"
        safetensors.torch.save_file({"transformer.proj_out.weight": torch.zeros(2, 2)}, path)
        error = generate(PROMPT, "-o", "out.mp4", "--lora", path).error
        assert error.endswith("none of its 1 tensors is for the transformer")


class TestRecord:
    @pytest.fixture
    def recorded(self, tmp_path, monkeypatch):
        """Write a record whose run is never repeated, and return a function that changes it."""
        monkeypatch.chdir(tmp_path)
        settings = {"prompt": "x", "model": "/no/where", "attention": {"type": "radial"}}
        record = {"diffattn_record": 1, "settings": settings, "files": {"video": "out.mp4"}}

        def change(**changes):
            data = {**record, "settings": {**settings, **changes}}
            (tmp_path / "out.json").write_text(json.dumps(data))

        change()
        return change

    def test_a_missing_one(self, diffattn, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        error = diffattn("generate", "--from", "none.json", "-o", "new.mp4").error
        assert error == "cannot read none.json: No such file or directory"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("not JSON", "some.json is not a record of diffattn generate: "),
            ("\xff", "some.json is not a record of diffattn generate: "),
            ("[1]", "some.json is not a record of diffattn generate: it has no"),
            ('{"settings": {}}', "some.json is a record of another version of diffattn"),
            ('{"diffattn_record": 1, "settings": {}}', "the prompt must be text, not ''"),
        ],
    )
    def test_other_files(self, diffattn, tmp_path, monkeypatch, text, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "some.json").write_bytes(text.encode("latin-1"))
        assert diffattn("generate", "--from", "some.json", "-o", "new.mp4").error.startswith(
            message
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"step": 3}, "unknown setting 'step'; did you mean 'steps'?"),
            ({"steps": "3"}, "--steps must be a whole number of at least 1, not '3'"),
            ({"steps": True}, "--steps must be a whole number of at least 1, not True"),
            ({"seed": None}, "--seed must be a whole number from 0 to"),
            ({"compare": "yes"}, "--compare must be true or false, not 'yes'"),
            ({"prompt": 7}, "the prompt must be text, not 7"),
            ({"attention": 7}, "the record must give the method as its name or as an object with"),
            ({"attention": {"type": "radail"}}, "unknown method 'radail'; did you mean 'radial'?"),
            ({"model": 3}, "--model must be text, not 3"),
            ({}, "there is no model folder /no/where"),
        ],
    )
    def test_edited_settings(self, diffattn, recorded, changes, message):
        recorded(**changes)
        assert diffattn("generate", "--from", "out.json", "-o", "new.mp4").error.startswith(message)

    @pytest.mark.parametrize("record", ["out.json", "out.mp4.json"])
    def test_the_recorded_run_is_not_overwritten(self, diffattn, recorded, tmp_path, record):
        # Earlier versions left the video's extension out of the name of its record.
        (tmp_path / "out.json").rename(tmp_path / record)
        model = ("--model", "moving-shapes")
        error = diffattn("generate", "--from", record, *model, "-o", "out.mp4").error
        assert error == "-o out.mp4 would overwrite out.mp4, which is read here"

    def test_a_name_without_the_videos_extension(self, diffattn, recorded, tmp_path):
        (tmp_path / "out.json").rename(tmp_path / "out.mp4.json")
        (tmp_path / "out.gif.json").write_text('{"mine": 1}')
        error = diffattn("generate", "--from", "out.json", "-o", "new.mp4").error
        assert error == (
            "cannot read out.json: No such file or directory; did you mean out.mp4.json?"
        )

    def test_the_record_of_an_upscaled_video(self, diffattn, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "big.mp4.json").write_text('{"diffattn_upscale_record": 1, "settings": {}}')
        error = diffattn("generate", "--from", "big.mp4.json", "-o", "new.mp4").error
        assert error == (
            "big.mp4.json is a record of diffattn upscale: only the runs of diffattn generate can"
            " be repeated by --from"
        )


def test_the_real_command_ends_the_same_way(tmp_path):
    command = [sys.executable, "-m", "diffattn.pipelines", "generate", "x", "-o", "out.avi"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "diffattn: cannot write out.avi: the extension must be .mp4, .gif or .png\n"
    )


class TestText:
    """Bytes that are no UTF-8, names that no file can have, and names that are blank."""

    BYTE = "a red \udcff circle"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([BYTE], "the prompt must be text in UTF-8, not 'a red \\udcff circle'"),
            (
                [PROMPT, "--negative-prompt", BYTE],
                "--negative-prompt must be text in UTF-8, not 'a red \\udcff circle'",
            ),
            (
                [PROMPT, "-o", "sur\udcff.mp4"],
                "--output must be text in UTF-8, not 'sur\\udcff.mp4'",
            ),
            ([PROMPT, "--model", "m\udcff"], "--model must be text in UTF-8, not 'm\\udcff'"),
            ([PROMPT, "--lora", "l\udcff"], "--lora must be text in UTF-8, not 'l\\udcff'"),
            ([PROMPT, "-o", ""], "--output must be text, not ''"),
            ([PROMPT, "--model", ""], "--model must be text, not ''"),
            ([PROMPT, "--lora", ""], "--lora must be text, not ''"),
            (
                [PROMPT, "-o", "x" * 300 + ".mp4"],
                f"--output: the name {'x' * 78}.. has 304 bytes, but files have at most 255",
            ),
            (
                [PROMPT, "-o", "a/" + "\u00e4" * 130 + "/b.mp4"],
                f"--output: the name {chr(0xE4) * 78}.. has 260 bytes, but files have at most 255",
            ),
        ],
        ids=range(10),
    )
    def test_it_is_refused_before_anything_runs(self, diffattn, options, message):
        assert diffattn("generate", *options).error == message

    @pytest.mark.parametrize("name", ["", "sur\udcff.mp4", "x" * 256])
    def test_outputs_of_upscale(self, diffattn, name):
        error = diffattn("upscale", PROMPT, "-o", name).error
        assert error.startswith("--output")

    def test_overlong_names_of_any_command_are_cut(self, diffattn):
        error = diffattn("plan", "--model", "x" * 100_000).error
        assert "File name too long" in error
        assert len(error) < 1500

    def test_long_values_are_cut_in_messages(self, diffattn):
        error = diffattn("generate", PROMPT, "--dtype", "z" * 100_000).error
        assert len(error) < 300


class TestDepth:
    """Brackets that no parser can follow."""

    @pytest.mark.parametrize("command", ["generate", "plan"])
    def test_of_a_configuration(self, diffattn, tmp_path, command):
        deep = tmp_path / "deep.json"
        deep.write_text("[" * 100_000)
        where = [PROMPT] if command == "generate" else ["--grid", "2x3x4"]
        error = diffattn(command, *where, "--attn-config", deep).error
        assert error.startswith(f"--attn-config {deep} is not JSON: ")

    @pytest.mark.parametrize("bracket", ["[", "(", "{", "-", "[[1],"])
    def test_of_an_argument(self, diffattn, bracket):
        argument = "window=" + bracket * 20_000
        error = diffattn("plan", "--grid", "2x3x4", "--attn", "gna", "--attn-arg", argument).error
        assert error.startswith("window")

    def test_of_defaults(self, diffattn, tiny_wan, tmp_path):
        folder = Path(shutil.copytree(tiny_wan, tmp_path / "deep"))
        (folder / "generation.json").write_text("[" * 100_000)
        error = diffattn("generate", PROMPT, "--model", folder, "-o", tmp_path / "a.gif").error
        assert error.startswith(f"{folder}: cannot read generation.json: ")


class TestSizesBeyondTheModel:
    """Refused before anything runs, by name and by path alike."""

    @pytest.mark.parametrize("by_path", [False, True])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--width", 832, "--height", 480], "width is 832, which is 104 columns of tokens, "),
            (["--num-frames", 100, "--height", 32, "--width", 32], "num_frames is 100, which is 1"),
            (["--num-frames", 1_000_000], "num_frames is 1000000, which is 1000000 token frames,"),
            (["--width", 1_000_000, "--height", 1_000_000], "height is 1000000, which is 125000 "),
        ],
    )
    def test_of_generate(self, diffattn, tmp_path, by_path, options, message):
        model = ["--model", MODEL_DIR] if by_path else []
        error = diffattn("generate", PROMPT, *model, *options, "-o", tmp_path / "a.mp4").error
        assert error.startswith(message)
        assert "this model has positions for 64 (rope_max_seq_len of its transformer)" in error

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--preset", "1080p"], "height is 1088, which is 136 rows of tokens, but this model"),
            (["--base-height", 832], "height is 832, which is 104 rows of tokens, but this model"),
            (["--height", 1120, "--width", 1120], "height is 1120, which is 140 rows of tokens"),
        ],
    )
    def test_of_upscale(self, diffattn, tmp_path, options, message):
        error = diffattn("upscale", PROMPT, *options, "-o", tmp_path / "a.mp4").error
        assert error.startswith(message)

    def test_more_tokens_than_any_machine_takes(self, generate, monkeypatch):
        monkeypatch.setattr("diffattn.planning.plans._MOST_TOKENS", 11)
        assert generate(PROMPT, "-o", "out.mp4").error == (
            "the grid 2x2x3 has 12 tokens, but at most 11 are possible: take fewer frames or a"
            " smaller size"
        )

    def test_the_bundled_model_has_its_own_sizes_by_path(self):
        own = read_defaults("moving-shapes", MODEL_DIR)
        assert own == read_defaults(str(MODEL_DIR), MODEL_DIR) == _recommended()
        assert (own["height"], own["width"], own["num_frames"]) == (96, 96, 16)


class TestMethodsThatDoNotFitTheModel:
    @pytest.mark.parametrize("window", ["3,3", "[3,3]"])
    def test_windows_without_an_axis(self, generate, window):
        error = generate(PROMPT, "-o", "out.mp4", "--attn", "gna", "--attn-arg", f"window={window}")
        assert error.error.startswith("window is (3, 3), for height and width, but the grid 2x2x3")

    def test_masks_that_do_not_fit_into_memory(self, generate, monkeypatch):
        def video_mask(self, grid):
            raise RuntimeError("[enforce fail] . DefaultCPUAllocator: tried to allocate 648 bytes")

        monkeypatch.setattr("diffattn.methods.radial.RadialAttn.video_mask", video_mask)
        assert generate(PROMPT, "-o", "out.mp4").error.startswith("out of memory: try fewer frames")


class TestNumbersBeyondMachines:
    def test_an_integer_that_torch_cannot_hold(self, diffattn):
        error = diffattn("plan", "--grid", "2x3x4", "--attn-arg", f"block_size={10**22}").error
        assert error.startswith("block sizes must be integers from 1 to 8192, not 1000000")

    @pytest.mark.parametrize(
        "failure",
        [
            MemoryError(),
            RuntimeError("[enforce fail] . can't allocate memory: you tried to allocate 8 bytes"),
            RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB"),
        ],
    )
    def test_a_mask_that_does_not_fit_into_memory(self, diffattn, monkeypatch, tmp_path, failure):
        def fails(*_, **__):
            raise failure

        monkeypatch.setattr("diffattn.methods.radial.RadialAttn.mask", fails)
        monkeypatch.setattr("diffattn.methods.radial.RadialAttn.video_mask", fails)
        run = ["mask", "--grid", "2x3x4", "-o", tmp_path / "a.png"]
        assert diffattn(*run).error == "out of memory: take a smaller size or grid"

    def test_other_errors_of_torch_are_not_hidden(self, diffattn, monkeypatch, tmp_path):
        def fails(*_, **__):
            raise RuntimeError("a fault of ours")

        monkeypatch.setattr("diffattn.methods.radial.RadialAttn.mask", fails)
        monkeypatch.setattr("diffattn.methods.radial.RadialAttn.video_mask", fails)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            diffattn("mask", "--grid", "2x3x4", "-o", tmp_path / "a.png")


class TestStdout:
    @pytest.mark.parametrize("command", [["methods"], ["plan", "--grid", "2x3x4"], ["models"]])
    def test_a_full_disk_is_one_line(self, command):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "diffattn.pipelines", *command],
                stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("diffattn: ")
        assert "cannot write to stdout: No space left on device" in line

    def test_a_closed_stdout_is_nothing_to_speak_of(self):
        done = subprocess.run(
            f"{sys.executable} -P -m diffattn.pipelines plan --grid 2x3x4 >&-",
            shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_reader_that_left_is_nothing_to_speak_of(self):
        done = subprocess.run(
            f"{sys.executable} -P -m diffattn.pipelines methods | true; exit ${{PIPESTATUS[0]}}",
            shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stderr == ""


def test_ctrl_c_while_modules_load(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffattn.pipelines.cli.commands.run", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "diffattn: interrupted: nothing was written\n"


@pytest.mark.parametrize(
    ("home", "arguments"),
    [
        ("diffattn.pipelines.cli.plan_table.make_plan", ["plan", "--grid", "2x3x4"]),
        ("diffattn.pipelines.cli.listing.method_lines", ["methods"]),
        ("diffattn.pipelines.cli.mask_picture.draw_mask", ["mask", "--grid", "2x3x4"]),
        ("diffattn.pipelines.run.job.plan_job", ["generate", "a cat"]),
    ],
)
def test_ctrl_c_in_any_command(diffattn, monkeypatch, tmp_path, home, arguments):
    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(home, interrupted)
    result = diffattn(*arguments)
    assert result.code == 130
    assert result.err == "diffattn: interrupted: nothing was written\n"
