"""Measures of other packages, which are taken where the package is installed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line
from .clip import Clip, NotMeasuredError

# Packages that the extra "compare" installs.
IN_EXTRA = ("flip-evaluator",)
_MODULES = {"flip-evaluator": "flip_evaluator"}
# FLIP takes a tenth of a second a frame: of long videos so many frames are compared.
FLIP_FRAMES = 16
_LPIPS_FRAMES_AT_ONCE = 8
# The weights below LPIPS' own, as torchvision names them.
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
# Smaller frames leave nothing of a side in AlexNet's last layers.
LPIPS_SIDE = 31


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be imported here."""
    return importlib.util.find_spec(_MODULES.get(package, package)) is not None


def flip(dense: Clip, other: Clip) -> float:
    """The mean FLIP error (Andersson et al. 2020), 0 to 1, of at most `FLIP_FRAMES` even frames."""
    import flip_evaluator

    count = len(dense.frames)
    some = np.unique(np.linspace(0, count - 1, min(count, FLIP_FRAMES)).round().astype(int))
    errors = []
    for index in some:
        a, b = (x.frames[index].astype(np.float32) / 255 for x in (dense, other))
        _, error, _ = flip_evaluator.evaluate(a, b, "LDR", applyMagma=False)
        errors.append(float(error))
    return float(np.mean(errors))


def lpips(dense: Clip, other: Clip) -> float:
    """The mean LPIPS distance (Zhang et al. 2018, AlexNet) of the frames."""
    import torch

    model = lpips_network()
    values = []
    for first in range(0, len(dense.frames), _LPIPS_FRAMES_AT_ONCE):
        pair = [
            torch.from_numpy(x.frames[first : first + _LPIPS_FRAMES_AT_ONCE])
            .permute(0, 3, 1, 2)
            .float()
            / 127.5
            - 1
            for x in (dense, other)
        ]
        with torch.no_grad():
            values += model(*pair).flatten().tolist()
    return float(np.mean(values))


@functools.cache
def lpips_network() -> Any:
    """The network of LPIPS with its weights.

    The package brings the weights of its own layers. Those of AlexNet below are torchvision's,
    which are looked for among the files of `torch.hub`, and downloaded if they are not there.

    Raises:
        NotMeasuredError: if the package cannot be imported, or if weights cannot be had.
    """
    try:
        # torchvision is made for one release of torch, and fails in many ways beside another.
        import lpips
    except Exception as error:
        raise NotMeasuredError(
            f"the package lpips cannot be imported ({one_line(error)}): it needs a torchvision made"
            f" for this torch, {_torch_version()}"
        ) from None
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision warns of arguments that lpips gives
            return lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:  # a download fails in many ways
        raise NotMeasuredError(_without_weights(error)) from None


def _without_weights(error: Exception) -> str:
    """Why LPIPS has no weights, and what to do."""
    from torch.hub import get_dir

    path = Path(get_dir(), "checkpoints", ALEXNET.rpartition("/")[2])
    if path.exists():
        return f"LPIPS cannot read AlexNet's weights {path} ({one_line(error)}): remove the file"
    return (
        f"LPIPS lacks AlexNet's weights ({one_line(error)}): download {ALEXNET} and put the file"
        f" at {path}"
    )


def _torch_version() -> str:
    import torch

    return torch.__version__
