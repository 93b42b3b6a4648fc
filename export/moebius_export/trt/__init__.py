"""Builds engines from a bundle with TensorRT 10.3 to 11 or TensorRT-RTX. Needs neither PyTorch nor `onnx`."""
