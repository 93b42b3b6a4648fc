"""The INT8 and FP8 files of a bundle, for TensorRT and for ONNX Runtime on the CPU."""
