"""Compares one graph on one input: ONNX Runtime with PyTorch, both run by Polygraphy's `Comparator`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER
from torch import nn

from moebius_export.trajectories.scenes import Inputs
from moebius_export.verify.results import Check, at_most, verdict
from moebius_runtime.bundle.manifest import GraphInfo, GraphName
from moebius_runtime.errors import BundleError


@dataclass(frozen=True)
class Difference:
    """The difference between `got` and `expected`, which have the same shape.

    Attributes:
        relative: L2 norm of the difference over that of the expected values.
        worst: largest absolute difference, NaN if a value is not finite.
        place: index of the worst element, or of the first one that is not finite.
        values: the two values there, got and expected.
        rms: root mean square of the expected values.
        not_finite: number of values of `got` that are NaN or infinite.
    """

    relative: float
    worst: float
    place: tuple[int, ...]
    values: tuple[float, float]
    rms: float
    not_finite: int

    @property
    def where(self) -> str:
        """Describes the worst element."""
        what = f"{self.not_finite} values are not finite, first" if self.not_finite else "worst"
        return f"{what} at {list(self.place)}: {self.values[0]:.6g}, PyTorch {self.values[1]:.6g}"


def difference(got: np.ndarray, expected: np.ndarray) -> Difference:
    """Measures the difference of two arrays of one shape, in float64."""
    first, second = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        errors = np.abs(first - second)
    broken = ~np.isfinite(first)
    flat = int(broken.argmax() if broken.any() else errors.argmax())
    place = tuple(int(index) for index in np.unravel_index(flat, got.shape))
    norm = float(np.linalg.norm(second))
    return Difference(
        relative=float(np.linalg.norm(errors)) / norm if norm else float("inf"),
        worst=float("nan") if broken.any() else float(errors.max()),
        place=place,
        values=(float(first[place]), float(second[place])),
        rms=norm / float(np.sqrt(second.size)),
        not_finite=int(broken.sum()),
    )


class TorchRunner(BaseRunner):
    """Polygraphy runner of a PyTorch module with named inputs and one output."""

    def __init__(self, module: nn.Module, info: GraphInfo) -> None:
        super().__init__(name="PyTorch")
        self._module, self._info = module, info

    def get_input_metadata_impl(self) -> Any:
        """Names, types and shapes from the manifest."""
        metadata = TensorMetadata()
        for tensor in self._info.inputs:
            shape = [None if isinstance(size, str) else size for size in tensor.shape]
            metadata.add(tensor.name, np.dtype(tensor.dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> Any:
        """Runs the module on the inputs, in the manifest's order."""
        started = perf_counter()
        with torch.inference_mode():
            output = self._module(*(torch.from_numpy(feed_dict[tensor.name]) for tensor in self._info.inputs))
        self.inference_time = perf_counter() - started  # the Comparator sums it
        return OrderedDict([(self._info.outputs[0].name, output.numpy())])


@dataclass(frozen=True)
class Compared:
    """Both outputs of one graph on one input, and their difference if shape and type agree."""

    got: np.ndarray
    expected: np.ndarray
    difference: Difference | None


def compare(session: Any, module: nn.Module, info: GraphInfo, inputs: Inputs) -> Compared:
    """Runs the session and the module on one input and measures the difference of their outputs.

    Args:
        session: ONNX Runtime session.
        module: PyTorch module of the same inputs.
        info: the graph's description in the manifest.
        inputs: one array per input.

    Raises:
        BundleError: the file cannot be run on these inputs, or has no output of the manifest's name.
    """
    runners = [OnnxrtRunner(lambda: session, name="ONNX Runtime"), TorchRunner(module, info)]
    name = info.outputs[0].name
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # its log goes to standard output
        try:
            results = Comparator.run(runners, data_loader=[inputs])
            got, expected = (np.asarray(iterations[0][name]) for _, iterations in results.items())
        except (PolygraphyException, KeyError) as error:
            raise BundleError(f"it cannot be compared: {' '.join(str(error).split())[:300]}") from error
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise BundleError(f"ONNX Runtime cannot run it: {' '.join(str(error).split())[:300]}") from error
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return Compared(got, expected, None)
    return Compared(got, expected, difference(got, expected))


def parity_checks(subject: str, compared: Compared, budgets: Mapping[str, float], hint: str = "") -> list[Check]:
    """The checks of one comparison. `hint` describes a failure, see `failure_hint`."""
    got, expected, found = compared.got, compared.expected, compared.difference
    if not np.isfinite(expected).all() or float(np.ptp(expected)) == 0:
        reason = "PyTorch's own output is constant or not finite, so agreement would prove nothing"
        return [Check("parity", subject, "relative error", "not run", detail=reason)]
    if found is None:
        what = f"the file gives {got.dtype} {list(got.shape)}, PyTorch {expected.dtype} {list(expected.shape)}"
        return [verdict("parity", subject, "relative error", what)]
    where = f"{hint}; {found.where}" if hint else found.where
    finite = None if found.not_finite == 0 else found.where
    worst = found.worst / found.rms
    return [
        verdict("parity", subject, "finite", finite),
        at_most("parity", subject, "relative error", found.relative, budgets["relative"], where),
        at_most("parity", subject, "worst element", worst, budgets["worst"], f"in root mean squares; {found.where}"),
    ]


def failure_hint(
    graph: GraphName, compared: Compared, modules: Mapping[GraphName, nn.Module], inputs: Inputs, scaling: float
) -> str:
    """Describes a wrong output: swapped guidance branches, or PyTorch's output times one factor; else empty.

    Runs PyTorch again for the former. A description must explain all but a hundredth of the error.
    """
    got, found = compared.got, compared.difference
    if found is None or found.not_finite:
        return ""
    error = float(np.linalg.norm(got - compared.expected))
    factor = float(np.vdot(got, compared.expected) / np.vdot(compared.expected, compared.expected))
    if np.linalg.norm(got - factor * compared.expected) < 0.01 * error:
        hint = f"the output is PyTorch's times {factor:.6g}"
        return f"{hint}, as with a scaling factor of {factor * scaling:.6g}" if graph == "vae_encoder" else hint
    if graph == "unet" and "guidance_scale" in inputs:
        scale = inputs["guidance_scale"]

        def guided(value: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                arrays = (inputs["sample"], inputs["timestep"], value)
                return modules["unet"](*(torch.from_numpy(array) for array in arrays)).numpy()

        unconditional = guided(np.zeros_like(scale))
        conditional = guided(np.ones_like(scale))
        swapped = conditional + scale * (unconditional - conditional)
        if np.linalg.norm(got - swapped) < 0.01 * error:
            return "the output is PyTorch's with the guidance branches swapped"
    return ""
