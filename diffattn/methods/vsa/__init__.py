"""VSA: the best tiles of the video for each tile, and a gated coarse attention of whole tiles."""

from diffattn.methods.vsa.method import VSAAttn

__all__ = ["VSAAttn"]
