"""From the command line's words for an attention method to the method's own settings."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, shortened

if TYPE_CHECKING:
    from diffattn.methods import Method


@dataclass(frozen=True)
class MethodOptions:
    """The options of a command that describe the attention method.

    Attributes:
        name: of --attn.
        arguments: each --attn-arg, as "name=value"; these override all other settings.
        config: of --attn-config, a JSON file with a method's `to_dict()`.
    """

    name: str | None
    arguments: tuple[str, ...]
    config: Path | None


def attention_settings(options: MethodOptions, recorded: object) -> dict[str, Any]:
    """The complete settings of the method that the options describe.

    Args:
        options: the options of the command.
        recorded: settings of the method of a repeated run or of a LoRA, or None; these are used
            where the options name no method.

    Returns:
        The method's `to_dict()`.

    Raises:
        UserError: if the options contradict each other, or the method is refused.
    """
    name, config = options.name, options.config
    if name is not None and config is not None:
        raise UserError("give --attn or --attn-config, not both")
    settings: Any = {"type": "radial"}
    if config is not None:
        source, settings = f"--attn-config {config}", _read_json(config)
    elif name is not None:
        settings = {"type": name}
    elif recorded is not None:
        source, settings = "the record", recorded
    if isinstance(settings, str):
        settings = {"type": settings}
    if not isinstance(settings, Mapping) or not isinstance(settings.get("type"), str):
        raise UserError(
            f'{source} must give the method as its name or as an object with a "type", not'
            f" {shortened(settings)}"
        )
    settings = dict(settings)
    settings |= read_arguments(options.arguments)
    return make_method(settings).to_dict()


def read_arguments(arguments: Sequence[str], option: str = "--attn-arg") -> dict[str, Any]:
    """The parameters of a method that the user gave as "name=value".

    Args:
        arguments: each "name=value".
        option: the option that they came by, for messages.

    A value may be a schedule over the steps, such as "1x2,0.5,0.2" or "1.3..0.8".

    Raises:
        UserError: if an argument is not "name=value", names the type, or comes twice.
    """
    parameters: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{option} takes name=value, not {argument!r}")
        if key == "type":
            raise UserError(f"{option} cannot change the method; use --attn")
        if key in parameters:
            raise UserError(f"{option} gives {key} twice, the second time as {argument!r}")
        parameters[key] = _value(key, value.strip())
    return parameters


def make_method(settings: Mapping[str, Any]) -> Method:
    """Build the method.

    Raises:
        UserError: if the settings are wrong, in the library's own words.
    """
    from diffattn.methods import from_dict

    try:
        return from_dict(dict(settings))
    except (ValueError, TypeError) as error:
        raise UserError(error) from None


def _read_json(config: Path) -> Any:
    try:
        return json.loads(config.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --attn-config {config}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--attn-config {config} is not JSON: {error}") from None


def _value(key: str, text: str) -> Any:
    """A value, or a schedule of values by step as `read_schedule` reads it."""
    from diffattn.schedule import read_schedule

    try:
        schedule = read_schedule(text, _parse)
    except ValueError as error:
        raise UserError(f"--attn-arg {key}={text}: {error}") from None
    return _parse(text) if schedule is None else schedule


def _parse(text: str) -> Any:
    """Read a value as JSON or Python writes it; other text is a word, or words at commas."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue  # the last two are of very deep brackets
    return tuple(_parse(part.strip()) for part in text.split(",")) if "," in text else text
