"""INT8: ranges on trajectories, and the files that compute with them."""
