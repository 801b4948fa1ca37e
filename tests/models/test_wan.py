"""Two quirks of Wan's pipelines and VAE: the frames that they make and take."""

from types import SimpleNamespace

import pytest
import torch

from diffattn.models.wan import encode_all_frames, frames_to_ask_for


def rounded(num_frames: int, factor: int) -> int:
    """What `WanPipeline.__call__` makes of its argument `num_frames`, in its own words."""
    if num_frames % factor != 1:
        num_frames = num_frames // factor * factor + 1
    return max(num_frames, 1)


@pytest.mark.parametrize(("factor", "frames"), [(1, range(1, 12)), (4, range(1, 42, 4))])
def test_pipelines_make_the_frames_that_are_wanted(factor: int, frames: range) -> None:
    pipe = SimpleNamespace(vae_scale_factor_temporal=factor)
    for wanted in frames:
        assert rounded(frames_to_ask_for(pipe, wanted), factor) == wanted


def one_and_then_fours(pixels: torch.Tensor, stride: int) -> torch.Tensor:
    """A VAE's encoder in frames: the last of every `stride` in the first frame and whole fours."""
    taken = 1 + (pixels.shape[2] - 1) // 4 * 4
    return pixels[:, :, :taken:stride]


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("frames", range(1, 11))
def test_no_frame_is_left_out(frames: int, stride: int) -> None:
    pixels = torch.randn(2, 3, frames, 4, 5)
    latents = encode_all_frames(lambda x: one_and_then_fours(x, stride), pixels, stride)
    # In a causal VAE a latent frame has a place for its last frame, if that is there.
    assert torch.equal(latents, pixels[:, :, ::stride])
