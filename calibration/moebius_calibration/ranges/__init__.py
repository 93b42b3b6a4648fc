"""Ranges: statistics on trajectories, observers that turn them into ranges, and the numbers of INT8 and FP8."""
