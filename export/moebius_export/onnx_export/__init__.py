"""`moebius-export onnx`: PyTorch to a checked bundle."""
