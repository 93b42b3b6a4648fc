"""Modules of version 0.1 and where they are now, for `moebius_runtime.moved`."""

MOVED = {
    "batch": "moebius_runtime.commands.pairing",
    "blend": "moebius_runtime.images.blend",
    "cache": "moebius_runtime.files.cache",
    "colour": "moebius_runtime.images.colour",
    "comparison": "moebius_runtime.images.comparison",
    "deep_colour": "moebius_runtime.images.deep_colour",
    "devices": "moebius_runtime.hardware.devices",
    "graph_files": "moebius_runtime.bundle.graph_files",
    "manifest": "moebius_runtime.bundle.manifest",
    "masks": "moebius_runtime.images.masks",
    "metadata": "moebius_runtime.images.exif",
    "metrics": "moebius_runtime.images.metrics",
    "passport": "moebius_runtime.bundle.passport",
    "pictures": "moebius_runtime.images.pictures",
    "samplers": "moebius_runtime.sampling.samplers",
    "schedule": "moebius_runtime.sampling.schedule",
}
