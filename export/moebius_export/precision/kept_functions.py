"""Functions that stay functions in a mixed-precision file, for a plugin that runs each call as one operator.

Such a node has one type in a plan. Its inside is still measured: ranges are those of its whole body, and
trials run the body with every value rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import onnx

from moebius_export.errors import ExportError
from moebius_export.graph.kinds import LowType
from moebius_export.graph.opened import Opened
from moebius_export.trajectories.ranges import Ranges
from moebius_runtime.kernels import DOMAIN

Keepable = Literal["LocalLambda"]
"""Functions that a plugin exists for."""

_PLUGIN_INPUTS = 4  # query, values, summary, window


def check_kept(graphs: Collection[Opened], keep: Sequence[str], to: LowType) -> None:
    """Checks that a plugin can run the functions.

    Args:
        graphs: of the bundle, opened with `keep`.
        keep: functions that are to stay.
        to: the lower type.

    Raises:
        ExportError: no graph calls such a function, or calls it with another body than "convolution"; a type that the
            plugin does not have.
    """
    for name in keep:
        if to != "fp16":
            raise ExportError(
                f"--keep {name} with {to}: the plugin takes float32 and float16 only; leave --keep out, or use fp16"
            )
        calls = [node for graph in graphs for node in calls_of(graph, (name,))]
        if not calls:
            raise ExportError(
                f"--keep {name}: no graph of this bundle calls it; export the bundle with its rewrites "
                "(`moebius-export onnx --target tensorrt`), or leave --keep out"
            )
        for node in calls:
            if len(node.input) != _PLUGIN_INPUTS:
                raise ExportError(
                    f"--keep {name}: {node.name} has {len(node.input)} inputs, the body for CPUs; the plugin takes "
                    f"the {_PLUGIN_INPUTS} of the body 'convolution'. Export the bundle with --target tensorrt"
                )


def calls_of(graph: Opened, keep: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that call functions of these names."""
    return [node for node in graph.model.graph.node if node.domain == DOMAIN and node.op_type in keep]


def folded(ranges: Ranges, graph: Opened, keep: Sequence[str]) -> Ranges:
    """Ranges of a graph whose functions were all inlined, as those of one where some are kept.

    A call's largest value is that of all its body. Its root mean square is that of the last value the body makes,
    which is its output but for reshaping.
    """
    calls = {node.name for node in calls_of(graph, keep)}
    found = Ranges(runs=ranges.runs)
    for value, largest in ranges.largest.items():
        above = value.rpartition("/")[0]
        name = above if above in calls else value
        found.largest[name] = max(found.largest.get(name, 0.0), largest)
        found.squares[name] = ranges.squares[value]
    return found
