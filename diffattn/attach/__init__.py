"""Attaching methods to diffusers pipelines and models.

`attachment` is what a pipeline's denoisers share, `denoiser` what is done to each of them,
`backend` the function that diffusers' dispatch calls, and `sites` the modules that call.
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
