"""FreeSwim: a window of the trained size, and the two paths of upscaling."""

from diffattn.methods.freeswim.method import FreeSwimAttn

__all__ = ["FreeSwimAttn"]
