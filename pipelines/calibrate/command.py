"""From the options of `diffattn calibrate` to a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, shortened
from ..run.job import check_output_name
from ..run.method_settings import make_method, read_arguments
from ..run.request import BUNDLED_MODEL, Request
from .run import METHODS, Budget, calibrate, choose_prompts


@dataclass(frozen=True)
class Asked:
    """The options that are no settings of a request.

    Attributes:
        prompts: of --prompts; None without it.
        names: each --attn.
        arguments: each --attn-arg.
        config: of --attn-config.
        work: wanted share of the dense FLOPs.
        renders, minutes: the budget; one of them is None.
    """

    prompts: tuple[str, ...] | None
    names: tuple[str, ...]
    arguments: tuple[str, ...]
    config: Path | None
    work: float
    renders: int | None
    minutes: float | None


def plan_calibration(asked: Asked, given: Mapping[str, Any], output: Path) -> Callable[..., Path]:
    """Check everything that needs no model.

    Args:
        asked: the options of the search.
        given: the settings that the user gave, by the names of `Request`.
        output: the folder.

    Returns:
        `calibrate` without its last arguments.

    Raises:
        UserError: if an option is refused.
    """
    check_output_name(str(output))
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file, but must be a folder")
    if asked.renders is not None and asked.renders < 1:
        raise UserError(f"--renders must be at least 1, not {asked.renders}")
    if asked.minutes is not None and not asked.minutes > 0:
        raise UserError(f"--minutes must be above 0, not {asked.minutes:g}")
    methods = _methods(asked)
    model = given.get("model", BUNDLED_MODEL)
    prompts = choose_prompts(model, asked.prompts, given.get("seed", 0))
    base = Request.from_dict({**given, "attention": {"type": "dense"}, "prompt": prompts[0]})
    budget = Budget(asked.renders, asked.minutes)

    def begin(
        say: Callable[[str], None], warn: Callable[[str], None], *, memory_check: bool
    ) -> Path:
        return calibrate(
            base,
            prompts,
            methods,
            asked.work,
            output,
            budget,
            say,
            warn,
            memory_check=memory_check,
        )

    return begin


def _methods(asked: Asked) -> list[Mapping[str, Any]]:
    """The settings of the methods to try."""
    if asked.config is not None:
        if asked.names or asked.arguments:
            raise UserError("give --attn with --attn-arg, or --attn-config, not both")
        found = _read(asked.config)
        entries = found if isinstance(found, list) else [found]
        for entry in entries:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
                raise UserError(
                    f'--attn-config {asked.config} must give methods as objects with a "type", not'
                    f" {shortened(entry)}"
                )
        if not entries:
            raise UserError(f"--attn-config {asked.config} gives no method")
    elif asked.names:
        if asked.arguments and len(asked.names) > 1:
            raise UserError(
                "--attn-arg goes with one --attn; give several methods with parameters by"
                " --attn-config, a JSON list"
            )
        entries = [{"type": name, **read_arguments(asked.arguments)} for name in asked.names]
    else:
        if asked.arguments:
            raise UserError("--attn-arg is of a method: give --attn, too")
        entries = list(METHODS)
    made = [make_method(entry) for entry in entries]
    for number, method in enumerate(made):
        if method in made[:number]:
            raise UserError(f"the method {shortened(entries[number])} is given twice")
    return entries


def _read(config: Path) -> Any:
    try:
        return json.loads(config.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --attn-config {config}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--attn-config {config} is not JSON: {error}") from None
