"""From the options of `diffattn compare` to a comparison, its run and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.job import absolute, check_output_name
from ..run.loading import choose_device
from ..run.outputs import given_path
from ..run.processes import count as processes
from ..run.prompts import read_prompts
from ..run.request import TEXT, Request, check_option
from ..run.sources import source_files
from ..run.trained_lora import with_paths
from .case import (
    Case,
    case_of_file,
    case_of_words,
    cases_of_file,
    check_cases,
    chosen,
    dense_and_floors,
    flex_floors,
)
from .comparison import Comparison, Folder, read_record
from .densities import Found, at_densities
from .measures import choose_measures
from .page import MOST_MEDIA
from .results import write_results
from .sample_table import Row

_Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What the user asked for, as the options have it.

    Attributes:
        prompts, prompts_file: the prompts, by one way or the other.
        seeds: of each prompt.
        methods: words of --attn.
        configs: files of --attn-config.
        cases: the file of --cases.
        densities: shares of the token pairs for each of `methods`.
        measures: names of --measure; none for all.
        flex: names of the cases that FlexAttention computes, too.
        only: names of the cases to make now; none for all.
    """

    prompts: tuple[str, ...]
    prompts_file: Path | None
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    configs: tuple[Path, ...]
    cases: Path | None
    densities: tuple[float, ...]
    measures: tuple[str, ...]
    flex: tuple[str, ...]
    only: tuple[str, ...]


def compare_methods(
    asked: Asked,
    given: Mapping[str, Any],
    output: str,
    say: _Say,
    warn: _Say,
    *,
    memory_check: bool,
) -> None:
    """Run `diffattn compare`.

    Args:
        asked: what is compared.
        given: settings of the requests, by the names of `Request`.
        output: the folder.
        say: takes lines for the user.
        warn: takes one-line warnings.
        memory_check: whether to refuse what the device has too little memory for.

    Raises:
        UserError: for bad input, before anything is rendered.
        RunInterruptedError: on Ctrl-C.
    """
    folder = folder_of(output)
    prompts = _prompts(asked, say)
    seeds = _seeds(asked.seeds)
    base = base_request(given, prompts[0])
    cases = [
        *(case_of_words(words) for words in asked.methods),
        *(case_of_file(path) for path in asked.configs),
        *(cases_of_file(asked.cases) if asked.cases is not None else ()),
    ]
    check_cases(cases)
    if asked.densities:
        known = Found(folder, base)
        known.methods |= recorded_methods(folder)
        cases = at_densities(cases, len(asked.methods), asked.densities, base, known, say)
        check_cases(cases)
    cases += flex_floors(cases, asked.flex)
    check_cases(cases)
    measures = choose_measures(asked.measures)
    comparison = make_comparison(base, cases, prompts, seeds, measures)
    now = chosen(comparison.cases, asked.only)
    finish(comparison, folder, now, say, warn, memory_check=memory_check)


def make_comparison(
    base: Request,
    cases: Sequence[Case],
    prompts: Sequence[str],
    seeds: Sequence[int],
    measures: Sequence[str],
    title: str | None = None,
) -> Comparison:
    """The comparison of cases, with the dense model and its floors in front."""
    on_cpu = choose_device(base.device).type == "cpu"
    dtype = base.dtype or ("float32" if on_cpu else "bfloat16")
    comparison = Comparison(
        base,
        (*dense_and_floors(dtype), *cases),
        tuple(prompts),
        tuple(seeds),
        tuple(measures),
    )
    return comparison if title is None else replace(comparison, title=title)


def finish(
    comparison: Comparison,
    folder: Folder,
    only: Sequence[Case],
    say: _Say,
    warn: _Say,
    *,
    memory_check: bool,
    papers: Callable[[Sequence[Row]], Sequence[Mapping[str, str]]] = lambda rows: (),
    most_media: int = MOST_MEDIA,
) -> None:
    """Make what the folder lacks, and write the table and the page.

    Args:
        comparison: the settings.
        folder: the folder.
        only: the cases to make now.
        say: takes lines for the user.
        warn: takes one-line warnings.
        memory_check: whether to refuse what the device has too little memory for.
        papers: gives the figures that papers report, for the page, beside those of the samples.
        most_media: bytes of videos and pictures in the page.
    """
    from .run import compare

    table = compare(comparison, folder, only, say, warn, memory_check=memory_check)
    for line in write_results(comparison, folder, table.rows, papers(table.rows), most_media):
        say(line)


def folder_of(output: str) -> Folder:
    """The folder that the user named.

    Raises:
        UserError: if it cannot be one.
    """
    check_output_name(output)
    path = given_path(output)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {output} is a file, but must be a folder")
    return Folder(path)


def recorded_methods(folder: Folder) -> dict[str, Any]:
    """The settings of the methods, by case, that an earlier run in the folder has recorded."""
    if not folder.settings.exists():
        return {}
    cases = read_record(folder.settings).get("cases", {})
    return {name: case["attention"] for name, case in cases.items()}


def base_request(given: Mapping[str, Any], prompt: str) -> Request:
    """What all requests have in common.

    Raises:
        UserError: for a setting that no model could use.
    """
    settings = dict(given)
    for name in ("model", "last_image", "input"):
        if name in given:
            check_option(name, given[name], TEXT)
            settings[name] = absolute(given[name])
    if "lora" in given:
        settings["lora"] = with_paths(given["lora"], absolute)
    if "image" in given:
        settings["image"] = tuple(absolute(name) for name in given["image"])
    base = Request.from_dict(settings | {"prompt": prompt, "attention": {"type": "dense"}})
    if processes() > 1:
        raise UserError(
            f"torchrun started {processes()} processes, but comparisons run in one: start without"
            f" torchrun"
        )
    source_files(base)
    return base


def _prompts(asked: Asked, say: _Say) -> list[str]:
    """The prompts, each once."""
    if bool(asked.prompts) == (asked.prompts_file is not None):
        raise UserError("give prompts or --prompts-file: one of the two")
    if asked.prompts_file is None:
        for prompt in asked.prompts:
            check_option("prompt", prompt, TEXT)
        read, where = asked.prompts, "prompts"
    else:
        found = read_prompts(asked.prompts_file)
        if found.blank_lines:
            blank = ", ".join(map(str, found.blank_lines))
            say(f"note: skipped blank lines of {asked.prompts_file}: {blank}")
        read, where = found.prompts, f"prompts of {asked.prompts_file}"
    # The paired tests would count a repeated prompt as another sample.
    once = list(dict.fromkeys(read))
    if len(once) < len(read):
        repeated = [str(n) for n, one in enumerate(read, start=1) if one in read[: n - 1]]
        say(f"note: skipped {where} that repeat an earlier one: {', '.join(repeated)}")
    return once


def _seeds(seeds: Sequence[int]) -> list[int]:
    for seed in seeds:
        if list(seeds).count(seed) > 1:
            raise UserError(f"--seed {seed} is given twice")
    return list(seeds)
