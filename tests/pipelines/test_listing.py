"""``diffattn methods``, ``diffattn models`` and ``diffattn --version``."""

import dataclasses
import re
from pathlib import Path

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
            # by_step is not to be given: the parameters themselves take schedules.
            if item.init and item.name != "by_step":
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
        _, _, beside = line.partition(" beside the grid: ")
        if family.text is not None:
            assert beside.startswith(f"text {family.text} it, dense")
        assert beside.endswith(family.beside or ("none" if family.text is None else "dense"))
        assert f"  {family.tested} " in line
        assert " sites " in line
        assert family.title in line
        for name in family.model_classes:
            assert name in line


def test_every_model_with_references_says_so():
    """The families whose grids hold references, by the tiny models whose calls have some."""
    from tiny_families import CASES

    names = {
        type(case.build()).__name__ for case in CASES.values() if case.reference_pixel is not None
    }
    assert names
    for family in FAMILIES:
        if names & set(family.model_classes):
            assert "reference" in family.beside, family.name


def test_the_readme_lists_the_models_of_the_program():
    from diffattn.pipelines.cli.listing import catalogue, readme_models

    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    listed = readme_models(catalogue()["models"])
    assert listed in readme, "run python -m diffattn.pipelines.cli.listing"
    assert max(map(len, listed.splitlines())) <= 100
    for family in FAMILIES:
        assert family.title in " ".join(listed.split())


def test_the_readme_is_rewritten_between_the_marks_alone():
    from diffattn.pipelines.cli.listing import readme_models, with_models

    families = [{"title": "Wan", "images": False}, {"title": "Flux", "images": True}]
    once = with_models(f"before\n{readme_models(families[:1])}\nafter\n", families)
    assert once == f"before\n{readme_models(families)}\nafter\n"
    assert "For videos: Wan." in once
    assert "For images, and for videos frame by frame: Flux." in once
    assert with_models(once, families) == once


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
