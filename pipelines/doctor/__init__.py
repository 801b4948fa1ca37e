"""`diffattn doctor`: checks of an installation, one module for each section of the report."""
