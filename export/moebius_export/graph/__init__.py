"""ONNX graphs: functions of domain `moebius`, sessions, cost, names, weights files."""
