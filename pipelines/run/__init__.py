"""The parts of one run: its request, the model, the device, and the files that the run writes."""
