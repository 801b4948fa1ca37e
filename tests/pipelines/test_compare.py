"""The figures of a comparison against their definitions, and the side-by-side picture."""

import math

import numpy as np
import pytest

from diffattn.pipelines.run.compare import psnr, side_by_side, ssim


@pytest.fixture
def clips() -> tuple[np.ndarray, np.ndarray]:
    """A smooth clip and a noisy copy, (2, 24, 20, 3)."""
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 24)[None, :, None, None] + np.zeros((2, 24, 20, 3))
    noisy = ramp + random.normal(0, 20, ramp.shape)
    return ramp.astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


def ssim_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, one window and one channel at a time."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for frame_a, frame_b in zip(a.astype(float), b.astype(float), strict=True):
        for row in range(a.shape[1] - 10):
            for column in range(a.shape[2] - 10):
                for channel in range(3):
                    x = frame_a[row : row + 11, column : column + 11, channel]
                    y = frame_b[row : row + 11, column : column + 11, channel]
                    mx, my = (weights * x).sum(), (weights * y).sum()
                    vx = (weights * (x - mx) ** 2).sum()
                    vy = (weights * (y - my) ** 2).sum()
                    vxy = (weights * (x - mx) * (y - my)).sum()
                    values.append(
                        (2 * mx * my + c1)
                        * (2 * vxy + c2)
                        / ((mx**2 + my**2 + c1) * (vx + vy + c2))
                    )
    return float(np.mean(values))


def test_ssim_follows_its_definition(clips):
    clean, noisy = clips
    assert ssim(clean, noisy) == pytest.approx(ssim_by_definition(clean, noisy), abs=1e-9)
    assert ssim(clean, noisy) < 0.7


def test_equal_clips_have_ssim_1_and_infinite_psnr(clips):
    clean, _ = clips
    assert ssim(clean, clean) == pytest.approx(1.0)
    assert psnr(clean, clean) == math.inf


def test_psnr_of_known_errors():
    black = np.zeros((2, 16, 16, 3), np.uint8)
    assert psnr(black, black + 255) == pytest.approx(0.0)
    assert psnr(black, black + 1) == pytest.approx(48.1308, abs=1e-4)
    # The error is averaged over the clip, not the decibels: one equal frame costs 3 dB only.
    half = black.copy()
    half[1] = 1
    assert psnr(black, half) == pytest.approx(48.1308 + 10 * math.log10(2), abs=1e-4)


def test_differences_of_bytes_do_not_wrap():
    dark, light = np.full((1, 16, 16, 3), 1, np.uint8), np.full((1, 16, 16, 3), 2, np.uint8)
    assert psnr(dark, light) == psnr(light, dark)


def test_side_by_side_enlarges_small_clips_and_labels_both():
    left = np.full((3, 32, 48, 3), 100, np.uint8)
    right = np.full((3, 32, 48, 3), 200, np.uint8)
    both = side_by_side(left, right, "dense 1.0 s", "radial 0.5 s")
    assert both.shape == (3, 28 + 6 * 32, 2 * 6 * 48 + 4, 3)
    assert (both[:, 28:, : 6 * 48] == 100).all()
    assert (both[:, 28:, 6 * 48 + 4 :] == 200).all()
    bars = both[0, :28]
    assert (bars[:, : 6 * 48] > 200).any()
    assert (bars[:, 6 * 48 + 4 :] > 200).any()
    assert (both[1] == both[0]).all()


def test_side_by_side_leaves_large_clips_their_size():
    clip = np.zeros((1, 64, 300, 3), np.uint8)
    assert side_by_side(clip, clip, "a" * 200, "b").shape == (1, 92, 604, 3)
