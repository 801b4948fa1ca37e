"""Layouts of every kind of mask: the mask token by token, and built with few operations."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffattn.blocks
import diffattn.masks.base
import diffattn.masks.neighbourhood
from diffattn import CLEARAttn, FreeSwimAttn, GNAAttn, RadialAttn, TokenGrid
from diffattn.grid import Reference
from diffattn.methods import METHODS, AttentionTileAttn, LVSAAttn
from diffattn.methods.base import StaticMaskMethod

Places = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # frames, rows, columns
Rule = Callable[[TokenGrid, Places, Places], torch.Tensor]

EVERY_METHOD = {
    "radial": RadialAttn(block_size=16),
    "radial, reference": RadialAttn(block_size=16, block_rule="reference"),
    "radial, paper": RadialAttn(rule="paper"),
    "clear, ellipsoid": CLEARAttn(radius=4, frame_radius=3),
    "clear, cylinder": CLEARAttn(radius=3, frame_radius=2, window="cylinder", first_frame=False),
    "gna": GNAAttn(window=(3, 4, 5), stride=(1, 2, 3)),
    "gna, dilated": GNAAttn(window=(2, 2, 3), dilation=(1, 2, 2)),
    "gna, causal": GNAAttn(window=(3, 3, 4), is_causal=(True, False, True)),
    "freeswim": FreeSwimAttn(native=(4, 4), radius=(1, 2)),
    "attention-tile": AttentionTileAttn(global_frames=2),
    "lvsa": LVSAAttn(window=1, period=3),
}
GRIDS = {
    "text after": TokenGrid(5, 7, 9, text_after=23),
    "text before": TokenGrid(4, 6, 11, text_before=13),
    "causal": TokenGrid(6, 5, 7, causal_frames=2, text_after=3),
    "no text": TokenGrid(3, 5, 13),
    "a reference": TokenGrid(3, 6, 8, text_after=60, references=(Reference(148, 1, 6, 8),)),
}


def _ellipsoid(grid: TokenGrid, query: Places, key: Places) -> torch.Tensor:
    frames, rows, columns = ((q - k).abs() for q, k in zip(query, key, strict=True))
    near = (frames < 3) & ((rows**2 + columns**2) / 4**2 + frames**2 / 3**2 < 1 - 1e-9)
    return near | (query[0] == 0) | (key[0] == 0)


def _cylinder(grid: TokenGrid, query: Places, key: Places) -> torch.Tensor:
    frames, rows, columns = ((q - k).abs() for q, k in zip(query, key, strict=True))
    return (frames < 2) & (rows**2 + columns**2 < 3**2)


def _windows(*axes: dict[str, Any]) -> Rule:
    """GNA's rule, query by query, with the windows of (frames, rows, columns)."""

    def sees(size: int, at: int, window: int, stride: int = 1, dilation: int = 1,
             is_causal: bool = False) -> list[bool]:  # fmt: skip
        of_class = list(range(at % dilation, size, dilation))
        place = of_class.index(at)
        group = of_class[place // stride * stride :][:stride]
        if is_causal:
            first = max(0, of_class.index(group[-1]) - window + 1)
            seen = of_class[first : place + 1]
        else:
            middle = of_class.index(group[min(stride // 2, len(group) - 1)])
            first = min(max(0, middle - window // 2), len(of_class) - window)
            seen = of_class[first : first + window]
        return [key in seen for key in range(size)]

    def rule(grid: TokenGrid, query: Places, key: Places) -> torch.Tensor:
        out = torch.ones(1, 1, dtype=torch.bool)
        sizes = (grid.frames, grid.height, grid.width)
        for q, k, size, axis in zip(query, key, sizes, axes, strict=True):
            axis = axis | {"window": min(size, axis["window"])}
            table = torch.tensor([sees(size, at, **axis) for at in range(size)])
            out = out & table[q, k]
        return out

    return rule


def _global_frames(grid: TokenGrid, query: Places, key: Places) -> torch.Tensor:
    step = -(-grid.frames // 2)
    return (query[0] == key[0]) | (query[0] % step == 0) | (key[0] % step == 0)


RULES: dict[str, Rule] = {
    "clear, ellipsoid": _ellipsoid,
    "clear, cylinder": _cylinder,
    "gna": _windows({"window": 3}, {"window": 4, "stride": 2}, {"window": 5, "stride": 3}),
    "gna, dilated": _windows(
        {"window": 2}, {"window": 2, "dilation": 2}, {"window": 3, "dilation": 2}
    ),
    "gna, causal": _windows(
        {"window": 3, "is_causal": True}, {"window": 3}, {"window": 4, "is_causal": True}
    ),
    "freeswim": _windows({"window": 1 << 10}, {"window": 3}, {"window": 5}),
    "attention-tile": _global_frames,
}


def by_definition(rule: Rule, grid: TokenGrid) -> torch.Tensor:
    """The mask of a rule between video tokens, with text and blocks of frames: bool, dense."""
    place = torch.cartesian_prod(
        torch.arange(grid.frames), torch.arange(grid.height), torch.arange(grid.width)
    )
    query, key = ([x[:, None] for x in place.T], [x[None, :] for x in place.T])
    video = rule(grid, tuple(query), tuple(key))
    if grid.causal_frames:
        video = video & (query[0] // grid.causal_frames >= key[0] // grid.causal_frames)
    out = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    out[grid.video, grid.video] = video
    return out


def set_chunks(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    for module in (diffattn.blocks, diffattn.masks.base, diffattn.masks.neighbourhood):
        monkeypatch.setattr(module, "pairs_per_chunk", lambda device: pairs)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_layouts_hold_the_tokens_of_the_definition(name: str, grid: TokenGrid) -> None:
    method = EVERY_METHOD[name]
    mask = method.mask(grid)
    want = mask.dense()
    if name in RULES and not grid.references:
        assert torch.equal(want, by_definition(RULES[name], grid))
    for order in {None, method.order(grid)}:
        token = torch.arange(grid.tokens) if order is None else order.positions()
        for block_q, block_kv in ((16, 16), (13, 40)):
            layout = mask.blocks(block_q, block_kv, order=order)
            assert torch.equal(layout.dense()[0, 0], want[token][:, token])
            masks = layout.bit_masks.flatten(1)
            assert len(masks.unique(dim=0)) == len(masks)


@pytest.mark.parametrize("pairs", [600, 1 << 22])
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_chunks_make_no_difference(name: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU takes more pairs at a time than a CPU; of few pairs, masks lie in several chunks.
    grid, method = GRIDS["text after"], EVERY_METHOD[name]
    order = method.order(grid)
    want = method.video_mask(grid).blocks(16, order=order)
    set_chunks(monkeypatch, pairs)
    monkeypatch.setattr(diffattn.blocks, "_PACKED_PAIRS_PER_CHUNK", 8 * pairs)
    found = method.video_mask(grid).blocks(16, order=order)
    assert all(map(torch.equal, found.tensors, want.tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_gpu_builds_what_a_cpu_builds(name: str) -> None:
    for grid in GRIDS.values():
        method = EVERY_METHOD[name]
        for order in {None, method.order(grid)}:
            for sizes in ((16, 16), (13, 40)):
                want = method.mask(grid).blocks(*sizes, order=order)
                found = method.mask(grid).blocks(*sizes, device="cuda", order=order).to("cpu")
                assert all(map(torch.equal, found.tensors, want.tensors))


class _Operations(TorchDispatchMode):
    """Counts the operations of torch by name; views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


# On a GPU an operation takes 10 microseconds of the host, however few tokens there are.
@pytest.mark.parametrize(
    ("name", "most"),
    [("radial", 400), ("clear", 3500), ("gna", 1800), ("freeswim", 1500), ("attention-tile", 600)],
)
def test_building_takes_few_operations(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunks(monkeypatch, 1 << 22)  # as on a GPU
    grid = TokenGrid(17, 45, 80, text_after=256)
    method: Any = METHODS[name]().for_model("hunyuanvideo", grid)
    assert isinstance(method, StaticMaskMethod)
    with _Operations() as operations:
        method.layout(grid, torch.device("cpu"), method.order(grid))
    assert operations.count.total() < most
    assert not operations.count["aten::unique_dim"]  # which sorts whole rows
