"""Radial attention: the band of tokens that a token sees halves each time the distance doubles.

Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
Generation", arXiv 2506.19852.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import ClassVar, Self, TypeVar

import torch

from diffattn._checks import FLAG, check_fields, choice, count, number
from diffattn.blocks import EMPTY, FULL
from diffattn.distinct import distinct_rows
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask, Blocking, BlockMapMask
from diffattn.masks.block_geometry import Fragments, any_in_block, fragments_of
from diffattn.methods.base import StaticMaskMethod
from diffattn.spans import Span

_T = TypeVar("_T")

_PUBLISHED_SPLIT_THRESHOLD = 128
_SMALLEST_BLOCK = 16
_BLOCKS_PER_FRAME = 8  # a frame of fewer blocks leaves no room for a band narrower than the frame


@dataclass(frozen=True)
class _Recommended:
    """A setting of the paper or its code.

    Attributes:
        frames: latent frames that the model was trained on.
        decay_factor, sink, block_size, dense_steps, dense_layers: as in `RadialAttn`.
    """

    frames: int
    decay_factor: float
    sink: bool
    block_size: int
    dense_steps: float
    dense_layers: int = 1


_LONG_VIDEO = _Recommended(
    frames=0, decay_factor=1.0, sink=True, block_size=128, dense_steps=2, dense_layers=2
)
_LONG_FROM = 1.5  # times the trained length; the paper's long videos are 2x and 4x

# From the scripts of the public code, with 12 of 50 dense steps (Wan 2.2: 11 of 40). Every other
# family takes the paper's own rule without the code's decay factor.
_RECOMMENDED = {
    "wan2.1": _Recommended(21, 0.2, sink=True, block_size=128, dense_steps=0.25),
    "wan2.2": _Recommended(21, 0.8, sink=True, block_size=64, dense_steps=0.275),
    "wan2.2-5b": _Recommended(31, 0.8, sink=True, block_size=64, dense_steps=0.275),
    "hunyuanvideo": _Recommended(33, 0.95, sink=False, block_size=128, dense_steps=0.25),
    "mochi": _Recommended(28, 1.0, sink=True, block_size=128, dense_steps=0.25),
}
_ANY_FAMILY = _Recommended(1 << 30, 1.0, sink=True, block_size=128, dense_steps=0.25)


@dataclass(frozen=True)
class _Settled:
    """The parameters after a model and a grid have replaced every None."""

    decay_factor: float
    sink: bool
    first_distance_width: str
    split_threshold: int
    block_size: int
    dense_layers: int
    dense_steps: int | float


# Parameters that Equation 4 of the paper does not have.
_OF_BLOCK_RULE = ("decay_factor", "first_distance_width", "split_threshold")

_ALLOWED = {
    "rule": choice(("block", "paper")),
    "block_rule": choice(("covering", "reference")),
    "first_distance_width": choice(("full", "half")),
    "decay_factor": number(at_least=0),
    "sink": FLAG,
    "split_threshold": count(1),
    "block_size": count(1),
}


@dataclass(frozen=True, kw_only=True)
class RadialAttn(StaticMaskMethod):
    """Radial attention (arXiv 2506.19852).

    Two frames at temporal distance d see each other within a band of tokens. The width of the band
    halves each time d doubles. A band narrower than `split_threshold` tokens keeps its width at
    every second, fourth, ... distance only, and is empty at the others. By default a token sees its
    own frame and the neighbouring frames whole.

    Attributes:
        decay_factor: factor of the band's width at distances of 2 frames and more; larger is
            denser.
        sink: whether every token sees the whole first frame.
        first_distance_width: the band between neighbouring frames (d = 1): "full" for the whole
            frame, or "half" for half a frame to either side, as in the public code for Wan until
            11/2025.
        split_threshold: band width in tokens below which whole distances are left out.
        block_size: tokens per block; the band is never narrower than a block to either side.
        rule: "block", the rule of the public code, which keeps or drops whole blocks; or "paper",
            the token-exact Equation 4, without `decay_factor`, `first_distance_width` and
            `split_threshold`.
        block_rule: how "block" turns a band of tokens into blocks. "covering" judges a block by the
            rows in the block and works on every grid. "reference" is bit-equal to the public code:
            a block at the end of a frame is judged by the pattern of the neighbouring frame, and
            rows may see nothing if a frame is no multiple of the block.

    Raises:
        ValueError: for a parameter out of range, or a parameter that `rule="paper"` does not have.
    """

    type: ClassVar[str] = "radial"
    paper: ClassVar[str] = "arXiv 2506.19852"
    most_dense_layers: ClassVar[int] = 2

    decay_factor: float | None = field(
        default=None, metadata={"help": "scales the band at distances of 2 frames and more"}
    )
    sink: bool | None = field(
        default=None, metadata={"help": "every token sees all of the first frame"}
    )
    first_distance_width: str | None = field(
        default=None, metadata={"help": "full or half: what neighbouring frames see of each other"}
    )
    split_threshold: int | None = field(
        default=None, metadata={"help": "band width below which whole distances are left out"}
    )
    block_size: int | None = field(default=None, metadata={"help": "tokens per block"})
    rule: str = field(
        default="block", metadata={"help": "block (public code) or paper (token-exact Equation 4)"}
    )
    block_rule: str = field(
        default="covering",
        metadata={"help": "covering (every grid) or reference (bit-equal to the public code)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, _ALLOWED)
        if self.rule == "paper":
            for name in _OF_BLOCK_RULE:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but Equation 4 of the paper"
                        f" (rule='paper') has no {name}; leave it out or use rule='block'"
                    )

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the published settings for a model family and video length.

        Videos of 1.5 times the model's own length and more take the paper's long-video setting,
        which the paper uses together with a LoRA. Frames of fewer than 8 blocks take smaller
        blocks.
        """
        settled = asdict(self._settled(family, grid))
        if self.rule == "paper":
            for name in _OF_BLOCK_RULE:
                del settled[name]
        return replace(self, **settled)

    def _settled(self, family: str, grid: TokenGrid | None) -> _Settled:
        best = _RECOMMENDED.get(family, _ANY_FAMILY)
        if grid is not None and grid.frames >= _LONG_FROM * best.frames:
            best = _LONG_VIDEO
        block_size = self.block_size or _block_size_that_fits(best.block_size, grid)
        threshold = _PUBLISHED_SPLIT_THRESHOLD if block_size >= 64 else block_size
        return _Settled(
            decay_factor=_given(self.decay_factor, best.decay_factor),
            sink=_given(self.sink, self.rule == "paper" or best.sink),
            first_distance_width=_given(self.first_distance_width, "full"),
            split_threshold=_given(self.split_threshold, threshold),
            block_size=block_size,
            dense_layers=_given(self.dense_layers, best.dense_layers),
            dense_steps=_given(self.dense_steps, best.dense_steps),
        )

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend among the video tokens.

        Parameters left at None take the values for a model without a recommendation. Attached to a
        pipeline, the method has the values for the pipeline's model instead.
        """
        settled = self._settled("", grid)
        if self.rule == "paper":
            return FrameBandMask(grid, self.half_widths(grid), settled.sink)
        return BlockMapMask(grid, self._block_map(settled, grid), settled.block_size)

    def mask_between(self, query: Span, key: Span) -> AttentionMask | None:
        """The band of each frame of one grid in each frame of another, by their distance in time.

        None under `block_rule="reference"`, which is about one video.
        """
        settled = self._settled("", query.grid)
        distances = query.distances(key)
        if self.rule == "paper":
            widths = self._half_widths(settled, query.grid, int(distances.max()) + 1)
            return FrameBandMask(query.grid, widths, settled.sink, key.grid, distances)
        if self.block_rule == "reference":
            return None
        block_map = self._block_map(settled, query.grid, key.grid, distances)
        return BlockMapMask(query.grid, block_map, settled.block_size)

    def block_size_on(self, grid: TokenGrid) -> int:
        return self._settled("", grid).block_size

    def half_widths(self, grid: TokenGrid) -> torch.Tensor:
        """Half the width of the band at each temporal distance, without the sink.

        Returns:
            int64 `(frames,)`: in a frame at distance d a token sees the tokens at most
            `half_widths[d]` positions from its own place in the frame; no token for -1.
        """
        return self._half_widths(self._settled("", grid), grid, grid.frames)

    def _half_widths(self, settled: _Settled, grid: TokenGrid, frames: int) -> torch.Tensor:
        """Half the width of the band at the temporal distances below `frames`."""
        size = grid.frame_tokens
        if self.rule == "paper":
            widths = [_paper_half_width(d, size) for d in range(frames)]
        else:
            widths = [self._block_half_width(settled, d, size) for d in range(frames)]
        return torch.tensor(widths)

    def _block_half_width(self, settled: _Settled, distance: int, frame_tokens: int) -> int:
        """Half the width of the band of the public code's rule at a temporal distance."""
        if distance == 0:
            return frame_tokens
        # A power of two strictly above the frame, halved with every octave of the distance.
        band = (1 << frame_tokens.bit_length()) / (1 << distance.bit_length())
        keeps_neighbours = self.block_rule == "covering" and distance == 1
        if band < settled.split_threshold and not keeps_neighbours:
            every = int(settled.split_threshold / band)
            if distance % every:
                return -1
        if distance == 1:
            return frame_tokens if settled.first_distance_width == "full" else frame_tokens // 2
        return int(max(band * settled.decay_factor, settled.block_size))

    def block_map(self, grid: TokenGrid) -> torch.Tensor:
        """The pairs of blocks that attend under `rule="block"`.

        Returns:
            bool `(query blocks, key blocks)` on the CPU, over all tokens of the grid; the last
            block may be short. Blocks of text alone are left to the text rule, except under
            `block_rule="reference"`: there every block that touches text is dense.
        """
        return self._block_map(self._settled("", grid), grid)(torch.device("cpu"))

    def _block_map(
        self,
        settled: _Settled,
        grid: TokenGrid,
        keys: TokenGrid | None = None,
        distances: torch.Tensor | None = None,
    ) -> Callable[[torch.device], torch.Tensor]:
        """The block map of `grid`, or of its video as queries and the video of `keys` as keys.

        Args:
            distances: int64 `(frames, frames of the keys)`, the temporal distances of frames; None
                without `keys`.

        Returns:
            What computes the map on a device.
        """
        if distances is None:
            distances = frame_distances(grid.frames)
        widths = self._half_widths(settled, grid, int(distances.max()) + 1)[distances]
        if settled.sink:
            widths[:, 0] = grid.frame_tokens
        rule = _block_map if self.block_rule == "covering" else _block_map_of_reference
        return partial(rule, widths, grid, keys or grid, settled.block_size)


def _block_map(
    widths: torch.Tensor, grid: TokenGrid, keys: TokenGrid, block: int, device: torch.device
) -> torch.Tensor:
    """The pairs of blocks that attend under `block_rule="covering"`, bool `(blocks, blocks)`.

    Args:
        widths: int64 `(frames, frames of the keys)`, half the width of the band between frames.
        grid, keys: the grids of queries and keys.
        block: tokens per block.
    """
    query = fragments_of(grid, block, device)
    key = query if keys == grid else fragments_of(keys, block, device)
    kept = _kept(query, key, query.size, widths)
    blocks = -(-grid.tokens // block)
    return any_in_block(kept, query, key, blocks, blocks)


def _block_map_of_reference(
    widths: torch.Tensor, grid: TokenGrid, keys: TokenGrid, block: int, device: torch.device
) -> torch.Tensor:
    """`_block_map` under `block_rule="reference"`, which is about one video."""
    part = fragments_of(grid, block, device)
    kept = _kept(part, part, torch.full_like(part.size, block), widths)
    # The public code looks at ceil(frame / block) blocks of a frame, even if the frame starts
    # inside a block and reaches into another block.
    first_block = (grid.video.start + part.frame * grid.frame_tokens) // block
    looked_at = part.block - first_block < -(-grid.frame_tokens // block)
    kept &= looked_at[:, None] & looked_at[None, :]
    blocks = -(-grid.tokens // block)
    dense = torch.ones(blocks, dtype=torch.bool, device=device)
    dense[-(-grid.video.start // block) : grid.video.stop // block] = False
    seen = any_in_block(kept, part, part, blocks, blocks)
    return seen | dense[:, None] | dense[None, :]


def _kept(
    query: Fragments, key: Fragments, rows: torch.Tensor, widths: torch.Tensor
) -> torch.Tensor:
    """Whether each pair of fragments attends, bool `(query fragments, key fragments)`.

    A key column counts as seen if more than a third of the rows see the column. A pair is kept if
    more than 60 % of the columns that any row sees count as seen. Both sets of columns are
    intervals: only their ends are computed, never a token pair.

    Args:
        rows: int64 `(query fragments,)`, the rows of which there must be a third.
        widths: int64 `(frames, frames of the keys)`, half the width of the band between frames.
    """
    # int32 halves the time and the memory.
    width = widths.to(query.frame.device, torch.int32)[query.frame][:, key.frame]
    enough, size = (x[:, None].to(torch.int32) for x in (rows // 3 + 1, query.size))
    top, bottom = (x[:, None].to(torch.int32) for x in (query.first, query.last))
    left, right = (x[None, :].to(torch.int32) for x in (key.first, key.last))
    touched = _interval(torch.maximum(left, top - width), torch.minimum(right, bottom + width))
    seen = _interval(
        torch.maximum(left, top + enough - 1 - width),
        torch.minimum(right, bottom - enough + 1 + width),
    )
    seen = seen.where((size >= enough) & (2 * width + 1 >= enough), 0)
    return (5 * seen > 3 * touched) & (width >= 0)


@dataclass(frozen=True, eq=False)
class FrameBandMask(AttentionMask):
    """A token sees the tokens near its own place in other frames; text pairs never attend.

    Attributes:
        half_widths: int64 `(distances,)`, see `RadialAttn.half_widths`.
        sink: whether every token sees the whole first frame.
        keys: the grid whose video tokens are the keys, over the same tokens as `grid` and with
            frames of the same size; None for `grid` itself.
        distances: int64 `(frames, frames of the keys)`, the temporal distances of frames that
            index `half_widths`; None where frames are 1 apart, as within one video.
    """

    half_widths: torch.Tensor
    sink: bool
    keys: TokenGrid | None = None
    distances: torch.Tensor | None = None

    @property
    def _key_grid(self) -> TokenGrid:
        return self.keys or self.grid

    @property
    def _widths(self) -> torch.Tensor:
        """Half the width of the band between frames, int64 `(frames, frames of the keys)`."""
        distances = self.distances
        if distances is None:
            distances = frame_distances(self.grid.frames)
        return self.half_widths[distances]

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        size = self.grid.frame_tokens
        is_text = self.grid.is_text(query), self._key_grid.is_text(key)
        # Text has no place in a frame and borrows the place of a video token. int32 is twice as
        # fast as int64 over many blocks.
        query, key = (
            (x.clamp(grid.video.start, grid.video.stop - 1) - grid.video.start).to(torch.int32)
            for grid, x in ((self.grid, query), (self._key_grid, key))
        )
        half_widths = self.half_widths.to(query.device, torch.int32)
        if self.distances is None:
            width = half_widths[(query // size - key // size).abs_()]
        else:
            width = half_widths[self.distances.to(query.device)][query // size, key // size]
        seen = (query % size - key % size).abs_() <= width
        if self.sink:
            seen |= key < size
        return seen & ~is_text[0] & ~is_text[1]

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        states = super().block_states(blocking)
        if blocking.order is not None:
            return states
        rows, columns = states.shape
        block_q, block_kv, device = blocking.block_q, blocking.block_kv, blocking.device
        query = fragments_of(self.grid, block_q, device)
        key = fragments_of(self._key_grid, block_kv, device)
        width = self._widths.to(device)[query.frame[:, None], key.frame[None, :]]
        if self.sink:
            width[:, key.frame == 0] = self.grid.frame_tokens
        apart = torch.maximum(
            query.first[:, None] - key.last[None, :], key.first[None, :] - query.last[:, None]
        ).clamp(min=0)
        furthest = torch.maximum(
            query.last[:, None] - key.first[None, :], key.last[None, :] - query.first[:, None]
        )
        some = any_in_block(width >= apart, query, key, rows, columns)
        missing = any_in_block(width < furthest, query, key, rows, columns)
        token = torch.arange(self.grid.tokens, device=device)
        missing[self.grid.is_text(token).nonzero().flatten() // block_q] = True
        missing[:, self._key_grid.is_text(token).nonzero().flatten() // block_kv] = True
        states[~some] = EMPTY
        states[~missing] = FULL
        return states

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor | None:
        grid, keys = self.grid, self._key_grid
        size, block_q, block_kv = grid.frame_tokens, blocking.block_q, blocking.block_kv
        if blocking.order is not None or size < max(block_q, block_kv):
            return None
        # A signature of blocks that touch at most two frames has three parts: the place in each
        # block where the frame changes, the shift between query and key in their frames, and the
        # bands between the frames involved.
        device = row.device
        starts = row * block_q - grid.video.start, column * block_kv - keys.video.start
        (query_frame, query), (key_frame, key) = ((s // size, s % size) for s in starts)
        query_change, key_change = (
            (size - query).clamp(max=block_q),
            (size - key).clamp(max=block_kv),
        )
        frames = torch.arange(grid.frames)[:, None], torch.arange(keys.frames)[None, :]
        after = (
            (frames[0] + 1).clamp(max=grid.frames - 1),
            (frames[1] + 1).clamp(max=keys.frames - 1),
        )
        around = [
            self._widths[q, k]
            for q, k in (frames, (after[0], frames[1]), (frames[0], after[1]), after)
        ]
        _, kind = distinct_rows(torch.stack(around, -1).flatten(0, 1))
        inside = query_frame.clamp(0, grid.frames - 1), key_frame.clamp(0, keys.frames - 1)
        out = kind.to(device)[inside[0] * keys.frames + inside[1]]
        out = out * 2 + (key_frame == 0)
        for part, values in (
            (query_change, block_q + 1),
            (key_change, block_kv + 1),
            (query - key + size, 2 * size),
        ):
            out = out * values + part
        # A block that reaches past either end of the video holds text and has a signature alone.
        past = torch.stack(starts).amin(0) < 0
        past |= starts[0] + block_q > grid.video_tokens
        past |= starts[1] + block_kv > keys.video_tokens
        return torch.where(past, -1 - row * (grid.tokens // block_kv + 1) - column, out)


def frame_distances(frames: int) -> torch.Tensor:
    """int64 `(frames, frames)`: the temporal distances of the frames of one video."""
    frame = torch.arange(frames)
    return (frame[:, None] - frame[None, :]).abs()


def _given(value: _T | None, recommended: _T) -> _T:
    return recommended if value is None else value


def _interval(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The number of integers from `first` to `last`; 0 if `last` is below `first`."""
    return (last - first + 1).clamp(min=0)


def _paper_half_width(distance: int, frame_tokens: int) -> int:
    """The largest |k - l| of Equation 4, and -1 for none.

    The equation wants |k - l| + 1 <= s / b. Once b > s, it wants k = l at every ceil(b / s)-th
    distance.
    """
    b = 1 << (max(distance, 1).bit_length() - 1)
    if b <= frame_tokens:
        return frame_tokens // b - 1
    return 0 if distance % -(-b // frame_tokens) == 0 else -1


def _block_size_that_fits(recommended: int, grid: TokenGrid | None) -> int:
    if grid is None:
        return recommended
    size = recommended
    while size > _SMALLEST_BLOCK and size * _BLOCKS_PER_FRAME > grid.frame_tokens:
        size //= 2
    return size
