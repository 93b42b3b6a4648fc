"""Modules of version 0.1 and where they are now, for `moebius_runtime.moved`."""

MOVED = {
    "bytes_of": "moebius_calibration.formats",
}
