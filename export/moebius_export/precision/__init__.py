"""Typed graphs: fp16 and bf16 files made from the fp32 graphs of a bundle, by a plan that says why."""
