"""TensorRT plugins for operators of the domain `moebius`. Off by default, because none has run on a GPU yet."""
