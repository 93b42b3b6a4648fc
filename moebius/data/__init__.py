"""Training data: procedural scenes, free photographs, folders, JSON lines and tars; masks; resumable streams.

The modules import no more than they need: `masks` and `scenes` run without PyTorch.
"""
