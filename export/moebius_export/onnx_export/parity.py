"""Compares an exported file with PyTorch on one random input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from moebius_export.errors import ParityError
from moebius_export.network.wrappers import GuidedUNet
from moebius_export.onnx_export.convert import GraphSpec
from moebius_runtime.backends.ort import add_kernels, import_onnxruntime
from moebius_runtime.bundle.manifest import Parity
from moebius_runtime.kernels import VARIANTS

# float32 on both sides: only the order of additions differs. Measured on the full-size graphs with random test weights:
# U-Net 8e-6, VAE encoder 1.3e-5, decoder 1.6e-5. A weight tensor that is off by 1 % costs 3.5e-5 or more (16 tensors
# tried on the small preset); a norm's epsilon off by ten costs 2e-6 to 6e-5, so not every such slip is seen here.
RELATIVE_BUDGET = 3e-5


def reference_output(spec: GraphSpec) -> np.ndarray:
    """PyTorch's output on the spec's example inputs."""
    with torch.inference_mode():
        output: np.ndarray = spec.module.eval()(*spec.inputs.values()).numpy()
    return output


def unet_references(guided: GraphSpec, conditional: GraphSpec) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch's outputs of the guided and of the conditional U-Net, from one pass of the network.

    The guided U-Net computes both branches, so the conditional branch needs no pass of its own.

    Raises:
        ValueError: the two graphs have other inputs, or `guided` is not a `GuidedUNet`.
    """
    *inputs, scale = guided.inputs.values()
    if not isinstance(guided.module, GuidedUNet) or not all(map(torch.equal, inputs, conditional.inputs.values())):
        raise ValueError("expected a GuidedUNet and a ConditionalUNet with the same sample and timestep")
    with torch.inference_mode():
        unconditional, noise = guided.module.eval().both(*inputs)
        return guided.module.guided(unconditional, noise, scale).numpy(), noise.numpy()


def run_file(path: Path, inputs: Mapping[str, np.ndarray], *, kernels: bool = False) -> np.ndarray | None:
    """ONNX Runtime's output on the CPU, with the functions' bodies; or with compiled kernels, None without these."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if kernels and add_kernels(options, path) not in VARIANTS:
        return None
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, dict(inputs))[0]
    return output


def check_parity(spec: GraphSpec, path: Path, expected: np.ndarray, budget: float = RELATIVE_BUDGET) -> Parity:
    """The file's relative L2 and worst absolute error; the larger ones where compiled kernels run its functions too.

    Raises:
        ParityError: the error is over `budget`, a value is not finite, or the reference is constant, so that an
            agreement would prove nothing.
    """
    if not np.isfinite(expected).all() or float(np.ptp(expected)) == 0:
        raise ParityError(f"{spec.name}: PyTorch's own output is constant or not finite; check the weights")
    inputs = {name: tensor.numpy() for name, tensor in spec.inputs.items()}
    found = []
    for kernels in (False, True):
        got = run_file(path, inputs, kernels=kernels)
        if got is not None:
            who = f"{spec.name}, compiled kernels" if kernels else spec.name
            found.append(_parity(who, got, expected, budget))
    return Parity(
        relative_error=max(one.relative_error for one in found), max_error=max(one.max_error for one in found)
    )


def _parity(who: str, got: np.ndarray, expected: np.ndarray, budget: float) -> Parity:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        found, wanted = f"{got.dtype} {list(got.shape)}", f"{expected.dtype} {list(expected.shape)}"
        raise ParityError(f"{who}: the file gives {found}, PyTorch {wanted}; nothing was written")
    difference = got.astype(np.float64) - expected
    relative = float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))
    if not relative <= budget:  # also catches NaN
        raise ParityError(
            f"{who}: relative error {relative:.2e} against PyTorch, at most {budget:.0e} is allowed; "
            "nothing was written"
        )
    return Parity(relative_error=relative, max_error=float(np.abs(difference).max()))
