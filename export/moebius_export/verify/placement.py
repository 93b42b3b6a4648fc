"""Checks in which type and on which provider the MACs of a graph ran.

The MACs come from the graph (`moebius_export.graph.cost`), types and providers from a profile of the session: what the
runtime did, not what it was asked to do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from moebius_export.graph.cost import CostError, NodeCost, function_calls, inlined, node_costs
from moebius_export.verify.results import Check, Placement, at_least, verdict
from moebius_runtime.backends.ort import OrtBackend
from moebius_runtime.bundle.manifest import Precision

_TIME = "_kernel_time"
# Suffix of ONNX Runtime's NCHWc convolutions, which are named after their output. Fusions are named after one of their
# nodes.
_BLOCKED = "_nchwc"
# Types in which MACs of a file of that precision may run on ort-cpu. fp16 and TensorRT's int8 format are missing,
# because this runtime runs them in float32.
EXPECTED_TYPES: Mapping[Precision, frozenset[str]] = {"fp32": frozenset({"float"})}
_OTHER_FLOATS = frozenset({"float16", "bfloat16", "double"})


@dataclass(frozen=True)
class _Ran:
    """A node of the profile: provider, element type of its first input, types of all its inputs and outputs."""

    provider: str
    type: str
    types: frozenset[str]


def placement_checks(
    subject: str, precision: Precision, path: Path, events: Sequence[Mapping[str, Any]], found_budget: float
) -> tuple[list[Check], Placement | None]:
    """Reads the types and providers of a graph's MACs from a profile.

    Args:
        subject: of the checks.
        precision: of the file.
        path: the ONNX file.
        events: the profile's nodes, see `sessions.profiled_session`.
        found_budget: smallest share of the MACs that must be found in the profile.

    Returns:
        The checks, and the table of shares if the MACs of the graph can be counted.
    """
    if precision not in EXPECTED_TYPES:
        reason = f"ONNX Runtime's CPU kernels do not compute in {precision}; this needs a device that does"
        return [Check("placement", subject, "types and providers", "not run", detail=reason)], None
    try:
        model = onnx.load(str(path), load_external_data=False)
        costs = {cost.name: cost for cost in node_costs(model)}
    except CostError as error:
        return [Check("placement", subject, "types and providers", "not run", detail=str(error))], None
    ran = _by_call(model, _profile(events))
    folded = _constant_nodes(model)
    shares: dict[tuple[str, str], int] = defaultdict(int)
    unexpected: list[str] = []
    lost: list[str] = []
    total = ahead = seen = 0
    located = _locate(model, costs, ran)
    for name, cost in costs.items():
        node = located.get(name)
        if node is None and name in folded:
            ahead += cost.macs
            continue
        total += cost.macs
        if node is None:
            lost.append(name)
            continue
        seen += cost.macs
        shares[node.provider, node.type] += cost.macs
        if node.type not in EXPECTED_TYPES[precision] or node.provider not in OrtBackend.providers:
            unexpected.append(f"{name} in {node.type} on {node.provider}")
    for name, node in ran.items():
        if node.types & _OTHER_FLOATS or node.provider not in OrtBackend.providers:
            words = f"{name} in {', '.join(sorted(node.types))} on {node.provider}"
            unexpected += [words] if words not in unexpected else []
    rows = [
        (provider, kind, macs / 1e9, macs / max(1, total))
        for (provider, kind), macs in sorted(shares.items(), key=lambda item: -item[1])
    ]
    detail = ", ".join(f"{share:.2%} in {kind} on {provider}" for provider, kind, _, share in rows)
    problem = f"expected {precision} on ort-cpu, but {_some(unexpected)}" if unexpected else None
    checks = [
        at_least("placement", subject, "MACs found", seen / max(1, total), found_budget, _some(lost)),
        verdict("placement", subject, "types and providers", problem, f"{detail}; {total / 1e9:.2f} GMAC"),
    ]
    return checks, Placement(subject, rows, ahead / 1e9)


def _profile(events: Sequence[Mapping[str, Any]]) -> dict[str, _Ran]:
    ran = {}
    for event in events:
        name, arguments = str(event.get("name", "")), event["args"]
        if not name.endswith(_TIME) or "provider" not in arguments:
            continue
        inputs = [kind for entry in arguments.get("input_type_shape", []) for kind in entry]
        outputs = [kind for entry in arguments.get("output_type_shape", []) for kind in entry]
        first = inputs[0] if inputs else outputs[0] if outputs else "unknown"
        ran[name.removesuffix(_TIME)] = _Ran(arguments["provider"], first, frozenset(inputs + outputs))
    return ran


def _by_call(model: onnx.ModelProto, ran: Mapping[str, _Ran]) -> dict[str, _Ran]:
    """The profile with the nodes of function bodies called CALL/NODE, as `node_costs` calls them.

    ONNX Runtime names them `_inlfunc_FUNCTION[_token_NUMBER]_NODE`, with numbers that rise in the order of the calls.
    """
    calls: dict[str, list[str]] = {function.name: [] for function in model.functions}
    for node in function_calls(model):
        calls[node.op_type].append(node.name)
    if not calls:
        return dict(ran)
    pattern = re.compile(rf"_inlfunc_({'|'.join(map(re.escape, calls))})(?:_token_(\d+))?_(.+)")
    inlined = {name: match for name in ran if (match := pattern.fullmatch(name))}
    numbers = {(match[1], int(match[2] or -1)) for match in inlined.values()}
    names: dict[tuple[str, int], str] = {}
    for function, of_function in calls.items():
        found = sorted(number for name, number in numbers if name == function)
        if len(found) == len(
            of_function
        ):  # else a call is missing in the profile, and its MACs are reported as not found
            names |= {(function, number): call for number, call in zip(found, of_function, strict=True)}
    result = {}
    for name, entry in ran.items():
        match = inlined.get(name)
        call = names.get((match[1], int(match[2] or -1))) if match else None
        result[f"{call}/{match[3]}" if match and call else name] = entry
    return result


def _locate(model: onnx.ModelProto, costs: Mapping[str, NodeCost], ran: Mapping[str, _Ran]) -> dict[str, _Ran]:
    """The profile entry of each node with MACs. A kernel for a whole function counts for all nodes of its body."""
    found = {name: node for name, node in ran.items() if name in costs}
    for call in function_calls(model):
        if call.name in ran:
            found |= {name: ran[call.name] for name in costs if name.startswith(f"{call.name}/")}
    body = inlined(model) if model.functions else model
    producers = {output: node for node in body.graph.node for output in node.output}
    producers |= {node.name: node for node in body.graph.node if "/" in node.name and node.name not in producers}
    for name, entry in ran.items():
        if name in costs:
            continue
        if name.endswith(_BLOCKED) and (node := producers.get(name.removesuffix(_BLOCKED))) is not None:
            # Activations and residual sums are fused into the convolution that is first among their inputs.
            while node.name not in costs or node.name in found:
                above = [producers[value] for value in node.input if value in producers]
                if not above or len(above) > 2:
                    break
                node = next((one for one in above if one.name in costs and one.name not in found), above[0])
            if node.name in costs:
                found.setdefault(node.name, entry)
            continue
        # The name of other fusions starts with the node's name.
        fitting = [known for known in costs if known not in found and name.startswith(known)]
        if fitting:
            found[max(fitting, key=len)] = entry
    return found


def _constant_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that depend on no input of the graph."""
    moving = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    constant = set()
    for node in model.graph.node:
        if any(name in moving for name in node.input):
            moving.update(node.output)
        else:
            constant.add(node.name)
    return constant


def _some(words: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
