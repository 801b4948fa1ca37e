"""From the options of `diffattn generate` to the videos to make and their paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, shortened
from .method_settings import MethodOptions, attention_settings, make_method
from .outputs import Outputs, check_outputs, plan_outputs
from .pipeline_class import model_makes_pictures
from .processes import check_processes
from .prompts import read_prompts
from .request import BUNDLED_MODEL, TEXT, Request, check_option
from .sidecar import read_settings
from .sources import source_files
from .trained_lora import loras_of, read_lora_record, with_paths

if TYPE_CHECKING:
    from diffattn.lora.adapter import LoraRecord


# The default method of pictures: the one of videos leaves nothing out of a single frame.
_FOR_PICTURES = {"type": "gna"}

# Of file systems in use, in bytes.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Source:
    """The source of the prompts; exactly one of the attributes is given.

    Attributes:
        prompt: the prompt itself.
        prompts_file: UTF-8 file with one prompt a line.
        record: the JSON sidecar of a run to repeat.
    """

    prompt: str | None
    prompts_file: Path | None
    record: Path | None


@dataclass(frozen=True)
class Job:
    """Videos or pictures that differ only in their prompts, and the files of each.

    Attributes:
        requests: one for each video or picture.
        outputs: the files of each.
        record: how the LoRA of the requests was trained; None without a LoRA, and for a LoRA that
            was not trained by `diffattn lora train`.
    """

    requests: list[Request]
    outputs: list[Outputs]
    record: LoraRecord | None


def plan_job(
    source: Source,
    method: MethodOptions,
    given: Mapping[str, Any],
    output: str | None,
    say: Callable[[str], None],
) -> Job:
    """Check everything that needs no model, and lay out the run.

    Args:
        source: the prompts, or a recorded run.
        method: the attention method.
        given: the settings that the user gave, by the names of `Request`.
        output: the file or folder that the user named.
        say: takes lines for the user.

    Raises:
        UserError: if a source, a setting, the method, the LoRA or an output is refused.
    """
    if sum(one is not None for one in (source.prompt, source.prompts_file, source.record)) != 1:
        raise UserError("give exactly one of PROMPT, --prompts-file and --from")
    check_output_name(output)
    settings: dict[str, Any] = {}
    # Files that the run reads, and files of the repeated run: no output may replace these.
    inputs = [path for path in (source.prompts_file, method.config) if path is not None]
    if source.record is not None:
        settings, recorded_files, changes = read_settings(source.record)
        inputs += recorded_files
        for change in changes:
            say(f"note: {change}: the frames may differ")
    settings |= given
    for name in ("model", "last_image", "input"):
        if name in given:
            check_option(name, given[name], TEXT)
            settings[name] = absolute(given[name])
    if "lora" in given:
        settings["lora"] = with_paths(given["lora"], absolute)
    if "image" in given:
        settings["image"] = tuple(absolute(name) for name in given["image"])
    record = _lora_record(settings, given, method)
    # A repeated run keeps the method of its record.
    trained = record if "lora" in given else None
    open_method = (method.name, method.config, settings.get("attention"), trained) == (None,) * 4
    settings["attention"] = _attention(method, settings, trained, say)
    prompts = _prompts(source, settings, say)
    requests = [Request.from_dict({**settings, "prompt": prompt}) for prompt in prompts]

    first = requests[0]
    _check_steps(first)
    check_processes(first)
    inputs += [Path(lora.path) for lora in loras_of(first.lora)]
    inputs += source_files(first)
    several = source.prompts_file is not None
    pictures = first.model != BUNDLED_MODEL and model_makes_pictures(first.model)
    if pictures and open_method:
        attention = attention_settings(method, _FOR_PICTURES)
        requests = [dataclasses.replace(request, attention=attention) for request in requests]
    outputs = plan_outputs(output, prompts, several, first.seed, pictures)
    check_outputs(outputs, first.compare, first.fps, inputs)
    return Job(requests, outputs, record)


def _check_steps(request: Request) -> None:
    """Check that lists of values by step fit the number of steps, where that is known by now."""
    if request.steps is None or request.strength is not None:
        return
    try:
        make_method(request.attention).at_step(0, request.steps)
    except ValueError as error:
        raise UserError(f"--steps {request.steps}: {error}") from None


def _lora_record(
    settings: Mapping[str, Any], given: Mapping[str, Any], method: MethodOptions
) -> LoraRecord | None:
    """The record of the LoRAs in settings, which may come from a file that anybody has edited."""
    lora = settings.get("lora")
    names = lora if isinstance(lora, list | tuple) else (lora,)
    if not all(TEXT.holds(name) for name in names):
        return None  # `Request` refuses them, by their name
    # An option chooses the method, or a repeated run's record does; otherwise the LoRAs do.
    agreeing = method.name is None and method.config is None
    agreeing = agreeing and ("lora" in given or "attention" not in settings)
    return read_lora_record(tuple(names), agreeing=agreeing)


def check_output_name(output: str | None) -> None:
    """Check the name that a user gives to an output; None is no name.

    Raises:
        UserError: for a blank name, bytes that are no UTF-8, and names that no file can have.
    """
    if output is None:
        return
    check_option("output", output, TEXT)
    for part in Path(output).parts:
        length = len(part.encode())
        if length > _LONGEST_NAME:
            raise UserError(
                f"--output: the name {shortened(part)} has {length} bytes, but files have at most"
                f" {_LONGEST_NAME}"
            )
        if "\0" in part:
            raise UserError(f"--output: the name {shortened(repr(part))} holds a zero byte")


def _attention(
    method: MethodOptions,
    settings: Mapping[str, Any],
    record: LoraRecord | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Choose the method: that of the options, else the LoRA's, else that of the repeated run."""
    if record is None:
        return attention_settings(method, settings.get("attention"))
    try:
        trained = make_method(record.method).to_dict()
    except UserError as error:
        name = record.method.get("type")
        if method.name is None and method.config is None:
            raise UserError(
                f"the LoRA was trained under {name}, which cannot be had here ({error}); install"
                f" the package or the version that has it, or choose another method by --attn"
            ) from None
        say(f"note: the LoRA was trained under {name}, which cannot be had here ({error})")
        return attention_settings(method, None)
    chosen = attention_settings(method, trained)
    if chosen != trained:
        say(f"note: the LoRA was trained under {_words(trained)}, not {_words(chosen)}")
    else:
        say(f"the LoRA was trained under {_words(chosen)}, which is attached (--attn overrides)")
    return chosen


def _words(method: Mapping[str, Any]) -> str:
    """A method's name, and its parameters that differ from the defaults."""
    plain = make_method({"type": method["type"]}).to_dict()
    given = [f"{name}={value}" for name, value in method.items() if value != plain.get(name)]
    return f"{method['type']} ({', '.join(given)})" if given else str(method["type"])


def _prompts(
    source: Source, settings: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[str, ...]:
    if source.prompts_file is None:
        return (settings.get("prompt", "") if source.prompt is None else source.prompt,)
    read = read_prompts(source.prompts_file)
    if read.blank_lines:
        lines = ", ".join(map(str, read.blank_lines))
        say(f"note: skipped blank lines of {source.prompts_file}: {lines}")
    if read.hash_lines:
        lines = ", ".join(map(str, read.hash_lines))
        say(f"note: lines of {source.prompts_file} that begin with # are prompts, too: {lines}")
    return read.prompts


def absolute(path: str) -> str:
    """Make the path of an existing file absolute, so that a record works from any folder."""
    found = path != BUNDLED_MODEL and Path(path).expanduser().exists()
    return str(Path(path).expanduser().resolve()) if found else path
