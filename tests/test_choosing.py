"""What a person may give to `set_attn_processor`: names, classes, dicts, and slips in them."""

from typing import Any

import pytest
import tiny_wan
import torch

import diffattn
from diffattn import CLEARAttn, DenseAttn, GNAAttn, RadialAttn
from diffattn.attach.choosing import check_patterns, choose

SPARSE = GNAAttn(window=3, dense_steps=0)


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_wan.transformer()


def methods_of(model: torch.nn.Module, given: Any) -> dict[str, str]:
    """The method of each attached site, by its processor's group."""
    diffattn.set_attn_processor(model, given)
    attached = diffattn.attach.attached_to(model)
    groups = {id(group.member): group.chosen.type for group in attached.groups}
    return {name: groups[id(site.member)] for name, site in attached.sites.items()}


class TestWhatWorks:
    def test_the_name_of_a_method(self, model: torch.nn.Module) -> None:
        assert methods_of(model, "clear") == {f"blocks.{i}.attn1": "clear" for i in range(3)}

    def test_names_in_a_dict(self, model: torch.nn.Module) -> None:
        given = {"blocks.1": "dense", "blocks.*": SPARSE}
        assert list(methods_of(model, given).values()) == ["gna", "dense", "gna"]

    def test_none_leaves_a_site_as_it_is(self, model: torch.nn.Module) -> None:
        before = dict(model.attn_processors)
        given = {"blocks.1": None, "blocks.*": SPARSE}
        assert methods_of(model, given) == {"blocks.0.attn1": "gna", "blocks.2.attn1": "gna"}
        untouched = "blocks.1.attn1.processor"
        assert model.attn_processors[untouched] is before[untouched]

    def test_first_match_wins(self) -> None:
        names = ["blocks.0.attn1", "blocks.10.attn1", "vace_blocks.0.attn1"]
        first, second = DenseAttn(), CLEARAttn(radius=2)
        assert choose(names, {"blocks.1*": first, "*": second}) == {
            names[0]: second, names[1]: first, names[2]: second
        }  # fmt: skip
        assert choose(names, {"vace_blocks": first}) == {names[2]: first}


class TestClasses:
    """A class where an instance belongs: the parentheses were forgotten."""

    @pytest.mark.parametrize("cls", [RadialAttn, GNAAttn, DenseAttn, dict, torch.nn.Module])
    def test_are_refused_and_break_nothing(self, model: torch.nn.Module, cls: type) -> None:
        before = dict(model.attn_processors)
        message = rf"processor is the class {cls.__name__}, but .*: pass {cls.__name__}\(\)$"
        with pytest.raises(TypeError, match=message):
            diffattn.set_attn_processor(model, cls)
        assert all(model.attn_processors[name] is before[name] for name in before)

    @pytest.mark.parametrize("others", [{}, {"blocks.1": SPARSE}, {"blocks.1": None}])
    def test_in_a_dict(self, model: torch.nn.Module, others: dict[str, Any]) -> None:
        message = r"value for 'blocks\.0' is the class RadialAttn, .*: pass RadialAttn\(\)"
        with pytest.raises(TypeError, match=message):
            diffattn.set_attn_processor(model, others | {"blocks.0": RadialAttn})

    def test_an_attached_model_stays_attached(self, model: torch.nn.Module) -> None:
        diffattn.set_attn_processor(model, SPARSE)
        with pytest.raises(TypeError, match="is the class"):
            diffattn.set_attn_processor(model, RadialAttn)
        assert len(diffattn.attach.attached_to(model).sites) == 3

    def test_of_plan(self) -> None:
        with pytest.raises(TypeError, match=r"method is the class GNAAttn, .*: pass GNAAttn\(\)"):
            diffattn.plan(diffattn.TokenGrid(2, 3, 4), GNAAttn)


class TestSlips:
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({}, ValueError, "processor is an empty dict: give a pattern of module names"),
            ({"blocks.*": None}, ValueError, "every value of the dict is None, which leaves"),
            ("radail", ValueError, "unknown method 'radail'; did you mean 'radial'?"),
            ({"*": "radail"}, ValueError, "unknown method 'radail'; did you mean 'radial'?"),
            ({0: SPARSE}, TypeError, "the key 0 of the dict is a int, but must be a pattern"),
            (3, TypeError, "processor is a int, but must be a method of diffattn, a dict of them"),
            ([SPARSE], TypeError, "processor is a list, but must be a method of diffattn"),
        ],
        ids=str,
    )
    def test_messages(
        self, model: torch.nn.Module, given: Any, error: type[Exception], message: str
    ) -> None:
        before = dict(model.attn_processors)
        with pytest.raises(error) as raised:
            diffattn.set_attn_processor(model, given)
        assert str(raised.value).startswith(message)
        assert all(model.attn_processors[name] is before[name] for name in before)

    @pytest.mark.parametrize(
        ("pattern", "hint"),
        [
            ("blokcs.*", "; did you mean 'blocks.*'?"),
            ("block.0", "; did you mean 'blocks.0'?"),
            ("blocks.*.attn", "; did you mean 'blocks.*.attn1'?"),
            ("transformer_blocks.7.zzzz", "; the sites are blocks.*.attn1"),
        ],
    )
    @pytest.mark.parametrize("others", [{}, {"blocks.*": SPARSE}])
    def test_misspelt_patterns(
        self, model: torch.nn.Module, pattern: str, hint: str, others: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match="no attention site") as raised:
            diffattn.set_attn_processor(model, {pattern: SPARSE} | others)
        message = f"no attention site matches the pattern {pattern!r}{hint}"
        assert str(raised.value) == message

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"blocks.*": SPARSE, "blocks.0": DenseAttn()},
                "the pattern 'blocks.0' decides about no site: the first pattern that matches a"
                " site wins, and 'blocks.*' comes before it; put 'blocks.0' first",
            ),
            (
                {"blocks.0": SPARSE, "blocks.[12]": SPARSE, "*.attn1": DenseAttn()},
                "the pattern '*.attn1' decides about no site: the first pattern that matches a"
                " site wins, and 'blocks.0', 'blocks.[12]' comes before it; put '*.attn1' first",
            ),
            (
                {"*": None, "blocks.2": SPARSE},
                "the pattern 'blocks.2' decides about no site: the first pattern that matches a"
                " site wins, and '*' comes before it; put 'blocks.2' first",
            ),
        ],
    )
    def test_patterns_that_never_win(
        self, model: torch.nn.Module, given: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match="decides about no site") as raised:
            diffattn.set_attn_processor(model, given)
        assert str(raised.value) == message

    def test_a_pattern_may_win_in_one_denoiser_of_two(self) -> None:
        check_patterns(["blocks.0.attn1", "vace_blocks.0.attn1"], ["blocks.0", "*"])


class TestInWords:
    def test_an_attachment_fits_a_line(self, model: torch.nn.Module) -> None:
        attachment = diffattn.set_attn_processor(model, {"blocks.0": "dense", "*": SPARSE})
        assert repr(attachment) == (
            "<Attachment: dense on 1 sites of model, gna on 2 sites of model>"
        )

    def test_an_attachment_prints_a_table(self, model: torch.nn.Module) -> None:
        attachment = diffattn.set_attn_processor(model, {"blocks.0": "dense", "*": SPARSE})
        assert str(attachment).splitlines() == [
            "denoiser  method         sites",
            "model     dense          1, from blocks.0.attn1 to blocks.0.attn1",
            "model     gna  window=3  2, from blocks.1.attn1 to blocks.2.attn1",
        ]

    def test_layouts_have_no_tensors_in_them(self) -> None:
        layout = RadialAttn().mask(diffattn.TokenGrid(21, 30, 52)).blocks(128)
        text = repr(layout)
        assert len(text) < 160
        assert text == str(layout)
        assert "tensor" not in text
        assert "32760 x 32760 tokens in 1 x 1 x 256 x 256 blocks of 128 x 128" in text
        assert f"{layout.full_blocks} full and {layout.partial_blocks} partial, on cpu" in text

    @pytest.mark.parametrize("method", ["gna", "vmoba", "linfusion"])
    def test_plans_fit_a_line_and_print_a_table(self, method: str) -> None:
        plan = diffattn.plan("Wan-AI/Wan2.1-T2V-1.3B", method)
        assert len(repr(plan)) < 160
        assert f"{method} on Wan-AI/Wan2.1-T2V-1.3B, 21x30x52: " in repr(plan)
        assert f"{plan.attention_speedup:.2f}x" in repr(plan)
        lines = str(plan).splitlines()
        assert len(lines) > 8
        assert lines[0].split()[:2] == ["method", method]
        assert max(map(len, lines)) < 140
