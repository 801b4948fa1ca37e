"""The ``diffattn`` command: a file for each sub-command."""

from .commands import app, main, run

__all__ = ["app", "main", "run"]
