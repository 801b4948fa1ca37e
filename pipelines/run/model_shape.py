"""The shape of a model that a command names, with the model's own recommended sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .loading import find_model, read_defaults
from .request import BUNDLED_MODEL

if TYPE_CHECKING:
    from diffattn.planning.published import ModelShape


def shape_of(model: str) -> ModelShape:
    """The shape of a model, without its weights.

    Args:
        model: hub id of a well-known model, a pipeline's folder, or the bundled model's name.

    Raises:
        UserError: if the model is not known, or its folder cannot be read.
    """
    from diffattn.planning.plans import model_shape

    try:
        if model != BUNDLED_MODEL and not Path(model).expanduser().is_dir():
            return model_shape(model)
        from diffattn.planning.folder import ARGUMENTS  # which imports diffusers

        folder = Path(find_model(model))
        recommended = read_defaults(model, folder)
        found = {
            name: recommended[theirs]
            for name, theirs in ARGUMENTS.items()
            if recommended.get(theirs) is not None
        }
        return replace(model_shape(folder), **found)
    except ValueError as error:
        raise UserError(error) from None
