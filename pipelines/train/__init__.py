"""LoRA training from the command line: the run, and the videos rendered during the run."""
