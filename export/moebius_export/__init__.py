"""From the PyTorch checkpoint to a bundle that a device runs."""
