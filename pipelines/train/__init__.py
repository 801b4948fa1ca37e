"""LoRA training from the command line: the run, and the clips it renders on the way."""
