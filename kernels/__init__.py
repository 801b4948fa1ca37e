"""Attention kernels: tensors in, tensors out.

The kernels know blocks of tokens; they know no method, no model and no diffusers.
"""
