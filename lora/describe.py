"""What a LoRA's file is, of whatever program: for `diffattn lora info`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.lora.adapter import LORA_FILE, METHOD_FILE, SECOND_EXPERT, place_of, read_record
from diffattn.lora.layer_names import names_of
from diffattn.lora.loading import find_file
from diffattn.lora.lora_file import Contents, parse, read_tensors

_LOG = "losses.jsonl"
_HELD_OUT = "held-out.jsonl"
_VALIDATION = Path("validation") / "validation.jsonl"
_PROGRAMS = ("modelspec.implementation", "software", "ss_sd_scripts_commit_hash")
_BASES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")


@dataclass(frozen=True)
class LoraFacts:
    """The facts about a LoRA's file.

    Attributes:
        file: the file.
        bytes: its size.
        layout: the layout, one of `layer_names.LAYOUTS`.
        family: the family's name, or None.
        could_be: families that have all of its names, if the family is not known.
        model: the base model as recorded, or None.
        component: the pipeline's component that the LoRA is for.
        layers: number of layers, as diffusers counts them.
        targets: number of these layers by the last parts of their names.
        ranks: number of layers by rank.
        strengths: number of layers by alpha / rank.
        dtypes: number of tensors by dtype.
        parameters: number of parameters in the factors.
        extras: what else is in the file, such as text encoders, in words.
        method: the method's settings of a training by diffattn, or None.
        density: the part of the token pairs that the method keeps, or None.
        method_weights: number of the method's own weights beside the file.
        steps: optimiser steps of the training, or None.
        clips: number of clips learnt from, or None.
        figures: figures before and after, by name, if the training's folder has them.
    """

    file: str
    bytes: int
    layout: str
    family: str | None
    could_be: tuple[str, ...]
    model: str | None
    component: str
    layers: int
    targets: Mapping[str, int]
    ranks: Mapping[int, int]
    strengths: Mapping[float, int]
    dtypes: Mapping[str, int]
    parameters: int
    extras: tuple[str, ...]
    method: Mapping[str, Any] | None
    density: float | None
    method_weights: int
    steps: int | None
    clips: int | None
    figures: Mapping[str, tuple[float, float]]


def describe(path: str | Path) -> list[LoraFacts]:
    """The facts about a LoRA's file, or about the LoRAs in the folder of a training.

    Args:
        path: the file; or a folder, which may hold the LoRAs of two experts.

    Raises:
        LoraError: if there is no LoRA at `path`, or the file cannot be read.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        both = [place / LORA_FILE for place in (source, place_of(source, SECOND_EXPERT))]
        if all(file.is_file() for file in both):
            return [_facts(file, source) for file in both]
    file = find_file(source)
    return [_facts(file, source if source.is_dir() else file.parent)]


def _facts(file: Path, training: Path) -> LoraFacts:
    tensors, metadata = read_tensors(file)
    record = read_record(file)
    told = record.family if record is not None and names_of(record.family or "") else None
    contents = parse(file, tensors, metadata, told)
    own = file.parent / METHOD_FILE
    weights = len(read_tensors(own)[0]) if record is not None and own.is_file() else 0
    pairs = contents.pairs.values()
    family = record.family if record is not None and record.family else contents.family
    return LoraFacts(
        file=str(file),
        bytes=file.stat().st_size,
        layout=contents.layout,
        family=family,
        could_be=() if family else contents.candidates,
        model=(record and record.model) or _first(metadata, _BASES),
        component=record.denoiser if record is not None else contents.denoiser,
        layers=len(contents.pairs),
        targets=_targets(contents),
        ranks=_most(Counter(pair.rank for pair in pairs)),
        strengths=_most(Counter(round(pair.strength, 6) for pair in pairs)),
        dtypes=_most(
            Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
        ),
        parameters=sum(pair.down.numel() + pair.up.numel() for pair in pairs),
        extras=_extras(contents),
        method=record.method if record is not None else None,
        density=record.density if record is not None else None,
        method_weights=weights,
        steps=record.steps if record is not None else None,
        clips=record.clips if record is not None else None,
        figures=figures_of(training) if record is not None else {},
    )


def _targets(contents: Contents) -> dict[str, int]:
    """Layers by the part of their names after the last number of a block."""
    ends: Counter[str] = Counter()
    for layer in contents.pairs:
        parts = layer.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
        ends[".".join(parts[numbers[-1] + 1 :]) if numbers else layer] += 1
    return dict(ends)


def _most(counts: Counter[Any]) -> dict[Any, int]:
    return dict(counts.most_common())


def _first(metadata: Mapping[str, str], entries: tuple[str, ...]) -> str | None:
    return next((metadata[entry] for entry in entries if metadata.get(entry)), None)


def _extras(contents: Contents) -> tuple[str, ...]:
    extras = [f"{count} {kind}" for kind, count in contents.others.items()]
    if contents.unknown:
        extras.append(f"{len(contents.unknown)} layers without a name in diffusers")
    if contents.magnitudes:
        extras.append(f"{len(contents.magnitudes)} magnitudes of a DoRA")
    if contents.text_encoders:
        extras.append(f"{contents.text_encoders} tensors for text encoders")
    program = _first(contents.metadata, _PROGRAMS)
    if program is not None:
        extras.append(f"written by {program:.60}")
    return tuple(extras)


def figures_of(training: Path) -> dict[str, tuple[float, float]]:
    """The figures before and after that are in the folder of a training, by name.

    The loss is the mean over the first and the last tenth of the steps, and on held-out clips that
    of the first and the last look. A file that is missing or
    damaged has no figures.
    """
    figures: dict[str, tuple[float, float]] = {}
    losses = [entry["loss"] for entry in read_log(training / _LOG) if "loss" in entry]
    if len(losses) > 1:
        part = max(1, len(losses) // 10)
        figures["loss"] = (sum(losses[:part]) / part, sum(losses[-part:]) / part)
    held_out = [entry["loss"] for entry in read_log(training / _HELD_OUT) if "loss" in entry]
    if len(held_out) > 1:
        figures["loss on held-out clips"] = (held_out[0], held_out[-1])
    looks = [
        entry for entry in read_log(training / _VALIDATION) if entry.get("psnr_db") is not None
    ]
    if looks and looks[-1].get("psnr_untrained_db") is not None:
        figures["PSNR to dense, dB"] = (looks[-1]["psnr_untrained_db"], looks[-1]["psnr_db"])
    return figures


def read_log(file: Path) -> list[dict[str, Any]]:
    """The entries of a log of lines in JSON; none if the file is missing or damaged."""
    try:
        entries = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]
