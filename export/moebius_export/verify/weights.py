"""Compares the weights of an ONNX file with the checkpoint, element by element.

A small change of one element may stay below any budget of the output's error, so weights are compared too. This covers
every tensor that is a parameter of the checkpoint: unchanged, transposed, or with a batch norm folded in. Tensors
computed from parameters in other ways (tables, products of weights) are checked by the output alone; the report counts
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from moebius_export.errors import ExportError
from moebius_export.verify.results import Check, verdict

# Folding a batch norm rounds three or four times in float32 (6e-8 each).
_FOLDED_TOLERANCE = 1e-6
# Fewer distinct values, such as 0, 0.5 and 1, do not show that a tensor was rounded.
_MIN_DISTINCT = 16
_ALMOST_ALL = 0.99
_FLOATS = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}
_NAMED = 8  # number of tensors in a message


@dataclass(frozen=True)
class _Known:
    """A tensor that the file may hold: name, values [numel], and the tolerance of each element."""

    name: str
    values: np.ndarray
    slack: np.ndarray | None = None

    def differs(self, found: np.ndarray, part: slice = slice(None)) -> np.ndarray:
        """Mask of the elements of `found` [numel], or of a part of it, that differ from this tensor."""
        if self.slack is None:
            return found[part] != self.values[part]
        errors = np.abs(found[part].astype(np.float64) - self.values[part])
        return ~(errors <= self.slack[part])  # so that NaN differs


@contextmanager
def norm_pairs(module: nn.Module) -> Iterator[dict[str, str]]:
    """Maps each batch norm to the convolution or linear layer before it; filled while the module runs."""
    pairs: dict[str, str] = {}
    outputs: dict[int, tuple[str, torch.Tensor]] = {}  # a reference to the tensor keeps its id unique
    handles = []
    for name, child in module.named_modules():
        if isinstance(child, (nn.Conv2d, nn.Conv3d, nn.Linear)):

            def note(_module: nn.Module, _inputs: object, output: torch.Tensor, name: str = name) -> None:
                outputs[id(output)] = (name, output)

            handles.append(child.register_forward_hook(note))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):

            def pair(_module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in outputs:
                    pairs[name] = outputs[id(inputs[0])][0]
                outputs.clear()

            handles.append(child.register_forward_pre_hook(pair))
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()
        outputs.clear()


def weight_checks(
    subject: str, path: Path, module: nn.Module, pairs: Mapping[str, str], rewritten: bool
) -> list[Check]:
    """Compares every float tensor of a float32 file with the checkpoint.

    Args:
        subject: of the checks.
        path: the ONNX file, which is undamaged.
        module: the PyTorch module with the checkpoint in it.
        pairs: see `norm_pairs`.
        rewritten: the manifest lists rewrites of this graph, which may store other values under a parameter's name.
            Then a tensor must equal the checkpoint only if most of its elements do.

    Raises:
        ExportError: a tensor of the file cannot be read.
    """
    model = onnx.load(str(path), load_external_data=False)
    pool = _Pool(module, pairs)
    wrong: list[str] = []
    rounded: list[str] = []
    compared = derived = tensors = 0
    for tensor in _float_tensors(model):
        values = _array(tensor, path)
        match = pool.compare(tensor.name, values, rewritten)
        if match is None:
            derived += values.size
            if _rounded(values):
                rounded.append(tensor.name)
        else:
            compared += values.size
            tensors += 1
            if match:
                wrong.append(match)
                if _rounded(values):
                    rounded.append(tensor.name)
    total = max(1, compared + derived)
    coverage = (
        f"{compared:,} values of {tensors} tensors equal the checkpoint's; {derived:,} ({derived / total:.2%}) were "
        "computed from it and are checked by the output alone"
    )
    types = _types(model)
    return [
        verdict("weights", subject, "types", types, "every stored tensor and every cast is float32 or integer"),
        verdict("weights", subject, "not rounded", _rounded_words(rounded, pool.half), "no tensor has float16 values"),
        verdict("weights", subject, "equal the checkpoint", _listed(wrong), coverage),
    ]


class _Pool:
    """The tensors of the checkpoint, also transposed and folded, by name and by number of elements."""

    def __init__(self, module: nn.Module, pairs: Mapping[str, str]) -> None:
        state = {name: tensor.numpy() for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        self.half = all(_rounded(values) for values in state.values() if values.size >= 1024)
        self._named: dict[str, list[_Known]] = {}
        self._sized: dict[int, list[_Known]] = {}
        for name, values in state.items():
            self._add(name, _Known(name, values.reshape(-1)))  # [numel]
            if values.ndim == 2:
                self._add(name, _Known(f"{name} transposed", values.T.reshape(-1)))  # [in * out]
        for norm, layer in pairs.items():
            child = module.get_submodule(norm)
            assert isinstance(child, nn.modules.batchnorm._BatchNorm)
            for name, known in _folded(state, norm, layer, child.eps):
                self._add(name, known)

    def _add(self, name: str, known: _Known) -> None:
        self._named.setdefault(name, []).append(known)
        self._sized.setdefault(known.values.size, []).append(known)

    def compare(self, name: str, found: np.ndarray, rewritten: bool) -> str | None:
        """None if the checkpoint has no similar tensor, "" if it has an equal one, else the difference as text."""
        flat = found.reshape(-1)  # [numel]
        best: tuple[float, float, _Known, np.ndarray] | None = None
        named = name in self._named and not rewritten  # then only that parameter may match
        for known in self._named[name] if named else self._sized.get(found.size, []):
            if known.values.size != found.size:
                continue
            if not named and best and known.differs(flat, slice(64)).all():  # skips clearly different tensors fast
                continue
            differs = known.differs(flat)
            share = float(differs.mean())
            if share == 0:
                return ""
            distance = float(np.linalg.norm(flat.astype(np.float64) - known.values))
            if best is None or (share, distance) < best[:2]:
                best = (share, distance, known, differs)
        if best is None:
            return f"{name} {list(found.shape)}: the checkpoint's has another size" if named else None
        share, _, expected, differs = best
        if not (named or share < 0.5):
            return None
        return _difference(name, found, expected, differs)


def _folded(state: Mapping[str, np.ndarray], norm: str, layer: str, eps: float) -> Iterator[tuple[str, _Known]]:
    """Weight and bias of the layer with the batch norm folded in. The exporter calls a new bias `weight_bias`."""
    gain, shift, mean, variance = (
        state[f"{norm}.{leaf}"].astype(np.float64) for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / np.sqrt(variance + eps)  # [out]
    weight = state[f"{layer}.weight"]
    folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))  # [out, 1, ...]
    folded = folded.reshape(-1)  # [numel]
    yield f"{layer}.weight", _Known(f"{layer}.weight with {norm}", folded, _FOLDED_TOLERANCE * np.abs(folded))
    before = state.get(f"{layer}.bias", np.zeros_like(mean))
    bias = shift + (before - mean) * scale
    slack = _FOLDED_TOLERANCE * (np.abs(shift) + (np.abs(before) + np.abs(mean)) * np.abs(scale))
    for name in (f"{layer}.bias", f"{layer}.weight_bias"):
        yield name, _Known(f"bias of {norm} in {layer}", bias, slack)


def _difference(name: str, found: np.ndarray, expected: _Known, differs: np.ndarray) -> str:
    flat = found.reshape(-1)  # [numel]
    with np.errstate(invalid="ignore"):
        errors = np.abs(flat.astype(np.float64) - expected.values)
    errors = np.where(np.isnan(errors), np.inf, errors) * differs
    worst = int(errors.argmax())
    place = [int(index) for index in np.unravel_index(worst, found.shape)]
    values = f"{flat[worst]:.6g} instead of {expected.values[worst]:.6g}"
    other = "the checkpoint's" if expected.name == name else f"the checkpoint's {expected.name}"
    return f"{name}: {int(differs.sum())} of {flat.size} values differ from {other}, worst at {place}: {values}"


def _float_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and constants of any float type. Functions and branches have none in our exports."""
    for tensor in (*model.graph.initializer, *_constants(model)):
        if tensor.data_type == onnx.TensorProto.FLOAT or tensor.data_type in _FLOATS:
            yield tensor


def _constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensor = onnx.TensorProto()
                tensor.CopyFrom(attribute.t)
                tensor.name = node.output[0]
                yield tensor


def _array(tensor: onnx.TensorProto, path: Path) -> np.ndarray:
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor, str(path.parent))).astype(np.float32)
    except (ValueError, OSError, onnx.checker.ValidationError) as error:
        raise ExportError(
            f"{path}: tensor {tensor.name} cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error


def _rounded(values: np.ndarray) -> bool:
    """Whether nearly all values of a float32 tensor need no more than the 10 mantissa bits of float16."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)  # [numel]
    if (bits & 0x1FFF == 0).mean() < _ALMOST_ALL:
        return False
    return len(np.unique(bits)) >= _MIN_DISTINCT


def _rounded_words(names: Sequence[str], half: bool) -> str | None:
    """Describes rounded tensors that differ from the checkpoint; those that equal it may have any values."""
    if not names or half:  # folded tensors of a half-precision checkpoint may look rounded
        return None
    return f"every value fits float16 or bfloat16, but the checkpoint is float32: {_listed(names)}"


def _types(model: onnx.ModelProto) -> str | None:
    found = [
        f"{tensor.name} is {_FLOATS[tensor.data_type]}"
        for tensor in _float_tensors(model)
        if tensor.data_type in _FLOATS
    ]
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _FLOATS:
                found.append(f"node {node.name or node.output[0]} casts to {_FLOATS[attribute.i]}")
    return _listed(found)


def _listed(words: Sequence[str]) -> str | None:
    if not words:
        return None
    more = f"; and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return "; ".join(words[:_NAMED]) + more
