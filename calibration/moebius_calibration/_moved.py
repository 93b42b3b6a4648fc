"""Modules of version 0.1 and where they are now, for `moebius_runtime.moved`."""

MOVED = {
    "bytes_of": "moebius_calibration.ranges.formats",
    "formats": "moebius_calibration.ranges.formats",
    "gain": "moebius_calibration.graph.gain",
    "graph_work": "moebius_calibration.choice.graph_work",
    "int8_arrays": "moebius_calibration.files.int8_arrays",
    "int8_cpu_file": "moebius_calibration.files.int8_cpu_file",
    "observe": "moebius_calibration.ranges.observe",
    "observers": "moebius_calibration.ranges.observers",
    "ort_cpu": "moebius_calibration.files.ort_cpu",
    "products": "moebius_calibration.graph.linear_ops",
    "scheme": "moebius_calibration.ranges.scheme",
    "search": "moebius_calibration.choice.search",
    "simulate": "moebius_calibration.choice.simulate",
    "statistics": "moebius_calibration.ranges.statistics",
    "tensorrt": "moebius_calibration.files.tensorrt",
    "timing": "moebius_calibration.files.timing",
    "write": "moebius_calibration.files.write",
}
