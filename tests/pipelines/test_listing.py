"""``diffattn methods``, ``diffattn models`` and ``diffattn --version``."""

import dataclasses
import re

from diffattn.methods import METHODS, DenseAttn
from diffattn.models import FAMILIES


def test_every_method_with_every_parameter_is_listed(diffattn):
    result = diffattn("methods")
    assert result.code == 0
    blocks = {
        block.partition(":")[0]: block for block in result.out.replace("\n  ", "|").split("\n")
    }
    for name, method in METHODS.items():
        assert method.__name__ in blocks[name]
        assert method.paper in blocks[name]
        for item in dataclasses.fields(method):
            if item.init:
                assert f"|{item.name} " in blocks[name]
                assert item.metadata["help"] in blocks[name]


def test_defaults_are_listed(diffattn):
    lines = diffattn("methods").out.splitlines()
    assert any(line.split()[:2] == ["block_rule", "[covering]"] for line in lines)
    assert any(line.split()[:3] == ["decay_factor", "[by", "model]"] for line in lines)


def test_a_default_that_is_made_is_listed(diffattn, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(DenseAttn):
        steps: tuple[int, ...] = dataclasses.field(default_factory=lambda: (3, 4))

    monkeypatch.setitem(METHODS, "mine", Mine)
    assert any(
        line.split() == ["steps", "[(3,", "4)]"] for line in diffattn("methods").out.splitlines()
    )


def test_every_family_with_its_model_classes_is_listed(diffattn):
    result = diffattn("models")
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= 100
    head, *lines = re.sub("\n    +", " ", result.out).splitlines()
    assert head.split() == ["family", "text", "tested", "on"]
    for family, line in zip(FAMILIES, lines, strict=True):
        assert line.split()[:2] == [family.name, family.text or "apart"]
        assert f"  {family.tested} " in line
        assert " sites " in line
        assert family.title in line
        for name in family.model_classes:
            assert name in line


def test_versions(diffattn):
    result = diffattn("--version")
    assert result.code == 0
    assert all(f"{name} " in result.out for name in ("diffattn", "torch", "diffusers", "python"))


def test_help_names_the_defaults(diffattn):
    result = diffattn("generate", "--help")
    assert result.code == 0
    text = " ".join(result.out.replace("│", " ").split())
    assert "Repeat the run of a JSON sidecar" in text
    assert "(default: 0)" in text
