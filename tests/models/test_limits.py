"""Sizes beyond a model's tables of positions are refused, with the limit and its origin."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_complete
import tiny_wan
import torch

import diffattn
from diffattn.models import SizeRules, pipeline_grid

WAN = SizeRules(16, frame_stride=4, frame_offset=1).up_to(21, 30, "its table")


class TestRules:
    def test_the_limit_itself_is_possible(self) -> None:
        grid = WAN.grid(480, 480, 81)
        assert (grid.frames, grid.height, grid.width) == (21, 30, 30)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            (
                (496, 480, 81),
                "height is 496, which is 31 rows of tokens, but this model has positions for 30"
                " (its table): try at most 480",
            ),
            (
                (16, 1_000_000, 1),
                "width is 1000000, which is 62500 columns of tokens, but this model has positions"
                " for 30 (its table): try at most 480",
            ),
            (
                (16, 16, 85),
                "num_frames is 85, which is 22 token frames, but this model has positions for 21"
                " (its table): try at most 81",
            ),
        ],
    )
    def test_more_is_refused(self, size: tuple[int, int, int], message: str) -> None:
        for refuse in (WAN.check, WAN.grid):
            with pytest.raises(ValueError, match="positions") as raised:
                refuse(*size)
            assert str(raised.value) == message

    @pytest.mark.parametrize("stride", [1, 4, 8])
    @pytest.mark.parametrize("offset", [0, 1])
    @pytest.mark.parametrize("frames_per_token", [1, 2])
    @pytest.mark.parametrize("multiple", [16, 32])
    def test_what_the_message_names_is_the_largest(
        self, stride: int, offset: int, frames_per_token: int, multiple: int
    ) -> None:
        rules = SizeRules(
            multiple, stride, offset, token_pixels=16, frames_per_token=frames_per_token
        ).up_to(5, 7, "")
        frames = [stride * k + offset for k in range(40) if stride * k + offset]
        for name, sizes in (("num_frames", frames), ("height", range(multiple, 400, multiple))):
            legal, said = [], []
            for size in sizes:
                given = {"height": multiple, "width": multiple, "num_frames": frames[0]}
                try:
                    rules.check(**given | {name: size})
                    legal.append(size)
                except ValueError as error:
                    said.append(str(error))
            assert legal
            assert said
            assert all(message.endswith(f"try at most {max(legal)}") for message in said)


def test_wans_positions_are_those_of_its_table() -> None:
    limited = tiny_complete.wan(transformer=tiny_wan.transformer(rope_max_seq_len=6))
    assert pipeline_grid(limited, 96, 96, 1).height == 6
    with pytest.raises(ValueError, match=r"height is 112, which is 7 rows .*rope_max_seq_len"):
        pipeline_grid(limited, 112, 96, 1)
    # The stock model can make the largest size, and cannot make the next.
    model = limited.transformer

    def call(rows: int) -> torch.Tensor:
        return model(
            hidden_states=torch.zeros(1, 16, 1, 2 * rows, 4),
            timestep=torch.tensor([5]),
            encoder_hidden_states=torch.zeros(1, 3, tiny_wan.TEXT_DIM),
            return_dict=False,
        )[0]

    with torch.no_grad():
        assert call(6).shape[3] == 12
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            call(7)
        diffattn.set_attn_processor(model, diffattn.GNAAttn(window=3, dense_steps=0))
        assert call(6).shape[3] == 12
        with pytest.raises(
            ValueError, match=r"over 1x7x2 tokens, but the model has positions for 6"
        ):
            call(7)


@pytest.mark.parametrize(
    ("config", "pipe", "legal", "refused"),
    [
        (
            {"patch_size": 2, "pos_embed_max_size": 96},
            {"vae_scale_factor": 8},
            (1536, 1536, 1),
            (1552, 16, 1, "height is 1552, .* for 96 .pos_embed_max_size of its transformer."),
        ),
    ],
)
def test_stable_diffusion_3(config: Any, pipe: Any, legal: Any, refused: Any) -> None:
    from diffattn.models.sd3 import SD3

    rules = SD3.sizes(
        SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(**config)), **pipe)
    )
    rules.check(*legal)
    with pytest.raises(ValueError, match=refused[3]):
        rules.check(*refused[:3])


def test_motion_modules_of_animatediff() -> None:
    from diffattn.models.unet import UNET

    class Config(dict):
        motion_max_seq_length = 32

    unet = SimpleNamespace(
        down_blocks=[SimpleNamespace(attentions=[1])], config=Config(motion_max_seq_length=32)
    )
    pipe = SimpleNamespace(unet=unet, vae_scale_factor=8, free_noise_enabled=False)
    UNET.sizes(pipe).check(64, 64, 32)
    with pytest.raises(ValueError, match=r"num_frames is 33, .* try at most 32"):
        UNET.sizes(pipe).check(64, 64, 33)
    pipe.free_noise_enabled = True
    UNET.sizes(pipe).check(64, 64, 320)
