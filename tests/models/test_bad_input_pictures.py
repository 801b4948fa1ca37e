"""Calls of models of pictures that have no one grid, by what stands in the way."""

from typing import Any

import pytest
import stock
import tiny_families as tiny
import tiny_picture_models as pictures
import torch

import diffattn


def call(name: str, **changes: Any) -> None:
    """Run an attached model on the inputs of its case, but for some."""
    case = tiny.CASES[name]
    model = case.build()
    diffattn.set_attn_processor(model, stock.NEARBY)
    with torch.no_grad():
        model(**(case.inputs() | changes), return_dict=False)


def test_z_image_with_pictures_of_two_sizes() -> None:
    samples = [tiny.noise(4, 1, 12, 18), tiny.noise(4, 1, 18, 12)]
    message = r"ZImageTransformer2DModel has samples .* 1x6x9\+10 text and 1x9x6\+10 text tokens"
    with pytest.raises(ValueError, match=message):
        call("z-image", x=samples)


def test_omni_with_texts_that_put_the_picture_elsewhere() -> None:
    texts = tiny.CASES["z-image-omni"].inputs()["cap_feats"]
    longer = [*texts[0][:2], tiny.noise(33, 16)]
    with pytest.raises(ValueError, match=r"places in the sequence: .*guidance_scale=0, or a nega"):
        call("z-image-omni", cap_feats=[texts[0], longer])


def test_omni_with_pictures_of_two_sizes_beside_equal_ones() -> None:
    samples = tiny.CASES["z-image-omni"].inputs()["x"]
    other = [tiny.noise(16, 1, 12, 8), *samples[1][1:]]
    with pytest.raises(ValueError, match="different sizes or places in the sequence"):
        call("z-image-omni", x=[samples[0], other])


def test_text_of_z_image_may_differ_by_sample() -> None:
    model = pictures.z_image()
    recorder = stock.Recording()
    diffattn.set_attn_processor(model, recorder)
    inputs = tiny.CASES["z-image"].inputs()
    texts = [tiny.noise(length, 16) for length in (1, 97)]
    with torch.no_grad():
        model(**(inputs | {"x": list(inputs["x"]), "cap_feats": texts}))
    assert {site.grid.text_after for site, _ in recorder.calls} == {10 + 128}
