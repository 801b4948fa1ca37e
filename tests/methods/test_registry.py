"""Methods from outside: registered by a program, or plugged in by an installed package."""

import json
import pickle
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import outside_method
import pytest
import torch

import diffattn
from diffattn import DenseAttn, Method, RadialAttn, TokenGrid
from diffattn.lora.errors import LoraError
from diffattn.lora.settings import ADVICE, Advice, TrainSettings
from diffattn.methods import METHODS, all_methods, from_dict

GRID = TokenGrid(2, 5, 3, text_after=4)
PLUGINS = "strip_attn", "broken_attn", "other_attn"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Forget what a test has registered and imported."""
    there = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(there)
    for name in PLUGINS:
        sys.modules.pop(name, None)


@pytest.fixture
def strip(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """The class of the document, in a module that can be imported."""
    module = types.ModuleType("strip_attn")
    monkeypatch.setitem(sys.modules, "strip_attn", module)
    exec(outside_method.source(), vars(module))
    return module.StripAttn


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of installed packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def check_rows(method: Method, rows: int) -> None:
    """Does the method's mask hold what the document says, and text besides?"""
    tokens = [(t, y, x) for t in range(2) for y in range(5) for x in range(3)]
    near = [[abs(query[1] - key[1]) <= rows for key in tokens] for query in tokens]
    want = torch.ones(34, 34, dtype=torch.bool)
    want[:30, :30] = torch.tensor(near)
    assert torch.equal(method.mask(GRID).dense(), want)


class TestRegister:
    def test_a_registered_method_is_like_those_that_come_along(self, strip: type[Method]) -> None:
        with pytest.raises(ValueError, match="unknown method 'strip'"):
            from_dict({"type": "strip"})
        assert diffattn.register_method(strip) is strip
        assert METHODS["strip"] is all_methods()["strip"] is strip
        method = from_dict({"type": "strip", "rows": 2})
        assert method == strip(rows=2)
        check_rows(method, 2)
        assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
        assert pickle.loads(pickle.dumps(method)) == method
        with pytest.raises(ValueError, match=r"no parameter 'row'; did you mean 'rows'\?"):
            from_dict({"type": "strip", "row": 2})

    def test_a_lora_is_trained_under_it(self, strip: type[Method]) -> None:
        with pytest.raises(LoraError, match="unknown method 'strip'"):
            TrainSettings(attention={"type": "strip"})
        diffattn.register_method(strip)
        settings = TrainSettings(attention=strip(rows=2).to_dict())
        assert settings.completed().rank == Advice().rank
        assert "strip" not in ADVICE
        assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings

    def test_the_same_class_twice(self, strip: type[Method]) -> None:
        diffattn.register_method(diffattn.register_method(strip))
        assert METHODS["strip"] is strip

    def test_a_class_defined_anew_replaces_the_old_one(self, strip: type[Method]) -> None:
        diffattn.register_method(strip)
        module = sys.modules["strip_attn"]
        exec(outside_method.source(), vars(module))
        assert module.StripAttn is not strip
        diffattn.register_method(module.StripAttn)
        assert METHODS["strip"] is module.StripAttn

    def test_names_that_are_taken(self, strip: type[Method]) -> None:
        @dataclass(frozen=True, kw_only=True)
        class Mine(RadialAttn):
            pass

        taken = (
            r"test_registry\.\S*Mine cannot be registered as 'radial': the name is taken by"
            r" diffattn\.methods\.radial\.RadialAttn, whose `type` it inherits; give Mine a `type`"
            r" of its own"
        )
        with pytest.raises(ValueError, match=taken):
            diffattn.register_method(Mine)
        assert METHODS["radial"] is RadialAttn
        diffattn.register_method(strip)
        Mine.type = "strip"
        with pytest.raises(ValueError, match=r"is taken by strip_attn\.StripAttn; give Mine a"):
            diffattn.register_method(Mine)
        assert METHODS["strip"] is strip

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (None, 'has no name: write `type: ClassVar\\[str\\] = "..."` in it'),
            ("", "is '', but must be a name of letters, digits, - and _, such as 'my-method'"),
            ("a.b", "is 'a.b', but must be a name"),
            (7, "is 7, but must be a name"),
        ],
    )
    def test_names_that_are_none(self, name: object, message: str) -> None:
        @dataclass(frozen=True, kw_only=True)
        class Mine(DenseAttn):
            type: ClassVar = name

        with pytest.raises(ValueError, match=message):
            diffattn.register_method(Mine)

    def test_what_is_no_method(self, strip: type[Method]) -> None:
        register = diffattn.register_method
        with pytest.raises(TypeError, match="an instance of StripAttn; give it the class"):
            register(strip())
        with pytest.raises(TypeError, match="<class 'int'> is no method: derive the class from"):
            register(int)
        with pytest.raises(TypeError, match="'strip' is no method"):
            register("strip")

        @dataclass(frozen=True, kw_only=True)
        class Unfinished(Method):
            type: ClassVar[str] = "unfinished"

        with pytest.raises(TypeError, match="Unfinished is not complete: it lacks attend, for_mod"):
            register(Unfinished)

        class Undecorated(DenseAttn):
            type: ClassVar[str] = "undecorated"
            parameter: int = 1

        with pytest.raises(TypeError, match=r"Undecorated is no dataclass: put @dataclass\(frozen"):
            register(Undecorated)

        @dataclass(frozen=True, kw_only=True)
        class Typed(DenseAttn):
            type: str = "typed"

        with pytest.raises(TypeError, match="Typed has 'type' for a parameter: annotate it as Cla"):
            register(Typed)

        @dataclass(frozen=True, kw_only=True)
        class Demanding(DenseAttn):
            type: ClassVar[str] = "demanding"
            easy: list[int] = field(default_factory=list)
            window: int

        with pytest.raises(TypeError, match=r"parameter 'window' of \S*Demanding has no default"):
            register(Demanding)
        assert not METHODS.keys() & {"strip", "unfinished", "undecorated", "typed", "demanding"}


class TestPlugin:
    def test_it_is_loaded_when_its_name_is_looked_up(self, site: Path) -> None:
        outside_method.install_strip(site)
        from_dict({"type": "radial"})
        with pytest.raises(ValueError, match=r"unknown method 'stripe'; did you mean 'strip'\?"):
            from_dict({"type": "stripe"})
        assert "strip_attn" not in sys.modules
        check_rows(from_dict({"type": "strip", "rows": 0}), 0)
        assert "strip" in METHODS

    def test_it_is_listed(self, site: Path) -> None:
        outside_method.install_strip(site)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            listed = all_methods()
        assert list(listed)[-1] == "strip"
        assert listed["strip"].__module__ == "strip_attn"

    def test_one_registered_by_hand_is_the_same(self, site: Path) -> None:
        outside_method.install_strip(site)
        from strip_attn import StripAttn

        diffattn.register_method(StripAttn)
        assert type(from_dict({"type": "strip"})) is all_methods()["strip"] is StripAttn

    @pytest.mark.parametrize(
        ("code", "value", "message"),
        [
            ("import nowhere_to_be_found", "broken_attn:Broken", "ModuleNotFoundError: No module"),
            ("1 / 0", "broken_attn:Broken", "ZeroDivisionError: division by zero"),
            ("", "broken_attn:Broken", "AttributeError: module 'broken_attn' has no attribute"),
            ("Broken = 3", "broken_attn:Broken", "TypeError: 3 is no method: derive the class"),
            ("", "broken_attn", "TypeError: <module 'broken_attn' from .*> is no method"),
            (
                "from diffattn import DenseAttn",
                "broken_attn:DenseAttn",
                "ValueError: its `type` is 'dense', but must be the entry point's name, 'broken'",
            ),
        ],
    )
    def test_a_broken_one_is_named_and_alone(
        self, site: Path, code: str, value: str, message: str
    ) -> None:
        outside_method.install(site, "broken_attn", code, {"broken": value})
        outside_method.install_strip(site)
        whole = (
            rf"the entry point broken = {value} of broken_attn 0\.3 cannot be loaded \({message}"
            rf".*\); repair, update or uninstall that package"
        )
        with pytest.raises(ValueError, match=whole) as caught:
            from_dict({"type": "broken"})
        assert caught.value.__cause__ is not None
        from_dict({"type": "radial"})
        from_dict({"type": "strip"})
        with pytest.warns(UserWarning, match=f"left out method 'broken': {whole}"):
            listed = all_methods()
        assert "broken" not in listed
        assert {"dense", "radial", "strip"} <= listed.keys()

    def test_a_name_of_diffattns_own_stays_its_own(self, site: Path) -> None:
        code = outside_method.source().replace('"strip"', '"radial"')
        outside_method.install(site, "broken_attn", code, {"radial": "broken_attn:StripAttn"})
        assert type(from_dict({"type": "radial"})) is RadialAttn
        with pytest.warns(UserWarning, match=r"broken_attn 0\.3 .* is taken by diffattn\."):
            assert all_methods()["radial"] is RadialAttn

    def test_two_packages_with_one_name(self, site: Path) -> None:
        outside_method.install_strip(site)
        code = outside_method.source()
        outside_method.install(site, "other_attn", code, {"strip": "other_attn:StripAttn"})
        message = r"2 packages have an entry point of this name, \S+_attn 0\.3, \S+_attn 0\.3: uni"
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                from_dict({"type": "strip"})
        with pytest.warns(UserWarning, match=f"left out method 'strip': {message}"):
            assert "strip" not in all_methods()
