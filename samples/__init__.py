"""Runnable examples and the bundled tiny text-to-video model."""
