"""The memory that a run needs at least, and the memory that its device has, before weights load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .loading import choose_device, find_model
from .model_shape import shape_of
from .request import Request

if TYPE_CHECKING:
    import torch

# Files that diffusers and transformers load without being asked for a variant.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Numbers that a block holds at a time for each token and channel: the residual, the input of the
# feed-forward, and its inner layer, 4 times as wide, before and after the activation. Attention
# holds fewer.
_PER_CHANNEL = 10

# The decoded video in float32, as the VAE and the pipeline give it: two copies of three channels.
_PER_PIXEL = 2 * 3 * 4

# From height and width in pixels to other ones.
Enlarge = Callable[[tuple[int, int]], tuple[int, int]]

_GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Need:
    """Bytes that a run cannot do without; there may be more.

    Attributes:
        tokens: video tokens of a call of the denoiser.
        weights: the weights that are on the device at a time.
        activations: one block of the denoiser, for one sample.
        video: the decoded frames.
    """

    tokens: int
    weights: int
    activations: int
    video: int

    @property
    def total(self) -> int:
        """The most that is needed at a time: the denoiser and the decoder take turns."""
        return self.weights + max(self.activations, self.video)


def check_memory(request: Request, enlarge: Enlarge | None = None) -> None:
    """Refuse a run that the memory of its device cannot hold, before anything is loaded.

    A model whose shape cannot be told from its configuration, and a device that does not say how
    much memory is free, are not checked.

    Args:
        request: the run.
        enlarge: gives the height and width of the video from those of the request.

    Raises:
        UserError: if the run needs more memory than is free, or the device or the model is refused.
    """
    device = choose_device(request.device)
    free, need = free_memory(device), least_memory(request, device, enlarge)
    if free is None or need is None or need.total <= free:
        return
    advice = ["fewer frames or a smaller size"]
    if _dtype(request, device) == "float32":
        advice.append("--dtype bfloat16")
    if device.type != "cpu" and request.offload == "none":
        advice.append("--offload model")
    raise UserError(
        f"{need.tokens:,} tokens need at least {gib(need.total)} of memory (weights"
        f" {gib(need.weights)}, a block of the denoiser {gib(need.activations)}, the decoded"
        f" video {gib(need.video)}), but {device} has {gib(free)} free: try {', '.join(advice)},"
        f" or go on anyway by --no-memory-check"
    )


def least_memory(
    request: Request, device: torch.device, enlarge: Enlarge | None = None
) -> Need | None:
    """The memory that a run needs at least; None if the model's shape or size is not known."""
    folder = _folder(request.model)
    try:
        shape = shape_of(request.model if folder is None else str(folder))
        height, width = request.height or shape.height, request.width or shape.width
        if height is None or width is None:
            return None
        if enlarge is not None:
            height, width = enlarge((height, width))
        frames = request.num_frames or shape.num_frames
        grid = shape.grid(height, width, frames, None)
    except (UserError, ValueError):
        return None  # of a size that the model cannot make, too: loading says so in full
    dtype = _dtype(request, device)
    channels = shape.heads * shape.head_dim
    parts = [] if folder is None else list(_parts(folder, dtype))
    weights = {"none": sum(parts), "model": max(parts, default=0), "group": 0}
    return Need(
        tokens=grid.video_tokens,
        weights=weights[request.offload],
        activations=_PER_CHANNEL * grid.tokens * channels * _BYTES[dtype],
        video=_PER_PIXEL * (frames or 1) * height * width,
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has free; None where that is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    free = 1024 * int(found["MemAvailable"].split()[0])
    # A container may have less than the machine.
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return min(free, int(limit)) if limit.isdigit() else free


def _dtype(request: Request, device: torch.device) -> str:
    return request.dtype or ("float32" if device.type == "cpu" else "bfloat16")


def _folder(model: str) -> Path | None:
    """The folder of a model; None for one of the hub that is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    source = find_model(model)
    if isinstance(source, Path):
        return source
    index = try_to_load_from_cache(source, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def _parts(folder: Path, dtype: str) -> Iterator[int]:
    """Bytes of the weights of each part of a pipeline, as they are loaded."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        size = 4 if part.name == "vae" else _BYTES[dtype]
        files = [path for path in part.iterdir() if _WEIGHTS.fullmatch(path.name)]
        yield sum(_loaded(tensor, size) for path in files for tensor in _tensors(path))


def _tensors(path: Path) -> list[dict[str, Any]]:
    """The entries of the header of a safetensors file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 1 << 28 else {}
    except (OSError, ValueError):
        return []  # loading says what is wrong
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _loaded(tensor: dict[str, Any], size: int) -> int:
    start, end = tensor["data_offsets"]
    if tensor["dtype"] not in _FLOATS:
        return int(end - start)
    numbers = 1
    for length in tensor["shape"]:
        numbers *= length
    return numbers * size


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / _GIB:,.1f} GiB"
