"""``diffattn plan`` and ``diffattn mask``."""

import json
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffattn import FreeSwimAttn, GNAAttn, Method, RadialAttn, TokenGrid, draw, plan
from diffattn.grid import Reference
from diffattn.methods import METHODS, from_dict
from diffattn.pipelines.cli.grid_text import read_grid, read_place, with_references

from .conftest import SIZE

GNA = ["--method", "gna", "--arg", "window=2,5,5"]


@dataclass(frozen=True, kw_only=True)
class ByContent(Method):
    """A method whose token pairs depend on the tokens."""

    type: ClassVar[str] = "by-content"

    def for_model(self, family, grid=None):
        return self

    def attend(self, query, key, value, site, *, scale=None, key_mask=None):
        raise AssertionError("nothing attends here")


@pytest.fixture
def by_content(monkeypatch):
    monkeypatch.setitem(METHODS, "by-content", ByContent)


@pytest.fixture
def mask(diffattn, tmp_path, monkeypatch):
    """Run ``diffattn mask`` inside ``tmp_path``; bad input leaves nothing there."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        before = set(tmp_path.rglob("*"))
        result = diffattn("mask", *arguments)
        if result.code:
            assert set(tmp_path.rglob("*")) == before
        return result

    return run


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("21x30x52", TokenGrid(21, 30, 52)),
        ("64x48", TokenGrid(1, 64, 48)),
        ("21x30x52+256", TokenGrid(21, 30, 52, 0, 256)),
        ("512+64x64", TokenGrid(1, 64, 64, 512, 0)),
        (" 3 X 4 x 5 + 1 ", TokenGrid(3, 4, 5, 0, 1)),
    ],
)
def test_grids_as_they_are_written(text, grid):
    assert read_grid(text) == grid


def test_places_as_they_are_written():
    assert read_place("10, 0,26") == (10, 0, 26)


class TestPlan:
    def test_a_grid(self, diffattn):
        result = diffattn("plan", *GNA, "--grid", "3x7x9+5", "--heads", 2, "--head-dim", 64,
                          "--layers", 3, "--steps", 10)  # fmt: skip
        assert result.code == 0
        assert result.err == ""
        wanted = plan(
            TokenGrid(3, 7, 9, 0, 5), GNAAttn(window=(2, 5, 5)), heads=2, head_dim=64, layers=3,
            steps=10,
        )  # fmt: skip
        rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.out.splitlines())
        assert rows["method"] == draw.method_words(wanted.method)
        assert rows["grid"] == "3x7x9+5 text, 194 tokens"
        assert rows["attention"] == "3 layers of 2 heads of 64"
        assert rows["token density"] == f"{wanted.density:.2%}"
        assert rows["blocks"].startswith(f"{wanted.blocks} of 16 tokens (")
        assert rows["visited blocks"] == (
            f"{wanted.visited_blocks} ({wanted.block_density:.2%}):"
            f" {wanted.full_blocks} full, {wanted.partial_blocks} partial"
        )
        assert rows["worst query block"] == f"visits {wanted.worst_blocks} of 13 key blocks"
        assert rows["FLOPs of a layer"].startswith(f"{wanted.dense_flops / 1e6:.4g} MFLOP dense, ")
        assert "0 of 3 layers stay dense" in rows["FLOPs of a forward"]
        assert rows["dense steps"] == f"{wanted.dense_steps} of 10"
        assert rows["speed-up at most"].startswith(f"{wanted.attention_speedup:.2f}x of a sparse")
        assert rows["block-sparse"].startswith(
            "no; in whole tiles of 3x7x9+5 text only dense attention is; on 3x8x8+5 text"
        )
        assert "model" not in rows
        assert "other layers" not in rows

    def test_pooled_keys_have_a_row(self, diffattn):
        options = ["--grid", "5+8x12", "--method", "clear", "--arg", "radius=2", "--arg"]
        assert "pooled keys" not in diffattn("plan", *options, "down_factor=1").out
        out = diffattn("plan", *options, "down_factor=4").out
        # 96 tokens see 2 x 3 keys more, of 101 x 101 pairs.
        row = r"pooled keys +6 more for every token but those of text: 5\.65% as many pairs$"
        assert re.search(row, out, re.MULTILINE)

    def test_a_published_model(self, diffattn):
        result = diffattn("plan", "--model", "Wan-AI/Wan2.1-T2V-1.3B")
        assert result.code == 0
        assert "Wan-AI/Wan2.1-T2V-1.3B\n" in result.out
        assert re.search(r"FLOPs of a forward +197\.8 TFLOP dense, .* \(1 of 30 layers", result.out)
        assert re.search(r"other layers +85\.16 TFLOP; attention is 72\.7% of the", result.out)
        assert re.search(r"x of the whole model$", result.out, re.MULTILINE)

    def test_the_nearest_block_sparse_setting(self, diffattn):
        options = ["--grid", "4x16x16", "--method", "gna", "--arg"]
        out = diffattn("plan", *options, "window=2,8,8").out
        setting = re.search(r"nearest setting that is: (window=\S+) (stride=\S+)$", out, re.M)
        again = diffattn("plan", *options, setting[1], "--arg", setting[2]).out
        assert re.search(r"block-sparse +yes: no block needs a mask", again)

    @pytest.mark.parametrize(
        ("grid", "options"),
        [
            ("21x45x80", []),
            ("21x30x52", []),
            ("31x45x80", ["window=9,24,24"]),
            ("3x7x9+5", ["window=2,5,5"]),
            ("31x31", ["window=5"]),
            ("20x45x77", ["window=18,24,24", "is_causal=True,False,False"]),
        ],
    )
    def test_a_grid_without_such_a_setting_has_one_beside_it(self, diffattn, grid, options):
        given = [word for option in options for word in ("--arg", option)]
        out = diffattn("plan", "--grid", grid, "--method", "gna", *given).out
        out = " ".join(out.split())
        found = re.search(
            r"only dense attention is; on ([\dx]+)\S* ?(?:text )?(window=\S+) (stride=\S+) is ", out
        )
        text = "+5" if "+" in grid else ""
        more = [word for option in options if "causal" in option for word in ("--arg", option)]
        again = diffattn("plan", "--grid", f"{found[1]}{text}", "--method", "gna", "--arg",
                         found[2], "--arg", found[3], *more).out  # fmt: skip
        assert re.search(r"block-sparse +yes: no block needs a mask", again)
        assert float(re.search(r"token density +([\d.]+)%", again)[1]) < 100
        sides = [[int(n) for n in name.split("+")[0].split("x")][-2:] for name in (found[1], grid)]
        assert all(abs(a - b) <= 0.2 * b for a, b in zip(*sides, strict=True))

    def test_text_and_ends_need_masks(self, diffattn):
        options = ["--grid", "77+4x16x16", "--method", "gna", "--arg", "window=4,8,8"]
        out = diffattn("plan", *options, "--arg", "stride=4,8,8").out
        assert "yes: no block needs a mask but those with text or at the end\n" in out

    def test_other_methods_say_no_more_than_no(self, diffattn):
        out = diffattn("plan", "--grid", "4x16x16", "--arg", "rule=paper").out
        assert re.search(r"^block-sparse +no$", out, re.MULTILINE)

    def test_a_method_that_selects_by_content(self, diffattn):
        options = ["--grid", "4x8x8", "--method", "vmoba"]
        out = diffattn("plan", *options).out
        assert re.search(
            r"^token density +\d+\.\d\d% on average over the layers, exact$", out, re.M
        )
        assert re.search(
            r"^selection +\S+ \w*FLOP of a layer's FLOPs decide what attends$", out, re.M
        )
        assert "speed-up at most" in out
        assert "visited blocks" not in out
        out = diffattn("plan", *options, "--arg", "preset=training").out
        assert (
            "% on average over the layers, an estimate: what attends depends on the data\n" in out
        )
        read = json.loads(diffattn("plan", *options, "--json").out)
        assert read["is_exact"]
        assert from_dict(read["method"]).topk == tuple(read["method"]["topk"])

    def test_json(self, diffattn):
        result = diffattn("plan", *GNA, "--grid", "3x7x9", "--json")
        read = json.loads(result.out)
        assert from_dict(read["method"]).window == (2, 5, 5)
        assert read == json.loads(
            json.dumps(plan(TokenGrid(3, 7, 9), GNAAttn(window=(2, 5, 5))).to_dict())
        )

    def test_sizes_of_a_model(self, diffattn):
        result = diffattn(
            "plan", "--model", "genmo/mochi-1-preview", "--height", 480, "--width", 848,
            "--num-frames", 7, "--text", 3, "--steps", 8, "--json",
        )  # fmt: skip
        read = json.loads(result.out)
        assert TokenGrid(**read["grid"]) == TokenGrid(2, 30, 53, 0, 3)
        assert read["steps"] == 8

    def test_the_bundled_model_and_its_own_sizes(self, diffattn):
        from diffattn.samples.moving_shapes.clips import FRAMES, SIZE
        from diffattn.samples.moving_shapes.evaluate import Sampling

        read = json.loads(diffattn("plan", "--model", "moving-shapes", "--json").out)
        tokens = read["tokens"]
        assert tokens == read["grid"]["frames"] * read["grid"]["height"] * read["grid"]["width"]
        assert read["steps"] == Sampling.steps
        assert FRAMES % read["grid"]["frames"] == SIZE % read["grid"]["height"] == 0
        shorter = diffattn("plan", "--model", "moving-shapes", "--num-frames", 5, "--json")
        assert json.loads(shorter.out)["grid"]["frames"] == 5

    def test_a_folder(self, diffattn, tiny_wan):
        result = diffattn("plan", "--model", tiny_wan, "--height", 32, "--width", 48,
                          "--num-frames", 5, "--json")  # fmt: skip
        read = json.loads(result.out)
        assert TokenGrid(**read["grid"]) == TokenGrid(2, 2, 3)
        assert (read["heads"], read["head_dim"], read["layers"]) == (2, 16, 2)
        assert read["steps"] == 50  # WanPipeline's own

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "give exactly one of --model and --grid"),
            (
                ["--grid", "2x2x2", "--model", "moving-shapes"],
                "give exactly one of --model and --grid",
            ),
            (["--grid", "2x2x2", "--method", "nothing"], "unknown method 'nothing'; choose from"),
            (["--grid", "2x2x2", "--arg", "sink"], "--attn-arg takes name=value, not 'sink'"),
            (
                ["--grid", "2x2x2", "--arg", "type=gna"],
                "--attn-arg cannot change the method; use --attn",
            ),
            (["--grid", "2x2x2", "--arg", "sunk=1"], "radial has no parameter 'sunk'; did you"),
            (["--grid", "2x2x2", "--height", "4"], "height cannot be given here: a token grid"),
            (["--grid", "2x2x2", "--heads", "0"], "--heads must be a whole number of at least 1"),
            (["--model", "moving-shapes", "--text", "-1"], "--text must be a whole number of at l"),
            (["--model", "moving-shapes", "--heads", "3"], "heads cannot be given here: the model"),
            (["--model", "no/such"], "'no/such' is neither a folder nor a model whose shape is"),
            (
                ["--model", "Wan-AI/Wan2.1-T2V-14B", "--height", "7"],
                "height is 7, but this model needs a multiple of 16: try 16",
            ),
            (["--grid", "2x2x2", "--method", "by-content"], "by-content has no mask that the gri"),
            (
                ["--grid", "2x4x4", "--method", "gna", "--arg", "window=3", "--arg", "dilation=2"],
                "dilation along frames is 2, but a window of 2 on an axis of 2 tokens",
            ),
        ],
    )
    def test_bad_input(self, diffattn, by_content, options, message):
        assert diffattn("plan", *options).error.startswith(message)

    def test_a_folder_of_no_pipeline(self, diffattn, tmp_path):
        error = diffattn("plan", "--model", tmp_path).error
        assert error.startswith(
            f"{tmp_path} is not a diffusers pipeline: there is no model_index.json"
        )


class TestPlanOfFiles:
    """`plan` reads LoRAs and records as `generate` does."""

    @pytest.mark.parametrize(
        ("model", "latents", "size"),
        [
            ("Wan-AI/Wan2.1-T2V-14B", [16, 21, 60, 104], (480, 832, 81)),
            ("Wan-AI/Wan2.2-TI2V-5B", [48, 31, 44, 80], (704, 1280, 121)),
            ("THUDM/CogVideoX-5b", [16, 13, 60, 90], (480, 720, 49)),
            ("Lightricks/LTX-Video", [128, 21, 16, 22], (512, 704, 161)),
        ],
    )
    def test_the_method_and_the_size_of_a_lora(self, diffattn, tmp_path, model, latents, size):
        lora = self.lora(tmp_path, {"type": "gna", "window": ["full", 5, 7]}, latents)
        height, width, frames = size
        sizes = ["--height", height, "--width", width, "--num-frames", frames]
        options = ["--attn", "gna", "--attn-arg", "window=full,5,7", *sizes]
        wanted = diffattn("plan", "--model", model, "--json", *options)
        found = diffattn("plan", "--lora", lora, "--model", model, "--json")
        assert wanted.code == found.code == 0, (wanted.err, found.err)
        assert json.loads(found.out) == json.loads(wanted.out)

    def test_options_come_before_a_lora(self, diffattn, tmp_path):
        lora = self.lora(tmp_path, {"type": "gna", "window": 3}, [16, 21, 60, 104])
        model = ["--model", "Wan-AI/Wan2.1-T2V-1.3B", "--json"]
        other = json.loads(diffattn("plan", "--lora", lora, "--attn", "radial", *model).out)
        assert other["method"]["type"] == "radial"
        assert other["grid"]["frames"] == 21
        larger = diffattn("plan", "--lora", lora, "--num-frames", 33, *model)
        assert json.loads(larger.out)["grid"]["frames"] == 9
        assert json.loads(larger.out)["method"]["window"] == 3
        grid = json.loads(diffattn("plan", "--lora", lora, "--grid", "4x8x8", "--json").out)
        assert (grid["method"]["type"], grid["tokens"]) == ("gna", 256)

    def test_the_run_of_a_record(self, diffattn, generate, tmp_path):
        options = ["--attn", "gna", "--attn-arg", "window=3", *SIZE]
        assert generate("a cat", *options, "-o", tmp_path / "a.gif").code == 0
        record = tmp_path / "a.gif.json"
        model = json.loads(record.read_text())["settings"]["model"]
        wanted = json.loads(diffattn("plan", "--model", model, *options, "--json").out)
        assert json.loads(diffattn("plan", "--from", record, "--json").out) == wanted
        shorter = diffattn("plan", "--from", record, "--num-frames", 1, "--steps", 7, "--json")
        assert json.loads(shorter.out)["grid"]["frames"] == 1
        assert json.loads(shorter.out)["steps"] == 7
        grid = json.loads(diffattn("plan", "--from", record, "--grid", "4x8x8", "--json").out)
        assert (grid["method"]["type"], grid["tokens"], grid["steps"]) == ("gna", 256, 2)

    def test_a_lora_goes_before_a_record(self, diffattn, tmp_path):
        lora = self.lora(tmp_path, {"type": "gna", "window": 3}, [16, 21, 60, 104])
        settings = {"prompt": "x", "attention": {"type": "radial"}, "steps": 3,
                    "model": "Wan-AI/Wan2.1-T2V-1.3B", "num_frames": 5}  # fmt: skip
        record = tmp_path / "a.mp4.json"
        record.write_text(json.dumps({"diffattn_record": 1, "settings": settings}))
        read = json.loads(diffattn("plan", "--from", record, "--lora", lora, "--json").out)
        assert (read["method"]["type"], read["steps"], read["grid"]["frames"]) == ("gna", 3, 2)

    @pytest.mark.parametrize("suffix", [".bin", ".pt"])
    def test_files_that_say_nothing(self, diffattn, tmp_path, suffix):
        pickled = tmp_path / f"a{suffix}"
        pickled.write_bytes(b"x")
        model = ["--model", "Wan-AI/Wan2.1-T2V-1.3B"]
        assert "is a pickled file" in diffattn("plan", "--lora", pickled, *model).error
        foreign = tmp_path / "a.safetensors"
        save_file({"x.lora_A.weight": torch.ones(1)}, foreign)
        error = diffattn("plan", "--lora", foreign, *model).error
        assert error.endswith("names no method and no size: `diffattn lora train` did not train it")
        assert diffattn("plan", "--lora", " ", *model).error.startswith("--lora must be text")
        assert "there is no LoRA at" in diffattn("plan", "--lora", tmp_path / "no", *model).error
        lora = self.lora(tmp_path, {"type": "gna", "window": 3}, [1])
        error = diffattn("plan", "--lora", lora, *model).error
        assert error.startswith("the LoRA's header gives its latents as [1], but latents have chan")
        error = diffattn("plan", "--lora", lora).error
        assert error == "give exactly one of --model and --grid"
        error = diffattn("plan", "--from", tmp_path / "no.json").error
        assert error.startswith(f"cannot read {tmp_path / 'no.json'}: No such file")
        record = tmp_path / "a.json"
        settings = {"model": "Wan-AI/Wan2.1-T2V-1.3B", "height": "x"}
        record.write_text(json.dumps({"diffattn_record": 1, "settings": settings}))
        error = diffattn("plan", "--from", record).error
        assert error == "--height must be a whole number of at least 1, not 'x'"
        record.write_text(json.dumps({"diffattn_record": 1, "settings": {"model": 5}}))
        assert diffattn("plan", "--from", record).error == "--model must be text, not 5"

    @staticmethod
    def lora(folder, method, latents):
        """A LoRA's file with the header of a training; its weights are not read."""
        header = {"method": method, "denoiser": "transformer", "steps": 1, "latents": latents,
                  "settings": {}}  # fmt: skip
        path = folder / "lora" / "pytorch_lora_weights.safetensors"
        path.parent.mkdir()
        save_file({"x.lora_A.weight": torch.ones(1)}, path, {"diffattn": json.dumps(header)})
        return path.parent


class TestMask:
    def test_figures_and_picture(self, mask, tmp_path):
        result = mask(*GNA, "--grid", "3x7x9+5", "-o", "there/small.png", "--query", "2,3,4")
        assert result.code == 0
        lines = result.out.splitlines()
        method, grid = GNAAttn(window=(2, 5, 5)), TokenGrid(3, 7, 9, 0, 5)
        wanted = plan(grid, method)
        assert lines[0] == "3x7x9+5 text: 194 tokens"
        assert lines[1] == f"density: {wanted.density:.4%} of the token pairs attend"
        assert lines[2] == (
            f"blocks: {wanted.visited_blocks} of {wanted.blocks} visited"
            f" ({wanted.block_density:.2%}), {wanted.full_blocks} full and"
            f" {wanted.partial_blocks} partial, of {wanted.block_size} tokens"
        )
        assert re.fullmatch(r"built in \d+\.\d\d s, [\d,]+ KiB", lines[3])
        assert lines[4] == "there/small.png"
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["small.png"]
        image = cv2.imread(str(tmp_path / "there" / "small.png"))[..., ::-1]
        assert np.array_equal(image, draw.picture(method, grid, (2, 3, 4)))

    @pytest.mark.parametrize(
        ("options", "method", "text", "grid"),
        [
            (["window=1,3,5"], GNAAttn(window=(1, 3, 5)), "2x4x5", TokenGrid(2, 4, 5)),
            (
                ["window=3", "is_causal=True"],
                GNAAttn(window=3, is_causal=True),
                "5x8",
                TokenGrid(1, 5, 8),
            ),
            (["radius=1"], FreeSwimAttn(radius=1), "2x5x6+3", TokenGrid(2, 5, 6, 0, 3)),
            (["decay_factor=0.2"], RadialAttn(decay_factor=0.2), "5x3x4", TokenGrid(5, 3, 4)),
        ],
    )
    def test_the_file_shows_every_pair_of_tokens(self, mask, tmp_path, options, method, text, grid):
        """Pixels of the file against the method's dense mask."""
        given = [word for option in options for word in ("--arg", option)]
        assert mask("--method", method.type, *given, "--grid", text, "-o", "a.png").code == 0
        image = cv2.imread(str(tmp_path / "a.png"))[..., ::-1]
        video = replace(grid, text_before=0, text_after=0)
        pairs = np.asarray(method.for_model("", video).mask(grid).dense())
        side = 600 // grid.tokens
        # The left picture begins at the margin, below three lines of text and a heading.
        colours = np.where(pairs[..., None], draw.ALL, draw.NONE)
        middles = slice(28 + side // 2, 28 + side * grid.tokens, side)
        found = [
            top
            for top in range(28, image.shape[0] - side * grid.tokens)
            if (image[top + side // 2 :: side, middles][: grid.tokens] == colours).all()
        ]
        assert found, "no place of the picture shows the mask"

    def test_a_picture_that_was_not_written_is_no_picture(self, mask, tmp_path, monkeypatch):
        (tmp_path / "a.png").write_bytes(b"an older picture")
        whole = draw.png
        monkeypatch.setattr(draw, "png", lambda image: whole(image)[:500])
        result = mask("--grid", "2x3x4", "--method", "dense", "-o", "a.png")
        assert result.code == 2
        assert "cannot write a.png: it cannot be read back: " in result.err
        monkeypatch.setattr(draw, "png", lambda image: whole(image[:-8]))
        result = mask("--grid", "2x3x4", "--method", "dense", "-o", "a.png")
        assert re.search(r"cannot write a.png: it is \d+x\d+ instead of \d+x\d+$", result.err)
        assert (tmp_path / "a.png").read_bytes() == b"an older picture"
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

    def test_keys_that_are_no_tokens_are_mentioned(self, mask):
        note = (
            "pooled keys: 4 more for every token but those of text, 6.2500% as many pairs; not"
            " drawn"
        )
        options = ["--grid", "8x8", "--method", "clear", "--arg", "radius=2"]
        assert note not in mask(*options).out
        assert note in mask(*options, "--arg", "down_factor=4").out.splitlines()

    def test_without_a_name_or_a_query(self, mask, tmp_path):
        assert mask("--grid", "2x3x4", "--method", "dense").out.splitlines()[-1] == "mask.png"
        image = cv2.imread(str(tmp_path / "mask.png"))[..., ::-1]
        marked = draw.picture(METHODS["dense"](), TokenGrid(2, 3, 4), (1, 1, 2))
        assert np.array_equal(image, marked)

    def test_it_overwrites(self, mask, tmp_path):
        (tmp_path / "mask.png").write_text("old")
        assert mask("--grid", "2x3x4").code == 0
        assert cv2.imread(str(tmp_path / "mask.png")) is not None

    @pytest.mark.parametrize(
        "grid", ["", "21", "21x30x52x3", "axbxc", "21x30x", "2.5x3x4", "-1x3x4", "1+2x3x4+x"]
    )
    def test_bad_grids(self, mask, grid):
        error = mask(f"--grid={grid}").error
        assert error.startswith(
            "--grid must be frames x height x width in tokens, such as 21x30x52"
        )
        assert error.endswith(f"not {grid!r}")

    def test_a_grid_of_nothing(self, mask):
        message = "--grid 0x3x4: frames is 0, but a grid needs at least 1"
        assert mask("--grid", "0x3x4").error == message

    def test_a_grid_too_large(self, mask):
        error = mask("--grid", "9999x999x999").error
        assert error.startswith(
            "the grid 9999x999x999 has 9,979,011,999 tokens, but at most 2,097,152"
        )

    @pytest.mark.parametrize("query", ["1", "1,2", "a,b,c", "1,2,3,4", "-1,0,0", ""])
    def test_bad_queries(self, mask, query):
        error = mask("--grid", "2x3x4", f"--query={query}").error
        assert error == (
            f"--query must be a token's frame, row and column, such as 10,15,26, not {query!r}"
        )

    def test_a_query_outside_the_grid(self, mask):
        error = mask("--grid", "2x3x4", "--query", "1,3,0").error
        assert error == "the query's row is 3, but the grid 2x3x4 has rows 0 to 2"

    @pytest.mark.parametrize("method", ["by-content", "linfusion", "agent"])
    def test_methods_without_a_mask(self, mask, by_content, method):
        error = mask("--grid", "2x3x4", "--method", method).error
        assert error == (
            f"{method} has no mask that the grid alone decides, and cannot be drawn; a method that"
            f" has one is gna"
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--method", "gno"], "unknown method 'gno'; did you mean 'gna'?"),
            (["--arg", "sink"], "--attn-arg takes name=value, not 'sink'"),
            (["--method", "gna", "--arg", "window=0"], "window is 0, but must be an integer of at"),
            (
                ["--method", "gna", "--arg", "window=3", "--arg", "dilation=2"],
                "dilation along frames is 2, but a window of 2 on an axis of 2 tokens allows only",
            ),
        ],
    )
    def test_bad_methods(self, mask, options, message):
        assert mask("--grid", "2x3x4", *options).error.startswith(message)

    def test_a_grid_is_needed(self, mask):
        assert mask().error == "give --grid, the tokens that radial is drawn on, or --model"

    def test_what_was_selected_in_a_run(self, mask, tmp_path, tiny_wan):
        prompt = "a cat"
        size = ["--model", tiny_wan, "--height", 32, "--width", 48, "--num-frames", 5]
        options = ["--method", "vmoba", "--arg", "topk=2", "--prompt", prompt, *size]
        result = mask(*options, "--steps", 4, "--step", 3, "--layer", 1, "--head", 1, "-o", "a.png",
                      "--query", "1,0,2")  # fmt: skip
        assert result.code == 0
        lines = result.out.splitlines()
        assert lines[0] == (
            f'{tiny_wan}, "a cat", seed 0: step 3 of 4, layer 1 (2d blocks), head 1'
        )
        assert lines[1] == "2x2x3: 12 tokens in 1 blocks"
        assert lines[2] == "density: 100.0000% of the token pairs attend"
        assert lines[3] == "selected: 1 to 1 blocks by a query, 1.00 on average"
        assert lines[4] == "a.png"
        image = cv2.imread(str(tmp_path / "a.png"))
        assert image.std() > 10
        options += ["--arg", "chunk_2d=1,1", "--steps", 4]
        lines = mask(*options, "--layer", 1, "-o", "b.png").out.splitlines()
        assert "step 3 of 4, layer 1 (2d blocks), head 0" in lines[0]
        assert lines[1] == "2x2x3: 12 tokens in 6 blocks"
        assert lines[2] == f"density: {2 / 6:.4%} of the token pairs attend"
        assert lines[3] == "selected: 2 to 2 blocks by a query, 2.00 on average"
        assert cv2.imread(str(tmp_path / "b.png")).shape == image.shape

    @pytest.mark.parametrize(
        ("method", "blocks"),
        [
            (["sol", "--arg", "block=16"], "blocks of 16 tokens, order morton"),
            (["block-topk", "--arg", "block=16"], "blocks of 16 tokens, order morton"),
            (["svg2", "--arg", "query_cluster=6"], "2 clusters of queries and 1 of keys"),
            (["vsa"], "tiles of 4x4x4 tokens"),
            (["sla", "--arg", "block_q=16"], "blocks of 64 keys by 16 queries"),
        ],
        ids=lambda x: x[0] if isinstance(x, list) else "",
    )
    def test_every_selecting_method_in_a_run(self, mask, tmp_path, tiny_wan, method, blocks):
        size = ["--model", tiny_wan, "--height", 32, "--width", 48, "--num-frames", 5]
        run = ["--prompt", "x", "--steps", 4, "--step", 3, "--layer", 1]
        lines = mask("--method", *method, *size, *run, "-o", "a.png").out.splitlines()
        assert lines[0].endswith(f"seed 0: step 3 of 4, layer 1 ({blocks}), head 0")
        assert lines[1].startswith("2x2x3: 12 tokens in ")
        assert lines[-1] == "a.png"
        assert cv2.imread(str(tmp_path / "a.png")).std() > 10

    @pytest.mark.parametrize(
        ("method", "blocks", "rest"),
        [
            (["sol", "--arg", "block=16"], "blocks of 16 tokens, order morton", "block's mean"),
            (["block-topk", "--arg", "block=16"], "blocks of 16 tokens, order morton", None),
            (["svg2", "--arg", "key_cluster=30"], "2 clusters of queries and 11 of keys", None),
            (["vsa", "--arg", "tile=4,4,4"], "tiles of 4x4x4 tokens", None),
            (["vsa", "--arg", "coarse=true"], "tiles of 4x4x4 tokens", "tile's mean, times the"),
            (["sla"], "blocks of 64 keys by 128 queries", "by linear attention"),
            (["vmoba", "--layer", 2], "3d blocks", None),
        ],
        ids=lambda x: x[0] if isinstance(x, list) else "",
    )
    def test_every_selecting_method_on_a_grid(self, mask, tmp_path, method, blocks, rest):
        run = ["--grid", "5+3x8x10+2", "--reference", "8x10", "--seed", 3, "-o", "a.png"]
        result = mask("--method", *method, *run)
        lines = result.out.splitlines()
        layer = 2 if "vmoba" in method else 0
        assert lines[0] == (
            f"Smooth random queries and keys of seed 3, not those of a model: layer {layer}"
            f" ({blocks})"
        )
        assert lines[1].startswith("references: visible, ")
        assert lines[2].startswith("3x8x10+7 text+reference 1x8x10: 327 tokens in ")
        assert bool(rest) == lines[-2].startswith("rest: every other key is seen ")
        if rest:
            assert rest in lines[-2]
        image = cv2.imread(str(tmp_path / "a.png"))
        assert image.std() > 10
        other = mask("--method", *method, *run[:-3], 4, "-o", "b.png")
        assert other.code == 0
        assert not np.array_equal(cv2.imread(str(tmp_path / "b.png")), image)

    def test_a_selecting_method_on_the_grid_of_a_model(self, mask):
        lines = mask("--method", "block-topk", "--model", "moving-shapes").out.splitlines()
        assert lines[1].startswith("16x12x12: 2304 tokens in 36 blocks")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--grid", "2x3x4", "--prompt", "x"], "--grid: a run has its own grid; leave out"),
            ([], "vmoba selects by what the tokens hold: give --prompt for a run to look into, or"),
            (["--grid", "2x3x4", "--step", "2"], "--step is of a run: give --prompt for a run to"),
            (["--grid", "2x3x4", "--head", "1"], "--head is of a run: give --prompt for a run to"),
            (["--grid", "2x3x4", "--steps", "1"], "--steps is of a run: give --prompt for a run"),
            (["--grid", "2x3x4", "--layer", "-1"], "--layer counts from 0, and is -1"),
            (["--grid", "2x3x4", "--seed", "-1"], "--seed must be 0 or more, and is -1"),
            (["--grid", "2x3x4", "--query", "2,0,0"], "the query's frame is 2, but the grid 2x3x4"),
            (["--grid", "2x3x4", "--height", "8"], "--height is a size of a --model; a --grid say"),
            (["--prompt", " "], "the prompt must be text, not ' '"),
            (["--prompt", "x", "--step", "0"], "--step counts denoising steps from 1, and is 0"),
            (["--prompt", "x", "--layer", "-1"], "--layer counts from 0, and is -1"),
            (["--prompt", "x", "--head", "-2"], "--head counts from 0, and is -2"),
            (["--prompt", "x", "-o", "a.jpg"], "-o a.jpg: pictures of masks are PNG files"),
            (["--prompt", "x", "--query", "1,2"], "--query must be a token's frame, row and colu"),
            (["--prompt", "x", "--arg", "topk=0"], "topk is 0, but must be an integer of at least"),
        ],
    )
    def test_bad_runs(self, mask, options, message):
        assert mask("--method", "vmoba", *options).error.startswith(message)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--step", 5], "--step 5: the run has 4 steps"),
            (["--layer", 2], "--layer 2: WanTransformer3DModel has layers 0 to 1"),
            (["--head", 2], "--head 2: the model has heads 0 to 1"),
            (
                ["--step", 1],
                "step 1 of layer 0 stays dense by the method's schedule (dense_steps=0.25, "
                "last_dense_steps=0, dense_layers=0): choose another, or --attn-arg dense_steps=0",
            ),
            (["--query", "2,0,0"], "the query's frame is 2, but the grid 2x2x3 has frames 0 to 1"),
        ],
    )
    def test_calls_that_a_run_does_not_have(self, mask, tiny_wan, options, message):
        size = ["--model", tiny_wan, "--height", 32, "--width", 48, "--num-frames", 5]
        run = ["--method", "vmoba", "--prompt", "x", "--steps", 4]
        result = mask(*run, *size, *options)
        assert (result.error, result.out) == (message, "")

    def test_runs_are_for_methods_that_select_by_content(self, mask):
        error = mask("--grid", "2x3x4", "--prompt", "x", "--layer", 1).error
        assert error == (
            "the prompt is for methods that select by content, such as vmoba; radial is drawn on a "
            "--grid or for a --model"
        )
        assert mask("--grid", "2x3x4", "--head", 1).error.startswith("--head is for methods that")

    def test_outputs_that_cannot_be_written(self, mask, tmp_path):
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "file").write_text("")
        error = mask("--grid", "2x3x4", "-o", "mask.jpg").error
        assert error == "-o mask.jpg: pictures of masks are PNG files; use a name that ends .png"
        error = mask("--grid", "2x3x4", "-o", "folder.png").error
        assert error == "cannot write folder.png: it is a folder"
        assert mask("--grid", "2x3x4", "-o", "file/mask.png").error.startswith(
            "cannot write to file: "
        )
        assert mask("--grid", "2x3x4", "-o", "/proc/nowhere/mask.png").error.startswith(
            "cannot write to /proc/nowhere: "
        )


class TestReferences:
    @pytest.mark.parametrize(
        ("grid", "texts", "starts", "tokens"),
        [
            ("4+3x5", ["3x5"], [19], 34),
            ("4+3x5+7", ["1 x 2X2", "2x3x4"], [19, 23], 54),
            ("60+2x3x5+1", ["2x3x5@8", "3x5@40"], [8, 40], 91),
            ("9+3x5+20", ["2x3@30", "2x2", "2x4@1"], [1, 24, 34], 48),
        ],
    )
    def test_places(self, grid, texts, starts, tokens):
        made = with_references(read_grid(grid), texts)
        assert [reference.start for reference in made.references] == starts
        assert made.tokens == tokens

    def test_sizes(self):
        made = with_references(TokenGrid(1, 4, 4), ["2x3x5"])
        assert made == TokenGrid(1, 4, 4, 0, 30, references=(Reference(16, 2, 3, 5),))

    @pytest.mark.parametrize("command", ["plan", "mask"])
    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            ("8x", "must be frames x height x width in tokens, such as 1x64x64"),
            ("8x8@", "must be frames x height x width"),
            ("0x4", "a reference of 1x0x4 tokens from position 58 needs at least 1 along each"),
            ("2x2@8", "is not among the other tokens of"),
            ("2x5@0", "is not among the other tokens of"),
        ],
    )
    def test_bad_ones(self, diffattn, command, reference, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = diffattn(command, "--grid", "9+7x7", "--attn", "clear", "--reference", reference)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
        assert not list(tmp_path.iterdir())

    def test_plan(self, diffattn):
        sequence = ["--grid", "512+64x64", "--reference", "64x64", "--attn", "clear", "--json"]
        shares = {}
        for policy in ("exact", "visible", "local"):
            result = diffattn("plan", *sequence, "--attn-arg", f"references={policy}")
            shares[policy] = json.loads(result.out)["density"]
        assert shares == pytest.approx({"exact": 0.8128, "visible": 0.6256, "local": 0.2512}, 1e-3)

    def test_plan_of_a_model(self, diffattn):
        options = ["--model", "black-forest-labs/FLUX.1-dev", "--height", "1024", "--width", "1024"]
        result = diffattn("plan", *options, "--reference", "64x64", "--attn", "clear", "--json")
        assert json.loads(result.out)["tokens"] == 8704
        table = diffattn("plan", *options, "--reference", "64x64", "--attn", "clear").out
        assert "visible, 1 of 1 with pairs left out" in table

    def test_a_policy_is_one_of_three(self, diffattn):
        result = diffattn("plan", "--grid", "8x8", "--attn", "gna", "--attn-arg", "references=all")
        assert result.code == 2
        assert "references is 'all', but must be one of exact, visible, local" in result.err

    def test_mask(self, mask, tmp_path):
        result = mask(
            "--grid", "5+12x12", "--reference", "12x12", "--reference", "2x3", "--attn", "clear",
            "--attn-arg", "radius=3", "--attn-arg", "references=local", "-o", "m.png",
        )  # fmt: skip
        assert "references: local, 1 of 2 with pairs left out (1x2x3: as text)" in result.out
        alone = mask("--grid", "5+12x12", "--attn", "clear", "-o", "alone.png")
        assert not alone.code
        image, smaller = (cv2.imread(str(tmp_path / name)) for name in ("m.png", "alone.png"))
        assert image.shape[0] > smaller.shape[0]  # the frames of references are drawn, too

    def test_no_references_in_a_run_that_is_drawn(self, mask):
        result = mask("--attn", "vmoba", "--prompt", "x", "--reference", "2x2")
        assert result.code == 2
        assert "--reference: with a prompt, what vmoba attends to is drawn in a run" in result.err
