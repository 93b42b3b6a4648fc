"""Measuring: jobs, worker processes, rounds, sensors, rates."""
