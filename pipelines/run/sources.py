"""The pictures and the video that a run starts from: read, fitted, and given to the call."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line
from .pipeline_class import edits
from .request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels of a picture whose model does not say how many it makes.
_USUAL_PIXELS = 1024**2


@dataclass(frozen=True)
class Sources:
    """What a run starts from, as it was read.

    Attributes:
        images: first frames or reference pictures, in the order given.
        last_image: the last frame.
        video: the file of the video to change.
        first_frame: of the video.
    """

    images: tuple[Image, ...] = ()
    last_image: Image | None = None
    video: Path | None = None
    first_frame: Image | None = None

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width of the first of them; None if there are none."""
        for image in (*self.images, self.last_image, self.first_frame):
            if image is not None:
                return image.height, image.width
        return None


def source_files(request: Request) -> list[Path]:
    """The files that a request starts from.

    Raises:
        UserError: if one of them is not there.
    """
    kinds = {"picture": [*request.image, request.last_image], "video": [request.input]}
    files = []
    for kind, names in kinds.items():
        for path in (Path(name).expanduser() for name in names if name is not None):
            if not path.is_file():
                raise UserError(f"there is no {kind} file {path}")
            files.append(path)
    return files


def read_sources(request: Request, say: Callable[[str], None]) -> Sources:
    """Read the pictures of a request, and the first frame of its video.

    Raises:
        UserError: if a file cannot be read.
    """
    from .upscale_picture import read_picture

    def read(name: str) -> Image:
        return read_picture(Path(name).expanduser(), say)

    video = None if request.input is None else Path(request.input).expanduser()
    return Sources(
        images=tuple(read(name) for name in request.image),
        last_image=None if request.last_image is None else read(request.last_image),
        video=video,
        first_frame=None if video is None else read_clip(video, None, 1)[0],
    )


def read_clip(path: Path, fps: float | None, most: int | None) -> list[Image]:
    """The first frames of a video.

    Args:
        path: the file.
        fps: frames a second to read the video at; None for each of its frames.
        most: number of frames, of fewer if the video is shorter; None for all.

    Raises:
        UserError: if the file cannot be read or is a still picture.
    """
    from PIL import Image

    from diffattn.lora.frames import at_rate, read_frames

    try:
        frames = read_frames(path)
        chosen = frames if fps is None else at_rate(frames, fps)
        pictures = [Image.fromarray(frame.pixels) for frame in itertools.islice(chosen, most)]
    except Exception as error:  # decoders raise errors of many kinds for bad files
        raise UserError(f"cannot read {path} as a video: {one_line(error)}") from None
    if not pictures:
        raise UserError(f"cannot read {path} as a video: it holds no frame")
    return pictures


def fitting_size(
    shape: tuple[int, int],
    multiple: int,
    usual: tuple[int | None, int | None],
    asked: tuple[int | None, int | None],
) -> tuple[int, int]:
    """Height and width in pixels for a picture to keep its shape.

    Args:
        shape: height and width of the picture.
        multiple: of which both sides have to be multiples.
        usual: the model's own height and width, whose number of pixels is kept; None if unknown.
        asked: height and width that the user gave; None for a side that follows.
    """
    height, width = asked
    ratio = shape[0] / shape[1]
    if height is None and width is None:
        own = min(shape[0] * shape[1], _USUAL_PIXELS)
        pixels = own if usual[0] is None or usual[1] is None else usual[0] * usual[1]
        height = _nearest(math.sqrt(pixels * ratio), multiple)
        return height, _nearest(math.sqrt(pixels / ratio), multiple)
    if height is None:
        assert width is not None
        return _nearest(width * ratio, multiple), width
    return height, _nearest(height / ratio, multiple) if width is None else width


def _nearest(size: float, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple


def fitted(image: Image, height: int, width: int) -> Image:
    """A picture scaled to cover a size, and cropped at its centre: nothing is stretched."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    return ImageOps.fit(image, (width, height), Resampling.LANCZOS)


def source_arguments(
    cls: type,
    sources: Sources,
    clip: Sequence[Image],
    request: Request,
) -> dict[str, Any]:
    """The arguments of a pipeline's call for the sources of a run.

    Args:
        cls: the class of the pipeline, one that takes all of them.
        sources: the pictures.
        clip: the frames of the video; empty without a video.
        request: the complete request.
    """
    assert request.height is not None
    assert request.width is not None
    names = inspect.signature(cls.__call__).parameters

    def frame(image: Image) -> Image:
        return fitted(image, request.height or 0, request.width or 0)

    given: dict[str, Any] = {}
    if clip:
        given["video"] = [frame(image) for image in clip]
    if request.strength is not None:
        given["strength"] = request.strength
    images = [*sources.images] if edits(cls) else [frame(image) for image in sources.images]
    last = None if sources.last_image is None else frame(sources.last_image)
    if "conditions" in names and (last is not None or "image" not in names):
        given["conditions"] = _conditions(cls, images, last, request)
    elif last is not None:
        given["last_image"] = last
    if images and "conditions" not in given:
        several = len(images) > 1 or "reference_images" in names
        name = "reference_images" if "reference_images" in names else "image"
        given[name] = images if several else images[0]
    # Kontext makes a picture of so many pixels, whatever its height and width.
    if images and "max_area" in names:
        given["max_area"] = request.height * request.width
    return given


def _conditions(
    cls: type, images: Sequence[Image], last: Image | None, request: Request
) -> list[Any]:
    """Conditions of LTX-Video and LTX-2 on the first and the last frame."""
    assert request.num_frames is not None
    places = [(image, 0) for image in images]
    if last is not None:
        places.append((last, request.num_frames - 1))
    if cls.__name__.startswith("LTX2"):
        # Frames are counted in latents there, from the end if below 0.
        places = [(image, -1 if index else 0) for image, index in places]
        from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

        return [LTX2VideoCondition(frames=image, index=index) for image, index in places]
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    return [LTXVideoCondition(image=image, frame_index=index) for image, index in places]
