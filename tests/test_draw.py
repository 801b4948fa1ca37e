"""Pictures: the colours at known places, and that no picture looks at every pair of tokens."""

from dataclasses import dataclass, field

import cv2
import numpy as np
import pytest
import torch

from diffattn import (
    AttentionMask,
    CLEARAttn,
    DenseAttn,
    GNAAttn,
    RadialAttn,
    SolAttn,
    SVG2Attn,
    TokenGrid,
    VSAAttn,
    draw,
    plan,
)
from diffattn.grid import Reference
from diffattn.methods.base import Site
from diffattn.methods.call_selection import AttentionCall, selection_of_call, smooth_tokens

SMALL = TokenGrid(3, 4, 5, 2, 3)
METHOD = GNAAttn(window=(3, 3, 2))


def color(image, row, column):
    return tuple(int(value) for value in image[row, column])


def shade(density):
    """The colour of a share of pairs that attend, worked out value by value."""
    depth = density**0.5
    pairs = zip(draw.NONE, draw.ALL, strict=True)
    return tuple(round(none * (1 - depth) + every * depth) for none, every in pairs)


def has(image, wanted):
    return bool((image == np.array(wanted, np.uint8)).all(-1).any())


class TestMaskImage:
    def test_every_pair_of_a_small_mask(self):
        mask = METHOD.mask(SMALL)
        image = draw.mask_image(mask, 70 * 5)
        assert image.shape == (350 // 65 * 65, 350 // 65 * 65, 3)
        dense = mask.dense()
        for query in range(65):
            for key in range(65):
                wanted = draw.ALL if dense[query, key] else draw.NONE
                assert color(image, query * 5 + 2, key * 5 + 2) == wanted

    def test_frames_and_text_have_lines(self):
        image = draw.mask_image(METHOD.mask(SMALL), 65 * 8)
        for token in (2, 62):
            assert (image[token * 8] == draw.TEXT_LINE).all()
            assert (image[:, token * 8] == draw.TEXT_LINE).all()
        for token in (22, 42):
            for along in range(8 * 2 + 1, 8 * 62, 8):
                if along // 8 not in (22, 42):
                    under = np.array(color(image, token * 8 + 1, along))
                    wanted = np.rint(0.55 * under + 0.45 * np.array(draw.FRAME_LINE))
                    assert (image[token * 8, along] == wanted).all()
        assert color(image, 8 * 8, 60 * 8 + 1) in (draw.NONE, draw.ALL)

    def test_references_have_lines(self):
        grid = TokenGrid(1, 4, 5, 2, 30, references=(Reference(25, 1, 4, 5),))
        image = draw.mask_image(METHOD.mask(grid), 52 * 8)
        for token, line in (
            (2, draw.TEXT_LINE),
            (25, draw.REFERENCE_LINE),
            (45, draw.REFERENCE_LINE),
        ):
            assert (image[token * 8, :8] == line).all()
            assert (image[:8, token * 8] == line).all()

    def test_shades_of_a_large_mask_are_the_share_that_attends(self):
        # 3 x 10 x 13 tokens in squares of 13: all queries of a square are looked at.
        grid = TokenGrid(3, 10, 13)
        mask = GNAAttn(window=(2, 5, 7)).mask(grid)
        image = draw.mask_image(mask, 30)
        assert image.shape == (30, 30, 3)
        shares = mask.dense().double().view(30, 13, 30, 13).mean((1, 3))
        # Lines are where frames of 10 pixels begin.
        inside = [i for i in range(30) if i % 10]
        for row in inside:
            for column in inside:
                assert color(image, row, column) == shade(float(shares[row, column]))

    def test_the_last_square_may_hold_fewer_tokens(self):
        mask = DenseAttn().mask(TokenGrid(1, 10, 7, 0, 1))
        image = draw.mask_image(mask, 11)
        assert image.shape == (11, 11, 3)
        line = 70 * 11 // 77
        kept = [i for i in range(11) if i != line]
        assert (image[kept][:, kept] == draw.ALL).all()

    def test_very_many_frames_have_no_lines(self):
        image = draw.mask_image(DenseAttn().mask(TokenGrid(60, 1, 2)), 120)
        assert (image == draw.ALL).all()


class TestBlockImage:
    def test_every_block(self):
        grid = TokenGrid(3, 7, 9, 0, 5)
        mask = GNAAttn(window=3).mask(grid)
        layout = mask.blocks(16)
        image = draw.block_image(layout, 200)
        side = 200 // layout.rows
        assert image.shape == (side * layout.rows, side * layout.rows, 3)
        dense = mask.dense()
        found = set()
        for row in range(layout.rows):
            for column in range(layout.columns):
                block = dense[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
                some = draw.SOME if block.any() else draw.NONE
                wanted = draw.ALL if block.all() else some
                found.add(wanted)
                for inside in (0, side - 1):
                    assert color(image, row * side + inside, column * side + inside) == wanted
        assert found == {draw.NONE, draw.SOME, draw.ALL}

    def test_more_blocks_than_pixels(self):
        layout = RadialAttn(block_size=16).layout(TokenGrid(8, 16, 16), torch.device("cpu"))
        assert layout.rows == 128
        image = draw.block_image(layout, 50)
        assert image.shape == (50, 50, 3)
        assert color(image, 0, 0) == draw.ALL
        away = np.abs(image.astype(int) - draw.NONE).sum(-1) + np.abs(
            image.astype(int) - draw.ALL
        ).sum(-1)
        assert (away > 0).all()
        density = (np.array(draw.NONE) - image.mean((0, 1))) / np.subtract(draw.NONE, draw.ALL)
        assert density == pytest.approx(layout.density, abs=0.01)


class TestFrameImages:
    def test_every_token_of_every_frame(self):
        mask = METHOD.mask(SMALL)
        query = (1, 2, 3)
        images = draw.frame_images(mask, query, 8)
        assert len(images) == 3
        seen = mask.dense()[2 + 20 + 2 * 5 + 3]
        for frame, image in enumerate(images):
            assert image.shape == (32, 40, 3)
            for row in range(4):
                for column in range(5):
                    wanted = draw.ALL if seen[2 + frame * 20 + row * 5 + column] else draw.NONE
                    wanted = draw.QUERY if (frame, row, column) == query else wanted
                    for inside in (0, 7):
                        at = row * 8 + inside, column * 8 + inside
                        assert color(image, *at) == wanted

    @pytest.mark.parametrize("scale", [1, 3, 0.25])
    def test_a_small_token_is_marked_with_a_ring(self, scale):
        grid = TokenGrid(2, 60, 80)
        images = draw.frame_images(GNAAttn(window=(1.0, 9, 9)).mask(grid), (1, 40, 20), scale)
        assert images[0].shape == (60 * scale, 80 * scale, 3)
        assert not has(images[0], draw.QUERY)
        top, left = int(40 * scale), int(20 * scale)
        assert color(images[1], top, left) == draw.QUERY
        red = (images[1] == draw.QUERY).all(-1)
        assert red[top : top + 3, left : left + 3].all()
        assert red.sum() > 9
        far = np.argwhere(red) - (top, left)
        assert np.abs(far).max() <= 12

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ((3, 0, 0), r"the query's frame is 3, but the grid .* has frames 0 to 2"),
            ((0, -1, 0), r"the query's row is -1, but the grid .* has rows 0 to 3"),
            ((0, 0, 5), r"the query's column is 5, but the grid .* has columns 0 to 4"),
        ],
    )
    def test_tokens_outside_of_the_grid(self, query, message):
        with pytest.raises(ValueError, match=message):
            draw.frame_images(METHOD.mask(SMALL), query)
        with pytest.raises(ValueError, match=message):
            draw.picture(METHOD, SMALL, query)

    def test_the_middle(self):
        assert draw.middle(TokenGrid(21, 30, 53)) == (10, 15, 26)
        assert draw.middle(TokenGrid(1, 1, 1)) == (0, 0, 0)


class TestSelections:
    """Pictures of methods that select by content, in calls with given queries and keys."""

    @staticmethod
    def call(grid):
        return AttentionCall(*smooth_tokens(grid, 16, 0), Site("wan", 0, 1, grid))

    def test_every_pair_has_the_colour_of_how_it_is_seen(self):
        selection = selection_of_call(SolAttn(block=16, tau=9, neighbours=0), self.call(SMALL))
        mask, rest = selection.pairs, selection.rest
        image = draw.mask_image(mask, 65 * 5, rest)
        seen = mask.dense()
        assert 0.1 < seen.float().mean() < 0.9
        for query in range(65):
            for key in range(65):
                wanted = draw.ALL if seen[query, key] else draw.REST
                assert color(image, query * 5 + 2, key * 5 + 2) == wanted
        images = draw.frame_images(mask, (1, 2, 3), 8, rest)
        place = 2 + 20 + 2 * 5 + 3
        for token in range(60):
            if token + 2 == place:
                continue
            frame, row, column = token // 20, token % 20 // 5, token % 5
            wanted = draw.ALL if seen[place, token + 2] else draw.REST
            assert color(images[frame], row * 8 + 3, column * 8 + 3) == wanted

    @pytest.mark.parametrize(
        ("method", "tinted"),
        [
            (SolAttn(block=16), True),
            (SolAttn(block=16, remainder="drop"), False),
            (SVG2Attn(query_cluster=9, key_cluster=4, block=16, top_p=0.3), False),
            (VSAAttn(keep=0.2), False),
        ],
        ids=lambda x: getattr(x, "type", ""),
    )
    def test_pictures_of_a_call(self, method, tinted, monkeypatch):
        said = []
        text = draw._text
        monkeypatch.setattr(
            draw, "_text", lambda words, *a, **k: said.append(words) or text(words, *a, **k)
        )
        grid = TokenGrid(3, 8, 10, 2, 100, references=(Reference(252, 1, 8, 10),))
        call = self.call(grid)
        image = draw.call_picture(method, call, query=(1, 4, 5))
        selection = selection_of_call(method, call)
        density = selection.pairs.dense().float().mean()
        words = " ".join(said)
        assert f"{density:.2%} of the token pairs attend." in words
        assert f"Layer 0 ({selection.blocks}), head 0." in words
        assert has(image, draw.REST) == tinted
        assert holds(image, draw.mask_image(selection.pairs, rest=selection.rest))
        assert has(image, draw.QUERY)
        assert "Reference 1" in said

    def test_more_blocks_than_pixels(self):
        grid = TokenGrid(1, 120, 121)
        image = draw.call_picture(SolAttn(block=16), self.call(grid))
        assert image.shape[1] == 1284

    def test_bad_input(self):
        call = self.call(SMALL)
        with pytest.raises(ValueError, match=r"gna does not select token pairs by content; pictu"):
            draw.call_picture(METHOD, call)
        with pytest.raises(ValueError, match=r"the query's frame is 3, but the grid"):
            draw.call_picture(SolAttn(), call, query=(3, 0, 0))


class TestPicture:
    def test_it_holds_its_parts(self):
        image = draw.picture(METHOD, SMALL, (1, 2, 3))
        assert image.dtype == np.uint8
        assert image.shape[1] == 1284
        mask = draw.mask_image(METHOD.mask(SMALL))
        assert holds(image, mask)
        blocks = METHOD.layout(SMALL, torch.device("cpu"), METHOD.order(SMALL))
        assert holds(image, draw.block_image(blocks))
        for frame in draw.frame_images(METHOD.mask(SMALL), (1, 2, 3), 24):
            assert holds(image, frame)
        for wanted in (draw.SOME, draw.QUERY, draw.TEXT_LINE, draw.FRAME_LINE):
            assert has(image, wanted)
        assert image[:20].min() == 255
        assert image[28:60].min() < 60  # the title

    def test_it_shows_the_token_that_is_asked_for(self):
        asked = draw.picture(METHOD, SMALL, (0, 0, 0))
        assert not np.array_equal(asked, draw.picture(METHOD, SMALL))
        assert np.array_equal(draw.picture(METHOD, SMALL, (1, 2, 2)), draw.picture(METHOD, SMALL))

    @pytest.mark.parametrize(
        "grid",
        [
            TokenGrid(1, 1, 1),
            TokenGrid(1, 16, 16),
            TokenGrid(97, 2, 2),
            TokenGrid(2, 3, 700),
            TokenGrid(1, 1, 3000),
            TokenGrid(400, 1, 1, 1, 1),
        ],
        ids=str,
    )
    def test_awkward_grids(self, grid):
        image = draw.picture(RadialAttn(), grid)
        assert image.shape[1] <= 1400
        assert image.shape[0] < 3000
        assert has(image, draw.QUERY)

    def test_no_pair_of_tokens_is_looked_at_without_need(self, monkeypatch):
        grid = TokenGrid(21, 30, 52)
        counted = Counting(grid)
        monkeypatch.setattr(draw, "_PAIRS", 1 << 22)
        monkeypatch.setattr(AttentionMask, "dense", None)
        image = draw.mask_image(counted, 200)
        assert image.shape == (200, 200, 3)
        assert sum(counted.looked_at) < grid.tokens**2 / 100
        assert max(counted.looked_at) <= 1 << 22
        # What it says is right all the same: a query sees its own frame.
        assert color(image, 5, 3) == draw.ALL
        assert color(image, 5, 100) == draw.NONE

    def test_references_are_named_and_drawn(self, monkeypatch):
        said = []
        text = draw._text
        monkeypatch.setattr(
            draw, "_text", lambda words, *a, **k: said.append(words) or text(words, *a, **k)
        )
        grid = TokenGrid(
            1, 12, 12, 3, 160, references=(Reference(150, 1, 12, 12), Reference(300, 1, 2, 3))
        )
        method = CLEARAttn(radius=3, references="local")
        image = draw.picture(method, grid, (0, 5, 6))
        words = " ".join(said)
        assert (
            "3 text + 1x12x12 + 3 text + reference 1x12x12 + 6 text + reference 1x2x3 + 1 text"
            in words
        )
        assert "References: local, 1 of 2 with pairs left out (1x2x3: as text)." in words
        seen = method.mask(grid).dense()[3 + 5 * 12 + 6]
        own, other = int(seen[grid.video].sum()), int(seen[150:294].sum())
        assert own == other < 144
        assert (
            f"sees: {own} of 144 tokens of the picture, {other} of 144 of reference 1, 6 of 6 of"
            f" reference 2, 13 of 13 of the text"
        ) in words
        assert "Reference 1" in said
        assert has(image, draw.REFERENCE_LINE)

    def test_keys_that_are_no_tokens_are_mentioned(self, monkeypatch):
        grid = TokenGrid(1, 8, 8)
        written, write = [], draw._text
        monkeypatch.setattr(draw, "_text", lambda *a, **k: written.append(a[0]) or write(*a, **k))
        alone, more = (CLEARAttn(radius=2, down_factor=factor) for factor in (1, 4))
        draw.picture(alone, grid)
        assert not any("pooled" in words for words in written)
        draw.picture(more, grid)
        assert any("but those of text also sees 4 pooled keys, not drawn." in w for w in written)

    def test_png(self):
        image = draw.picture(METHOD, SMALL)
        decoded = cv2.imdecode(np.frombuffer(draw.png(image), np.uint8), cv2.IMREAD_COLOR)
        assert np.array_equal(decoded[..., ::-1], image)

    def test_titles_name_the_methods_own_parameters(self):
        words = draw.method_words(GNAAttn(window=(7, "full", 0.5), stride=2))
        assert words == "gna  window=7,full,0.5  stride=2"
        words = draw.method_words(GNAAttn(window=3, stride=2, dilation=(1, 2, 1), is_causal=True))
        assert words == "gna  window=3  stride=2  dilation=1,2,1  is_causal=True"
        assert draw.method_words(DenseAttn()) == "dense"


class TestSchedule:
    def test_every_layer_and_step(self):
        method = RadialAttn(dense_steps=3, last_dense_steps=0.2)
        image = draw.schedule_image(method, layers=6, dense_layers=2, steps=10)
        assert image.shape == (6, 10, 3)
        for layer in range(6):
            for step in range(10):
                dense = layer < 2 or step < 3 or step >= 8
                assert color(image, layer, step) == (draw.ALL if dense else draw.SOME)

    def test_the_share_of_the_picture_is_the_runs(self):
        method = RadialAttn(dense_layers=1, dense_steps=2)
        planned = plan(TokenGrid(8, 16, 16), method, layers=5, steps=8)
        image = draw.schedule_image(method, planned.layers, planned.dense_layers, 8)
        sparse = (image == draw.SOME).all(-1).mean()
        assert planned.run_density == pytest.approx(1 - sparse * (1 - planned.block_density))
        assert holds(draw.schedule_picture(planned), image.repeat(120, 0).repeat(120, 1))

    def test_a_plan_without_steps(self):
        planned = plan(TokenGrid(2, 4, 4), RadialAttn())
        with pytest.raises(ValueError, match="without a number of steps has no schedule"):
            draw.schedule_picture(planned)


@dataclass(frozen=True, eq=False)
class Counting(AttentionMask):
    """Each frame sees itself; counts the pairs that it is asked for."""

    looked_at: list = field(default_factory=list)

    def allowed(self, query, key):
        seen = self.grid.coordinates(query)[0] == self.grid.coordinates(key)[0]
        self.looked_at.append(seen.numel())
        return seen


def holds(image, part):
    """Is the part somewhere in the image, pixel by pixel?"""
    differences = cv2.matchTemplate(image, part, cv2.TM_SQDIFF)
    _, _, (left, top), _ = cv2.minMaxLoc(differences)
    height, width = part.shape[:2]
    return np.array_equal(image[top : top + height, left : left + width], part)
