"""The `diffattn` command: one file for each sub-command."""

from .commands import app, main, run

__all__ = ["app", "main", "run"]
