"""Methods at wanted shares of the token pairs: a parameter of each is searched for.

The share is that of a plan, or measured by running the model where the content decides about it.
Shares are those of sparse calls; a schedule keeps further calls dense.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from diffattn._checks import number
from diffattn.counting import counted_pairs
from diffattn.planning.plans import model_shape, plan

from ..errors import RunInterruptedError, UserError
from ..knobs import Knob, Settings, check_knob
from ..run.generate import attached, render
from ..run.loading import LoadedModel, load_model
from ..run.machine import quiet_libraries
from ..run.method_settings import make_method
from ..run.refusals import refusals
from ..run.request import Request, check_option
from ..run.sizing import Run, complete
from ..run.sources import read_sources
from .case import Case
from .comparison import Folder
from .sample_table import write_whole

_NO_SCHEDULE: Settings = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}
_SHARE = number(above=0, at_most=1)
# Halvings of the search; each costs a run where the content decides about the share.
_HALVINGS = 12
_HALVINGS_BY_RUNS = 8
# Of the runs of the search; the table has the shares of whole runs.
_STEPS = 6
# A share this near to the wanted one is taken at once, as a share of the wanted one.
_NEAR = 0.01
# Farther from the wanted share than this, the user is told.
_FAR = 0.1


def at_densities(
    cases: Sequence[Case],
    count: int,
    densities: Sequence[float],
    base: Request,
    known: Found,
    say: Callable[[str], None],
) -> list[Case]:
    """Put each of the first cases in the place of itself at every density; keep the others.

    Args:
        cases: the cases.
        count: how many of them are to be changed.
        densities: the wanted shares of the pairs.
        base: what all requests have in common, with a prompt to measure with.
        known: keeps what was found; settings that an earlier run has found are not searched again.
        say: takes lines for the user.

    Raises:
        UserError: for a share out of range or given twice, and a method whose share no parameter
            sets.
        RunInterruptedError: on Ctrl-C.
    """
    for density in densities:
        check_option("density", density, _SHARE)
        if list(densities).count(density) > 1:
            raise UserError(f"--density {density:g} is given twice")
    for case in cases[:count]:
        _knob(case)
    found: list[Case] = []
    search: Search | None = None
    for case in cases[:count]:
        for density in sorted(densities, reverse=True):
            name = f"{case.name} at {density:.4g}"
            if name not in known.methods:
                try:
                    search = search or Search(base, say)
                    known.keep(name, search.find(case, density))
                except KeyboardInterrupt:
                    raise known.interrupted() from None
            found.append(dataclasses.replace(case, name=name, attention=known.methods[name]))
    return [*found, *cases[count:]]


class Found:
    """The parameters that searches have found so far, in a file of a comparison's folder.

    Attributes:
        methods: the settings by case.
    """

    def __init__(self, folder: Folder, base: Request) -> None:
        """Read the file, if it is there and of the same model and size."""
        self._path = folder.path / "densities.json"
        settings = base.to_dict() | {"prompt": "", "seed": 0}
        self._settings = json.loads(json.dumps(settings))
        self.methods: dict[str, Any] = {}
        try:
            found = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(found, dict) and found.get("settings") == self._settings:
            methods = found.get("methods")
            self.methods = methods if isinstance(methods, dict) else {}

    def keep(self, name: str, settings: Settings) -> None:
        """Write down what was found for a case."""
        self.methods[name] = json.loads(json.dumps(settings))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        found = {"settings": self._settings, "methods": self.methods}
        write_whole(self._path, json.dumps(found, indent=1) + "\n")

    def interrupted(self) -> RunInterruptedError:
        """What a search that is stopped raises."""
        kept = [self._path] if self._path.exists() else []
        return RunInterruptedError(kept, "the same command goes on from there" if kept else "")


def _knob(case: Case) -> Knob:
    advice = "compare it by --cases or --attn-config, which --density leaves alone"
    return check_knob(make_method(case.attention), "--density", advice)


class Search:
    """Finds parameters by a loaded model."""

    def __init__(self, base: Request, say: Callable[[str], None]) -> None:
        """Load the model.

        Raises:
            UserError: if the model is refused.
        """
        quiet_libraries()
        self._base, self._say = base, say
        self._sources = read_sources(base, say)
        self._loaded: LoadedModel = load_model(base)
        with refusals():
            self._shape = model_shape(self._loaded.pipe)

    def find(self, case: Case, density: float) -> Settings:
        """The settings of a case's method whose share of the pairs is nearest to `density`."""
        knob = _knob(case)
        low, high = 0.0, 1.0
        best: tuple[float, float, Settings] | None = None
        tried: dict[str, float] = {}
        halvings = _HALVINGS_BY_RUNS if knob.by_content else _HALVINGS
        for _ in range(halvings):
            middle = (low + high) / 2
            settings, share = self._measured(case, knob, middle, tried)
            distance = abs(share - density)
            if best is None or distance < best[0]:
                best = distance, share, settings
            if distance <= _NEAR * density:
                break
            low, high = (low, middle) if share > density else (middle, high)
        assert best is not None
        far = "" if best[0] <= _FAR * density else ", which is as near as its parameters come"
        self._say(f"{case.name}: {best[1]:.1%} of the token pairs for {density:.1%}{far}")
        return best[2]

    def _measured(
        self, case: Case, knob: Knob, at: float, tried: dict[str, float]
    ) -> tuple[Settings, float]:
        """The settings at a place of the knob, and the share of the pairs."""
        request = dataclasses.replace(self._base, attention=dict(case.attention))
        run = complete(request, self._loaded, self._sources, pictures=True)
        with refusals():
            settings = knob.turn(make_method(case.attention), at, run.grid).to_dict()
        key = repr(settings)
        if key not in tried:
            method = make_method({**settings, **_schedule(settings)})
            tried[key] = self._share(dataclasses.replace(run, method=method), knob)
        return settings, tried[key]

    def _share(self, run: Run, knob: Knob) -> float:
        assert run.request.steps is not None
        if not knob.by_content:
            with refusals():
                share = plan(self._shape, run.method, grid=run.grid, steps=1).density
            assert share is not None
            return share
        request = dataclasses.replace(run.request, steps=min(_STEPS, run.request.steps))
        with attached(self._loaded.pipe, run), counted_pairs() as pairs:
            render(request, self._loaded, "", run.sources, shown=False)
        assert pairs.density is not None
        return pairs.density


def _schedule(settings: Settings) -> Settings:
    return {name: value for name, value in _NO_SCHEDULE.items() if name in settings}
