"""Attaching a method to every pipeline and model at the moment that it is made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffattn.attach.attachment import Attachment, set_attn_processor
from diffattn.methods.base import Method
from diffattn.models import denoisers, family_of, refusal


@dataclass
class Made:
    """The attachments of a test, and the reasons of pipelines and models that have none."""

    attachments: list[Attachment] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class Construction:
    """Hooks after the `__init__` of diffusers' pipelines and models, of later subclasses too.

    Outside of `attaching` the hooks do nothing. `restore` takes them off.
    """

    def __init__(self, method: Method) -> None:
        from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline

        self._method = method
        self._made: Made | None = None
        self._under_way: set[int] = set()
        self._undo: list[Callable[[], None]] = []
        for base in (DiffusionPipeline, ModelMixin, ModularPipeline):
            self._hook_subclasses(base)
        # A modular pipeline is made without its components.
        self._replace(ModularPipeline, "register_components", self._then_attach)

    @contextmanager
    def attaching(self) -> Iterator[Made]:
        """Attach to every pipeline and model that is made while the block runs."""
        self._made = made = Made()
        try:
            yield made
        finally:
            self._made = None

    def restore(self) -> None:
        """Take the hooks off the classes of diffusers."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _hook_subclasses(self, base: type) -> None:
        classes, seen = [base], set()
        while classes:
            cls = classes.pop()
            if cls not in seen:
                seen.add(cls)
                classes.extend(cls.__subclasses__())
                self._hook(cls)

        def hook_new(cls: type[Any], **kwargs: Any) -> None:
            super(base, cls).__init_subclass__(**kwargs)  # type: ignore[arg-type]
            self._hook(cls)

        base.__init_subclass__ = classmethod(hook_new)  # type: ignore[assignment]
        self._undo.append(lambda: delattr(base, "__init_subclass__"))

    def _hook(self, cls: Any) -> None:
        if "__init__" in vars(cls):
            self._replace(cls, "__init__", self._then_attach)

    def _replace(self, cls: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        method = vars(cls)[name]
        setattr(cls, name, wrap(method))
        self._undo.append(lambda: setattr(cls, name, method))

    def _then_attach(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(made: Any, *args: Any, **kwargs: Any) -> Any:
            # Only the outermost of the calls that make an object: it is complete then.
            inner = id(made) in self._under_way
            self._under_way.add(id(made))
            try:
                out = method(made, *args, **kwargs)
            finally:
                if not inner:
                    self._under_way.discard(id(made))
            if not inner and self._made is not None:
                self._attach(made, self._made)
            return out

        return wrapped

    def _attach(self, target: Any, made: Made) -> None:
        is_pipeline = hasattr(target, "components")
        try:
            denoisers(target) if is_pipeline else family_of(target)
        except ValueError:
            # Pipelines before their components are loaded, autoencoders, and models refused.
            reason = None if is_pipeline else refusal(target)
            made.refused.extend([] if reason is None else [reason])
            return
        try:
            attachment = set_attn_processor(target, self._method)
        except ValueError as error:
            made.refused.append(str(error))
        else:
            assert attachment is not None
            made.attachments.append(attachment)
