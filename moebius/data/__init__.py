"""Training data: sources of pictures, random masks, resumable streams of samples, and encoded latents.

`masks` and `scenes` run without PyTorch.
"""
