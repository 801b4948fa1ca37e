"""Checks of diffattn by tests of other projects."""
