"""How close two renderings are, and a picture of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# The window and constants of Wang et al. (2004), "Image Quality Assessment: From Error Visibility
# to Structural Similarity".
_WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
_PEAK = 255.0
# The weights of the scales of Wang et al. (2003), "Multiscale structural similarity for image
# quality assessment", from the finest to the coarsest.
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The window must fit into a picture that was halved four times.
MS_SSIM_SIDE = _WINDOW * 2 ** (len(_SCALES) - 1)

_NARROWEST_HALF = 256
_BAR = 28
_GAP = 4


def psnr(reference: np.ndarray, other: np.ndarray) -> float:
    """The peak signal-to-noise ratio in dB of uint8 frames; infinite for equal frames.

    The squared error is averaged over the whole clip before the logarithm is taken.
    """
    difference = reference.astype(np.float64) - other.astype(np.float64)
    error = float(np.mean(difference**2))
    return math.inf if error == 0 else 10 * math.log10(_PEAK**2 / error)


def ssim(reference: np.ndarray, other: np.ndarray) -> float:
    """The mean structural similarity (Wang et al. 2004) of uint8 frames (count, height, width, 3).

    Each channel of each frame is compared under an 11x11 Gaussian window of sigma 1.5, at every
    place where the window lies wholly inside the frame.
    """
    pairs = zip(reference, other, strict=True)
    return float(np.mean([_frame_ssim(a, b) for a, b in pairs]))


def ms_ssim(reference: np.ndarray, other: np.ndarray) -> float:
    """The mean multi-scale structural similarity (Wang et al. 2003) of uint8 frames.

    The terms of all channels of a frame are averaged at each scale. Negative terms count as 0.

    Raises:
        ValueError: if a side has fewer pixels than `MS_SSIM_SIDE`.
    """
    if min(reference.shape[1:3]) < MS_SSIM_SIDE:
        raise ValueError(f"MS-SSIM needs {MS_SSIM_SIDE} pixels a side, not {reference.shape[1:3]}")
    pairs = zip(reference, other, strict=True)
    return float(np.mean([_frame_ms_ssim(a, b) for a, b in pairs]))


def side_by_side(
    left: np.ndarray, right: np.ndarray, left_label: str, right_label: str
) -> np.ndarray:
    """Join two clips (count, height, width, 3) beside each other, with labels."""
    return in_columns([(left_label, left), (right_label, right)])


def in_columns(clips: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Join clips of one size beside each other, each under its label.

    Small clips are enlarged by a whole factor so that the labels can be read.
    """
    factor = max(1, math.ceil(_NARROWEST_HALF / clips[0][1].shape[2]))
    parts: list[np.ndarray] = []
    for label, clip in clips:
        large = _enlarge(clip, factor)
        bar = _bar(label, large.shape[2])
        column = np.concatenate([np.broadcast_to(bar, (len(large), *bar.shape)), large], axis=1)
        gap = np.zeros((*column.shape[:2], _GAP, 3), np.uint8)
        parts += [gap, column] if parts else [column]
    return np.concatenate(parts, axis=2)


def _frame_ssim(a: np.ndarray, b: np.ndarray) -> float:
    luminance, structure = _ssim_terms(a.astype(np.float64), b.astype(np.float64))
    return float(np.mean(luminance * structure))


def _frame_ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    product = 1.0
    for scale, weight in enumerate(_SCALES):
        luminance, structure = _ssim_terms(x, y)
        is_last = scale == len(_SCALES) - 1
        term = float(np.mean(luminance * structure if is_last else structure))
        product *= max(term, 0.0) ** weight
        x, y = _halved(x), _halved(y)
    return product


def _ssim_terms(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The terms of luminance, and of contrast and structure, at each place of two frames."""
    import cv2

    margin = _WINDOW // 2

    def smooth(image: np.ndarray) -> np.ndarray:
        blurred = cv2.GaussianBlur(image, (_WINDOW, _WINDOW), _SIGMA)
        return blurred[margin:-margin, margin:-margin]

    mean_x, mean_y = smooth(x), smooth(y)
    variance_x = smooth(x * x) - mean_x**2
    variance_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance, structure


def _halved(frame: np.ndarray) -> np.ndarray:
    """The means of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in frame.shape[:2])
    even = frame[:height, :width]
    rows = even[0::2] + even[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) / 4


def _enlarge(clip: np.ndarray, factor: int) -> np.ndarray:
    return clip.repeat(factor, axis=1).repeat(factor, axis=2)


def _bar(label: str, width: int) -> np.ndarray:
    """Draw a label on a dark bar, in the largest type that fits."""
    import cv2

    bar = np.full((_BAR, width, 3), 32, np.uint8)
    scale = 0.5
    while (
        scale > 0.2 and cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] > width - 8
    ):
        scale -= 0.05
    cv2.putText(
        bar, label, (4, 19), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA
    )
    return bar
