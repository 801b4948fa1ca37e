"""What one run passes through: its request, the model, the device, and the files it writes."""
