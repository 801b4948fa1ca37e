"""The parameters of each method that set its share of the token pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from diffattn import TokenGrid
    from diffattn.methods import Method

Settings = dict[str, Any]

_LEAST = 0.001


@dataclass(frozen=True)
class Knob:
    """The parameters of a method that set its share of the pairs.

    Attributes:
        names: of the parameters.
        turned: takes a place from 0, the fewest pairs, to 1, the most, the tokens of a call, and
            the method as the user gave it. It gives the parameters. The share grows with the place.
        by_content: whether the share depends on what the tokens hold, and so is known only after a
            run.
    """

    names: tuple[str, ...]
    turned: Callable[[float, TokenGrid, Any], Settings]
    by_content: bool = False

    def turn(self, method: Method, place: float, grid: TokenGrid) -> Method:
        """The method with the share of the pairs at a place of the knob, from 0 to 1."""
        return replace(method, **self.turned(place, grid, method))


def knob_of(method: Method) -> Knob | None:
    """The knob of a method; None if no parameter sets its share of the pairs."""
    own: Any = method
    if method.type == "radial" and own.rule == "paper":
        return None
    if method.type == "vmoba" and own.for_model("").select == "threshold":
        return _THRESHOLD
    return KNOBS.get(method.type)


def check_knob(method: Method, option: str, advice: str) -> Knob:
    """The knob of a method.

    Args:
        method: the method as the user gave it.
        option: begins the message.
        advice: says what to do with a method that has no knob.

    Raises:
        UserError: if the method has none, or if one of its parameters differs from step to step.
    """
    knob = knob_of(method)
    if knob is None:
        those = " with these parameters" if method.type in KNOBS else ""
        raise UserError(
            f"{option}: no parameter of {method.type}{those} sets its share of the token pairs;"
            f" {advice}"
        )
    for name in knob.names:
        if name in dict(method.by_step):
            raise UserError(
                f"{option}: {name} of {method.type} differs from step to step, but sets the share"
                f" of the token pairs: give one value"
            )
    return knob


def _whole(place: float, most: int, least: int = 1, up_from: float = 0.5) -> int:
    """A whole number from `least` to `most`; fractions are rounded up from `up_from` on.

    Axes that are rounded differently grow one after another, which makes finer steps.
    """
    return least + int(place * (most - least) + 1 - up_from)


def _share(place: float, blocks: int) -> float:
    """The share of a whole number of blocks; not 1, which is another method, dense attention."""
    return min(1 - 0.5 / blocks, _whole(place, blocks) / blocks)


def _keep(place: float, grid: TokenGrid, method: Any) -> Settings:
    return {"keep": max(_LEAST, round(place, 4))}


def _block_topk(place: float, grid: TokenGrid, method: Any) -> Settings:
    return {"keep": _share(place, -(-grid.tokens // method.block))}


def _radial(place: float, grid: TokenGrid, method: Any) -> Settings:
    # In the upper half the bands grow. In the lower half more and more distances of frames are left
    # out, and the whole frames that the default sees. Distances that divide are not left out one by
    # one: there the share may rise by some percent before it falls.
    if place >= 0.5:
        return {"decay_factor": round(16 * (2 * place - 1) ** 2, 4)}
    usual = method.split_threshold or method.for_model("", grid).split_threshold
    most = max(usual, 1 << grid.frame_tokens.bit_length())
    narrow = {"sink": False, "first_distance_width": "half"}
    free = {name: value for name, value in narrow.items() if getattr(method, name) is None}
    threshold = round(usual * (most / usual) ** (1 - 2 * place))
    return {"decay_factor": 0.0, "split_threshold": threshold, **free}


def _gna(place: float, grid: TokenGrid, method: Any) -> Settings:
    side = place ** (1 / 3)
    axes = ((grid.frames, 0.75), (grid.height, 0.5), (grid.width, 0.25))
    window = []
    for (size, up_from), apart in zip(axes, _per_axis(method.dilation), strict=True):
        window.append(_whole(side, max(1, size // apart), up_from=up_from))
    if method.stride is None:
        return {"window": tuple(window)}
    strides = zip(_per_axis(method.stride), window, strict=True)
    return {"window": tuple(window), "stride": tuple(min(pair) for pair in strides)}


def _per_axis(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """A parameter of GNA for frames, height and width; left-out axes have one token."""
    return (value,) * 3 if isinstance(value, int) else (1,) * (3 - len(value)) + value


def _clear(place: float, grid: TokenGrid, method: Any) -> Settings:
    side = place ** (1 / 3)
    diagonal = 1 + int((grid.height**2 + grid.width**2) ** 0.5)
    frame_radius = _whole(side, grid.frames, up_from=0.75)
    radii = {"radius": _whole(side, diagonal), "frame_radius": frame_radius}
    leaves_first = method.first_frame is None and place < 0.5
    return radii | ({"first_frame": False} if leaves_first else {})


def _freeswim(place: float, grid: TokenGrid, method: Any) -> Settings:
    side = place**0.5
    rows, columns = grid.height // 2, grid.width // 2
    return {"radius": (_whole(side, rows, 0), _whole(side, columns, 0, up_from=0.25))}


def _attention_tile(place: float, grid: TokenGrid, method: Any) -> Settings:
    return {"global_frames": _whole(place, grid.frames)}


def _lvsa(place: float, grid: TokenGrid, method: Any) -> Settings:
    # Windows have odd numbers of frames; the first frame makes the even ones. Without a window a
    # frame would not see itself.
    seen = _whole(place, grid.frames, min(3, grid.frames))
    return {"window": max(1, (seen - 1) // 2), "first_frames": 1 - seen % 2, "period": 0}


def _vmoba(place: float, grid: TokenGrid, method: Any) -> Settings:
    topk = {}
    for layer in range(len(method.partitions)):
        kind = method.partitions[method.layer_kind(layer)]
        topk[kind] = _whole(place, len(method.partition(grid, layer).lengths()))
    return {"topk": tuple(topk.get(kind, 1) for kind in ("1d", "2d", "3d"))}


def _svg2(place: float, grid: TokenGrid, method: Any) -> Settings:
    top_p = max(0.01, round(place, 4))
    return {"top_p": top_p, "min_ratio": min(method.min_ratio, top_p)}


KNOBS: Mapping[str, Knob] = {
    "radial": Knob(("decay_factor", "split_threshold", "sink", "first_distance_width"), _radial),
    "gna": Knob(("window", "stride"), _gna),
    "clear": Knob(("radius", "frame_radius", "first_frame"), _clear),
    "freeswim": Knob(("radius",), _freeswim),
    "vmoba": Knob(("topk",), _vmoba),
    "sol": Knob(("tau",), lambda place, grid, method: {"tau": round(4 - 8 * place, 4)}, True),
    "block-topk": Knob(("keep",), _block_topk),
    "svg2": Knob(("top_p", "min_ratio"), _svg2, by_content=True),
    "attention-tile": Knob(("global_frames",), _attention_tile),
    "lvsa": Knob(("window", "first_frames", "period"), _lvsa),
    "sla": Knob(("keep",), _keep),
    "sla2": Knob(("keep",), _keep),
    "vsa": Knob(("keep",), _keep),
}
# VMoBA with select="threshold".
_THRESHOLD = Knob(
    ("tau",), lambda place, grid, method: {"tau": max(_LEAST, round(place, 4))}, by_content=True
)
