"""Attention kernels: tensors in, tensors out.

They know blocks, never methods, models or diffusers.
"""
