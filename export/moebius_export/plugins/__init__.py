"""Operators of domain `moebius` as TensorRT plugins. Off unless asked for: none of them has run on a GPU yet."""
