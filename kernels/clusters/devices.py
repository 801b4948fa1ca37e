"""Where the passes are those of Triton."""

# Types of devices that Triton compiles for.
OF_TRITON = ("cuda", "xpu")
