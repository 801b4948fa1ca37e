"""The model card beside a trained LoRA: README.md, as the Hub shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from diffattn.lora.adapter import LORA_FILE, METHOD_FILE, SECOND_EXPERT, LoraRecord

CARD_FILE = "README.md"
_MARK = "<!-- written by diffattn lora train -->"


def write_card(
    folder: Path, place: Path, record: LoraRecord, figures: Mapping[str, tuple[float, float]]
) -> None:
    """Write the card of a LoRA, unless the place has a README.md that somebody else has written.

    Args:
        folder: the folder to write into.
        place: the folder that the card goes to.
        record: how the LoRA was trained.
        figures: figures before and after, by name.
    """
    there = place / CARD_FILE
    if there.is_file() and _MARK not in there.read_text("utf-8", "replace"):
        return
    (folder / CARD_FILE).write_text(card(record, figures), "utf-8")


def card(record: LoraRecord, figures: Mapping[str, tuple[float, float]]) -> str:
    """The text of a card."""
    method = str(record.method["type"])
    model = record.model or f"a {record.family or 'diffusion'} model"
    second = record.denoiser == SECOND_EXPERT
    settings = record.settings
    base = f"base_model: {json.dumps(record.model)}\n" if _is_hub_id(record.model) else ""
    kept = {k: v for k, v in record.method.items() if k != "type" and v is not None}
    rows = {
        "base model": model + (f" ({record.family})" if record.family and record.model else ""),
        "component": record.denoiser,
        "attention": f"{method} ({', '.join(f'{k}={v}' for k, v in kept.items())})",
        "density": None
        if record.density is None
        else f"{record.density:.1%} of the token pairs, at the size of the training",
        "clips": None if record.clips is None else str(record.clips),
        "size": f"{' x '.join(map(str, record.latents))} (latents: channels x frames x height x"
        f" width)",
        "steps": str(record.steps),
        "rank, alpha": f"{settings.get('rank')}, {settings.get('alpha')}",
        "started from": settings.get("init_lora"),
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    text = [
        f"---\nlibrary_name: diffusers\n{base}tags:\n- lora\n- diffattn\n- sparse-attention\n"
        f"- {method}\n---\n{_MARK}\n",
        f"# A LoRA for {model} under {method} attention\n",
        "| | |\n|---|---|\n" + "\n".join(lines) + "\n",
    ]
    if figures:
        measured = [f"| {n} | {a:.4g} | {b:.4g} |" for n, (a, b) in figures.items()]
        text.append("| | before | after |\n|---|---|---|\n" + "\n".join(measured) + "\n")
    into = f", load_into_{SECOND_EXPERT}=True" if second else ""
    text.append(
        "```python\nimport diffattn\n\n"
        "diffattn.lora.load_lora(pipe, FOLDER)  # with the method; the LoRA is on where it is\n"
        f"pipe.load_lora_weights(FOLDER{into})  # or the LoRA alone, in stock diffusers\n```\n"
    )
    text.append(f"`{LORA_FILE}` holds the LoRA; `{METHOD_FILE}`, if there, the method's weights.\n")
    return "\n".join(text)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _is_hub_id(model: str | None) -> bool:
    return model is not None and model.count("/") == 1
