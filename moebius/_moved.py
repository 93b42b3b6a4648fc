"""Modules of version 0.1 and where they are now, for `moebius_runtime.moved`."""

MOVED = {
    "checkpoint": "moebius.weights.checkpoint",
    "config": "moebius.network.config",
    "gla": "moebius.network.gla",
    "hub": "moebius.weights.hub",
    "lambda_layers": "moebius.network.lambda_layers",
    "lambda_ops": "moebius.network.lambda_ops",
    "layer_ops": "moebius.network.layer_ops",
    "load": "moebius.weights.load",
    "pickles": "moebius.weights.pickles",
    "sources": "moebius.weights.sources",
    "stand_in": "moebius.weights.stand_in",
    "student": "moebius.network.student",
    "teacher": "moebius.network.teacher",
    "triton_kernel": "moebius.network.triton_kernel",
    "triton_lambda": "moebius.network.triton_lambda",
    "vae": "moebius.network.vae",
    "variants": "moebius.network.variants",
}
