"""Shares of a graph's MACs by the execution provider that ran them, from a profile of ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import onnx

from moebius_export.graph.cost import node_costs

_TIME = "_kernel_time"
NOT_FOUND = "not found in the profile"


def macs_by_provider(model: onnx.ModelProto, events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Returns provider -> MACs of the nodes that ran on it; `NOT_FOUND` for nodes that the profile does not name.

    ONNX Runtime names a fusion after one of its nodes, with a suffix: the longest node name that starts it counts.

    Args:
        model: of standard operators, as the session ran it.
        events: entries of the profile, each with `name` and, for a node, `args.provider`.
    """
    costs = {cost.name: cost.macs for cost in node_costs(model)}
    ran: dict[str, str] = {}
    for event in events:
        name, provider = str(event.get("name", "")), event.get("args", {}).get("provider")
        if provider is None or not name.endswith(_TIME):
            continue
        name = name.removesuffix(_TIME)
        fitting = [known for known in costs if known not in ran and name.startswith(known)]
        if name in costs or fitting:
            ran[name if name in costs else max(fitting, key=len)] = provider
    counter: Counter[str] = Counter()
    for name, macs in costs.items():
        counter[ran.get(name, NOT_FOUND)] += macs
    return dict(counter)
