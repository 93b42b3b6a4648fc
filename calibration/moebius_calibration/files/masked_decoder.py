"""INT8 for the masked decode: its graphs take layers and ranges from the full decoder, whose weights they share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from moebius_calibration.files.int8_arrays import Range
from moebius_calibration.graph.cpu_candidates import Candidate, candidates
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.decoding import MASKED

Numbers = tuple[frozenset[str], dict[str, Range], dict[str, np.ndarray]]
"""Nodes in INT8, and ranges and smoothing factors of the values that they read."""


def masked_decoder(
    bundle: Bundle, nodes: frozenset[str], ranges: Mapping[str, Range], smooth: Mapping[str, np.ndarray]
) -> dict[GraphName, Numbers]:
    """What of the masked decode's graphs is in INT8; none where the bundle has no such graphs.

    A layer of theirs is one of the full decoder's on a part of its values, or on an overview of them. Its place in the
    weights file tells which one. What was measured for that one holds for it.

    Args:
        bundle: with its float32 files.
        nodes, ranges, smooth: those of the full decoder.
    """
    decoders = bundle.manifest.decoders
    there = [name for name in MASKED if name in decoders and "fp32" in decoders[name].files]
    if not there:
        return {}
    full = {place: candidate for place, candidate in _by_place(bundle, "vae_decoder") if candidate.node in nodes}
    found: dict[GraphName, Numbers] = {}
    for name in there:
        own: set[str] = set()
        own_ranges: dict[str, Range] = {}
        own_smooth: dict[str, np.ndarray] = {}
        for place, candidate in _by_place(bundle, name):
            source = full.get(place)
            if source is None or len(source.activations) != len(candidate.activations):
                continue
            own.add(candidate.node)
            for value, measured in zip(candidate.activations, source.activations, strict=True):
                own_ranges[value] = ranges[measured]
                if measured in smooth:
                    own_smooth[value] = smooth[measured]
        found[name] = frozenset(own), own_ranges, own_smooth
    return found


def _by_place(bundle: Bundle, name: GraphName) -> list[tuple[tuple[object, ...], Candidate]]:
    """The candidates of a graph with the places of their weights in the weights file."""
    model = onnx.load(str(bundle.model_file(name)), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found, _ = candidates(model)
    return [(tuple(_place(stored[one]) for one in candidate.weights), candidate) for candidate in found.values()]


def _place(tensor: onnx.TensorProto) -> object:
    """Where a tensor lies in the weights file, or the bytes of one that lies in the graph's."""
    if not tensor.external_data:
        return tensor.raw_data
    return tuple((one.key, one.value) for one in tensor.external_data if one.key in ("location", "offset"))
