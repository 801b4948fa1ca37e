"""RadialAttn against the public code's masks, the paper's equation, and its own promises."""

import json
import math
import time
from pathlib import Path

import golden_files
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn import RadialAttn, TokenGrid
from diffattn.methods import from_dict

GOLDENS = golden_files.GOLDENS / "radial"


def reference_method(case: dict) -> RadialAttn:
    """The public code's setting that a golden was made with."""
    return RadialAttn(
        block_rule="reference",
        decay_factor=case.get("decay_factor", case.get("decay")),
        sink=case.get("model_type", case.get("model")) == "wan",
        first_distance_width="half" if case.get("wan_dist1_half") else "full",
        split_threshold=128,
        block_size=case["block"],
    )


@pytest.mark.parametrize(
    "path",
    [
        *golden_files.matching("radial/wan*.npz", 6),
        *golden_files.matching("radial/hunyuan*.npz", 2),
    ],
    ids=lambda path: path.stem,
)
def test_block_map_is_bit_equal_to_the_public_code(path: Path) -> None:
    golden = np.load(path)
    case = json.loads(str(golden["meta"]))
    text = case["seq_len"] - case["video_tokens"]
    grid = TokenGrid(case["num_frame"], 1, case["tokens_per_frame"], text_after=text)
    whole_blocks = case["seq_len"] // case["block"]
    ours = reference_method(case).block_map(grid).numpy()[:whole_blocks, :whole_blocks]
    np.testing.assert_array_equal(ours, golden["block_mask"])


def test_production_sparsities_are_those_of_the_public_code() -> None:
    for case in json.loads((GOLDENS / "production_sparsity.json").read_text()):
        frame_tokens = case["video_tokens"] // case["frames"]
        text = case["seq_len"] - case["video_tokens"]
        grid = TokenGrid(case["frames"], 1, frame_tokens, text_after=text)
        whole_blocks = case["seq_len"] // case["block"]
        kept = reference_method(case).block_map(grid)[:whole_blocks, :whole_blocks]
        sparsity = 1 - int(kept.sum()) / kept.numel()
        assert sparsity == pytest.approx(case["sparsity_full"], abs=1e-12), case


def test_frame_pair_rules_are_those_of_the_public_code() -> None:
    for case in json.loads((GOLDENS / "frame_pair_rules.json").read_text()):
        grid = TokenGrid(case["d"] + 1, 1, case["s"])
        half_width = int(reference_method(case).half_widths(grid)[case["d"]])
        assert half_width == (case["W"] if case["kept"] else -1), case


@pytest.mark.parametrize(
    "path", golden_files.matching("radial/paper*.npz", 2), ids=lambda p: p.stem
)
@pytest.mark.parametrize(("sink", "key"), [(False, "eq4_only"), (True, "eq4_band_sink")])
def test_paper_rule_is_equation_4_of_the_goldens(path: Path, sink: bool, key: str) -> None:
    frames, frame_tokens = (int(part[1:]) for part in path.stem.split("_")[2:])
    mask = RadialAttn(rule="paper", sink=sink).mask(TokenGrid(frames, 1, frame_tokens))
    golden = np.load(path)[key]
    np.testing.assert_array_equal(mask.dense().numpy(), golden)
    np.testing.assert_array_equal(mask.blocks(16).dense()[0, 0].numpy(), golden)


def equation_4(i: int, k: int, j: int, m: int, s: int, sink: bool) -> bool:
    """The paper's rule for token k of frame i and token m of frame j, s tokens in a frame."""
    d = abs(i - j)
    b = 2 ** math.floor(math.log2(max(d, 1)))
    band = b <= s and abs(k - m) + 1 <= s / b
    diagonal = d % math.ceil(b / s) == 0 and k == m
    return band or diagonal or (sink and j == 0)


@given(
    frames=st.integers(1, 9),
    height=st.integers(1, 2),
    width=st.integers(1, 4),
    text_before=st.integers(0, 9),
    text_after=st.integers(0, 9),
    sink=st.booleans(),
    block_q=st.integers(1, 24),
    block_kv=st.integers(1, 24),
)
@settings(max_examples=40, deadline=None)
def test_paper_rule_with_text_in_any_blocks(
    frames: int,
    height: int,
    width: int,
    text_before: int,
    text_after: int,
    sink: bool,
    block_q: int,
    block_kv: int,
) -> None:
    grid = TokenGrid(frames, height, width, text_before, text_after)
    s = height * width
    want = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for q in range(grid.video_tokens):
        for kv in range(grid.video_tokens):
            want[text_before + q, text_before + kv] = equation_4(
                q // s, q % s, kv // s, kv % s, s, sink
            )
    mask = RadialAttn(rule="paper", sink=sink).mask(grid)
    assert torch.equal(mask.dense(), want)
    assert torch.equal(mask.blocks(block_q, block_kv).dense()[0, 0], want)
    assert mask.density == pytest.approx(want.double().mean().item(), abs=1e-12)


def covering_map_by_definition(method: RadialAttn, grid: TokenGrid) -> torch.Tensor:
    """The covering rule token by token: the band mask of every frame pair, judged per block."""
    block, s = method.block_size, grid.frame_tokens
    blocks = -(-grid.tokens // block)
    half_widths = method.half_widths(grid).tolist()
    out = torch.zeros(blocks, blocks, dtype=torch.bool)
    start = grid.text_before
    token = torch.arange(s)
    for i in range(grid.frames):
        row_block = (start + i * s + token) // block
        for j in range(grid.frames):
            column_block = (start + j * s + token) // block
            width = s if method.sink and j == 0 else half_widths[abs(i - j)]
            band = (token[:, None] - token[None, :]).abs() <= width
            for p in row_block.unique().tolist():
                for q in column_block.unique().tolist():
                    held = band[row_block == p][:, column_block == q]
                    seen = held.sum(0)
                    touched = int((seen > 0).sum())
                    high = int((3 * seen > held.shape[0]).sum())
                    if 5 * high > 3 * touched:
                        out[p, q] = True
    return out


any_grid = st.builds(
    TokenGrid,
    frames=st.integers(1, 7),
    height=st.integers(1, 9),
    width=st.integers(1, 6),
    text_before=st.integers(0, 11),
    text_after=st.integers(0, 11),
)


@given(
    grid=any_grid,
    block_size=st.sampled_from([1, 4, 7, 16, 128]),
    decay_factor=st.sampled_from([0.0, 0.2, 0.95, 1.0, 3.0]),
    split_threshold=st.sampled_from([1, 4, 16, 128]),
    sink=st.booleans(),
    first_distance_width=st.sampled_from(["full", "half"]),
)
@settings(max_examples=50, deadline=None)
def test_covering_rule(
    grid: TokenGrid,
    block_size: int,
    decay_factor: float,
    split_threshold: int,
    sink: bool,
    first_distance_width: str,
) -> None:
    method = RadialAttn(
        block_size=block_size,
        decay_factor=decay_factor,
        split_threshold=split_threshold,
        sink=sink,
        first_distance_width=first_distance_width,
    )
    block_map = method.block_map(grid)
    assert torch.equal(block_map, covering_map_by_definition(method, grid))

    mask = method.mask(grid).dense()
    assert torch.equal(method.mask(grid).blocks(block_size).dense()[0, 0], mask)
    frame = torch.arange(grid.video_tokens) // grid.frame_tokens
    video = mask[grid.video, grid.video]
    assert video[frame[:, None] == frame[None, :]].all(), "the own frame is lost"
    if first_distance_width == "full":
        assert video[(frame[:, None] - frame[None, :]).abs() == 1].all(), "the next frame is lost"
    if sink:
        assert video[:, frame == 0].all(), "the sink is lost"
    text = grid.is_text(torch.arange(grid.tokens))
    assert mask[text].all(), "a text query is not dense"
    assert mask[:, text].all(), "a text key is hidden"
    # Wherever two frames see each other at all, a token sees its own place in the other frame.
    half_widths = method.half_widths(grid)
    place = torch.arange(grid.frame_tokens)
    for i in range(grid.frames):
        for j in range(grid.frames):
            if half_widths[abs(i - j)] >= 0:
                here = grid.text_before + i * grid.frame_tokens + place
                there = grid.text_before + j * grid.frame_tokens + place
                assert mask[here, there].all(), (i, j)


@given(
    frames=st.integers(1, 12),
    blocks_per_frame=st.integers(1, 6),
    decay_factor=st.sampled_from([0.0, 0.2, 0.95, 1.0]),
    sink=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_rules_agree_on_aligned_frames(
    frames: int, blocks_per_frame: int, decay_factor: float, sink: bool
) -> None:
    grid = TokenGrid(frames, 1, 128 * blocks_per_frame)
    setting = {"decay_factor": decay_factor, "sink": sink, "block_size": 128}
    covering = RadialAttn(**setting).block_map(grid)
    reference = RadialAttn(**setting, block_rule="reference").block_map(grid)
    assert torch.equal(covering, reference)
    # The closed form: |p - q| <= floor((W + 22) / 128) inside every kept pair of frames.
    half_widths = RadialAttn(**setting).half_widths(grid)
    block = torch.arange(frames * blocks_per_frame)
    frame, place = block // blocks_per_frame, block % blocks_per_frame
    width = half_widths[(frame[:, None] - frame[None, :]).abs()]
    if sink:
        width[:, frame == 0] = grid.frame_tokens
    reach = torch.div(width + 22, 128, rounding_mode="floor")
    want = (width >= 0) & ((place[:, None] - place[None, :]).abs() <= reach)
    assert torch.equal(covering, want)


@given(grid=any_grid, block_size=st.sampled_from([1, 5, 16, 64]))
@settings(max_examples=40, deadline=None)
def test_reference_rule_never_crashes(grid: TokenGrid, block_size: int) -> None:
    method = RadialAttn(block_rule="reference", block_size=block_size)
    layout = method.mask(grid).blocks(block_size)
    assert layout.dense().shape == (1, 1, grid.tokens, grid.tokens)


def test_reference_rule_where_the_public_code_overhangs() -> None:
    # 480x832x81 at block 64: the public code raises "The size of tensor a (24) must match ...".
    method = RadialAttn(block_rule="reference", block_size=64, decay_factor=0.2, sink=True)
    block_map = method.block_map(TokenGrid(21, 30, 52))
    assert block_map.shape == (512, 512)
    assert block_map[-1].all()


def test_glitch_of_unaligned_frames_is_gone() -> None:
    # 720x1280: 45 * 80 tokens are 28 blocks and 16 tokens. Where fewer than 43 tokens of a frame
    # lie in a block of another, the public code gives them that one's pattern: the top of a frame
    # then sees the bottom of frames two and more away, but not their top.
    grid = TokenGrid(10, 45, 80)
    place = torch.arange(grid.frame_tokens)
    missing = {}
    for rule in ("covering", "reference"):
        mask = RadialAttn(block_rule=rule, decay_factor=0.2, sink=True, block_size=128).mask(grid)
        missing[rule] = sum(
            int((~mask.allowed(i * grid.frame_tokens + place, j * grid.frame_tokens + place)).sum())
            for i in range(grid.frames)
            for j in range(grid.frames)
        )
    assert missing["covering"] == 0
    assert missing["reference"] > 0


def test_mask_of_hunyuanvideo_720p_builds_in_under_a_second() -> None:
    grid = TokenGrid(33, 45, 80, text_after=256)
    seconds = []  # of processor time: other programs do not count
    for _ in range(3):
        start = time.process_time()
        layout = RadialAttn().for_model("hunyuanvideo", grid).mask(grid).blocks(128)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
    assert layout.nbytes < 16 << 20
    assert 0.27 < layout.density < 0.29


@pytest.mark.parametrize(
    ("family", "grid", "want"),
    [
        ("wan2.1", TokenGrid(18, 48, 80), (0.2, True, 128, 128, 1, 0.25)),
        ("wan2.2", TokenGrid(20, 48, 80), (0.8, True, 64, 128, 1, 0.275)),
        ("hunyuanvideo", TokenGrid(30, 48, 80), (0.95, False, 128, 128, 1, 0.25)),
        ("hunyuanvideo", TokenGrid(64, 45, 80), (1.0, True, 128, 128, 2, 2)),
        ("wan2.1", TokenGrid(41, 48, 80), (1.0, True, 128, 128, 2, 2)),
        ("something else", TokenGrid(41, 48, 80), (1.0, True, 128, 128, 1, 0.25)),
        ("wan2.1", TokenGrid(16, 12, 12), (0.2, True, 16, 16, 1, 0.25)),
    ],
)
def test_recommended_settings(family: str, grid: TokenGrid, want: tuple) -> None:
    method = RadialAttn().for_model(family, grid)
    assert want == (
        method.decay_factor,
        method.sink,
        method.block_size,
        method.split_threshold,
        method.dense_layers,
        method.dense_steps,
    )
    # 12 of 50 steps and 11 of 40, as the public scripts have it
    assert RadialAttn(dense_layers=0, decay_factor=0.5).for_model(family, grid).decay_factor == 0.5
    assert RadialAttn(dense_layers=0).for_model(family, grid).dense_layers == 0


def test_a_method_writes_itself_out() -> None:
    method = RadialAttn(decay_factor=0.3, dense_steps=4, rule="block")
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert eval(repr(method), {"RadialAttn": RadialAttn}) == method
    assert hash(method) == hash(RadialAttn(decay_factor=0.3, dense_steps=4))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"decay_factor": -0.1}, "decay_factor is -0.1, but must be a number of at least 0"),
        ({"decay_factor": "x"}, "decay_factor is 'x', but must be a number"),
        ({"rule": "eq4"}, "rule is 'eq4', but must be one of block, paper"),
        ({"block_rule": "x"}, "block_rule is 'x', but must be one of covering, reference"),
        ({"first_distance_width": 3}, "first_distance_width is 3, but must be one of full, half"),
        ({"sink": 1}, "sink is 1, but must be true or false"),
        ({"block_size": 0}, "block_size is 0, but must be an integer of at least 1"),
        ({"split_threshold": 1.5}, "split_threshold is 1.5, but must be an integer of at least 1"),
        ({"dense_layers": -1}, "dense_layers is -1, but must be an integer of at least 0"),
        ({"dense_steps": -1}, "dense_steps is -1, but a number of steps cannot be negative"),
        ({"dense_steps": 1.5}, "dense_steps is 1.5, but a fraction of the run is between"),
        ({"last_dense_steps": "a"}, "last_dense_steps is 'a', but must be a number of steps"),
        ({"rule": "paper", "decay_factor": 0.2}, r"Equation 4 of the paper .* has no decay_factor"),
    ],
)
def test_bad_parameters(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadialAttn(**parameters)


def test_unknown_method_and_parameter_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown method 'radical'; did you mean 'radial'"):
        from_dict({"type": "radical"})
    with pytest.raises(ValueError, match="no parameter 'decay'; did you mean 'decay_factor'"):
        from_dict({"type": "radial", "decay": 0.2})
    with pytest.raises(ValueError, match=r"unknown method None; choose from .*dense, .*radial"):
        from_dict({"decay_factor": 0.2})
