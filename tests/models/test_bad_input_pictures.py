"""Calls of models of pictures that have no one grid, by what stands in the way."""

import inspect
from typing import Any

import diffusers
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


@pytest.mark.parametrize("name", ["glm-image", "cogview-4"])
def test_masks_that_the_model_adds_to_the_scores(name: str) -> None:
    message = r"(Glm|CogView4)\w+ has an attention_mask.*adds them to the scores, so that padding"
    with pytest.raises(ValueError, match=message):
        call(name, attention_mask=tiny.valid_text(7, 7, 4))


def test_lumina_with_prompts_of_two_lengths() -> None:
    message = r"has prompts of \[9, 5\] tokens in one batch.*call it once per prompt"
    with pytest.raises(ValueError, match=message):
        call("lumina-2", encoder_attention_mask=tiny.valid_text(9, 9, 5))


def test_lumina_with_one_prompt_with_padding() -> None:
    model = pictures.lumina2()
    recorder = stock.Recording()
    diffattn.set_attn_processor(model, recorder)
    inputs = {name: x[:1] for name, x in tiny.CASES["lumina-2"].inputs().items()}
    with torch.no_grad():
        model(**inputs)
    assert [site.grid.text_before for site, _ in recorder.calls] == [0, 7, 7]


def _packed(height: int, width: int, padded: int) -> dict[str, torch.Tensor]:
    """HiDream's latents as its training passes them: patches in a row, with ids and masks."""
    tokens = height * width
    ids, masks = torch.zeros(2, padded, 3), torch.zeros(2, padded)
    ids[:, :tokens, 1:] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    masks[:, :tokens] = 1
    return {
        "hidden_states": tiny.noise(2, padded, 16),
        "img_ids": ids,
        "hidden_states_masks": masks,
    }


def test_packed_latents_of_hidream() -> None:
    model = pictures.hidream()
    inputs = tiny.CASES["hidream"].inputs() | _packed(4, 9, 64)
    inputs["img_sizes"] = torch.tensor([[4, 9]] * 2)
    with torch.no_grad():
        want = model(**inputs).sample
        recorder = stock.Recording()
        diffattn.set_attn_processor(model, recorder)
        torch.testing.assert_close(model(**inputs).sample, want, atol=1e-5, rtol=1e-4)
    assert {site.grid for site, _ in recorder.calls} == {
        diffattn.TokenGrid(1, 4, 9, 0, 64 - 36 + 13)
    }


def test_packed_latents_of_hidream_in_two_sizes() -> None:
    sizes = [(4, 9), (9, 4)]
    with pytest.raises(ValueError, match=r"img_sizes \[\(4, 9\), \(9, 4\)\] in one batch: call"):
        call("hidream", **_packed(4, 9, 64), img_sizes=sizes)


def test_nucleus_with_a_shape_of_other_tokens() -> None:
    with pytest.raises(ValueError, match=r"has 54 tokens, but img_shapes .* make 1x6x8 = 48: pass"):
        call("nucleus-image", img_shapes=(1, 6, 8))


def test_joyimage_plus_with_samples_of_different_pictures() -> None:
    shapes = [[(1, 6, 9), (1, 4, 5)], [(1, 6, 9)]]
    message = (
        r"JoyImageEditPlus\w+ has a shape_list whose samples differ: .*\(1, 4, 5\).*once per sample"
    )
    with pytest.raises(ValueError, match=message):
        call("joyimage-edit-plus", shape_list=shapes)


def test_joyimage_with_one_picture_without_its_dimension() -> None:
    model = pictures.joyimage()
    recorder = stock.Recording()
    diffattn.set_attn_processor(model, recorder)
    inputs = tiny.CASES["joyimage-edit"].inputs()
    with torch.no_grad():
        model(**(inputs | {"hidden_states": tiny.noise(2, 4, 1, 12, 18)}))
    assert {site.grid for site, _ in recorder.calls} == {diffattn.TokenGrid(1, 6, 9, 0, 7)}


def test_padding_of_pixart_is_a_mask_over_keys() -> None:
    model = pictures.pixart()
    inputs = tiny.CASES["pixart"].inputs() | {"attention_mask": tiny.valid_text(54, 54, 40)}
    with torch.no_grad():
        want = model(**inputs).sample
        diffattn.set_attn_processor(model, diffattn.DenseAttn())
        torch.testing.assert_close(model(**inputs).sample, want, atol=1e-5, rtol=1e-4)


class TestIdeogram:
    def test_text_after_the_picture(self) -> None:
        inputs = pictures.ideogram4_inputs(4, 7)
        flipped = {name: inputs[name].flip(1) for name in ("position_ids", "indicator")}
        with pytest.raises(ValueError, match="not text and then one picture, as those of its pipe"):
            call("ideogram-4", **flipped)

    def test_two_pictures_in_a_sequence(self) -> None:
        ids = pictures.ideogram4_inputs(4, 7)["position_ids"]
        ids[:, 7 + 27 :] += 100
        with pytest.raises(ValueError, match="the last 54 position_ids make 2 pictures"):
            call("ideogram-4", position_ids=ids)

    def test_samples_with_pictures_at_different_places(self) -> None:
        roles = pictures.ideogram4_inputs(4, 7)["indicator"].clone()
        roles[1, 7] = 3
        with pytest.raises(ValueError, match="at different places: pad their texts on the left"):
            call("ideogram-4", indicator=roles)

    def test_a_picture_without_text(self) -> None:
        model = pictures.ideogram4()
        recorder = stock.Recording()
        diffattn.set_attn_processor(model, recorder)
        inputs = pictures.ideogram4_inputs(4, 7)
        inputs = {name: x if x.ndim == 1 else x[:, 7:] for name, x in inputs.items()}
        with torch.no_grad():
            model(**inputs)
        assert {site.grid for site, _ in recorder.calls} == {diffattn.TokenGrid(1, 6, 9)}

    def test_the_model_without_text_is_attached_as_well(self) -> None:
        if not hasattr(diffusers, "Ideogram4Pipeline"):
            pytest.skip(f"diffusers {diffusers.__version__} has no Ideogram4Pipeline")
        parameters = inspect.signature(diffusers.Ideogram4Pipeline.__init__).parameters
        parts = dict.fromkeys(list(parameters)[1:]) | {
            "transformer": pictures.ideogram4(),
            "unconditional_transformer": pictures.ideogram4(),
        }
        attachment = diffusers.Ideogram4Pipeline(**parts).set_attn_processor(stock.NEARBY)
        assert attachment.sites == 4
