import pytest
import torch

from diffattn.samples.moving_shapes.captions import DIRECTIONS
from diffattn.samples.moving_shapes.paths import START, WIDTH, PathGuide

SIDE = 5
FRAMES = (0, 4, 7, 13)
SPEED = 0.4


def _penalty(weights: torch.Tensor, motion: torch.Tensor) -> float:
    """The definition, pair by pair, for one clip and both heads."""
    places = [(t, y, x) for t in FRAMES for y in range(SIDE) for x in range(SIDE)]
    total = 0.0
    for head, sign in ((0, 1), (1, -1)):
        misses = []
        for i, (t, y, x) in enumerate(places):
            share = size = 0.0
            for j, (t_key, y_key, x_key) in enumerate(places):
                later = t_key - t
                if sign * later < START:
                    continue
                off_x = x_key - x - later * motion[0].item()
                off_y = y_key - y - later * motion[1].item()
                near = torch.tensor(-(off_x**2 + off_y**2) / (2 * WIDTH**2)).exp().item()
                size += near
                share += weights[head, i, j].item() * near
            if size > 1:
                misses.append(-torch.tensor(share + 1e-3).log().item())
        total += sum(misses) / len(misses)
    return total


def _guide(motion: torch.Tensor) -> PathGuide:
    guide = PathGuide()
    guide.follow(torch.tensor([FRAMES]).expand(len(motion), -1), motion, SIDE)
    return guide


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_penalty_is_that_of_the_definition(direction: str) -> None:
    torch.manual_seed(0)
    tokens = len(FRAMES) * SIDE**2
    weights = torch.randn(1, 2, tokens, tokens).softmax(-1)
    motion = torch.tensor([DIRECTIONS[direction]]) * SPEED
    guide = _guide(motion)
    guide.observe(weights)
    assert guide.penalty is not None
    assert guide.penalty.item() == pytest.approx(_penalty(weights[0], motion[0]), rel=1e-4)


def test_attention_along_the_caption_is_punished_less_than_against_it() -> None:
    time = torch.tensor(FRAMES).repeat_interleave(SIDE**2)
    x = torch.arange(SIDE).repeat(SIDE * len(FRAMES))
    later = time[None, :] - time[:, None]
    penalties = {}
    for name, speed in (("along", SPEED), ("against", -SPEED)):
        off_path = (x[None, :] - x[:, None] - speed * later).abs()
        ahead, back = ((-off_path - 9.0 * (sign * later < START)).softmax(-1) for sign in (1, -1))
        guide = _guide(torch.tensor([[SPEED, 0.0]]))
        guide.observe(torch.stack([ahead, back])[None])
        assert guide.penalty is not None
        penalties[name] = guide.penalty.item()
    assert penalties["along"] < penalties["against"] - 0.5


def test_captions_that_tell_nothing_are_not_punished() -> None:
    torch.manual_seed(0)
    tokens = len(FRAMES) * SIDE**2
    weights = torch.randn(1, 2, tokens, tokens).softmax(-1)
    guide = _guide(torch.zeros(1, 2))
    guide.observe(weights)
    assert guide.penalty is not None
    assert guide.penalty.item() == 0


def test_penalties_of_several_layers_add_up_until_the_next_call() -> None:
    torch.manual_seed(0)
    tokens = len(FRAMES) * SIDE**2
    weights = torch.randn(1, 2, tokens, tokens).softmax(-1)
    guide = _guide(torch.tensor([[SPEED, 0.0]]))
    guide.observe(weights)
    assert guide.penalty is not None
    once = guide.penalty.item()
    guide.observe(weights)
    assert guide.penalty.item() == pytest.approx(2 * once)
    guide.follow(torch.tensor([FRAMES]), None, SIDE)
    assert guide.penalty is None
