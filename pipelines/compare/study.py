"""The study of one model: all methods at equal shares of the pairs, schedules, LoRAs, caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.schedule import Ramp, ramp

from ..errors import RunInterruptedError, UserError
from ..knobs import KNOBS
from ..run.method_settings import make_method
from ..run.prompts import read_prompts
from ..run.request import BUNDLED_MODEL, Request
from ..run.trained_lora import read_lora_record
from .caches import lacking
from .case import FLOORS, Case, case_of_words, check_cases, chosen, flex_floor
from .command import base_request, finish, folder_of, make_comparison
from .comparison import Folder
from .densities import Found, at_densities
from .measures import choose_measures
from .papers import papers_beside
from .study_prompts import PROMPTS

_Say = Callable[[str], None]
Settings = dict[str, Any]

METHODS, WARM_UP, RAMPS, LORA, CACHE = "methods", "warm-up", "ramps", "lora", "cache"
GROUPS = (METHODS, WARM_UP, RAMPS, LORA, CACHE)
DENSITIES = (0.5, 0.25, 0.125)

# In the comparison of methods every layer and every step is sparse: schedules would hide them.
_ALWAYS: Settings = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}
_ALWAYS_WORDS = " ".join(f"{name}={value}" for name, value in _ALWAYS.items())
# The bundled model has 2,304 tokens: the blocks and clusters of long videos are too large for it.
_SMALL = {
    "sol": "block=32",
    "block-topk": "block=32",
    "svg2": "block=32 query_cluster=25 key_cluster=25",
    "sla": "block_q=32 block_kv=32",
    "sla2": "block_q=32 block_kv=32",
}
# Methods without a share of the pairs, with their own settings.
_WITHOUT_PAIRS = ("agent", "linfusion")
# What other groups change of these cases is compared with the cases themselves.
_OF_SWEPT = (METHODS, WARM_UP, LORA, CACHE)
# Dense first steps, as shares of a run, beside none.
_WARM_UPS = (0.1, 0.25, 0.4)
# With dense steps, with a LoRA, with a cache, and by FlexAttention, at one share.
_SWEPT = ("radial", "gna", "vmoba")
_SWEPT_AT = 0.25
# The constant share, and ramps of the same mean over a run.
_CONSTANT = 0.3
_RAMPS = {"falling": (0.5, 0.1), "rising": (0.1, 0.5)}
_THRESHOLD = 0.2
# Bytes of videos in the page, which is to be committed: of a few samples.
_MEDIA = 4_000_000


@dataclass(frozen=True)
class AskedStudy:
    """What the user asked for.

    Attributes:
        prompts: how many prompts.
        prompts_file: a file of prompts in their place; the first `prompts` of it are taken.
        seeds: how many seeds, from 0.
        only: groups or cases to make now; none for all.
        lora: file or folder of a LoRA for a model of the user's; the bundled model's are trained.
    """

    prompts: int
    prompts_file: Path | None
    seeds: int
    only: tuple[str, ...]
    lora: str | None


def study(
    asked: AskedStudy,
    given: Mapping[str, Any],
    output: str,
    say: _Say,
    warn: _Say,
    *,
    memory_check: bool,
) -> None:
    """Run `diffattn study`; arguments are as for `compare_methods`.

    Raises:
        UserError: for bad input, before anything is rendered.
        RunInterruptedError: on Ctrl-C.
    """
    for name in ("prompts", "seeds"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(asked, name)}")
    folder = folder_of(output)
    model = given.get("model") or BUNDLED_MODEL
    prompts = _prompts(asked, model)
    base = base_request(given, prompts[0])
    if model == BUNDLED_MODEL and asked.lora is not None:
        raise UserError("--lora is for --model; the LoRAs of the bundled model are trained here")
    cases, skipped = study_cases(base, folder, asked.lora, say)
    check_cases(cases)
    title = f"The study of diffattn on {model}"
    measures = choose_measures([])
    comparison = make_comparison(base, cases, prompts, range(asked.seeds), measures, title)
    floors = [case for case in comparison.cases if case.name in FLOORS]
    now = [*floors, *(case for case in chosen(comparison.cases, asked.only) if case not in floors)]
    for case in [case for case in now if case.cache is not None]:
        reason = lacking(case.cache)
        if reason is not None:
            skipped[case.name] = reason
            now.remove(case)
    for name, reason in skipped.items():
        say(f"skipped: {name}: {reason}")
    if model == BUNDLED_MODEL:
        try:
            _train([case for case in now if case.lora is not None], say)
        except KeyboardInterrupt:
            raise RunInterruptedError([], "the training goes on by the same command") from None
    finish(
        comparison,
        folder,
        now,
        say,
        warn,
        memory_check=memory_check,
        papers=papers_beside,
        most_media=_MEDIA,
    )


def study_cases(
    base: Request, folder: Folder, lora: str | None, say: _Say
) -> tuple[list[Case], dict[str, str]]:
    """The cases of the study, and those that cannot be had with the reasons.

    Args:
        base: what all requests have in common.
        folder: keeps the parameters that were found.
        lora: the user's LoRA, if there is one.
        say: takes lines for the user.
    """
    bundled = base.model == BUNDLED_MODEL
    words = [f"{name} {_SMALL.get(name, '') if bundled else ''} {_ALWAYS_WORDS}" for name in KNOBS]
    named = [
        dataclasses.replace(case_of_words(" ".join(one.split())), name=name, groups=(METHODS,))
        for name, one in zip(KNOBS, words, strict=True)
    ]
    found = at_densities(named, len(named), DENSITIES, base, Found(folder, base), say)
    # The nearest to two shares may be one and the same: the first has the name.
    methods: list[Case] = []
    own: dict[str, Case] = {}
    for case in found:
        same = next((one for one in methods if one.attention == case.attention), None)
        own[case.name] = case if same is None else same
        if same is None:
            methods.append(case)
    swept = {name: own[f"{name} at {_SWEPT_AT:g}"] for name in _SWEPT}
    in_sweeps = [case.name for case in swept.values()]
    cases = [
        dataclasses.replace(case, groups=_OF_SWEPT) if case.name in in_sweeps else case
        for case in methods
    ]
    cases += [_plain(name) for name in _WITHOUT_PAIRS]
    cases.append(Case("radial, as published", make_method({"type": "radial"}).to_dict(),
                      groups=(METHODS, WARM_UP)))  # fmt: skip
    cases += _warm_ups(swept.values())
    trained, skipped = _loras(swept, folder, bundled, lora)
    cases += [*_ramps(bundled), *trained, *_caches(swept["vmoba"])]
    cases.append(dataclasses.replace(flex_floor(swept["gna"]), groups=(METHODS,)))
    return cases, skipped


def _plain(name: str) -> Case:
    return Case(name, make_method({"type": name, **_ALWAYS}).to_dict(), groups=(METHODS,))


def _warm_ups(cases: Iterable[Case]) -> list[Case]:
    """Each case with dense first steps, and with dense last steps."""
    found = []
    for case in cases:
        for share in _WARM_UPS:
            settings = make_method({**case.attention, "dense_steps": share}).to_dict()
            found.append(Case(f"{case.name}, first {share:.0%} dense", settings, groups=(WARM_UP,)))
        settings = make_method({**case.attention, "last_dense_steps": 0.25}).to_dict()
        found.append(Case(f"{case.name}, last 25% dense", settings, groups=(WARM_UP,)))
    return found


def _ramps(bundled: bool) -> list[Case]:
    """A constant share of the blocks, and shares that change with the steps at equal work."""
    plain = {"type": "block-topk", "order": "raster", **_ALWAYS} | (
        {"block": 32} if bundled else {}
    )
    kept: dict[str, float | Ramp] = {f"{_CONSTANT:.0%} in each step": _CONSTANT}
    for word, (first, last) in _RAMPS.items():
        kept[f"{word} from {first:.0%} to {last:.0%}"] = ramp(first, last)
    return [
        Case(f"block-topk, {words}", make_method({**plain, "keep": keep}).to_dict(),
             groups=(RAMPS,))
        for words, keep in kept.items()
    ]  # fmt: skip


def _loras(
    swept: Mapping[str, Case], folder: Folder, bundled: bool, lora: str | None
) -> tuple[list[Case], dict[str, str]]:
    """Methods with the LoRA that was trained under them; without a LoRA they are in `swept`."""
    if bundled:
        return [
            Case(f"{name} + LoRA", case.attention, groups=(LORA,),
                 lora=str(folder.path / "loras" / name))
            for name, case in swept.items()
        ], {}  # fmt: skip
    if lora is None:
        return [], {"LoRA": "give the LoRA of `diffattn lora train` by --lora"}
    record = read_lora_record(lora)
    if record is None:
        raise UserError(f"--lora {lora} was not trained by diffattn lora train: its method is not"
                        f" known; compare it by `diffattn compare --cases`")  # fmt: skip
    method = make_method(record.method).to_dict()
    return [
        Case(f"{method['type']} of the LoRA, without", method, groups=(LORA,)),
        Case(f"{method['type']} + LoRA", method, groups=(LORA,), lora=lora),
    ], {}


def _caches(sparse: Case) -> list[Case]:
    """Step caches on dense attention, and on a sparse method."""
    found = []
    for cache in ("first-block", f"cache-dit:{_THRESHOLD}"):
        name = cache.partition(":")[0]
        found.append(Case(f"dense + {name}", groups=(CACHE,), cache=cache))
        found.append(
            Case(f"{sparse.name} + {name}", sparse.attention, groups=(CACHE,), cache=cache)
        )
    return found


def _prompts(asked: AskedStudy, model: str) -> list[str]:
    """The prompts: of a file, held-out captions of the bundled model, or this study's own."""
    if asked.prompts_file is not None:
        known = list(dict.fromkeys(read_prompts(asked.prompts_file).prompts))
        where = f"{asked.prompts_file} holds"
    elif model == BUNDLED_MODEL:
        from diffattn.samples.moving_shapes.captions import split_scenes

        _, held_out = split_scenes()
        # Spread evenly: the list is sorted by colour and shape.
        known = [scene.caption for scene in held_out]
        count = min(asked.prompts, len(known))
        if asked.prompts <= len(known):
            return [known[index * len(known) // count] for index in range(count)]
        where = "there are"
    else:
        known, where = list(PROMPTS), "there are"
    if asked.prompts > len(known):
        raise UserError(f"--prompts {asked.prompts}: {where} {len(known)} prompts")
    return known[: asked.prompts]


def _train(cases: Sequence[Case], say: _Say) -> None:
    """Train the LoRAs of the bundled model that are not there yet."""
    from .study_loras import train

    for case in cases:
        assert isinstance(case.lora, str)
        train(dict(case.attention), Path(case.lora), say)
