"""Attachments are not pickled: their backends are entries of this process's registry."""

from __future__ import annotations

from typing import Any, NoReturn, Self


class Unpicklable:
    """A part of an attachment: pickling it says why that cannot be, and what to do."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a pipeline or model with a method of diffattn attached cannot be pickled: the method"
            " is an attention backend of this process. Call set_attn_processor(None) before"
            " pickle.dumps or torch.save, and attach the method again after loading. state_dict(),"
            " save_pretrained() and copy.deepcopy() work as it is"
        )

    def __copy__(self) -> Self:
        # The default makes a copy by way of pickling.
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied
