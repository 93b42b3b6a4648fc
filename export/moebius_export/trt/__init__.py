"""Engines from a bundle, by TensorRT 10.3 to 11 or TensorRT-RTX. Neither PyTorch nor the `onnx` package is needed."""
