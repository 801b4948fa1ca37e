"""Attaching methods to diffusers pipelines and models.

`attachment` holds the state that a pipeline's denoisers share, and `denoiser` attaches to one
denoiser. `backend` has the function that diffusers' dispatch calls. `sites` finds the attention
modules.
"""

from diffattn.attach.attachment import Attachment, Description, set_attn_processor
from diffattn.attach.denoiser import AttachedModel, attached_to
from diffattn.attach.sites import set_processor, site_names

__all__ = [
    "AttachedModel",
    "Attachment",
    "Description",
    "attached_to",
    "set_attn_processor",
    "set_processor",
    "site_names",
]
