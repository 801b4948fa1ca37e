"""Adapting a pipeline to the sparse attention it runs under, by LoRA."""
