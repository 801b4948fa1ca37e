"""The run of a calibration: dense videos, statistics, the search, and the policy."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import TYPE_CHECKING, Any

from diffattn._locks import lock_file

from ..errors import RunInterruptedError, UserError
from ..run.compare import psnr
from ..run.generate import render
from ..run.loading import LoadedModel, load_model
from ..run.machine import quiet_libraries
from ..run.memory import check_memory
from ..run.method_settings import make_method
from ..run.refusals import refusals
from ..run.request import BUNDLED_MODEL, Request
from ..run.sidecar import versions
from ..run.sizing import Run, complete
from ..run.vocabulary import warn_of_words
from .candidates import Candidate, Maker, Settings, check_method, settings_of
from .journal import Journal, key
from .search import WARM_UPS, leader, search

if TYPE_CHECKING:
    from diffattn import Policy

# The methods that compete where the user names none.
METHODS: tuple[dict[str, Any], ...] = (
    {"type": "block-topk"},
    {"type": "block-topk", "order": "raster"},
    {"type": "block-topk", "remainder": "summary"},
    {"type": "vmoba"},
    {"type": "gna"},
)
# Prompts of a search.
PROMPTS = 16
# Equal frames have no ratio; JSON has no infinity.
_MOST_DB = 100.0
_MEASURED_STEPS = 4
# A method whose outputs are so many times farther from dense than the best one's is left out.
_FAR = 10
_SHOWN = 20
_GO_ON = "the same command goes on from there"


@dataclass(frozen=True)
class Budget:
    """When the search ends: after so many calls of the pipeline in all, or minutes of this run."""

    renders: int | None
    minutes: float | None


class _SpentError(Exception):
    """The budget is spent."""


def calibrate(
    base: Request,
    prompts: Sequence[str],
    methods: Sequence[Mapping[str, Any]],
    wanted: float,
    folder: Path,
    budget: Budget,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    *,
    memory_check: bool = True,
) -> Path:
    """Find a policy, and write it into a folder.

    Args:
        base: what all renders have in common; its seed is that of the first prompt, the second
            prompt has the next number, and so on.
        prompts: the prompts of the search.
        methods: settings of the methods to choose from.
        wanted: share of a dense run's attention FLOPs.
        folder: keeps the results; an interrupted calibration goes on from there.
        budget: when to end.
        say: takes lines for the user.
        warn: takes one-line warnings.
        memory_check: whether to refuse what the device has too little memory for.

    Returns:
        The policy's file.

    Raises:
        UserError: if the model, a method, the folder or the wanted work is refused.
        RunInterruptedError: on Ctrl-C; the folder is kept.
    """
    quiet_libraries()
    if not 0 < wanted < 1:
        raise UserError(f"--work must be a share above 0 and below 1, not {wanted:g}")
    for method in methods:
        check_method(make_method(method))
    if memory_check:
        check_memory(base)
    settings = {
        **{name: value for name, value in base.to_dict().items() if name != "prompt"},
        "prompts": list(prompts),
        "methods": [make_method(method).to_dict() for method in methods],
        "work": wanted,
        "versions": versions(),
    }
    Journal.open(folder, settings)
    lock = lock_file(folder / ".lock")
    if lock is None:
        raise UserError(f"another process calibrates in {folder}: wait for it, or stop it")
    try:
        # Another process may have ended since then.
        journal = Journal.open(folder, settings)
        loaded = load_model(base)
        for prompt in prompts:
            warn_of_words(loaded.pipe, prompt, warn)
        return _Calibration(journal, base, prompts, methods, wanted, loaded, budget, say).run()
    except KeyboardInterrupt:
        raise RunInterruptedError([folder], _GO_ON) from None
    finally:
        lock.release()


class _Calibration:
    def __init__(
        self,
        journal: Journal,
        base: Request,
        prompts: Sequence[str],
        methods: Sequence[Mapping[str, Any]],
        wanted: float,
        loaded: LoadedModel,
        budget: Budget,
        say: Callable[[str], None],
    ) -> None:
        from diffattn.planning.plans import model_shape

        self._journal, self._loaded, self._budget, self._say = journal, loaded, budget, say
        self._wanted = wanted
        self._start = monotonic()
        self._runs = [
            complete(
                dataclasses.replace(base, prompt=prompt, seed=base.seed + number),
                loaded,
                pictures=True,
            )
            for number, prompt in enumerate(prompts)
        ]
        run = self._runs[0]
        assert run.request.steps is not None
        with refusals():
            shape = model_shape(loaded.pipe)
        self._maker: Maker = Maker(shape, _grid(shape, run), run.request.steps, wanted)
        self._names: dict[Settings, str] = {}
        for given in methods:
            method = make_method(given)
            with refusals():
                self._maker.settled(method)
            self._names.setdefault(settings_of(method), _name(given))
        self._tried: dict[Candidate, tuple[Policy, float]] = {}
        self._alike: dict[Any, Candidate] = {}
        self._led: Candidate | None = None

    def run(self) -> Path:
        first = self._first()
        say = self._say
        try:
            errors = self._errors(first)
            first = self._without_far(first, errors)
            search(first, errors, self._is_possible, self._score, len(self._runs))
            say("the search is over")
        except _SpentError:
            say("the budget is spent")
        return self._finish()

    def _first(self) -> list[Candidate]:
        """The candidates with constant, equal shares, at every warm-up."""
        all_first = [
            Candidate(method, warm_up)
            for method in self._names
            for warm_up in WARM_UPS
            if warm_up < self._wanted
        ]
        first = [candidate for candidate in all_first if self._is_possible(candidate)]
        for method, name in self._names.items():
            if all(candidate.method != method for candidate in first):
                self._say(f"left out {name}: its parameters come not near the wanted work")
        if not first:
            raise UserError(
                f"--work {self._wanted:g}: no method can do so little or so much at this size, of"
                f" {self._maker.grid.tokens:,} tokens: take another share, a larger size, or a"
                f" smaller block"
            )
        return first

    def _is_possible(self, candidate: Candidate) -> bool:
        if candidate in self._tried:
            return True
        with refusals():
            made = self._maker.policy(candidate)
        if made is None:
            return False
        # Few steps, and shares that are rounded, make one policy of several candidates.
        alike = self._maker.in_run(made[0])
        if self._alike.setdefault(alike, candidate) != candidate:
            return False
        self._tried[candidate] = made
        return True

    def _errors(self, first: Sequence[Candidate]) -> dict[Settings, list[list[float]]]:
        """The errors of each method in a dense run, by layer and head, on the first prompt."""
        from diffattn.site_errors import site_errors

        probes = {
            # The first has the shortest dense warm-up, and so the smallest share.
            candidate.method: self._tried[candidate][0].rules[0].phases[-1].method
            for candidate in reversed(first)
        }
        known = self._journal.errors.get("0")
        if known is None:
            self._spend()
            run = self._runs[0]
            steps = self._maker.steps
            measured = sorted({round(i * (steps - 1) / 3) for i in range(_MEASURED_STEPS)})
            self._say("measuring the methods' errors at each layer in a dense run")
            known = site_errors(
                self._loaded.pipe,
                lambda: render(run.request, self._loaded, "", run.sources, shown=False),
                list(probes.values()),
                measured,
            )
            self._journal.add_errors(0, known)
        found: dict[Settings, list[list[float]]] = {}
        for i, method in enumerate(probes):
            # Means over the measured steps.
            found[method] = [
                [fmean(of_head) for of_head in zip(*(step[i] for step in layer), strict=True)]
                for layer in known
            ]
            each = ", ".join(f"{sum(heads):.3g}" for heads in found[method])
            self._say(f"errors of {self._names[method]} by layer: {each}")
        return found

    def _without_far(
        self, first: Sequence[Candidate], errors: Mapping[Settings, list[list[float]]]
    ) -> list[Candidate]:
        """The candidates without those whose method has far larger errors than the best one."""
        means = {method: fmean(map(sum, layers)) for method, layers in errors.items()}
        far = {method for method, mean in means.items() if mean > _FAR * min(means.values())}
        for method in self._names:
            if method in far:
                self._say(f"left out {self._names[method]}: its errors are the largest by far")
        return [candidate for candidate in first if candidate.method not in far]

    def _score(self, candidate: Candidate, prompt: int) -> float:
        import diffattn

        known = self._journal.score(candidate, prompt)
        if known is not None:
            return known
        dense = self._dense(prompt)
        self._spend()
        policy, _ = self._tried[candidate]
        run = self._runs[prompt]
        with refusals():
            diffattn.set_attn_processor(self._loaded.pipe, policy)
        try:
            made = render(run.request, self._loaded, "", run.sources, shown=False)
        finally:
            diffattn.set_attn_processor(self._loaded.pipe, None)
        score = min(_MOST_DB, psnr(dense, made.frames))
        self._journal.add_score(candidate, prompt, score)
        best = leader(self._scores())
        assert best is not None
        self._say(
            f"[{self._so_far}] {candidate.words(self._names)}: prompt {prompt + 1}, {score:.2f} dB;"
            f" best so far {best[1]:.2f} dB over {best[2]}: {best[0].words(self._names)}"
        )
        if best[0] != self._led:
            self._led = best[0]
            self._write(*best)
        return score

    @property
    def _so_far(self) -> str:
        if self._budget.renders is not None:
            return f"{self._journal.renders}/{self._budget.renders}"
        minutes = (monotonic() - self._start) / 60
        return f"{self._journal.renders} renders, {minutes:.1f}/{self._budget.minutes:g} min"

    def _dense(self, prompt: int) -> Any:
        frames = self._journal.frames(prompt)
        if frames is None:
            self._spend(counted=prompt not in self._journal.dense)
            run = self._runs[prompt]
            frames = render(run.request, self._loaded, "", run.sources, shown=False).frames
            self._journal.add_dense(prompt, frames)
        return frames

    def _spend(self, *, counted: bool = True) -> None:
        """Raise `_SpentError` if there is no budget for another render."""
        most, minutes = self._budget.renders, self._budget.minutes
        if most is not None and counted and self._journal.renders >= most:
            raise _SpentError
        if minutes is not None and monotonic() - self._start >= 60 * minutes:
            raise _SpentError

    def _scores(self) -> dict[Candidate, Mapping[int, float]]:
        return {
            candidate: self._journal.scores[key(candidate)]
            for candidate in self._tried
            if key(candidate) in self._journal.scores
        }

    def _finish(self) -> Path:
        best = leader(self._scores())
        if best is None:
            raise UserError(
                "the budget was spent before a candidate was rendered: give more --renders or"
                " --minutes; the same command goes on"
            )
        path = self._write(*best)
        for line in self._table():
            self._say(line)
        self._say(
            f"{path}: {best[0].words(self._names)}; PSNR to dense {best[1]:.2f} dB over {best[2]}"
            f" prompt{'s' * (best[2] != 1)} at {self._tried[best[0]][1]:.1%} of dense attention's"
            f" FLOPs. Use it with --attn-config, or"
            f" pipe.set_attn_processor(diffattn.load_policy(...))"
        )
        return path

    def _write(self, best: Candidate, mean: float, prompts: int) -> Path:
        """Write the policy of the best candidate so far."""
        import torch

        import diffattn
        from diffattn.methods.policy import Recorded
        from diffattn.models import denoisers

        policy, work = self._tried[best]
        pipe, run = self._loaded.pipe, self._runs[0]
        recorded = Recorded(
            model=str(getattr(pipe.config, "_name_or_path", None) or run.request.model),
            denoiser=type(next(iter(denoisers(pipe).values()))).__name__,
            variant=self._maker.shape.variant,
            layers=self._maker.layers,
            grid=(run.grid.frames, run.grid.height, run.grid.width),
            steps=self._maker.steps,
            diffattn=diffattn.__version__,
            torch=torch.__version__,
            found={
                "by": "diffattn calibrate",
                "wanted_work": self._wanted,
                "work": round(work, 5),
                "psnr_db": round(mean, 3),
                "prompts": prompts,
                "seed": run.request.seed,
                "renders": self._journal.renders,
                "candidate": best.to_dict(),
                "candidates": [
                    {"candidate": words, "work": round(share, 5), "prompts": n, "psnr_db": score}
                    for words, share, n, score in self._rows()
                ],
            },
        )
        path = self._journal.folder / "policy.json"
        diffattn.save_policy(dataclasses.replace(policy, recorded=recorded), path)
        return path

    def _rows(self) -> list[tuple[str, float, int, float]]:
        """Candidates with their work, prompts and mean score; those of most prompts first."""
        rows = [
            (candidate.words(self._names), self._tried[candidate][1], len(of), fmean(of.values()))
            for candidate, of in self._scores().items()
        ]
        return sorted(
            ((words, work, n, round(score, 3)) for words, work, n, score in rows),
            key=lambda row: (-row[2], -row[3]),
        )

    def _table(self) -> Iterator[str]:
        rows = self._rows()
        yield "   PSNR  prompts   work  candidate"
        for words, work, n, score in rows[:_SHOWN]:
            yield f"{score:7.2f}  {n:7}  {work:5.1%}  {words}"
        if len(rows) > _SHOWN:
            yield f"and {len(rows) - _SHOWN} more, in policy.json"


def bundled_prompts(seed: int, count: int) -> list[str]:
    """Captions that the bundled model was trained on; tests of results have the held-out ones."""
    from diffattn.samples.moving_shapes.captions import split_scenes

    training, _ = split_scenes()
    return [scene.caption for scene in random.Random(seed).sample(training, count)]


def choose_prompts(model: str, given: Sequence[str] | None, seed: int) -> list[str]:
    """The prompts of a search: the first of a file, or captions of the bundled model.

    Raises:
        UserError: for another model without a file, and for prompts that come twice.
    """
    if given is None:
        if model != BUNDLED_MODEL:
            raise UserError(
                f"give --prompts FILE, prompts like those that {model} is used with: only the"
                f" bundled model has prompts of its own"
            )
        return bundled_prompts(seed, PROMPTS)
    for prompt in given:
        if given.count(prompt) > 1:
            raise UserError(f"the prompt {prompt!r} comes twice: give every prompt once")
    return list(given)[:PROMPTS]


def _grid(shape: Any, run: Run) -> Any:
    """The tokens of a call; without text where the prompt decides how much there is."""
    request = run.request
    try:
        return shape.grid(request.height, request.width, request.num_frames, None)
    except ValueError:
        return run.grid


def _name(settings: Mapping[str, Any]) -> str:
    """The type of a method, and the parameters that were given."""
    given = [f"{name}={value}" for name, value in settings.items() if name != "type"]
    return f"{settings['type']} ({', '.join(given)})" if given else str(settings["type"])
