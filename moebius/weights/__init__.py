"""Weights: where they come from, how they are checked, and networks with weights in them."""
