"""The noise schedule and the samplers."""
