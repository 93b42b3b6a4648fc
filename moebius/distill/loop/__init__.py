"""The training loop: networks and data of a run, its tasks, checkpoints and processes."""
