"""Mixed-precision graphs: fp16 and bf16 files from the fp32 graphs of a bundle, by a precision plan with reasons."""
