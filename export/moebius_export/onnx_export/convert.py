"""One PyTorch module to one simplified, checked ONNX model in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn

from moebius_export.errors import ExportError
from moebius_export.graph.functions import OPSET, attach_functions, translations
from moebius_export.graph.node_names import name_nodes
from moebius_export.onnx_export.shortcuts import shortcuts

IR_VERSION = 10  # loads wherever OPSET does

# Weights above this size stay out of constant folding. Folding exists for shapes and small tables; folding weights
# would, for one, write Interactive-λ's λp [2, n, k, v] of every layer into the file, 0.7 GB of the full-size network.
_FOLDING_LIMIT_BYTES = 16 << 10

_MOST_CELLS = 1024  # of an open size


@dataclass(frozen=True)
class GraphSpec:
    """A graph to export: its module, example inputs by name, its output's name, and inputs whose batch stays open.

    `sizes` names further axes that stay open: {input: {axis: name of its dimension}}; `output_sizes` those of the
    output that follow.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    output: str
    dynamic: Sequence[str] = ()
    local_lambda_form: str = "tiles"
    sizes: Mapping[str, Mapping[int, str]] | None = None
    output_sizes: Mapping[int, str] | None = None


def to_onnx(spec: GraphSpec, on_stage: Callable[[str], None]) -> onnx.ModelProto:
    """Traces, simplifies and checks a module.

    Args:
        spec: the module and example inputs; shapes are static but for the first axis of `spec.dynamic`.
        on_stage: called with the name of each stage when it begins.

    Raises:
        ExportError: onnxsim or onnx.checker refuse the graph, or an axis that should stay open became fixed.
    """
    on_stage("trace")
    model = _trace(spec)
    _check_open(model, spec)
    name_nodes(model)
    on_stage("simplify")
    model = _simplify(model)
    name_nodes(model)  # those that the simplifier made
    attach_functions(model, spec.local_lambda_form)
    model.ir_version = IR_VERSION
    model.producer_name = "moebius-edge"
    model.doc_string = ""
    onnx.helper.set_model_props(model, {})
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") != OPSET:
        raise ExportError(f"{spec.name}: exported as opset {opsets.get('')}, expected {OPSET}")
    return model


def _trace(spec: GraphSpec) -> onnx.ModelProto:
    dynamic = _open_axes(spec)
    with _quiet_exporter(), shortcuts(), torch.no_grad():
        program = torch.onnx.export(
            spec.module.eval(),
            tuple(spec.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(spec.inputs),
            output_names=[spec.output],
            dynamic_shapes=tuple(axes or None for axes in dynamic.values()) if any(dynamic.values()) else None,
            optimize=False,
            verbose=False,
            custom_translation_table=translations(spec.local_lambda_form),
        )
        if program is None:
            raise ExportError(f"{spec.name}: torch.onnx.export returned nothing")
        optimize_ir(program.model, num_iterations=1)  # a second round finds nothing here and takes seconds
        return program.model_proto


def _open_axes(spec: GraphSpec) -> dict[str, dict[int, torch.export.Dim]]:
    """The axes of each input that stay open."""
    axes = {name: {0: torch.export.Dim("batch", max=64)} if name in spec.dynamic else {} for name in spec.inputs}
    for name, sizes in (spec.sizes or {}).items():
        axes[name] |= {axis: torch.export.Dim(size, min=2, max=_MOST_CELLS) for axis, size in sizes.items()}
    return axes


def _check_open(model: onnx.ModelProto, spec: GraphSpec) -> None:
    """Refuses a graph whose open axes became fixed: the exporter does so where an operator reads an axis's size."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.output)}
    outputs = [0] * bool(spec.dynamic) + list(spec.output_sizes or {})
    for name, wanted in {**_open_axes(spec), spec.output: outputs}.items():
        if fixed := [axis for axis in wanted if not shapes[name][axis].dim_param]:
            found = [size.dim_param or size.dim_value for size in shapes[name]]
            raise ExportError(
                f"{spec.name}: {name} {found} should be open at axis {fixed[0]}; an operator of the module fixed it"
            )


def _simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """onnxsim with the large weights lifted out to graph inputs meanwhile.

    It then copies megabytes instead of gigabytes (full-size peak 8.3 GB before, under 3 GB so), and folds no weights.
    """
    import onnxsim

    weights = {t.name: t for t in model.graph.initializer if t.ByteSize() > _FOLDING_LIMIT_BYTES}
    small = [t for t in model.graph.initializer if t.name not in weights]
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(_without_initializers(model))
    skeleton.graph.initializer.extend(small)
    for name, tensor in weights.items():
        skeleton.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    skeleton, agreed = onnxsim.simplify(skeleton, check_n=0, certify=False)
    if not agreed:
        raise ExportError("onnxsim reports that its simplified graph differs; nothing was written")
    inputs = [value for value in skeleton.graph.input if value.name not in weights]
    del skeleton.graph.input[:]
    skeleton.graph.input.extend(inputs)
    used = {name for node in skeleton.graph.node for name in node.input}
    skeleton.graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)
    return skeleton


def _without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its initializers dropped, sharing nothing with the original; the weights are not copied."""
    bare = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            continue
        if field.is_repeated:
            getattr(bare, field.name).extend(value)
        else:
            setattr(bare, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name == "initializer":
            continue
        if field.is_repeated:
            getattr(bare.graph, field.name).extend(value)
        else:
            setattr(bare.graph, field.name, value)
    return bare


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter's remarks on packages that we do not use (torchvision) are no news to a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
