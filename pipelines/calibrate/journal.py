"""The folder of a calibration: settings, results so far, and the dense videos."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffattn.site_errors import Errors

from ..errors import UserError, shortened
from .candidates import Candidate

_FORMAT = 1


@dataclass
class Journal:
    """What has been rendered and measured, on disk after every render.

    Attributes:
        folder: the folder.
        settings: everything that the results depend on.
        errors: `site_errors` of each prompt that it was measured with.
        scores: PSNR to dense in dB, by candidate (as JSON) and prompt.
        dense: indices of the prompts whose dense video there is.
    """

    folder: Path
    settings: Mapping[str, Any]
    errors: dict[str, Errors] = field(default_factory=dict)
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    dense: list[int] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Journal:
        """The journal of a folder, new or of an earlier run with the same settings.

        Raises:
            UserError: if the folder holds another calibration, or something else.
        """
        settings = json.loads(json.dumps(settings))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "journal.json"
        if not path.exists():
            others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
            if others:
                raise UserError(
                    f"{folder} holds {shortened(', '.join(others))} and no calibration: choose an"
                    f" empty folder"
                )
            return cls(folder, settings)
        try:
            found = json.loads(path.read_text("utf-8"))
            known = found["settings"]
            journal = cls(
                folder,
                settings,
                found["errors"],
                {
                    name: {int(prompt): float(score) for prompt, score in of.items()}
                    for name, of in found["scores"].items()
                },
                list(found["dense"]),
            )
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no journal of a calibration: {error!r}") from None
        if found.get("format") != _FORMAT:
            raise UserError(f"{path} was written by another version of diffattn")
        for name in dict.fromkeys((*known, *settings)):
            if known.get(name) != settings.get(name):
                raise UserError(
                    f"{folder} holds a calibration with {name} {shortened(known.get(name))}, not"
                    f" {shortened(settings.get(name))}: choose another folder, or the same settings"
                )
        return journal

    @property
    def renders(self) -> int:
        """Number of calls of the pipeline so far."""
        scored = sum(len(of) for of in self.scores.values())
        return len(self.errors) + len(self.dense) + scored

    def score(self, candidate: Candidate, prompt: int) -> float | None:
        """The score of a candidate with a prompt; None if it is not known yet."""
        return self.scores.get(key(candidate), {}).get(prompt)

    def add_score(self, candidate: Candidate, prompt: int, score: float) -> None:
        self.scores.setdefault(key(candidate), {})[prompt] = score
        self.save()

    def frames(self, prompt: int) -> np.ndarray | None:
        """The dense frames of a prompt; None if they are not there, or cannot be read."""
        try:
            with np.load(self._video(prompt)) as found:
                frames: np.ndarray = found["frames"]
                return frames
        except (OSError, ValueError, KeyError, EOFError):
            return None

    def add_dense(self, prompt: int, frames: np.ndarray) -> None:
        part = self.folder / f".part-{prompt:02d}.npz"
        np.savez_compressed(part, frames=frames)
        part.replace(self._video(prompt))
        if prompt not in self.dense:
            self.dense.append(prompt)
            self.save()

    def add_errors(self, prompt: int, errors: Errors) -> None:
        self.errors[str(prompt)] = errors
        self.save()

    def save(self) -> None:
        """Write the journal; a crash leaves the former one."""
        text = json.dumps(
            {
                "format": _FORMAT,
                "settings": self.settings,
                "errors": self.errors,
                "scores": self.scores,
                "dense": self.dense,
            },
            indent=1,
        )
        path = self.folder / "journal.json"
        part = path.with_name(".part-journal.json")
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _video(self, prompt: int) -> Path:
        return self.folder / f"dense-{prompt:02d}.npz"


def key(candidate: Candidate) -> str:
    """The candidate as the journal names it."""
    return json.dumps(candidate.to_dict(), sort_keys=True)
